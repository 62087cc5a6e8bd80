"""Batched regularized inverse ``P = (WᵀW + rI)^{-α} Wᵀ``, differentiable in W and r."""

import math
from typing import Any

import torch
from torch import Tensor

from tp_kernels import _native, _triton, _validate
from tp_kernels._autograd import first_derivatives_only
from tp_kernels._backends import Backend, BackendTable, Support, dtype_name
from tp_kernels._library import differentiates_ops, dispatches_to_nobody, register
from tp_kernels.ops.regularized_inverse import products, reference


def _solve(weight: Tensor, rhs: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(WᵀW + rI)⁻¹ rhs`` for m >= n, and which matrices failed (``None``: none); ``rhs=None`` is Wᵀ."""
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    weight = weight.contiguous()
    rhs = None if rhs is None else rhs.contiguous()
    solved = weight.new_empty((*batch, n, m))
    failed = torch.empty(batch, dtype=torch.bool, device="cpu")
    any_failed = _native.cpu.regularized_solve(
        double=_native.is_double(weight),
        weight=_native.pointer(weight),
        rhs=_native.pointer(rhs),
        reg=float(r),
        solved=_native.pointer(solved),
        failed=_native.pointer(failed),
        sizes=(math.prod(batch), m, n),
        threads=torch.get_num_threads(),
    )
    return solved, failed if any_failed else None


def _polar(weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(WᵀW + rI)^{-1/2} Wᵀ`` for m >= n, float32, and which matrices failed (``None``: none)."""
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    weight = weight.contiguous()
    polar = weight.new_empty((*batch, n, m))
    failed = torch.empty(batch, dtype=torch.bool, device="cpu")
    any_failed = _native.cpu.regularized_polar(
        weight=_native.pointer(weight),
        reg=float(r),
        polar=_native.pointer(polar),
        failed=_native.pointer(failed),
        sizes=(math.prod(batch), m, n),
        threads=torch.get_num_threads(),
    )
    if not any_failed:
        return polar, None
    # Too ill-conditioned for the iteration.
    polar[failed], failed[failed.clone()] = reference.forward(weight[failed], r, 0.5)
    return polar, failed


def _cpu_forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor | None]:
    if weight.shape[-2] < weight.shape[-1]:
        inverse, failed = _cpu_forward(weight.mT, reg, power)
        return inverse.mT, failed
    if power == 1.0:
        return _solve(weight, None, reg)
    if weight.dtype == torch.float64:  # its steps would need more than double precision
        return reference.forward(weight, reg, power)
    return _polar(weight, reg)


def _cpu_backward(grad: Tensor, weight: Tensor, inverse: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    if power != 1.0:
        return reference.backward(grad, weight, inverse, reg, power)
    if weight.shape[-2] < weight.shape[-1]:
        grad_weight, grad_reg = _cpu_backward(grad.mT, weight.mT, inverse.mT, reg, power)
        return grad_weight.mT, grad_reg
    solved, _ = _solve(weight, grad, reg)
    grad_weight, grad_reg = reference.inverse_gradients(solved, weight, inverse)
    return grad_weight, grad_reg.sum().to(reg)


LARGEST_ORDER = 128
"""What one Triton program takes, which iterates on one matrix by itself. Beyond are torch's products."""


def _triton_forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor | None]:
    if max(weight.shape[-2:]) > LARGEST_ORDER:
        return products.forward(weight, reg, power)
    from tp_kernels.ops.regularized_inverse import triton_kernel  # imports triton, which need not be there

    return triton_kernel.forward(weight, reg, power)


CUDA_TOLERANCE = {torch.float32: 2.0**-10, torch.float64: 2.0**-18}
"""On ``‖I - ZᵀZ‖_F`` before the last step of Halley's iteration, which takes an error e to e³/4."""

CUDA_LARGEST_COUNT = 100
"""Steps at most. One multiplies a small singular value by 11.8, and 10 do for √r = 1e-7 ‖W‖."""


def _cuda_arguments(weight: Tensor, reg: Tensor) -> tuple[dict[str, Any], Tensor | None]:
    """What both launchers are told, but for addresses of results; and a tensor that has to live as long."""
    # One on the host is an argument of the launch; one on the device is read there, so that nothing waits for it.
    on_device = None if reg.device.type == "cpu" else reg.to(weight.device, weight.dtype)
    arguments = {
        "double": _native.is_double(weight),
        "weight": _native.pointer(weight),
        "weight_strides": weight.stride(),
        "reg": float(reg) if on_device is None else 0.0,
        "reg_on_device": _native.pointer(on_device),
        "sizes": tuple(weight.shape),
        **_native.device_and_stream(weight),
    }
    return arguments, on_device


def _cuda_solve(weight: Tensor, rhs: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
    """``_solve``, whichever strides."""
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    count = math.prod(batch)
    weight, rhs = weight.reshape(count, m, n), rhs.reshape(count, n, m)
    solved, failed = weight.new_empty((count, n, m)), torch.empty(count, dtype=torch.bool, device=weight.device)
    arguments, _alive = _cuda_arguments(weight, reg)
    _native.cuda.regularized_solve(
        rhs=_native.pointer(rhs),
        rhs_strides=rhs.stride(),
        solved=_native.pointer(solved),
        failed=_native.pointer(failed),
        **arguments,
    )
    return solved.view(*batch, n, m), failed.view(batch)


def _cuda_polar(weight: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
    """``_polar``, float64 too, whichever strides."""
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    count = math.prod(batch)
    weight = weight.reshape(count, m, n)
    polar, failed = weight.new_empty((count, n, m)), torch.empty(count, dtype=torch.bool, device=weight.device)
    scratch = weight.new_empty((count, n, n))
    arguments, _alive = _cuda_arguments(weight, reg)
    _native.cuda.regularized_polar(
        polar=_native.pointer(polar),
        scratch=_native.pointer(scratch),
        failed=_native.pointer(failed),
        tolerance=CUDA_TOLERANCE[weight.dtype],
        most=CUDA_LARGEST_COUNT,
        **arguments,
    )
    return polar.view(*batch, n, m), failed.view(batch)


def _cuda_takes(weight: Tensor) -> bool:
    """Whether the Gram matrix fits in the shared memory of one multiprocessor. Beyond are torch's products."""
    double, device = _native.is_double(weight), _native.device_and_stream(weight)["device"]
    return min(weight.shape[-2:]) <= _native.cuda.regularized_inverse_largest(double=double, device=device)


def _cuda_forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    if not _cuda_takes(weight):
        return products.forward(weight, reg, power)
    if weight.shape[-2] < weight.shape[-1]:
        inverse, failed = _cuda_forward(weight.mT, reg, power)
        return inverse.mT, failed
    return _cuda_solve(weight, weight.mT, reg) if power == 1.0 else _cuda_polar(weight, reg)


def _cuda_backward(grad: Tensor, weight: Tensor, inverse: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    if power != 1.0 or not _cuda_takes(weight):
        return reference.backward(grad, weight, inverse, reg, power)
    if weight.shape[-2] < weight.shape[-1]:
        grad_weight, grad_reg = _cuda_backward(grad.mT, weight.mT, inverse.mT, reg, power)
        return grad_weight.mT, grad_reg
    _native.check_same_kind("regularized_inverse", weight, grad, inverse)
    solved, _ = _cuda_solve(weight, grad, reg)
    grad_weight, grad_reg = reference.inverse_gradients(solved, weight, inverse)
    return grad_weight, grad_reg.sum().to(reg)


def _cuda_supports(weight: Tensor) -> Support:
    return _native.cuda_supports(weight, dtypes=(torch.float32, torch.float64))


BACKENDS = BackendTable(
    "regularized_inverse",
    {
        "reference": Backend(reference.forward, reference.backward),
        "cpu": Backend(_cpu_forward, _cpu_backward, _native.cpu_available, _native.cpu_supports),
        "triton": Backend(_triton_forward, reference.backward, _triton.available, _triton.supports),
        # By name only, until it has run on a GPU.
        "cuda": Backend(_cuda_forward, _cuda_backward, _native.cuda_available, _cuda_supports),
    },
    {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
)


_SMALL = 3e-4
"""r over a bound of the largest squared singular value from which a Gram matrix in single precision loses digits that
matter, about as many as 1.2e-7 / 3e-4.
"""

LARGEST_CONDITION = {torch.float32: 2e5, torch.float64: 2e13}
"""Of a Gram matrix that is factored in that dtype, at power 1. P is off by about the condition times the unit roundoff:
beyond, less than two digits of it need be right.
"""


def _bound(weight: Tensor) -> Tensor:
    """``‖W‖_∞ ‖W‖_1``, at least the largest squared singular value."""
    sizes = weight.abs()
    return sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)


def _small(weight: Tensor, reg: Tensor, power: float, chosen: Backend) -> Tensor | None:
    """Of which matrices P at power 1 is factored in double precision, although the weight has less; ``None``: of none.
    By the "cpu" back-end, where looking at the numbers costs next to nothing; the reference keeps to the dtype.
    """
    if power != 1.0 or weight.dtype == torch.float64 or chosen is not BACKENDS.backends["cpu"]:
        return None
    bound = _bound(weight)
    small = (float(reg) < _SMALL * bound) & bound.isfinite()
    return small if small.any() else None


def _ill_conditioned(weight: Tensor, reg: Tensor, chosen: Backend, may_wait: bool) -> Tensor | None:
    """Of which matrices P at power 1 would have lost its digits; ``None``: of none. Whatever the back-end returned.

    ``may_wait``: numbers may be read, which spares all but few matrices the factorization that tells.
    """
    double = weight.dtype == torch.float64 or chosen is BACKENDS.backends["cpu"]
    largest = LARGEST_CONDITION[torch.float64 if double else torch.float32]
    if may_wait and not (largest * float(reg) < _bound(weight)).any():
        return None
    finite = weight.isfinite().all(dim=(-2, -1))
    return finite & ~(reference.condition(weight, reg) <= largest)  # no comparison holds for NaN


def _forward(weight: Tensor, reg: Tensor, power: float, chosen: Backend) -> tuple[Tensor, Tensor | None]:
    """P, and which matrices have none (``None``: all have one)."""
    small = _small(weight, reg, power, chosen)
    if small is None:
        return chosen.forward(weight, reg, power)
    inverse, failed = weight.new_empty(weight.mT.shape), torch.zeros_like(small)
    for some, dtype in ((small, torch.float64), (~small, weight.dtype)):
        found, without = chosen.forward(weight[some].to(dtype), reg, power)
        inverse[some] = found.to(weight.dtype)
        if without is not None:
            failed[some] = without
    return inverse, failed


def compute(weight: Tensor, reg: Tensor, power: float, check_errors: bool, backend: str) -> Tensor:
    if check_errors or reg.device.type == "cpu":  # elsewhere, reading it waits for the device
        _validate.regularization("regularized_inverse", float(reg), weight.dtype)
    chosen = BACKENDS.resolve(backend, weight)
    inverse, failed = _forward(weight, reg, power, chosen)
    if power == 1.0:
        lost = _ill_conditioned(weight, reg, chosen, check_errors or weight.device.type == "cpu")
        if lost is not None:
            inverse = inverse.masked_fill(lost[..., None, None], torch.nan)
            failed = lost if failed is None else failed | lost
    if check_errors and failed is not None and failed.any():
        index = tuple(failed.nonzero()[0].tolist())
        where = f" of batch entry {index[0] if len(index) == 1 else index}" if index else ""
        raise torch.linalg.LinAlgError(
            f"regularized_inverse: the Gram matrix{where} is not numerically positive definite in "
            f"{dtype_name(weight.dtype)} at reg={float(reg):g}; use a larger reg or float64"
        )
    return inverse.contiguous()


def _backward(
    grad: Tensor, weight: Tensor, inverse: Tensor, reg: Tensor, power: float, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = BACKENDS.resolve(backend, weight)
    small = _small(weight, reg, power, chosen)
    if small is None:
        grad_weight, grad_reg = chosen.backward(grad, weight, inverse, reg, power)
        return grad_weight.contiguous(), grad_reg
    grad_weight, grad_reg = weight.new_empty(weight.shape), torch.zeros_like(reg, dtype=torch.float64)
    for some, dtype in ((small, torch.float64), (~small, weight.dtype)):
        wide = weight[some].to(dtype)
        exact = inverse[some]
        if dtype != weight.dtype:  # NaN where forward found none
            exact = torch.where(exact.isnan(), torch.nan, chosen.forward(wide, reg, power)[0])
        of_weight, of_reg = chosen.backward(grad[some].to(dtype), wide, exact, reg, power)
        grad_weight[some] = of_weight.to(weight.dtype)
        grad_reg += of_reg
    return grad_weight, grad_reg.to(reg.dtype)


register(
    "regularized_inverse_bwd(Tensor grad, Tensor weight, Tensor inverse, Tensor reg, float power, str backend) "
    "-> (Tensor, Tensor)",
    _backward,
    lambda grad, weight, inverse, reg, *rest: (weight.new_empty(weight.shape), reg.new_empty(())),
)


class RegularizedInverseFunction(torch.autograd.Function):
    """Keeps W and P; backward factors the Gram matrix again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, reg: Tensor, power: float, check_errors: bool, backend: str) -> Tensor:
        run = _run if dispatches_to_nobody(weight, reg) else torch.ops.tp_kernels.regularized_inverse_fwd
        inverse = run(weight, reg, power, check_errors, backend)
        ctx.save_for_backward(weight, reg, inverse)
        ctx.power, ctx.backend = power, backend
        return inverse

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, saved: tuple, grad: Tensor) -> tuple:
        weight, reg, inverse = saved
        grad_weight, grad_reg = torch.ops.tp_kernels.regularized_inverse_bwd(
            grad, weight, inverse, reg, ctx.power, ctx.backend
        )
        needs_weight, needs_reg = ctx.needs_input_grad[:2]
        return grad_weight if needs_weight else None, grad_reg if needs_reg else None, None, None, None


_run = register(
    "regularized_inverse_fwd(Tensor weight, Tensor reg, float power, bool check_errors, str backend) -> Tensor",
    compute,
    lambda weight, reg, *rest: weight.new_empty(weight.mT.shape),
    derivative=RegularizedInverseFunction,
)


def regularized_inverse(
    weight: Tensor,
    reg: float | Tensor,
    *,
    power: float = 1.0,
    check_errors: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Regularized inverse of each matrix of a batch.

    ``P = (WᵀW + rI)^{-α} Wᵀ``. At α = 1, ``u = P y`` minimizes ``‖Wu - y‖² + r‖u‖²``; the gains ``s/(s² + r)``
    over the singular values s of W are at most ``1/(2√r)``. At α = 1/2, P is the transpose of the regularized polar
    factor, whose gains are 1 for every ``s² ≫ r``. The smaller of the two Gram matrices is factored, in float32 or
    float64.

    Args:
        weight: [..., m, n], floating point, any strides. Half precision is factored in float32; the "cpu" back-end
            takes float32 and float64.
        reg: r > 0 and finite: a number, or a tensor of shape [] (then P is differentiable in it).
        power: α, 1 or 1/2.
        check_errors: raise where a Gram matrix is not numerically positive definite: where, at power 1, its condition
            ``(s_max² + r)/(s_min² + r)`` is above 2e13, or 2e5 where it is factored in float32. With ``False`` the
            inverse of that matrix is NaN, and nothing waits for the device. A matrix that is not finite gives NaN
            either way.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        P: [..., n, m], contiguous, in the dtype and on the device of ``weight``.

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, value or word other than stated.
        BackendUnavailableError: a back-end asked for by name that cannot run this call.
        torch.linalg.LinAlgError: a Gram matrix is not numerically positive definite; names the batch index.

    Source: Roulet and Harchaoui, arXiv 2112.01453, section 2; power 1/2 is this library's.

    Example:
        >>> import torch, tp_kernels as tp
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> tp.regularized_inverse(weight, 0.25)
        tensor([[0.4706, 0.0000],
                [0.0000, 1.0000]])
    """
    _validate.regularized_inverse(weight, reg, power, check_errors, backend)
    r = reg if isinstance(reg, Tensor) else torch.tensor(float(reg), dtype=torch.float64, device="cpu")
    compute = torch.ops.tp_kernels.regularized_inverse_fwd if differentiates_ops() else RegularizedInverseFunction.apply
    return compute(weight, r, float(power), check_errors, backend)
