"""The recurrent layer (Elman): ``h_t = a(u_t + W h_{t-1})``, with targets or gradients sent back through time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

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
    h0 = u.new_zeros(u.shape[1:]) if h0 is None else h0.contiguous()
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
    carried: Tensor | None,
    through: Tensor | None,
    nonlinearity: str,
    inverse: str,
    update: str,
    step: float,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_h = _unit_stride(grad_h)
    h, weight = h.contiguous(), weight.contiguous()
    grad_last, feedback, carried, through = (
        None if tensor is None else tensor.contiguous() for tensor in (grad_last, feedback, carried, through)
    )
    grad_u, carried_out, through_out = _backward_outputs(h, inverse, update)
    _native.cpu.rnn_bwd(
        double=_native.is_double(h),
        grad_h=_native.pointer(grad_h),
        grad_h_strides=_strides(grad_h),
        grad_last=_native.pointer(grad_last),
        h=_native.pointer(h),
        weight=_native.pointer(weight),
        feedback=_native.pointer(feedback),
        carried_in=_native.pointer(carried),
        through_in=_native.pointer(through),
        carried_out=_native.pointer(carried_out),
        through_out=_native.pointer(through_out),
        grad_u=_native.pointer(grad_u),
        sizes=_sizes(h),
        nonlinearity=nonlinearity,
        inverse=inverse,
        update=update,
        step=step,
        clip=clip,
        threads=torch.get_num_threads(),
    )
    return grad_u, carried_out, through_out


def _backward_outputs(h: Tensor, inverse: str, update: str) -> tuple[Tensor, Tensor, Tensor]:
    """What backward fills: δ, and what it sends on to an earlier call; empty where the rule sends nothing."""
    carried = h.new_empty(h.shape[1:] if inverse != "none" else (0,))
    through = h.new_empty(h.shape[1:] if update == "total" else (0,))
    return h.new_empty(h.shape), carried, through


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
    carried: Tensor | None,
    through: Tensor | None,
    nonlinearity: str,
    inverse: str,
    update: str,
    step: float,
    clip: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKENDS.resolve(backend, h).backward(
        grad_h, grad_last, h, weight, feedback, carried, through, nonlinearity, inverse, update, step, clip
    )


def _fake_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    nonlinearity: str,
    inverse: str,
    update: str,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(h, inverse, update)


register(
    "rnn_fwd(Tensor u, Tensor weight, Tensor? h0, str nonlinearity, str backend) -> Tensor",
    _forward,
    lambda u, weight, h0, nonlinearity, backend: u.new_empty(u.shape),
)
register(
    "rnn_bwd(Tensor? grad_h, Tensor? grad_last, Tensor h, Tensor weight, Tensor? feedback, Tensor? carried, "
    "Tensor? through, str nonlinearity, str inverse, str update, float step, float clip, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


_last_feedback: tuple[Tensor, float, float, str, Tensor] | None = None


def _feedback(weight: Tensor, reg: float, power: float, backend: str) -> Tensor:
    """P of ``weight``; on the CPU the last one is kept, for further backward passes with the very same weight.

    The comparison is by value: it costs N² against N³, and no change of the weight can escape it.
    """
    global _last_feedback
    last = _last_feedback
    if last is not None and last[1:4] == (reg, power, backend) and _same_values(last[0], weight):
        return last[4].clone()
    r = torch.tensor(reg, dtype=torch.float64)
    feedback = torch.ops.tp_kernels.regularized_inverse_fwd(weight, r, power, True, backend)
    if weight.device.type == "cpu":
        _last_feedback = (weight.detach().clone(), reg, power, backend, feedback.clone())
    return feedback


def forget_feedback() -> None:
    """Forget the P that is kept, as a benchmark has to whose weight stays the same from step to step."""
    global _last_feedback
    _last_feedback = None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


register(
    "rnn_feedback(Tensor weight, float reg, float power, str backend) -> Tensor",
    _feedback,
    lambda weight, reg, power, backend: weight.new_empty(weight.shape),
)


def _project(x: Tensor, projection: Tensor | None, bias: Tensor | None) -> Tensor:
    return x if projection is None else functional.linear(x, projection, bias)


def _weight_gradient(grad_u: Tensor, h: Tensor, start: Tensor | None) -> Tensor:
    """``∂W = Σ_t δ_tᵀ h_{t-1}``, one large product; the state before the first is zero where there is none."""
    delta, state = grad_u[1:].flatten(0, 1), h[:-1].flatten(0, 1)
    if h.dim() == 3:
        grad_weight = delta.mT @ state
        return grad_weight if start is None else grad_weight.addmm_(grad_u[0].mT, start)
    grad_weight = delta.permute(1, 2, 0) @ state.transpose(0, 1)
    return grad_weight if start is None else grad_weight.baddbmm_(grad_u[0].permute(1, 2, 0), start.transpose(0, 1))


class RNNFunction(torch.autograd.Function):
    """A whole layer, input projection included where there is one: ``u = x Uᵀ + b``, or ``u = x``.

    Without checkpoints forward keeps all states, and nothing else but its inputs. With ``checkpoint_every=k`` it
    keeps every k-th; backward computes the others again, k steps at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        h0: Tensor | None,
        checkpoint_every: int | None,
        return_sequence: bool,
        nonlinearity: str,
        inverse: str,
        update: str,
        power: float,
        reg: float,
        step: float,
        clip: float,
        backend: str,
    ) -> tuple[Tensor | None, Tensor]:
        rnn_fwd = torch.ops.tp_kernels.rnn_fwd
        if checkpoint_every is None:
            kept = sequence = rnn_fwd(_project(x, projection, bias), weight, h0, nonlinearity, backend)
            last = sequence[-1].clone()
        else:
            T, N, last, ends, sequence = x.shape[0], weight.shape[-1], h0, [], None
            if return_sequence:
                sequence = x.new_empty((*x.shape[:-1], N))
            for first in range(0, T, checkpoint_every):
                steps = slice(first, first + checkpoint_every)
                h = rnn_fwd(_project(x[steps], projection, bias), weight, last, nonlinearity, backend)
                last = h[-1].clone()
                ends.append(last)
                if return_sequence:
                    sequence[steps] = h
            kept = torch.stack(ends)
        needs_x = projection is not None or checkpoint_every is not None
        ctx.save_for_backward(x if needs_x else None, projection, bias, weight, h0, kept)
        ctx.set_materialize_grads(False)
        ctx.checkpoint_every = checkpoint_every
        ctx.words = (nonlinearity, inverse, update, power, reg, step, clip, backend)
        return sequence if return_sequence else None, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        x, projection, bias, weight, h0, kept = ctx.saved_tensors
        nonlinearity, inverse, update, power, reg, step, clip, backend = ctx.words
        needs_x, needs_projection, needs_bias, needs_weight, needs_h0 = ctx.needs_input_grad[:5]
        feedback = None
        if inverse in ("weight", "layer"):
            feedback = torch.ops.tp_kernels.rnn_feedback(weight, reg, power, backend)

        def chunk(h: Tensor, start: Tensor | None, x: Tensor | None, grad_h, grad_last, carried, through) -> tuple:
            """Gradients in x, U, b and W of some steps, and what these send on to the steps before."""
            grad_u, carried, through = torch.ops.tp_kernels.rnn_bwd(
                *(grad_h, grad_last, h, weight, feedback, carried, through),
                *(nonlinearity, inverse, update, step, clip, backend),
            )
            flat = grad_u.flatten(0, 1)
            gradients = (
                grad_u if projection is None or not needs_x else grad_u @ projection,
                flat.mT @ x.flatten(0, 1) if needs_projection else None,
                flat.sum(0) if needs_bias else None,
                _weight_gradient(grad_u, h, start) if needs_weight else None,
            )
            return gradients, carried if inverse != "none" else None, through if update == "total" else None

        if ctx.checkpoint_every is None:
            gradients, carried, through = chunk(kept, h0, x, grad_h, grad_last, None, None)
        else:
            gradients, carried, through = None, None, None
            grad_x = torch.empty_like(x) if needs_x else None
            for i in reversed(range(kept.shape[0])):
                steps = slice(i * ctx.checkpoint_every, (i + 1) * ctx.checkpoint_every)
                start = kept[i - 1] if i else h0
                u = _project(x[steps], projection, bias)
                h = torch.ops.tp_kernels.rnn_fwd(u, weight, start, nonlinearity, backend)
                grad = None if grad_h is None else grad_h[steps]
                (part, *parts), carried, through = chunk(h, start, x[steps], grad, grad_last, carried, through)
                grad_last = None  # the last state is the last chunk's
                if needs_x:
                    grad_x[steps] = part
                gradients = parts if gradients is None else [_add(a, b) for a, b in zip(gradients, parts, strict=True)]
            gradients = (grad_x, *gradients)
        grad_h0 = through if update == "total" else carried
        return (gradients[0] if needs_x else None, *gradients[1:], grad_h0 if needs_h0 else None, *[None] * 10)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if total is None else total.add_(part)


def rnn_layer(
    x: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    *,
    nonlinearity: str,
    rule: Rule | None,
    checkpoint_every: int | None,
    return_sequence: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor]:
    """All states (``None`` without ``return_sequence``) and the last one, from arguments that have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N].
    """
    if isinstance(rule, BackProp):
        words = ("none", "total", 1.0, 1.0, 1.0, 0.5)
    else:
        words = (rule.inverse, rule.update, rule.power, rule.reg, rule.step, rule.clip)
    return RNNFunction.apply(
        x, projection, bias, weight, h0, checkpoint_every, return_sequence, nonlinearity, *words, backend
    )


def rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    rule: Rule | None = None,
    checkpoint_every: int | None = None,
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
        checkpoint_every: k >= 1: keep u and every k-th state for backward, and compute the other states again, to the
            same bits. ``None`` keeps all states. Saves memory where u is at hand anyway and h is not kept.
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
    rule = resolve("rnn", rule)
    _validate.rnn(u, weight, h0, nonlinearity, rule, checkpoint_every, backend)
    return rnn_layer(
        *(u, None, None, weight, h0),
        nonlinearity=nonlinearity,
        rule=rule,
        checkpoint_every=checkpoint_every,
        return_sequence=True,
        backend=backend,
    )[0]
