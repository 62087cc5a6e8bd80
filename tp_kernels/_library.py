"""Registration with ``torch.library``: one definition, one implementation, one fake per op."""

import contextlib
import functools
from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("tp_kernels", "FRAGMENT")


# The types of device that hold tensors and have no autocast. They are asked for once, here: torch.compile of torch 2.11
# cannot trace the question, and torch.compiler.assume_constant_result, which would spare it that, imports the compiler.
_NO_AUTOCAST = tuple(device for device in ("lazy", "meta", "vulkan") if not torch.amp.is_autocast_available(device))


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for that type of device; some, such as "meta", have none."""
    return device not in _NO_AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast would change the dtype of what torch computes in between, behind the kernels' back."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()


WAITING = "_waiting"
"""What the name of an op's twin ends in, for calls that wait for the device."""


def find_op(name: str, *, waits: bool) -> torch._ops.OpOverloadPacket:
    """The op of this name or, for a call that waits for the device, its twin."""
    return getattr(torch.ops.tp_kernels, name + WAITING if waits else name)


def register(
    schema: str, implementation: Callable, fake: Callable, *, cudagraph_unsafe: bool = False, twin: bool = False
) -> None:
    """Define ``tp_kernels::<schema>``: the implementation picks the back-end, the fake gives shapes and dtypes.

    Args:
        cudagraph_unsafe: it must not be recorded in a CUDA graph; ``torch.compile`` is told.
        twin: some calls of the op wait for the device and must not be recorded, others may be. A tag is of an op, not
            of a call: so there is the same once more, under the name with ``WAITING`` behind it, for the former.
    """
    name = schema.partition("(")[0]
    if twin:
        register(schema.replace(name, name + WAITING, 1), implementation, fake, cudagraph_unsafe=True)

    @functools.wraps(implementation)
    def run(*arguments: object) -> object:
        device = next(argument.device.type for argument in arguments if isinstance(argument, torch.Tensor))
        with without_autocast(device):
            return implementation(*arguments)

    tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.cudagraph_unsafe,) if cudagraph_unsafe else ()))
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tp_kernels::{name}", fake, lib=_LIBRARY)
