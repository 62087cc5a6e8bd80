"""Loading the native modules, the instruction set in use, and how tensors are handed to them."""

import os

import torch  # before the native module, so that one OpenMP runtime is loaded

from tp_kernels._backends import Support

try:
    import tp_kernels._cpu as cpu
except ImportError as error:
    cpu = None
    _cpu_error = f"the native module tp_kernels._cpu could not be imported ({error}); reinstall with a C++ compiler"


def _select_isa() -> None:
    wanted = os.environ.get("TPK_CPU")
    if cpu is None or not wanted:
        return
    if wanted not in cpu.isa_levels():
        raise RuntimeError(f"TPK_CPU must be one of {', '.join(cpu.isa_levels())} on this machine, got {wanted!r}")
    cpu.set_isa_level(wanted)


_select_isa()

_CPU_DTYPES = (torch.float32, torch.float64)


def cpu_available() -> Support:
    return (True, "") if cpu is not None else (False, _cpu_error)


def cpu_supports(tensor: torch.Tensor, **options: object) -> Support:
    if tensor.device.type != "cpu":
        return False, f"it computes on the CPU, and the tensors are on {tensor.device}"
    if tensor.dtype not in _CPU_DTYPES:
        return False, f"it computes float32 and float64, and the tensors are {str(tensor.dtype).removeprefix('torch.')}"
    return True, ""


def check_same_kind(op: str, first: torch.Tensor, *others: torch.Tensor | None) -> None:
    """The last check before addresses are handed over: a kernel reads all of them as the first one's dtype."""
    for other in others:
        if other is not None and (other.dtype != first.dtype or other.device != first.device):
            raise TypeError(
                f"{op}: all tensors must be {first.dtype} on {first.device}, got {other.dtype} on {other.device}"
            )


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def is_double(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float64
