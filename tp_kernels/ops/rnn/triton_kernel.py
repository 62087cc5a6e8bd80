"""``rnn`` in Triton: the whole sequence in one launch, a program for each tile of the batch and each head.

The matrices are read once and stay on chip for all T steps; what goes from step to step stays in float32 registers, is
rounded to the storage dtype where it is multiplied, and h is all that backward reads of the forward pass.

This is the only file of the op that imports triton. ``reference.py`` is the specification.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels import _native, _triton
from tp_kernels.ops.rnn import triton_blocks
from tp_kernels.ops.rnn.backends import backward_outputs, sizes, strides, unit_stride
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
def _through_inverse(displacement, h, clip, NONLINEARITY: tl.constexpr):
    """The linearized inverse of the activation, at h. relu counts as its own inverse."""
    if NONLINEARITY == "tanh":
        high = 1 - clip
        h = tl.where(h > high, high, tl.where(h < -high, -high, h))  # false for NaN
        displacement = displacement / ((1 - h) * (1 + h))
    else:
        displacement = _through_activation(displacement, h, NONLINEARITY)
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
def _matrix(pointer, N, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """The matrix M of this head, [N, N], or its transpose, as the right side of a product; zero beyond N."""
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (row < N) & (column < N)
    pointers = pointer + tl.program_id(1).to(tl.int64) * N * N
    pointers += column * N + row if TRANSPOSED else row * N + column
    # Through float32, because the interpreter can load and convert bfloat16, but not compute with it.
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32).to(OPERAND)


@triton.jit(do_not_specialize=["T", "B"])
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
):
    """``h_t = a(u_t + h_{t-1} Wᵀ)``. Grid: tiles of the batch, heads.

    u: [T, B, H, N], unit stride over N; h0: [B, H, N] or None, h: [T, B, H, N] and weight: [H, N, N], contiguous.
    """
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    mask = (row < B) & inside
    place = (row * heads + head) * N + column
    matrix = _matrix(weight, N, BLOCK_N, True, OPERAND)
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


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    grad_h,
    grad_last,
    h,
    weight,
    feedback,
    carried_in,
    through_in,
    delta_out,
    carried_out,
    through_out,
    T,
    B,
    N,
    grad_time,
    grad_batch,
    grad_head,
    step,
    clip,
    NONLINEARITY: tl.constexpr,
    INVERSE: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """δ from the last step to the first, and what goes on to the steps before. Grid: tiles of the batch, heads.

    INVERSE is that of a ``Sweep`` ("none", "identity", "weight", "layer"); UPDATE too ("total", "local"), or
    "displacement": write λ_t in the place of δ_t, and nothing else of the update.

    What does not arrive is None. grad_h: [T, B, H, N], unit stride over N; h, delta_out: [T, B, H, N]; all of one step:
    [B, H, N]; weight, feedback: [H, N, N]; contiguous.
    """
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    mask = (row < B) & inside
    place = (row * heads + head) * N + column
    if UPDATE == "total":
        transposed_weight = _matrix(weight, N, BLOCK_N, False, OPERAND)
    if INVERSE == "weight" or INVERSE == "layer":
        inverse = _matrix(feedback, N, BLOCK_N, True, OPERAND)
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
    if grad_h is not None:
        grad_pointers = grad_h + last * grad_time + row * grad_batch + head * grad_head + column
        grad_ahead = _load(grad_pointers, mask)
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
            if INVERSE == "layer":
                displacement = _through_inverse(displacement, state, clip, NONLINEARITY)
            carried = tl.dot(displacement.to(OPERAND), inverse, input_precision=PRECISION)
            carried = tl.where(inside, carried, 0.0)  # as in forward
        if UPDATE == "total":
            through = tl.dot(delta.to(OPERAND), transposed_weight, input_precision=PRECISION)
            through = tl.where(inside, through, 0.0)
        delta_pointers -= time
    if INVERSE != "none":
        tl.store(carried_out + place, carried.to(carried_out.dtype.element_ty), mask=mask)
    if UPDATE == "total":
        tl.store(through_out + place, through.to(through_out.dtype.element_ty), mask=mask)


# --- launchers

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: three products of halves (tf32x3) keep its accuracy on tensor cores; one (tf32) does
    not, and is taken only where torch has been told that this is good enough.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def options(block: triton_blocks.Block) -> dict[str, Any]:
    """For the compiler."""
    return {"num_warps": block.warps, "num_stages": 1, "maxnreg": block.registers, "enable_fp_fusion": True}


def launch(kernel: Any, h: Tensor, *arguments: Any, **words: str) -> Any:
    """For each tile of the batch and each head of h. Returns the compiled kernel, or None where there is no tile."""
    _, B, H, N = sizes(h)
    if B == 0:
        return None
    block = triton_blocks.choose(N, B * H, h.dtype)
    on_device = contextlib.nullcontext() if _triton.interpreted() else torch.cuda.device(h.device)
    with on_device:
        return kernel[(triton.cdiv(B, block.rows), H)](
            *arguments,
            **words,
            BLOCK_B=block.rows,
            BLOCK_N=triton_blocks.padded(N),
            OPERAND=tl.float32 if _triton.interpreted() else _OPERANDS[h.dtype],
            PRECISION=precision(h.dtype),
            **options(block),
        )


def forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, out: Tensor | None = None) -> Tensor:
    """``reference.forward``."""
    _native.check_same_kind("rnn", u, weight, h0)
    u, weight = unit_stride(u), weight.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    h = u.new_empty(u.shape) if out is None else out
    T, B, _, N = sizes(h)
    launch(forward_kernel, h, u, weight, h0, h, T, B, N, *strides(u), NONLINEARITY=nonlinearity)
    return h


def backward(
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
    """``reference.backward``, for linearized rules without a solve.

    The total update needs two matrices where the rule has an inverse. Where they do not both fit on chip, displacements
    are one sweep and their back-propagation another.
    """
    _native.check_same_kind("rnn", h, grad_h, grad_last, weight, feedback, carried, through)
    if sweep.uses_inverse and feedback is None:
        raise TypeError(f"rnn: feedback must be a torch.Tensor with inverse={sweep.inverse!r}, got None")
    grad_h, h, weight = unit_stride(grad_h), h.contiguous(), weight.contiguous()
    grad_last, feedback, carried, through = (
        None if tensor is None else tensor.contiguous() for tensor in (grad_last, feedback, carried, through)
    )
    carried = carried if sweep.inverse != "none" else None
    through = through if sweep.update == "total" else None
    grad_u, carried_out, through_out = backward_outputs(h, sweep)
    if sweep.update == "total" and sweep.uses_inverse and not triton_blocks.fits(h, matrices=2):
        displacements = torch.empty_like(h, dtype=torch.float32)
        outputs = displacements, carried_out, None
        _sweep_back(
            grad_h, grad_last, h, None, feedback, carried, None, *outputs, sweep._replace(update="displacement")
        )
        _sweep_back(
            *(displacements, None, h, weight, None, None, through, grad_u, None, through_out),
            sweep._replace(inverse="none", step=1.0),
        )
    else:
        outputs = grad_u, carried_out, through_out
        _sweep_back(grad_h, grad_last, h, weight, feedback, carried, through, *outputs, sweep)
    if iterations is not None:
        iterations.zero_()
    return grad_u, carried_out, through_out


def _sweep_back(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    grad_u: Tensor,
    carried_out: Tensor | None,
    through_out: Tensor | None,
    sweep: Sweep,
) -> None:
    T, B, _, N = sizes(h)
    launch(
        *(backward_kernel, h, grad_h, grad_last, h, weight, feedback, carried, through),
        *(grad_u, carried_out, through_out, T, B, N, *strides(grad_h), sweep.step, sweep.clip),
        NONLINEARITY=sweep.nonlinearity,
        INVERSE=sweep.inverse,
        UPDATE=sweep.update,
    )
