"""Long short-term memory. ``cell.py`` has its arithmetic."""

from torch import Tensor

from tp_kernels import _validate
from tp_kernels.ops.lstm.cell import CELL
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.ops.recurrence.state import hand_on, relays_of
from tp_kernels.rules import Rule, resolve

__all__ = ["lstm"]


def lstm(
    u: Tensor,
    weight: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    reset: Tensor | None = None,
    feedback: Tensor | None = None,
    rule: Rule | None = None,
    checkpoint_every: int | None = None,
    return_last: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """States of a long short-term memory over a whole sequence, with the rule's gradients.

    ``c_t = f_t c_{t-1} + i_t g_t`` and ``h_t = o_t tanh(c_t)`` for t = 1 … T, with the gates
    ``i, f, o = σ(u + W h_{t-1})`` and the candidate ``g = tanh(u_g + W_g h_{t-1})``: the unit of ``torch.nn.LSTM``.
    Backward is by the rule, as in ``tp_kernels.rnn``. With heads, H independent layers run in one call.

    Args:
        u: [T, B, 4N] or, with heads, [T, B, H, 4N], floating point, any strides: the input's share of i, f, g and o, in
            that order, ``x_t Uᵀ + b``. The "cpu" back-end takes float32 and float64.
        weight: [4N, N] or [H, 4N, N], W_i, W_f, W_g and W_o, in the dtype and on the device of ``u``.
        hx: the first h and the first c, [B, N] or [B, H, N] each. ``None`` is zero.
        reset: [T, B], bool: true where a sequence starts anew, from zero, before that step. Nothing crosses it, neither
            forwards nor backwards. ``None`` is nowhere.
        feedback: a fixed matrix in place of the rule's inverse, as in ``tp_kernels.gru``: [N, N] or [H, N, N].
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``. A displacement goes back

            - by ``inverse="weight"``: through the gates as they are and through P of W_g, where BP has W_gᵀ and slopes:
              from ``κ = λ^c + o λ^h``, the displacement of c, come ``λ^c = f̂ κ`` and ``λ^h = √î P_g (√î κ)``, with î
              and f̂ the gates i and f over ``max(1, i + f)``. At power 1/2, κ never grows.
            - by "jacobian": the regularized inverse of ``∂(h, c)_t/∂(h, c)_{t-1}``, a solve for every sample and step.
              The "cpu" back-end does not have it.
            - by "identity": as it is, both parts.
        checkpoint_every: k >= 1: keep u and every k-th state for backward, and compute the other states and the gates
            again, to the same bits. ``None`` keeps all states and gates, 6N numbers a step.
        return_last: whether to return the last h and c too, to hand on to the next call as they are: then the gradients
            of the calls are those of one.
        backend: "auto", "reference" or "cpu": what runs the recurrence. P comes from the same one.

    Returns:
        h: [T, B, N] or [T, B, H, N], h_1 … h_T; with ``return_last`` also (h_T, c_T), [B, N] or [B, H, N] each.

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, T = 0, a rule with ``inverse="layer"``, or ``feedback``
            with a rule that has no P.
        BackendUnavailableError: a back-end asked for by name that cannot run this call.
        torch.linalg.LinAlgError: in backward, a Gram matrix of W_g is not numerically positive definite (on the CPU;
            elsewhere gradients are NaN), or a solve of ``inverse="jacobian"`` does not come down to the rule's rtol.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, in the form of
    ``torch.nn.LSTM``; "weight" is this library's.

    Example:
        >>> import torch, tp_kernels as tp
        >>> _ = torch.manual_seed(0)
        >>> u = torch.randn(5, 2, 12, requires_grad=True)
        >>> weight = torch.randn(12, 3, requires_grad=True)
        >>> h, (h_last, c_last) = tp.lstm(u, weight, return_last=True)
        >>> h.sum().backward()
        >>> h.shape, c_last.shape, weight.grad.shape
        (torch.Size([5, 2, 3]), torch.Size([2, 3]), torch.Size([12, 3]))
    """
    rule = resolve("lstm", rule)
    h0, c0 = _validate.pair("lstm", "hx", hx)
    _validate.recurrence(
        CELL, u, weight, None, {"hx[0]": h0, "hx[1]": c0}, reset, feedback, rule, checkpoint_every, backend
    )
    relays = relays_of((h0, c0), "lstm", rule.carries)
    h, last, relay = recurrent_layer(
        CELL.name,
        u,
        weight,
        h0,
        c0,
        feedback=feedback,
        reset=reset,
        rule=rule,
        checkpoint_every=checkpoint_every,
        relay=None if relays is None else relays[0],
        backend=backend,
    )
    return (h, tuple(hand_on(part, (relay,)) for part in last)) if return_last else h
