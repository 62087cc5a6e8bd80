"""``rnn`` in CUDA C++: on a GPU where there is one and the module was built, else the very same kernels emulated, one
thread block after the other. The checks, oracles and budgets are those of every back-end, the cases few and small where
they are emulated.
"""

import re
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, NONLINEARITIES, RULES, TILE_CASES, TIME_CASES, RNNCase
from _checks import backward_op, rnn_backward_check, rnn_forward_check, tanh_check
from _compare import assert_identical, assert_near, assert_same_pattern, assert_solved
from _cuda import NotBuilt, emulated
from _oracle import SLOPES, extended

import tp_kernels as tp
from conftest import REQUIRED, absent, assert_within_fences
from tp_kernels import _native
from tp_kernels.ops.rnn import reference
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
# Too many units for one multiprocessor, and the rows of a tile: 3 to 16 blocks, full and not; a half and a whole in
# registers, part of it in shared memory; two matrices at once and one after the other.
CLUSTER_CASES = (
    (RNNCase(T=3, B=3, N=129), 1),
    (RNNCase(T=3, B=3, N=200, nonlinearity="relu", h0=False), 2),
    (RNNCase(T=2, B=4, N=256), 4),
    (RNNCase(T=2, B=1, H=2, N=300, nonlinearity="identity"), 1),
    (RNNCase(T=2, B=1, N=512), 1),
    (RNNCase(T=3, B=2, N=600), 2),
    (RNNCase(T=1, B=1, N=1024), 4),
)
ON_GPU = _native.cuda_available()[0] and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if ON_GPU:  # the last two are too many for tiles of 1 or 2 rows
    CASES += tuple(case for case in TILE_CASES + TIME_CASES + HEAD_CASES if case.N <= 128)
    CLUSTER_CASES += ((RNNCase(T=50, B=51, N=200), 2), (RNNCase(T=3, B=301, N=300), 4), (RNNCase(T=9, B=33, N=1000), 4))
    CASES += (RNNCase(T=3, B=1001, N=100), RNNCase(T=3, B=301, N=33), RNNCase(T=2, B=701, H=2, N=17))
SWEPT = {
    name: rule
    for name, rule in RULES.items()
    if Sweep.of(rule, "tanh").inverse in ("none", "identity", "weight", "layer", "jacobian")
}
CLUSTERED = {name: rule for name, rule in SWEPT.items() if not name.startswith("jacobian")}
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


def emulate(multiprocessors: int, reversed: bool = False, largest_cluster: int = 16, shared_memory: int = 227) -> None:
    """A device of that many multiprocessors, blocks of a cluster and KB of shared memory of a block, and the order of
    threads and blocks; a GPU is as it is.
    """
    if not ON_GPU:
        _native.cuda.emulate(
            multiprocessors=multiprocessors,
            reversed=reversed,
            largest_cluster=largest_cluster,
            shared_memory=shared_memory << 10,
        )


def emulate_for(case: RNNCase, rows: int, reversed: bool = False) -> None:
    """A device for which the launcher takes tiles of that many rows. One that cannot hold so many units skips the test:
    smaller clusters, and none, are emulated.
    """
    tiles = {1: case.B, 2: -(-case.B // 2), 4: 0}[rows]
    emulate(tiles * (case.H or 1) * (-(-case.N // 64) if case.N > 128 else 1), reversed)
    if case.N > 128 and (largest := _native.cuda.rnn_cluster_largest(0)) < case.N:
        pytest.skip(f"clusters of this device hold {largest} units")


@pytest.fixture(params=(4,) if ON_GPU else (1, 2, 4), ids="rows{}".format)
def rows(request: pytest.FixtureRequest):
    return lambda case, reversed=False: emulate_for(case, request.param, reversed)


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


@pytest.mark.parametrize(("case", "rows_of_tile"), CLUSTER_CASES, ids=str)
def test_cluster_forward(case, rows_of_tile):
    emulate_for(case, rows_of_tile)
    rnn_forward_check(case, FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("rule", CLUSTERED)
@pytest.mark.parametrize(("case", "rows_of_tile"), CLUSTER_CASES, ids=str)
def test_cluster_backward(case, rows_of_tile, rule):
    emulate_for(case, rows_of_tile)
    rnn_backward_check(case, SWEPT[rule], FLOAT, "cuda", device=DEVICE)


def rules_of(case: RNNCase) -> dict[str, tp.BackProp | tp.TargetProp]:
    return SWEPT if case.N <= 128 else CLUSTERED


def everything(case: RNNCase) -> list[torch.Tensor]:
    """What every kernel computes for a case, handed in in parts, too."""
    u, weight, h0, grad = tensors_of(case)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "cuda")
    results = [h]
    for rule in rules_of(case).values():
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


@pytest.mark.parametrize(
    ("case", "rows_of_tile"), [(RNNCase(T=4, B=2, N=150), 2), (RNNCase(T=3, B=1, N=530), 1)], ids=str
)
def test_no_races_in_a_cluster(case, rows_of_tile):
    """Nor do blocks that run in the opposite order, each as far ahead of the others as the barriers let it, and stores
    into other blocks that arrive as late as they may.
    """
    found = []
    for reversed in (False, True):
        emulate_for(case, rows_of_tile, reversed)
        found.append(everything(case))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("rule", [rule for rule in SWEPT if rule in ("weight-total", "layer-total")])
def test_two_sweeps_are_one(rule):
    """Not a bit changes where both matrices do not fit into the blocks of a cluster."""
    if ON_GPU:
        pytest.skip("the device's own shared memory decides")
    u, weight, h0, grad = tensors_of(RNNCase(T=3, B=1, N=400))
    sweep = Sweep.of(SWEPT[rule], "tanh")
    found = []
    for largest_cluster, shared_memory in ((16, 227), (8, 99)):
        emulate(1000, largest_cluster=largest_cluster, shared_memory=shared_memory)
        found.append(ops.rnn_bwd(grad, h0, u, weight, 0.6 * weight.mT, h0, h0, None, None, *sweep, "cuda"))
    for what, *pair in zip(("grad_u", "carried", "through"), *found, strict=True):
        assert_identical(*pair, what)


@pytest.mark.parametrize(
    "case", [RNNCase(T=3, B=5, N=20), RNNCase(T=2, B=3, H=2, N=100), RNNCase(T=2, B=3, N=140)], ids=str
)
def test_tiles_do_not_change_results(case):
    """Not a bit: the sums are the same, in the same order."""
    found = []
    for rows_of_tile in (1, 2, 4):
        emulate_for(case, rows_of_tile)
        found.append(everything(case))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert_identical(actual, expected, "a result")


def test_tanh_accuracy():
    tanh_check(FLOAT, "cuda", DEVICE)


# --- the solve of "jacobian"


def saturated(ratio: float, nonlinearity: str = "identity", H: int | None = None) -> list[torch.Tensor]:
    """h, W with ‖W‖ = 1 and what arrives, some units saturated, and a rule with ``r = ratio``."""
    case = RNNCase(T=2, B=6, N=33, H=H, nonlinearity=nonlinearity)
    _, weight, _ = case.tensors(torch.float64)
    weight /= torch.linalg.matrix_norm(weight, 2)[..., None, None]
    h = reference.ACTIVATIONS[nonlinearity](2 * case.gradient(torch.float64, seed=4))
    tensors = [tensor.to(DEVICE, FLOAT) for tensor in (h, weight, case.gradient(torch.float64))]
    return [*tensors, tp.TargetProp(inverse="jacobian", update="local", reg=ratio)]


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("ratio", "rtol"), [(0.1, 1e-4), (0.1, 1e-6), (1e-3, 1e-4)], ids=["plain", "tight", "small r"])
def test_jacobian_solves_the_equation_that_defines_it(ratio, rtol, nonlinearity, rows):
    """Where rounding could exceed rtol, too."""
    h, weight, grad, rule = saturated(ratio, nonlinearity)
    rows(RNNCase(B=6))
    sweep = Sweep.of(replace(rule, rtol=rtol), nonlinearity)
    _, found = backward_op(None, grad[0], h[:1], weight, None, sweep, "cuda")
    slope = torch.from_numpy(SLOPES[nonlinearity](h[0].double().cpu().numpy()))
    assert_solved(found.cpu(), grad[0].cpu(), slope[:, :, None] * weight.double().cpu(), ratio, rtol)


@pytest.mark.parametrize("H", [None, 2])
def test_what_cannot_be_solved_raises(H, rows):
    """float32 cannot resolve r = 1e-6 ‖J‖² to 1e-6, and overflows in W Wᵀ. The worst sample is named."""
    h, weight, grad, rule = saturated(1e-6, H=H)
    rows(RNNCase(B=6, H=H))
    grad = torch.zeros_like(h)
    grad[1, 4] = 1.0
    sample = "sample 4" if H is None else "sample 4, head [01]"
    words = None, None, None, None, *Sweep.of(replace(rule, rtol=1e-6), "identity"), "cuda"
    for function, factor in ((ops.rnn_bwd, 1), (ops.rnn_iterations, 1), (ops.rnn_bwd, 1e25)):
        with pytest.raises(torch.linalg.LinAlgError) as caught:
            function(grad, None, h, factor * weight, None, *words)
        assert re.fullmatch(
            r"rnn: inverse='jacobian' could not be solved in float32 at reg=1e-06: worst at time step [01], "
            rf"{sample}, with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64",
            str(caught.value),
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "state", "weight"])
def test_jacobian_of_what_is_not_finite(where, value, rows):
    """NaN for that sample from there on back, no error, and not a bit of another sample changed."""
    h, weight, grad, rule = saturated(0.25, "tanh")
    rows(RNNCase(B=6))
    words = None, None, None, None, None, *Sweep.of(rule, "tanh"), "cuda"
    clean = ops.rnn_bwd(grad, None, h, weight, *words)
    {"gradient": grad[1, 4], "state": h[1, 4], "weight": weight[4]}[where][3] = value
    found = ops.rnn_bwd(grad, None, h, weight, *words)
    others = torch.arange(6) != 4 if where != "weight" else torch.zeros(6, dtype=torch.bool)
    assert_identical(found[0][:, others], clean[0][:, others], "grad_u")
    assert_identical(found[1][others], clean[1][others], "carried")
    assert found[0][0, ~others].isnan().all()
    assert found[1][~others].isnan().all()


def test_jacobian_of_any_magnitude(rows):
    """No square over- or underflows, a denormal displacement is no error, and zero takes no iteration."""
    h, weight, grad, rule = saturated(0.25, "tanh")
    rows(RNNCase(B=6))
    words = None, None, None, None, *Sweep.of(rule, "tanh"), "cuda"
    grad[0, 2] = 0
    one = ops.rnn_bwd(None, grad[0], h, weight, None, *words)[1]
    for power in (-100, 100):
        other = ops.rnn_bwd(None, grad[0] * 2.0**power, h, weight, None, *words)[1]
        assert_near((other * 2.0**-power).cpu(), extended(one.cpu()), "carried")
    for scale in (1e-38, 1e-40, 1e-44):
        found = ops.rnn_bwd(None, scale * grad[0], h, weight, None, *words)[1]
        assert found.abs().max() <= 4 * scale * grad.abs().max()
    assert one[2].eq(0).all()
    counts = ops.rnn_iterations(None, grad[0], h, weight, None, *words)
    assert counts[:, 2].eq(0).all()
    assert counts[:, :2].gt(0).all()


def test_iterations():
    """Those of the CPU's solver but for rounding; one where the weight is orthogonal, whatever the slopes."""
    case = RNNCase(T=3, B=5, N=33, H=2)
    u, weight, _ = case.tensors(FLOAT)
    orthogonal = torch.linalg.qr(weight).Q.contiguous()
    words = *[None] * 5, *Sweep("tanh", "jacobian")
    for matrix in (orthogonal, weight):
        h = ops.rnn_fwd(u, matrix, None, "tanh", "reference")
        expected = ops.rnn_iterations(None, h[0], h, matrix, *words, "cpu")
        h, matrix = h.to(DEVICE), matrix.to(DEVICE)
        found = ops.rnn_iterations(None, h[0], h, matrix, *words, "cuda").cpu()
        assert found.dtype == torch.int32
        assert (found - expected).abs().max() <= (0 if matrix is orthogonal else 1)
    assert found.unique().numel() > 1


# --- memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rows):
    for case in (SMALL, HEADS):
        rows(case)
        rnn_forward_check(case, FLOAT, "cuda", layout, DEVICE)
        rnn_backward_check(case, RULES["layer-total"], FLOAT, "cuda", layout, DEVICE)


@pytest.mark.parametrize("case", [SMALL, HEADS, RNNCase(T=2, B=5, N=33), RNNCase(T=2, B=3, N=130)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, rows, fences):
    rows(case)
    everything(case)
    solves = sum(rule.startswith("jacobian") for rule in rules_of(case))  # they have residuals besides
    assert len(fences) == 1 + 3 * len(rules_of(case)) + solves
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
    not_finite_check(case, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite_in_a_cluster(value):
    case = RNNCase(T=3, B=3, N=131, nonlinearity="relu")
    emulate_for(case, 4)
    not_finite_check(case, value)


def not_finite_check(case: RNNCase, value: float) -> None:
    N, nonlinearity = case.N, case.nonlinearity
    u, weight, h0, grad = tensors_of(case)
    u[1, 2, N - 1] = value
    h, expected = (ops.rnn_fwd(u, weight, h0, nonlinearity, name) for name in ("cuda", "reference"))
    assert_same_pattern(h if N == 1 else h[:2], expected if N == 1 else expected[:2], "h")
    assert h.isnan().any(-1).nonzero().tolist() == expected.isnan().any(-1).nonzero().tolist()
    for rule in rules_of(case).values():
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


PARTED = [(case, rule) for case in (RNNCase(T=5, B=3, N=20), RNNCase(T=4, B=2, N=150)) for rule in rules_of(case)]


@pytest.mark.parametrize(("case", "rule"), PARTED, ids=str)
def test_a_sequence_in_two_parts(case, rule):
    """The same bits, state and what goes back handed on."""
    emulate_for(case, 1)
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


def test_jacobian_is_refused_beyond_one_multiprocessor():
    u, weight, h0 = (tensor.to(DEVICE) for tensor in RNNCase(N=129).tensors(FLOAT))
    with pytest.raises(tp.BackendUnavailableError) as caught:
        ops.rnn_bwd(u, None, u, weight, None, None, None, None, None, *Sweep("tanh", "jacobian"), "cuda")
    assert str(caught.value) == (
        "rnn: backend 'cuda' cannot run this call: it solves inverse='jacobian' for up to 128 units, and there are 129. "
        "Use backend='auto' or 'reference'."
    )


@pytest.mark.parametrize(
    ("largest_cluster", "N", "held"),
    [
        (0, 129, "128 units on one multiprocessor, of clusters the device has none"),
        (8, 513, "512 units on a cluster of multiprocessors"),
        (16, 1025, "1024 units on a cluster of multiprocessors"),
    ],
)
def test_too_many_units_are_refused(largest_cluster, N, held):
    if ON_GPU:
        pytest.skip("the device's own clusters decide")
    emulate(4, largest_cluster=largest_cluster)
    with pytest.raises(tp.BackendUnavailableError) as caught:
        tp.rnn(*RNNCase(N=N).tensors(FLOAT), backend="cuda")
    assert str(caught.value) == (
        f"rnn: backend 'cuda' cannot run this call: it keeps the weight of up to {held}, and there are {N}. "
        "Use backend='auto' or 'reference'."
    )
    tp.rnn(*RNNCase(T=1, B=1, N=N - 1).tensors(FLOAT), backend="cuda")


def test_auto_does_not_take_it():
    """Until it has run on a GPU."""
    assert all("cuda" not in names for names in BACKENDS.preference.values())


@pytest.mark.parametrize(
    ("largest_cluster", "N", "reason"),
    [
        (0, 129, "N must be at most 128 on a device without thread block clusters, got 129"),
        (8, 513, "N must be at most 512 on this device, got 513"),
    ],
)
def test_launchers_check_for_themselves(largest_cluster, N, reason):
    if ON_GPU:
        pytest.skip("the device's own clusters decide")
    emulate(4, largest_cluster=largest_cluster)
    pointers = dict.fromkeys(("input", "weight", "h0", "h", "device", "stream"), 0)
    with pytest.raises(ValueError, match=f"rnn_fwd: {reason}"):
        _native.cuda.rnn_fwd(**pointers, input_strides=(0, 0, 0), sizes=(1, 1, 1, N), nonlinearity="tanh")
