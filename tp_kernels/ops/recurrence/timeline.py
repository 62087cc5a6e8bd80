"""How the sequences of a call lie in time: of one length or several, read from either end, cut where they start anew.

Arrays over time are [T, B, …], or *packed*, as in ``torch.nn.utils.rnn.PackedSequence``: [P, …], the rows of one step
after those of another, for sequences that are sorted by length. What is said of a step is in the order of time; the
*reading order* is that, or the reverse.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Timeline(NamedTuple):
    """Of one call, or of some of its steps.

    Attributes:
        T: how many steps.
        batch_sizes: [T], int64, on the CPU: how many sequences there are at each step, never more than at the one
            before; arrays are packed. ``None``: all of them, always.
        reset: [T, B] or, packed, [P], bool: where a state starts anew, from zero, before this step is read.
        reverse: whether the last step is read first.
        later: how many sequences go on after the step that is read last. A gradient of the last states is one of the
            others.
    """

    T: int
    batch_sizes: Tensor | None = None
    reset: Tensor | None = None
    reverse: bool = False
    later: int = 0

    @classmethod
    def of(cls, array: Tensor, batch_sizes: Tensor | None, reset: Tensor | None, reverse: bool) -> "Timeline":
        """Of a whole call, one of whose arrays over time is that one."""
        return cls((array if batch_sizes is None else batch_sizes).shape[0], batch_sizes, reset, reverse)

    @property
    def plain(self) -> bool:
        """Whether all sequences are of one length, read as they come, and never start anew."""
        return self.batch_sizes is None and self.reset is None and not self.reverse

    def offsets(self) -> Tensor | None:
        """[T + 1]: how many rows of packed arrays come before each step."""
        if self.batch_sizes is None:
            return None
        return torch.cat((self.batch_sizes.new_zeros(1), self.batch_sizes.cumsum(0)))

    def order(self) -> range:
        """The steps in reading order."""
        return range(self.T - 1, -1, -1) if self.reverse else range(self.T)

    def portions(self, length: int) -> list[slice]:
        """Of so many steps each but for the last one, in reading order."""
        T = self.T
        if self.reverse:
            return [slice(max(0, end - length), end) for end in range(T, 0, -length)]
        return [slice(first, min(first + length, T)) for first in range(0, T, length)]

    def cut(self, array: Tensor | None, steps: slice) -> Tensor | None:
        """The rows of those steps."""
        if array is None or (steps.start == 0 and steps.stop == self.T):
            return array
        if self.batch_sizes is None:
            return array[steps]
        first = int(self.batch_sizes[: steps.start].sum())
        return array[first : first + int(self.batch_sizes[steps].sum())]

    def part(self, steps: slice) -> "Timeline":
        """Of those steps only."""
        if steps.start == 0 and steps.stop == self.T:
            return self
        sizes, following = self.batch_sizes, steps.start - 1 if self.reverse else steps.stop
        later = self.later
        if sizes is not None and 0 <= following < self.T:
            later = int(sizes[following])
        cut = None if sizes is None else sizes[steps]
        return Timeline(steps.stop - steps.start, cut, self.cut(self.reset, steps), self.reverse, later)

    def split(self, array: Tensor | None) -> tuple[Tensor | None, ...]:
        """A step each."""
        if array is None:
            return (None,) * self.T
        return array.unbind(0) if self.batch_sizes is None else array.split(self.batch_sizes.tolist())

    def before(self, h: Tensor, start: Tensor) -> Tensor:
        """The states that these steps began from.

        Args:
            h: [T, B, …] or packed: the states.
            start: [B, …], those before the first one read.
        """
        if self.batch_sizes is None:
            parts = (h[1:], start[None]) if self.reverse else (start[None], h[:-1])
            states = torch.cat(parts)
        else:
            sizes, B = self.batch_sizes, start.shape[0]
            step = torch.repeat_interleave(torch.arange(self.T), sizes)
            first_row = sizes.cumsum(0) - sizes
            sequence = torch.arange(len(step)) - first_row[step]
            other = step + 1 if self.reverse else step - 1
            inside = other.clamp(0, self.T - 1)
            there = (other == inside) & (sequence < sizes[inside])
            row = torch.where(there, B + first_row[inside] + sequence, sequence)
            states = torch.cat((start, h)).index_select(0, row.to(h.device))
        if self.reset is not None:
            states.masked_fill_(self.reset[(...,) + (None,) * (states.dim() - self.reset.dim())], 0)
        return states
