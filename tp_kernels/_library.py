"""Registration with ``torch.library``: one definition, one implementation, one fake per op."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

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
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.device.type in _OF_THE_KERNELS and torch._C._has_storage(tensor)
        ):  # it stands for numbers: fake, batched, of another class
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
"""Of ``torch.export`` and ``make_fx(pre_dispatch=True)``, whose mode is on no stack of modes."""


def differentiates_ops() -> bool:
    """Whether ops are recorded to be differentiated later, or differentiated by ``torch.func``: then a call has to be
    ops that have derivatives. An autograd Function is not recorded, only what it calls. ``torch.compile`` traces both.
    """
    if torch.compiler.is_exporting():
        return True
    return not torch.compiler.is_compiling() and (
        torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    derivative: type[torch.autograd.Function] | None = None,
    cudagraph_unsafe: bool = False,
    twin: bool = False,
) -> Callable:
    """Define ``tp_kernels::<schema>``: the implementation picks the back-end, the fake gives shapes and dtypes.

    Args:
        derivative: an autograd Function that takes what the op takes, and whose ``forward`` calls the op: for graphs of
            ops. ``None``: backward through the op raises.
        cudagraph_unsafe: it must not be recorded in a CUDA graph; ``torch.compile`` is told.
        twin: some calls of the op wait for the device and must not be recorded, others may be. A tag is of an op, not
            of a call: so there is the same once more, under the name with ``WAITING`` behind it, for the former.

    Returns:
        What the op runs, to be called where ``dispatches_to_nobody``. A result that is not there is ``None``; from the
        op, which can give tensors only, one without elements.
    """
    name = schema.partition("(")[0]
    if twin:
        name_of_twin = schema.replace(name, name + WAITING, 1)
        register(name_of_twin, implementation, fake, derivative=derivative, cudagraph_unsafe=True)

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
    op = getattr(torch.ops.tp_kernels, name).default

    function = _of_one_level(derivative or _without_derivative(op))

    # Not torch.library.register_autograd: what that makes raises under torch.func, and has tangents of zero.
    def differentiable(*arguments: object) -> object:
        if "torch.utils.flop_counter" in sys.modules:
            from tp_kernels import _flops

            _flops.tell_counters()
        if torch.is_grad_enabled() or (torch._C._is_fwd_grad_enabled() and forward_ad._current_level >= 0):
            with enable_single_level_autograd_function():
                return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    if not op._schema.is_mutable:
        _LIBRARY.impl(name, differentiable, "Autograd")
    return run


def _of_one_level(function: type[torch.autograd.Function]) -> type:
    """The same for an op's Autograd key, where torch's dispatcher sees to the levels of ``torch.func``."""
    methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward")}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def _without_derivative(op: torch._ops.OpOverload) -> type[torch.autograd.Function]:
    """The op as a Function that raises in backward, in place of a gradient that is missing without a word."""

    class NoDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: object) -> object:
            return op(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            raise RuntimeError(f"{op}: there is no derivative; second derivatives are not implemented")

    return NoDerivative
