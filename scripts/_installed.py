"""What check_install.sh runs with an installed package, from a folder that has no other one; for pytest, a plugin."""

import doctest
import importlib.machinery
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

SITE = Path(sysconfig.get_path("platlib")).resolve()
EVERY = 60  # of the tests that pytest has selected


def check_place(module: ModuleType) -> None:
    """It is the installed one, not one of a checkout."""
    if not Path(module.__file__).resolve().is_relative_to(SITE):
        sys.exit(f"{module.__name__} should have been imported from {SITE}, and was from {module.__file__}")


def native_module() -> None:
    """The CPU kernels' module loads by itself, without torch."""
    [suffix] = [s for s in importlib.machinery.EXTENSION_SUFFIXES if (SITE / "tp_kernels" / f"_cpu{s}").exists()]
    spec = importlib.util.spec_from_file_location("tp_kernels._cpu", SITE / "tp_kernels" / f"_cpu{suffix}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(f"native module: {module.build_info()['compiler']}, {', '.join(module.isa_levels())}")


def openmp_runtimes() -> set[str]:
    """The OpenMP libraries that this process has loaded: where they lie."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {path for *_, path in map(str.split, lines) if re.match(r"lib(gomp|omp|iomp5)\b", os.path.basename(path))}


def readme(path: str) -> None:
    """Every block of Python code runs, and those of a session (>>>) print what they say."""
    import torch

    import tp_kernels as tp
    from tp_kernels import _native

    check_place(tp)
    if _native.cpu is None:
        sys.exit(_native.cpu_available()[1])
    blocks = re.findall(r"^```python\n(.*?)^```", Path(path).read_text(), flags=re.MULTILINE | re.DOTALL)
    if not blocks:
        sys.exit(f"{path} has no block of Python code")
    for number, block in enumerate(blocks, 1):
        if block.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block, {}, f"block {number}", path, 0)
            if doctest.DocTestRunner().run(test).failed:
                sys.exit(f"{path}: block {number} of {len(blocks)} fails")
        else:
            exec(compile(block, f"{path}, block {number}", "exec"), {})
    print(f"{path}: {len(blocks)} blocks of Python code run")
    if not sys.platform.startswith("linux") or not _native.cpu.build_info()["openmp"]:
        return
    torch.set_num_threads(2)
    tp.rnn(torch.zeros(4, 64, 32), torch.eye(32))  # on both threads
    found = openmp_runtimes()
    print("OpenMP:", *sorted(found))
    if len(found) != 1:
        sys.exit(f"one OpenMP runtime must be loaded, and there are {len(found)}: two fight for the same processors")


def pytest_configure() -> None:
    import tp_kernels

    check_place(tp_kernels)


def pytest_collection_finish(session: object) -> None:
    """After -k has chosen: a sample of what it chose."""
    session.items[:] = session.items[::EVERY]


if __name__ == "__main__":
    {"module": native_module, "readme": readme}[sys.argv[1]](*sys.argv[2:])
