"""Loading the native modules, the instruction set in use, and how tensors are handed to them."""

import os

import torch  # before the native module, so that one OpenMP runtime is loaded

from tp_kernels._backends import Support, dtype_name

try:
    import tp_kernels._cpu as cpu
except ImportError as error:
    cpu = None
    _cpu_error = f"the native module tp_kernels._cpu could not be imported ({error}); reinstall with a C++ compiler"

try:
    import tp_kernels._cuda as cuda
except ModuleNotFoundError:
    cuda = None
    _cuda_error = "this installation has no CUDA module; reinstall with TPK_CUDA=1 set and nvcc on the PATH"
except ImportError as error:
    cuda = None
    _cuda_error = f"the native module tp_kernels._cuda could not be imported ({error}); reinstall with TPK_CUDA=1 set"


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
        return False, f"it computes float32 and float64, and the tensors are {dtype_name(tensor.dtype)}"
    return True, ""


def cuda_available() -> Support:
    if cuda is None:
        return False, _cuda_error
    problem = cuda.device_problem()
    return not problem, problem


def cuda_supports(
    tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,), **options: object
) -> Support:
    """``dtypes``: those that the op has kernels for."""
    if tensor.device.type != cuda.device_type:
        return False, f"it computes on a CUDA device, and the tensors are on {tensor.device}"
    if tensor.dtype not in dtypes:
        *others, last = map(dtype_name, dtypes)
        names = f"{', '.join(others)} and {last}" if others else last
        return False, f"it computes {names}, and the tensors are {dtype_name(tensor.dtype)}"
    return True, ""


def device_and_stream(tensor: torch.Tensor) -> dict[str, int]:
    """Where a CUDA kernel is to run: after what torch has queued for this tensor so far."""
    if tensor.device.type != "cuda":  # emulated
        return {"device": 0, "stream": 0}
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


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
