"""What runs here: ``python -m tp_kernels.info`` prints versions, the instruction set and each op's back-ends."""

import os
import platform

import numpy
import torch

import tp_kernels
from tp_kernels import _native
from tp_kernels._backends import NAMES, BackendTable
from tp_kernels.ops.regularized_inverse import op as regularized_inverse
from tp_kernels.ops.rnn import op as rnn

TABLES: tuple[BackendTable, ...] = (rnn.BACKENDS, regularized_inverse.BACKENDS)


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
    return lines


def backends() -> dict[tuple[str, str], str]:
    """For each (op, back-end): "yes", or the reason why it cannot run on this machine."""
    return {
        (table.op, name): "yes" if ok else f"no: {reason}"
        for table in TABLES
        for name in NAMES
        for ok, reason in [table.backends[name].available()]
    }


def main() -> None:
    for name, value in versions().items():
        print(f"{name:<16} {value}")
    print()
    for (op, name), answer in backends().items():
        print(f"{op:<20} {name:<10} {answer}")


if __name__ == "__main__":
    main()
