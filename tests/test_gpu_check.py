"""``scripts/gpu_check.sh`` without a GPU: every tool it calls is one that writes down how it was called. What it calls
runs on the CPU.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
# Answers what the script asks, and fails where it is told to.
PYTHON = """#!/bin/bash
case "$*" in
*sys.executable*) dirname "$0" ;;
*sysconfig*) echo .fake.so ;;
*is_available*) [[ -z $NO_GPU ]] ;;
*tp_kernels._cuda*) [[ -z $NOT_BUILT ]] ;;
*) echo "$* | $TPK_CUDA $CUDAARCHS $TPK_REQUIRE_BACKENDS $PYTHONPATH" ;;
esac || exit 1
[[ $* != $FAILS ]]
"""
TIMEOUT = (
    '#!/bin/bash\nif [[ $* == *$TIMES_OUT* ]]; then exit 124; fi\nwhile [[ $1 == --* ]]; do shift; done\nshift\n"$@"\n'
)
SANITIZER = '#!/bin/bash\nwhile [[ $1 != */python ]]; do shift; done\n"$@"\n'
PATHS = ["cuda", "cluster", "chain", "triton", "inverse"]
TIMES = ["times-cuda", "times-triton", "times-torch"]
FIRST = ["nvidia-smi", "info", *PATHS, "tests", *TIMES]
FULL = [
    *("nvidia-smi", "info", "tests", *TIMES, "map-cuda", "map-triton", "inverse", "memcheck", "racecheck"),
    *("graphs-cuda", "graphs-cluster", "graphs-chain", "graphs-triton", "graphs-compile"),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")


class Call:
    """The script in a folder of its own, with tools that are not what they seem.

    built: whether the native modules are there; of: what the note beside them says of their sources; words:
    environment.
    """

    def __init__(self, folder: Path, *arguments: str, built: bool = True, of: str | None = None, **words: str) -> None:
        self.folder, self.out = folder, folder / "out" / arguments[0]
        tools = folder / "tools"
        for name in ("scripts", "tp_kernels", "tools", "csrc", "build"):
            (folder / name).mkdir()
        for name in ("csrc/kernel.cu", "CMakeLists.txt", "setup.py"):
            (folder / name).write_text(name)
        shutil.copy(SCRIPT, folder / "scripts")
        for name, text in (
            ("python", PYTHON),
            ("timeout", TIMEOUT),
            ("compute-sanitizer", SANITIZER),
            ("nvidia-smi", "#!/bin/bash\necho /usr/bin/a-gpu\n"),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.stamp = folder / "build" / "gpu_sources.sha256"
        if built:
            self.stamp.write_text(self.sources() if of is None else of)
        environment = {"FAILS": "nothing", "TIMES_OUT": "nothing"} | words
        environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(folder / "out")}
        command = ["bash", str(folder / "scripts" / SCRIPT.name), *arguments]
        self.ran = subprocess.run(command, capture_output=True, text=True, env=environment)

    def sources(self) -> str:
        """What the script notes of what it builds from."""
        lines = ""
        for name in ("CMakeLists.txt", "csrc/kernel.cu", "setup.py"):
            lines += f"{hashlib.sha256((self.folder / name).read_bytes()).hexdigest()}  {name}\n"
        return f"{hashlib.sha256(lines.encode()).hexdigest()}  -\n"

    def results(self) -> dict[str, str]:
        """By stage, in the order of the table, which is printed last."""
        assert self.ran.stderr == ""
        summary = (self.out / "summary.txt").read_text()
        assert self.ran.stdout.endswith(f"{summary}logs and results: {self.out}\n")
        return {line[:17].strip(): line[17:26].strip() for line in summary.splitlines()[1:]}

    def log(self, stage: str) -> str:
        return (self.out / f"{stage}.log").read_text()


def test_first(tmp_path):
    call = Call(tmp_path, "first")
    assert call.results() == dict.fromkeys(FIRST, "ok")
    assert call.ran.returncode == 0
    ending = f"|   reference,triton,cuda {tmp_path}\n"
    assert call.log("chain") == f"scripts/gpu_smoke.py chain --out {call.out}/chain.json {ending}"
    assert call.log("times-torch") == (
        f"scripts/gpu_times.py --contenders torch --seconds 14 --out {call.out}/times-torch.json --N 128,256 --B 16 "
        f"{ending}"
    )
    assert "-n 8 --dist worksteal" in call.log("tests")


def test_full(tmp_path):
    call = Call(tmp_path, "full")
    assert call.results() == dict.fromkeys(FULL, "ok")
    assert call.ran.returncode == 0
    assert "-n 15 --dist worksteal" in call.log("tests")


def test_a_fault_and_a_hang_take_down_one_path_only(tmp_path):
    call = Call(tmp_path, "first", FAILS="*gpu_smoke.py?cluster*", TIMES_OUT="gpu_smoke.py chain")
    assert call.results() == dict.fromkeys(FIRST, "ok") | {"cluster": "failed", "chain": "timed out"}
    assert call.ran.returncode == 1
    (row,) = (line for line in call.ran.stdout.splitlines() if line.startswith("cluster "))
    assert "cluster.log" in row
    assert "scripts/gpu_smoke.py cluster" in row


@pytest.mark.parametrize("why", ["it was not built", "it cannot be imported", "it was built from other sources"])
def test_it_builds_on_the_spot(tmp_path, why):
    words = {
        "it was not built": {"built": False},
        "it cannot be imported": {"NOT_BUILT": "1"},
        "it was built from other sources": {"of": "of others  -\n"},
    }
    call = Call(tmp_path, "first", **words[why])
    assert call.results() == dict.fromkeys(["build", *FIRST], "ok")
    assert call.log("build").startswith("setup.py -q build_ext --inplace | 1 90a-real ")
    assert call.stamp.read_text() == call.sources()


def test_without_a_gpu(tmp_path):
    call = Call(tmp_path, "full", NO_GPU="1")
    assert call.ran.returncode == 1
    assert call.ran.stdout == ""
    assert call.ran.stderr.startswith("gpu_check.sh: there is no CUDA device that the torch of ")
    assert not call.out.exists()


@pytest.mark.parametrize("which", ["first", "full"])
def test_the_script_itself_on_a_cpu(tmp_path, which):
    """What there is to run without a GPU, on the back-ends that need none."""
    call = Call(tmp_path, which, "--device", "cpu", built=False, NO_GPU="1")
    results = call.results()
    assert call.ran.returncode == 0
    assert set(results.values()) == {"ok", "skipped"}
    path = "chain" if which == "first" else "graphs-chain"
    assert f"gpu_smoke.py {path} --device cpu --backend reference --out" in call.log(path)
    assert "--device cpu --T 8,4" in call.log("times-cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what to do is missing"),
        (("rocm",), "prebuild, first and full are there, got 'rocm'"),
        (("first", "--device", "tpu"), "--device must be cuda or cpu, got 'tpu'"),
        (("full", "triton"), "got 'triton', which means nothing here"),
    ],
)
def test_another_call_is_refused(arguments, message, tmp_path):
    ran = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"gpu_check.sh: {message}; usage: scripts/gpu_check.sh prebuild|first|full [--device cuda|cpu]\n"
    )


def test_what_it_runs_is_there():
    """Its patterns match files."""
    text = SCRIPT.read_text()
    for pattern in ("test_*_triton.py", "test_*_cuda*.py", "test_*_chain.py", "test_*_products.py"):
        assert f"tests/ops/{pattern}" in text
        assert list((ROOT / "tests" / "ops").glob(pattern))
    assert (ROOT / "scripts" / "gpu_inverse.py").exists()


# --- what it calls


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def call_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return int(ended.value.code)


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With small cases."""
    module = script("gpu_smoke")
    small = {
        path: tuple(replace(case, T=3, B=min(case.B, 3), N=min(case.N, 9)) for case in cases)
        for path, cases in module.CASES.items()
    }
    monkeypatch.setattr(module, "CASES", small)
    monkeypatch.setattr(module, "GRAPHS", {path: (backend, 9) for path, (backend, _) in module.GRAPHS.items()})
    return module


ON_CPU = ("--device", "cpu", "--backend", "reference")


def test_smoke(smoke, monkeypatch, tmp_path):
    for path in (*smoke.CASES, "inverse", *smoke.GRAPHS):
        assert call_main(smoke, monkeypatch, path, *ON_CPU, "--out", str(tmp_path / "out.json")) == 0
        report = json.loads((tmp_path / "out.json").read_text())
        assert report["path"] == path
        assert all(check["passed"] and check["error"] < check["allowed"] for check in report["checks"])
        # It is another computation that a result is compared with; a repetition has the same bits.
        assert all((check["error"] == 0) == (path in smoke.GRAPHS) for check in report["checks"])


def test_smoke_sees_what_is_wrong(smoke, monkeypatch, tmp_path, capsys):
    """Numbers that are off, NaN, and a call that raises, each in its own line."""
    given, count = smoke.tp.rnn, iter(range(1000))

    def wrong(u: torch.Tensor, *rest: torch.Tensor, backend: str, **words: object) -> torch.Tensor:
        h = given(u, *rest, backend="reference", **words)
        if u.dtype == torch.float64:
            return h
        fault = next(count)
        if fault == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        return h * (1.001, torch.nan)[fault] if fault < 2 else h

    monkeypatch.setattr(smoke.tp, "rnn", wrong)
    assert call_main(smoke, monkeypatch, "cluster", *ON_CPU, "--out", str(tmp_path / "out.json")) == 1
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert [check["passed"] for check in checks[:5]] == [False, False, False, True, True]
    assert checks[2]["raised"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert capsys.readouterr().out.count("FAIL ") == 3


def test_smoke_is_told_where_to_run(smoke, monkeypatch, capsys):
    assert call_main(smoke, monkeypatch, "cuda", "--device", "cpu") == 2
    assert "--device cpu needs --backend" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call_main(smoke, monkeypatch, "cuda") == 2
    assert "this torch can use no CUDA device" in capsys.readouterr().err


def test_times(monkeypatch, tmp_path, capsys):
    """The slope, of a clock that takes 5 ms for a pass and 30 µs for a step; what cannot run says so."""
    module = script("gpu_times")
    lengths: list[int] = []
    one_pass = module.one_pass

    def noted(entry: object, shape: object, T: int, device: str) -> object:
        lengths.append(T)
        return one_pass(entry, shape, T, device)

    def milliseconds(run: object, device: str) -> float:
        run()
        return 5 + 0.03 * lengths[-1]

    monkeypatch.setattr(module, "one_pass", noted)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    words = ("--out", str(tmp_path / "out.json"), "--device", "cpu", "--T", "6,4", "--N", "5", "--B", "2")
    assert call_main(module, monkeypatch, *words, "--contenders", "reference,cuda,torch") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2 * 4 + 2 * 4 + 3 * 2
    for row in rows:
        if row["contender"] == "cuda":
            assert row["error"].startswith("BackendUnavailableError: ")
        else:
            assert row["us_per_step"] == pytest.approx(30)
    assert "times: 14 of 22, 0 left out" in capsys.readouterr().out
    assert call_main(module, monkeypatch, *words, "--contenders", "cuda") == 1
    assert call_main(module, monkeypatch, *words, "--seconds", "-1") == 1
    assert json.loads((tmp_path / "out.json").read_text())["left_out"] == 22
    assert call_main(module, monkeypatch, *words, "--T", "4,6") == 2
    assert "--T must be two lengths, the longer first, got 4,6" in capsys.readouterr().err
