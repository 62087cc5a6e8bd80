"""``regularized_inverse``: the eight tests, and NumPy's solvers and decompositions as oracles."""

import math

import numpy as np
import pytest
import torch
from _cases import DTYPES, LAYOUTS, hard_matrices, matrices, spectrum
from _checks import inverse_check
from _compare import FLOOR, assert_budget, assert_identical, assert_near, assert_small_residual, errors
from _oracle import extended, regularized_inverse, regularized_inverse_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.ops.regularized_inverse import op

POWERS = (1.0, 0.5)
REGS = (10.0, 0.25, 1e-2)
# [..., m, n]: tall, wide and square, no and several batch dimensions, edges of register blocks and of vectors; batches
# of less and of more matrices than a vector has lanes.
SHAPES = (
    (1, 1), (1, 5), (5, 1), (2, 2), (3, 3), (3, 2), (2, 7), (15, 16), (16, 16), (17, 15), (33, 33), (64, 20), (20, 64),
    (3, 1, 1), (3, 4, 6), (2, 3, 5, 4), (2, 3, 4, 4), (7, 17, 17), (0, 4, 3), (2, 0, 3, 4),
    (16, 1, 1), (33, 2, 2), (19, 7, 5), (3, 7, 4, 9), (18, 16, 16), (17, 33, 32),
)  # fmt: skip
# Above 64 rows and 256 terms products are blocked.
LARGE_SHAPES = ((64, 64), (100, 100), (128, 128), (129, 129), (128, 150), (150, 129), (300, 270))
# The smallest r, relative to the largest s², at which each dtype keeps its error budget whatever W is.
SMALLEST_REG = {torch.float32: 1e-5, torch.float64: 1e-13}
ops = torch.ops.tp_kernels


# --- forward and backward


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, reg, power, dtype, backend):
    many = math.prod(shape[:-2]) >= 16  # the worst of many is luck, on either side
    inverse_check(matrices(shape, dtype), reg, power, backend, on_average=many)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large(shape, dtype, backend):
    inverse_check(matrices(shape, dtype), 0.25, 1.0, backend)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(3, 3), (6, 2), (2, 6), (2, 5, 5)], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_deficient(rank, shape, power, dtype, backend):
    gains = torch.zeros(min(shape[-2:]), dtype=torch.float64)
    gains[:rank] = 1.5
    inverse_check(spectrum(shape, gains, dtype), 0.1, power, backend)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_factored_in_float32(name, power):
    weight = matrices((2, 5, 4), getattr(torch, name)).requires_grad_()
    found = tp.regularized_inverse(weight, 0.25, power=power)
    assert_near(found, regularized_inverse(extended(weight), 0.25, power), "P")
    found.sum().backward()
    grad = np.ones_like(extended(found))
    assert_near(weight.grad, regularized_inverse_gradients(grad, extended(weight), 0.25, power)[0], "grad_weight")


# --- oracles from outside


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)], ids=str)
def test_minimizer(shape, backend):
    """``P y`` minimizes ``‖Wu - y‖² + r‖u‖²``: least squares with √r I below W and zeros below y."""
    weight, reg = matrices(shape, torch.float64), 0.3
    m, n = shape
    stacked = np.vstack([weight.numpy(), np.sqrt(reg) * np.eye(n)])
    expected = np.linalg.lstsq(stacked, np.vstack([np.eye(m), np.zeros((n, m))]))[0]
    assert_near(tp.regularized_inverse(weight, reg, backend=backend), expected, "P")


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("reg", [1e-4, 0.25, 3.0])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (3, 6, 6)], ids=str)
def test_gains(shape, reg, power, backend):
    """``P = V diag(s/(s² + r)^α) Uᵀ``: gains at most 1/(2√r) at α = 1, and below 1 at α = 1/2."""
    weight = matrices(shape, torch.float64)
    left, s, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    gains = s / (s**2 + reg) ** power
    expected = right.swapaxes(-1, -2) @ (gains[..., None] * left.swapaxes(-1, -2))
    found = tp.regularized_inverse(weight, reg, power=power, backend=backend)
    assert_near(found, expected, "P", condition=20)
    assert torch.linalg.matrix_norm(found, 2).max() <= (1.0 if power == 0.5 else 0.5 / reg**0.5) + 1e-12


def test_at_one_quarter_nothing_grows(backend):
    """r = 1/4, power 1: gains are at most 1 whatever W is, and exactly 1 at s = 1/2."""
    gains = torch.tensor([1e-3, 0.1, 0.5, 2.0, 100.0], dtype=torch.float64)
    found = tp.regularized_inverse(gains.diag(), 0.25, backend=backend)
    assert_near(found, np.diag(extended(gains) / (extended(gains) ** 2 + 0.25)), "P")
    assert found.argmax() == 2 * 5 + 2


# --- gradcheck


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 2), (2, 4), (2, 3, 3), (2, 2, 3, 2)], ids=str)
def test_gradcheck(shape, power, backend):
    weight = matrices(shape, torch.float64).requires_grad_()
    reg = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, r: tp.regularized_inverse(w, r, power=power, backend=backend), (weight, reg)
    )


@pytest.mark.parametrize("power", POWERS)
def test_gradcheck_where_singular_values_coincide(power, backend):
    """Where the derivative of a decomposition has a pole, that of P has none."""
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: tp.regularized_inverse(w, 0.3, power=power, backend=backend), weight)


def test_reg_keeps_its_dtype(dtype, backend):
    weight = matrices((3, 3), torch.float64)
    reg = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    found = tp.regularized_inverse(weight, reg, backend=backend)
    found.sum().backward()
    exact = regularized_inverse_gradients(np.ones((3, 3)), extended(weight), 0.25, 1.0)
    assert_near(reg.grad, exact[1], "grad_reg", scale=exact[2])
    assert reg.grad.dtype == dtype
    assert weight.grad is None


# --- opcheck

OPCHECK = {
    "contiguous": ((3, 4), "contiguous"),
    "wide-batch": ((2, 3, 5), "contiguous"),
    "tall-batch": ((2, 5, 3), "contiguous"),
    "permuted": ((2, 3, 4), "permuted"),
    "sliced": ((2, 3, 4), "sliced"),
    "B0": ((0, 3, 4), "contiguous"),
    "one": ((1, 1), "contiguous"),
}


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, power, dtype, backend):
    shape, layout = OPCHECK[name]
    weight = LAYOUTS[layout](matrices(shape, dtype))
    reg = torch.tensor(0.25, dtype=torch.float64)
    torch.library.opcheck(ops.regularized_inverse_fwd, (weight, reg, power, True, backend))
    grad = LAYOUTS[layout](matrices(weight.mT.shape, dtype, seed=1))
    torch.library.opcheck(ops.regularized_inverse_bwd, (grad, weight, grad, reg, power, backend))


# --- compile


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, backend):
    def function(weight: Tensor, reg: Tensor) -> Tensor:
        return tp.regularized_inverse(weight, reg, backend=backend) + tp.regularized_inverse(weight, 0.1, power=0.5)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    stance = "default"
    for shape in ((2, 4, 3), (5, 7, 6)) if dynamic else ((2, 4, 3),):
        leaves = matrices(shape, torch.float32).requires_grad_(), torch.tensor(0.3, requires_grad=True)
        with torch.compiler.set_stance(stance):
            found = compiled(*leaves)
        expected = function(*leaves)
        assert_near(found, extended(expected), "P")
        grad = matrices(found.shape, torch.float32, seed=1)
        for what, *pair in zip(
            ("grad_weight", "grad_reg"), *(torch.autograd.grad(p, leaves, grad) for p in (found, expected)), strict=True
        ):
            assert_near(pair[0], extended(pair[1]), what)
        stance = "fail_on_recompile"


# --- layouts


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 17), (3, 5, 5)], ids=str)
def test_layouts(shape, layout, power, dtype, backend):
    inverse_check(matrices(shape, dtype), 0.25, power, backend, layout)


@pytest.mark.parametrize("power", POWERS)
def test_expanded(power, dtype, backend):
    """One matrix seen three times, and the expanded gradient of a sum."""
    single = matrices((4, 3), dtype).requires_grad_()
    weight = single.expand(3, 4, 3)
    found = tp.regularized_inverse(weight, 0.25, power=power, backend=backend)
    assert_near(
        found, extended(tp.regularized_inverse(single, 0.25, power=power, backend=backend).expand(3, 3, 4)), "P"
    )
    (grad,) = torch.autograd.grad(found.sum(), single)
    exact = regularized_inverse_gradients(np.ones((3, 4)), extended(single), 0.25, power)[0]
    assert_near(grad, 3 * exact, "grad_weight")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_random_shapes_and_layouts(data):
    side = st.integers(1, 24)
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=2)), data.draw(side), data.draw(side))
    weight = matrices(shape, data.draw(st.sampled_from(DTYPES)), seed=data.draw(st.integers(0, 99)))
    layout = data.draw(st.sampled_from(list(LAYOUTS)))
    reg, power = data.draw(st.sampled_from(REGS)), data.draw(st.sampled_from(POWERS))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    for backend in ("reference", "cpu") if _native.cpu_available()[0] else ("reference",):
        inverse_check(weight, reg, power, backend, layout)


# --- bad input

ONES = torch.ones(2, 3)
KINDS = "float16, bfloat16, float32, float64"
NAME = "regularized_inverse"
BAD_INPUT = {
    "weight-sparse": (
        {"weight": torch.eye(3).to_sparse()},
        TypeError,
        f"{NAME}: weight must be a dense tensor, got one of layout torch.sparse_coo",
    ),
    "weight-list": ({"weight": [[1.0]]}, TypeError, f"{NAME}: weight must be a torch.Tensor, got list"),
    "weight-int": ({"weight": ONES.int()}, TypeError, f"{NAME}: weight must be of dtype {KINDS}, got int32"),
    "weight-vector": ({"weight": ONES[0]}, ValueError, f"{NAME}: weight must have shape [..., m, n], got (3,)"),
    "weight-m": (
        {"weight": torch.ones(4, 0, 3)},
        ValueError,
        f"{NAME}: weight must have m >= 1 and n >= 1 in [..., m, n], got (4, 0, 3)",
    ),
    "weight-n": (
        {"weight": torch.ones(3, 0)},
        ValueError,
        f"{NAME}: weight must have m >= 1 and n >= 1 in [..., m, n], got (3, 0)",
    ),
    "reg-none": ({"reg": None}, TypeError, f"{NAME}: reg must be a number or a tensor, got NoneType"),
    "reg-bool": ({"reg": True}, TypeError, f"{NAME}: reg must be a number or a tensor, got bool"),
    "reg-zero": ({"reg": 0}, ValueError, f"{NAME}: reg must be positive and finite, got 0"),
    "reg-negative": ({"reg": -0.5}, ValueError, f"{NAME}: reg must be positive and finite, got -0.5"),
    "reg-nan": ({"reg": float("nan")}, ValueError, f"{NAME}: reg must be positive and finite, got nan"),
    "reg-inf": ({"reg": float("inf")}, ValueError, f"{NAME}: reg must be positive and finite, got inf"),
    "reg-int-tensor": ({"reg": torch.tensor(1)}, TypeError, f"{NAME}: reg must be of dtype {KINDS}, got int64"),
    "reg-shape": (
        {"reg": torch.ones(2)},
        ValueError,
        f"{NAME}: reg must be a number or a tensor of shape (), got (2,)",
    ),
    "reg-tensor-value": (
        {"reg": torch.tensor(-2.0)},
        ValueError,
        f"{NAME}: reg must be positive and finite, got -2.0",
    ),
    "reg-tensor-nan": (
        {"reg": torch.tensor(torch.nan)},
        ValueError,
        f"{NAME}: reg must be positive and finite, got nan",
    ),
    "power-word": ({"power": "half"}, TypeError, f"{NAME}: power must be a number, got str"),
    "power-bool": ({"power": True}, TypeError, f"{NAME}: power must be a number, got bool"),
    "power-value": ({"power": 0.25}, ValueError, f"{NAME}: power must be one of 1.0, 0.5, got 0.25"),
    "check_errors": ({"check_errors": 1}, TypeError, f"{NAME}: check_errors must be a bool, got int"),
    "backend-kind": ({"backend": None}, TypeError, f"{NAME}: backend must be a str, got NoneType"),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        f"{NAME}: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, monkeypatch):
    """Type and text; nothing is computed."""
    changes, kind, text = BAD_INPUT[name]
    monkeypatch.setattr(op, "BACKENDS", None)
    with pytest.raises(kind) as caught:
        tp.regularized_inverse(**{"weight": ONES, "reg": 0.25} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text


# --- contract


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(8, 5, 5), (8, 33, 33), (8, 20, 40)], ids=str)
def test_ill_conditioned(shape, power, dtype, backend):
    """Singular values over twelve decades, and well above the smallest r."""
    gains = torch.logspace(0, -12, min(shape[-2:]), dtype=torch.float64)
    inverse_check(
        spectrum(shape, gains, dtype), 1e-3 if dtype == torch.float32 else 1e-8, power, backend, on_average=True
    )


@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 17, 17), (16, 33, 20), (12, 50, 50)], ids=str)
@pytest.mark.parametrize("kind", ["random", "decades"])
def test_smallest_reg(kind, shape, dtype, backend):
    small = min(shape[-2:])
    gains = torch.logspace(0, -12, small, dtype=torch.float64) if kind == "decades" else torch.rand(small).double()
    gains[0] = 1
    inverse_check(spectrum(shape, gains, dtype), SMALLEST_REG[dtype], 1.0, backend, on_average=True)


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-8, 1e-12])
def test_no_digits_are_lost_at_small_reg(relative, cpu):
    """Rank 3 of 64: in single precision what its Gram matrix rounds to is as large as r. In a batch with one that needs
    no more digits, and alone.
    """
    left, right = matrices((64, 3), torch.float64), matrices((3, 64), torch.float64, seed=1)
    weight = (left @ right).float()
    reg = relative * float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2
    exact = tp.regularized_inverse(weight.double(), reg, backend="reference")
    eps = torch.finfo(torch.float32).eps
    lost = 1e-15 / relative + (1e3 * eps if relative == 1e-3 else 0)
    batch = torch.stack((weight, 1e-6 * weight))
    for found in (tp.regularized_inverse(tensor, reg, backend="cpu") for tensor in (weight, batch[:1], batch)):
        miss = torch.linalg.vector_norm(found.view(-1, 64, 64)[0].double() - exact)
        assert miss <= (2 * eps + 64 * lost) * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("relative", [1e-6, 1e-8])
def test_gradients_at_small_reg(relative, cpu):
    left, right = matrices((64, 3), torch.float64), matrices((3, 64), torch.float64, seed=1)
    grad, found = matrices((64, 64), torch.float64, seed=2), []
    weight = (left @ right).float()
    reg = relative * float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2
    for dtype, name in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaf, r = weight.to(dtype).requires_grad_(), torch.tensor(reg, dtype=dtype, requires_grad=True)
        inverse = tp.regularized_inverse(leaf, r, backend=name)
        found.append(torch.autograd.grad(inverse, (leaf, r), grad.to(dtype)))
    for single, double in zip(*found, strict=True):
        miss = torch.linalg.vector_norm(single.double() - double)
        assert miss <= 1e-5 * torch.linalg.vector_norm(double)


SPECTRA = {
    "full": torch.linspace(1, 0.3, 20, dtype=torch.float64),
    "rank-19": torch.linspace(1, 0.3, 20, dtype=torch.float64) * (torch.arange(20) < 19),
    "rank-3": (torch.arange(20) < 3).double(),
    "decades": torch.logspace(0, -15, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("relative", [3.0, 0.9, 0.3, 1e-2, 1e-6, 1e-20])
@pytest.mark.parametrize("shape", [(20, 20), (31, 20), (20, 31)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_refused_or_right(kind, shape, relative, dtype, backend):
    """On both sides of the smallest r at which P of a singular matrix has digits. One of full rank has them at any r.
    In a batch: the others have their P.
    """
    double = dtype == torch.float64 or backend == "cpu"
    reg = relative / op.LARGEST_CONDITION[torch.float64 if double else torch.float32]
    weight = torch.stack([matrices(shape, dtype), spectrum(shape, SPECTRA[kind], dtype)])
    found = tp.regularized_inverse(weight, reg, check_errors=False, backend=backend)
    assert not found[0].isnan().any()
    if kind == "full" or relative > 1:
        exact = torch.from_numpy(regularized_inverse(extended(weight[1]), reg, 1.0).astype(np.float64))
        assert torch.dist(found[1], exact) <= 0.02 * torch.linalg.vector_norm(exact)
        assert torch.equal(tp.regularized_inverse(weight, reg, backend=backend), found)
    elif relative <= 0.3:  # between, either: the estimate is a little below the condition
        assert found[1].isnan().all()
        with pytest.raises(torch.linalg.LinAlgError, match="of batch entry 1 is not numerically positive definite"):
            tp.regularized_inverse(weight, reg, backend=backend)


def test_no_gradient_of_what_is_refused(dtype, backend):
    weight = torch.stack([spectrum((20, 20), SPECTRA[kind], dtype) for kind in ("full", "rank-3")]).requires_grad_()
    found = tp.regularized_inverse(weight, 1e-14, check_errors=False, backend=backend)
    (grad,) = torch.autograd.grad(found.sum(), weight)
    assert grad.isnan().all(dim=(1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("size", [1e-100, 1e100])
def test_condition_of_any_size(size, backend):
    weight = size * matrices((5, 5), torch.float64)
    exact = torch.linalg.inv(weight)
    found = tp.regularized_inverse(weight, 1e-20 * size**2, backend=backend)
    assert torch.dist(found, exact) <= 1e-10 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize(
    ("batch", "index", "where"),
    [
        ((), (), ""),
        ((3,), (1,), " of batch entry 1"),
        ((2, 3), (1, 2), " of batch entry (1, 2)"),
        ((40,), (21,), " of batch entry 21"),
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [False, True], ids=["square", "wide"])
def test_not_positive_definite(wide, batch, index, where, dtype, backend):
    singular = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=dtype)
    singular = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype) if wide else singular
    weight = torch.eye(2, 3 if wide else 2, dtype=dtype).expand(*batch, *singular.shape).clone()
    weight[index] = singular
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        tp.regularized_inverse(weight, 1e-30, backend=backend)
    assert str(caught.value) == (
        f"regularized_inverse: the Gram matrix{where} is not numerically positive definite in "
        f"{str(dtype).removeprefix('torch.')} at reg=1e-30; use a larger reg or float64"
    )
    found = tp.regularized_inverse(weight, 1e-30, check_errors=False, backend=backend)
    expected = torch.eye(3 if wide else 2, 2, dtype=dtype).expand_as(found).clone()
    expected[index] = torch.nan
    assert_identical(found, expected, "P")


def test_an_inverse_or_nothing_but_nan(dtype, backend):
    """Gram matrices of rank 1, whose last pivots round to either side of zero: no numbers that mean nothing."""
    weight = matrices((64, 3, 1), dtype) @ matrices((64, 1, 3), dtype, seed=1)
    found = tp.regularized_inverse(weight, 1e-30, check_errors=False, backend=backend)
    failed = found.isnan().all(dim=(1, 2))
    assert failed.any()
    assert_small_residual(found[~failed], weight[~failed], 1e-30, 1.0)
    first = int(failed.nonzero()[0])
    with pytest.raises(torch.linalg.LinAlgError, match=f" of batch entry {first} is not"):
        tp.regularized_inverse(weight, 1e-30, backend=backend)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 2), (3, 2, 5), (20, 4, 4)], ids=str)
def test_what_is_not_finite_gives_nan_in_its_own_entry(shape, value, power, dtype, backend):
    clean = matrices(shape, dtype)
    weight = clean.clone()
    weight[1, 1, 0] = value
    results = []
    for given_weight in (weight, clean):
        given_weight.requires_grad_()
        found = tp.regularized_inverse(given_weight, 0.25, power=power, backend=backend)
        results.append((found.detach(), *torch.autograd.grad(found.sum(), given_weight)))
    for what, found, expected in zip(("P", "grad_weight"), *results, strict=True):
        expected[1] = torch.nan
        assert_identical(found, expected, what)


@pytest.mark.parametrize("power", POWERS)
def test_numbers_whose_squares_overflow(power, dtype, backend):
    """The Gram matrix overflows, which power 1 reports; power 1/2 does not form it."""
    weight = torch.finfo(dtype).max ** 0.75 * (torch.eye(3, dtype=dtype) if power == 0.5 else matrices((3, 3), dtype))
    if power == 1.0:
        with pytest.raises(torch.linalg.LinAlgError, match="not numerically positive definite"):
            tp.regularized_inverse(weight, 0.25, power=power, backend=backend)
    else:
        assert_near(tp.regularized_inverse(weight, 0.25, power=power, backend=backend), np.eye(3), "P")


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(9, 17, 17), (9, 5, 33)], ids=str)
def test_deterministic(shape, power, dtype, backend):
    """Bit for bit the same in every run, and with any number of threads on the native back-end."""
    first = None
    for count in (1, 1, 2, 2, 3) if backend == "cpu" and power == 1.0 else (1, 1):
        torch.set_num_threads(count)
        weight = matrices(shape, dtype).requires_grad_()
        found = tp.regularized_inverse(weight, 0.25, power=power, backend=backend)
        results = found.detach(), *torch.autograd.grad(found.square().sum(), weight)
        first = first or results
        assert_identical(results[0], first[0], "P")
        if count == 1:  # backward ends in products by torch, whose order of sums follows the threads
            assert_identical(results[1], first[1], "grad_weight")


def test_inputs_stay_as_they_are(dtype, backend):
    weight = matrices((2, 4, 3), dtype).requires_grad_()
    before = weight.detach().clone()
    tp.regularized_inverse(weight, 0.25, backend=backend).square().sum().backward()
    assert_identical(weight.detach(), before, "weight")


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("loss", [torch.sum, lambda found: found.square().sum()], ids=["sum", "squares"])
def test_second_derivatives_are_refused(loss, by_name, backend):
    weight = matrices((2, 3), torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(
        loss(tp.regularized_inverse(weight, 0.25, backend=backend)), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(grad.sum(), weight) if by_name else grad.sum().backward()


# --- power 1/2 by rational steps


def polar(weight: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """The native iteration alone, without the decomposition that takes over where it gives up."""
    result = torch.empty_like(weight.mT.contiguous())
    failed = torch.empty(weight.shape[:1], dtype=torch.bool)
    addresses = {"weight": weight.data_ptr(), "polar": result.data_ptr(), "failed": failed.data_ptr()}
    _native.cpu.regularized_polar(reg=reg, sizes=tuple(weight.shape), threads=1, **addresses)
    return result, failed


@pytest.mark.parametrize("reg", [1e-4, 1e-8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 7, 5), (8, 33, 33), (4, 100, 100)], ids=str)
def test_polar_converges(shape, size, reg, cpu):
    """Against the decomposition in float32, s_max/√r up to 1e7."""
    weight = hard_matrices(shape[1:], size)
    found, failed = polar(weight, reg)
    assert not failed.any()
    exact = regularized_inverse(extended(weight), float(torch.tensor(reg, dtype=torch.float32)), 0.5)
    plain = tp.regularized_inverse(weight, reg, power=0.5, backend="reference")
    allowed = 2 * errors(plain, exact) + FLOOR[torch.float32]
    assert (errors(found, exact) <= allowed).all()


@settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_polar_never_gives_up_below_1e6(cpu, data):
    """Whatever the condition s_max/√r and the singular values: a small residual, and no gain above 1 but for the
    rounding errors of a float64 Gram matrix, whose condition is the square."""
    n = data.draw(st.integers(1, 40))
    reg = data.draw(st.sampled_from([1e-4, 1e-8]))
    condition = 10 ** data.draw(st.floats(-2, 6))
    gains = 10 ** (-12 * torch.rand(n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double())
    weight = spectrum((1, n + data.draw(st.integers(0, 9)), n), condition * reg**0.5 * gains, torch.float32)
    found, failed = polar(weight, reg)
    assert not failed.any()
    rounding = FLOOR[torch.float32] + torch.finfo(torch.float64).eps * condition**2
    assert torch.linalg.matrix_norm(found.double(), 2).max() <= 1 + rounding
    assert_small_residual(found, weight, float(torch.tensor(reg, dtype=torch.float32)), 0.5)


def test_polar_gives_up(cpu):
    """NaN and ``failed``; the op then decomposes. Not for a matrix that is not finite."""
    weight = torch.stack([torch.eye(3), torch.diag(torch.tensor([1e15, 1e15, 0])), torch.full((3, 3), torch.inf)])
    found, failed = polar(weight, 1e-8)
    assert failed.tolist() == [False, True, False]
    assert found.isnan().all(dim=(1, 2)).tolist() == [False, True, True]
    given = weight[:2], 1e-8
    found, expected = (tp.regularized_inverse(*given, power=0.5, backend=name) for name in ("cpu", "reference"))
    assert_near(found, extended(expected), "P")


@pytest.mark.parametrize(
    "shape", [(64, 64), (100, 100), (128, 128), (129, 129), (150, 120), (257, 257), (330, 300)], ids=str
)
@pytest.mark.parametrize("reg", [1e-4, 0.25])
def test_large_polar(shape, reg, dtype, cpu):
    """Up to the order at which the decomposition takes over, and beyond. The exact answer in float64 is near enough."""
    weight = matrices(shape, dtype)
    exact = tp.regularized_inverse(
        weight.double(), float(torch.tensor(reg, dtype=dtype)), power=0.5, backend="reference"
    )
    found = tp.regularized_inverse(weight, reg, power=0.5, backend="cpu")
    plain = tp.regularized_inverse(weight, reg, power=0.5, backend="reference")
    if dtype == torch.float32:
        assert_budget(found, plain, extended(exact), "P", condition=1 / reg**0.5)
    else:
        assert_near(found, extended(exact), "P", condition=1 / reg**0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_reg_as_a_tensor_is_checked_without_check_errors(value, backend):
    with pytest.raises(ValueError, match="reg must be positive and finite"):
        tp.regularized_inverse(torch.eye(3), torch.tensor(value), check_errors=False, backend=backend)


@pytest.mark.parametrize("reg", [1e-50, 1e60])
def test_reg_must_be_a_number_of_the_weights_dtype(reg, backend):
    tp.regularized_inverse(torch.eye(3, dtype=torch.float64), reg, backend=backend)
    with pytest.raises(ValueError, match="float32") as caught:
        tp.regularized_inverse(torch.eye(3), reg, backend=backend)
    assert str(caught.value) == f"regularized_inverse: reg must be positive and finite in float32, got {reg!r}"


@pytest.mark.parametrize("power", POWERS)
def test_under_autocast(power, backend):
    weight = matrices((3, 5, 4), torch.float32)
    expected = tp.regularized_inverse(weight, 0.25, power=power, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = tp.regularized_inverse(weight, 0.25, power=power, backend=backend)
    assert torch.equal(found, expected)


def test_the_default_device_does_not_matter(backend):
    weight = torch.eye(3)
    expected = tp.regularized_inverse(weight, 0.25, backend=backend)
    with torch.device("meta"):
        found = tp.regularized_inverse(weight, 0.25, backend=backend)
    assert torch.equal(found, expected)
