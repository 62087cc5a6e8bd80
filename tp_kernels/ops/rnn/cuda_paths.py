"""Which of its ways the "cuda" back-end takes for a shape, and why."""

from typing import NamedTuple

import torch

LARGEST_ON_ONE = 128
"""Units whose weight one multiprocessor keeps in its registers, in float32."""


class Path(NamedTuple):
    name: str
    reason: str


def cuda_path(N: int, dtype: torch.dtype) -> Path | None:
    """The first path of this list that takes N units of this dtype; ``None`` where none does."""
    if dtype != torch.float32:
        return None
    if N <= LARGEST_ON_ONE:
        return Path("one multiprocessor", f"it keeps the weight of up to {LARGEST_ON_ONE} units")
    return Path(
        "library chain",
        f"one multiprocessor keeps the weight of up to {LARGEST_ON_ONE} units; beyond that every step is a product of "
        "cuBLAS and a kernel for the rest, recorded in a CUDA graph",
    )
