"""``regularized_inverse`` in Triton: on a GPU where there is one, else in its interpreter (``TRITON_INTERPRET=1``)."""

import pytest
import torch
from _cases import LAYOUTS, matrices, spectrum
from _checks import inverse_check
from _compare import assert_identical, assert_near, assert_small_residual
from _oracle import extended, regularized_inverse

import tp_kernels as tp
from conftest import absent
from tp_kernels import _triton
from tp_kernels.ops.regularized_inverse import products
from tp_kernels.ops.regularized_inverse.op import BACKENDS

POWERS = (1.0, 0.5)
ON_GPU = torch.cuda.is_available() and not _triton.interpreted()
# One square, several, and partial ones; tall, wide; batches, and none.
SHAPES = ((1, 1), (3, 3), (16, 16), (17, 15), (5, 20), (33, 33), (2, 3, 4, 9), (3, 17, 17), (0, 4, 3))
LARGE_SHAPES = ((64, 64), (100, 100), (128, 128), (128, 60), (4, 128, 128))
if ON_GPU:
    SHAPES += LARGE_SHAPES
ops = torch.ops.tp_kernels

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of NaN


@pytest.fixture(autouse=True)
def device() -> str:
    ok, reason = BACKENDS.backends["triton"].available()
    if not ok:
        absent("triton", reason)
    return "cuda" if ON_GPU else "cpu"


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("reg", [10.0, 0.25, 1e-2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, reg, power, device):
    inverse_check(matrices(shape, torch.float32), reg, power, "triton", device=device)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128)], ids=str)
def test_large(shape, device):
    """The recurrence's default, interpreted as well."""
    inverse_check(matrices(shape, torch.float32), 1e-4, 0.5, "triton", device=device)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_deficient(rank, power, device):
    gains = torch.zeros(5, dtype=torch.float64)
    gains[:rank] = 1.5
    inverse_check(spectrum((2, 5, 5), gains, torch.float32), 0.1, power, "triton", device=device)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("scale", [1e-17, 2e19])
def test_scale(scale, power, device):
    """The iteration is in the weight's own unit: no square over- or underflows."""
    weight = scale * matrices((6, 4), torch.float64)
    found = tp.regularized_inverse(weight.float().to(device), 0.25 * scale**2, power=power, backend="triton").cpu()
    exact = regularized_inverse(extended(weight.float()), 0.25 * scale**2, power)
    assert_near(found, exact, "P", condition=10)


@pytest.mark.parametrize("power", POWERS)
def test_smallest_reg(power, device):
    """1e-5 of the largest s², the smallest r that float32 is said to take."""
    weight = spectrum((3, 12, 12), torch.logspace(0, -4, 12, dtype=torch.float64), torch.float32)
    found = tp.regularized_inverse(weight.to(device), 1e-5, power=power, backend="triton").cpu()
    assert_near(found, regularized_inverse(extended(weight), 1e-5, power), "P", condition=400)
    assert_small_residual(found, weight, 1e-5, power)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_factored_in_float32(name, power, device):
    weight = matrices((2, 5, 4), getattr(torch, name))
    found = tp.regularized_inverse(weight.to(device), 0.25, power=power, backend="triton").cpu()
    assert_near(found, regularized_inverse(extended(weight), 0.25, power), "P")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 9, 7), (2, 7, 9)], ids=str)
def test_layouts(shape, layout, device):
    for power in POWERS:
        inverse_check(matrices(shape, torch.float32), 0.25, power, "triton", layout, device=device)


def test_opcheck(device):
    for shape, layout in (((2, 3, 5), "contiguous"), ((2, 5, 3), "permuted"), ((0, 3, 4), "contiguous")):
        weight = LAYOUTS[layout](matrices(shape, torch.float32).to(device))
        torch.library.opcheck(ops.regularized_inverse_fwd, (weight, torch.tensor(0.25), 1.0, True, "triton"))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite(value, power, device):
    """NaN in that matrix, without an error, and nothing in the others."""
    weight = matrices((3, 20, 18), torch.float32)
    clean = tp.regularized_inverse(weight.to(device), 0.25, power=power, backend="triton").cpu()
    weight[1, 2, 3] = value
    found = tp.regularized_inverse(weight.to(device), 0.25, power=power, backend="triton").cpu()
    assert found[1].isnan().all()
    assert_identical(found[::2], clean[::2], "P")


def test_no_convergence_is_an_error(device, monkeypatch):
    from tp_kernels.ops.regularized_inverse import triton_kernel

    monkeypatch.setattr(triton_kernel, "LARGEST_COUNT", 5)
    weight = torch.stack([torch.eye(4), matrices((4, 4), torch.float32)]).to(device)
    with pytest.raises(torch.linalg.LinAlgError, match="Gram matrix of batch entry 1 is not numerically"):
        tp.regularized_inverse(weight, 1e-4, backend="triton")
    found = tp.regularized_inverse(weight, 1e-4, check_errors=False, backend="triton")
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(129, 129), (2, 20, 140)], ids=str)
def test_larger_ones_are_the_librarys(shape, power, device):
    weight = matrices(shape, torch.float32).to(device)
    found = tp.regularized_inverse(weight, 0.25, power=power, backend="triton")
    assert_identical(found, products.forward(weight, torch.tensor(0.25), power)[0], "P")


def test_what_it_refuses(device):
    with pytest.raises(tp.BackendUnavailableError, match="it computes float32, bfloat16 and float16"):
        tp.regularized_inverse(torch.eye(3, device=device, dtype=torch.float64), 0.25, backend="triton")
