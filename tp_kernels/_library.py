"""Registration with ``torch.library``: one definition, one implementation, one fake per op."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

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


_OF_THE_KERNELS = ("cpu", "cuda")


def dispatches_to_nobody(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher would only call the implementation: nothing traces, transforms, counts or profiles.

    It takes as long as the rest of a short call.
    """
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
    )


def _is_plain(tensor: Tensor) -> bool:
    """A tensor of numbers, not one that stands for some: fake, batched, of another class."""
    return type(tensor) in _PLAIN and tensor.device.type in _OF_THE_KERNELS and torch._C._has_storage(tensor)


_PLAIN = (Tensor, torch.nn.Parameter)


def register(
    schema: str, implementation: Callable, fake: Callable, *, cudagraph_unsafe: bool = False, twin: bool = False
) -> Callable:
    """Define ``tp_kernels::<schema>``: the implementation picks the back-end, the fake gives shapes and dtypes.

    Args:
        cudagraph_unsafe: it must not be recorded in a CUDA graph; ``torch.compile`` is told.
        twin: some calls of the op wait for the device and must not be recorded, others may be. A tag is of an op, not
            of a call: so there is the same once more, under the name with ``WAITING`` behind it, for the former.

    Returns:
        What the op runs, to be called where ``dispatches_to_nobody``. A result that is not there is ``None``; from the
        op, which can give tensors only, one without elements.
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

    @functools.wraps(implementation)
    def filled(*arguments: object) -> object:
        results = run(*arguments)
        if isinstance(results, Tensor):
            return results
        like = next(argument for argument in arguments if isinstance(argument, Tensor))
        return tuple(like.new_empty(0) if result is None else result for result in results)

    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, filled, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tp_kernels::{name}", fake, lib=_LIBRARY)
    return run
