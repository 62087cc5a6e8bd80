"""The recurrence on the "cpu" back-end: how its native module is called."""

import functools
from typing import Any

import torch
from torch import Tensor

from tp_kernels import _native
from tp_kernels._backends import Support
from tp_kernels.ops.recurrence import chunks
from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.ops.recurrence.launch import (
    backward_outputs,
    check_given,
    contiguous,
    forward_outputs,
    sizes,
    state_shape,
    strides,
    unit_stride,
)
from tp_kernels.ops.recurrence.reference import unsolved
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep


def supports(
    tensor: Tensor,
    *,
    cell: Cell | None = None,
    sweep: Sweep | None = None,
    time: Timeline | None = None,
    **options: object,
) -> Support:
    """``sweep``: of a backward pass; ``time``: how the sequences lie."""
    if cell is not None and sweep is not None and sweep.inverse == "jacobian" and cell.states > 1:
        return False, f"it does not solve inverse='jacobian' for a state of {cell.states} parts"
    if time is not None and time.batch_sizes is not None and sweep is not None and sweep.chunk:
        return False, "it does not cut sequences of several lengths into chunks"
    return _native.cpu_supports(tensor)


def fuses_projection(cell: Cell, x: Tensor, B: int, N: int) -> bool:
    """Whether ``forward`` should be given the input projection, to do it in the sweep.

    There the projection of few sequences would be products of a few rows; as one product it has T·B of them.
    """
    return cell.gates == 1 and (B >= 4 or 4 * x.shape[-1] <= N)


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
    projection: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``reference.forward``; with a projection, of ``x Uᵀ + b`` in place of u, which then is nowhere in memory."""
    _native.check_same_kind(cell.op, u, weight, bias, start, projection, input_bias)
    u, weight, bias, start = unit_stride(u), weight.contiguous(), contiguous(bias), contiguous(start)
    projection, input_bias = contiguous(projection), contiguous(input_bias)
    h, kept = forward_outputs(cell, u, weight, keep) if out is None else out
    time = time or Timeline(h.shape[0])
    last = h.new_empty(state_shape(cell, h, start))
    offsets, reset = time.offsets(), contiguous(time.reset)
    _native.cpu.recurrence_fwd(
        double=_native.is_double(u),
        cell=cell.name,
        input=_native.pointer(u),
        input_strides=strides(u, time),
        projection=_native.pointer(projection),
        projected=0 if projection is None else projection.shape[1],
        input_bias=_native.pointer(input_bias),
        weight=_native.pointer(weight),
        bias=_native.pointer(bias),
        start=_native.pointer(start),
        h=_native.pointer(h),
        kept=_native.pointer(kept),
        last=_native.pointer(last),
        offsets=_native.pointer(offsets),
        reset=_native.pointer(reset),
        **_geometry(h, time, last.shape[0]),
        threads=torch.get_num_threads(),
    )
    return h, kept, last


def _geometry(h: Tensor, time: Timeline, B: int) -> dict[str, Any]:
    """Sizes and strides of arrays that lie in time as they are."""
    T, B, H, N = sizes(h, time, B)
    return {
        "sizes": (T, B, H, N),
        "row_strides": (B * H, H, 1),
        "reset_strides": (B, 1, 0),
        "reverse": time.reverse,
    }


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
    """``reference.backward``."""
    _native.check_same_kind(cell.op, h, grad_h, grad_last, kept, weight, feedback, carried, through, u, start)
    check_given(cell, sweep, feedback, u)
    grad_h, u = unit_stride(grad_h), unit_stride(u)
    h, kept, weight = h.contiguous(), contiguous(kept), weight.contiguous()
    grad_last, feedback, start = contiguous(grad_last), contiguous(feedback), contiguous(start)
    carried, through = contiguous(carried), contiguous(through)
    time = time or Timeline(h.shape[0])
    state = state_shape(cell, h, start)
    grad_u, carried_out, through_out = backward_outputs(cell, h, state, sweep)
    offsets, reset = time.offsets(), contiguous(time.reset)
    kept = kept if cell.kept else None
    run = functools.partial(
        _native.cpu.recurrence_bwd,
        double=_native.is_double(h),
        cell=cell.name,
        grad_last=_native.pointer(grad_last),
        weight=_native.pointer(weight),
        feedback=_native.pointer(feedback),
        u=_native.pointer(u),
        u_strides=strides(u, time),
        start=_native.pointer(start),
        iterations=_native.pointer(iterations),
        step=sweep.step,
        clip=sweep.clip,
        reg=sweep.reg,
        rtol=sweep.rtol,
        blend=sweep.blend,
        latch=sweep.latch,
        first=first,
        threads=torch.get_num_threads(),
    )
    cut = sweep.cut(time.T)
    if cut is not None:
        if grad_h is not None and grad_h.dim() == 4:
            grad_h = grad_h.contiguous()
        cut_up = chunks.Chunks(run, *cut, h, grad_h, kept, time._replace(reset=reset))
        sent = {"carried": carried, "through": through, "carried_out": carried_out, "through_out": through_out}
        chunks.backward(cut_up, sweep, feedback=feedback, grad_u=grad_u, **sent)
        return grad_u, carried_out, through_out
    missed = run(
        grad_h=_native.pointer(grad_h),
        grad_h_strides=strides(grad_h, time),
        h=_native.pointer(h),
        kept=_native.pointer(kept),
        carried_in=_native.pointer(carried),
        through_in=_native.pointer(through),
        carried_out=_native.pointer(carried_out),
        through_out=_native.pointer(through_out),
        grad_u=_native.pointer(grad_u),
        inverse=sweep.inverse,
        update=sweep.update,
        later=time.later,
        heads=sizes(h, time, state[0])[2],
        chunk=0,
        length=0,
        offsets=_native.pointer(offsets),
        reset=_native.pointer(reset),
        **_geometry(h, time, state[0]),
    )
    if missed is not None:
        t, b, head, residual = missed
        raise unsolved(cell, (t, b, head if len(state) == 3 else None), residual, sweep, h.dtype)
    return grad_u, carried_out, through_out
