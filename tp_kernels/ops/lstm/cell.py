"""Long short-term memory, in the form of ``torch.nn.LSTM``: four gates, i, f, g and o in that order, and two states."""

import torch
from torch import Tensor

from tp_kernels.ops.recurrence.cell import CELLS, Cell, Step


class LSTM(Cell):
    """``c_t = f c_{t-1} + i g`` and ``h_t = o tanh(c_t)`` with ``i, f, o = σ(u + W h_{t-1})`` and
    ``g = tanh(u_g + W_g h_{t-1})``. The state is h and c, side by side.
    """

    name = op = "lstm"
    gates = 4
    states = 2
    kept = ("i", "f", "g", "o", "c")
    inverses = ("identity", "weight", "jacobian")

    def forward(self, u: Tensor, product: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, list[Tensor]]:
        N = product.shape[-1] // 4
        i, f, g, o = (u + product).split(N, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * before[..., N:] + i * g
        return torch.cat((o * c.tanh(), c), dim=-1), [i, f, g, o, c]

    def back(self, adjoint: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        slope_of_c, slopes = self._slopes(step)
        of_h, of_c = adjoint.chunk(2, dim=-1)
        of_c = of_c + slope_of_c * of_h
        i, f, g, o = slopes
        delta = torch.cat((i * of_c, f * of_c, g * of_c, o * of_h), dim=-1)
        return delta, delta, step.kept[1] * of_c

    @staticmethod
    def _slopes(step: Step) -> tuple[Tensor, list[Tensor]]:
        """``∂h_t/∂c_t`` at fixed gates; and of the pre-activations of i, f and g in c_t, and of o in h_t."""
        i, f, g, o, c = step.kept
        before = step.before.chunk(2, dim=-1)[1]
        tanh_c = c.tanh()
        slopes = [g * i * (1 - i), before * f * (1 - f), i * (1 - g.square()), tanh_c * o * (1 - o)]
        return o * (1 - tanh_c.square()), slopes

    def state(self, h: Tensor, kept: Tensor) -> Tensor:
        return torch.cat((h, kept[..., -1, :]), dim=-1)

    def plus(self, product: Tensor, past: Tensor) -> Tensor:
        return torch.cat((product, past), dim=-1)

    def term(self, inverse: str, displacement: Tensor, step: Step, clip: float) -> tuple[list[Tensor], Tensor, Tensor]:
        i, f, _, o, _ = step.kept
        of_h, of_c = displacement.chunk(2, dim=-1)
        of_c = of_c + o * of_h
        most = (i + f).clamp(min=1)
        root = (i / most).sqrt()
        return [root * of_c], root, f / most * of_c

    def jacobian(self, step: Step, weight: Tensor, dtype: torch.dtype) -> Tensor:
        slope_of_c, slopes = self._slopes(step)
        i, f, g, o = (
            slope.to(dtype)[..., None] * block
            for slope, block in zip(slopes, weight.to(dtype).chunk(4, dim=-2), strict=True)
        )
        of_gates, of_c = i + f + g, torch.diag_embed(step.kept[1].to(dtype))
        into_h = slope_of_c.to(dtype)[..., None]
        return torch.cat(
            (torch.cat((into_h * of_gates + o, into_h * of_c), dim=-1), torch.cat((of_gates, of_c), dim=-1)), dim=-2
        )

    def inverted(self, weight: Tensor, inverse: str) -> Tensor:
        N = weight.shape[-1]
        return weight[..., 2 * N : 3 * N, :]

    def saturated(self, h: Tensor, kept: Tensor, clip: float) -> Tensor:
        """Of g, i, f and o together: [T, B, …, 4, N]."""
        i, f, g, o, _ = kept.unbind(-2)
        return torch.stack((g.abs() > 1 - clip, *((2 * gate - 1).abs() > 1 - clip for gate in (i, f, o))), dim=-2)


CELL = CELLS["lstm"] = LSTM()
