"""A sequence in several calls: what a call sends back to the one whose last state it began from.

Under a rule with targets that is two things, the displacement λ_0 and the adjoint ``Jᵀ_1 μ_1``, and the gradient of a
tensor is one. So a last state brings a *relay* along: a tensor without memory of its own, an output of the same
autograd node, whose gradient is the pair. A call that is given the state as it came, the very tensor, sends the pair
there, and nothing to the state itself; so the gradients are those of one call, and a loss on the state is still told
apart.
"""

import sys
import warnings

import torch
from torch import Tensor

_ATTRIBUTE = "_tp_kernels_relay"
_FAR = 12
"""Autograd nodes that are looked back for a layer of this library."""


def new_relay(state: Tensor) -> Tensor:
    """For the state, [B, N] or [B, H, N]: displacement and adjoint, [2, …]."""
    return torch.empty_strided((2, *state.shape), (0,) * (state.dim() + 1), dtype=state.dtype, device=state.device)


def hand_on(state: Tensor, relay: Tensor | None) -> Tensor:
    """The state, which brings its relay along, and what tells whether it has been changed in place: its version or,
    where torch.compile traces, which knows none, a copy.
    """
    if relay is None:
        return state
    if torch.compiler.is_compiling():
        state = state.view_as(state)  # the attributes of what an autograd Function returns are not tracked
        mark = state.detach().clone()
    else:
        mark = state._version
    setattr(state, _ATTRIBUTE, (relay, mark))
    return state


def relay_of(state: Tensor | None, op: str, carries: bool) -> Tensor | None:
    """The relay of a state as it came; ``None`` for any other.

    Args:
        op: for messages to name.
        carries: whether the rule sends displacements.

    Warns:
        UserWarning: the state comes from a layer of this library, and has been changed since.

    Raises:
        RuntimeError: under torch.compile: the state comes from a call that was not compiled; or, when the compiled
            function runs, it has been changed in place.
    """
    if state is None or not carries or not state.requires_grad or not torch.is_grad_enabled():
        return None
    relay, mark = getattr(state, _ATTRIBUTE, (None, None))
    if relay is None:
        unchanged = False
    elif not torch.compiler.is_compiling():
        unchanged = torch.equal(state, mark) if isinstance(mark, Tensor) else state._version == mark
    elif isinstance(mark, Tensor):
        same = (state == mark) | (state != state)  # NaN is as it came
        torch._assert_async(
            same.all(), f"{op}: the state was changed in place after a layer had returned it: change a copy of it"
        )
        unchanged = True
    else:
        raise RuntimeError(
            f"{op}: the state comes from a call that was not compiled: compile both calls, or detach() it"
        )
    if unchanged:
        return relay
    if not torch.compiler.is_compiling() and _comes_from_layer(state):
        warnings.warn(
            f"{op}: the state that this call begins with was changed after a layer of tp_kernels had returned it. No "
            "displacement goes back through it: only the adjoint does, as a gradient, and step by step that is "
            "back-propagation. Hand on the last state as the layer returned it (not output[-1], a mask or a copy); to "
            "cut the sequence there, detach() the state",
            UserWarning,
            stacklevel=_stacklevel(),
        )
    return None


def _stacklevel() -> int:
    """Of the call that is no code of this library, nor of torch's around modules: the one to look at."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("tp_kernels.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def _comes_from_layer(state: Tensor) -> bool:
    nodes, seen = [state.grad_fn], 0
    while nodes and seen < _FAR:
        node = nodes.pop(0)
        if node is None:
            continue
        if node.name() == "RecurrenceFunctionBackward":
            return True
        seen += 1
        nodes += (before for before, _ in node.next_functions)
    return False
