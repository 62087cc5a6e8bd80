"""The recurrence on a CUDA device for any N: a product of the library and one kernel for the rest in each step.

A step by itself is launches, microseconds each, that hold a GPU up. So a whole sequence is recorded in a CUDA graph,
for each shape, rule, precision and stream that comes a second time, and replayed. A graph's tensors have fixed
addresses: its inputs are copied in, its results out, which is little beside T products. In a recording of the caller's
own, or of torch.compile's, the chain runs as it is.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tp_kernels import _native
from tp_kernels.ops.recurrence.launch import sizes, strides
from tp_kernels.rules import Sweep

NAME = "library chain"

LARGEST_COUNT = 8
"""Recordings that are kept, each with its inputs and results, and calls that are remembered to have come once: the
latest. Of more shapes than that, in turn, none is recorded: each would be in vain.
"""

_recordings: dict[tuple, "Recording"] = {}  # the latest last
_came_once: dict[tuple, None] = {}  # without a recording, the latest last
_one_at_a_time = threading.Lock()  # what a thread copies in has to be there still when it replays


def _multiply(x: Tensor, matrix: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
    """``out = plus + x · matrix``, head by head where there are heads."""
    if x.dim() == 2:
        torch.mm(x, matrix, out=out) if plus is None else torch.addmm(plus, x, matrix, out=out)
        return
    x, out = x.transpose(0, 1), out.transpose(0, 1)
    torch.bmm(x, matrix, out=out) if plus is None else torch.baddbmm(plus.transpose(0, 1), x, matrix, out=out)


def forward(results: tuple[Tensor], cell: str, u: Tensor, weight: Tensor, start: Tensor | None) -> None:
    """Fills h, contiguous, [T, B, N] or [T, B, H, N]."""
    (h,) = results
    state = start
    for t in range(h.shape[0]):
        if state is None:
            h[t].copy_(u[t])
        else:
            _multiply(state, weight.mT, h[t], u[t])
        state = h[t]
        _native.cuda.chain_activation(
            cell=cell,
            h=_native.pointer(state),
            count=state.numel(),
            **_native.device_and_stream(h),
        )


def backward(
    results: tuple[Tensor, Tensor | None, Tensor | None],
    rule: tuple[str, Sweep],
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
) -> None:
    """Fills δ, term(λ_1) and ``Wᵀ δ_1``. Everything but grad_h is contiguous, and that is so in its last axis."""
    grad_u, carried_out, through_out = results
    cell, sweep = rule
    multiplies, adjoins = sweep.uses_inverse, sweep.update == "total"
    # Without a product what is sent is the term itself, in place.
    sent = h.new_empty(h.shape[1:]) if multiplies else carried_out
    carried = None if sweep.inverse == "none" else carried
    through = through if adjoins else None
    T = h.shape[0]
    for t in reversed(range(T)):
        grad = None if grad_h is None else grad_h[t : t + 1]
        _native.cuda.chain_step(
            cell=cell,
            grad_h=_native.pointer(grad),
            grad_h_strides=strides(grad),
            grad_last=_native.pointer(grad_last if t == T - 1 else None),
            h=_native.pointer(h[t]),
            carried_in=_native.pointer(carried),
            through_in=_native.pointer(through),
            carried_out=_native.pointer(None if sweep.inverse == "none" else sent),
            grad_u=_native.pointer(grad_u[t]),
            sizes=sizes(h[t : t + 1]),
            inverse=sweep.inverse,
            update=sweep.update,
            step=sweep.step,
            clip=sweep.clip,
            **_native.device_and_stream(h),
        )
        if multiplies:
            _multiply(sent, feedback.mT, carried_out)
        if adjoins:
            _multiply(grad_u[t], weight, through_out)
        carried = None if sweep.inverse == "none" else carried_out
        through = through_out if adjoins else None


def call(
    chain: Callable[..., None],
    results: tuple[Tensor | None, ...],
    words: Any,
    tensors: tuple[Tensor | None, ...],
) -> None:
    """Fills the results: by a recording, or, off CUDA and in a recording of the caller's, step by step."""
    device = results[0].device
    if results[0].numel() == 0 or not records(device):
        chain(results, words, *tensors)
        return
    shapes = tuple(None if tensor is None else tensor.shape for tensor in (*results, *tensors))
    # Two streams must not have the same memory at the same time. The library's kernels depend on the precision.
    stream = _native.device_and_stream(results[0])["stream"]
    key = chain, device, stream, torch.backends.cuda.matmul.fp32_precision, words, shapes
    with _one_at_a_time:
        recording = _recordings.pop(key, None)
        if recording is None and not _comes_again(key):
            chain(results, words, *tensors)
            return
        if recording is None:
            while len(_recordings) >= LARGEST_COUNT:
                del _recordings[next(iter(_recordings))]
            place = min(set(range(LARGEST_COUNT)) - {kept.place for kept in _recordings.values()})
            recording = Recording(chain, results, words, tensors, place)
        _recordings[key] = recording
        recording.replay(results, tensors)


def _comes_again(key: tuple) -> bool:
    """Whether this call has come before; else it is remembered."""
    if key in _came_once:
        del _came_once[key]
        return True
    while len(_came_once) >= LARGEST_COUNT:
        del _came_once[next(iter(_came_once))]
    _came_once[key] = None
    return False


def records(device: torch.device) -> bool:
    """Whether sequences on this device are recorded: not where somebody else records, or is about to."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing() and not _in_graph_trees(device)


def _in_graph_trees(device: torch.device) -> bool:
    """Whether ``torch.compile(mode="reduce-overhead")`` runs this call, on its stream and in its memory, in which
    nothing may be kept. Where its module has not been imported it does not.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and manager.stream == torch.cuda.current_stream(device)


class Recording:
    """One chain, with tensors of its own, and a place of its own among those that are kept."""

    def __init__(
        self,
        chain: Callable[..., None],
        results: tuple[Tensor | None, ...],
        words: Any,
        tensors: tuple[Tensor | None, ...],
        place: int,
    ) -> None:
        self.tensors = tuple(
            None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in tensors
        )
        self.results = tuple(None if result is None else torch.empty_like(result) for result in results)
        self.place = place
        self._run = record(lambda: chain(self.results, words, *self.tensors), results[0].device, place)

    def replay(self, results: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...]) -> None:
        for own, given in zip(self.tensors, tensors, strict=True):
            if own is not None:
                own.copy_(given)
        self._run()
        for given, own in zip(results, self.results, strict=True):
            if given is not None:
                given.copy_(own)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """What recordings are made on, by their place. The library's workspace belongs to a stream: two that are kept must
    not share one, since torch gives it back with either, and they may be replayed at the same time.
    """
    return tuple(torch.cuda.Stream(device) for _ in range(LARGEST_COUNT))


@functools.cache
def _pools(device: torch.device) -> tuple[torch.cuda.MemPool, ...]:
    """The memory of recordings, by their place. The library's workspace is in it and outlasts a recording: the next one
    at that place uses it again. Kept for good, it is nobody else's, not even when torch clears all workspaces.
    """
    return tuple(torch.cuda.MemPool() for _ in range(LARGEST_COUNT))


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """Never recorded on. A workspace made here lies outside of all recordings, where it may be freed."""
    return torch.cuda.Stream(device)


def record(function: Callable[[], None], device: torch.device, place: int) -> Callable[[], None]:
    """What replays the function's kernels. It runs once before, off the recording, for the library to prepare.

    Not by ``torch.cuda.graph``, which empties the cache of all memory that is free.
    """
    with torch.cuda.device(device):
        graph, pool, warm_up = torch.cuda.CUDAGraph(), _pools(device)[place], _warm_up_stream(device)
        torch.cuda.synchronize()  # nobody uses any more what the function is given, nor what the stream had before
        with torch.cuda.stream(warm_up):
            function()
        torch.cuda.current_stream().wait_stream(warm_up)
        with torch.cuda.stream(_streams(device)[place]):
            # What other threads call meanwhile, such as one that loads data, is none of its business.
            graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
    return graph.replay
