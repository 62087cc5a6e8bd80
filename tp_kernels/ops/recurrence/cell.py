"""What a cell is: all that happens between two products with the recurrent weight. Everything else exists once.

    forward   state_t, kept_t       = cell.forward(u_t, W h_{t-1}, bias, state_{t-1})
    adjoint   δ_t, into_t, past_t   = cell.back(μ_t, …)              through_{t-1} = past_t + Wᵀ into_t
    inverse   sent_t, scale_t, by_t = cell.term(inverse, λ_t, …)     carried_{t-1} = by_t + scale_t ⊙ Σ_k P_k sent_{t,k}
    Jacobian  d_t, slopes_t         = cell.linear(…)                 J_t = diag(d_t) + Σ_k diag(slope_{t,k}) W_k

Here in plain PyTorch, for one step, on tensors [B, N] or [B, H, N]: the specification of ``csrc/cells``. A part that a
cell does not have (past, scale, by, d) is ``None``.

A state has S parts of N units each, side by side, the first of them h, which is put out and multiplied by W. So have
displacements and adjoints; the product with a matrix goes to the first part, and what goes past it to the last (which
may be the same: then they are summed up).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What backward knows of one step: of the forward pass, and what it was computed from.

    Attributes:
        state: [B, S N] or [B, H, S N].
        kept: the cell's own arrays, [B, N] or [B, H, N] each, in the order of its ``kept``.
        before: like ``state``: the one before.
        u: the input's share of the pre-activation; ``None`` where backward was not given it.
    """

    state: Tensor
    kept: Sequence[Tensor]
    before: Tensor
    u: Tensor | None


class Cell:
    """One cell. A new one is a subclass with an instance in ``CELLS``, and its arithmetic in ``csrc/cells``.

    Attributes:
        name: what ops and native code call it, such as "gru".
        op: the public function, as errors name it.
        gates: G; the recurrent weight is [G N, N], and ``u`` [T, B, G N].
        states: S, the parts of a state. The last of two is also the last of what is kept.
        kept: the names of what forward keeps for backward beside h.
        inverses: those that it has, beside "none".
        clips: whether "layer" divides by a slope that may vanish, which the rule's clip keeps from it.
        without_states: those of them in whose displacements there is no state: known at every step at once.
    """

    name: str
    op: str
    gates = 1
    states = 1
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
            before: [B, S N], the state before.
        """
        raise NotImplementedError

    def back(self, adjoint: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """δ, the gradient in ``u``, and that in ``W h_{t-1}``, both [B, G N]; what goes back past W, [B, N]."""
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

    def state(self, h: Tensor, kept: Tensor | None) -> Tensor:
        """The states, [T, B, S N], of h, [T, B, N], and what was kept, [T, B, K, N]; or of one step."""
        return h

    def plus(self, product: Tensor, past: Tensor | None) -> Tensor:
        """What goes back to the state before, [B, S N], of a product with a matrix and of what goes past it."""
        return product if past is None else past + product

    def linear(self, step: Step) -> tuple[Tensor | None, list[Tensor]]:
        """The step's Jacobian, of a state of one part: ``d`` and the slope of each block of W, all [B, N]."""
        raise NotImplementedError

    def jacobian(self, step: Step, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The same as a matrix, [B, S N, S N], in that dtype."""
        diagonal, slopes = self.linear(step)
        blocks = weight.to(dtype).unflatten(-2, (len(slopes), weight.shape[-1])).unbind(-3)
        jacobian = None if diagonal is None else torch.diag_embed(diagonal.to(dtype))
        for slope, block in zip(slopes, blocks, strict=True):
            part = slope.to(dtype)[..., None] * block
            jacobian = part if jacobian is None else jacobian + part
        return jacobian

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
