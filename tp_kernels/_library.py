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


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define ``tp_kernels::<schema>``: the implementation picks the back-end, the fake gives shapes and dtypes."""
    name = schema.partition("(")[0]

    @functools.wraps(implementation)
    def run(*arguments: object) -> object:
        device = next(argument.device.type for argument in arguments if isinstance(argument, torch.Tensor))
        with without_autocast(device):
            return implementation(*arguments)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tp_kernels::{name}", fake, lib=_LIBRARY)
