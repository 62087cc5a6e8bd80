"""The gated recurrent unit, with targets or gradients sent back through time.

Its back-ends, its ops ``gru_fwd`` and ``gru_bwd``, its autograd Function and the public function.
"""

from typing import Any

import torch
from torch import Tensor

from tp_kernels import _native, _validate
from tp_kernels._autograd import first_derivatives_only
from tp_kernels._backends import Backend, BackendTable, Support
from tp_kernels._library import op, register
from tp_kernels.ops.gru import reference
from tp_kernels.ops.rnn.backends import SWEEP
from tp_kernels.ops.rnn.launch import unit_stride
from tp_kernels.ops.rnn.reference import unsolved
from tp_kernels.rules import Rule, Sweep, TargetProp, resolve

# --- back-ends


def _cpu_forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    _native.check_same_kind("gru", u, weight, bias, h0)
    u, weight = unit_stride(u), weight.contiguous()
    bias, h0 = (None if tensor is None else tensor.contiguous() for tensor in (bias, h0))
    h, gates = _forward_outputs(u, weight, keep)
    _native.cpu.gru_fwd(
        double=_native.is_double(u),
        u=_native.pointer(u),
        u_strides=u.stride()[:2],
        weight=_native.pointer(weight),
        bias=_native.pointer(bias),
        h0=_native.pointer(h0),
        h=_native.pointer(h),
        gates=_native.pointer(gates) if keep else 0,
        sizes=tuple(h.shape),
        threads=torch.get_num_threads(),
    )
    return h, gates


def _cpu_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    gates: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    h0: Tensor | None,
    sweep: Sweep,
) -> tuple[Tensor, Tensor]:
    _native.check_same_kind("gru", h, grad_h, grad_last, gates, weight, feedback, h0)
    grad_h, h, gates, weight = unit_stride(grad_h), h.contiguous(), gates.contiguous(), weight.contiguous()
    grad_last, feedback, h0 = (None if tensor is None else tensor.contiguous() for tensor in (grad_last, feedback, h0))
    grad_u, grad_h0 = _backward_outputs(h)
    missed = _native.cpu.gru_bwd(
        double=_native.is_double(h),
        grad_h=_native.pointer(grad_h),
        grad_h_strides=(0, 0) if grad_h is None else grad_h.stride()[:2],
        grad_last=_native.pointer(grad_last),
        h=_native.pointer(h),
        gates=_native.pointer(gates),
        weight=_native.pointer(weight),
        feedback=_native.pointer(feedback),
        h0=_native.pointer(h0),
        grad_u=_native.pointer(grad_u),
        grad_h0=_native.pointer(grad_h0),
        sizes=tuple(h.shape),
        inverse=sweep.inverse,
        update=sweep.update,
        step=sweep.step,
        clip=sweep.clip,
        reg=sweep.reg,
        rtol=sweep.rtol,
        threads=torch.get_num_threads(),
    )
    if missed is not None:
        t, b, residual = missed
        raise unsolved(t, b, None, residual, sweep, h.dtype, "gru")
    return grad_u, grad_h0


def _absent() -> Support:
    return False, "it has no kernel for this op yet"


BACKENDS = BackendTable(
    "gru",
    {
        "reference": Backend(reference.forward, reference.backward),
        "cpu": Backend(_cpu_forward, _cpu_backward, _native.cpu_available, _native.cpu_supports),
        "triton": Backend(reference.forward, reference.backward, _absent),
        "cuda": Backend(reference.forward, reference.backward, _absent),
    },
)


# --- ops


def _forward_outputs(u: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    T, B, N = u.shape[0], u.shape[1], weight.shape[1]
    return u.new_empty((T, B, N)), u.new_empty((T, B, 4, N) if keep else (0,))


def _backward_outputs(h: Tensor) -> tuple[Tensor, Tensor]:
    T, B, N = h.shape
    return h.new_empty((T, B, 3 * N)), h.new_empty((B, N))


def _forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return BACKENDS.resolve(backend, u).forward(u, weight, bias, h0, keep)


def _backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    gates: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    h0: Tensor | None,
    *words: Any,
) -> tuple[Tensor, Tensor]:
    *sweep, backend = words
    return BACKENDS.resolve(backend, h).backward(grad_h, grad_last, h, gates, weight, feedback, h0, Sweep(*sweep))


register(
    "gru_fwd(Tensor u, Tensor weight, Tensor? bias, Tensor? h0, bool keep, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda u, weight, bias, h0, keep, backend: _forward_outputs(u, weight, keep),
)
register(
    "gru_bwd(Tensor? grad_h, Tensor? grad_last, Tensor h, Tensor gates, Tensor weight, Tensor? feedback, Tensor? h0, "
    f"{SWEEP}, str backend) -> (Tensor, Tensor)",
    _backward,
    lambda grad_h, grad_last, h, *rest: _backward_outputs(h),
    twin=True,  # as of rnn_bwd
)


# --- autograd


def _summed(delta: Tensor, h: Tensor, h0: Tensor | None) -> Tensor:
    """``Σ_t δ_tᵀ h_{t-1}``; the state before the first is zero where there is none."""
    total = delta[1:].flatten(0, 1).mT @ h[:-1].flatten(0, 1)
    return total if h0 is None else total.addmm_(delta[0].mT, h0)


class GRUFunction(torch.autograd.Function):
    """The recurrence. For backward it keeps the states and the four gates of every step, [T, B, 4, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        h0: Tensor | None,
        power: float | None,
        sweep: Sweep,
        backend: str,
        needs_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        h, gates = torch.ops.tp_kernels.gru_fwd(u, weight, bias, h0, needs_backward, backend)
        ctx.save_for_backward(weight, h0, h, gates)
        ctx.set_materialize_grads(False)
        ctx.words = (power, sweep, backend)
        return h, h[-1].clone()

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        weight, h0, h, gates = saved
        power, sweep, backend = ctx.words
        needs_u, needs_weight, needs_bias, needs_h0 = ctx.needs_input_grad[:4]
        N, feedback = h.shape[-1], None
        if sweep.uses_inverse:
            inverted = weight[2 * N :] if sweep.inverse == "weight" else weight.unflatten(0, (3, N))
            feedback = torch.ops.tp_kernels.rnn_feedback(inverted, sweep.reg, power, backend)
        grad_u, grad_h0 = op("gru_bwd", waits=sweep.inverse == "jacobian")(
            grad_h, grad_last, h, gates, weight, feedback, h0, *sweep, backend
        )
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            inner = gates[:, :, 0] * grad_u[..., 2 * N :]  # of q
            grad_bias = inner.sum((0, 1)) if needs_bias else None
        if needs_weight:
            grad_weight = torch.cat((_summed(grad_u[..., : 2 * N], h, h0), _summed(inner, h, h0)))
        return grad_u if needs_u else None, grad_weight, grad_bias, grad_h0 if needs_h0 else None, *[None] * 4


def gru_states(
    u: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, rule: Rule, backend: str
) -> tuple[Tensor, Tensor]:
    """All states and the last one, from arguments that have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N].
    """
    power = rule.power if isinstance(rule, TargetProp) else None
    trained = (tensor for tensor in (u, weight, bias, h0) if tensor is not None)
    needs_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    return GRUFunction.apply(u, weight, bias, h0, power, Sweep.of(rule, "tanh"), backend, needs_backward)


def gru(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rule: Rule | None = None,
    backend: str = "auto",
) -> Tensor:
    """States of a gated recurrent unit over a whole sequence, with the rule's gradients.

    ``h_t = (1 - z_t) n_t + z_t h_{t-1}`` for t = 1 … T, with the gates ``r_t = σ(u_r + W_r h_{t-1})`` and
    ``z_t = σ(u_z + W_z h_{t-1})`` and the candidate ``n_t = tanh(u_n + r_t (W_n h_{t-1} + b))``: the unit of
    ``torch.nn.GRU``. Backward is by the rule, as in ``tp_kernels.rnn``.

    Args:
        u: [T, B, 3N], floating point, any strides: the input's share of r, z and n, in that order, ``x_t Uᵀ + b``. The
            "cpu" back-end takes float32 and float64.
        weight: [3N, N], W_r, W_z and W_n, in the dtype and on the device of ``u``.
        h0: [B, N], the first state. ``None`` is zero.
        bias: [N], b, the share of n that r multiplies with that of the state. ``None`` is zero.
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``. A displacement goes back

            - by ``inverse="weight"``: through the gates as they are and through P of W_n, where BP has W_nᵀ and the
              slope of tanh: ``z λ + √(1-z) P_n (√(1-z) r λ)``. At power 1/2 it never grows.
            - by "layer": the paper's formula, with the inverses of all three blocks of W and of all activations. Gates
              are clipped to [clip, 1 - clip].
            - by "jacobian": the regularized inverse of ``∂h_t/∂h_{t-1}``, a solve for every sample and step.
            - by "identity": as it is.
        backend: "auto", "reference" or "cpu": what runs the recurrence. P comes from the same one.

    Returns:
        h: [T, B, N], all states h_1 … h_T.

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, T = 0, or a rule whose mode is not "linearized".
        BackendUnavailableError: a back-end asked for by name that cannot run this call.
        torch.linalg.LinAlgError: in backward, a Gram matrix of a block of ``weight`` is not numerically positive
            definite (on the CPU; elsewhere gradients are NaN), or a solve of ``inverse="jacobian"`` does not come down
            to the rule's rtol.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014, in the form of
    ``torch.nn.GRU``; "layer" from Roulet and Harchaoui, "Target Propagation via Regularized Inversion", arXiv
    2112.01453, for that form; "weight" is this library's.

    Example:
        >>> import torch, tp_kernels as tp
        >>> _ = torch.manual_seed(0)
        >>> u = torch.randn(5, 2, 9, requires_grad=True)
        >>> weight = torch.randn(9, 3, requires_grad=True)
        >>> h = tp.gru(u, weight, rule=tp.TargetProp())
        >>> h[-1].sum().backward()
        >>> h.shape, weight.grad.shape
        (torch.Size([5, 2, 3]), torch.Size([9, 3]))
    """
    rule = resolve("gru", rule)
    _validate.gru(u, weight, bias, h0, rule, backend)
    return gru_states(u, weight, bias, h0, rule, backend)[0]
