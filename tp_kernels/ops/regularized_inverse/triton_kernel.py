"""``regularized_inverse`` in Triton: one program for each matrix, matrix products only.

With ``s = √r`` the matrix ``[W; sI]`` has the Gram matrix ``A = WᵀW + rI``, so its polar factor is ``[X; Y]`` with
``X = W A^{-1/2}`` and ``Y = s A^{-1/2}``. Hence ``Xᵀ`` is P at power 1/2 and ``Y Xᵀ / s`` is P at power 1. A itself,
whose condition number is the square of that of ``[W; sI]``, is never formed.

This is the only file of the op that imports triton. ``reference.py`` is the specification.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels import _triton
from tp_kernels.ops.regularized_inverse import reference

TOLERANCE = 2.0**-12
"""On ``‖I - XᵀX - YᵀY‖_F`` before the last step, which squares it."""

LARGEST_COUNT = 100
"""Steps at most. One multiplies a small singular value by 3/2; 60 would do for √r = 1e-9 ‖W‖."""


@triton.jit
def _tile(pointer, row_stride, column_stride, TILE: tl.constexpr):
    """Pointers to a square that starts at ``pointer``."""
    place = tl.arange(0, TILE)
    return pointer + place[:, None] * row_stride + place[None, :] * column_stride


@triton.jit
def _weights(weight, first_row, first_column, M, N, row_stride, column_stride, TILE: tl.constexpr):
    """A square of W in float32, zero outside."""
    row = first_row + tl.arange(0, TILE)[:, None]
    column = first_column + tl.arange(0, TILE)[None, :]
    pointers = weight + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return tl.load(pointers, mask=(row < M) & (column < N), other=0.0).to(tl.float32)


@triton.jit
def _largest_row(weight, M, N, row_stride, column_stride, unit, SIZE, TILE: tl.constexpr):
    """The largest sum of magnitudes of a row of W/unit."""
    largest = 0.0 * unit
    for r in range(0, SIZE, TILE):
        sums = tl.zeros((TILE,), tl.float32)
        for c in range(0, SIZE, TILE):
            sums += tl.sum(tl.abs(_weights(weight, r, c, M, N, row_stride, column_stride, TILE) / unit), axis=1)
        largest = tl.maximum(largest, tl.max(sums))
    return largest


@triton.jit
def polar_kernel(
    weight,
    reg,
    inverse,
    failed,
    scratch,
    M,
    N,
    SIZE,
    matrix_stride,
    row_stride,
    column_stride,
    tolerance,
    largest_count,
    ROOT: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P by the Newton-Schulz iteration ``Z ← Z + Z (I - ZᵀZ)/2`` from ``Z = [W; sI]/size``. Grid: matrices.

    Z is in global memory, which for these sizes means in the caches: squares of it are what fits in registers.

    weight: [M, N] each, M >= N, any strides; reg: one float32; inverse: [N, M] each, contiguous; failed: one int8 each,
    1 where the iteration does not converge; scratch: [5, SIZE, SIZE] float32 each, SIZE a multiple of TILE, M at least.
    ROOT: power 1/2, else 1.
    """
    matrix = tl.program_id(0).to(tl.int64)
    area = SIZE * SIZE
    start = scratch + matrix * 5 * area
    rest = start + 4 * area
    weight += matrix * matrix_stride
    inverse += matrix * M * N
    place = tl.arange(0, TILE)
    s = tl.sqrt_rn(tl.load(reg))

    # In the unit of the largest element no square over- or underflows.
    unit, probe = s, 0.0 * s  # the probe becomes NaN where W is not finite
    for r in range(0, SIZE, TILE):
        for c in range(0, SIZE, TILE):
            x = _weights(weight, r, c, M, N, row_stride, column_stride, TILE)
            unit = tl.maximum(unit, tl.max(tl.max(tl.abs(x), axis=0)))
            probe += tl.sum(tl.sum(0.0 * x, axis=0))
    rows = _largest_row(weight, M, N, row_stride, column_stride, unit, SIZE, TILE)
    columns = _largest_row(weight, N, M, column_stride, row_stride, unit, SIZE, TILE)
    small = s / unit
    size = tl.sqrt_rn(rows * columns + small * small)  # at least the largest singular value
    for r in range(0, SIZE, TILE):
        for c in range(0, SIZE, TILE):
            x = _weights(weight, r, c, M, N, row_stride, column_stride, TILE) / unit / size + probe
            # Beyond N the identity, which is orthonormal from the start.
            y = tl.where((c + place[None, :]) < N, small / size, 1.0)
            y = tl.where((r + place[:, None]) == (c + place[None, :]), y, 0.0)
            tl.store(_tile(start + r * SIZE + c, SIZE, 1, TILE), x)
            tl.store(_tile(start + area + r * SIZE + c, SIZE, 1, TILE), y)
    tl.debug_barrier()

    missed, count = 1.0 + probe, 0
    while (missed >= tolerance) & (count < largest_count):
        z, following = start + (count % 2) * 2 * area, start + (1 - count % 2) * 2 * area
        squares = 0.0 * s
        for r in range(0, SIZE, TILE):
            for c in range(0, SIZE, TILE):
                gram = tl.zeros((TILE, TILE), tl.float32)
                for k in range(0, 2 * SIZE, TILE):
                    left = tl.load(_tile(z + k * SIZE + r, 1, SIZE, TILE))
                    right = tl.load(_tile(z + k * SIZE + c, SIZE, 1, TILE))
                    gram = tl.dot(left, right, gram, input_precision=PRECISION)
                one = tl.where((r + place[:, None]) == (c + place[None, :]), 1.0, 0.0)
                squares += tl.sum(tl.sum((one - gram) * (one - gram), axis=0))
                tl.store(_tile(rest + r * SIZE + c, SIZE, 1, TILE), 0.5 * (one - gram))
        missed = tl.sqrt_rn(squares)
        tl.debug_barrier()
        for r in range(0, 2 * SIZE, TILE):
            for c in range(0, SIZE, TILE):
                total = tl.zeros((TILE, TILE), tl.float32)
                for k in range(0, SIZE, TILE):
                    left = tl.load(_tile(z + r * SIZE + k, SIZE, 1, TILE))
                    right = tl.load(_tile(rest + k * SIZE + c, SIZE, 1, TILE))
                    total = tl.dot(left, right, total, input_precision=PRECISION)
                total += tl.load(_tile(z + r * SIZE + c, SIZE, 1, TILE))
                tl.store(_tile(following + r * SIZE + c, SIZE, 1, TILE), total)
        tl.debug_barrier()
        count += 1

    z = start + (count % 2) * 2 * area
    for r in range(0, SIZE, TILE):
        for c in range(0, SIZE, TILE):
            if ROOT:
                p = tl.load(_tile(z + c * SIZE + r, 1, SIZE, TILE))
            else:
                p = tl.zeros((TILE, TILE), tl.float32)
                for k in range(0, SIZE, TILE):
                    left = tl.load(_tile(z + area + r * SIZE + k, SIZE, 1, TILE))
                    right = tl.load(_tile(z + c * SIZE + k, 1, SIZE, TILE))
                    p = tl.dot(left, right, p, input_precision=PRECISION)
                p /= s
            mask = ((r + place[:, None]) < N) & ((c + place[None, :]) < M)
            tl.store(_tile(inverse + r * M + c, M, 1, TILE), p.to(inverse.dtype.element_ty), mask=mask)
    tl.store(failed + matrix, (missed >= tolerance).to(tl.int8))


class Block(NamedTuple):
    """The side of a square that is multiplied at once, and its warps."""

    tile: int
    warps: int


def choose(order: int) -> Block:
    return Block(16, 1) if order <= 16 else Block(32, 4)


def options(block: Block) -> dict[str, Any]:
    """For the compiler."""
    return {"num_warps": block.warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


def forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``reference.forward``; what fails is a matrix for which the iteration does not converge."""
    if weight.shape[-2] < weight.shape[-1]:
        inverse, failed = forward(weight.mT, reg, power)
        return inverse.mT, failed
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    count = math.prod(batch)
    inverse = weight.new_empty((*batch, n, m))
    failed = weight.new_empty(batch, dtype=torch.bool)
    if count == 0:
        return inverse, failed
    block = choose(m)
    size = triton.cdiv(m, block.tile) * block.tile
    scratch = weight.new_empty((count, 5, size, size), dtype=torch.float32)
    matrices = weight.reshape(count, m, n)
    on_device = contextlib.nullcontext() if _triton.interpreted() else torch.cuda.device(weight.device)
    with on_device:
        polar_kernel[(count,)](
            matrices,
            reference.on_device_of(scratch, reg),
            inverse,
            failed.view(torch.int8),
            scratch,
            m,
            n,
            size,
            *matrices.stride(),
            TOLERANCE,
            LARGEST_COUNT,
            ROOT=power == 0.5,
            TILE=block.tile,
            PRECISION="tf32x3",
            **options(block),
        )
    inverse.masked_fill_(failed[..., None, None], torch.nan)
    return inverse, failed
