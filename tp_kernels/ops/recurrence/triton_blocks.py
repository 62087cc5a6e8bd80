"""What fits on chip, and how the batch is cut: the numbers of ``triton_kernel.py``, in reach without triton.

``triton_blocks.json`` is the table; ``scripts/autotune_triton.py`` writes it on a GPU.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from tp_kernels import _triton
from tp_kernels._backends import Support, dtype_name
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep

TABLE = Path(__file__).with_suffix(".json")
SIZES = {
    torch.float32: (16, 32, 64, 128),
    torch.bfloat16: (16, 32, 64, 128, 256),
    torch.float16: (16, 32, 64, 128, 256),
}
"""The padded N that are compiled, and tested for registers."""

JACOBIAN_SIZES = SIZES[torch.float32]
"""Those of the solve of "jacobian", which is in float32 for every dtype."""

_FEW_ROWS_FROM = {"layer": 256, "difference": 16, "direct": 16}
"""The padded N from which on the inverse of the activation has registers for a tile of few rows only."""

_INTERPRETER_SHARED = 227 * 1024  # as if on an H100


class Block(NamedTuple):
    """Rows of the batch that one program takes, and its warps."""

    rows: int
    warps: int

    @property
    def registers(self) -> int:
        """What a thread may use: all there are. Left to itself, the assembler spills some for the sake of occupancy."""
        return min(255, 2**16 // (32 * self.warps))


def padded(N: int) -> int:
    """The next power of two, of 16 at least: what a product on tensor cores takes."""
    return max(16, 1 << (N - 1).bit_length())


@functools.cache
def table() -> dict[str, dict[str, list[list[int]]]]:
    """By dtype, or "jacobian", and padded N: from which number of rows (B · H) on, then the block's rows and warps."""
    return json.loads(TABLE.read_text())["blocks"]


def choose(N: int, rows: int, dtype: torch.dtype, inverse: str = "none") -> Block:
    """For a forward pass, and a sweep back with that inverse."""
    few = padded(N) >= _FEW_ROWS_FROM.get(inverse, math.inf)
    return _choose(name(dtype), N, 0 if few else rows)


def choose_jacobian(N: int, rows: int) -> Block:
    """For the kernel of "jacobian", of every dtype."""
    return _choose("jacobian", N, rows)


def _choose(entry: str, N: int, rows: int) -> Block:
    blocks = table()[entry][str(padded(N))]
    return next(Block(*block) for smallest, *block in reversed(blocks) if rows >= smallest)


def name(dtype: torch.dtype) -> str:
    """bfloat16 and float16 share their blocks."""
    return "float32" if dtype == torch.float32 else "half"


def shared_memory(N: int, dtype: torch.dtype, matrices: int) -> int:
    """Bytes of shared memory that a program needs at most: the matrices, both halves of each float32, and tiles."""
    n = padded(N)
    return n * n * matrices * (8 if dtype == torch.float32 else 2) + 24 * 1024


def jacobian_shared_memory(N: int) -> int:
    """The same for the kernel of "jacobian": ``W Wᵀ`` in float32, and a few rows of W at a time."""
    n = padded(N)
    return 8 * n * n + 8 * 16 * n + 16 * 1024


def _limit(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fits(tensor: torch.Tensor, matrices: int, size: int | None = None) -> bool:
    """Whether so many matrices of that size (of the last axis by default) stay on chip together."""
    size = tensor.shape[-1] if size is None else size
    return shared_memory(size, tensor.dtype, matrices) <= _limit(tensor.device)


def jacobian_fits(device: torch.device, size: int) -> bool:
    """Whether ``W Wᵀ`` of that size stays on chip."""
    return jacobian_shared_memory(size) <= _limit(device)


def supports(
    tensor: torch.Tensor,
    size: int = 1,
    sweep: Sweep | None = None,
    time: Timeline | None = None,
    **options: object,
) -> Support:
    """``size``: N; ``sweep``: of a backward pass; ``time``: how the sequences lie."""
    ok, reason = _triton.supports(tensor)
    if not ok:
        return ok, reason
    if time is not None and not time.plain:
        return False, "it takes sequences of one length, read forwards and without a reset"
    if sweep is not None and not sweep.is_pure:
        return False, "it has no kernel for a rule with blend, latch or chunk"
    largest = max(n for n in SIZES[tensor.dtype] if fits(tensor, 1, n))
    if size > largest:
        dtype = dtype_name(tensor.dtype)
        return False, f"the weight has to fit on chip, N <= {largest} in {dtype} on {tensor.device}, and N = {size}"
    if sweep is not None and sweep.inverse == "jacobian":
        largest = max(n for n in JACOBIAN_SIZES if jacobian_fits(tensor.device, n))
        if size > largest:
            return False, (
                f"inverse='jacobian' is solved in float32 with W Wᵀ on chip, N <= {largest} on {tensor.device}, "
                f"and N = {size}"
            )
    return True, ""
