"""Builds of the CUDA kernels where there is no GPU: emulated, and compiled for every architecture."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
RESOURCES = ROOT / "benchmarks" / "results" / "cuda_resources.json"


class NotBuilt(Exception):
    """What is missing on this machine."""


def _tool(name: str) -> str:
    """The tool's path: beside this Python, else of the system."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise NotBuilt(f"it is built with {name}, which is not there")
    return path


def _configured(*options: str) -> Path:
    """A build folder of these options and these tools, kept from run to run."""
    if sys.platform != "linux":
        raise NotBuilt(f"it is built on Linux only, and this is {sys.platform}")
    try:
        import pybind11
    except ImportError as error:
        raise NotBuilt(f"it is built with pybind11 ({error}); pip install -e '.[test]'") from error
    tools = [_tool(name) for name in ("cmake", "ninja", "c++")]
    settings = [
        f"-DCMAKE_MAKE_PROGRAM={tools[1]}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]
    folder = ROOT / "build" / f"tests-{sha256(repr((tools, settings)).encode()).hexdigest()[:12]}"
    run(tools[0], "-S", ROOT, "-B", folder, "-G", "Ninja", *settings)
    return folder


def run(*command: str | Path) -> str:
    """What it prints; an error shows it."""
    ran = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{ran.stdout[-8000:]}")
    return ran.stdout


def emulated() -> ModuleType:
    """``tp_kernels._cuda``, its kernels run by csrc/common/cuda_emulation.h on CPU tensors."""
    folder = _configured("-DTPK_EMULATE=1")
    run(_tool("cmake"), "--build", folder, "--target", "_cuda_emulated")
    (path,) = folder.glob("_cuda_emulated*.so")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_emulation() -> str:
    """What tests/emulation.cpp prints."""
    folder = _configured("-DTPK_EMULATE=1")
    run(_tool("cmake"), "--build", folder, "--target", "emulation")
    return run(folder / "emulation")


def check_launching(folder: Path) -> str:
    """What tests/launching.cpp prints, built there with a runtime that counts."""
    program, tests = folder / "launching", ROOT / "tests"
    options = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", tests / "cuda_runtime_fake")
    run(_tool("c++"), *options, tests / "launching.cpp", "-o", program)
    return run(program)


class Build(NamedTuple):
    folder: Path  # with the module
    resources: dict[str, object]  # what ptxas says: registers, bytes of shared and of local memory


def build() -> Build:
    """The module, for every architecture."""
    release = re.search(r"release ([\d.]+)", run(_tool("nvcc"), "--version"))[1]
    if tuple(map(int, release.split("."))) < (12, 8):
        raise NotBuilt(f"it is built with nvcc 12.8 or newer, and this is {release}")
    folder = _configured("-DTPK_CUDA=1")
    shutil.rmtree(folder / "CMakeFiles" / "kernels_cuda.dir", ignore_errors=True)  # a report is made by compiling
    report = run(_tool("cmake"), "--build", folder, "--target", "_cuda")
    return Build(folder, {"nvcc": release, "kernels": parse(report)})


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse(report: str) -> dict[str, dict[str, dict[str, int]]]:
    """ptxas -v, by architecture and kernel."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for entry in _ENTRY.finditer(report):
        of_rest = {kind: int(size) for size, kind in re.findall(r"(\d+) bytes (smem|lmem)", entry["rest"])}
        found.setdefault(f"sm_{entry['arch']}", {})[readable(entry["name"])] = {
            "registers": int(entry["registers"]),
            "shared": of_rest.get("smem", 0),
            "local": int(entry["stack"]) + int(entry["stores"]) + int(entry["loads"]) + of_rest.get("lmem", 0),
        }
    return {
        arch: dict(sorted(found[arch].items())) for arch in sorted(found, key=lambda arch: int(arch[3:].rstrip("a")))
    }


def readable(mangled: str) -> str:
    """``rnn_forward_kernel<128, 1>`` of the symbol's name; ``rnn_forward_mma_kernel<bfloat16, 1, 64>``, and
    ``rnn_activation_kernel`` of a kernel that is no template.
    """
    name = re.search(r"([a-z_]+_kernel)(I)?(?:NS\w?_\d+(\w+?)E|([fd]))?(?=L|E|$|v|P)", mangled)
    if not name[2]:
        return name[1]
    types = [name[3] or {"f": "float32", "d": "float64"}[name[4]]] if name[3] or name[4] else []
    values = re.findall(r"L[ib](\d+)E", mangled[name.end() :])
    return f"{name[1]}<{', '.join(types + values)}>"


if __name__ == "__main__":  # renews the table
    RESOURCES.write_text(json.dumps(build().resources, indent=1) + "\n")
