"""``rnn`` in CUDA C++. Without a GPU the very same kernels run emulated, one thread block after the other; the checks,
oracles and budgets are those of every back-end, the cases few and small.
"""

import pytest
import torch
from _cases import RULES, RNNCase
from _checks import rnn_backward_check, rnn_forward_check, tanh_check
from _compare import assert_identical
from _cuda import NotBuilt, emulated

from conftest import absent
from tp_kernels import _native
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
SMALL = RNNCase(T=4, B=3, N=5)
# Every padded width, full and not; full and partial tiles; no rows; heads; every activation.
CASES = (
    RNNCase(T=1, B=1, N=1),
    RNNCase(T=2, B=4, N=32),
    RNNCase(T=5, B=7, N=33, nonlinearity="relu", h0=False),
    RNNCase(T=3, B=0, N=5),
    RNNCase(T=3, B=5, H=3, N=17),
    RNNCase(T=4, B=2, H=2, N=20, nonlinearity="identity"),
    RNNCase(T=2, B=3, N=64, nonlinearity="identity"),
    RNNCase(T=3, B=5, N=100),
    RNNCase(T=2, B=4, N=128, nonlinearity="relu"),
)
SWEPT = {
    name: rule
    for name, rule in RULES.items()
    if Sweep.of(rule, "tanh").inverse in ("none", "identity", "weight", "layer")
}
REFUSED = sorted(set(RULES) - set(SWEPT))
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        found = emulated()
    except NotBuilt as reason:
        absent("cuda-emulated", str(reason))
    monkeypatch.setattr(_native, "cuda", found)
    found.emulate(multiprocessors=4, reversed=False)


@pytest.fixture(params=(1, 2, 4), ids="rows{}".format)
def rows(request: pytest.FixtureRequest):
    """Emulates a device for which the launcher takes tiles of that many rows."""

    def emulate(case: RNNCase, reversed: bool = False) -> None:
        heads = case.H or 1
        blocks = {1: case.B * heads, 2: -(-case.B // 2) * heads, 4: 0}[request.param]
        _native.cuda.emulate(multiprocessors=blocks, reversed=reversed)

    return emulate


# --- forward and backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, rows):
    rows(case)
    rnn_forward_check(case, FLOAT, "cuda")


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule, rows):
    rows(case)
    rnn_backward_check(case, SWEPT[rule], FLOAT, "cuda")


def everything(case: RNNCase) -> list[torch.Tensor]:
    """What every kernel computes for a case, handed in in parts, too."""
    u, weight, h0 = case.tensors(FLOAT)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "cuda")
    results = [h]
    for rule in SWEPT.values():
        sweep = Sweep.of(rule, case.nonlinearity)
        arguments = case.gradient(FLOAT), None, h, weight, 0.6 * weight.mT, h0, h0, None, None
        results += ops.rnn_bwd(*arguments, *sweep, "cuda")
    return results


@pytest.mark.parametrize(
    "case", [RNNCase(T=3, B=5, N=20), RNNCase(T=3, B=4, H=2, N=33), RNNCase(T=2, B=3, N=100)], ids=str
)
def test_no_races(case, rows):
    """Threads that run in the opposite order, between one barrier and the next, make no difference."""
    found = []
    for reversed in (False, True):
        rows(case, reversed)
        found.append(everything(case))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("case", [RNNCase(T=3, B=5, N=20), RNNCase(T=2, B=3, H=2, N=100)], ids=str)
def test_tiles_do_not_change_results(case):
    """Not a bit: the sums are the same, in the same order."""
    found = []
    for multiprocessors in (1000, -(-case.B // 2) * (case.H or 1), 0):
        _native.cuda.emulate(multiprocessors=multiprocessors, reversed=False)
        found.append(everything(case))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert_identical(actual, expected, "a result")


def test_tanh_accuracy():
    tanh_check(FLOAT, "cuda")
