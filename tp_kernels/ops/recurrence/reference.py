"""The recurrence in plain PyTorch, one step at a time: the specification every other back-end is checked against.

Shapes with heads, ``[T, B, H, N]`` and ``[H, N, N]``, work as without: a product with a weight is over the last axis.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tp_kernels._backends import dtype_name
from tp_kernels.ops.recurrence.cell import Cell, Step, apply
from tp_kernels.ops.recurrence.launch import backward_outputs, forward_outputs, state_before, state_shape
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep


def forward(
    cell: Cell,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    *,
    keep: bool,
    time: Timeline | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The states, from ``state_t, kept_t = cell.forward(u_t, W h_{t-1}, bias, state_{t-1})``.

    Args:
        cell: which.
        u: [T, B, G N] or [T, B, H, G N], any floating dtype, any strides. Here and below, arrays over time may be
            packed.
        weight: [G N, N] or [H, G N, N].
        bias: [N] or [H, N], the cell's own; ``None`` is zero.
        start: [B, S N] or [B, H, S N], the state before the first; ``None`` is zero. Packed, it must be there.
        keep: whether backward will need what the cell keeps.
        time: how the sequences lie in it; ``None``: plainly.
        out: the first two results, contiguous, to write to; ``None`` takes new memory.

    Returns:
        h: [T, B, N] or [T, B, H, N]; what is kept: [T, B, K, N] or [T, B, H, K, N], or ``None``; and the last state of
            each sequence, like ``start``. All contiguous.
    """
    h, kept = forward_outputs(cell, u, weight, keep) if out is None else out
    time = time or Timeline(h.shape[0])
    N = weight.shape[-1]
    state = first_state(cell, h, start)
    us, hs, all_kept, resets = (time.split(array) for array in (u, h, kept, time.reset))
    for t in time.order():
        before = _anew(state[: len(hs[t])], resets[t])
        new, of_step = cell.forward(us[t], apply(weight, before[..., :N]), bias, before)
        hs[t].copy_(new[..., :N])
        if kept is not None:
            all_kept[t].copy_(torch.stack(of_step, dim=-2))
        state = torch.cat((new, state[len(new) :])) if len(new) < len(state) else new
    return h, kept, state.clone()


def first_state(cell: Cell, h: Tensor, start: Tensor | None) -> Tensor:
    """That, or zero."""
    return h.new_zeros(state_shape(cell, h, start)) if start is None else start


def _anew(states: Tensor, reset: Tensor | None) -> Tensor:
    """Zero for the sequences that start anew, [B]."""
    return states if reset is None else states.masked_fill(reset[(...,) + (None,) * (states.dim() - 1)], 0)


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
    time: Timeline | None = None,
    first: int = 0,
    iterations: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Displacements λ, adjoints μ and gradients δ in ``u``, from the last step read to the first.

    ``λ_{t-1} = step g_{t-1} + term(λ_t)``; the term is 0 ("none"), λ_t ("identity"), ``(JᵀJ + rI)⁻¹ Jᵀ λ_t`` with
    ``J = ∂state_t/∂state_{t-1}`` ("jacobian"), or of the form that ``Cell.term`` has: each op's README says which.
    ``μ_t = λ_t`` (``update="local"``) or ``μ_t = s_t + Jᵀ_{t+1} μ_{t+1}`` ("total") with the source
    ``s_t = g_t + blend (λ_t - g_t) + latch (λ'_t - g_t)``, where λ' is the displacement of "identity", and g_t has both
    gradients of a last state. Back-propagation is "none" with "total". Nothing goes back past a step before which a
    state starts anew.

    With chunks, δ of C steps comes of a sweep that begins K steps after them, with the adjoint zero, but for the sweep
    that begins at the end, and the displacement that the whole sequence has there.

    Args:
        cell, sweep: which, and the rule.
        grad_h: like ``h``, ∂loss/∂h; ``None`` is zero.
        grad_last: [B, S N] or [B, H, S N], added to the gradient of each sequence's last state; ``None`` is zero.
        h, kept: of ``forward``.
        weight: [G N, N] or [H, G N, N], W.
        feedback: P of each block that the rule inverts: [(H,) N, N], or [(H,) K, N, N] for several; needed where
            ``sweep.uses_inverse``.
        carried, through: like ``start``: term(λ) and ``Jᵀ μ`` of the step after the last one read; ``None`` is zero.
            With a latch λ' follows term(λ), [B, 2 S N].
        u, start: what the states were computed from; u is needed by "direct" (start: ``None`` is zero).
        time: as of ``forward``.
        first: the number of the first step, for an error to name.
        iterations: [T, B] or [T, B, H], int32: filled with how many iterations each solve of "jacobian" took; here,
            where it is direct, none. ``None`` counts nothing.

    Returns:
        ``grad_u``, like ``u``: δ; and ``carried``, term(λ_1), ``None`` for "none", and ``through``, ``Jᵀ_1 μ_1``,
        ``None`` for "local", both as they are given. All contiguous. The gradient of the first state is ``through`` for
        "total" and ``carried`` for "local".

    Raises:
        torch.linalg.LinAlgError: after the sweep, a solve of "jacobian" has a relative residual above rtol.
    """
    time = time or Timeline(h.shape[0])
    start = first_state(cell, h, start)
    grad_u, carried_out, through_out = backward_outputs(cell, h, start.shape, sweep)
    of_all = {"cell": cell, "weight": weight, "feedback": feedback}
    arrays = {"grad_h": grad_h, "h": h, "kept": kept if cell.kept else None, "u": u}
    deltas, back = time.split(grad_u), None
    cut = sweep.cut(time.T)
    if cut is None:
        sent = {"carried": carried, "through": through, "grad_last": grad_last}
        for back in steps_back(sweep=sweep, **of_all, **arrays, **sent, start=start, time=time, first=first):
            deltas[back.t].copy_(back.delta)
    else:
        chunk, overlap = cut
        displacements = sweep._replace(update="local")
        sent = {"carried": carried, "through": None, "grad_last": grad_last}
        whole = steps_back(sweep=displacements, **of_all, **arrays, **sent, start=start, time=time)
        carried_from = [carried, *(back.carried for back in whole)][::-1]  # by each step, to the one read before it
        for begin in reversed(range(0, time.T, chunk)):
            end = min(time.T, begin + chunk + overlap)
            steps = slice(time.T - end, time.T - begin) if time.reverse else slice(begin, end)
            part, before = time.part(steps), state_before(cell, h, arrays["kept"], start, time, steps)
            own = {name: time.cut(array, steps) for name, array in arrays.items()}
            # What is sent by nobody, or by another call, is for the sequences that end here.
            going_on = part.later if time.batch_sizes is not None else len(start) if end < time.T else 0
            ended = {"through": through, "grad_last": grad_last}
            for name, tensor in ended.items():
                if tensor is not None:
                    ended[name] = torch.cat((torch.zeros_like(tensor[:going_on]), tensor[going_on:]))
            sent = {"carried": carried_from[end], **ended}
            for back in steps_back(sweep=sweep, **of_all, **own, **sent, start=before, time=part):
                t = steps.start + back.t
                if begin <= (time.T - 1 - t if time.reverse else t) < begin + chunk:
                    deltas[t].copy_(back.delta)
    if iterations is not None:
        iterations.zero_()
    if sweep.inverse != "none":
        carried_out.copy_(back.carried)
    if sweep.update == "total":
        through_out.copy_(back.through)
    return grad_u, carried_out, through_out


class StepBack(NamedTuple):
    """One step of the sweep back: t, counted from 0; of the sequences there are at t, λ_t, μ_t and δ_t; of all, what is
    under way to the step before: term(λ_t) and ``Jᵀ_t μ_t``.
    """

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
    time: Timeline | None = None,
    first: int = 0,
) -> Iterator[StepBack]:
    """The recursion of ``backward``, with its arguments, from the last step read to the first."""
    time = time or Timeline(h.shape[0])
    N = h.shape[-1]
    start = first_state(cell, h, start)
    nothing = torch.zeros_like(start)
    carried = torch.cat([nothing] * sweep.kinds, -1) if carried is None or sweep.inverse == "none" else carried
    carried, *latched = carried.chunk(sweep.kinds, dim=-1)
    through = nothing if through is None or sweep.update == "local" else through
    several = feedback is not None and feedback.dim() > weight.dim()
    inverses = [] if feedback is None else feedback.unbind(-3) if several else [feedback]
    kept = kept if cell.kept else None
    hs, gradients, all_kept, us, resets = (time.split(array) for array in (h, grad_h, kept, u, time.reset))
    order, residuals, later = time.order(), [], time.later
    for index in range(time.T - 1, -1, -1):
        t = order[index]
        n = len(hs[t])  # sequences; of those from `later` on it is the last step
        before = start[:n]
        if index > 0:
            known = cell.state(hs[order[index - 1]], all_kept[order[index - 1]])[:n]
            before = torch.cat((known, start[len(known) : n])) if len(known) < n else known
        step = Step(
            state=cell.state(hs[t], all_kept[t]),
            kept=all_kept[t].unbind(-2) if cell.kept else (),
            before=_anew(before, resets[t]),
            u=us[t],
        )
        source = None  # g_t, but for its factor
        if grad_h is not None:
            source = gradients[t] if cell.states == 1 else functional.pad(gradients[t], (0, (cell.states - 1) * N))
        if grad_last is not None and later < n:
            source = torch.zeros_like(before) if source is None else source
            source = torch.cat((source[:later], source[later:] + grad_last[later:n]))
        displacement, latch = carried[:n], [part[:n] for part in latched]
        if source is not None:
            displacement, *latch = (part + sweep.step * source for part in (displacement, *latch))
        adjoint = displacement
        if sweep.blend != 1 or latch:
            source = torch.zeros_like(before) if source is None else source
            adjoint = source + sweep.blend * (displacement - source)
            adjoint = sum((sweep.latch * (part - source) for part in latch), adjoint)
        adjoint = adjoint + through[:n]
        delta, into, past = cell.back(adjoint, step)
        if sweep.inverse == "none":
            sent_on = torch.zeros_like(displacement)
        elif sweep.inverse == "identity":
            sent_on = displacement
        elif sweep.inverse == "jacobian":
            sent_on, residual = _jacobian_term(cell, displacement, step, weight, sweep.reg)
            residuals.append((t, residual))
        else:
            sent, scale, by = cell.term(sweep.inverse, displacement, step, sweep.clip)
            product = sum(apply(inverse, part) for inverse, part in zip(inverses, sent, strict=True))
            sent_on = cell.plus(product if scale is None else scale * product, by)
        carried, *latched = (
            torch.cat((_anew(sent, resets[t]), waiting[n:]))
            for sent, waiting in zip((sent_on, *latch), (carried, *latched), strict=True)
        )
        if sweep.update == "total":
            through = torch.cat((_anew(cell.plus(apply(weight.mT, into), past), resets[t]), through[n:]))
        later = n
        yield StepBack(t, displacement, adjoint, delta, torch.cat((carried, *latched), dim=-1), through)
    if residuals:
        all_residuals = residuals[0][1].new_zeros((time.T, *start.shape[:-1]))
        for t, residual in residuals:
            all_residuals[t, : len(residual)] = residual
        check_residuals(cell, all_residuals, sweep, h.dtype, first)


def _jacobian_term(cell: Cell, displacement: Tensor, step: Step, weight: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """``Jᵀ y`` with ``(J Jᵀ + rI) y = λ``, and the relative residual of every solve; NaN and no residual for a sample
    that is not finite. Half precision is factored in single.
    """
    dtype = torch.promote_types(displacement.dtype, torch.float32)
    jacobian = cell.jacobian(step, weight, dtype)
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
