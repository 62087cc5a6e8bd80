"""The recurrence in CUDA C++ with ``inverse="jacobian"``: on a GPU where there is one, else emulated."""

import re
from dataclasses import replace

import pytest
import torch
from _cases import NONLINEARITIES, RULES, Case
from _checks import Back, assert_same_bits, back_of, backward_check
from _compare import assert_identical, assert_near, assert_solved
from _cuda_device import DEVICE, FLOAT, ON_GPU, emulate, everything, given_to, in_two_parts, inputs_of, outputs
from _oracle import extended
from _oracle_recurrence import SLOPES

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels.ops.rnn.cell import ACTIVATIONS
from tp_kernels.rules import Sweep

pytestmark = pytest.mark.usefixtures("cuda")
JACOBIAN = {name: RULES[name] for name in ("jacobian-total", "jacobian-local")}
# Every padded width, full and not; full and partial tiles; no rows; heads; every activation.
CASES = (
    Case(T=1, B=1, N=1),
    Case(T=3, B=0, N=5),
    Case(T=2, B=4, N=32),
    Case(T=5, B=7, N=33, cell="rnn_relu", h0=False),
    Case(T=3, B=5, H=3, N=17),
    Case(T=2, B=3, N=64, cell="rnn_identity"),
    Case(T=2, B=5, N=100),
    Case(T=1, B=4, N=128),
)
if ON_GPU:
    CASES += (Case(T=2, B=701, N=70), Case(T=3, B=301, H=2, N=33))


@pytest.fixture(params=(4,) if ON_GPU else (1, 2, 4), ids="rows{}".format)
def rows(request: pytest.FixtureRequest):
    """Emulates a device for which the launcher takes tiles of that many rows; of 4 where tensor cores would have 8."""

    def emulate_for(case: Case, reversed: bool = False) -> None:
        blocks = 0 if request.param == 4 else -(-case.B // request.param) * (case.H or 1)
        emulate(multiprocessors=blocks, reversed=reversed)

    return emulate_for


@pytest.mark.parametrize("rule", JACOBIAN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, rule, rows):
    rows(case)
    backward_check(case, JACOBIAN[rule], FLOAT, "cuda", device=DEVICE)


@pytest.mark.parametrize("case", [Case(T=3, B=5, N=20), Case(T=2, B=3, H=2, N=100)], ids=str)
def test_no_races(case, rows):
    """Threads that run in the opposite order, between one barrier and the next, make no difference."""
    found = []
    for reversed in (False, True):
        rows(case, reversed)
        found.append(everything(case, JACOBIAN))
    for actual, expected in zip(*found, strict=True):
        assert_identical(actual, expected, "a result")


@pytest.mark.parametrize("case", [Case(T=3, B=5, N=20), Case(T=2, B=3, H=2, N=100)], ids=str)
def test_tiles_do_not_change_results(case):
    """Not a bit: the sums are the same, in the same order, and a row stops by itself."""
    sweep = Sweep.of(JACOBIAN["jacobian-total"])
    back = given_to(case, back_of(case, FLOAT, sweep).h.to(DEVICE))
    found = []
    for blocks in (1000, -(-case.B // 2) * (case.H or 1), 0):
        emulate(multiprocessors=blocks)
        found.append(back.run(sweep, "cuda").swept)
    for others in found[1:]:
        assert_same_bits(others, found[0])


@pytest.mark.parametrize("case", [Case(T=4, B=3, H=2, N=5), Case(T=2, B=5, N=33)], ids=str)
def test_nothing_is_written_outside_of_the_outputs(case, rows, fences):
    rows(case)
    everything(case, JACOBIAN)
    assert assert_within_fences(fences) == 1 + outputs(JACOBIAN) + len(JACOBIAN)  # residuals, too


@pytest.mark.parametrize("rule", JACOBIAN)
def test_a_sequence_in_two_parts(rule):
    """The same bits, state and what goes back handed on."""
    assert_same_bits(*in_two_parts(Case(T=5, B=3, N=20), JACOBIAN[rule]))


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
    u, weight, _, _ = inputs_of(Case(N=N), dtype)
    with pytest.raises(tp.BackendUnavailableError) as caught:
        Back("rnn_tanh", u, weight, grad=u).run(Sweep("jacobian"), "cuda")
    assert str(caught.value) == (
        f"rnn: backend 'cuda' cannot run this call: it solves inverse='jacobian' {reason}. "
        "Use backend='auto' or 'reference'."
    )


# --- the solve


def saturated(nonlinearity: str = "identity", H: int | None = None) -> Back:
    """States, W with ‖W‖ = 1 and what arrives, some units saturated."""
    case = Case(T=2, B=6, N=33, H=H, cell=f"rnn_{nonlinearity}")
    weight = case.tensors(torch.float64).weight
    weight /= torch.linalg.matrix_norm(weight, 2)[..., None, None]
    h = ACTIVATIONS[nonlinearity](2 * case.gradient(torch.float64, seed=4))
    back = Back(case.cell, h, weight, grad=case.gradient(torch.float64))
    return back.map(lambda tensor: tensor.to(DEVICE, FLOAT))


def solve_of(reg: float, rtol: float = 1e-4) -> Sweep:
    return Sweep("jacobian", "local", reg=reg, rtol=rtol)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("ratio", "rtol"), [(0.1, 1e-4), (0.1, 1e-6), (1e-3, 1e-4)], ids=["plain", "tight", "small r"])
def test_jacobian_solves_the_equation_that_defines_it(ratio, rtol, nonlinearity, rows):
    """Where rounding could exceed rtol, too."""
    back = saturated(nonlinearity)
    rows(Case(B=6))
    lam = back.grad[0]
    found = back.with_(h=back.h[:1], grad=None, last=lam).run(solve_of(ratio, rtol), "cuda").carried
    slope = torch.from_numpy(SLOPES[nonlinearity](back.h[0].double().cpu().numpy()))
    assert_solved(found.cpu(), lam.cpu(), slope[:, :, None] * back.weight.double().cpu(), ratio, rtol)


@pytest.mark.parametrize("H", [None, 2])
def test_what_cannot_be_solved_raises(H, rows):
    """float32 cannot resolve r = 1e-6 ‖J‖² to 1e-6, and overflows in W Wᵀ. The worst sample is named."""
    back, sweep = saturated(H=H), solve_of(1e-6, 1e-6)
    rows(Case(B=6, H=H))
    grad = torch.zeros_like(back.h)
    grad[1, 4] = 1.0
    back = back.with_(grad=grad)
    sample = "sample 4" if H is None else "sample 4, head [01]"
    large = back.with_(weight=1e25 * back.weight)
    for function in (back.run, back.iterations, large.run):
        with pytest.raises(torch.linalg.LinAlgError) as caught:
            function(sweep, "cuda")
        assert re.fullmatch(
            r"rnn: inverse='jacobian' could not be solved in float32 at reg=1e-06: worst at time step [01], "
            rf"{sample}, with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64",
            str(caught.value),
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "state", "weight"])
def test_jacobian_of_what_is_not_finite(where, value, rows):
    """NaN for that sample from there on back, no error, and not a bit of another sample changed."""
    back, sweep = saturated("tanh"), solve_of(0.25)
    rows(Case(B=6))
    clean = back.run(sweep, "cuda")
    {"gradient": back.grad[1, 4], "state": back.h[1, 4], "weight": back.weight[4]}[where][3] = value
    found = back.run(sweep, "cuda")
    others = torch.arange(6) != 4 if where != "weight" else torch.zeros(6, dtype=torch.bool)
    assert_identical(found.grad_u[:, others], clean.grad_u[:, others], "grad_u")
    assert_identical(found.carried[others], clean.carried[others], "carried")
    assert found.grad_u[0, ~others].isnan().all()
    assert found.carried[~others].isnan().all()


def test_jacobian_of_any_magnitude(rows):
    """No square over- or underflows, a denormal displacement is no error, and zero takes no iteration."""
    back, sweep = saturated("tanh"), solve_of(0.25)
    rows(Case(B=6))
    lam = back.grad[0].clone()
    lam[2] = 0

    def carried(factor: float) -> torch.Tensor:
        return back.with_(grad=None, last=factor * lam).run(sweep, "cuda").carried

    one = carried(1.0)
    for power in (-100, 100):
        assert_near((carried(2.0**power) * 2.0**-power).cpu(), extended(one.cpu()), "carried")
    for scale in (1e-38, 1e-40, 1e-44):
        assert carried(scale).abs().max() <= 4 * scale * back.grad.abs().max()
    assert one[2].eq(0).all()
    counts = back.with_(grad=None, last=lam).iterations(sweep, "cuda")
    assert counts[:, 2].eq(0).all()
    assert counts[:, :2].gt(0).all()


def test_iterations(cpu):
    """Those of the CPU's solver but for rounding; one where the weight is orthogonal, whatever the slopes."""
    sweep = Sweep("jacobian")
    back = back_of(Case(T=3, B=5, N=33, H=2), FLOAT, sweep).with_(grad=None)
    orthogonal = back.with_(weight=torch.linalg.qr(back.weight).Q.contiguous())
    for given, allowed in ((orthogonal, 0), (back, 1)):
        found = given.map(lambda tensor: tensor.to(DEVICE)).iterations(sweep, "cuda").cpu()
        assert found.dtype == torch.int32
        assert (found - given.iterations(sweep, "cpu")).abs().max() <= allowed
    assert found.unique().numel() > 1
