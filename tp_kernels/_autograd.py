"""What every ``autograd.Function`` of this library shares: it has first derivatives only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_derivatives_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward pass that raises where a second derivative is taken through it: never a derivative of zero.

    torch's own decorator raises only where a gradient that arrives requires a gradient itself. That of ``h.sum()`` is
    a constant, and the derivative through the saved tensors would be missing without a word.
    """
    refused = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple:
        if torch.is_grad_enabled():  # with create_graph=True only
            gradients = tuple(None if grad is None else grad.detach().requires_grad_() for grad in gradients)
        return refused(ctx, *gradients)

    return run
