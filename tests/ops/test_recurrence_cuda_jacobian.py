"""``rnn`` in CUDA C++ with ``inverse="jacobian"``: on a GPU where there is one, else emulated."""

import re
from dataclasses import replace

import pytest
import torch
from _cases import NONLINEARITIES, RULES, RNNCase
from _checks import backward_op, rnn_backward_check
from _compare import assert_identical, assert_near, assert_solved
from _cuda_device import DEVICE, FLOAT, ON_GPU, emulate, everything, in_two_parts, ops, tensors_of
from _oracle import SLOPES, extended

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels.ops.rnn import reference
from tp_kernels.rules import Sweep

pytestmark = pytest.mark.usefixtures("cuda")
JACOBIAN = {name: RULES[name] for name in ("jacobian-total", "jacobian-local")}
# Every padded width, full and not; full and partial tiles; no rows; heads; every activation.
CASES = (
    RNNCase(T=1, B=1, N=1),
    RNNCase(T=3, B=0, N=5),
    RNNCase(T=2, B=4, N=32),
    RNNCase(T=5, B=7, N=33, nonlinearity="relu", h0=False),
    RNNCase(T=3, B=5, H=3, N=17),
    RNNCase(T=2, B=3, N=64, nonlinearity="identity"),
    RNNCase(T=2, B=5, N=100),
    RNNCase(T=1, B=4, N=128),
)
if ON_GPU:
    CASES += (RNNCase(T=2, B=701, N=70), RNNCase(T=3, B=301, H=2, N=33))


@pytest.fixture(params=(4,) if ON_GPU else (1, 2, 4), ids="rows{}".format)
def rows(request: pytest.FixtureRequest):
    """Emulates a device for which the launcher takes tiles of that many rows; of 4 where tensor cores would have 8."""

    def emulate_for(case: RNNCase, reversed: bool = False) -> None:
        blocks = 0 if request.param == 4 else -(-case.B // request.param) * (case.H or 1)
        emulate(multiprocessors=blocks, reversed=reversed)

    return emulate_for


@pytest.mark.parametrize("rule", JACOBIAN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule, rows):
    rows(case)
    rnn_backward_check(case, JACOBIAN[rule], FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("case", [RNNCase(T=3, B=5, N=20), RNNCase(T=2, B=3, H=2, N=100)], ids=str)
def test_no_races(case, rows):
    """Threads that run in the opposite order, between one barrier and the next, make no difference."""
    found = []
    for reversed in (False, True):
        rows(case, reversed)
        found.append(everything(case, JACOBIAN))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("case", [RNNCase(T=3, B=5, N=20), RNNCase(T=2, B=3, H=2, N=100)], ids=str)
def test_tiles_do_not_change_results(case):
    """Not a bit: the sums are the same, in the same order, and a row stops by itself."""
    u, weight, h0, grad = tensors_of(case)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "reference")
    found = []
    for blocks in (1000, -(-case.B // 2) * (case.H or 1), 0):
        emulate(multiprocessors=blocks)
        sweep = Sweep.of(JACOBIAN["jacobian-total"], case.nonlinearity)
        found.append(ops.rnn_bwd(grad, None, h, weight, None, h0, h0, None, None, *sweep, "cuda"))
    for others in found[1:]:
        for what, *pair in zip(("grad_u", "carried", "through"), others, found[0], strict=True):
            assert_identical(*pair, what)


@pytest.mark.parametrize("case", [RNNCase(T=4, B=3, H=2, N=5), RNNCase(T=2, B=5, N=33)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, rows, fences):
    rows(case)
    everything(case, JACOBIAN)
    assert len(fences) == 1 + 4 * len(JACOBIAN)  # residuals, too
    assert_within_fences(fences)


@pytest.mark.parametrize("rule", JACOBIAN)
def test_a_sequence_in_two_parts(rule):
    """The same bits, state and what goes back handed on."""
    parts = in_two_parts(RNNCase(T=5, B=3, N=20), JACOBIAN[rule])
    for what, *pair in zip(("h", "grad_u", "carried", "through"), *parts, strict=True):
        assert_identical(*pair, what)


@pytest.mark.parametrize("rule", JACOBIAN)
def test_layer(rule):
    """A whole layer has the gradients of the reference."""
    results = []
    for name in ("cuda", "reference"):
        torch.manual_seed(0)
        layer = tp.nn.RNN(4, 20, rule=replace(JACOBIAN[rule], rtol=1e-6), backend=name).to(DEVICE)
        x = torch.randn(5, 3, 4).to(DEVICE).requires_grad_()
        output, last = layer(x)
        (output.square().sum() + last.sum()).backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual.cpu(), extended(expected.cpu()), "a result", condition=20)


@pytest.mark.parametrize(
    ("N", "dtype", "reason"),
    [
        (129, FLOAT, "for up to 128 units, and there are 129"),
        (5, torch.bfloat16, "in float32, and the tensors are bfloat16"),
    ],
)
def test_what_is_refused(N, dtype, reason):
    u, weight, _ = (tensor.to(DEVICE) for tensor in RNNCase(N=N).tensors(dtype))
    with pytest.raises(tp.BackendUnavailableError) as caught:
        ops.rnn_bwd(u, None, u, weight, None, None, None, None, None, *Sweep("tanh", "jacobian"), "cuda")
    assert str(caught.value) == (
        f"rnn: backend 'cuda' cannot run this call: it solves inverse='jacobian' {reason}. "
        "Use backend='auto' or 'reference'."
    )


# --- the solve


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
