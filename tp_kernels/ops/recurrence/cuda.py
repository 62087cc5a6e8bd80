"""The recurrence on the "cuda" back-end: which way a shape takes, and how its native module is called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_kernels import _native
from tp_kernels._backends import Support, dtype_name, tf32_allowed
from tp_kernels.ops.recurrence import library_chain
from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.ops.recurrence.launch import (
    backward_outputs,
    check_given,
    contiguous,
    forward_outputs,
    missed_residuals,
    sizes,
    strides,
    unit_stride,
)
from tp_kernels.ops.recurrence.reference import check_residuals
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep

INVERSES = ("none", "identity", "weight", "layer", "jacobian")

LARGEST_ON_ONE = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
"""Units whose weight one multiprocessor keeps in its registers."""

ONE, CLUSTER = "one multiprocessor", "cluster of multiprocessors"


class Path(NamedTuple):
    name: str
    reason: str


def cuda_path(N: int, dtype: torch.dtype, of_cluster: int) -> Path | None:
    """The first path that takes N units of this dtype; ``None`` where none does.

    Args:
        of_cluster: units, in float32, that a cluster of the device holds; 0 where it has none.
    """
    if dtype not in LARGEST_ON_ONE:
        return None
    largest = LARGEST_ON_ONE[dtype]
    if largest >= N:
        return Path(ONE, f"it keeps the weight of up to {largest} units in its registers")
    if dtype != torch.float32:
        return None
    if of_cluster >= N:
        return Path(CLUSTER, f"one keeps the weight of up to {largest} units, a cluster of up to {of_cluster}")
    clusters = f"a cluster of up to {of_cluster}" if of_cluster else "of clusters the device has none"
    return Path(
        library_chain.NAME,
        f"one multiprocessor keeps the weight of up to {largest} units, {clusters}; beyond that every step is a "
        "product of cuBLAS and a kernel for the rest, recorded in a CUDA graph",
    )


def _path(tensor: Tensor, size: int) -> Path | None:
    place = _native.device_and_stream(tensor)
    return cuda_path(size, tensor.dtype, _native.cuda.recurrence_cluster_largest(place["device"]))


def supports(
    tensor: Tensor, *, size: int, sweep: Sweep | None = None, time: Timeline | None = None, **options: object
) -> Support:
    """``size``: N; ``sweep``: of a backward pass; ``time``: how the sequences lie."""
    ok, reason = _native.cuda_supports(tensor, tuple(LARGEST_ON_ONE))
    if not ok:
        return ok, reason
    if time is not None and not time.plain:
        return False, "it takes sequences of one length, read forwards and without a reset"
    if sweep is not None and not sweep.is_pure:
        return False, "it has no kernel for a rule with blend, latch or chunk"
    dtype, largest = dtype_name(tensor.dtype), LARGEST_ON_ONE[tensor.dtype]
    if _path(tensor, size) is None:
        return False, f"it keeps the weight of up to {largest} units in {dtype}, and there are {size}"
    if sweep is not None and sweep.inverse not in INVERSES:
        return False, f"this version has no CUDA kernel for the inverse {sweep.inverse!r}"
    if sweep is not None and sweep.inverse == "jacobian":
        if tensor.dtype != torch.float32:
            return False, f"it solves inverse='jacobian' in float32, and the tensors are {dtype}"
        if size > largest:
            return False, f"it solves inverse='jacobian' for up to {largest} units, and there are {size}"
    return True, ""


def _precision(tensor: Tensor) -> dict[str, Any]:
    """What is multiplied. float32 loses digits only where torch has been told that this is good enough."""
    return {"dtype": dtype_name(tensor.dtype), "tf32": tf32_allowed()}


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
    """``reference.forward``."""
    _native.check_same_kind(cell.op, u, weight, start)
    u, weight, start = unit_stride(u), weight.contiguous(), contiguous(start)
    h, kept = forward_outputs(cell, u, weight, keep) if out is None else out
    if _path(h, h.shape[-1]).name == library_chain.NAME:
        library_chain.call(library_chain.forward, (h,), cell.name, (u, weight, start))
        return h, kept, h[-1].clone()
    _native.cuda.recurrence_fwd(
        cell=cell.name,
        input=_native.pointer(u),
        input_strides=strides(u),
        weight=_native.pointer(weight),
        start=_native.pointer(start),
        h=_native.pointer(h),
        sizes=sizes(h),
        **_precision(h),
        **_native.device_and_stream(h),
    )
    return h, kept, h[-1].clone()


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
    """``reference.backward``. None of its inverses takes u or the first state."""
    _native.check_same_kind(cell.op, h, grad_h, grad_last, weight, feedback, carried, through)
    check_given(cell, sweep, feedback, u)
    grad_h, h, weight, feedback = unit_stride(grad_h), h.contiguous(), weight.contiguous(), contiguous(feedback)
    grad_last, carried, through = contiguous(grad_last), contiguous(carried), contiguous(through)
    grad_u, carried_out, through_out = backward_outputs(cell, h, h.shape[1:], sweep)
    if _path(h, h.shape[-1]).name == library_chain.NAME:
        tensors = grad_h, grad_last, h, weight, feedback, carried, through
        library_chain.call(library_chain.backward, (grad_u, carried_out, through_out), (cell.name, sweep), tensors)
        return grad_u, carried_out, through_out
    missed = missed_residuals(h) if sweep.inverse == "jacobian" else None
    place = _native.device_and_stream(h)
    case = {"sizes": sizes(h), "inverse": sweep.inverse, "update": sweep.update, **_precision(h)}
    needed = _native.cuda.recurrence_needs_displacements(**case, device=place["device"])
    displacements = torch.empty_like(h, dtype=torch.float32) if needed else None
    _native.cuda.recurrence_bwd(
        cell=cell.name,
        grad_h=_native.pointer(grad_h),
        grad_h_strides=strides(grad_h),
        grad_last=_native.pointer(grad_last),
        h=_native.pointer(h),
        weight=_native.pointer(weight),
        feedback=_native.pointer(feedback),
        carried_in=_native.pointer(carried),
        through_in=_native.pointer(through),
        carried_out=_native.pointer(carried_out),
        through_out=_native.pointer(through_out),
        grad_u=_native.pointer(grad_u),
        displacements=_native.pointer(displacements),
        iterations=_native.pointer(iterations),
        missed=_native.pointer(missed),
        step=sweep.step,
        clip=sweep.clip,
        reg=sweep.reg,
        rtol=sweep.rtol,
        **case,
        **place,
    )
    if missed is not None:
        check_residuals(cell, missed, sweep, h.dtype, first)
    return grad_u, carried_out, through_out
