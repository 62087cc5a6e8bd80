"""``regularized_inverse`` in plain PyTorch: the specification every other back-end is checked against.

``P = (WᵀW + rI)^{-α} Wᵀ`` with α = 1 (factored by Cholesky) or α = 1/2 (by a singular value decomposition).
Half-precision weights are factored in float32. See README.md beside this file for the derivation of the gradient.
"""

import torch
from torch import Tensor


def forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Regularized inverse of each matrix.

    Args:
        weight: [..., m, n], any floating dtype, any strides.
        reg: [], r > 0.
        power: 1.0 or 0.5.

    Returns:
        ``P: [..., n, m]`` in the dtype of ``weight``, and ``failed: [...]``, bool: the matrices whose Gram matrix is
        not numerically positive definite. Their P is NaN, and so is that of matrices that are not finite.
    """
    if weight.shape[-2] < weight.shape[-1]:  # factor the smaller of the two Gram matrices: P(W) = P(Wᵀ)ᵀ
        inverse, failed = forward(weight.mT, reg, power)
        return inverse.mT, failed
    wide = _factoring_dtype(weight)
    finite = wide.isfinite().all(dim=(-2, -1))
    wide = torch.where(finite[..., None, None], wide, 0)
    r = on_device_of(wide, reg)
    if power == 1.0:
        factor, info = torch.linalg.cholesky_ex(gram(wide, r))
        inverse = torch.cholesky_solve(wide.mT, factor)
        failed = info != 0
    else:
        left, gains, right = torch.linalg.svd(wide, full_matrices=False)
        inverse = right.mT @ ((gains / gains.hypot(r.sqrt()))[..., None] * left.mT)
        failed = torch.zeros_like(finite)
    failed = failed | ~inverse.isfinite().all(dim=(-2, -1))
    inverse = torch.where((finite & ~failed)[..., None, None], inverse, torch.nan)
    return inverse.to(weight.dtype), failed & finite


def backward(grad: Tensor, weight: Tensor, inverse: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Gradients of a loss with respect to ``weight`` and ``reg``, given its gradient with respect to P.

    Args:
        grad: [..., n, m], ∂loss/∂P.
        weight: [..., m, n].
        inverse: [..., n, m], P as computed by ``forward``.
        reg: [].
        power: 1.0 or 0.5.

    Returns:
        ``grad_weight: [..., m, n]`` and ``grad_reg: []``.
    """
    if weight.shape[-2] < weight.shape[-1]:
        grad_weight, grad_reg = backward(grad.mT, weight.mT, inverse.mT, reg, power)
        return grad_weight.mT, grad_reg
    wide = _factoring_dtype(weight)
    r = on_device_of(wide, reg)
    grad_inverse = grad.to(wide)
    if power == 1.0:
        factor, _ = torch.linalg.cholesky_ex(gram(wide, r))
        solved = torch.cholesky_solve(grad_inverse, factor)
        grad_weight, grad_reg = inverse_gradients(solved, wide, inverse.to(wide))
    else:
        # No decomposition of a matrix that is not finite: its gradient is NaN, as its inverse is.
        finite = wide.isfinite().all(dim=(-2, -1))[..., None, None]
        _, gains, right = torch.linalg.svd(torch.where(finite, wide, 0), full_matrices=False)
        roots = gains.hypot(r.sqrt())
        # Divided differences of a^{-1/2} over the eigenvalues a of the Gram matrix: no pole where two coincide.
        product = roots[..., :, None] * roots[..., None, :]
        differences = -1 / (product * (roots[..., :, None] + roots[..., None, :]))
        grad_root = right @ (grad_inverse @ wide) @ right.mT
        grad_gram = right.mT @ (differences * (grad_root + grad_root.mT)) @ right / 2
        scaled = right.mT @ ((right @ grad_inverse) / roots[..., :, None])
        grad_weight = scaled.mT + 2 * wide @ grad_gram
        grad_weight = torch.where(finite, grad_weight, torch.nan)
        grad_reg = torch.where(finite[..., 0, 0], grad_gram.diagonal(dim1=-2, dim2=-1).sum(-1), torch.nan)
    return grad_weight.to(weight.dtype), grad_reg.sum().to(reg)


def inverse_gradients(solved: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Power 1, from ``solved = (WᵀW + rI)⁻¹ ∂loss/∂P``: ``∂W = (I - WP) solvedᵀ - W solved Pᵀ``, ``∂r = -<solved, P>``.

    ``grad_reg: [...]``, one for each matrix.
    """
    grad_weight = solved.mT - weight @ (inverse @ solved.mT + solved @ inverse.mT)
    return grad_weight, -(solved * inverse).sum(dim=(-2, -1))


def gram(weight: Tensor, r: Tensor) -> Tensor:
    """``WᵀW + rI``."""
    product = weight.mT @ weight
    product.diagonal(dim1=-2, dim2=-1).add_(r)
    return product


def condition(weight: Tensor, reg: Tensor) -> Tensor:
    """``(s_max² + r)/(s_min² + r)``, the condition of the smaller Gram matrix, in float64 and without waiting for a
    device: at most √n too small. Above 1e16, or NaN, where float64 cannot tell the matrix from a singular one.

    ``[...]``, from ``weight: [..., m, n]``.
    """
    if weight.shape[-2] < weight.shape[-1]:
        return condition(weight.mT, reg)
    wide = weight.double()
    r = on_device_of(wide, reg)
    unit = wide.abs().amax(dim=(-2, -1)).hypot(r.sqrt())[..., None, None]  # in it no square overflows
    matrix = gram(wide / unit, (r / unit / unit)[..., 0])
    factor, info = torch.linalg.cholesky_ex(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_solve(identity.expand_as(matrix), factor)
    return torch.where(info == 0, _largest_eigenvalue(matrix) * _largest_eigenvalue(inverse), torch.nan)


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix: ``‖A²‖_F/‖A‖_F``, the root of a weighted mean of their squares."""
    return torch.linalg.matrix_norm(matrix @ matrix) / torch.linalg.matrix_norm(matrix)


def on_device_of(tensor: Tensor, reg: Tensor) -> Tensor:
    """r in the dtype and on the device of ``tensor``: a number of the host is written there, and nothing waits."""
    if reg.device == tensor.device:
        return reg.to(tensor.dtype)
    return torch.full((), float(reg), dtype=tensor.dtype, device=tensor.device)


def _factoring_dtype(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
