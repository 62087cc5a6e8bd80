"""The recurrent layer (Elman): ``h_t = a(u_t + W h_{t-1})``, with targets or gradients sent back through time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_kernels import _native, _validate
from tp_kernels._backends import Backend, BackendTable, missing
from tp_kernels._library import register
from tp_kernels.ops.rnn import reference
from tp_kernels.rules import BackProp, Rule, resolve


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The native kernels take any strides but for the last axis."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides over time, batch and heads."""
    if tensor is None:
        return 0, 0, 0
    return tensor.stride(0), tensor.stride(1), tensor.stride(2) if tensor.dim() == 4 else 0


def _sizes(h: Tensor) -> tuple[int, int, int, int]:
    return h.shape[0], h.shape[1], h.shape[2] if h.dim() == 4 else 1, h.shape[-1]


def _cpu_forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str) -> Tensor:
    u, weight = _unit_stride(u), weight.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    h = u.new_empty(u.shape)
    _native.cpu.rnn_fwd(
        double=_native.is_double(u),
        u=_native.pointer(u),
        u_strides=_strides(u),
        weight=_native.pointer(weight),
        h0=_native.pointer(h0),
        h=_native.pointer(h),
        sizes=_sizes(u),
        nonlinearity=nonlinearity,
        threads=torch.get_num_threads(),
    )
    return h


def _cpu_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    nonlinearity: str,
    inverse: str,
    update: str,
    step: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    grad_h = _unit_stride(grad_h)
    grad_last = None if grad_last is None else grad_last.contiguous()
    h, weight = h.contiguous(), weight.contiguous()
    feedback = None if feedback is None else feedback.contiguous()
    grad_u = h.new_empty(h.shape)
    grad_h0 = h.new_empty(h.shape[1:])
    _native.cpu.rnn_bwd(
        double=_native.is_double(h),
        grad_h=_native.pointer(grad_h),
        grad_h_strides=_strides(grad_h),
        grad_last=_native.pointer(grad_last),
        h=_native.pointer(h),
        weight=_native.pointer(weight),
        feedback=_native.pointer(feedback),
        grad_u=_native.pointer(grad_u),
        grad_h0=_native.pointer(grad_h0),
        sizes=_sizes(h),
        nonlinearity=nonlinearity,
        inverse=inverse,
        update=update,
        step=step,
        clip=clip,
        threads=torch.get_num_threads(),
    )
    return grad_u, grad_h0


BACKENDS = BackendTable(
    "rnn",
    {
        "reference": Backend(reference.forward, reference.backward),
        "cpu": Backend(_cpu_forward, _cpu_backward, _native.cpu_available, _native.cpu_supports),
        "triton": missing("this version has no Triton kernel for it"),
        "cuda": missing("this version has no CUDA kernel for it"),
    },
)


def _forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, backend: str) -> Tensor:
    return BACKENDS.resolve(backend, u).forward(u, weight, h0, nonlinearity)


def _backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    nonlinearity: str,
    inverse: str,
    update: str,
    step: float,
    clip: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return BACKENDS.resolve(backend, h).backward(
        grad_h, grad_last, h, weight, feedback, nonlinearity, inverse, update, step, clip
    )


register(
    "rnn_fwd(Tensor u, Tensor weight, Tensor? h0, str nonlinearity, str backend) -> Tensor",
    _forward,
    lambda u, weight, h0, nonlinearity, backend: u.new_empty(u.shape),
)
register(
    "rnn_bwd(Tensor? grad_h, Tensor? grad_last, Tensor h, Tensor weight, Tensor? feedback, str nonlinearity, "
    "str inverse, str update, float step, float clip, str backend) -> (Tensor, Tensor)",
    _backward,
    lambda grad_h, grad_last, h, *rest: (h.new_empty(h.shape), h.new_empty(h.shape[1:])),
)


def _weight_gradient(grad_u: Tensor, h: Tensor, h0: Tensor | None) -> Tensor:
    """``∂W = Σ_t δ_tᵀ h_{t-1}``, one large product; h_0 is zero where there is none."""
    delta, state = grad_u[1:].flatten(0, 1), h[:-1].flatten(0, 1)
    if h.dim() == 3:
        grad_weight = delta.mT @ state
        return grad_weight if h0 is None else grad_weight.addmm_(grad_u[0].mT, h0)
    grad_weight = delta.permute(1, 2, 0) @ state.transpose(0, 1)
    return grad_weight if h0 is None else grad_weight.baddbmm_(grad_u[0].permute(1, 2, 0), h0.transpose(0, 1))


class RNNFunction(torch.autograd.Function):
    """Forward keeps h only. Backward returns what the rule makes of the gradients that arrive."""

    @staticmethod
    def forward(
        u: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        nonlinearity: str,
        inverse: str,
        update: str,
        power: float,
        reg: float,
        step: float,
        clip: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        h = torch.ops.tp_kernels.rnn_fwd(u, weight, h0, nonlinearity, backend)
        return h, h[-1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, weight, h0, *ctx.words = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], weight, h0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        h, weight, h0 = ctx.saved_tensors
        nonlinearity, inverse, update, power, reg, step, clip, backend = ctx.words
        needs_u, needs_weight, needs_h0 = ctx.needs_input_grad[:3]
        feedback = None
        if inverse in ("weight", "layer"):
            r = torch.tensor(reg, dtype=torch.float64)
            feedback = torch.ops.tp_kernels.regularized_inverse_fwd(weight, r, power, True, backend)
        grad_u, grad_h0 = torch.ops.tp_kernels.rnn_bwd(
            grad_h, grad_last, h, weight, feedback, nonlinearity, inverse, update, step, clip, backend
        )
        grad_weight = _weight_gradient(grad_u, h, h0) if needs_weight else None
        return (grad_u if needs_u else None, grad_weight, grad_h0 if needs_h0 else None, *[None] * 8)


def rnn_with_last_state(
    u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, rule: Rule | None, backend: str
) -> tuple[Tensor, Tensor]:
    """All states and the last one, whose gradient then arrives by itself: no zero-filled [T, B, N] for it."""
    rule = resolve("rnn", rule)
    words = ("none", "total", 1.0, 1.0, 1.0, 0.5) if isinstance(rule, BackProp) else (
        rule.inverse, rule.update, rule.power, rule.reg, rule.step, rule.clip
    )  # fmt: skip
    _validate.rnn(u, weight, h0, nonlinearity, words[0], backend)
    return RNNFunction.apply(u, weight, h0, nonlinearity, *words, backend)


def rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    rule: Rule | None = None,
    backend: str = "auto",
) -> Tensor:
    """States of an Elman recurrent layer over a whole sequence, with the rule's gradients.

    ``h_t = a(u_t + h_{t-1} Wᵀ)`` for t = 1 … T. What backward returns is the rule's: ``TargetProp`` sends targets
    back through regularized inverses, ``BackProp`` gradients through transposes. With heads, H independent layers
    run in one call.

    Args:
        u: [T, B, N] or, with heads, [T, B, H, N], floating point, any strides: the input's share of the
            pre-activation, ``x_t Uᵀ + b``. The "cpu" back-end takes float32 and float64.
        weight: [N, N] or [H, N, N], W, in the dtype and on the device of ``u``.
        h0: [B, N] or [B, H, N], the first state. ``None`` is zero.
        nonlinearity: "tanh", "relu" or "identity".
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        h: all states h_1 … h_T, of the shape, dtype and device of ``u``.

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, or T = 0.
        NotImplementedError: ``inverse="layer"`` with another nonlinearity than "tanh".
        BackendUnavailableError: a back-end asked for by name that cannot run this call.
        torch.linalg.LinAlgError: in backward, a Gram matrix of ``weight`` is not numerically positive definite.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion", arXiv 2112.01453.

    Example:
        >>> import torch, tp_kernels as tp
        >>> _ = torch.manual_seed(0)
        >>> u = torch.randn(5, 2, 3, requires_grad=True)
        >>> weight = torch.eye(3, requires_grad=True)
        >>> h = tp.rnn(u, weight, rule=tp.TargetProp())
        >>> h[-1].sum().backward()
        >>> h.shape, weight.grad.shape
        (torch.Size([5, 2, 3]), torch.Size([3, 3]))
    """
    return rnn_with_last_state(u, weight, h0, nonlinearity, rule, backend)[0]
