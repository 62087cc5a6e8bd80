"""Whether Triton kernels can run here, and what all of them have in common. Importing this imports no triton."""

import functools
import os

import torch

from tp_kernels._backends import Support, dtype_name

SMALLEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def import_error() -> str | None:
    """Why triton cannot be imported; ``None`` where it can."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation fails in many ways, and none may break `auto`
        return str(error)
    return None


@functools.cache
def _interpreter_error() -> str | None:
    """Why Triton's interpreter cannot run; ``None`` where it can."""
    import numpy
    import triton

    old = torch.torch_version.TorchVersion(triton.__version__) < "3.7"
    if old and torch.torch_version.TorchVersion(numpy.__version__) >= "2.4":
        return (
            f"the interpreter of triton {triton.__version__} makes numbers of arrays, which NumPy {numpy.__version__} "
            "refuses; python -m pip install 'numpy<2.4' or 'triton>=3.7'"
        )
    return None


def available() -> Support:
    error = import_error()
    if error is not None:
        return False, f"triton could not be imported ({error}); python -m pip install 'tp_kernels[triton]'"
    if interpreted() and _interpreter_error() is not None:
        return False, _interpreter_error()
    if not interpreted() and not torch.cuda.is_available():
        return False, "it computes on a CUDA device, and this torch can use none"
    return True, ""


def supports(tensor: torch.Tensor) -> Support:
    """What every kernel asks of its tensors."""
    if interpreted():
        if tensor.device.type != "cpu":
            return False, f"TRITON_INTERPRET is set: it computes on the CPU, and the tensors are on {tensor.device}"
    elif tensor.device.type != "cuda":
        return False, f"it computes on a CUDA device, and the tensors are on {tensor.device}"
    elif torch.cuda.get_device_capability(tensor.device) < SMALLEST_CAPABILITY:
        found, needed = torch.cuda.get_device_capability(tensor.device), SMALLEST_CAPABILITY
        return False, (
            f"it needs a compute capability of {needed[0]}.{needed[1]}, and {tensor.device} has {found[0]}.{found[1]}"
        )
    if tensor.dtype not in DTYPES:
        return False, (f"it computes float32, bfloat16 and float16, and the tensors are {dtype_name(tensor.dtype)}")
    return True, ""
