"""The regularized inverse once more, in NumPy and in extended precision where the machine has it.

It shares no code with the library.
"""

import numpy as np
from torch import Tensor


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
