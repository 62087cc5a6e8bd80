"""The gated recurrent unit. ``cell.py`` has its arithmetic."""

from torch import Tensor

from tp_kernels import _validate
from tp_kernels.ops.gru.cell import CELL
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.ops.recurrence.state import hand_on, relay_of
from tp_kernels.rules import Rule, resolve

__all__ = ["gru"]


def gru(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    bias: Tensor | None = None,
    feedback: Tensor | None = None,
    rule: Rule | None = None,
    checkpoint_every: int | None = None,
    return_last: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """States of a gated recurrent unit over a whole sequence, with the rule's gradients.

    ``h_t = (1 - z_t) n_t + z_t h_{t-1}`` for t = 1 … T, with the gates ``r_t = σ(u_r + W_r h_{t-1})`` and
    ``z_t = σ(u_z + W_z h_{t-1})`` and the candidate ``n_t = tanh(u_n + r_t (W_n h_{t-1} + b))``: the unit of
    ``torch.nn.GRU``. Backward is by the rule, as in ``tp_kernels.rnn``. With heads, H independent layers run in one
    call.

    Args:
        u: [T, B, 3N] or, with heads, [T, B, H, 3N], floating point, any strides: the input's share of r, z and n, in
            that order, ``x_t Uᵀ + b``. The "cpu" back-end takes float32 and float64.
        weight: [3N, N] or [H, 3N, N], W_r, W_z and W_n, in the dtype and on the device of ``u``.
        h0: [B, N] or [B, H, N], the first state. ``None`` is zero.
        reset: [T, B], bool: true where a sequence starts anew, from zero, before that step. Nothing crosses it, neither
            forwards nor backwards. ``None`` is nowhere.
        bias: [N] or [H, N], b, the share of n that r multiplies with that of the state. ``None`` is zero.
        feedback: a fixed matrix in place of the rule's inverse, as a control of what that itself contributes: [N, N]
            or [H, N, N] for "weight"; for "layer" one for each block, [3, N, N] or [H, 3, N, N]. No gradient reaches
            it. ``None`` is P.
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``. A displacement goes back

            - by ``inverse="weight"``: through the gates as they are and through P of W_n, where BP has W_nᵀ and the
              slope of tanh: ``z λ + √(1-z) P_n (√(1-z) r λ)``. At power 1/2 it never grows.
            - by "layer": the paper's formula, with the inverses of all three blocks of W and of all activations. Gates
              are clipped to [clip, 1 - clip].
            - by "jacobian": the regularized inverse of ``∂h_t/∂h_{t-1}``, a solve for every sample and step.
            - by "identity": as it is.
        checkpoint_every: k >= 1: keep u and every k-th state for backward, and compute the other states and the gates
            again, to the same bits. ``None`` keeps all states and gates, 5N numbers a step.
        return_last: whether to return the last state too, to hand on to the next call as it is: then the gradients of
            the calls are those of one. (``h[-1]`` is another tensor: through it no displacement goes back.)
        backend: "auto", "reference" or "cpu": what runs the recurrence. P comes from the same one.

    Returns:
        h: [T, B, N] or [T, B, H, N], all states h_1 … h_T; with ``return_last`` also h_T, [B, N] or
            [B, H, N].

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, T = 0, a rule whose mode is not "linearized", or
            ``feedback`` with a rule that has no P.
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
    _validate.recurrence(CELL, u, weight, bias, {"h0": h0}, reset, feedback, rule, checkpoint_every, backend)
    h, (last,), relay = recurrent_layer(
        CELL.name,
        u,
        weight,
        h0,
        bias_hh=bias,
        feedback=feedback,
        reset=reset,
        rule=rule,
        checkpoint_every=checkpoint_every,
        relay=relay_of(h0, "gru", rule.carries),
        backend=backend,
    )
    return (h, hand_on(last, relay)) if return_last else h
