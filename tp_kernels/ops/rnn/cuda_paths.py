"""Which of its ways the "cuda" back-end takes for a shape, and why."""

from typing import NamedTuple

import torch

LARGEST_ON_ONE = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
"""Units whose weight one multiprocessor keeps in its registers."""

ONE, CLUSTER, CHAIN = "one multiprocessor", "cluster of multiprocessors", "library chain"


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
        CHAIN,
        f"one multiprocessor keeps the weight of up to {largest} units, {clusters}; beyond that every step is a "
        "product of cuBLAS and a kernel for the rest, recorded in a CUDA graph",
    )
