"""Every instruction set this machine has stays within the error budget, and ``TPK_CPU`` chooses one."""

import os
import subprocess
import sys

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, RULES, SWEEPS, TILE_CASES, Case, matrices
from _checks import (
    assert_same_bits,
    atanh_check,
    back_of,
    backward_check,
    forward_check,
    forward_op,
    gradients,
    inverse_check,
    supports,
    tanh_check,
)
from _compare import assert_identical

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels import _native
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.rules import Sweep

ODD = Case(T=2, B=7, N=17)
BOTH = ("rnn_tanh", "gru")
TILES = TILE_CASES + tuple(case for case in HEAD_CASES if case.T < 10 and case.cell == "rnn_tanh")


@pytest.mark.parametrize("cell", BOTH)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles(case, cell, dtype, isa_level):
    """Edges of register blocks: in the products forward, with P and with Wᵀ, and in the solver."""
    case = case.with_(cell=cell)
    forward_check(case, dtype, "cpu")
    backward_check(case, RULES["weight-total"], dtype, "cpu")
    backward_check(case, RULES["jacobian-total"], dtype, "cpu")


@pytest.mark.parametrize(
    ("cell", "rule"), [pair for pair in SWEEPS if pair[0] != "lstm" or not pair[1].startswith("jacobian")]
)
def test_rules(cell, rule, dtype, isa_level):
    backward_check(ODD.with_(cell=cell), RULES[rule], dtype, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, isa_level):
    for cell in BOTH:
        case = ODD.with_(cell=cell)
        forward_check(case, dtype, "cpu", layout)
        backward_check(case, RULES["layer-local"], dtype, "cpu", layout)
    backward_check(ODD, RULES["direct-local"], dtype, "cpu", layout)
    inverse_check(matrices((3, 5, 4), dtype), 0.25, 1.0, "cpu", layout)


def test_tanh_accuracy(dtype, isa_level):
    tanh_check(dtype, "cpu")


def test_atanh_accuracy(dtype, isa_level):
    atanh_check(dtype, "cpu")


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 3), (5, 2), (2, 7), (16, 16), (17, 15), (2, 33, 33), (64, 20), (37, 6, 5)], ids=str
)
def test_regularized_inverse(shape, dtype, isa_level):
    inverse_check(matrices(shape, dtype), 0.25, 1.0, "cpu")
    inverse_check(matrices(shape, dtype), 1e-4, 0.5, "cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_not_finite_stays_in_its_unit_until_the_next_step(nonlinearity, value, dtype, isa_level):
    cell = f"rnn_{nonlinearity}"
    u, weight, _, h0 = ODD.with_(cell=cell).tensors(dtype)
    clean = forward_op(cell, u, weight, None, h0, backend="cpu").h
    u[-1, 2, 16] = value
    h = forward_op(cell, u, weight, None, h0, backend="cpu").h
    expected = {"tanh": torch.tanh, "relu": torch.relu, "identity": torch.clone}[nonlinearity](torch.tensor(value))
    clean[-1, 2, 16] = expected
    assert_identical(h, clean, "h")


def test_threads_do_not_change_results(dtype, isa_level):
    weight = matrices((41, 17, 17), dtype)
    cases = [Case(T=4, B=33, N=33, cell=cell) for cell in (*BOTH, "lstm")]
    sweeps = [Sweep("weight") if case.cell == "lstm" else Sweep("jacobian") for case in cases]
    # Once: torch's own sums follow the threads.
    backs = [back_of(case, dtype, sweep) for case, sweep in zip(cases, sweeps, strict=True)]
    first = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = {"P": tp.regularized_inverse(weight, 0.25, backend="cpu")}
        found["P at power 1/2"] = tp.regularized_inverse(weight, 0.25, power=0.5, backend="cpu")
        for case, sweep, back in zip(cases, sweeps, backs, strict=True):
            found[f"h of {case.cell}"] = forward_op(case.cell, *case.tensors(dtype), backend="cpu").h
            swept = back.run(sweep, "cpu").swept
            found |= {f"{what} of {case.cell}": tensor for what, tensor in swept.items()}
        first = first or found
        assert_same_bits(found, first)


@pytest.mark.parametrize("cell", [*BOTH, "lstm"])
@pytest.mark.parametrize("case", [ODD, Case(T=2, B=3, N=1), Case(T=2, B=2, H=3, N=5), Case(N=33)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, cell, dtype, isa_level, fences):
    case = case.with_(cell=cell)
    inverses = ("none", *CELLS[cell].inverses)
    inverses = [word for word in inverses if supports(cell, Sweep(word), "cpu")[0]]
    backs = {Sweep(inverse, clip=0.1): None for inverse in inverses}
    for sweep in backs:
        sent = case.gradient_of_state(dtype, seed=5)
        backs[sweep] = back_of(case, dtype, sweep).with_(carried=sent, through=sent)
    fences.clear()
    forward_op(cell, *case.tensors(dtype), backend="cpu")
    for sweep, back in backs.items():
        back.run(sweep, "cpu")
    for power in (1.0, 0.5):
        tp.regularized_inverse(matrices((3, 7, case.N), dtype), 0.25, power=power, backend="cpu")
    polar = 1 if dtype == torch.float32 else 0  # in float64 LAPACK decomposes
    kept = 1 if CELLS[cell].kept else 0
    outputs = 2 + kept + 3 * len(inverses) - 1 + 1 + polar  # h and the last state; "none" carries nothing
    assert assert_within_fences(fences) == outputs


def test_denormal_numbers_elsewhere_stay(dtype, isa_level):
    """The kernels flush denormal numbers to zero while they run, on their own threads only and not for long."""
    torch.set_num_threads(2)
    small = torch.full((200_000,), torch.finfo(dtype).tiny / 4, dtype=dtype)
    for cell in BOTH:
        gradients(Case(T=4, B=33, N=33, cell=cell), tp.TargetProp(power=1.0), dtype, "cpu")
    bits = (small * 2).view({torch.float32: torch.int32, torch.float64: torch.int64}[dtype])
    assert bits.ne(0).all()  # as numbers they would equal zero where they were flushed


CHECKS = """
import torch, _checks, _cases
for dtype in _cases.DTYPES:
    odd = _cases.Case(T=2, B=7, H=3, N=17)
    for case in (*_cases.HEAD_CASES, odd.with_(cell="gru"), odd.with_(cell="lstm")):
        _checks.forward_check(case, dtype, "cpu")
        for rule in ("weight-total", "identity-local", "jacobian-total", "layer-local", "direct-local"):
            sweep = _checks.Sweep.of(_cases.RULES[rule])
            if rule in _cases.rules_of(case.cell) and _checks.supports(case.cell, sweep, "cpu")[0]:
                _checks.backward_check(case, _cases.RULES[rule], dtype, "cpu")
    for shape in ((3, 3), (2, 17, 15), (5, 9)):
        for power in (1.0, 0.5):
            _checks.inverse_check(_cases.matrices(shape, dtype), 0.25, power, "cpu")
print("done")
"""


def test_scratch_memory_is_written_before_it_is_read(isa_level):
    """With memory that malloc fills (glibc), all bytes 0x7f: huge numbers where nothing was written."""
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = os.environ | {"TPK_CPU": isa_level, "MALLOC_PERTURB_": "128", "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, env=environment)
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr


def test_the_fixture_sets_the_level(isa_level):
    assert _native.cpu.isa_level() == isa_level


def test_levels(cpu):
    levels = _native.cpu.isa_levels()
    assert levels == [name for name in ("v4", "v3", "base") if name in levels]
    assert levels[-1] == "base"
    with pytest.raises(ValueError, match="no instruction set") as caught:
        _native.cpu.set_isa_level("v5")
    assert str(caught.value) == "no instruction set 'v5' on this machine"


def start(level: str) -> subprocess.CompletedProcess:
    program = "from tp_kernels import _native; print(_native.cpu.isa_level())"
    environment = os.environ | {"TPK_CPU": level}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_environment_variable(isa_level):
    ran = start(isa_level)
    assert (ran.stdout, ran.returncode) == (f"{isa_level}\n", 0)


def test_empty_environment_variable_is_the_best_level(cpu):
    assert start("").stdout == f"{_native.cpu.isa_levels()[0]}\n"


def test_wrong_environment_variable(cpu):
    ran = start("avx9")
    levels = ", ".join(_native.cpu.isa_levels())
    assert ran.returncode != 0
    assert ran.stderr.endswith(f"RuntimeError: TPK_CPU must be one of {levels} on this machine, got 'avx9'\n")
