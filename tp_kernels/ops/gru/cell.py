"""The gated recurrent unit, in the form of ``torch.nn.GRU``: three gates, r, z and n in that order."""

import torch
from torch import Tensor

from tp_kernels.ops.recurrence.cell import CELLS, Cell, Step


class GRU(Cell):
    """``h_t = (1 - z) n + z h_{t-1}`` with ``r, z = σ(u + W h_{t-1})``, ``n = tanh(u_n + r q)`` and
    ``q = W_n h_{t-1} + b``.
    """

    name = op = "gru"
    gates = 3
    kept = ("r", "z", "n", "q")

    def forward(self, u: Tensor, product: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, list[Tensor]]:
        N = before.shape[-1]
        r, z = (u[..., : 2 * N] + product[..., : 2 * N]).sigmoid().chunk(2, dim=-1)
        q = product[..., 2 * N :] if bias is None else product[..., 2 * N :] + bias
        n = torch.tanh(u[..., 2 * N :] + r * q)
        return n + z * (before - n), [r, z, n, q]

    def back(self, adjoint: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        _, z, n, _ = step.kept
        z_mu, slopes = self.linear(step)
        of_r, of_z, into_n = (slope * adjoint for slope in slopes)
        delta = torch.cat((of_r, of_z, (1 - z) * (1 - n.square()) * adjoint), dim=-1)
        return delta, torch.cat((of_r, of_z, into_n), dim=-1), z_mu * adjoint

    def into(self, grad_u: Tensor, kept: Tensor, in_place: bool) -> list[Tensor]:
        N, r = kept.shape[-1], kept[..., 0, :]
        if not in_place:
            return [grad_u[..., : 2 * N], r * grad_u[..., 2 * N :]]
        grad_u[..., 2 * N :].mul_(r)
        return [grad_u]

    def biases(self, bias_ih: Tensor | None, bias_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """That of the state's share of n is multiplied by r: so it is the cell's own."""
        if bias_ih is None:
            return None, None
        n = len(bias_hh) // 3
        input_bias = bias_ih + bias_hh
        input_bias[2 * n :] = bias_ih[2 * n :]
        return input_bias, bias_hh[2 * n :]

    def term(
        self, inverse: str, displacement: Tensor, step: Step, clip: float
    ) -> tuple[list[Tensor], Tensor | None, Tensor]:
        r, z, n, q = step.kept
        if inverse == "weight":
            root = (1 - z).sqrt()
            return [root * r * displacement], root, z * displacement
        r, z = r.clamp(clip, 1 - clip), z.clamp(clip, 1 - clip)
        inner = (1 - z) * (1 - n.square()) * displacement
        of_z = (step.before - n) * displacement / (z * (1 - z))
        return [q * inner / (r * (1 - r)), of_z, r * inner], None, z * displacement

    def linear(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        r, z, n, q = step.kept
        inner = (1 - z) * (1 - n.square())
        return z, [inner * q * r * (1 - r), (step.before - n) * z * (1 - z), inner * r]

    def inverted(self, weight: Tensor, inverse: str) -> Tensor:
        N = weight.shape[-1]
        return weight[..., 2 * N :, :] if inverse == "weight" else weight.unflatten(-2, (3, N))

    def saturated(self, h: Tensor, kept: Tensor, clip: float) -> Tensor:
        """Of n, r and z together: [T, B, …, 3, N]."""
        r, z, n, _ = kept.unbind(-2)
        return torch.stack((n.abs() > 1 - clip, *((2 * gate - 1).abs() > 1 - clip for gate in (r, z))), dim=-2)


CELL = CELLS["gru"] = GRU()
