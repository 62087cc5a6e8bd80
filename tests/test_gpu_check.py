"""``scripts/gpu_check.sh`` without a GPU: every tool it calls is one that writes down how it was called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"
# Answers what the script asks, and fails where it is told to.
PYTHON = """#!/bin/bash
case "$*" in
*sys.executable*) dirname "$0" ;;
*get_device_capability*) echo 90a-real ;;
*) echo "$* | $TPK_CUDA $CUDAARCHS $TPK_REQUIRE_BACKENDS $PYTHONPATH" ;;
esac
[[ "$*" != *bfloat16* ]]
"""
SANITIZER = '#!/bin/bash\nwhile [[ $1 != */python ]]; do shift; done\n"$@"\n'
TRITON = ["build", "tests", "sanitizer", "bench", "bench-bf16", "bench-inverse", "bench-compile"]
CUDA = ["cuda-build", "cuda-tests", "cuda-bench", "cuda-inverse", "cuda-bf16", "cuda-sanitizer", "cuda-races"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")


def check(folder: Path, *halves: str) -> tuple[int, dict[str, str]]:
    """The exit status, and for each stage its result, in the order of the table, which is what is printed last."""
    tools = folder / "tools"
    for name in ("scripts", "tp_kernels", "tools"):
        (folder / name).mkdir()
    shutil.copy(SCRIPT, folder / "scripts")
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER), ("nvcc", ""), ("nvidia-smi", "")):
        (tools / name).write_text(text or "#!/bin/bash\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    command = ["bash", str(folder / "scripts" / SCRIPT.name), *halves]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stderr == ""
    summary = (folder / "out" / "summary.txt").read_text()
    assert ran.stdout.endswith(summary)
    rows = [line.split() for line in summary.splitlines()[1:]]
    return ran.returncode, {name: result for name, result, *_ in rows}


def test_it_goes_on_where_a_stage_fails(tmp_path):
    status, results = check(tmp_path)
    assert status == 1
    assert list(results) == ["build", "info", "nvidia-smi", *TRITON[1:], *CUDA]
    assert {name for name, result in results.items() if result != "passed"} == {"bench-bf16", "cuda-bf16"}
    assert results["cuda-bf16"] == "FAILED"


def test_each_half_by_itself(tmp_path):
    for half, stages in (("triton", TRITON), ("cuda", CUDA)):
        (tmp_path / half).mkdir()
        _, results = check(tmp_path / half, half)
        assert [name for name in results if name not in ("info", "nvidia-smi")] == stages
    for name, called in (
        ("build", f"setup.py build_ext --inplace |    {tmp_path}/triton"),
        ("bench-inverse", f"scripts/gpu_inverse.py {tmp_path}/triton/out/inverse.json |   reference,triton "),
    ):
        assert (tmp_path / "triton" / "out" / f"{name}.log").read_text().startswith(called)
    built = (tmp_path / "cuda" / "out" / "cuda-build.log").read_text()
    assert built == f"setup.py build_ext --inplace | 1 90a-real  {tmp_path}/cuda\n"


def test_another_half_is_refused(tmp_path):
    ran = subprocess.run(["bash", str(SCRIPT), "rocm"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "gpu_check.sh: the halves are triton and cuda, got 'rocm'\n"


def test_what_it_runs_is_there():
    """Its patterns match files."""
    text = SCRIPT.read_text()
    root = SCRIPT.parent.parent
    for pattern in ("tests/ops/test_*_triton.py", "tests/ops/test_*_cuda*.py", "tests/ops/test_rnn_library_chain.py"):
        assert pattern in text
        assert list(root.glob(pattern))
    assert (root / "scripts" / "gpu_inverse.py").exists()
