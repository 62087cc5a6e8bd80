"""Every instruction set this machine has stays within the error budget, and ``TPK_CPU`` chooses one."""

import os
import subprocess
import sys

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, RULES, TILE_CASES, RNNCase, matrices
from _checks import inverse_check, rnn_backward_check, rnn_forward_check, tanh_check
from _compare import assert_identical

import tp_kernels as tp
from tp_kernels import _native

ODD = RNNCase(T=5, B=7, N=17)


@pytest.mark.parametrize("case", TILE_CASES + HEAD_CASES, ids=str)
def test_rnn(case, dtype, isa_level):
    rnn_forward_check(case, dtype, "cpu")
    rnn_backward_check(case, RULES["weight-total"], dtype, "cpu")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_rules(rule, nonlinearity, dtype, isa_level):
    if rule.startswith("layer"):
        nonlinearity = "tanh"
    rnn_backward_check(ODD.with_(nonlinearity=nonlinearity), RULES[rule], dtype, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, isa_level):
    rnn_forward_check(ODD, dtype, "cpu", layout)
    rnn_backward_check(ODD, RULES["layer-local"], dtype, "cpu", layout)
    inverse_check(matrices((3, 5, 4), dtype), 0.25, 1.0, "cpu", layout)


def test_tanh_accuracy(dtype, isa_level):
    tanh_check(dtype, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2), (2, 7), (16, 16), (17, 15), (2, 33, 33), (64, 20)], ids=str)
def test_regularized_inverse(shape, dtype, isa_level):
    inverse_check(matrices(shape, dtype), 0.25, 1.0, "cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_not_finite_stays_in_its_unit_until_the_next_step(nonlinearity, value, dtype, isa_level):
    u, weight, h0 = ODD.with_(nonlinearity=nonlinearity).tensors(dtype)
    clean = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, backend="cpu")
    u[-1, 2, 16] = value
    h = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, backend="cpu")
    expected = {"tanh": torch.tanh, "relu": torch.relu, "identity": torch.clone}[nonlinearity](torch.tensor(value))
    clean[-1, 2, 16] = expected
    assert_identical(h, clean, "h")


def test_threads_do_not_change_results(dtype, isa_level):
    tensors = RNNCase(T=4, B=33, N=33).tensors(dtype)
    weight = matrices((9, 17, 17), dtype)
    first = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = tp.rnn(*tensors, backend="cpu"), tp.regularized_inverse(weight, 0.25, backend="cpu")
        first = first or found
        assert_identical(found[0], first[0], "h")
        assert_identical(found[1], first[1], "P")


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
