"""A sequence in several calls: what a call sends back to the one whose last state it began from.

Under a rule with targets that is two things, the displacement λ_0 and the adjoint ``Jᵀ_1 μ_1``, and the gradient of a
tensor is one. So a last state brings a *relay* along: a tensor without memory of its own, an output of the same
autograd node, whose gradient is the pair. A call that is given the state as it came, the very tensor, sends the pair
there, and nothing to the state itself; so the gradients are those of one call, and a loss on the state is still told
apart.
"""

import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from tp_kernels._library import differentiates_ops

_ATTRIBUTE = "_tp_kernels_relay"
_FAR = 12
"""How many autograd nodes to search for a layer of this library."""


Relay = Tensor | tuple[Tensor | None, ...]


class _Brought(NamedTuple):
    """What a state brings along: its relay (``None`` from a rule that sends no displacements), of a module's state one
    for each layer and direction; and a mark of what is in the state: its version, or a copy under torch.compile, which
    has no versions. It is of this graph, so copies and files of a state go without.
    """

    relay: Relay | None
    mark: int | Tensor

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def new_relay(state: Tensor, kinds: int = 1) -> Tensor:
    """For the state, [B, N] or [B, H, N]: displacements of so many kinds side by side, and the adjoint, [2, …]."""
    shape = (2, *state.shape[:-1], kinds * state.shape[-1])
    return torch.empty_strided(shape, (0,) * len(shape), dtype=state.dtype, device=state.device)


def hand_on(state: Tensor, relay: Relay | None) -> Tensor:
    """Attaches the relay and the mark to a last state."""
    if torch.compiler.is_compiling():
        if relay is None:
            return state
        state = state.view_as(state)  # the attributes of what an autograd Function returns are not tracked
        setattr(state, _ATTRIBUTE, _Brought(relay, state.detach().clone()))
    elif state.requires_grad or isinstance(relay, Tensor) or (relay and relay[0] is not None):
        # A call that make_fx records has a relay, whether or not its tensors require gradients when it is recorded.
        setattr(state, _ATTRIBUTE, _Brought(relay, state._version))
    return state


def relay_of(state: Tensor | None, op: str, carries: bool, *, several: bool = False) -> Relay | None:
    """The relay of a state as it came; ``None`` for any other.

    Args:
        op: for messages to name.
        carries: whether the rule sends displacements.
        several: whether the state is a module's, with a relay for each layer and direction.

    Warns:
        UserWarning: no displacement can go back through a state that comes from a layer of this library.

    Raises:
        RuntimeError: under torch.compile: the state comes from a call that was not compiled; or, when the compiled
            function runs, it has been changed in place.
    """
    if state is None or not carries or not torch.is_grad_enabled():
        return None
    brought = getattr(state, _ATTRIBUTE, None)
    if brought is None and not state.requires_grad:
        return None
    fits = brought is not None and isinstance(brought.relay, tuple) == several
    if torch.compiler.is_compiling():
        return _relay_in_graph(state, brought, op) if fits else None
    if (
        brought is not None and state.is_leaf and not differentiates_ops()
    ):  # detached in place: it is the beginning of another graph
        delattr(state, _ATTRIBUTE)
    elif fits and _is_as_it_came(state, brought.mark):
        return brought.relay
    if state.is_leaf and _runs_again_reentrantly() and not isinstance(state, torch.nn.Parameter):
        _warn(op, "came through torch.utils.checkpoint with use_reentrant=True, which cuts it off: take False")
    elif _comes_from_layer(state):
        _warn(
            op,
            "was changed after a layer of tp_kernels had returned it, by the code in between or by a hook or wrapper "
            "of the layer. Hand on the last state as the layer returned it (not output[-1], a mask or a copy); to cut "
            "the sequence there, detach() the state",
        )
    return None


def relays_of(states: tuple[Tensor, ...], op: str, carries: bool) -> tuple[Tensor | None, ...] | None:
    """The relays of a module's state, all of whose parts are as one call returned them."""
    found = None
    for state in states:
        relays = relay_of(state, op, carries, several=True)
        if relays is None or (found is not None and any(a is not b for a, b in zip(found, relays, strict=False))):
            return None
        found = relays
    return found


def _is_as_it_came(state: Tensor, mark: int | Tensor) -> bool:
    return bool(_same(state, mark)) if isinstance(mark, Tensor) else state._version == mark


def _same(state: Tensor, copy: Tensor) -> Tensor:
    """NaN is as it came."""
    return ((state == copy) | (state != state)).all()


def _relay_in_graph(state: Tensor, brought: _Brought, op: str) -> Relay | None:
    """Under torch.compile, where nothing can be warned of: what changes the state in place is noticed when it runs."""
    if not isinstance(brought.mark, Tensor):
        raise RuntimeError(
            f"{op}: the state comes from a call that was not compiled: compile both calls, or detach() it"
        )
    torch._assert_async(
        _same(state, brought.mark),
        f"{op}: the state was changed in place after a layer had returned it: change a copy of it",
    )
    return brought.relay


def _runs_again_reentrantly() -> bool:
    """Whether this is the second run of a function under ``torch.utils.checkpoint`` with ``use_reentrant=True``: in a
    backward pass, and not by the hooks of the other way.
    """
    return torch._C._current_graph_task_id() != -1 and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _warn(op: str, what: str) -> None:
    warnings.warn(
        f"{op}: the state that this call begins with {what}. As it is, no displacement goes back through it: only the "
        "adjoint does, as a gradient, and step by step that is back-propagation",
        UserWarning,
        stacklevel=_stacklevel(),
    )


def _stacklevel() -> int:
    """The stack level, for ``_warn``, of the user's call."""
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
        if node.name() in ("RecurrenceFunctionBackward", "RecurrenceOpFunctionBackward"):
            return True
        seen += 1
        nodes += (before for before, _ in node.next_functions)
    return False
