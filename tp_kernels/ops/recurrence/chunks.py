"""The sweep back over chunks of time, each by itself, on the "cpu" back-end.

To the driver a chunk of a sequence is a sequence of a batch, and a sequence is a head: where the numbers of a step lie
is a matter of strides. A first sweep, of displacements alone, and a scan give the displacement at each chunk's end;
then all chunks are swept at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_kernels import _native
from tp_kernels.ops.recurrence import parallel
from tp_kernels.ops.recurrence.cell import apply
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep


class Chunks(NamedTuple):
    """Arrays over time, cut.

    Attributes:
        run: the driver, but for the fields that are given here.
        chunk, overlap: C and K.
        h, grad_h, kept: [T, B, …] or [T, B, H, …], contiguous but for grad_h.
        time: of all sequences.
    """

    run: Callable[..., Any]
    chunk: int
    overlap: int
    h: Tensor
    grad_h: Tensor | None
    kept: Tensor | None
    time: Timeline

    def sweep(
        self,
        sweep: Sweep,
        begin: int,
        steps: int,
        chunks: int,
        *,
        grad_u: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> None:
        """Of so many chunks from the step ``begin`` that is read, of up to so many steps each.

        ``carried_in``, ``through_in`` and so on: [chunks, B, …] or [chunks, B, H, …].
        """
        T, B, *heads, N = self.h.shape
        H = heads[0] if heads else 1
        first, way = (T - 1 - begin, -1) if self.time.reverse else (begin, 1)

        def address(array: Tensor | None) -> int:
            return 0 if array is None else array.data_ptr() + array.element_size() * array.stride(0) * first

        def strides(time: int, sequence: int) -> tuple[int, int, int]:
            return way * time, way * self.chunk * time, sequence

        of_gradient = (0, 0) if self.grad_h is None else (self.grad_h.stride(0), self.grad_h.stride(-2))
        self.run(
            grad_h=address(self.grad_h),
            grad_h_strides=strides(*of_gradient),
            h=address(self.h),
            kept=address(self.kept),
            grad_u=address(grad_u),
            reset=address(self.time.reset),
            reset_strides=strides(B, 1),
            row_strides=strides(B * H, 1),
            offsets=0,
            reverse=False,
            sizes=(steps, chunks, B * H, N),
            heads=H,
            chunk=self.chunk,
            length=T - begin,
            later=self.longer_than(begin + steps),
            inverse=sweep.inverse,
            update=sweep.update,
            **{name: _native.pointer(tensor) for name, tensor in tensors.items()},
        )

    def longer_than(self, step: int) -> int:
        """How many chunks there are, one after another, until the end is no further than ``step`` from one's begin."""
        return max(0, -(-(self.h.shape[0] - step) // self.chunk))

    def displacements(
        self, sweep: Sweep, chunks: int, feedback: Tensor | None, carried: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        """What comes into the last step of the sweeps of those chunks, [chunks, *shape], from the steps behind it.
        ``carried``: what comes into the last step of all.
        """
        begin = self.chunk + self.overlap
        there = 0 if self.grad_h is not None else chunks - 1  # the others have no source of their own
        found = self.h.new_zeros((chunks, *shape))
        begin += there * self.chunk
        given = torch.zeros_like(found[there:])
        if carried is not None:
            given[-1] = carried
        steps = min(self.chunk, self.h.shape[0] - begin)
        part = found[there:]
        alone = sweep._replace(update="local")
        self.sweep(
            alone, begin, steps, chunks - there, carried_in=given, carried_out=part, through_in=None, through_out=None
        )
        own, *latched = found.chunk(sweep.kinds, dim=-1)
        crossed = self._crossed(chunks)
        power = parallel.power(feedback, self.chunk).to(own.dtype) if sweep.uses_inverse else None
        parts = [_scan(own, power, crossed), *(_scan(latch, None, crossed) for latch in latched)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _crossed(self, chunks: int) -> Tensor | None:
        """Where something goes through all of a chunk, behind each sweep: [chunks, B]. ``None``: everywhere."""
        if self.time.reset is None:
            return None
        reset = self.time.reset.flip(0) if self.time.reverse else self.time.reset
        begins = range(self.chunk + self.overlap, len(reset), self.chunk)
        return torch.stack([~reset[begin : begin + self.chunk].any(0) for begin in begins])


def _scan(parts: Tensor, power: Tensor | None, crossed: Tensor | None) -> Tensor:
    """``x_k = parts_k + P x_{k+1}`` for as many matrices P as there are heads; ``None``: P = 1. One after another: a
    product costs less than the call of torch's that makes it.
    """
    if crossed is None and power is None:
        return parts.flip(0).cumsum(0).flip(0)
    result = parts.contiguous()
    for k in range(len(parts) - 2, -1, -1):
        later = result[k + 1] if power is None else apply(power, result[k + 1])
        if crossed is not None:
            later = later * crossed[k][(...,) + (None,) * (later.dim() - 1)]
        result[k] += later
    return result


def backward(
    chunks: Chunks,
    sweep: Sweep,
    *,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    grad_u: Tensor,
    carried_out: Tensor | None,
    through_out: Tensor,
) -> None:
    """Fills ``grad_u``, ``carried_out`` and ``through_out``; all as of ``reference.backward``."""
    T = chunks.h.shape[0]
    steps, count = min(chunks.chunk + chunks.overlap, T), chunks.longer_than(0)
    inner = chunks.longer_than(steps)  # those whose sweep does not begin at the last step

    def at_ends(of_last: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        ends = grad_u.new_zeros((count, *shape))
        if of_last is not None:
            ends[inner:] = of_last
        return ends

    carried_in = None
    if carried_out is not None:
        carried_in = at_ends(carried, carried_out.shape)
        if inner:
            carried_in[:inner] = chunks.displacements(sweep, inner, feedback, carried, carried_out.shape)
    sent_on = {
        "carried_out": None if carried_in is None else torch.empty_like(carried_in),
        "through_out": at_ends(None, through_out.shape),
    }
    through_in = None if through is None else at_ends(through, through_out.shape)
    chunks.sweep(sweep, 0, steps, count, grad_u=grad_u, carried_in=carried_in, through_in=through_in, **sent_on)
    through_out.copy_(sent_on["through_out"][0])
    if carried_out is not None:
        carried_out.copy_(sent_on["carried_out"][0])
