"""The Elman cell's recurrence in Triton: the whole sequence in one launch, a program for each tile of the batch and
each head.

The matrices are read once and stay on chip for all T steps; what goes from step to step stays in float32 registers, is
rounded to the storage dtype where it is multiplied, and h is all that backward reads of the forward pass.

This is the only file of the recurrence that imports triton. ``reference.py`` is the specification.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels import _native, _triton
from tp_kernels._backends import tf32_allowed
from tp_kernels.ops.recurrence import triton_blocks
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

# --- device code


@triton.jit
def tanh(z):
    """Within two units in the last place, from sums, products and one division: the same code, hence the same
    accuracy, on every GPU and in the interpreter. NaN stays NaN.

    ``tanh a = E/(1 + E)`` with ``2E = exp(2a) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1)`` and ``2a = n ln 2 + r``: at small a
    no digit cancels, since n = 0 there, and ``E - E · E/(1 + E)`` spares E the roundings of the division.
    """
    a = tl.abs(z)
    x = 2 * tl.where(a > 10, 10.0, a)  # tanh 10 rounds to 1; false for NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.4286068203094173e-06  # ln 2 in two parts; the first product is exact
    p = 1.0 / 720 + r * (1.0 / 5040)
    p = 1.0 / 120 + r * p
    p = 1.0 / 24 + r * p
    p = 1.0 / 6 + r * p
    p = 0.5 + r * p
    p = r + r * r * p
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    e = 0.5 * (power * p + (power - 1))
    t = tl.div_rn(e, e + 1)
    t = tl.where(e < 0.5, e - e * t, t)
    return tl.where(z < 0, -t, t)


@triton.jit
def _activation(z, NONLINEARITY: tl.constexpr):
    if NONLINEARITY == "tanh":
        z = tanh(z)
    elif NONLINEARITY == "relu":
        z = tl.where(z <= 0, 0.0, z)  # false for NaN, which passes
    return z


@triton.jit
def _through_activation(adjoint, h, NONLINEARITY: tl.constexpr):
    """``a'(z) · adjoint``, from ``h = a(z)``."""
    if NONLINEARITY == "tanh":
        adjoint = adjoint * ((1 - h) * (1 + h))
    elif NONLINEARITY == "relu":
        adjoint = tl.where(h <= 0, 0.0, adjoint)
    return adjoint


@triton.jit
def _clipped(x, clip):
    high = 1 - clip
    return tl.where(x > high, high, tl.where(x < -high, -high, x))  # false for NaN


@triton.jit
def _through_inverse(displacement, h, clip, NONLINEARITY: tl.constexpr):
    """The linearized inverse of the activation, at h. relu counts as its own inverse."""
    if NONLINEARITY == "tanh":
        h = _clipped(h, clip)
        displacement = displacement / ((1 - h) * (1 + h))
    else:
        displacement = _through_activation(displacement, h, NONLINEARITY)
    return displacement


@triton.jit
def atanh_difference(a, b, difference):
    """``atanh a - atanh b`` for |a|, |b| < 1, within three units in the last place however near the two are.

    It is ``½ log A/B`` with ``A = (1 + high)(1 - low)``, ``B = (1 - high)(1 + low)``, and ``A/B = 2ⁿ (1 + s)/(1 - s)``,
    ``s = (A - 2ⁿ B)/(A + 2ⁿ B)``. Where n = 0, ``A - B = 2 (high - low)`` is known to all digits.

    difference: ``a - b``, perhaps to more digits than a and b have. NaN stays NaN.
    """
    high, low = tl.where(a < b, b, a), tl.where(a < b, a, b)
    larger, smaller = (1 + high) * (1 - low), (1 - high) * (1 + low)
    n = (larger.to(tl.int32, bitcast=True) >> 23) - (smaller.to(tl.int32, bitcast=True) >> 23)
    scaled = (smaller.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)
    beyond = scaled > larger
    n = tl.where(beyond, n - 1, n)
    scaled = tl.where(beyond, 0.5 * scaled, scaled)  # larger / scaled is between 1 and 2
    s = tl.div_rn(tl.where(n == 0, 2 * tl.abs(difference), larger - scaled), larger + scaled)
    # The minimax fit of the CPU: atanh s = s + s³ q(s²) on 0 <= s <= 1/3.
    z = s * s
    q = 0.1085328757762909 + z * 0.11612164974212646
    q = 0.142961785197258 + z * q
    q = 0.19999852776527405 + z * q
    q = 0.3333333432674408 + z * q
    power = n.to(tl.float32)
    result = power * 0.3465728759765625 + (power * 7.143033826650935e-07 + (s + s * z * q))
    return tl.where(difference < 0, -result, result)


@triton.jit
def _inverse_activation(v, clip, NONLINEARITY: tl.constexpr):
    """``a⁻¹(clip v)``. relu counts as its own inverse."""
    if NONLINEARITY == "tanh":
        v = _clipped(v, clip)
        v = atanh_difference(v, tl.zeros_like(v), v)
    else:
        v = _activation(v, NONLINEARITY)
    return v


@triton.jit
def _inverse_difference(displacement, h, clip, NONLINEARITY: tl.constexpr):
    """``a⁻¹(clip h) - a⁻¹(clip(h - λ))``, however small λ is."""
    if NONLINEARITY == "tanh":
        target = h - displacement
        a, b = _clipped(h, clip), _clipped(target, clip)
        displacement = atanh_difference(a, b, tl.where((a == h) & (b == target), displacement, a - b))
    elif NONLINEARITY == "relu":
        displacement = tl.minimum(displacement, h, propagate_nan=tl.PropagateNan.ALL)
    return displacement


@triton.jit
def _load(pointers, mask):
    """Zero outside, and float32: sums are in float32 whatever the storage dtype is."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before(t, T):
    """``t < T`` as a tensor, which a Python number is not in the interpreter."""
    return tl.full((1, 1), t, tl.int32) < T


@triton.jit
def _tile_and_head(B, BLOCK_B: tl.constexpr):
    """The number of this program's tile of the batch, its head, and how many heads there are. All are on one axis of
    the grid: another would end at 65,535.
    """
    tiles = tl.cdiv(B, BLOCK_B)
    return tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64), tl.num_programs(0) // tiles


@triton.jit
def _stride(stride, ALIGNED: tl.constexpr):
    """A stride of which the compiler is to know whether it is a multiple of 16, as it then loads more at once."""
    if ALIGNED:
        stride = stride // 16 * 16
    return stride


@triton.jit
def _matrix(pointer, head, N, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """The matrix M of this head, [N, N], or its transpose, as the right side of a product; zero beyond N."""
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (row < N) & (column < N)
    pointers = pointer + head * N * N
    pointers += column * N + row if TRANSPOSED else row * N + column
    # Through float32, because the interpreter can load and convert bfloat16, but not compute with it.
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32).to(OPERAND)


# B and T are factors of the strides over time and batch. Were these specialized, as Triton does, on whether they are
# multiples of 16, a last batch of another size would compile kernels in the midst of training.
@triton.jit(do_not_specialize=["T", "B", "u_time", "u_batch"])
def forward_kernel(
    u,
    weight,
    h0,
    h,
    T,
    B,
    N,
    u_time,
    u_batch,
    u_head,
    NONLINEARITY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``h_t = a(u_t + h_{t-1} Wᵀ)``. Grid: tiles of the batch for each head.

    ALIGNED: N and the strides over time and batch are multiples of 16.

    u: [T, B, H, N], unit stride over N; h0: [B, H, N] or None, h: [T, B, H, N] and weight: [H, N, N], contiguous.
    """
    tile, head, heads = _tile_and_head(B, BLOCK_B)
    row = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    mask = (row < B) & inside
    place = (row * heads + head) * N + column
    u_time, u_batch = _stride(u_time, ALIGNED), _stride(u_batch, ALIGNED)
    matrix = _matrix(weight, head, N, BLOCK_N, True, OPERAND)
    state = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if h0 is not None:
        state = _load(h0 + place, mask)
    u_pointers = u + row * u_batch + head * u_head + column
    h_pointers = h + place
    h_time = tl.cast(B, tl.int64) * heads * N
    ahead = _load(u_pointers, mask)
    for t in range(T):
        u_t = ahead
        u_pointers += u_time
        ahead = _load(u_pointers, mask & _before(t + 1, T))  # on its way while this step is computed
        z = tl.dot(state.to(OPERAND), matrix, u_t, input_precision=PRECISION)
        stored = _activation(z, NONLINEARITY).to(h.dtype.element_ty)
        tl.store(h_pointers, stored, mask=mask)
        # Beyond N infinity times zero would be NaN, and reach all units at the next step.
        state = tl.where(inside, stored.to(tl.float32), 0.0)
        h_pointers += h_time


@triton.jit(do_not_specialize=["T", "B", "grad_time", "grad_batch", "u_time", "u_batch"])
def backward_kernel(
    grad_h,
    grad_last,
    h,
    weight,
    feedback,
    carried_in,
    through_in,
    u,
    h0,
    delta_out,
    carried_out,
    through_out,
    T,
    B,
    N,
    grad_time,
    grad_batch,
    grad_head,
    u_time,
    u_batch,
    u_head,
    step,
    clip,
    NONLINEARITY: tl.constexpr,
    INVERSE: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """δ from the last step to the first, and what goes on to the steps before. Grid and ALIGNED: as in forward.

    INVERSE is that of a ``Sweep``, but for "jacobian"; UPDATE too ("total", "local"), or "displacement": write λ_t in
    the place of δ_t, and nothing else of the update.

    What does not arrive is None; u and h0 are for "direct" only. grad_h, u: [T, B, H, N], unit stride over N; h,
    delta_out: [T, B, H, N]; all of one step: [B, H, N]; weight, feedback: [H, N, N]; contiguous.
    """
    tile, head, heads = _tile_and_head(B, BLOCK_B)
    row = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    mask = (row < B) & inside
    place = (row * heads + head) * N + column
    if UPDATE == "total":
        transposed_weight = _matrix(weight, head, N, BLOCK_N, False, OPERAND)
    if INVERSE != "none" and INVERSE != "identity":
        inverse = _matrix(feedback, head, N, BLOCK_N, True, OPERAND)
    carried = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    through = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if carried_in is not None:
        carried = _load(carried_in + place, mask)
    if grad_last is not None:
        carried += step * _load(grad_last + place, mask)
    if through_in is not None:
        through = _load(through_in + place, mask)
    last = tl.cast(T - 1, tl.int64)
    time = tl.cast(B, tl.int64) * heads * N
    h_pointers = h + last * time + place
    delta_pointers = delta_out + last * time + place
    state_ahead = _load(h_pointers, mask)
    grad_time, grad_batch = _stride(grad_time, ALIGNED), _stride(grad_batch, ALIGNED)
    if grad_h is not None:
        grad_pointers = grad_h + last * grad_time + row * grad_batch + head * grad_head + column
        grad_ahead = _load(grad_pointers, mask)
    u_time, u_batch = _stride(u_time, ALIGNED), _stride(u_batch, ALIGNED)
    if INVERSE == "direct":
        u_pointers = u + last * u_time + row * u_batch + head * u_head + column
        u_ahead = _load(u_pointers, mask)
    for t in range(T):
        before = mask & _before(t + 1, T)
        state = state_ahead
        h_pointers -= time
        state_ahead = _load(h_pointers, before)  # as in forward
        displacement = carried
        if grad_h is not None:
            displacement += step * grad_ahead
            grad_pointers -= grad_time
            grad_ahead = _load(grad_pointers, before)
        delta = displacement
        if UPDATE != "displacement":
            delta = _through_activation(displacement + through, state, NONLINEARITY)
        stored = delta.to(delta_out.dtype.element_ty)
        tl.store(delta_pointers, stored, mask=mask)
        if INVERSE == "none":
            carried = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        elif INVERSE == "identity":
            carried = displacement
        else:
            start = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
            if INVERSE == "layer":
                displacement = _through_inverse(displacement, state, clip, NONLINEARITY)
            elif INVERSE == "difference":
                displacement = _inverse_difference(displacement, state, clip, NONLINEARITY)
            elif INVERSE == "direct":
                displacement = u_ahead - _inverse_activation(state - displacement, clip, NONLINEARITY)
                u_pointers -= u_time
                u_ahead = _load(u_pointers, before)
                start = state_ahead
                if h0 is not None:
                    start += _load(h0 + place, mask & (before == 0))  # the state before the first
            carried = tl.dot(displacement.to(OPERAND), inverse, start, input_precision=PRECISION)
            carried = tl.where(inside, carried, 0.0)  # as in forward
        if UPDATE == "total":
            through = tl.dot(delta.to(OPERAND), transposed_weight, input_precision=PRECISION)
            through = tl.where(inside, through, 0.0)
        delta_pointers -= time
    if INVERSE != "none":
        tl.store(carried_out + place, carried.to(carried_out.dtype.element_ty), mask=mask)
    if UPDATE == "total":
        tl.store(through_out + place, through.to(through_out.dtype.element_ty), mask=mask)


@triton.jit
def _row_sum(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _rows_of_gram(pointer, N, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Every STEP-th row of K, from FIRST on."""
    row, column = FIRST + STEP * tl.arange(0, BLOCK_N // STEP)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return _load(pointer + row * N + column, (row < N) & (column < N))


@triton.jit
def _upper_half(x):
    """x cut to the eleven bits of a tf32: what is left fits another."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(v, k, total):
    """``total + v k``, as tf32x3 does it, but for what that adds for the sake of infinities, and registers with it."""
    upper_v, upper_k = _upper_half(v), _upper_half(k)
    total = tl.dot(upper_v, upper_k, total, input_precision="tf32")
    total = tl.dot(upper_v, k - upper_k, total, input_precision="tf32")
    return tl.dot(v - upper_v, upper_k, total, input_precision="tf32")


@triton.jit
def _times_gram(vectors, even, odd, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """``v K`` for every row. From N = 128 on in two products, each with half of the operands in registers at a time:
    even and odd rows of K. Below, ``even`` is all of K.
    """
    image = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if BLOCK_N >= 128:
        left, right = tl.split(tl.reshape(vectors, (BLOCK_B, BLOCK_N // 2, 2)))
        image = _add_product(left, even, image)
        image = _add_product(right, odd, image)
    else:
        image = _add_product(vectors, even, image)
    return image


@triton.jit
def _solve(
    displacement,
    slope,
    even,
    odd,
    diagonal,
    norm,
    reg,
    rtol,
    limit,
    scratch,
    place,
    mask,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y with ``(D K D + rI) y = λ`` for every row, by conjugate gradients under the diagonal as a preconditioner.

    A row has scalars of its own and stops by itself: what the others of the tile still need changes none of its bits.
    Where rounding errors may be as large as rtol, a row that stops has its residual computed anew, in the place of a
    step. It goes on from that where it is above the bound, and gives up where that did not come down.

    slope: D; even, odd: rows of K, as in ``_times_gram``; diagonal, norm: its diagonal and its largest sum of a row,
    NaN where W is not finite; scratch, place, mask: memory for a tile. Returns y, the iterations of each row, and
    its relative residual where it gave up, else 0. A row that is not finite gets y = NaN.
    """
    usable = (_row_sum(0 * displacement + 0 * slope) == 0) & (norm == norm)  # false for NaN, which 0 · ∞ is too
    rounding = (4 * 4.76837158203125e-07 * (norm + reg) <= rtol * reg) == 0  # 2⁻²¹: float32 as tf32x3
    # In the unit of its largest element, a power of two, no square of a row over- or underflows.
    exponent = tl.max(tl.abs(displacement), 1)[:, None].to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    right = tl.where(usable, displacement * ((254 - exponent) << 23).to(tl.float32, bitcast=True), 0.0)
    slope = tl.where(usable, slope, 0.0)
    preconditioner = 1 / (slope * slope * diagonal + reg)
    solution = tl.zeros_like(right)
    tl.store(scratch + place, right, mask=mask)  # seldom needed: not in registers
    tl.debug_barrier()  # where it is read, another thread may have written it
    residual = right
    direction = preconditioner * residual
    product = _row_sum(direction * residual)
    whole = _row_sum(right * right)
    bound = rtol * rtol * whole
    goal = tl.where(rounding, 0.25 * bound, bound)
    square = whole
    checked = whole  # the residual's square when last computed anew
    active = whole > 0
    checking = whole < 0  # false: no row
    gave_up = whole < 0
    iterations = tl.zeros_like(whole).to(tl.int32)
    while tl.max(active.to(tl.int32)) > 0:
        vector = tl.where(checking, solution, direction)
        image = _times_gram(slope * vector, even, odd, BLOCK_B, BLOCK_N)
        image = slope * image + reg * vector
        curvature = _row_sum(direction * image)
        length = product / curvature
        # Else the matrix is not positive definite in this precision. All comparisons are false for NaN.
        stepping = active & (checking == 0) & (curvature > 0) & (length > 0)
        anew = active & checking
        iterations += (active & (checking == 0)).to(tl.int32)
        solution = tl.where(stepping, solution + length * direction, solution)
        residual = tl.where(stepping, residual - length * image, residual)
        if tl.max(anew.to(tl.int32)) > 0:
            residual = tl.where(anew, _load(scratch + place, mask) - image, residual)
        square = _row_sum(residual * residual)
        before = product
        product = _row_sum(preconditioner * residual * residual)
        turn = tl.where(stepping, product / before, 0.0)
        direction = tl.where(active, preconditioner * residual + turn * direction, direction)
        again = anew & (square > bound) & (square <= 0.25 * checked)
        checked = tl.where(anew, square, checked)
        goes_on = stepping & (square > goal) & (iterations < limit)
        stops = active & (checking == 0) & (goes_on == 0)
        gave_up = gave_up | (stops & (rounding == 0) & ((square <= goal) == 0))
        gave_up = gave_up | (anew & (again == 0) & ((square <= bound) == 0))
        checking = stops & rounding
        active = goes_on | again | checking
    tl.debug_barrier()  # the caller writes there
    missed = tl.sqrt(square / whole)
    missed = tl.where(gave_up, tl.where(missed == missed, missed, float("inf")), 0.0)
    solution = tl.where(usable, solution * (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    return solution, iterations, missed


@triton.jit
def _times_weight(vectors, place, there, weight, N, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """``v W`` for every row, with v and W from memory, a few units at a time: K has the place on chip.

    place: where each row begins; there: which rows there are.
    """
    total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    column = tl.arange(0, BLOCK_N)[None, :]
    for first in range(0, N, CHUNK):
        unit = first + tl.arange(0, CHUNK)
        left = _load(vectors + place + unit[None, :], there & (unit[None, :] < N))
        right = _load(weight + unit[:, None] * N + column, (unit[:, None] < N) & (column < N))
        total = tl.dot(left, right, total, input_precision="tf32x3")
    return tl.where(column < N, total, 0.0)  # as in forward


@triton.jit(do_not_specialize=["T", "B", "grad_time", "grad_batch"])
def jacobian_kernel(
    grad_h,
    grad_last,
    h,
    weight,
    gram,
    norms,
    carried_in,
    through_in,
    delta_out,
    carried_out,
    through_out,
    scaled,
    iterations_out,
    missed_out,
    T,
    B,
    N,
    grad_time,
    grad_batch,
    grad_head,
    step,
    reg,
    rtol,
    NONLINEARITY: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``backward_kernel`` for the inverse of the Jacobian: ``term = Wᵀ D y`` with ``(D K D + rI) y = λ``.

    K is on chip, in float32 whatever the storage dtype is, since products of rounded vectors would keep residuals from
    coming down. W is read anew at every step, for one product or two against those of all iterations with K.

    As there, and: gram: [H, N, N], ``W Wᵀ`` in float32; norms: [H], float32: as in ``_solve``; scaled: [2, B, H, N],
    float32, scratch, used in turn; iterations_out: [T, B, H], int32, or None; missed_out: [T, B, H], float32: the
    relative residual of each solve that gave up, else 0.
    """
    tile, head, heads = _tile_and_head(B, BLOCK_B)
    grad_time, grad_batch = _stride(grad_time, ALIGNED), _stride(grad_batch, ALIGNED)
    first = tile * BLOCK_B
    local_row = tl.arange(0, BLOCK_B)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside, there = column < N, first + local_row < B
    mask = there & inside
    # What differs between the elements of a tile is small: 64 bits for each would be registers that are short.
    sample = local_row * heads
    place = sample * N + column
    first_sample = first.to(tl.int64) * heads + head
    start = first_sample * N
    weight += head * N * N
    gram += head * N * N
    if BLOCK_N >= 128:
        even = _rows_of_gram(gram, N, BLOCK_N, 0, 2)
        odd = _rows_of_gram(gram, N, BLOCK_N, 1, 2)
    else:
        even = _rows_of_gram(gram, N, BLOCK_N, 0, 1)
        odd = even
    diagonal = _load(gram + column * (N + 1), inside)
    norm = tl.load(norms + head + tl.zeros((1, 1), tl.int32))
    carried = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    through = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if carried_in is not None:
        carried = _load(carried_in + start + place, mask)
    if grad_last is not None:
        carried += step * _load(grad_last + start + place, mask)
    if through_in is not None:
        through = _load(through_in + start + place, mask)
    time = tl.cast(B, tl.int64) * heads
    for back in range(T):
        t = tl.cast(T - 1, tl.int64) - back
        now = t * time * N + start
        state = _load(h + now + place, mask)
        displacement = carried
        if grad_h is not None:
            rows = (first + local_row).to(tl.int64) * grad_batch
            displacement += step * _load(grad_h + t * grad_time + head * grad_head + rows + column, mask)
        delta = _through_activation(displacement + through, state, NONLINEARITY)
        tl.store(delta_out + now + place, delta.to(delta_out.dtype.element_ty), mask=mask)
        slope = _through_activation(tl.full((BLOCK_B, BLOCK_N), 1.0, tl.float32), state, NONLINEARITY)
        turn = scaled + (t % 2) * time * N + start  # what is read at one step is not written at the next
        solution, iterations, missed = _solve(
            displacement,
            slope,
            even,
            odd,
            diagonal,
            norm,
            reg,
            rtol,
            4 * N + 50,
            turn,
            place,
            mask,
            BLOCK_B,
            BLOCK_N,
        )
        tl.store(turn + place, slope * solution, mask=mask)
        if iterations_out is not None:
            tl.store(iterations_out + t * time + first_sample + sample, iterations, mask=there)
        tl.store(missed_out + t * time + first_sample + sample, missed, mask=there)
        tl.debug_barrier()  # every thread reads what others have written
        carried = _times_weight(turn, sample * N, there, weight, N, BLOCK_B, BLOCK_N, CHUNK)
        if UPDATE == "total":
            through = _times_weight(delta_out + now, sample * N, there, weight, N, BLOCK_B, BLOCK_N, CHUNK)
    tl.store(carried_out + start + place, carried.to(carried_out.dtype.element_ty), mask=mask)
    if UPDATE == "total":
        tl.store(through_out + start + place, through.to(through_out.dtype.element_ty), mask=mask)


# --- launchers

CHUNK = 16
"""Units of W that ``jacobian_kernel`` multiplies at a time: what leaves room for K at N = 128."""

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: three products of halves (tf32x3) keep its accuracy on tensor cores; one (tf32) does
    not, and is taken only where torch has been told that this is good enough.
    """
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "tf32x3"


def options(block: triton_blocks.Block) -> dict[str, Any]:
    """For the compiler."""
    return {"num_warps": block.warps, "num_stages": 1, "maxnreg": block.registers, "enable_fp_fusion": True}


def aligned(N: int, *tensors: Tensor | None) -> bool:
    """Whether N and the strides over time and batch are multiples of 16: those of contiguous tensors are if N is one,
    whatever T and B are.
    """
    given = (tensor for tensor in tensors if tensor is not None)
    return N % 16 == 0 and all(stride % 16 == 0 for tensor in given for stride in strides(tensor)[:2])


def launch(kernel: Any, h: Tensor, *arguments: Any, **words: Any) -> Any:
    """For each tile of the batch and each head of h. Returns the compiled kernel, or None where there is no tile."""
    _, B, H, N = sizes(h)
    if B == 0:
        return None
    if kernel is jacobian_kernel:
        block = triton_blocks.choose_jacobian(N, B * H)
        words |= {"CHUNK": CHUNK}
    else:
        block = triton_blocks.choose(N, B * H, h.dtype, words.get("INVERSE", "none"))
        words |= {
            "OPERAND": tl.float32 if _triton.interpreted() else _OPERANDS[h.dtype],
            "PRECISION": precision(h.dtype),
        }
    on_device = contextlib.nullcontext() if _triton.interpreted() else torch.cuda.device(h.device)
    with on_device:
        return kernel[(triton.cdiv(B, block.rows) * H,)](
            *arguments, **words, BLOCK_B=block.rows, BLOCK_N=triton_blocks.padded(N), **options(block)
        )


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
    T, B, _, N = sizes(h)
    launch(
        forward_kernel,
        h,
        u,
        weight,
        start,
        h,
        T,
        B,
        N,
        *strides(u),
        NONLINEARITY=cell.nonlinearity,
        ALIGNED=aligned(N, u),
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
    """``reference.backward``.

    The total update needs two matrices where the rule has an inverse. Where they do not both fit on chip, displacements
    are one sweep and their back-propagation another.
    """
    _native.check_same_kind(cell.op, h, grad_h, grad_last, weight, feedback, carried, through, u, start)
    check_given(cell, sweep, feedback, u)
    u, start = (u, start) if sweep.inverse == "direct" else (None, None)
    grad_h, u, h, weight = unit_stride(grad_h), unit_stride(u), h.contiguous(), weight.contiguous()
    grad_last, feedback, start = contiguous(grad_last), contiguous(feedback), contiguous(start)
    carried = contiguous(carried) if sweep.inverse != "none" else None
    through = contiguous(through) if sweep.update == "total" else None
    grad_u, carried_out, through_out = backward_outputs(cell, h, h.shape[1:], sweep)
    call = _SweepBack(
        cell=cell,
        sweep=sweep,
        grad_h=grad_h,
        grad_last=grad_last,
        h=h,
        weight=weight,
        feedback=feedback,
        carried=carried,
        through=through,
        u=u,
        start=start,
        grad_u=grad_u,
        carried_out=carried_out,
        through_out=through_out,
    )
    if sweep.inverse == "jacobian":
        _jacobian_sweep_back(call, first, iterations)
        return grad_u, carried_out, through_out
    if sweep.update == "total" and sweep.uses_inverse and not triton_blocks.fits(h, matrices=2):
        displacements = torch.empty_like(h, dtype=torch.float32)
        _sweep_back(
            call._replace(
                sweep=sweep._replace(update="displacement"),
                weight=None,
                through=None,
                grad_u=displacements,
                through_out=None,
            )
        )
        _sweep_back(
            call._replace(
                sweep=sweep._replace(inverse="none", step=1.0),
                grad_h=displacements,
                grad_last=None,
                feedback=None,
                carried=None,
                u=None,
                start=None,
                carried_out=None,
            )
        )
    else:
        _sweep_back(call)
    if iterations is not None:
        iterations.zero_()
    return grad_u, carried_out, through_out


class _SweepBack(NamedTuple):
    """One launch: what it reads, and what it fills."""

    cell: Cell
    sweep: Sweep
    grad_h: Tensor | None
    grad_last: Tensor | None
    h: Tensor
    weight: Tensor | None
    feedback: Tensor | None
    carried: Tensor | None
    through: Tensor | None
    u: Tensor | None
    start: Tensor | None
    grad_u: Tensor
    carried_out: Tensor | None
    through_out: Tensor | None


def _sweep_back(call: _SweepBack) -> None:
    T, B, _, N = sizes(call.h)
    launch(
        backward_kernel,
        call.h,
        call.grad_h,
        call.grad_last,
        call.h,
        call.weight,
        call.feedback,
        call.carried,
        call.through,
        call.u,
        call.start,
        call.grad_u,
        call.carried_out,
        call.through_out,
        T,
        B,
        N,
        *strides(call.grad_h),
        *strides(call.u),
        call.sweep.step,
        call.sweep.clip,
        NONLINEARITY=call.cell.nonlinearity,
        INVERSE=call.sweep.inverse,
        UPDATE=call.sweep.update,
        ALIGNED=aligned(N, call.grad_h, call.u),
    )


def _jacobian_sweep_back(call: _SweepBack, first: int, iterations: Tensor | None) -> None:
    T, B, H, N = sizes(call.h)
    double = call.weight.double()  # torch may have been told to multiply float32 as tf32
    gram = (double @ double.mT).float()
    norms = gram.abs().sum(-1).amax(-1) + (0 * double).sum(dim=(-2, -1))  # NaN where W is not finite
    missed = missed_residuals(call.h)
    launch(
        jacobian_kernel,
        call.h,
        call.grad_h,
        call.grad_last,
        call.h,
        call.weight,
        gram,
        norms.float(),
        call.carried,
        call.through,
        call.grad_u,
        call.carried_out,
        call.through_out,
        call.h.new_empty((2, B, H, N), dtype=torch.float32),
        iterations,
        missed,
        T,
        B,
        N,
        *strides(call.grad_h),
        call.sweep.step,
        call.sweep.reg,
        call.sweep.rtol,
        NONLINEARITY=call.cell.nonlinearity,
        UPDATE=call.sweep.update,
        ALIGNED=aligned(N, call.grad_h),
    )
    check_residuals(call.cell, missed, call.sweep, call.h.dtype, first)  # waits for the kernel, once
