"""The recurrence in CUDA C++: on a GPU where there is one and the module was built, else the same kernels, emulated
one thread block after the other. The checks, oracles and budgets are those of every back-end, the cases few and small
where they are emulated.
"""

import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, NONLINEARITIES, RULES, TILE_CASES, TIME_CASES, Case
from _checks import (
    Back,
    assert_same_bits,
    back_of,
    backward_check,
    capture_check,
    forward_check,
    forward_op,
    stream_check,
    tanh_check,
)
from _compare import assert_identical, assert_near
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
    needs_gpu,
    outputs,
)
from _oracle import extended

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels import _native
from tp_kernels.ops.recurrence.op import backends
from tp_kernels.rules import Sweep

pytestmark = pytest.mark.usefixtures("cuda")
SMALL = Case(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
# Every padded width, full and not; full and partial tiles; no rows; heads; every activation.
CASES = (
    Case(T=1, B=1, N=1),
    Case(T=2, B=4, N=32),
    Case(T=5, B=7, N=33, cell="rnn_relu", h0=False),
    Case(T=3, B=0, N=5),
    Case(T=3, B=5, H=3, N=17),
    Case(T=4, B=2, H=2, N=20, cell="rnn_identity"),
    Case(T=2, B=3, N=64, cell="rnn_identity"),
    Case(T=3, B=5, N=100),
    Case(T=2, B=4, N=128, cell="rnn_relu"),
    Case(T=2, B=17, N=20),
)
WIDE = (Case(T=2, B=3, N=129), Case(T=3, B=9, N=256, cell="rnn_relu"), Case(T=2, B=2, H=2, N=200))
MANY = ()  # in float32 only: in half precision plain code is not near the exact answer of all of them
if ON_GPU:  # the last are too many for tiles of 1 or 2 rows, or of 4
    MANY = tuple(case for case in TILE_CASES + TIME_CASES + HEAD_CASES if case.N <= 128)
    CASES += (Case(T=65, B=9, N=40, cell="rnn_relu"), Case(T=3, B=301, N=33))
    CASES += (Case(T=3, B=1001, N=100), Case(T=2, B=701, H=2, N=17), Case(T=33, B=1001, N=20))
    CASES += (Case(T=3, B=1001, N=128, cell="rnn_relu"),)
REFUSED = sorted(name for name in set(RULES) - set(SWEPT) if not name.startswith("jacobian"))
FEW = ("bp", "weight-total", "layer-local", "identity-total")  # in half precision


class Kernel(NamedTuple):
    """What it computes, and the rows of the batch in a tile: 8 of them on tensor cores."""

    dtype: torch.dtype
    rows: int | None  # None: on a GPU, as the launcher likes

    def emulate(self, case: Case, reversed: bool = False) -> None:
        """A device for which the launcher takes this kernel; one of 4 rows only where there are more than 2."""
        blocks = 0 if self.rows in (None, 8) else -(-case.B // self.rows) * (case.H or 1)
        emulate(multiprocessors=blocks, reversed=reversed)

    def rule(self, rule: tp.BackProp | tp.TargetProp, case: Case) -> tp.BackProp | tp.TargetProp:
        """In half precision no digit of 1 - h² would be left nearer to 1."""
        clips = self.dtype != FLOAT and Sweep.of(rule).inverse == "layer"
        return replace(rule, clip=0.1) if clips else rule


def overflows(case: Case, rule: str, dtype: torch.dtype) -> bool:
    """1/(1 - h²) at every step does."""
    longest = 10 if dtype == torch.float16 else 100
    return "layer" in rule and case.cell == "rnn_tanh" and longest < case.T


HALF = {"bfloat16": Kernel(torch.bfloat16, 8), "float16": Kernel(torch.float16, 8)}
KERNELS = (
    {"float32": Kernel(FLOAT, None)} if ON_GPU else {f"float32-{rows}": Kernel(FLOAT, rows) for rows in (1, 2, 4, 8)}
)
KERNELS |= HALF
FORWARD = [
    (name, kernel, case) for name, kernel in KERNELS.items() for case in CASES + (MANY if kernel.dtype == FLOAT else ())
]
BACKWARD = [
    pytest.param(kernel, case, rule, id=f"{name}-{case}-{rule}")
    for name, kernel, case in FORWARD
    for rule in SWEPT
    if (kernel.dtype == FLOAT or rule in FEW) and not overflows(case, rule, kernel.dtype)
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


# --- forward and backward


@pytest.mark.parametrize(
    ("kernel", "case"), [pytest.param(kernel, case, id=f"{name}-{case}") for name, kernel, case in FORWARD]
)
def test_forward(kernel, case):
    kernel.emulate(case)
    forward_check(case, kernel.dtype, "cuda", device=DEVICE)


@pytest.mark.parametrize(("kernel", "case", "rule"), BACKWARD)
def test_backward(kernel, case, rule):
    kernel.emulate(case)
    backward_check(case, kernel.rule(SWEPT[rule], case), kernel.dtype, "cuda", device=DEVICE)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_in_half_precision(case, name):
    """The total update through P is two sweeps there."""
    kernel = HALF[name]
    forward_check(case, kernel.dtype, "cuda", device=DEVICE)
    for rule in FEW:
        backward_check(case, kernel.rule(SWEPT[rule], case), kernel.dtype, "cuda", device=DEVICE)


@pytest.mark.parametrize(
    "case",
    [Case(T=3, B=5, N=20), Case(T=3, B=4, H=2, N=33), Case(T=2, B=3, N=100), Case(T=2, B=9, N=64)],
    ids=str,
)
def test_no_races(case, kernel):
    """Threads that run in the opposite order, between one barrier and the next, make no difference."""
    found = []
    for reversed in (False, True):
        kernel.emulate(case, reversed)
        found.append(everything(case, SWEPT, kernel.dtype))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("case", [Case(T=3, B=5, N=20), Case(T=2, B=3, H=2, N=100)], ids=str)
def test_tiles_do_not_change_results(case):
    """Not a bit, as long as tensor cores are not among them: the sums are the same, in the same order."""
    found = []
    for rows in (1, 2, 4):
        Kernel(FLOAT, rows).emulate(case)
        found.append(everything(case, SWEPT))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("N", [20, 100])
def test_the_batch_beside_does_not_change_results(N, kernel):
    case, batch = Case(T=2, B=11, N=N), slice(9, 10)
    kernel.emulate(case)
    whole = everything(case, SWEPT, kernel.dtype)
    kernel.emulate(case.with_(B=1))
    for actual, expected in zip(everything(case, SWEPT, kernel.dtype, batch), whole, strict=True):
        if expected.numel():
            assert_identical(actual, expected[..., batch, :], "a result")


@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@pytest.mark.parametrize("N", [20, 128])
def test_small_integers_are_exact(N, tf32, kernel, monkeypatch):
    """Where nothing has to be rounded, a product has only one answer, in tf32 as well."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    case = Case(T=3, B=9, N=N, cell="rnn_relu")
    kernel.emulate(case)
    numbers = torch.Generator().manual_seed(4)
    u, h0, grad = (
        torch.randint(-2, 3, shape, generator=numbers).to(DEVICE, kernel.dtype)
        for shape in (case.shape, case.shape[1:], case.shape)
    )
    sparse = torch.rand(2, N, N, generator=numbers) * N < 3  # sums below the 8 bits of bfloat16
    weight, feedback = (sparse * torch.randint(-1, 2, sparse.shape, generator=numbers)).to(DEVICE, kernel.dtype)
    found = []
    for name in ("cuda", "reference"):
        h = forward_op(case.cell, u, weight, None, h0, backend=name).h
        back = Back(case.cell, h, weight, grad=grad, feedback=feedback, carried=h0, through=h0)
        found.append({"h": h, **back.run(Sweep("weight"), name).swept})
    assert all(tensor.abs().max() > 3 for tensor in found[1].values())
    assert_same_bits(*found)


@pytest.mark.skipif(ON_GPU, reason="a GPU has as many multiprocessors as it has")
@pytest.mark.parametrize(
    ("setting", "value", "rows"),
    [("allow_tf32", False, 4), ("allow_tf32", True, 2), ("fp32_precision", "ieee", 4), ("fp32_precision", "tf32", 2)],
)
def test_when_tensor_cores_are_taken(setting, value, rows, monkeypatch):
    """Where tiles of 4 rows, or with tf32 of 2, do not all run at once; tf32 by either of torch's two settings."""
    tf32 = rows == 2
    case = Case(T=2, B=9, H=2, N=20)
    plain, tensor_cores = (everything_at(case, multiprocessors) for multiprocessors in (1000, 0))
    monkeypatch.setattr(torch.backends.cuda.matmul, setting, value)
    blocks = -(-case.B // rows) * case.H
    assert torch.equal(everything_at(case, blocks), plain)
    found = everything_at(case, blocks - 1)
    assert not torch.equal(found, plain)
    assert torch.equal(found, tensor_cores) != tf32  # and what torch allows is done, no less and no more


def everything_at(case: Case, multiprocessors: int) -> torch.Tensor:
    emulate(multiprocessors=multiprocessors)
    return torch.cat([tensor.flatten() for tensor in everything(case, SWEPT)])


def test_tanh_accuracy():
    emulate(multiprocessors=5000)  # tiles of 4 rows
    tanh_check(FLOAT, "cuda", DEVICE)


# --- memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kernel):
    for case in (SMALL, HEADS):
        kernel.emulate(case)
        forward_check(case, kernel.dtype, "cuda", layout, DEVICE)
        rule = kernel.rule(RULES["layer-total"], case)
        backward_check(case, rule, kernel.dtype, "cuda", layout, DEVICE)


@pytest.mark.parametrize("case", [SMALL, HEADS, Case(T=2, B=5, N=33), Case(T=2, B=3, N=100)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, kernel, fences):
    kernel.emulate(case)
    everything(case, SWEPT, kernel.dtype)
    assert assert_within_fences(fences) == 1 + outputs(SWEPT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("N", [1, 17])
def test_not_finite(N, nonlinearity, value, kernel):
    """It stays in its unit until the next step, and in its sequence for ever, as in the reference. The zeros that pad
    the weight make NaN of infinity, which a single unit keeps; it must not see them.
    """
    case = Case(T=4, B=5, N=N, cell=f"rnn_{nonlinearity}")
    kernel.emulate(case)
    check_not_finite(case, {name: kernel.rule(rule, case) for name, rule in SWEPT.items()}, value, kernel.dtype)


# --- the op and the layer around the kernels


@pytest.mark.parametrize("sources", ["states", "last", "neither"])
@pytest.mark.parametrize("rule", SWEPT)
def test_sources(rule, sources, kernel):
    """A gradient that does not arrive is the same as one of zeros."""
    kernel.emulate(SMALL)
    back = given_to(SMALL, forward_op(SMALL.cell, *inputs_of(SMALL, kernel.dtype), backend="cuda").h, kernel.dtype)
    back = back.with_(carried=None, through=None)
    zero = torch.zeros_like(back.h)
    given = {"grad": back.grad} if sources == "states" else {"grad": None}
    given["last"] = back.grad[-1] if sources == "last" else None
    zeros = {"grad": zero, "last": zero[-1]} | {name: x for name, x in given.items() if x is not None}
    found, expected = (back.with_(**sent).run(Sweep.of(SWEPT[rule]), "cuda").swept for sent in (given, zeros))
    assert_same_bits(found, expected)


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize("N", [20, 100])
def test_a_sequence_in_two_parts(N, rule, kernel):
    """The same bits, state and what goes back handed on; in half precision, where that is rounded, of the states."""
    case = Case(T=5, B=3, N=N)
    kernel.emulate(case)
    if kernel.dtype != FLOAT:
        u, weight, _, h0 = inputs_of(case, kernel.dtype)
        h = forward_op(case.cell, u, weight, None, h0, backend="cuda").h
        later = forward_op(case.cell, u[2:], weight, None, h[1].clone(), backend="cuda").h
        assert_identical(later, h[2:], "h")
        return
    assert_same_bits(*in_two_parts(case, SWEPT[rule]))


@pytest.mark.parametrize("checkpoint_every", [None, 2])
@pytest.mark.parametrize("rule", SWEPT)
def test_layer(rule, checkpoint_every):
    """A whole layer, P and input projection included, has the gradients of the reference."""
    results = []
    for name in ("cuda", "reference"):
        torch.manual_seed(0)
        layer = tp.nn.RNN(4, 20, rule=SWEPT[rule], checkpoint_every=checkpoint_every, backend=name).to(DEVICE)
        x = torch.randn(5, 3, 4).to(DEVICE).requires_grad_()
        output, last = layer(x)
        (output.square().sum() + last.sum()).backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual.cpu(), extended(expected.cpu()), "a result", condition=10)


@pytest.mark.parametrize("rule", REFUSED)
def test_other_inverses_are_refused(rule):
    sweep = Sweep.of(RULES[rule])
    back = back_of(SMALL, FLOAT, sweep).map(lambda tensor: tensor.to(DEVICE))
    with pytest.raises(tp.BackendUnavailableError) as caught:
        back.run(sweep, "cuda")
    assert str(caught.value) == (
        f"rnn: backend 'cuda' cannot run this call: this version has no CUDA kernel for the inverse "
        f"{sweep.inverse!r}. Use backend='auto' or 'reference'."
    )


def test_what_else_is_refused():
    for case, dtype, reason in (
        (
            *(Case(N=257), torch.bfloat16),
            "it keeps the weight of up to 256 units in bfloat16, and there are 257",
        ),
        (SMALL, torch.float64, "it computes float32, bfloat16 and float16, and the tensors are float64"),
    ):
        with pytest.raises(tp.BackendUnavailableError) as caught:
            forward_op(case.cell, *inputs_of(case, dtype), backend="cuda")
        assert str(caught.value) == (
            f"rnn: backend 'cuda' cannot run this call: {reason}. Use backend='auto' or 'reference'."
        )


def test_auto_does_not_take_it():
    """Until it has run on a GPU."""
    assert all("cuda" not in names for names in backends("rnn").preference.values())


def test_launchers_check_for_themselves():
    nothing = dict.fromkeys(("input", "weight", "start", "h", "device", "stream"), 0)
    forward = {"cell": "rnn_tanh", "tf32": False, "input_strides": (0, 0, 0), **nothing}
    with pytest.raises(ValueError, match="recurrence_fwd: N must be at most 256, got 257"):
        _native.cuda.recurrence_fwd(**forward, dtype="float16", sizes=(1, 1, 1, 257))
    with pytest.raises(ValueError, match="unknown dtype 'float64'"):
        _native.cuda.recurrence_fwd(**forward, dtype="float64", sizes=(1, 1, 1, 1))
    names = ("grad_h", "grad_last", "h", "weight", "carried_in", "through_in", "carried_out", "through_out", "grad_u")
    backward = {
        "dtype": "bfloat16",
        "sizes": (1, 1, 1, 129),
        "grad_h_strides": (0, 0, 0),
        "tf32": False,
        "cell": "rnn_tanh",
        "inverse": "weight",
        "update": "total",
        "step": 1.0,
        "clip": 0.0,
        "reg": 0.25,
        "rtol": 1e-4,
        **dict.fromkeys((*names, "displacements", "iterations", "missed", "device", "stream"), 0),
    }
    for feedback, missing in ((0, "feedback"), (1, "displacements")):
        with pytest.raises(ValueError, match=f"recurrence_bwd: {missing} is missing"):
            _native.cuda.recurrence_bwd(**backward, feedback=feedback)


# --- on a GPU only


@needs_gpu
@pytest.mark.parametrize("N", [5, 130], ids=["one multiprocessor", "a cluster"])
def test_graph_capture_and_replay(N):
    capture_check(SMALL.with_(N=N), "cuda")


@needs_gpu
@pytest.mark.parametrize("N", [5, 130], ids=["one multiprocessor", "a cluster"])
def test_on_another_stream(N):
    stream_check(SMALL.with_(N=N), "cuda")


@needs_gpu
def test_refresh_counts_and_waits_for_nothing():
    """The drift of the weight is not looked at there."""
    layer = tp.nn.RNN(3, 5, refresh=3, device=DEVICE)
    x = torch.randn(4, 2, 3, device=DEVICE)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(layer(x)[1].sum(), layer.weight_hh_l0)[0]

    gradient()
    kept = layer.refreshed[0].kept.clone()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradient()
    assert torch.equal(layer.refreshed[0].kept, kept)
    gradient()
    assert not torch.equal(layer.refreshed[0].kept, kept)


ON_THE_SECOND_DEVICE = """
import threading
import torch
import tp_kernels as tp

def run():
    u, weight = torch.zeros(2, 1, 5, device="cuda:1"), torch.eye(5, device="cuda:1")
    tp.rnn(u, weight, backend="cuda")

thread = threading.Thread(target=run)
thread.start()
thread.join()
print(*(torch._C._cuda_hasPrimaryContext(device) for device in (0, 1)))
"""


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_a_device_that_is_not_used_gets_no_context():
    ran = subprocess.run([sys.executable, "-c", ON_THE_SECOND_DEVICE], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("False True\n", "")
