"""The maths once more, in NumPy and in extended precision where the machine has it.

It shares no code with the library, only the names in a ``Sweep``.
"""

import numpy as np
from torch import Tensor

from tp_kernels.rules import Sweep

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0), "identity": lambda z: z}
# Of the inverse, at h_t: relu's is taken as relu.
INVERSE_SLOPES = {
    "tanh": lambda lam, h, high: lam / (1 - np.clip(h, -high, high) ** 2),
    "relu": lambda lam, h, high: np.where(h > 0, lam, 0),
    "identity": lambda lam, h, high: lam,
}
SLOPES = {"tanh": lambda h: 1 - h**2, "relu": lambda h: (h > 0).astype(h.dtype), "identity": np.ones_like}


def extended(tensor: Tensor | None) -> np.ndarray | None:
    """The values of a tensor, exactly."""
    return None if tensor is None else tensor.detach().double().numpy().astype(np.longdouble)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """``A⁻¹`` by Gauss-Jordan elimination with row exchanges."""
    n = len(matrix)
    rows = np.hstack([matrix, np.eye(n, dtype=matrix.dtype)])
    for k in range(n):
        pivot = k + np.abs(rows[k:, k]).argmax()
        rows[[k, pivot]] = rows[[pivot, k]]
        rows[k] /= rows[k, k]
        factors = rows[:, k].copy()
        factors[k] = 0
        rows -= np.outer(factors, rows[k])
    return rows[:, n:]


def inverse_root(matrix: np.ndarray) -> np.ndarray:
    """``A^{-1/2}`` by the coupled Newton-Schulz iteration."""
    identity = np.eye(len(matrix), dtype=matrix.dtype)
    scale = np.abs(matrix).sum(axis=0).max()
    root, result = matrix / scale, identity
    for _ in range(200):
        step = (3 * identity - result.dot(root)) / 2
        root, result = root.dot(step), step.dot(result)
        if np.abs(step - identity).max() < 1e-9:  # quadratic convergence: exact after this step
            return result / np.sqrt(scale)
    raise ArithmeticError("Newton-Schulz does not converge: the case is too ill-conditioned for this oracle")


POWERS = {1.0: inverse, 0.5: inverse_root}


def regularized_inverse(weight: np.ndarray, reg: float, power: float) -> np.ndarray:
    """``(WᵀW + rI)^{-α} Wᵀ`` of each matrix."""
    if weight.shape[-2] < weight.shape[-1]:
        return regularized_inverse(weight.swapaxes(-1, -2), reg, power).swapaxes(-1, -2)
    result = np.empty_like(weight.swapaxes(-1, -2))
    for index in np.ndindex(weight.shape[:-2]):
        w = weight[index]
        result[index] = POWERS[power](w.T.dot(w) + reg * np.eye(w.shape[1], dtype=w.dtype)).dot(w.T)
    return result


def regularized_inverse_gradients(
    grad: np.ndarray, weight: np.ndarray, reg: float, power: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradients in W and r, by the chain rule over ``A = WᵀW + rI``, ``X = A^{-α}``, ``P = X Wᵀ``.

    The derivative of ``A^{-α}`` along E is the upper right block of the same function of ``[[A, E], [0, A]]``, and
    it is its own adjoint because A is symmetric. The third result is the size of the terms that the gradient in r,
    ``-α <A⁻¹ grad, P>``, sums up: what its rounding errors are relative to.
    """
    if weight.shape[-2] < weight.shape[-1]:
        swapped = (array.swapaxes(-1, -2) for array in (grad, weight))
        grad_weight, grad_reg, size = regularized_inverse_gradients(*swapped, reg, power)
        return grad_weight.swapaxes(-1, -2), grad_reg, size
    grad_weight, grad_reg, size = np.empty_like(weight), np.zeros((), weight.dtype), 0.0
    for index in np.ndindex(weight.shape[:-2]):
        g, w = grad[index], weight[index]
        n = w.shape[1]
        gram = w.T.dot(w) + reg * np.eye(n, dtype=w.dtype)
        direction = g.dot(w) + g.dot(w).T
        blocks = POWERS[power](np.block([[gram, direction], [np.zeros_like(gram), gram]]))
        root, grad_gram = blocks[:n, :n], blocks[:n, n:] / 2
        grad_weight[index] = 2 * w.dot(grad_gram) + root.dot(g).T
        grad_reg += np.trace(grad_gram)
        size += power * float(_norm(inverse(gram).dot(g)) * _norm(root.dot(w.T)))
    return grad_weight, grad_reg, size


def _norm(matrix: np.ndarray) -> np.ndarray:
    return np.sqrt((matrix**2).sum())


def residual(found: np.ndarray, weight: np.ndarray, reg: float, power: float) -> float:
    """By how much P misses ``A P = Wᵀ`` (α = 1) or ``P Pᵀ A = WᵀW`` (α = 1/2), relative to the products' size."""
    if weight.shape[-2] < weight.shape[-1]:
        return residual(found.swapaxes(-1, -2), weight.swapaxes(-1, -2), reg, power)
    worst = 0.0
    for index in np.ndindex(weight.shape[:-2]):
        p, w = found[index], weight[index]
        gram = w.T.dot(w) + reg * np.eye(w.shape[1], dtype=w.dtype)
        if power == 1.0:
            miss, size = gram.dot(p) - w.T, _norm(gram) * _norm(p)
        else:
            miss, size = p.dot(p.T).dot(gram) - w.T.dot(w), _norm(p) ** 2 * _norm(gram)
        worst = max(worst, float(_norm(miss) / size) if size else 0.0)
    return worst


def rnn_forward(u: np.ndarray, weight: np.ndarray, h0: np.ndarray | None, nonlinearity: str) -> np.ndarray:
    """``h_t = a(u_t + W h_{t-1})``; heads are independent layers."""
    if u.ndim == 4:
        starts = [None] * u.shape[2] if h0 is None else h0.swapaxes(0, 1)
        heads = zip(np.moveaxis(u, 2, 0), weight, starts, strict=True)
        return np.stack([rnn_forward(*head, nonlinearity) for head in heads], axis=2)
    states = [np.zeros_like(u[0]) if h0 is None else h0]
    for u_t in u:
        states.append(ACTIVATIONS[nonlinearity](u_t + states[-1].dot(weight.T)))
    return np.stack(states[1:])


def jacobian_term(lam: np.ndarray, h: np.ndarray, weight: np.ndarray, sweep: Sweep) -> np.ndarray:
    """``(JᵀJ + rI)⁻¹ Jᵀ λ`` of each sample, J = D W: solved in float64, then refined in extended precision."""
    jacobians = SLOPES[sweep.nonlinearity](h)[:, :, None] * weight
    plain = jacobians.astype(np.float64)
    gram = plain.swapaxes(-1, -2) @ plain + sweep.reg * np.eye(len(weight))
    right = np.einsum("bij,bi->bj", jacobians, lam)
    result = np.zeros_like(right)
    for _ in range(3):
        products = np.einsum("bij,bi->bj", jacobians, np.einsum("bij,bj->bi", jacobians, result))
        missed = right - products - sweep.reg * result
        result = result + np.linalg.solve(gram, missed.astype(np.float64)[..., None])[..., 0]
    return result


def target_before(
    v: np.ndarray, h: np.ndarray, before: np.ndarray, u: np.ndarray, feedback: np.ndarray, sweep: Sweep
) -> np.ndarray:
    """``v_{t-1}`` of ``v_t``, by the inverse of the whole layer."""
    high = 1 - sweep.clip
    activation = {"tanh": lambda x: np.arctanh(np.clip(x, -high, high)), "relu": lambda x: np.maximum(x, 0)}
    invert = activation.get(sweep.nonlinearity, lambda x: x)
    inverse = (invert(v) - u).dot(feedback.T)
    return inverse if sweep.inverse == "direct" else before + inverse - (invert(h) - u).dot(feedback.T)


def displacements(
    grad: np.ndarray,
    u: np.ndarray | None,
    h: np.ndarray,
    h0: np.ndarray | None,
    weight: np.ndarray,
    feedback: np.ndarray | None,
    sweep: Sweep,
) -> np.ndarray:
    """``λ_0 … λ_T`` of algorithm.md's section 3; no gradient arrives at ``h_0``."""
    terms = {
        "none": lambda lam, h_t: np.zeros_like(lam),
        "identity": lambda lam, h_t: lam,
        "weight": lambda lam, h_t: lam.dot(feedback.T),
        "jacobian": lambda lam, h_t: jacobian_term(lam, h_t, weight, sweep),
        "layer": lambda lam, h_t: INVERSE_SLOPES[sweep.nonlinearity](lam, h_t, 1 - sweep.clip).dot(feedback.T),
    }
    before = np.concatenate([np.zeros_like(h[:1]) if h0 is None else h0[None], h[:-1]])

    def term(lam: np.ndarray, t: int) -> np.ndarray:
        if sweep.inverse in terms:
            return terms[sweep.inverse](lam, h[t])
        return before[t] - target_before(h[t] - lam, h[t], before[t], u[t], feedback, sweep)

    result = [sweep.step * grad[-1]]
    for t in range(len(h) - 1, 0, -1):
        result.append(sweep.step * grad[t - 1] + term(result[-1], t))
    result.append(term(result[-1], 0))
    return np.stack(result[::-1])


def weight_gradient(delta: np.ndarray, h: np.ndarray, h0: np.ndarray | None) -> np.ndarray:
    """``∂W = Σ_t δ_tᵀ h_{t-1}``, for each head where there are heads."""
    before = np.concatenate([np.zeros_like(h[:1]) if h0 is None else h0[None], h[:-1]])
    if h.ndim == 4:
        starts = before[0].swapaxes(0, 1)
        return np.stack([weight_gradient(delta[:, :, i], h[:, :, i], starts[i]) for i in range(h.shape[2])])
    n = h.shape[-1]
    return delta.reshape(-1, n).T.dot(before.reshape(-1, n))


def rnn_backward(
    grad: np.ndarray,
    u: np.ndarray | None,
    h: np.ndarray,
    h0: np.ndarray | None,
    weight: np.ndarray,
    feedback: np.ndarray | None,
    sweep: Sweep,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients in u, W and h_0 of algorithm.md's section 4. Back-propagation is "none" with "total"."""
    if h.ndim == 4:
        none = [None] * h.shape[2]
        starts = none if h0 is None else h0.swapaxes(0, 1)
        matrices = none if feedback is None else feedback
        inputs = none if u is None else np.moveaxis(u, 2, 0)
        heads = zip(np.moveaxis(grad, 2, 0), inputs, np.moveaxis(h, 2, 0), starts, weight, matrices, strict=True)
        deltas, weights, firsts = zip(*(rnn_backward(*head, sweep) for head in heads), strict=True)
        return np.stack(deltas, axis=2), np.stack(weights), np.stack(firsts, axis=1)
    lam = displacements(grad, u, h, h0, weight, feedback, sweep)
    slope = SLOPES[sweep.nonlinearity](h)
    delta = slope * lam[1:]
    if sweep.update == "total":
        for t in range(len(h) - 2, -1, -1):
            delta[t] = slope[t] * (lam[t + 1] + delta[t + 1].dot(weight))
    return delta, weight_gradient(delta, h, h0), delta[0].dot(weight) if sweep.update == "total" else lam[0]
