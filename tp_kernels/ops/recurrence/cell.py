"""What a cell is: all that happens between two products with the recurrent weight. Everything else exists once.

    forward   state_t, kept_t       = cell.forward(u_t, W h_{t-1}, bias, h_{t-1})
    adjoint   δ_t, into_t, past_t   = cell.back(μ_t, …)              through_{t-1} = past_t + Wᵀ into_t
    inverse   sent_t, scale_t, by_t = cell.term(inverse, λ_t, …)     carried_{t-1} = by_t + scale_t ⊙ Σ_k P_k sent_{t,k}
    Jacobian  d_t, slopes_t         = cell.linear(…)                 J_t = diag(d_t) + Σ_k diag(slope_{t,k}) W_k

Here in plain PyTorch, for one step, on tensors [B, N] or [B, H, N]: the specification of ``csrc/cells``. A part that a
cell does not have (past, scale, by, d) is ``None``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What backward knows of one step: of the forward pass, and what it was computed from.

    Attributes:
        h: [B, N] or [B, H, N], the state.
        kept: the cell's own arrays, each like ``h``, in the order of its ``KEPT``.
        before: like ``h``, the state before.
        u: the input's share of the pre-activation; ``None`` where backward was not given it.
    """

    h: Tensor
    kept: Sequence[Tensor]
    before: Tensor
    u: Tensor | None


class Cell:
    """One cell. A new one is a subclass with an instance in ``CELLS``, and its arithmetic in ``csrc/cells``.

    Attributes:
        name: what ops and native code call it, such as "gru".
        op: the public function, as errors name it.
        gates: G; the recurrent weight is [G N, N], and ``u`` [T, B, G N].
        kept: the names of what forward keeps for backward beside the states.
        inverses: those that it has, beside "none".
        clips: whether "layer" divides by a slope that may vanish, which the rule's clip keeps from it.
        without_states: those of them in whose displacements there is no state: known at every step at once.
    """

    name: str
    op: str
    gates = 1
    kept: tuple[str, ...] = ()
    inverses: tuple[str, ...] = ("identity", "weight", "layer", "jacobian")
    clips = True
    without_states: tuple[str, ...] = ("identity",)

    def forward(self, u: Tensor, product: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state, and what is kept of the step.

        Args:
            u: [B, G N], the input's share.
            product: like ``u``: ``W h_{t-1}``.
            bias: [N] or [H, N], the cell's own; ``None`` is zero.
            before: [B, N], the state before.
        """
        raise NotImplementedError

    def back(self, adjoint: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """δ, the gradient in ``u``, and that in ``W h_{t-1}``, both [B, G N]; what reaches h_{t-1} past W, [B, N]."""
        raise NotImplementedError

    def into(self, grad_u: Tensor, kept: Tensor | None, in_place: bool) -> list[Tensor]:
        """The gradients in ``W h_{t-1}`` of all steps, [T, B, · N], from those in ``u``; one after another [T, B, G N].

        Args:
            grad_u: [T, B, G N].
            kept: [T, B, K, N], of the forward pass.
            in_place: whether the first may be written over.
        """
        return [grad_u]

    def biases(self, bias_ih: Tensor | None, bias_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of a layer's two, [G N] both or ``None``: what is added to the projected input, and the cell's own."""
        return (None, None) if bias_ih is None else (bias_ih + bias_hh, None)

    def term(
        self, inverse: str, displacement: Tensor, step: Step, clip: float
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """What each P multiplies, what scales the sum of these products, and what is added to it, all [B, N]."""
        raise NotImplementedError

    def linear(self, step: Step) -> tuple[Tensor | None, list[Tensor]]:
        """The step's Jacobian: ``d`` and the slope of each block of W, all [B, N]."""
        raise NotImplementedError

    def inverted(self, weight: Tensor, inverse: str) -> Tensor:
        """The blocks of W, [(H,) G N, N], whose P the rule needs: [(H,) N, N], or [(H,) K, N, N] for several."""
        return weight

    def saturated(self, h: Tensor, kept: Tensor, clip: float) -> Tensor:
        """Where an activation is so near to its end that its slope has nearly vanished: bool, [T, …]."""
        raise NotImplementedError


CELLS: dict[str, Cell] = {}
"""By name. Each package of an op puts its own in."""


def apply(matrix: Tensor, state: Tensor) -> Tensor:
    """``matrix · state`` over the last axis, head by head where there are heads."""
    if matrix.dim() == 2:
        return state @ matrix.mT
    return torch.einsum("bhk,hnk->bhn", state, matrix)
