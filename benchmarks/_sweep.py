"""One sweep back over time of the Elman layer by itself, as its benchmarks time it: no gradient of the weight."""

from torch import Tensor

from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.op import backends
from tp_kernels.rules import Sweep

CELL = CELLS["rnn_tanh"]


def sources(h: Tensor, weight: Tensor, **given: Tensor) -> dict[str, Tensor | None]:
    """All tensors that a sweep may be given; those that are not, are not there."""
    names = ("grad_h", "grad_last", "feedback", "carried", "through", "u", "start")
    return dict.fromkeys(names) | {"h": h, "weight": weight, "kept": h.new_empty(0)} | given


def sweep_back(sweep: Sweep, h: Tensor, weight: Tensor, backend: str = "auto", **given: Tensor) -> Tensor:
    """δ, [T, B, N]."""
    chosen = backends(CELL.op).resolve(backend, h, size=h.shape[-1], sweep=sweep)
    return chosen.backward(CELL, sweep, **sources(h, weight, **given))[0]
