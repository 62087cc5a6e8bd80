"""The only tolerances of this test-suite.

The error budget: against the exact answer, a kernel may err at most twice as much as plain PyTorch of the same
precision does, plus the floor. The reference's own error is bounded as well, so that no budget becomes meaningless.

An iterative solve has a term of its own, the rule's: its relative error is at most ``rtol * condition``, for a relative
residual of rtol and the condition of what is solved. With a tight rtol the ordinary budget must do.
"""

import numpy as np
import torch
from _oracle import extended, residual
from torch import Tensor

# What a correct evaluation may differ by where the reference happens to be exact.
# A kernel that sums in float32 and stores half precision rounds the result, and the states that lead to it.
FLOOR = {
    torch.float64: 16 * torch.finfo(torch.float64).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
# What the reference itself may err by in a well-conditioned problem; ``condition`` scales it in others.
REFERENCE = {
    torch.float64: 512 * torch.finfo(torch.float64).eps,
    torch.float32: 512 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}
# Central differences in float64, relative to the largest element: truncation, not rounding.
DIFFERENCES = 1e-7
# tanh, in units in the last place of the exact result.
TANH_ULP = 2.0
ATANH_ULP = 3.0


def errors(actual: Tensor, exact: np.ndarray, scale: float = 0.0) -> np.ndarray:
    """Largest deviation in each matrix (last two axes), relative to its own largest element, so that early time steps
    count although their gradients are small; or to ``scale`` where that is larger. Elements that are not finite must
    be the same on both sides.

    Below ``tiny/eps`` deviations count absolutely: sums lose bits there to denormal numbers, which the native kernels
    flush to zero.
    """
    found = extended(actual)
    finite = np.isfinite(exact)
    if not np.array_equal(found[~finite], exact[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return np.full(1, np.inf)
    axes = tuple(range(exact.ndim))[-2:]
    size = np.abs(np.where(finite, exact, 0)).max(axis=axes, initial=0)
    deviation = np.abs(np.where(finite, found, 0) - np.where(finite, exact, 0)).max(axis=axes, initial=0)
    info = torch.finfo(actual.dtype)
    return (deviation / np.maximum(size, max(scale, info.tiny / info.eps))).astype(np.float64)


def error(actual: Tensor, exact: np.ndarray, scale: float = 0.0) -> float:
    """The largest of ``errors``."""
    return float(errors(actual, exact, scale).max(initial=0))


def assert_same_kind(actual: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    assert tuple(actual.shape) == tuple(shape), f"{what}: shape {tuple(actual.shape)}, expected {tuple(shape)}"
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"


def assert_near(actual: Tensor, exact: np.ndarray, what: str, condition: float = 1.0, scale: float = 0.0) -> None:
    """``actual`` is as near to the exact answer as plain code of its precision must be."""
    assert_same_kind(actual, exact.shape, actual.dtype, what)
    err, allowed = error(actual, exact, scale), condition * REFERENCE[actual.dtype]
    assert err <= allowed, f"{what}: error {err:.3g} exceeds {allowed:.3g}"


def assert_budget(
    actual: Tensor,
    reference: Tensor,
    exact: np.ndarray,
    what: str,
    condition: float = 1.0,
    scale: float = 0.0,
    reference_exact: np.ndarray | None = None,
    rtol: float = 0.0,
) -> None:
    """``actual`` errs at most twice as much as ``reference``, which is near the exact answer itself.

    ``reference_exact``: the exact answer to the reference's question, where it is not the same one. ``rtol``: of an
    iterative solve.
    """
    reference_exact = exact if reference_exact is None else reference_exact
    assert_same_kind(actual, reference.shape, reference.dtype, what)
    assert_near(reference, reference_exact, f"{what} of the reference", condition, scale)
    err = error(actual, exact, scale)
    allowed = 2 * error(reference, reference_exact, scale) + FLOOR[actual.dtype] + rtol * condition
    assert err <= allowed, f"{what}: error {err:.3g} exceeds the budget {allowed:.3g}"


def assert_average_budget(
    actual: Tensor,
    reference: Tensor,
    exact: np.ndarray,
    what: str,
    condition: float,
    reference_exact: np.ndarray | None = None,
) -> None:
    """The budget of an ill-conditioned problem, on (geometric) average over a batch, or over time.

    There the errors of one matrix are luck: either side's can be several times the other's. None may exceed what the
    condition allows. ``reference_exact`` as in ``assert_budget``.
    """
    reference_exact = exact if reference_exact is None else reference_exact
    assert_same_kind(actual, reference.shape, reference.dtype, what)
    assert_near(reference, reference_exact, f"{what} of the reference", condition)
    assert_near(actual, exact, what, condition)
    floor, sides = FLOOR[actual.dtype], ((actual, exact), (reference, reference_exact))
    average, plain = (np.exp(np.log(errors(*side) + floor).mean()) for side in sides)
    assert average <= 2 * plain, f"{what}: average error {average:.3g} exceeds twice that of the reference, {plain:.3g}"


def assert_small_residual(actual: Tensor, weight: Tensor, reg: float, power: float) -> None:
    """P satisfies the equation that defines it, as plain code of its precision must."""
    found = residual(extended(actual), extended(weight), reg, power)
    assert found <= REFERENCE[actual.dtype], f"residual {found:.3g}"


def assert_residual(actual: Tensor, reference: Tensor, weight: Tensor, reg: float, power: float) -> None:
    """P satisfies the equation that defines it, however ill-conditioned that is."""
    found, plain = (residual(extended(p), extended(weight), reg, power) for p in (actual, reference))
    assert_small_residual(reference, weight, reg, power)
    allowed = 2 * plain + FLOOR[actual.dtype]
    assert found <= allowed, f"residual {found:.3g} exceeds the budget {allowed:.3g}"


def assert_solved(actual: Tensor, displacement: Tensor, jacobian: Tensor, reg: float, rtol: float) -> None:
    """``(JᵀJ + rI) x = Jᵀ λ`` for each sample: a residual of rtol in ``(J Jᵀ + rI) y = λ`` arrives here times J."""
    found, lam, jac = map(extended, (actual, displacement, jacobian))
    right = np.einsum("bij,bi->bj", jac, lam)
    missed = np.einsum("bij,bi->bj", jac, np.einsum("bij,bj->bi", jac, found)) + reg * found - right
    size = np.linalg.norm(jac.astype(np.float64), 2, axis=(-2, -1))
    norms = [np.sqrt((vectors**2).sum(axis=-1)) for vectors in (missed, lam, found)]
    allowed = rtol * size * norms[1] + FLOOR[actual.dtype] * (size**2 + reg) * norms[2]
    worst = (norms[0] / allowed).argmax()
    assert norms[0][worst] <= allowed[worst], f"residual {norms[0][worst]:.3g} exceeds {allowed[worst]:.3g}"


def assert_identical(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same values exactly, NaN in the same places."""
    assert_same_kind(actual, expected.shape, expected.dtype, what)
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()]), f"{what}: not bit for bit the same"


def assert_same_pattern(actual: Tensor, expected: Tensor, what: str) -> None:
    """NaN and infinities in the same places."""
    for name, function in (("NaN", torch.isnan), ("infinities", torch.isinf)):
        found, wanted = function(actual), function(expected)
        difference = int((found != wanted).sum())
        assert not difference, f"{what}: {name} differ in {difference} of {found.numel()} elements"


def assert_differences(actual: Tensor, differences: Tensor, what: str) -> None:
    """Central differences in float64 agree."""
    assert_same_kind(actual, differences.shape, torch.float64, what)
    err = error(actual, extended(differences))
    assert err <= DIFFERENCES, f"{what}: differs from finite differences by {err:.3g}"


def assert_tanh(actual: Tensor, argument: Tensor) -> None:
    """Within two units in the last place of tanh everywhere; NaN and infinities as they should be."""
    _assert_ulps(actual, argument, np.tanh, TANH_ULP)
    assert actual[~actual.isnan()].abs().le(1).all(), "tanh: beyond 1"


def assert_atanh(actual: Tensor, argument: Tensor) -> None:
    """Within three units in the last place of atanh."""
    _assert_ulps(actual, argument, np.arctanh, ATANH_ULP)


def _assert_ulps(actual: Tensor, argument: Tensor, function: np.ufunc, allowed: float) -> None:
    """Where the result is a denormal number, zero will do."""
    exact, found, name = function(extended(argument)), extended(actual), function.__name__
    nan = np.isnan(exact)
    assert np.array_equal(np.isnan(found), nan), f"{name}: NaN in other places than in its argument"
    flushed = (found == 0) & (np.abs(exact) < torch.finfo(actual.dtype).tiny)
    ulp = np.spacing(np.abs(exact).astype(actual.numpy().dtype)).astype(exact.dtype)
    ulps = np.where(nan | flushed, 0, np.abs(found - exact) / ulp)
    worst = ulps.argmax()
    assert ulps[worst] <= allowed, f"{name}({argument.numpy()[worst]!r}) is {float(ulps[worst]):.3g} ulp off"
