"""A shim: CMakeLists.txt is the only list of sources, flags and architectures, and this runs it once."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def _tool(name: str) -> str:
    """The tool's path: of the build environment's package where it has one, else of the system."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"building tp_kernels needs {name}: python -m pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Configures, builds and installs every native module with one CMake run."""

    def run(self) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        target = ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()
        # Isolated builds use tools in a temporary folder: a cache that names another one's is of no use.
        stamp = {"python": sys.executable, "cmake": _tool("cmake"), "ninja": _tool("ninja")}
        stamp |= {"pybind11": pybind11.get_cmake_dir(), "cuda": os.environ.get("TPK_CUDA") or "0"}
        stamp |= {"architectures": os.environ.get("CUDAARCHS", "")}  # CMake reads it when it configures first
        stamp_file = build / "tools.json"
        if build.exists() and (not stamp_file.exists() or json.loads(stamp_file.read_text()) != stamp):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp_file.write_text(json.dumps(stamp))
        configure = [
            stamp["cmake"],
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={stamp['ninja']}",
            f"-DPython_EXECUTABLE={stamp['python']}",
            f"-Dpybind11_DIR={stamp['pybind11']}",
            f"-DTPK_CUDA={stamp['cuda']}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([stamp["cmake"], "--build", str(build)], check=True)
        subprocess.run([stamp["cmake"], "--install", str(build)], check=True)
        if stamp["cuda"] == "0":  # one that this Python built earlier would not fit the rest
            (target / "tp_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


setup(ext_modules=[Extension("tp_kernels._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
