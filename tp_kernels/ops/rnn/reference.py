"""``rnn`` in plain PyTorch, one step at a time: the specification every other back-end is checked against.

Shapes with heads, ``[T, B, H, N]`` and ``[H, N, N]``, work as without: a product with a weight is over the last axis.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tp_kernels._backends import dtype_name
from tp_kernels.rules import Sweep

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}


def forward(u: Tensor, weight: Tensor, h0: Tensor | None, nonlinearity: str, out: Tensor | None = None) -> Tensor:
    """States ``h_t = a(u_t + h_{t-1} Wᵀ)``.

    Args:
        u: [T, B, N] or [T, B, H, N], any floating dtype, any strides.
        weight: [N, N] or [H, N, N].
        h0: [B, N] or [B, H, N]; ``None`` is zero.
        nonlinearity: "tanh", "relu" or "identity".
        out: like ``u``, contiguous: where to write h; ``None`` takes new memory.

    Returns:
        h, of the shape and dtype of ``u``, contiguous.
    """
    activation = ACTIVATIONS[nonlinearity]
    h = u.new_empty(u.shape) if out is None else out
    state = u.new_zeros(u.shape[1:]) if h0 is None else h0
    for t in range(u.shape[0]):
        state = activation(u[t] + _apply(weight, state))
        h[t] = state
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
    """Displacements λ, adjoints μ and pre-activation gradients δ, from the last step to the first.

    ``λ_{t-1} = step g_{t-1} + term(λ_t)``, where the term is 0 (``inverse="none"``), λ_t (``"identity"``), ``P λ_t``
    (``"weight"``), ``P (λ_t / (1 - clip(h_t)²))`` (``"layer"``, with tanh; relu passes λ_t on where h_t > 0, the
    identity everywhere), ``(JᵀJ + rI)⁻¹ Jᵀ λ_t`` with ``J = D_t W`` (``"jacobian"``), or, with
    ``f⁻¹(v) = P(a⁻¹(clip v) - u_t)``, ``f⁻¹(h_t) - f⁻¹(h_t - λ_t)`` (``"difference"``) and
    ``h_{t-1} - f⁻¹(h_t - λ_t)`` (``"direct"``). ``μ_t = λ_t`` (``update="local"``) or ``μ_t = λ_t + Wᵀ δ_{t+1}``
    (``"total"``); ``δ_t = a'(z_t) μ_t``. Back-propagation is "none" with "total".

    Args:
        grad_h: like ``h``, ∂loss/∂h; ``None`` is zero.
        grad_last: [B, N] or [B, H, N], added to the gradient of the last state; ``None`` is zero.
        h: [T, B, N] or [T, B, H, N], the states.
        weight: [N, N] or [H, N, N], W.
        feedback: like ``weight``, P; needed where ``sweep.uses_inverse``.
        carried, through: like ``h[0]``: term(λ) and ``Wᵀ δ`` of the step after the last one; ``None`` is zero.
        u, h0: like ``h`` and ``h[0]``: what the states were computed from; needed by "direct" (h0: ``None`` is zero).
        sweep: the rule.
        iterations: [T, B] or [T, B, H], int32: filled with how many iterations each solve of "jacobian" took; here,
            where it is direct, none. ``None`` counts nothing.

    Returns:
        ``grad_u``, like ``h``: δ; ``carried``, like ``h[0]``: term(λ_1), empty for "none"; and ``through``, like
        ``h[0]``: ``Wᵀ δ_1``, empty for "local". All contiguous. The gradient of the first state is ``through`` for
        "total" and ``carried`` for "local".

    Raises:
        torch.linalg.LinAlgError: after the sweep, a solve of "jacobian" has a relative residual above rtol.
    """
    grad_u = torch.empty_like(h, memory_format=torch.contiguous_format)
    for step_back in steps_back(grad_h, grad_last, h, weight, feedback, carried, through, u, h0, sweep):
        t, _, _, delta, carried, through = step_back
        grad_u[t] = delta
    if iterations is not None:
        iterations.zero_()
    nothing = h.new_empty(0)
    return (
        grad_u,
        nothing if sweep.inverse == "none" else carried.clone(memory_format=torch.contiguous_format),
        nothing if sweep.update == "local" else through.clone(memory_format=torch.contiguous_format),
    )


def steps_back(
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
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The recursion of ``backward``, with its arguments: t, λ_t, μ_t, δ_t, term(λ_t) and ``Wᵀ δ_t`` of each step, from
    the last (t = T - 1, counted from 0) to the first.
    """
    nonlinearity, inverse, update, step, clip, *_ = sweep
    zero = torch.zeros_like(h[0])
    carried = zero if carried is None or inverse == "none" else carried
    through = zero if through is None or update == "local" else through
    residuals = []
    for t in range(h.shape[0] - 1, -1, -1):
        displacement = carried
        if grad_h is not None:
            displacement = displacement + step * grad_h[t]
        if grad_last is not None and t == h.shape[0] - 1:
            displacement = displacement + step * grad_last
        adjoint = displacement + through
        delta = _through_activation(adjoint, h[t], nonlinearity)
        if inverse == "identity":
            carried = displacement
        elif inverse == "weight":
            carried = _apply(feedback, displacement)
        elif inverse == "layer":
            carried = _apply(feedback, _through_inverse(displacement, h[t], nonlinearity, clip))
        elif inverse == "difference":
            carried = _apply(feedback, _inverse_difference(displacement, h[t], nonlinearity, clip))
        elif inverse == "direct":
            before = h[t - 1] if t else zero if h0 is None else h0
            target = _inverse_activation(h[t] - displacement, nonlinearity, clip)
            carried = before + _apply(feedback, u[t] - target)
        elif inverse == "jacobian":
            carried, residual = _jacobian_term(displacement, h[t], weight, sweep)
            residuals.append(residual)
        if update == "total":
            through = _apply(weight.mT, delta)
        yield t, displacement, adjoint, delta, carried, through
    if residuals:
        check_residuals(torch.stack(residuals[::-1]), sweep, h.dtype)


def _through_activation(adjoint: Tensor, h: Tensor, nonlinearity: str) -> Tensor:
    """``a'(z) · adjoint`` from ``h = a(z)``: all three activations allow it, so only h is kept for backward."""
    if nonlinearity == "tanh":
        return adjoint * (1 - h.square())
    return torch.where(h <= 0, 0, adjoint) if nonlinearity == "relu" else adjoint


def _through_inverse(displacement: Tensor, h: Tensor, nonlinearity: str, clip: float) -> Tensor:
    """The linearized inverse of the activation, at h. relu counts as its own inverse."""
    if nonlinearity != "tanh":
        return _through_activation(displacement, h, nonlinearity)
    return displacement / (1 - h.clamp(clip - 1, 1 - clip).square())


def _inverse_activation(v: Tensor, nonlinearity: str, clip: float) -> Tensor:
    """``a⁻¹(clip v)``. relu counts as its own inverse."""
    if nonlinearity != "tanh":
        return ACTIVATIONS[nonlinearity](v)
    return v.clamp(clip - 1, 1 - clip).atanh()


def _inverse_difference(displacement: Tensor, h: Tensor, nonlinearity: str, clip: float) -> Tensor:
    """``a⁻¹(clip h) - a⁻¹(clip(h - λ))``, however small λ is."""
    if nonlinearity != "tanh":
        return torch.minimum(displacement, h) if nonlinearity == "relu" else displacement
    target = h - displacement
    a, b = h.clamp(clip - 1, 1 - clip), target.clamp(clip - 1, 1 - clip)
    difference = torch.where((a == h) & (b == target), displacement, a - b)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return torch.copysign(torch.log1p(2 * difference.abs() / ((1 - high) * (1 + low))) / 2, difference)


def _jacobian_term(displacement: Tensor, h: Tensor, weight: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor]:
    slope = _through_activation(torch.ones_like(h), h, sweep.nonlinearity)
    dtype = torch.promote_types(h.dtype, torch.float32)
    return regularized_term(slope.to(dtype)[..., None] * weight.to(dtype), displacement, sweep.reg)


def regularized_term(jacobian: Tensor, displacement: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """``Jᵀ y`` with ``(J Jᵀ + rI) y = λ``, and the relative residual of every solve; NaN and no residual for a sample
    that is not finite.

    Args:
        jacobian: [..., N, N], J of each sample, at least in single precision: half precision is factored in that.
        displacement: [..., N], λ.
        reg: r.
    """
    right = displacement.to(jacobian.dtype)[..., None]
    finite = (jacobian.isfinite() & right.isfinite()).all(dim=(-2, -1))[..., None, None]
    jacobian, right = torch.where(finite, jacobian, 0), torch.where(finite, right, 0)
    gram = jacobian @ jacobian.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(reg)
    factor, info = torch.linalg.cholesky_ex(gram)
    size = right.abs().amax(dim=-2, keepdim=True)  # in its unit no square over- or underflows
    size = torch.where(size == 0, 1, size)
    right = right / size
    solution = torch.cholesky_solve(right, factor)
    missed = right - jacobian @ (jacobian.mT @ solution) - reg * solution
    norms = (torch.linalg.vector_norm(vector, dim=(-2, -1)) for vector in (missed, right))
    residual = torch.where((right == 0).all(dim=(-2, -1)), 0, torch.div(*norms).nan_to_num(nan=torch.inf))
    term = torch.where(finite, size * (jacobian.mT @ solution), torch.nan)[..., 0]
    return term.to(displacement.dtype), torch.where(info == 0, residual, torch.inf)


def check_residuals(residuals: Tensor, sweep: Sweep, dtype: torch.dtype, op: str = "rnn") -> None:
    """Raises where the solve of "jacobian" missed its residual. On a GPU, reading them waits for it.

    ``residuals``: [T, B] or [T, B, H].
    """
    if residuals.numel() and residuals.max() > sweep.rtol:
        t, b, *head = torch.unravel_index(residuals.argmax(), residuals.shape)
        where = (int(t) + sweep.first, int(b), int(head[0]) if head else None)
        raise unsolved(*where, float(residuals.max()), sweep, dtype, op)


def unsolved(
    t: int, b: int, head: int | None, residual: float, sweep: Sweep, dtype: torch.dtype, op: str = "rnn"
) -> torch.linalg.LinAlgError:
    """What to raise where the solve of "jacobian" missed its residual, steps and samples counted from 0."""
    sample = f"sample {b}" if head is None else f"sample {b}, head {head}"
    return torch.linalg.LinAlgError(
        f"{op}: inverse='jacobian' could not be solved in {dtype_name(dtype)} at reg={sweep.reg:g}: "
        f"worst at time step {t}, {sample}, with a relative residual of {residual:.3g}, above rtol={sweep.rtol:g}; "
        "use a larger reg, a larger rtol or float64"
    )


def _apply(matrix: Tensor, state: Tensor) -> Tensor:
    """``matrix · state`` over the last axis, head by head where there are heads."""
    if matrix.dim() == 2:
        return state @ matrix.mT
    return torch.einsum("bhk,hnk->bhn", state, matrix)
