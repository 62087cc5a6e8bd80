"""``rnn`` in plain PyTorch, one step at a time: the specification every other back-end is checked against.

Shapes with heads, ``[T, B, H, N]`` and ``[H, N, N]``, work as without: a product with a weight is over the last axis.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

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
    sweep: Sweep,
) -> tuple[Tensor, Tensor, Tensor]:
    """Displacements λ, adjoints μ and pre-activation gradients δ, from the last step to the first.

    ``λ_{t-1} = step g_{t-1} + term(λ_t)``, where the term is 0 (``inverse="none"``), λ_t (``"identity"``),
    ``P λ_t`` (``"weight"``) or ``P (λ_t / (1 - clip(h_t)²))`` (``"layer"``, with tanh; relu passes λ_t on where
    h_t > 0, the identity everywhere); ``μ_t = λ_t`` (``update="local"``)
    or ``μ_t = λ_t + Wᵀ δ_{t+1}`` (``"total"``); ``δ_t = a'(z_t) μ_t``. Back-propagation is "none" with "total".

    Args:
        grad_h: like ``h``, ∂loss/∂h; ``None`` is zero.
        grad_last: [B, N] or [B, H, N], added to the gradient of the last state; ``None`` is zero.
        h: [T, B, N] or [T, B, H, N], the states.
        weight: [N, N] or [H, N, N], W.
        feedback: like ``weight``, P; needed by "weight" and "layer", unused otherwise.
        carried, through: like ``h[0]``: term(λ) and ``Wᵀ δ`` of the step after the last one; ``None`` is zero.
        sweep: the rule.

    Returns:
        ``grad_u``, like ``h``: δ; ``carried``, like ``h[0]``: term(λ_1), empty for "none"; and ``through``, like
        ``h[0]``: ``Wᵀ δ_1``, empty for "local". All contiguous. The gradient of the first state is ``through`` for
        "total" and ``carried`` for "local".
    """
    grad_u = torch.empty_like(h, memory_format=torch.contiguous_format)
    for step_back in steps_back(grad_h, grad_last, h, weight, feedback, carried, through, sweep):
        t, _, _, delta, carried, through = step_back
        grad_u[t] = delta
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
    sweep: Sweep,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The recursion of ``backward``, with its arguments: t, λ_t, μ_t, δ_t, term(λ_t) and ``Wᵀ δ_t`` of each step, from
    the last (t = T - 1, counted from 0) to the first.
    """
    nonlinearity, inverse, update, step, clip = sweep
    zero = torch.zeros_like(h[0])
    carried = zero if carried is None or inverse == "none" else carried
    through = zero if through is None or update == "local" else through
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
        if update == "total":
            through = _apply(weight.mT, delta)
        yield t, displacement, adjoint, delta, carried, through


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


def _apply(matrix: Tensor, state: Tensor) -> Tensor:
    """``matrix · state`` over the last axis, head by head where there are heads."""
    if matrix.dim() == 2:
        return state @ matrix.mT
    return torch.einsum("bhk,hnk->bhn", state, matrix)
