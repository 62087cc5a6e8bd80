"""All displacements of ``inverse="weight"`` at once: parallel over time, which back-propagation cannot be.

``λ_{t-1} = γ g_{t-1} + P λ_t`` has no state in it, so that λ_{t-k} is P^k λ_t plus what the sources in between give.
The sequential depth is about log₂T matrix products. Plain PyTorch, any device: the products are large, made for BLAS.
Powers of P are in float64. In float32 the error is no more than the sweep's; in float64, where there is no wider type
to square in, it grows like T units in the last place.
"""

import collections
import threading

import torch
from torch import Tensor

from tp_kernels._library import register


def worth_it(grad_h: Tensor | None, h: Tensor) -> bool:
    """Whether this measures faster than the sweep of the "cpu" back-end (``pytest --benchmark -k displacements``).

    A single sequence, whose steps are products of one row; one source; and so many steps that the powers of P, log₂T
    products of N × N, are few beside them. On other devices nothing has been measured yet, and the sweep is taken.
    """
    T, N = h.shape[0], h.shape[-1]
    return h.device.type == "cpu" and grad_h is None and h[0].numel() == N and N >= 256 and T >= 32 * N


def displacements(
    grad_h: Tensor | None, grad_last: Tensor | None, h: Tensor, feedback: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """``λ_T = γ g_T`` and ``λ_{t-1} = γ g_{t-1} + P λ_t``, with g_0 = 0.

    Args:
        grad_h: [T, B, N] or [T, B, H, N], the sources g_1 … g_T; ``None`` is zero.
        grad_last: [B, N] or [B, H, N], added to g_T; ``None`` is zero. One of the two must be there.
        h: like ``grad_h``: the states, for their shape.
        feedback: [N, N] or [H, N, N], P.
        step: γ.

    Returns:
        λ_1 … λ_T, like ``h``, and λ_0, like ``h[0]``. From one source by doubling, T B N² multiply-adds; from many,
        twice that.
    """
    # Squaring doubles a power's relative error: in float32, T of them would be worse than the sweep's T products.
    power = feedback.double()
    if grad_h is None:
        result = _from_last(step * grad_last, power, h.shape[0])
    else:
        sources = step * grad_h
        if grad_last is not None:
            sources[-1] += step * grad_last
        result = _from_all(sources.contiguous(), power)
    return result, _apply(feedback, result[:1])[0]


def _from_last(last: Tensor, power: Tensor, T: int) -> Tensor:
    """``P^{T-1} λ, …, P λ, λ``: the latest k of them times P^k are the k before, with k = 1, 2, 4, …"""
    result = last.new_empty((T, *last.shape))
    result[-1] = last
    known = 1
    while known < T:
        more = min(known, T - known)
        result[T - known - more : T - known] = _apply(power, result[T - more :])
        known += more
        if known < T:
            power = power @ power
    return result


def _from_all(sources: Tensor, power: Tensor) -> Tensor:
    """``λ_t = g_t + P λ_{t+1}``: the half of the steps at an odd distance from the end is a problem of the same kind
    with P², whose sources are ``g_t + P g_{t+1}``; each of the others is one product away from it.
    """
    T = sources.shape[0]
    if T == 1:
        return sources.clone()
    even, odd = sources[(T - 1) % 2 :: 2], sources[T % 2 :: 2]  # the distance from the end
    result = torch.empty_like(sources)
    solved = _from_all(odd + _apply(power, even[-len(odd) :]), power @ power)
    result[T % 2 :: 2] = solved
    result[-1] = sources[-1]
    result[(T - 1) % 2 : -1 : 2] = even[:-1] + _apply(power, solved[len(solved) - len(even) + 1 :])
    return result


_KEPT = 8
_kept: "collections.OrderedDict[tuple, tuple[Tensor, Tensor]]" = collections.OrderedDict()
_one_at_a_time = threading.Lock()


def power(matrix: Tensor, exponent: int) -> Tensor:
    """``matrix^exponent``, [N, N] or [H, N, N], in float64. The last few are kept, for other passes."""
    key = (exponent, matrix.shape, matrix.dtype, matrix.device)
    with _one_at_a_time:
        known = _kept.get(key)
    if known is None or not torch.equal(known[0], matrix):
        known = matrix.clone(), torch.linalg.matrix_power(matrix.double(), exponent)
        with _one_at_a_time:
            _kept[key] = known
            _kept.move_to_end(key)
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)
    return known[1]


def forget_powers() -> None:
    """Of all matrices."""
    with _one_at_a_time:
        _kept.clear()


def _apply(matrix: Tensor, states: Tensor) -> Tensor:
    """``matrix · state`` over the last axis, as one product for all steps; head by head where there are heads."""
    matrix = matrix.to(states.dtype)
    if matrix.dim() == 2:
        return states @ matrix.mT
    return torch.einsum("tbhk,hnk->tbhn", states, matrix).contiguous()


register(
    "recurrence_displacements(Tensor? grad_h, Tensor? grad_last, Tensor h, Tensor feedback, float step) "
    "-> (Tensor, Tensor)",
    displacements,
    lambda grad_h, grad_last, h, *rest: (h.new_empty(h.shape), h.new_empty(h.shape[1:])),
)
