"""``regularized_inverse`` by torch's products, on whichever device there is."""

import pytest
import torch
from _cases import LAYOUTS, hard_matrices, matrices
from _compare import FLOOR, assert_budget, assert_identical, assert_near, assert_small_residual, errors
from _oracle import extended, regularized_inverse
from torch._subclasses.fake_tensor import FakeTensorMode

from tp_kernels.ops.regularized_inverse import products, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1, 1), (3, 3), (17, 15), (5, 20), (2, 3, 4, 9), (3, 17, 17), (0, 4, 3), (2, 0, 3, 4))


def both(weight: torch.Tensor, reg: float) -> list[torch.Tensor]:
    """P at power 1/2 by products, and by the decomposition."""
    r = torch.tensor(reg)
    (found, failed), (plain, _) = products.forward(weight.to(DEVICE), r, 0.5), reference.forward(weight, r, 0.5)
    assert found.device.type == DEVICE
    assert failed.shape == weight.shape[:-2]
    assert not failed.any()
    return [found.cpu(), plain]


@pytest.mark.parametrize("reg", [10.0, 0.25, 1e-4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, reg):
    weight = matrices(shape, torch.float32)
    exact = regularized_inverse(extended(weight), float(torch.tensor(reg)), 0.5)
    assert_budget(*both(weight, reg), exact, "P", condition=1 / reg**0.5)


@pytest.mark.parametrize("reg", [1e-4, 0.25])
@pytest.mark.parametrize("shape", [(129, 129), (150, 120), (257, 257), (300, 512)], ids=str)
def test_large(shape, reg):
    """Random and orthogonal ones, nearly correctly rounded: the error does not grow with the condition."""
    weight = matrices(shape, torch.float32)
    for given in (weight, torch.linalg.svd(weight, full_matrices=False).U):
        exact = reference.forward(given.double(), torch.tensor(reg), 0.5)[0]
        assert_near(both(given, reg)[0], extended(exact), "P")


@pytest.mark.parametrize("reg", [1e-4, 1e-8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 7, 5), (8, 33, 33), (4, 60, 60)], ids=str)
def test_whatever_the_singular_values(shape, size, reg):
    """Against the decomposition in float32, s_max/√r up to 1e7."""
    weight = hard_matrices(shape[1:], size)
    found, plain = both(weight, reg)
    exact = regularized_inverse(extended(weight), float(torch.tensor(reg)), 0.5)
    assert (errors(found, exact) <= 2 * errors(plain, exact) + FLOOR[torch.float32]).all()
    assert_small_residual(found[0], weight[0], float(torch.tensor(reg)), 0.5)


@pytest.mark.parametrize("scale", [1e-17, 2e19])
def test_scale(scale):
    weight = (scale * matrices((6, 4), torch.float64)).float()
    found, _ = products.forward(weight.to(DEVICE), torch.tensor(0.25 * scale**2, dtype=torch.float64), 0.5)
    assert_near(found.cpu(), regularized_inverse(extended(weight), 0.25 * scale**2, 0.5), "P")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(name):
    weight = matrices((2, 5, 4), getattr(torch, name))
    found, _ = products.forward(weight.to(DEVICE), torch.tensor(0.25), 0.5)
    assert_near(found.cpu(), regularized_inverse(extended(weight), 0.25, 0.5), "P")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 9, 7), (2, 7, 9)], ids=str)
def test_layouts(shape, layout):
    weight, r = matrices(shape, torch.float32).to(DEVICE), torch.tensor(0.25)
    found, _ = products.forward(LAYOUTS[layout](weight), r, 0.5)
    assert_identical(found.contiguous(), products.forward(weight, r, 0.5)[0].contiguous(), "P")


@pytest.mark.parametrize(("power", "dtype"), [(1.0, torch.float32), (1.0, torch.float64), (0.5, torch.float64)])
def test_what_is_factored(power, dtype):
    """Power 1 by Cholesky; float64 has no wider dtype to form its Gram matrix in."""
    weight, r = matrices((7, 5), dtype).to(DEVICE), torch.tensor(0.25)
    found, expected = products.forward(weight, r, power)[0], reference.forward(weight, r, power)[0]
    assert_identical(found, expected, "P")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_gives_nan_in_its_own_entry(value):
    weight = matrices((3, 20, 18), torch.float32)
    clean = both(weight, 0.25)[0]
    weight[1, 2, 3] = value
    found = both(weight, 0.25)[0]
    assert found[1].isnan().all()
    assert_identical(found[::2], clean[::2], "P")


def test_too_ill_conditioned():
    """NaN and ``failed``."""
    weight = torch.stack([torch.eye(3), torch.diag(torch.tensor([1e15, 1e15, 0]))]).to(DEVICE)
    found, failed = products.forward(weight, torch.tensor(1e-8), 0.5)
    assert failed.tolist() == [False, True]
    assert found.isnan().all(dim=(1, 2)).tolist() == [False, True]


def test_steps_lead_to_one():
    """From everywhere in [SMALLEST, 1], and never above 1, where they could run away."""
    x = torch.logspace(-8, 0, 100_001, dtype=torch.float64)
    assert x[0] == pytest.approx(products.SMALLEST)
    for scale in products._SCALES:
        assert x.max() <= 1 + 1e-12
        x = scale / 2 * x * (3 - (scale * x) ** 2)
    assert (1 - x).abs().max() < 1e-8


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_nothing_reads_a_value(power):
    """A device would have to wait for it, and a recording in a CUDA graph could not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        found, failed = products.forward(torch.empty(2, 200, 160), torch.tensor(0.25), power)
    assert found.shape == (2, 160, 200)
    assert failed.shape == (2,)
