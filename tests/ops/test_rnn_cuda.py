"""``rnn`` in CUDA C++: on a GPU where there is one and the module was built, else the very same kernels emulated, one
thread block after the other. The checks, oracles and budgets are those of every back-end, the cases few and small where
they are emulated.
"""

from types import ModuleType

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, NONLINEARITIES, RULES, TILE_CASES, TIME_CASES, RNNCase
from _checks import backward_op, rnn_backward_check, rnn_forward_check, tanh_check
from _compare import assert_identical, assert_near, assert_same_pattern
from _cuda import NotBuilt, emulated
from _oracle import extended

import tp_kernels as tp
from conftest import REQUIRED, absent, assert_within_fences
from tp_kernels import _native
from tp_kernels.ops.rnn.backends import BACKENDS
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
SMALL = RNNCase(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
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
ON_GPU = _native.cuda_available()[0] and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if ON_GPU:  # the last two are too many for tiles of 1 or 2 rows
    CASES += tuple(case for case in TILE_CASES + TIME_CASES + HEAD_CASES if case.N <= 128)
    CASES += (RNNCase(T=3, B=1001, N=100), RNNCase(T=3, B=301, N=33), RNNCase(T=2, B=701, H=2, N=17))
SWEPT = {
    name: rule
    for name, rule in RULES.items()
    if Sweep.of(rule, "tanh").inverse in ("none", "identity", "weight", "layer")
}
REFUSED = sorted(set(RULES) - set(SWEPT))
FLOAT = torch.float32


@pytest.fixture(scope="module")
def emulated_module() -> ModuleType | None:
    """Built once, or not at all; ``None`` on a GPU."""
    if ON_GPU:
        return None
    if "cuda" in REQUIRED:
        absent("cuda", _native.cuda_available()[1] or "this torch can use no CUDA device")
    try:
        return emulated()
    except NotBuilt as reason:
        absent("cuda-emulated", str(reason))


@pytest.fixture(autouse=True)
def module(emulated_module: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if emulated_module is not None:
        monkeypatch.setattr(_native, "cuda", emulated_module)
    emulate(multiprocessors=4)


def emulate(multiprocessors: int, reversed: bool = False) -> None:
    """A device of that many multiprocessors, and the order of the threads; a GPU is as it is."""
    if not ON_GPU:
        _native.cuda.emulate(multiprocessors=multiprocessors, reversed=reversed)


@pytest.fixture(params=(4,) if ON_GPU else (1, 2, 4), ids="rows{}".format)
def rows(request: pytest.FixtureRequest):
    """Emulates a device for which the launcher takes tiles of that many rows."""

    def emulate_for(case: RNNCase, reversed: bool = False) -> None:
        heads = case.H or 1
        blocks = {1: case.B * heads, 2: -(-case.B // 2) * heads, 4: 0}[request.param]
        emulate(blocks, reversed)

    return emulate_for


def tensors_of(case: RNNCase) -> list[torch.Tensor]:
    """u, W, h_0 and what arrives from the loss."""
    return [tensor.to(DEVICE) for tensor in (*case.tensors(FLOAT), case.gradient(FLOAT))]


# --- forward and backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, rows):
    rows(case)
    rnn_forward_check(case, FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("rule", SWEPT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule, rows):
    rows(case)
    rnn_backward_check(case, SWEPT[rule], FLOAT, "cuda", device=DEVICE)


def everything(case: RNNCase) -> list[torch.Tensor]:
    """What every kernel computes for a case, handed in in parts, too."""
    u, weight, h0, grad = tensors_of(case)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "cuda")
    results = [h]
    for rule in SWEPT.values():
        sweep = Sweep.of(rule, case.nonlinearity)
        arguments = grad, None, h, weight, 0.6 * weight.mT, h0, h0, None, None
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
        emulate(multiprocessors)
        found.append(everything(case))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert_identical(actual, expected, "a result")


def test_tanh_accuracy():
    tanh_check(FLOAT, "cuda", DEVICE)


# --- memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rows):
    for case in (SMALL, HEADS):
        rows(case)
        rnn_forward_check(case, FLOAT, "cuda", layout, DEVICE)
        rnn_backward_check(case, RULES["layer-total"], FLOAT, "cuda", layout, DEVICE)


@pytest.mark.parametrize("case", [SMALL, HEADS, RNNCase(T=2, B=5, N=33)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, rows, fences):
    rows(case)
    everything(case)
    assert len(fences) == 1 + 3 * len(SWEPT)
    assert_within_fences(fences)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("N", [1, 17])
def test_not_finite(N, nonlinearity, value, rows):
    """It stays in its unit until the next step, and in its sequence for ever, as in the reference. The zeros that pad
    the weight make NaN of infinity, which a single unit keeps; it must not see them.
    """
    case = RNNCase(T=4, B=5, N=N, nonlinearity=nonlinearity)
    rows(case)
    u, weight, h0, grad = tensors_of(case)
    u[1, 2, N - 1] = value
    h, expected = (ops.rnn_fwd(u, weight, h0, nonlinearity, name) for name in ("cuda", "reference"))
    assert_same_pattern(h if N == 1 else h[:2], expected if N == 1 else expected[:2], "h")
    assert h.isnan().any(-1).nonzero().tolist() == expected.isnan().any(-1).nonzero().tolist()
    for rule in SWEPT.values():
        sweep = Sweep.of(rule, nonlinearity)
        arguments = grad, None, expected, weight, weight, None, None, None, None, *sweep
        delta, wanted = (ops.rnn_bwd(*arguments, name)[0] for name in ("cuda", "reference"))
        assert_same_pattern(delta.sum(-1), wanted.sum(-1), "delta")


# --- the op and the layer around the kernels


@pytest.mark.parametrize("sources", ["states", "last", "neither"])
@pytest.mark.parametrize("rule", SWEPT)
def test_sources(rule, sources):
    """A gradient that does not arrive is the same as one of zeros."""
    u, weight, h0, gradient = tensors_of(SMALL)
    h = ops.rnn_fwd(u, weight, h0, "tanh", "cuda")
    sweep = Sweep.of(SWEPT[rule], "tanh")
    grad = gradient if sources == "states" else None
    last = gradient[-1] if sources == "last" else None
    zeros = (torch.zeros_like(h) if grad is None else grad, torch.zeros_like(h[-1]) if last is None else last)
    found = backward_op(grad, last, h, weight, weight, sweep, "cuda")
    expected = backward_op(*zeros, h, weight, weight, sweep, "cuda")
    for what, *pair in zip(("grad_u", "grad_h0"), found, expected, strict=True):
        assert_identical(*pair, what)


@pytest.mark.parametrize("rule", SWEPT)
def test_a_sequence_in_two_parts(rule):
    """The same bits, state and what goes back handed on."""
    case = RNNCase(T=5, B=3, N=20)
    u, weight, h0, grad = tensors_of(case)
    sweep = Sweep.of(SWEPT[rule], "tanh")
    h = ops.rnn_fwd(u, weight, h0, "tanh", "cuda")
    assert_identical(ops.rnn_fwd(u[2:], weight, h[1].clone(), "tanh", "cuda"), h[2:], "h")
    whole = ops.rnn_bwd(grad, None, h, weight, weight, None, None, None, None, *sweep, "cuda")
    later, carried, through = ops.rnn_bwd(grad[2:], None, h[2:], weight, weight, None, None, None, None, *sweep, "cuda")
    sent = (tensor if tensor.numel() else None for tensor in (carried, through))
    first = ops.rnn_bwd(grad[:2], None, h[:2], weight, weight, *sent, None, None, *sweep, "cuda")
    assert_identical(torch.cat([first[0], later]), whole[0], "grad_u")
    for what, *pair in zip(("carried", "through"), first[1:], whole[1:], strict=True):
        assert_identical(*pair, what)


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
    u, weight, h0, _ = tensors_of(SMALL)
    sweep = Sweep.of(RULES[rule], "tanh")
    with pytest.raises(tp.BackendUnavailableError) as caught:
        ops.rnn_bwd(u, None, u, weight, weight, None, None, u, h0, *sweep, "cuda")
    assert str(caught.value) == (
        f"rnn: backend 'cuda' cannot run this call: this version has no CUDA kernel for the inverse "
        f"{sweep.inverse!r}. Use backend='auto' or 'reference'."
    )


def test_what_else_is_refused():
    for case, dtype, reason in (
        (SMALL, torch.float64, "it computes float32, and the tensors are float64"),
        (SMALL, torch.bfloat16, "it computes float32, and the tensors are bfloat16"),
    ):
        with pytest.raises(tp.BackendUnavailableError) as caught:
            tp.rnn(*(tensor.to(DEVICE) for tensor in case.tensors(dtype)), backend="cuda")
        assert str(caught.value) == (
            f"rnn: backend 'cuda' cannot run this call: {reason}. Use backend='auto' or 'reference'."
        )


def test_auto_does_not_take_it():
    """Until it has run on a GPU."""
    assert all("cuda" not in names for names in BACKENDS.preference.values())


def test_launchers_check_for_themselves():
    pointers = dict.fromkeys(("input", "weight", "h0", "h", "device", "stream"), 0)
    with pytest.raises(ValueError, match="rnn_fwd: N must be at most 128, got 129"):
        _native.cuda.rnn_fwd(**pointers, input_strides=(0, 0, 0), sizes=(1, 1, 1, 129), nonlinearity="tanh")
