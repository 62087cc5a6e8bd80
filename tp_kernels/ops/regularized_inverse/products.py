"""``regularized_inverse`` by torch's products and factorizations, for matrices that no GPU kernel of ours takes.

On any device. But for the decomposition of float64 at power 1/2 nothing waits for it: no choice depends on a value.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from tp_kernels.ops.regularized_inverse import reference

SMALLEST = 1e-8
"""The least ``√(smallest/largest eigenvalue)`` of ``WᵀW + rI`` that converges; float64 tells none below from zero."""

TOLERANCE = 1e-3
"""On ``‖I - G‖_F`` before the last step, which takes a deviation e of an eigenvalue to 3/4 e²."""


def _scales(smallest: float) -> list[float]:
    """The scale c of each step ``g → g (c/2 (3 - c² g))²`` that takes ``[smallest², 1]`` to 1.

    In terms of ``x = √g`` it is ``x → c/2 x (3 - c² x²)``. With ``c² = 3/(1 + l + l²)`` both ends of [l, 1] become the
    new lower end, and what is between them at most 1: the most that a cubic step can do. l is never taken below 0.1,
    though, which would send 1 itself to nearly 0, and the digits of those eigenvalues with it.
    """
    scales = []
    while smallest < 1 - 1e-9:
        low = max(smallest, 0.1)
        c = math.sqrt(3 / (1 + low + low**2))
        smallest = min(c / 2 * x * (3 - (c * x) ** 2) for x in (smallest, 1.0))
        scales.append(c)
    return scales


_SCALES = _scales(SMALLEST)


def forward(weight: Tensor, reg: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``reference.forward``, at power 1/2 and up to float32 without a decomposition."""
    if power == 1.0 or weight.dtype == torch.float64:
        return reference.forward(weight, reg, power)
    return polar(weight, reg)


def polar(weight: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
    """Power 1/2 by the scaled Newton–Schulz iteration on ``G = (WᵀW + rI)/size``, in float64.

    Each step multiplies P by a polynomial in G and G by its square, until G is I and P ``(WᵀW + rI)^{-1/2} Wᵀ``. The
    count of steps is that of the worst G, ``SMALLEST``. What fails is a matrix beyond that, up to float32.
    """
    if weight.shape[-2] < weight.shape[-1]:
        inverse, failed = polar(weight.mT, reg)
        return inverse.mT, failed
    batch, (m, n) = weight.shape[:-2], weight.shape[-2:]
    # Contiguous, so that the same products are taken in the same order whichever strides W has.
    wide = weight.reshape(math.prod(batch), m, n).double().contiguous()
    finite = wide.isfinite().all(dim=(-2, -1))
    gram = reference.gram(wide, reference.on_device_of(wide, reg))
    # Both bound the largest eigenvalue; which one is nearer depends on how alike the eigenvalues are.
    size = torch.minimum(torch.linalg.matrix_norm(gram), torch.linalg.matrix_norm(gram, 1))[:, None, None]
    gram, inverse = gram / size, wide.mT / size.sqrt()

    def step(scale: float, x: Tensor) -> Tensor:
        return torch.baddbmm(x, gram, x, beta=1.5 * scale, alpha=-0.5 * scale**3)

    for scale, _ in pairwise(_SCALES):
        inverse, gram = step(scale, inverse), step(scale, step(scale, gram))
    missed = torch.linalg.matrix_norm(gram - torch.eye(n, dtype=gram.dtype, device=gram.device))
    inverse = step(_SCALES[-1], inverse)
    failed = finite & ~(missed < TOLERANCE)
    inverse = torch.where((finite & ~failed)[:, None, None], inverse, torch.nan)
    return inverse.to(weight.dtype).reshape(*batch, n, m), failed.reshape(batch)
