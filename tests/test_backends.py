"""Which code runs, and what is said where it cannot."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _cases import Case, matrices
from _checks import layer

import tp_kernels as tp
from tp_kernels import _native, _triton, info
from tp_kernels._backends import NAMES, Backend, BackendTable, BackendUnavailableError
from tp_kernels._library import autocast_enabled
from tp_kernels.ops.recurrence import op as recurrence
from tp_kernels.ops.regularized_inverse import op as inverse

CASES = {"rnn": Case(), "gru": Case(cell="gru"), "lstm": Case(cell="lstm")}
OPS = (*CASES, "regularized_inverse")
ON_A_GPU = ("rnn", "regularized_inverse")  # have kernels there


def table_of(op: str) -> BackendTable:
    return recurrence.backends(op) if op in CASES else inverse.BACKENDS


def call(op: str, backend: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if op in CASES:
        return layer(CASES[op], CASES[op].tensors(dtype), backend=backend)
    return tp.regularized_inverse(matrices((3, 2), dtype), 0.25, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_every_backend_with_kernels_is_in_the_table(op):
    """And of the others there is a reason; nothing stands in for them."""
    table = table_of(op)
    there = NAMES if op in ON_A_GPU else ("reference", "cpu")
    assert NAMES == ("reference", "cpu", "triton", "cuda")
    assert tuple(table.backends) == there
    for name in set(NAMES) - set(there):
        assert table.available(name) == (False, f"it has no kernel for {op} yet")
        assert all(name not in candidates for candidates in table.preference.values())
    assert table.op == op
    assert issubclass(BackendUnavailableError, RuntimeError)
    assert tp.BackendUnavailableError is BackendUnavailableError


@pytest.mark.parametrize("op", ON_A_GPU)
@pytest.mark.parametrize("case", ["no package", "no device", "CPU tensors"])
def test_triton_says_why_not(case, op, monkeypatch):
    """On any machine: whether the package is there, a device is, and the tensors are on it."""
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_triton, "import_error", lambda: "No module named 'triton'" if case == "no package" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: case == "CPU tensors")
    reason = {
        "no package": (
            "triton could not be imported (No module named 'triton'); python -m pip install 'tp_kernels[triton]'"
        ),
        "no device": "it computes on a CUDA device, and this torch can use none",
        "CPU tensors": "it computes on a CUDA device, and the tensors are on cpu",
    }[case]
    with pytest.raises(BackendUnavailableError) as caught:
        call(op, "triton")
    assert str(caught.value) == (
        f"{op}: backend 'triton' cannot run this call: {reason}. Use backend='auto' or 'reference'."
    )
    assert torch.equal(call(op, "auto"), call(op, "cpu" if _native.cpu_available()[0] else "reference"))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "not built"),
        (
            SimpleNamespace(device_problem=lambda: "no CUDA device can be used: there is none"),
            "no CUDA device can be used: there is none",
        ),
        (
            SimpleNamespace(device_problem=lambda: "", device_type="cuda"),
            "it computes on a CUDA device, and the tensors are on cpu",
        ),
    ],
    ids=["no module", "no device", "other device"],
)
@pytest.mark.parametrize("op", ON_A_GPU)
def test_cuda_says_why_not(op, module, reason, monkeypatch):
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_native, "_cuda_error", "not built", raising=False)
    with pytest.raises(BackendUnavailableError) as caught:
        call(op, "cuda")
    assert str(caught.value) == (
        f"{op}: backend 'cuda' cannot run this call: {reason}. Use backend='auto' or 'reference'."
    )


def test_importing_without_the_cuda_module():
    program = (
        "import sys; sys.modules['tp_kernels._cuda'] = None\n"
        "from tp_kernels import _native; print(*_native.cuda_available())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert ran.stdout == (
        "False this installation has no CUDA module; reinstall with TPK_CUDA=1 set and nvcc on the PATH\n"
    )


def test_importing_is_cheap():
    """It brings in nothing that ``import torch`` has not brought in: no compiler, no Triton, no pictures."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import tp_kernels, tp_kernels.info\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    imported = ran.stdout.split()
    assert "tp_kernels.ops" in imported
    assert not [name for name in imported if name.startswith("tp_kernels.regimes")]
    standard = sys.stdlib_module_names
    assert {name.partition(".")[0] for name in imported} - standard == {"tp_kernels"}, imported


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "lazy", "vulkan", "xpu", "mps", "mtia", "hpu", "xla"])
def test_autocast_of_every_type_of_device(device):
    """Also of those that have none, of which torch refuses the question."""
    available = torch.amp.is_autocast_available(device)
    assert not autocast_enabled(device)
    if device == "cpu":
        with torch.autocast(device):
            assert autocast_enabled(device)
    if not available:
        with pytest.raises(RuntimeError, match="autocast"):
            torch.is_autocast_enabled(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype, monkeypatch):
    """By name the native back-end refuses it; ``auto`` takes the reference."""
    monkeypatch.setattr(_native, "cpu", object())  # as if it were there, whether it is or not
    with pytest.raises(BackendUnavailableError) as caught:
        call(op, "cpu", dtype)
    assert str(caught.value) == (
        f"{op}: backend 'cpu' cannot run this call: it computes float32 and float64, and the tensors are "
        f"{str(dtype).removeprefix('torch.')}. Use backend='auto' or 'reference'."
    )
    assert torch.equal(call(op, "auto", dtype), call(op, "reference", dtype))


@pytest.mark.parametrize("op", OPS)
def test_native_module_missing(op, monkeypatch):
    """``auto`` goes on with the reference; by name the reason and the remedy are given."""
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "_cpu_error", "no such module; reinstall", raising=False)
    with pytest.raises(BackendUnavailableError) as caught:
        call(op, "cpu")
    assert str(caught.value) == (
        f"{op}: backend 'cpu' cannot run this call: no such module; reinstall. Use backend='auto' or 'reference'."
    )
    assert torch.equal(call(op, "auto"), call(op, "reference"))


def test_import_without_the_native_module():
    """The package imports and computes; the reason names the module and the remedy."""
    program = (
        "import sys; sys.modules['tp_kernels._cpu'] = None\n"
        "import torch, tp_kernels as tp\n"
        "u, weight = torch.ones(2, 1, 3), torch.eye(3)\n"
        "assert torch.equal(tp.rnn(u, weight), tp.rnn(u, weight, backend='reference'))\n"
        "try: tp.rnn(u, weight, backend='cpu')\n"
        "except tp.BackendUnavailableError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert ran.stdout.startswith(
        "rnn: backend 'cpu' cannot run this call: the native module tp_kernels._cpu could not be imported ("
    )
    assert ran.stdout.endswith("); reinstall with a C++ compiler. Use backend='auto' or 'reference'.\n")


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_native_backend(op, backend, dtype, monkeypatch):
    """``auto`` is the native back-end where it runs; by name, that one and no other."""
    table = table_of(op)
    ran = []

    def spy(name: str, original: Backend) -> Backend:
        def forward(*arguments: object, **options: object) -> object:
            ran.append(name)
            return original.forward(*arguments, **options)

        return replace(original, forward=forward)

    spied = BackendTable(op, {name: spy(name, original) for name, original in table.backends.items()})
    if op in CASES:
        monkeypatch.setattr(recurrence, "backends", lambda name: spied)
    else:
        monkeypatch.setattr(inverse, "BACKENDS", spied)
    call(op, backend, dtype)
    call(op, "auto", dtype)
    assert ran == [backend, "cpu" if _native.cpu_available()[0] else "reference"]


def test_support_depends_on_device_and_dtype():
    assert _native.cpu_supports(torch.ones(1)) == (True, "")
    assert _native.cpu_supports(torch.ones(1, dtype=torch.float64)) == (True, "")
    assert _native.cpu_supports(torch.ones(1, device="meta")) == (
        False,
        "it computes on the CPU, and the tensors are on meta",
    )
    assert _native.cpu_supports(torch.ones(1, dtype=torch.int64)) == (
        False,
        "it computes float32 and float64, and the tensors are int64",
    )


def table(**answers: tuple[bool, str]) -> BackendTable:
    """``reference``, and a "cpu" and a "cuda" that answer as given."""

    def unused(*arguments: object) -> None:
        raise AssertionError("resolving must not run anything")

    reference = Backend(unused, unused)
    others = {
        name: Backend(unused, unused, available=lambda a=answer: a, supports=lambda tensor, **options: (True, ""))
        for name, answer in answers.items()
    }
    return BackendTable("op", {"reference": reference, **others}, {"cpu": ("cuda", "cpu", "reference")})


def test_auto_follows_the_order_of_preference():
    tensor = torch.ones(1)
    both = table(cpu=(True, ""), cuda=(True, ""))
    assert both.resolve("auto", tensor) is both.backends["cuda"]
    one = table(cpu=(True, ""), cuda=(False, "no device"))
    assert one.resolve("auto", tensor) is one.backends["cpu"]
    none = table(cpu=(False, "not built"), cuda=(False, "no device"))
    assert none.resolve("auto", tensor) is none.backends["reference"]


def test_auto_takes_the_reference_on_a_device_without_preference():
    both = table(cpu=(True, ""), cuda=(True, ""))
    assert both.resolve("auto", torch.ones(1, device="meta")) is both.backends["reference"]


def test_a_named_backend_is_never_substituted():
    one = table(cpu=(False, "not built"), cuda=(True, ""))
    assert one.resolve("cuda", torch.ones(1)) is one.backends["cuda"]
    with pytest.raises(BackendUnavailableError) as caught:
        one.resolve("cpu", torch.ones(1))
    assert str(caught.value) == (
        "op: backend 'cpu' cannot run this call: not built. Use backend='auto' or 'reference'."
    )


def test_meta_tensors_get_shapes_and_dtypes(dtype):
    """No back-end runs: the fakes answer."""
    p = tp.regularized_inverse(matrices((2, 3, 4), dtype).to("meta"), 0.25)
    assert (p.shape, p.dtype, p.device.type) == ((2, 4, 3), dtype, "meta")


# --- python -m tp_kernels.info


def test_info_names_every_op_and_backend():
    found = info.backends()
    assert len(found) == len(OPS) * len(NAMES)
    assert set(found) == {(op, name) for op in OPS for name in NAMES}
    for (op, name), answer in found.items():
        ok, reason = table_of(op).available(name)
        assert answer == ("yes" if ok else f"no: {reason}")
    assert found["rnn", "reference"] == "yes"


def test_info_says_which_instruction_set(isa_level):
    levels = ", ".join(_native.cpu.isa_levels())
    assert info.versions()["instruction set"] == f"{isa_level} (of {levels}; TPK_CPU forces one)"


def test_info_without_the_native_module(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "_cpu_error", "not built", raising=False)
    lines = info.versions()
    assert "instruction set" not in lines
    assert lines["torch"] == torch.__version__
    assert info.backends()["rnn", "cpu"] == "no: not built"


def test_info_prints_it_all(capsys):
    info.main([])
    printed = capsys.readouterr().out
    for name, value in info.versions().items():
        assert f"{name:<16} {value}\n" in printed
    for (op, name), answer in info.backends().items():
        assert f"{op:<20} {name:<10} {answer}\n" in printed


def test_peak(capsys):
    if _native.cpu is None:
        pytest.skip(_native.cpu_available()[1])
    assert info.peak(torch.float64) > 0
    info.main(["--peak"])
    assert re.search(r"^peak float32 +\d+\.\d GFLOP/s, 1 thread$", capsys.readouterr().out, re.MULTILINE)


def test_peak_without_the_native_module(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "_cpu_error", "not built", raising=False)
    with pytest.raises(tp.BackendUnavailableError) as caught:
        info.peak(torch.float32)
    assert str(caught.value) == "peak: not built"
