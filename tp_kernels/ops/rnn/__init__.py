"""The recurrent layer (Elman): ``h_t = a(u_t + W h_{t-1})``. ``cell.py`` has its arithmetic."""

from torch import Tensor

from tp_kernels import _validate
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.ops.recurrence.state import hand_on, relay_of
from tp_kernels.ops.rnn.cell import ACTIVATIONS
from tp_kernels.rules import Rule, resolve

__all__ = ["rnn"]


def rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    feedback: Tensor | None = None,
    nonlinearity: str = "tanh",
    rule: Rule | None = None,
    checkpoint_every: int | None = None,
    displacements: str = "auto",
    return_last: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """States of an Elman recurrent layer over a whole sequence, with the rule's gradients.

    ``h_t = a(u_t + h_{t-1} Wᵀ)`` for t = 1 … T. What backward returns is the rule's: ``TargetProp`` sends targets
    back through regularized inverses, ``BackProp`` gradients through transposes. With heads, H independent layers
    run in one call.

    Args:
        u: [T, B, N] or, with heads, [T, B, H, N], floating point, any strides: the input's share of the
            pre-activation, ``x_t Uᵀ + b``. The "cpu" back-end takes float32 and float64.
        weight: [N, N] or [H, N, N], W, in the dtype and on the device of ``u``.
        h0: [B, N] or [B, H, N], the first state. ``None`` is zero.
        reset: [T, B], bool: true where a sequence starts anew, from zero, before that step. Nothing crosses it, neither
            forwards nor backwards. ``None`` is nowhere.
        feedback: like ``weight``, a fixed matrix in place of the rule's inverse P, as a control of what P itself
            contributes; no gradient reaches it. ``None`` is P.
        nonlinearity: "tanh", "relu" or "identity".
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``.
        checkpoint_every: k >= 1: keep u and every k-th state for backward, and compute the other states again, to the
            same bits. ``None`` keeps all states. Saves memory where u is at hand anyway and h is not kept.
        displacements: of ``inverse="weight"``: "sweep", step by step with the rest of backward; "parallel", all at once
            by about log₂T large products; or "auto", which measures faster. "parallel" excludes checkpoints.
        return_last: whether to return the last state too, to hand on to the next call as it is: then the gradients of
            the calls are those of one. (``h[-1]`` is another tensor: through it no displacement goes back.)
        backend: "auto", "reference", "cpu", "triton" or "cuda": what runs the recurrence. P comes from the same one
            where that has a ``regularized_inverse``, else from its "auto".

    Returns:
        h: all states h_1 … h_T, of the shape, dtype and device of ``u``; with ``return_last`` also h_T, [B, N] or
            [B, H, N].

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, T = 0, or ``feedback`` with a rule that has no P.
        BackendUnavailableError: a back-end asked for by name that cannot run this call, or, where gradients are
            needed, the rule's backward pass.
        torch.linalg.LinAlgError: in backward, a Gram matrix of ``weight`` is not numerically positive definite (on
            the CPU; elsewhere nothing waits for that, and gradients are NaN), or a solve of ``inverse="jacobian"``
            does not come down to the rule's rtol.

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
    _validate.word("rnn", "nonlinearity", nonlinearity, tuple(ACTIVATIONS))
    cell = CELLS[f"rnn_{nonlinearity}"]
    _validate.recurrence(cell, u, weight, None, {"h0": h0}, reset, feedback, rule, checkpoint_every, backend)
    _validate.displacements("rnn", displacements, rule, checkpoint_every)
    h, (last,), relay = recurrent_layer(
        cell.name,
        u,
        weight,
        h0,
        feedback=feedback,
        reset=reset,
        rule=rule,
        checkpoint_every=checkpoint_every,
        displacements=displacements,
        relay=relay_of(h0, "rnn", rule.carries),
        backend=backend,
    )
    return (h, hand_on(last, relay)) if return_last else h
