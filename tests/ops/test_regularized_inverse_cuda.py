"""``regularized_inverse`` in CUDA C++: on a GPU where there is one and the module was built, else the very same kernels
emulated, one thread block after the other. Checks, oracles and budgets are those of every back-end.
"""

import numpy as np
import pytest
import torch
from _cases import LAYOUTS, hard_matrices, matrices, spectrum
from _checks import inverse_check
from _compare import (
    FLOOR,
    assert_budget,
    assert_identical,
    assert_near,
    assert_small_residual,
    errors,
)
from _cuda_device import DEVICE, ON_GPU, emulate
from _oracle import extended, regularized_inverse

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels import _native
from tp_kernels.ops.regularized_inverse import op

ops = torch.ops.tp_kernels
POWERS = (1.0, 0.5)
REGS = (10.0, 0.25, 1e-2)
# Both squares of threads, full and partial; tall, wide; more rows than are solved at a time; batches, and none.
SHAPES = (
    (1, 1), (1, 5), (5, 1), (3, 3), (8, 8), (9, 9), (2, 7), (17, 15), (32, 32), (33, 33), (20, 40), (64, 20), (100, 3),
    (3, 1, 1), (2, 3, 4, 5), (3, 17, 17), (0, 4, 3), (2, 0, 3, 4),
)  # fmt: skip
LARGE_SHAPES = ((48, 48), (64, 64), (65, 65), (100, 100), (300, 40), (150, 70), (128, 128))
# Bytes of shared memory of a block: H100, H200 and B200; RTX 30, 40 and 50.
SHARED = {"227KB": 232448, "99KB": 101376}
pytestmark = pytest.mark.usefixtures("cuda")


def inverse(weight: torch.Tensor, reg: float, power: float, **options: object) -> torch.Tensor:
    return tp.regularized_inverse(weight.to(DEVICE), reg, power=power, backend="cuda", **options).cpu()


# --- forward and backward


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, reg, power, dtype):
    inverse_check(matrices(shape, dtype), reg, power, "cuda", device=DEVICE)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large(shape, dtype):
    inverse_check(matrices(shape, dtype), 0.25, 1.0, "cuda", device=DEVICE)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_polar(shape, dtype):
    """The recurrence's default. The exact answer in float64 is near enough."""
    weight = matrices(shape, dtype)
    reg = float(torch.tensor(1e-4, dtype=dtype))
    exact = extended(tp.regularized_inverse(weight.double(), reg, power=0.5, backend="reference"))
    found = inverse(weight, reg, 0.5)
    if dtype == torch.float32:
        plain = tp.regularized_inverse(weight, reg, power=0.5, backend="reference")
        assert_budget(found, plain, exact, "P", condition=100)
    else:
        assert_near(found, exact, "P", condition=100)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(3, 3), (6, 2), (2, 6), (2, 5, 5)], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_deficient(rank, shape, power, dtype):
    gains = torch.zeros(min(shape[-2:]), dtype=torch.float64)
    gains[:rank] = 1.5
    inverse_check(spectrum(shape, gains, dtype), 0.1, power, "cuda", device=DEVICE)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 3, 3)], ids=str)
def test_gradcheck(shape, power):
    weight = matrices(shape, torch.float64).to(DEVICE).requires_grad_()
    reg = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, r: tp.regularized_inverse(w, r, power=power, backend="cuda"), (weight, reg)
    )


@pytest.mark.parametrize("power", POWERS)
def test_opcheck(power, dtype):
    reg = torch.tensor(0.25, dtype=torch.float64)
    for shape, layout in (((2, 3, 5), "contiguous"), ((2, 5, 3), "permuted"), ((0, 3, 4), "contiguous")):
        weight = LAYOUTS[layout](matrices(shape, dtype).to(DEVICE))
        torch.library.opcheck(ops.regularized_inverse_fwd, (weight, reg, power, True, "cuda"))
        grad = LAYOUTS[layout](matrices(weight.mT.shape, dtype, seed=1).to(DEVICE))
        torch.library.opcheck(ops.regularized_inverse_bwd, (grad, weight, grad, reg, power, "cuda"))


# --- memory


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 17), (3, 5, 5)], ids=str)
def test_layouts(shape, layout, power, dtype):
    inverse_check(matrices(shape, dtype), 0.25, power, "cuda", layout, device=DEVICE)


def test_expanded(dtype):
    """One matrix seen three times."""
    single = matrices((4, 3), dtype)
    for power in POWERS:
        found = inverse(single.expand(3, 4, 3), 0.25, power)
        assert_identical(found, inverse(single, 0.25, power).expand(3, 3, 4), "P")


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(5, 5), (3, 9, 6), (4, 7), (40, 33)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(shape, power, fences):
    inverse(matrices(shape, torch.float64), 0.25, power)
    assert len(fences) == (1 if power == 1.0 else 2)
    assert_within_fences(fences)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(2, 5, 5), (40, 33), (70, 40)], ids=str)
def test_no_races(shape, power, dtype):
    """Threads that run in the opposite order, between one barrier and the next, make no difference."""
    found = []
    for reversed in (False, True):
        emulate(reversed=reversed)
        found.append(inverse(matrices(shape, dtype), 0.25, power))
    assert_identical(*found, "P")


@pytest.mark.skipif(ON_GPU, reason="a GPU has the shared memory it has")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(100, 100), (300, 65)], ids=str)
def test_shared_memory_does_not_change_results(shape, power, dtype):
    """Not a bit: fewer rows at a time are the same sums in the same order."""
    found = []
    for limit in SHARED.values():
        emulate(shared_memory=limit)
        found.append(inverse(matrices(shape, dtype), 0.25, power))
    assert_identical(*found, "P")


@pytest.mark.parametrize("power", POWERS)
def test_deterministic_and_alone(power, dtype):
    """Bit for bit the same in every run, whatever the batch beside it."""
    weight = matrices((5, 9, 7), dtype)
    found = inverse(weight, 0.25, power)
    assert_identical(inverse(weight, 0.25, power), found, "P")
    for index in range(5):
        assert_identical(inverse(weight[index], 0.25, power), found[index], "P")


# --- contract


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(8, 5, 5), (8, 33, 33), (8, 20, 40)], ids=str)
def test_ill_conditioned(shape, power, dtype):
    """Singular values over twelve decades, and well above the smallest r."""
    gains = torch.logspace(0, -12, min(shape[-2:]), dtype=torch.float64)
    reg = 1e-3 if dtype == torch.float32 else 1e-8
    inverse_check(spectrum(shape, gains, dtype), reg, power, "cuda", on_average=True, device=DEVICE)


@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 17, 17), (12, 50, 50)], ids=str)
@pytest.mark.parametrize("kind", ["random", "decades"])
def test_smallest_reg(kind, shape, dtype):
    """1e-5 and 1e-13 of the largest s², the smallest r that float32 and float64 are said to take."""
    small = min(shape[-2:])
    gains = torch.logspace(0, -12, small, dtype=torch.float64) if kind == "decades" else torch.rand(small).double()
    gains[0] = 1
    reg = 1e-5 if dtype == torch.float32 else 1e-13
    inverse_check(spectrum(shape, gains, dtype), reg, 1.0, "cuda", on_average=True, device=DEVICE)


@pytest.mark.parametrize("reg", [1e-4, 1e-8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 7, 5), (4, 33, 33)], ids=str)
def test_polar_converges(shape, size, reg, monkeypatch):
    """Against the decomposition in float32, s_max/√r up to 1e7."""
    monkeypatch.setattr(op, "CUDA_LARGEST_COUNT", 10)
    weight = hard_matrices(shape[1:], size)
    found = inverse(weight, reg, 0.5)
    exact = regularized_inverse(extended(weight), float(torch.tensor(reg)), 0.5)
    plain = tp.regularized_inverse(weight, reg, power=0.5, backend="reference")
    assert (errors(found, exact) <= 2 * errors(plain, exact) + FLOOR[torch.float32]).all()
    assert_small_residual(found[0], weight[0], float(torch.tensor(reg)), 0.5)


@pytest.mark.parametrize(("reg", "steps"), [(0.25, 3), (1e-4, 5)], ids=str)
def test_count_of_steps(reg, steps, monkeypatch):
    """As the README says of 128 units: so many, and not one less."""
    weight = matrices((128, 128), torch.float32)
    monkeypatch.setattr(op, "CUDA_LARGEST_COUNT", steps)
    assert_small_residual(inverse(weight, reg, 0.5), weight, float(torch.tensor(reg)), 0.5)
    monkeypatch.setattr(op, "CUDA_LARGEST_COUNT", steps - 1)
    assert inverse(weight, reg, 0.5, check_errors=False).isnan().all()


@pytest.mark.parametrize("scale", [1e-17, 2e19])
def test_scale(scale):
    """The iteration is in the weight's own unit: no square over- or underflows."""
    weight = (scale * matrices((6, 4), torch.float64)).float()
    exact = regularized_inverse(extended(weight), 0.25 * scale**2, 0.5)
    assert_near(inverse(weight, 0.25 * scale**2, 0.5), exact, "P", condition=10)


@pytest.mark.parametrize("power", POWERS)
def test_numbers_whose_squares_overflow(power, dtype):
    """The Gram matrix overflows, which power 1 reports; power 1/2 does not form it."""
    weight = torch.finfo(dtype).max ** 0.75 * (torch.eye(3, dtype=dtype) if power == 0.5 else matrices((3, 3), dtype))
    if power == 1.0:
        with pytest.raises(torch.linalg.LinAlgError, match="not numerically positive definite"):
            inverse(weight, 0.25, power)
    else:
        assert_near(inverse(weight, 0.25, power), np.eye(3), "P")


@pytest.mark.parametrize(
    ("batch", "index", "where"),
    [((), (), ""), ((3,), (1,), " of batch entry 1"), ((2, 3), (1, 2), " of batch entry (1, 2)")],
    ids=str,
)
@pytest.mark.parametrize("wide", [False, True], ids=["square", "wide"])
def test_not_positive_definite(wide, batch, index, where, dtype):
    singular = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]] if wide else [[1.0, 1.0], [0.0, 0.0]]
    singular = torch.tensor(singular, dtype=dtype)
    weight = torch.eye(*singular.shape, dtype=dtype).expand(*batch, *singular.shape).clone()
    weight[index] = singular
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        inverse(weight, 1e-30, 1.0)
    assert str(caught.value) == (
        f"regularized_inverse: the Gram matrix{where} is not numerically positive definite in "
        f"{str(dtype).removeprefix('torch.')} at reg=1e-30; use a larger reg or float64"
    )
    found = inverse(weight, 1e-30, 1.0, check_errors=False)
    expected = torch.eye(*reversed(singular.shape), dtype=dtype).expand_as(found).clone()
    expected[index] = torch.nan
    assert_identical(found, expected, "P")


def test_no_convergence_is_an_error(monkeypatch, dtype):
    monkeypatch.setattr(op, "CUDA_LARGEST_COUNT", 3)
    weight = torch.stack([torch.eye(4, dtype=dtype), spectrum((4, 4), torch.tensor([1.0, 0.1, 1e-2, 1e-3]), dtype)])
    weight[0] *= 1e-3
    with pytest.raises(torch.linalg.LinAlgError, match="Gram matrix of batch entry 1 is not numerically"):
        inverse(weight, 1e-5, 0.5)
    found = inverse(weight, 1e-5, 0.5, check_errors=False)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 2), (3, 2, 5)], ids=str)
def test_what_is_not_finite_gives_nan_in_its_own_entry(shape, value, power, dtype):
    clean = matrices(shape, dtype)
    weight = clean.clone()
    weight[1, 1, 0] = value
    results = []
    for given in (weight, clean):
        given = given.to(DEVICE).requires_grad_()
        found = tp.regularized_inverse(given, 0.25, power=power, backend="cuda")
        results.append((found.detach(), *torch.autograd.grad(found.sum(), given)))
    for what, found, expected in zip(("P", "grad_weight"), *results, strict=True):
        expected[1] = torch.nan
        assert_identical(found, expected, what)


def test_reg_on_the_device(dtype):
    """Read there; on the host it is an argument of the launch. The same bits."""
    weight = matrices((4, 3), dtype).to(DEVICE)
    reg = torch.tensor(0.3, dtype=dtype)
    for power in POWERS:
        found = ops.regularized_inverse_fwd(weight, reg, power, True, "cuda")
        arguments = op._cuda_arguments(weight[None], reg)[0] | {"reg": 0.0, "reg_on_device": reg.to(DEVICE).data_ptr()}
        if ON_GPU:
            assert_identical(ops.regularized_inverse_fwd(weight, reg.to(DEVICE), power, False, "cuda"), found, "P")
            continue
        result, failed = torch.empty(1, 3, 4, dtype=dtype), torch.empty(1, dtype=torch.bool)
        arguments["failed"] = failed.data_ptr()
        if power == 1.0:
            _native.cuda.regularized_solve(
                rhs=weight.data_ptr(), rhs_strides=(12, 1, 3), solved=result.data_ptr(), **arguments
            )
        else:
            scratch = torch.empty(3, 3, dtype=dtype)
            _native.cuda.regularized_polar(
                polar=result.data_ptr(), scratch=scratch.data_ptr(), tolerance=1e-3, most=20, **arguments
            )
        assert not failed.item()
        assert_near(result[0], extended(found), "P")


# --- what it takes


@pytest.mark.parametrize(
    ("shared", "dtype", "largest"),
    [
        ("227KB", torch.float32, 128),
        ("227KB", torch.float64, 128),
        ("99KB", torch.float32, 128),
        ("99KB", torch.float64, 112),
    ],
    ids=str,
)
@pytest.mark.skipif(ON_GPU, reason="a GPU has the shared memory it has")
def test_largest_order(shared, dtype, largest):
    """The largest is a kernel's, the next one the library's."""
    emulate(shared_memory=SHARED[shared])
    for order in (largest, largest + 1):
        weight = matrices((order, order), dtype)
        assert op._cuda_takes(weight) == (order == largest)
        for power in POWERS:
            assert_small_residual(inverse(weight, 0.25, power), weight, 0.25, power)
    inverse_check(weight, 0.25, 1.0, "cuda", device=DEVICE)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_refused(name):
    with pytest.raises(tp.BackendUnavailableError, match=f"float32 and float64, and the tensors are {name}"):
        inverse(torch.eye(3, dtype=getattr(torch, name)), 0.25, 1.0)


def test_auto_does_not_take_it():
    """Until it has run on a GPU."""
    assert all("cuda" not in names for names in op.BACKENDS.preference.values())


def test_launchers_check_for_themselves():
    addresses = dict.fromkeys(("weight", "rhs", "reg_on_device", "solved", "failed", "device", "stream"), 0)
    addresses |= {"double": False, "reg": 1.0, "weight_strides": (0, 0, 0), "rhs_strides": (0, 0, 0)}
    with pytest.raises(ValueError, match="regularized_solve: n must be at most 128, got 129"):
        _native.cuda.regularized_solve(**addresses, sizes=(1, 129, 129))
    with pytest.raises(ValueError, match="regularized_solve: m must be at least n"):
        _native.cuda.regularized_solve(**addresses, sizes=(1, 3, 4))
