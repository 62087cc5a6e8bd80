"""What every ``autograd.Function`` of this library shares: it has first derivatives only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tp_kernels._library import without_autocast


class _Refusal(torch.autograd.Function):
    """Hands on the first ``count`` tensors, and raises where a derivative is taken through them in any of the rest."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        raise RuntimeError("tp_kernels: second derivatives are not implemented")


def first_derivatives_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward pass that raises where a second derivative is taken through it: never a derivative of zero.

    It is called with the saved tensors after ``ctx``: they are unpacked here, once, as checkpointing demands. It runs
    without autocast, as the forward pass did.

    ``torch.autograd.function.once_differentiable`` does so only where a gradient that arrives requires a gradient
    itself, and does not know what the results depend on: of ``h.sum()`` the second derivatives would be missing
    without a word, and those that ``torch.autograd.grad`` is asked for by name always.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple:
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            op = getattr(getattr(ctx, "options", None), "op", "tp_kernels")
            raise RuntimeError(
                f"{op}: what backward computes from was changed in place. If that is the output, change a copy of it, "
                f"output = output.clone(). {error}"
            ) from error
        device = next(tensor.device.type for tensor in saved if tensor is not None)
        with torch.no_grad(), without_autocast(device):
            found = backward(ctx, saved, *gradients)
        if not torch.is_grad_enabled():  # it is with create_graph=True only
            return found
        return _Refusal.apply(len(found), *found, *saved, *gradients)

    return run
