"""The Elman cell, ``h_t = a(u_t + W h_{t-1})``: one gate, and nothing kept but the states."""

import torch
from torch import Tensor

from tp_kernels.ops.recurrence.cell import CELLS, Cell, Step

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}
"""All three have a slope that follows from ``h = a(z)``: so only h is kept for backward."""


class Elman(Cell):
    """With one of three activations."""

    op = "rnn"
    inverses = (*Cell.inverses, "difference", "direct")
    without_states = ("identity", "weight")

    def __init__(self, nonlinearity: str) -> None:
        self.nonlinearity = nonlinearity
        self.name = f"rnn_{nonlinearity}"
        self.clips = nonlinearity == "tanh"

    def forward(self, u: Tensor, product: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, list[Tensor]]:
        return ACTIVATIONS[self.nonlinearity](u + product), []

    def back(self, adjoint: Tensor, step: Step) -> tuple[Tensor, Tensor, None]:
        delta = self._through_activation(adjoint, step.state)
        return delta, delta, None

    def term(
        self, inverse: str, displacement: Tensor, step: Step, clip: float
    ) -> tuple[list[Tensor], None, Tensor | None]:
        if inverse == "weight":
            return [displacement], None, None
        if inverse == "layer":
            return [self._through_inverse(displacement, step.state, clip)], None, None
        if inverse == "difference":
            return [self._inverse_difference(displacement, step.state, clip)], None, None
        target = self._inverse_activation(step.state - displacement, clip)
        return [step.u - target], None, step.before

    def linear(self, step: Step) -> tuple[None, list[Tensor]]:
        return None, [self._through_activation(torch.ones_like(step.state), step.state)]

    def saturated(self, h: Tensor, kept: Tensor, clip: float) -> Tensor:
        if self.nonlinearity == "identity":
            return torch.zeros_like(h, dtype=torch.bool)
        return h.abs() > 1 - clip if self.nonlinearity == "tanh" else h == 0

    def _through_activation(self, adjoint: Tensor, h: Tensor) -> Tensor:
        """``a'(z) · adjoint``."""
        if self.nonlinearity == "tanh":
            return adjoint * (1 - h.square())
        return torch.where(h <= 0, 0, adjoint) if self.nonlinearity == "relu" else adjoint

    def _through_inverse(self, displacement: Tensor, h: Tensor, clip: float) -> Tensor:
        """The linearized inverse of the activation, at h. relu is used as its own inverse."""
        if self.nonlinearity != "tanh":
            return self._through_activation(displacement, h)
        return displacement / (1 - h.clamp(clip - 1, 1 - clip).square())

    def _inverse_activation(self, v: Tensor, clip: float) -> Tensor:
        """``a⁻¹(clip v)``. relu is used as its own inverse."""
        if self.nonlinearity != "tanh":
            return ACTIVATIONS[self.nonlinearity](v)
        return v.clamp(clip - 1, 1 - clip).atanh()

    def _inverse_difference(self, displacement: Tensor, h: Tensor, clip: float) -> Tensor:
        """``a⁻¹(clip h) - a⁻¹(clip(h - λ))``, however small λ is."""
        if self.nonlinearity != "tanh":
            return torch.minimum(displacement, h) if self.nonlinearity == "relu" else displacement
        target = h - displacement
        a, b = h.clamp(clip - 1, 1 - clip), target.clamp(clip - 1, 1 - clip)
        difference = torch.where((a == h) & (b == target), displacement, a - b)
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        return torch.copysign(torch.log1p(2 * difference.abs() / ((1 - high) * (1 + low))) / 2, difference)


CELLS.update((cell.name, cell) for cell in map(Elman, ACTIVATIONS))
