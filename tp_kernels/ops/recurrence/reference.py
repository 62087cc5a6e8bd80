"""The recurrence in plain PyTorch, one step at a time: the specification every other back-end is checked against.

Shapes with heads, ``[T, B, H, N]`` and ``[H, N, N]``, work as without: a product with a weight is over the last axis.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tp_kernels._backends import dtype_name
from tp_kernels.ops.recurrence.cell import Cell, Step, apply
from tp_kernels.ops.recurrence.launch import backward_outputs, forward_outputs
from tp_kernels.rules import Sweep


def forward(
    cell: Cell,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    *,
    keep: bool,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The states, from ``h_t, kept_t = cell.forward(u_t, W h_{t-1}, bias, h_{t-1})``.

    Args:
        cell: which.
        u: [T, B, G N] or [T, B, H, G N], any floating dtype, any strides.
        weight: [G N, N] or [H, G N, N].
        bias: [N] or [H, N], the cell's own; ``None`` is zero.
        start: [B, N] or [B, H, N], the state before the first; ``None`` is zero.
        keep: whether backward will need what the cell keeps.
        out: both results, contiguous, to write to; ``None`` takes new memory.

    Returns:
        h: [T, B, N] or [T, B, H, N], and what is kept: [T, B, K, N] or [T, B, H, K, N], or ``None``. Both contiguous.
    """
    h, kept = forward_outputs(cell, u, weight, keep) if out is None else out
    state = torch.zeros_like(h[0]) if start is None else start
    for t in range(h.shape[0]):
        state, of_step = cell.forward(u[t], apply(weight, state), bias, state)
        h[t] = state
        if kept is not None:
            kept[t] = torch.stack(of_step, dim=-2)
    return h, kept


def backward(
    cell: Cell,
    sweep: Sweep,
    *,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    u: Tensor | None,
    start: Tensor | None,
    first: int = 0,
    iterations: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Displacements λ, adjoints μ and gradients δ in ``u``, from the last step to the first.

    ``λ_{t-1} = step g_{t-1} + term(λ_t)``; the term is 0 ("none"), λ_t ("identity"), ``(JᵀJ + rI)⁻¹ Jᵀ λ_t`` with
    ``J = ∂h_t/∂h_{t-1}`` ("jacobian"), or of the form that ``Cell.term`` has: each op's README says which.
    ``μ_t = λ_t`` (``update="local"``) or ``μ_t = λ_t + Jᵀ_{t+1} μ_{t+1}`` ("total"). Back-propagation is "none" with
    "total".

    Args:
        cell, sweep: which, and the rule.
        grad_h: like ``h``, ∂loss/∂h; ``None`` is zero.
        grad_last: [B, N] or [B, H, N], added to the gradient of the last state; ``None`` is zero.
        h, kept: of ``forward``.
        weight: [G N, N] or [H, G N, N], W.
        feedback: P of each block that the rule inverts: [(H,) N, N], or [(H,) K, N, N] for several; needed where
            ``sweep.uses_inverse``.
        carried, through: like ``h[0]``: term(λ) and ``Jᵀ μ`` of the step after the last one; ``None`` is zero.
        u, start: what the states were computed from; u is needed by "direct" (start: ``None`` is zero).
        first: the number of the first step, for an error to name.
        iterations: [T, B] or [T, B, H], int32: filled with how many iterations each solve of "jacobian" took; here,
            where it is direct, none. ``None`` counts nothing.

    Returns:
        ``grad_u``, like ``u``: δ; ``carried``, like ``h[0]``: term(λ_1), ``None`` for "none"; and ``through``, like
        ``h[0]``: ``Jᵀ_1 μ_1``, ``None`` for "local". All contiguous. The gradient of the first state is ``through`` for
        "total" and ``carried`` for "local".

    Raises:
        torch.linalg.LinAlgError: after the sweep, a solve of "jacobian" has a relative residual above rtol.
    """
    grad_u, carried_out, through_out = backward_outputs(cell, h, sweep)
    back = None
    for back in steps_back(
        cell,
        sweep,
        grad_h=grad_h,
        grad_last=grad_last,
        h=h,
        kept=kept,
        weight=weight,
        feedback=feedback,
        carried=carried,
        through=through,
        u=u,
        start=start,
        first=first,
    ):
        grad_u[back.t] = back.delta
    if iterations is not None:
        iterations.zero_()
    if sweep.inverse != "none":
        carried_out.copy_(back.carried)
    if sweep.update == "total":
        through_out.copy_(back.through)
    return grad_u, carried_out, through_out


class StepBack(NamedTuple):
    """One step of the sweep back: t, counted from 0, λ_t, μ_t, δ_t, term(λ_t) and ``Jᵀ_t μ_t``."""

    t: int
    displacement: Tensor
    adjoint: Tensor
    delta: Tensor
    carried: Tensor
    through: Tensor


def steps_back(
    cell: Cell,
    sweep: Sweep,
    *,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    u: Tensor | None,
    start: Tensor | None,
    first: int = 0,
) -> Iterator[StepBack]:
    """The recursion of ``backward``, with its arguments, from the last step to the first."""
    zero = torch.zeros_like(h[0])
    carried = zero if carried is None or sweep.inverse == "none" else carried
    through = zero if through is None or sweep.update == "local" else through
    several = feedback is not None and feedback.dim() > weight.dim()
    inverses = [] if feedback is None else feedback.unbind(-3) if several else [feedback]
    residuals = []
    for t in range(h.shape[0] - 1, -1, -1):
        step = Step(
            h=h[t],
            kept=kept[t].unbind(-2) if cell.kept else (),
            before=h[t - 1] if t else zero if start is None else start,
            u=None if u is None else u[t],
        )
        displacement = carried
        if grad_h is not None:
            displacement = displacement + sweep.step * grad_h[t]
        if grad_last is not None and t == h.shape[0] - 1:
            displacement = displacement + sweep.step * grad_last
        adjoint = displacement + through
        delta, into, past = cell.back(adjoint, step)
        if sweep.inverse == "identity":
            carried = displacement
        elif sweep.inverse == "jacobian":
            carried, residual = _jacobian_term(cell, displacement, step, weight, sweep.reg)
            residuals.append(residual)
        elif sweep.inverse != "none":
            sent, scale, by = cell.term(sweep.inverse, displacement, step, sweep.clip)
            carried = sum(apply(inverse, part) for inverse, part in zip(inverses, sent, strict=True))
            carried = carried if scale is None else scale * carried
            carried = carried if by is None else by + carried
        if sweep.update == "total":
            through = apply(weight.mT, into)
            through = through if past is None else past + through
        yield StepBack(t, displacement, adjoint, delta, carried, through)
    if residuals:
        check_residuals(cell, torch.stack(residuals[::-1]), sweep, h.dtype, first)


def _jacobian_term(cell: Cell, displacement: Tensor, step: Step, weight: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """``Jᵀ y`` with ``(J Jᵀ + rI) y = λ``, and the relative residual of every solve; NaN and no residual for a sample
    that is not finite. Half precision is factored in single.
    """
    dtype = torch.promote_types(displacement.dtype, torch.float32)
    diagonal, slopes = cell.linear(step)
    blocks = weight.to(dtype).unflatten(-2, (len(slopes), weight.shape[-1])).unbind(-3)
    jacobian = None if diagonal is None else torch.diag_embed(diagonal.to(dtype))
    for slope, block in zip(slopes, blocks, strict=True):
        part = slope.to(dtype)[..., None] * block
        jacobian = part if jacobian is None else jacobian + part
    right = displacement.to(dtype)[..., None]
    finite = (jacobian.isfinite() & right.isfinite()).all(dim=(-2, -1))[..., None, None]
    jacobian, right = torch.where(finite, jacobian, 0), torch.where(finite, right, 0)
    gram = jacobian @ jacobian.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(reg)
    factor, info = torch.linalg.cholesky_ex(gram)
    size = right.abs().amax(dim=-2, keepdim=True)  # in its unit no square over- or underflows
    size = torch.where(size == 0, 1, size)
    right = right / size
    solution = torch.cholesky_solve(right, factor)
    missed = right - jacobian @ (jacobian.mT @ solution) - reg * solution
    norms = (torch.linalg.vector_norm(vector, dim=(-2, -1)) for vector in (missed, right))
    residual = torch.where((right == 0).all(dim=(-2, -1)), 0, torch.div(*norms).nan_to_num(nan=torch.inf))
    term = torch.where(finite, size * (jacobian.mT @ solution), torch.nan)[..., 0]
    return term.to(displacement.dtype), torch.where(info == 0, residual, torch.inf)


def check_residuals(cell: Cell, residuals: Tensor, sweep: Sweep, dtype: torch.dtype, first: int) -> None:
    """Raises where the solve of "jacobian" missed its residual. On a GPU, reading them waits for it.

    ``residuals``: [T, B] or [T, B, H].
    """
    if residuals.numel() and residuals.max() > sweep.rtol:
        t, b, *head = torch.unravel_index(residuals.argmax(), residuals.shape)
        where = (int(t) + first, int(b), int(head[0]) if head else None)
        raise unsolved(cell, where, float(residuals.max()), sweep, dtype)


def unsolved(
    cell: Cell, where: tuple[int, int, int | None], residual: float, sweep: Sweep, dtype: torch.dtype
) -> torch.linalg.LinAlgError:
    """What to raise where the solve of "jacobian" missed its residual: at which step, sample and head, from 0."""
    t, b, head = where
    sample = f"sample {b}" if head is None else f"sample {b}, head {head}"
    return torch.linalg.LinAlgError(
        f"{cell.op}: inverse='jacobian' could not be solved in {dtype_name(dtype)} at reg={sweep.reg:g}: "
        f"worst at time step {t}, {sample}, with a relative residual of {residual:.3g}, above rtol={sweep.rtol:g}; "
        "use a larger reg, a larger rtol or float64"
    )
