"""What runs here: ``python -m tp_kernels.info`` prints versions, the instruction set and each op's back-ends."""

import argparse
import os
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

import tp_kernels
from tp_kernels import _native
from tp_kernels._backends import NAMES, BackendTable, dtype_name
from tp_kernels.ops.recurrence import op as recurrence
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.cuda import LARGEST_ON_ONE, cuda_path
from tp_kernels.ops.regularized_inverse import op as regularized_inverse

_AS_ON_AN_H100 = 1024  # units of a cluster

OPS = tuple(dict.fromkeys(cell.op for cell in CELLS.values()))
TABLES: tuple[BackendTable, ...] = (*map(recurrence.backends, OPS), regularized_inverse.BACKENDS)


def versions() -> dict[str, str]:
    """Versions and machine, one line each."""
    lines = {
        "tp_kernels": tp_kernels.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that this torch can use",
    }
    if _native.cpu is not None:
        build = _native.cpu.build_info()
        levels = ", ".join(_native.cpu.isa_levels())
        lines["instruction set"] = f"{_native.cpu.isa_level()} (of {levels}; TPK_CPU forces one)"
        lines["native module"] = f"{build['compiler']}, OpenMP {'on' if build['openmp'] else 'off: one thread'}"
    if _native.cuda is not None:
        build = _native.cuda.build_info()
        lines["CUDA module"] = f"{build['compiler']}, for {build['architectures']}"
    return lines


def backends() -> dict[tuple[str, str], str]:
    """For each (op, back-end): "yes", or the reason why it cannot run on this machine."""
    return {
        (table.op, name): "yes" if ok else f"no: {reason}"
        for table in TABLES
        for name in NAMES
        for ok, reason in [table.available(name)]
    }


def peak(dtype: torch.dtype, threads: int = 1) -> float:
    """Floating-point operations a second of fused multiply-adds on registers only, best of several runs.

    Args:
        dtype: float32 or float64.
        threads: how many threads run the loop at the same time.

    Raises:
        BackendUnavailableError: there is no native module.
    """
    ok, reason = _native.cpu_available()
    if not ok:
        raise tp_kernels.BackendUnavailableError(f"peak: {reason}")
    double = dtype == torch.float64

    def loop(iterations: int) -> float:
        return _native.cpu.multiply_add_loop(double=double, iterations=iterations)

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(20):
            start = time.perf_counter()
            operations = sum(pool.map(loop, [300_000] * threads))
            best = max(best, operations / (time.perf_counter() - start))
    return best


def cuda_path_of(shape: str) -> str:
    """Which way the "cuda" back-end of ``rnn`` takes for ``"N=512,dtype=float32"``, and why.

    Raises:
        ValueError: not of that form.
    """
    given = re.fullmatch(r"N=(\d+)(?:,dtype=(\w+))?", shape)
    dtype = getattr(torch, given[2] or "float32", None) if given else None
    if not isinstance(dtype, torch.dtype) or int(given[1]) < 1:
        raise ValueError(f"info: shape must be like 'N=512,dtype=float32', got {shape!r}")
    here = _native.cuda_available()[0]
    of_cluster = _native.cuda.recurrence_cluster_largest(0) if here else _AS_ON_AN_H100
    path = cuda_path(int(given[1]), dtype, of_cluster)
    device = "" if here else " (of an H100: no device is here)"
    if path is None:
        largest = LARGEST_ON_ONE.get(dtype)
        words = f"it keeps up to {largest} units of this dtype" if largest else "it does not compute this dtype"
        return f"rnn cuda {shape}{device}: none: {words}"
    return f"rnn cuda {shape}{device}: {path.name}: {path.reason}"


def _shape(text: str) -> str:
    try:
        return cuda_path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tp_kernels.info", description=__doc__.partition(":")[0])
    parser.add_argument("--peak", action="store_true", help="also measure this processor's multiply-add ceiling")
    parser.add_argument("--shape", type=_shape, help="also say which way the cuda back-end takes: N=512,dtype=float32")
    options = parser.parse_args(arguments)
    for name, value in versions().items():
        print(f"{name:<16} {value}")
    print()
    for (op, name), answer in backends().items():
        print(f"{op:<20} {name:<10} {answer}")
    if options.shape:
        print(f"\n{options.shape}")
    if options.peak:
        print()
        for threads in sorted({1, torch.get_num_threads()}):
            for dtype in (torch.float32, torch.float64):
                name = f"peak {dtype_name(dtype)}"
                print(f"{name:<16} {peak(dtype, threads) / 1e9:.1f} GFLOP/s, {threads} thread{'s' * (threads > 1)}")


if __name__ == "__main__":
    main()
