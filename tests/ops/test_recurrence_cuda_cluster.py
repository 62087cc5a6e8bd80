"""The recurrence in CUDA C++ beyond N = 128: clusters of thread blocks, on a GPU that has them, else emulated."""

import pytest
import torch
from _cases import Case
from _checks import assert_same_bits, backward_check, forward_check
from _compare import assert_identical
from _cuda_device import (
    DEVICE,
    FLOAT,
    ON_GPU,
    SWEPT,
    check_not_finite,
    emulate,
    everything,
    given_to,
    in_two_parts,
    inputs_of,
    outputs,
)

from conftest import assert_within_fences
from tp_kernels import _native
from tp_kernels.rules import Sweep

pytestmark = pytest.mark.usefixtures("cuda")
# 3 to 16 blocks, full and not, and the rows of a tile; a half and a whole in registers, part of it in shared memory;
# two matrices at once and one after the other.
CASES = (
    (Case(T=3, B=3, N=129), 1),
    (Case(T=3, B=3, N=200, cell="rnn_relu", h0=False), 2),
    (Case(T=2, B=4, N=256), 4),
    (Case(T=2, B=1, H=2, N=300, cell="rnn_identity"), 1),
    (Case(T=2, B=1, N=512), 1),
    (Case(T=3, B=2, N=600), 2),
    (Case(T=1, B=1, N=1024), 4),
)
if ON_GPU:
    CASES += ((Case(T=9, B=51, N=200), 2), (Case(T=2, B=151, N=300), 4), (Case(T=2, B=21, N=1000), 4))


def emulate_for(case: Case, rows: int, reversed: bool = False) -> None:
    """A device for which the launcher takes tiles of that many rows. One that cannot hold so many units skips the test:
    smaller clusters, and none, are emulated.
    """
    tiles = {1: case.B, 2: -(-case.B // 2), 4: 0}[rows]
    emulate(multiprocessors=tiles * (case.H or 1) * -(-case.N // 64), reversed=reversed)
    if (largest := _native.cuda.recurrence_cluster_largest(0)) < case.N:
        pytest.skip(f"clusters of this device hold {largest} units")


@pytest.mark.parametrize(("case", "rows"), CASES, ids=str)
def test_forward(case, rows):
    emulate_for(case, rows)
    forward_check(case, FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize(("case", "rows"), CASES, ids=str)
def test_backward(case, rows, rule):
    emulate_for(case, rows)
    backward_check(case, SWEPT[rule], FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize(("case", "rows"), [(Case(T=4, B=2, N=150), 2), (Case(T=3, B=1, N=530), 1)], ids=str)
def test_no_races(case, rows):
    """Blocks and threads that run in the opposite order, each as far ahead of the others as the barriers let it, make
    no difference, nor do stores into other blocks that arrive as late as they may.
    """
    found = []
    for reversed in (False, True):
        emulate_for(case, rows, reversed)
        found.append(everything(case, SWEPT))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("rule", ["weight-total", "layer-total"])
def test_two_sweeps_are_one(rule):
    """Not a bit changes where both matrices do not fit into the blocks of a cluster."""
    if ON_GPU:
        pytest.skip("the device's own shared memory decides")
    case = Case(T=3, B=1, N=400)
    back = given_to(case, inputs_of(case).u)
    found = []
    for largest_cluster, shared_memory in ((16, 227), (8, 99)):
        emulate(multiprocessors=1000, largest_cluster=largest_cluster, shared_memory=shared_memory << 10)
        found.append(back.run(Sweep.of(SWEPT[rule]), "cuda").swept)
    assert_same_bits(*found)


def test_tiles_do_not_change_results():
    """Not a bit: the sums are the same, in the same order."""
    case = Case(T=2, B=3, N=140)
    found = []
    for rows in (1, 2, 4):
        emulate_for(case, rows)
        found.append(everything(case, SWEPT))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert_identical(actual, expected, "a result")


def test_nothing_is_written_outside_of_the_outputs(fences):
    case = Case(T=2, B=3, N=130)
    emulate_for(case, 4)
    everything(case, SWEPT)
    assert assert_within_fences(fences) == 1 + outputs(SWEPT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite(value):
    case = Case(T=3, B=3, N=131, cell="rnn_relu")
    emulate_for(case, 4)
    check_not_finite(case, SWEPT, value)


@pytest.mark.parametrize("rule", SWEPT)
def test_a_sequence_in_two_parts(rule):
    """The same bits, state and what goes back handed on."""
    case = Case(T=4, B=2, N=150)
    emulate_for(case, 1)
    assert_same_bits(*in_two_parts(case, SWEPT[rule]))


@pytest.mark.parametrize(
    ("largest_cluster", "N", "reason"),
    [
        (0, 129, "N must be at most 128 on a device without thread block clusters, got 129"),
        (8, 513, "N must be at most 512 on this device, got 513"),
    ],
)
def test_the_launcher_checks_for_itself(largest_cluster, N, reason):
    if ON_GPU:
        pytest.skip("the device's own clusters decide")
    emulate(largest_cluster=largest_cluster)
    words = {"dtype": "float32", "cell": "rnn_tanh", "tf32": False, "input_strides": (0, 0, 0)}
    pointers = dict.fromkeys(("input", "weight", "start", "h", "device", "stream"), 0)
    with pytest.raises(ValueError, match=f"recurrence_fwd: {reason}"):
        _native.cuda.recurrence_fwd(**pointers, **words, sizes=(1, 1, 1, N))
