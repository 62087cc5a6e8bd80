"""The recurrence on each back-end: launchers, the back-end table, and the ops ``rnn_fwd`` and ``rnn_bwd``."""

from typing import Any

import torch
from torch import Tensor

from tp_kernels import _native, _triton
from tp_kernels._backends import Backend, BackendTable, Support, dtype_name, tf32_allowed
from tp_kernels._library import register
from tp_kernels.ops.rnn import library_chain, reference, triton_blocks
from tp_kernels.ops.rnn.cuda_paths import CHAIN, LARGEST_ON_ONE, Path, cuda_path
from tp_kernels.ops.rnn.launch import backward_outputs, check_given, sizes, strides, unit_stride
from tp_kernels.rules import Sweep


def _cpu_forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, out: Tensor | None = None) -> Tensor:
    return _cpu_layer_forward(u, None, None, weight, h0, nonlinearity, out)


def _cpu_layer_forward(
    x: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    nonlinearity: str,
    out: Tensor | None = None,
) -> Tensor:
    """The states, of ``u = x`` or, with a projection, of ``u = x Uᵀ + b``, which then is nowhere in memory."""
    _native.check_same_kind("rnn", x, projection, bias, weight, h0)
    x, weight = unit_stride(x), weight.contiguous()
    projection, bias = (None if tensor is None else tensor.contiguous() for tensor in (projection, bias))
    shape = (*x.shape[:-1], weight.shape[-1])
    h0 = x.new_zeros(shape[1:]) if h0 is None else h0.contiguous()
    h = x.new_empty(shape) if out is None else out
    _native.cpu.rnn_fwd(
        double=_native.is_double(x),
        input=_native.pointer(x),
        input_strides=strides(x),
        projection=_native.pointer(projection),
        bias=_native.pointer(bias),
        projected=0 if projection is None else projection.shape[1],
        weight=_native.pointer(weight),
        h0=_native.pointer(h0),
        h=_native.pointer(h),
        sizes=sizes(h),
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
    u: Tensor | None,
    h0: Tensor | None,
    sweep: Sweep,
    iterations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _native.check_same_kind("rnn", h, grad_h, grad_last, weight, feedback, carried, through, u, h0)
    check_given(sweep, feedback, u)
    grad_h, u = unit_stride(grad_h), unit_stride(u)
    h, weight = h.contiguous(), weight.contiguous()
    grad_last, feedback, carried, through, h0 = (
        None if tensor is None else tensor.contiguous() for tensor in (grad_last, feedback, carried, through, h0)
    )
    grad_u, carried_out, through_out = backward_outputs(h, sweep)
    unsolved = _native.cpu.rnn_bwd(
        double=_native.is_double(h),
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
        u=_native.pointer(u),
        u_strides=strides(u),
        h0=_native.pointer(h0),
        grad_u=_native.pointer(grad_u),
        iterations=_native.pointer(iterations),
        sizes=sizes(h),
        **sweep._asdict(),
        threads=torch.get_num_threads(),
    )
    if unsolved is not None:
        t, b, head, residual = unsolved
        raise reference.unsolved(t, b, head if h.dim() == 4 else None, residual, sweep, h.dtype)
    return grad_u, carried_out, through_out


_CUDA_INVERSES = ("none", "identity", "weight", "layer", "jacobian")


def _cuda_path(tensor: Tensor, size: int) -> Path | None:
    place = _native.device_and_stream(tensor)
    return cuda_path(size, tensor.dtype, _native.cuda.rnn_cluster_largest(place["device"]))


def _cuda_supports(tensor: Tensor, *, size: int, sweep: Sweep | None = None, **options: object) -> Support:
    """``size``: N; ``sweep``: of a backward pass."""
    ok, reason = _native.cuda_supports(tensor, tuple(LARGEST_ON_ONE))
    if not ok:
        return ok, reason
    dtype, largest = dtype_name(tensor.dtype), LARGEST_ON_ONE[tensor.dtype]
    if _cuda_path(tensor, size) is None:
        return False, f"it keeps the weight of up to {largest} units in {dtype}, and there are {size}"
    if sweep is not None and sweep.inverse not in _CUDA_INVERSES:
        return False, f"this version has no CUDA kernel for the inverse {sweep.inverse!r}"
    if sweep is not None and sweep.inverse == "jacobian":
        if tensor.dtype != torch.float32:
            return False, f"it solves inverse='jacobian' in float32, and the tensors are {dtype}"
        if size > largest:
            return False, f"it solves inverse='jacobian' for up to {largest} units, and there are {size}"
    return True, ""


def _cuda_precision(tensor: Tensor) -> dict[str, Any]:
    """What is multiplied. float32 loses digits only where torch has been told that this is good enough."""
    return {"dtype": dtype_name(tensor.dtype), "tf32": tf32_allowed()}


def _cuda_forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, out: Tensor | None = None) -> Tensor:
    _native.check_same_kind("rnn", u, weight, h0)
    u, weight = unit_stride(u), weight.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    h = u.new_empty(u.shape) if out is None else out
    if _cuda_path(h, h.shape[-1]).name == CHAIN:
        library_chain.call(library_chain.forward, (h,), nonlinearity, (u, weight, h0))
        return h
    _native.cuda.rnn_fwd(
        input=_native.pointer(u),
        input_strides=strides(u),
        weight=_native.pointer(weight),
        h0=_native.pointer(h0),
        h=_native.pointer(h),
        sizes=sizes(h),
        nonlinearity=nonlinearity,
        **_cuda_precision(h),
        **_native.device_and_stream(h),
    )
    return h


def _cuda_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    u: Tensor | None,
    h0: Tensor | None,
    sweep: Sweep,
    iterations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """None of its inverses takes u or h_0."""
    _native.check_same_kind("rnn", h, grad_h, grad_last, weight, feedback, carried, through)
    check_given(sweep, feedback, u)
    grad_h = unit_stride(grad_h)
    h, weight = h.contiguous(), weight.contiguous()
    grad_last, feedback, carried, through = (
        None if tensor is None else tensor.contiguous() for tensor in (grad_last, feedback, carried, through)
    )
    grad_u, carried_out, through_out = backward_outputs(h, sweep)
    if _cuda_path(h, h.shape[-1]).name == CHAIN:
        tensors = grad_h, grad_last, h, weight, feedback, carried, through
        words = sweep._replace(first=0)  # the same sweep, wherever it starts
        library_chain.call(library_chain.backward, (grad_u, carried_out, through_out), words, tensors)
        return grad_u, carried_out, through_out
    missed = h.new_empty(h.shape[:-1]) if sweep.inverse == "jacobian" else None
    place = _native.device_and_stream(h)
    case = {"sizes": sizes(h), "inverse": sweep.inverse, "update": sweep.update, **_cuda_precision(h)}
    needed = _native.cuda.rnn_needs_displacements(**case, device=place["device"])
    displacements = torch.empty_like(h, dtype=torch.float32) if needed else None
    _native.cuda.rnn_bwd(
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
        nonlinearity=sweep.nonlinearity,
        step=sweep.step,
        clip=sweep.clip,
        reg=sweep.reg,
        rtol=sweep.rtol,
        **case,
        **place,
    )
    if missed is not None:
        reference.check_residuals(missed, sweep, h.dtype)
    return grad_u, carried_out, through_out


def _triton_forward(*arguments: Any, **options: Any) -> Tensor:
    from tp_kernels.ops.rnn import triton_kernel  # imports triton, which need not be there

    return triton_kernel.forward(*arguments, **options)


def _triton_backward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from tp_kernels.ops.rnn import triton_kernel

    return triton_kernel.backward(*arguments, **options)


BACKENDS = BackendTable(
    "rnn",
    {
        "reference": Backend(reference.forward, reference.backward),
        "cpu": Backend(
            _cpu_forward, _cpu_backward, _native.cpu_available, _native.cpu_supports, layer_forward=_cpu_layer_forward
        ),
        "triton": Backend(_triton_forward, _triton_backward, _triton.available, triton_blocks.supports),
        # By name only, until it has run on a GPU.
        "cuda": Backend(_cuda_forward, _cuda_backward, _native.cuda_available, _cuda_supports),
    },
    {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
)
"""``resolve`` is told what support depends on: ``size``, N, and ``sweep``, of the backward pass."""


def for_both_passes(backend: str, tensor: Tensor, size: int, nonlinearity: str, inverse: str) -> Backend:
    """The back-end of a forward pass whose backward pass will be with that inverse: the one that backward resolves to.

    It fails here, at the user's call, where the back-end asked for could not do backward. "none", which every back-end
    can, is also that of a call without gradients.
    """
    return BACKENDS.resolve(backend, tensor, size=size, sweep=Sweep(nonlinearity, inverse))


def _forward(
    u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, backend: str, inverse: str = "none"
) -> Tensor:
    chosen = for_both_passes(backend, u, u.shape[-1], nonlinearity, inverse)
    return chosen.forward(u, weight, h0, nonlinearity)


def _backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    u: Tensor | None,
    h0: Tensor | None,
    *words: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *sweep, backend = words
    sweep = Sweep(*sweep)
    return BACKENDS.resolve(backend, h, size=h.shape[-1], sweep=sweep).backward(
        grad_h, grad_last, h, weight, feedback, carried, through, u, h0, sweep
    )


def _iterations(grad_h: Tensor | None, grad_last: Tensor | None, h: Tensor, *arguments: Any) -> Tensor:
    """The sweep of ``rnn_bwd`` for the count of its iterations: how many each solve of "jacobian" took, [T, B(, H)]."""
    *tensors, backend = arguments
    count = len(Sweep._fields)
    iterations = h.new_zeros(h.shape[:-1], dtype=torch.int32)
    sweep = Sweep(*tensors[-count:])
    BACKENDS.resolve(backend, h, size=h.shape[-1], sweep=sweep).backward(
        grad_h, grad_last, h, *tensors[:-count], sweep, iterations=iterations
    )
    return iterations


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, h, _, _, _, _, _, _, *sweep, _ = arguments
    return backward_outputs(h, Sweep(*sweep))


# The fields of a Sweep, in a schema.
SWEEP = "str nonlinearity, str inverse, str update, float step, float clip, float reg, float rtol, SymInt first"
_BACKWARD_ARGUMENTS = (
    "Tensor? grad_h, Tensor? grad_last, Tensor h, Tensor weight, Tensor? feedback, Tensor? carried, "
    f"Tensor? through, Tensor? u, Tensor? h0, {SWEEP}, str backend"
)

register(
    "rnn_fwd(Tensor u, Tensor weight, Tensor? h0, str nonlinearity, str backend, str inverse='none') -> Tensor",
    _forward,
    lambda u, *rest: u.new_empty(u.shape),
)
register(
    f"rnn_bwd({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    twin=True,  # "jacobian" reads its residuals
)
register(
    f"rnn_iterations({_BACKWARD_ARGUMENTS}) -> Tensor",
    _iterations,
    lambda grad_h, grad_last, h, *rest: h.new_empty(h.shape[:-1], dtype=torch.int32),
    cudagraph_unsafe=True,  # as the twin of rnn_bwd
)
