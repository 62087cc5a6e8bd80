"""What every launcher of the recurrence shares: how tensors lie in memory, and what the passes fill."""

import torch
from torch import Tensor

from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The native kernels take any strides but for the last axis."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strides(tensor: Tensor | None, time: Timeline | None = None) -> tuple[int, int, int]:
    """Strides over time, batch and heads."""
    if tensor is None:
        return 0, 0, 0
    if time is not None and time.batch_sizes is not None:
        return 0, tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0
    return tensor.stride(0), tensor.stride(1), tensor.stride(2) if tensor.dim() == 4 else 0


def sizes(h: Tensor, time: Timeline | None = None, B: int = 0) -> tuple[int, int, int, int]:
    """T, B, H and N. Packed, B is to be told."""
    if time is not None and time.batch_sizes is not None:
        return time.T, B, h.shape[1] if h.dim() == 3 else 1, h.shape[-1]
    return h.shape[0], h.shape[1], h.shape[2] if h.dim() == 4 else 1, h.shape[-1]


def check_given(cell: Cell, sweep: Sweep, feedback: Tensor | None, u: Tensor | None) -> None:
    """What the sweep cannot do without is there."""
    for argument, tensor, needed in (("feedback", feedback, sweep.uses_inverse), ("u", u, sweep.inverse == "direct")):
        if needed and tensor is None:
            raise TypeError(f"{cell.op}: {argument} must be a torch.Tensor with inverse={sweep.inverse!r}, got None")


def forward_outputs(cell: Cell, u: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for the states and for what the cell keeps. ``u`` may be the input that is projected to it."""
    shape = (*u.shape[:-1], weight.shape[-1])
    kept = u.new_empty((*shape[:-1], len(cell.kept), shape[-1])) if keep and cell.kept else None
    return u.new_empty(shape), kept


def state_shape(cell: Cell, h: Tensor, start: Tensor | None) -> tuple[int, ...]:
    """Of the state of all sequences, outside of time, for h and the first one."""
    return (*h.shape[1:-1], cell.states * h.shape[-1]) if start is None else tuple(start.shape)


def state_before(
    cell: Cell, h: Tensor, kept: Tensor | None, start: Tensor | None, time: Timeline, steps: slice
) -> Tensor | None:
    """The state of all sequences that these steps began from: of h and what was kept, or the first one, ``start``."""
    step = steps.stop if time.reverse else steps.start - 1
    if not 0 <= step < time.T:
        return start
    before = slice(step, step + 1)
    state = cell.state(time.cut(h, before), time.cut(kept, before))
    if time.batch_sizes is None:
        return state[0]
    return state if len(state) == len(start) else torch.cat((state, start[len(state) :]))


def backward_outputs(
    cell: Cell, h: Tensor, state: tuple[int, ...], sweep: Sweep
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Memory for δ, and for what is sent on to an earlier call, term(λ_1) and ``Jᵀ_1 μ_1``: ``None`` where the rule
    sends nothing. ``state``: the shape of the first one.
    """
    return (
        h.new_empty((*h.shape[:-1], cell.gates * h.shape[-1])),
        None if sweep.inverse == "none" else h.new_empty((*state[:-1], sweep.kinds * state[-1])),
        None if sweep.update == "local" else h.new_empty(state),
    )


def missed_residuals(h: Tensor) -> Tensor:
    """Memory for the residuals of the solves of "jacobian", [T, B] or [T, B, H]."""
    return h.new_empty(h.shape[:-1], dtype=torch.float32)
