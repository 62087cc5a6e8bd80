"""``gru``: back-ends against the reference and the exact answer, oracles from outside, and the numerical contract."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import _oracle_gru as oracle
import numpy as np
import pytest
import torch
from _cases import BATCHES, GRU_RULES, LAYOUTS, SIZES, GRUCase
from _compare import (
    REFERENCE,
    assert_budget,
    assert_identical,
    assert_near,
    assert_same_pattern,
    assert_solved,
)
from _oracle import extended
from torch import Tensor, nn

import tp_kernels as tp
from conftest import assert_within_fences
from tp_kernels.ops.gru import op
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
SMALL = GRUCase(T=4, B=3, N=5)
CASES = (
    *(GRUCase(T=2, B=B, N=N) for N in SIZES for B in BATCHES),
    *(GRUCase(T=3, B=B, N=N) for B, N in ((48, 5), (49, 17), (100, 33), (145, 64))),
    *(GRUCase(T=T, B=B, N=N, bias=T % 2 == 0, h0=T % 3 == 0) for T in (1, 2, 63, 200) for B, N in ((1, 16), (7, 33))),
)
# Terms. A sum over all gates is one chain of 3N multiply-adds on the native back-end; torch's are summed in blocks, and
# of more terms than this by so much better that twice their error is no measure any more.
LONGEST_SUM = 512
FEW = (SMALL, GRUCase(T=9, B=33, N=17), GRUCase(T=5, B=2, N=64, bias=False, h0=False), GRUCase(T=1, B=1, N=1))


def condition_of(weight: Tensor, sweep: Sweep) -> float:
    """Of ``J Jᵀ + rI`` at most: no slope exceeds 1 but that of z, in which a state stands, at 1/2."""
    return 1 + 4 * float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2 / sweep.reg


def backward_op(
    case: GRUCase, dtype: torch.dtype, sweep: Sweep, backend: str, layout: str = "contiguous"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Of the op, on states and gates of the reference and on given P: its results, and what it was given."""
    u, weight, bias, h0 = case.tensors(dtype)
    h, gates = ops.gru_fwd(u, weight, bias, h0, True, "reference")
    grad, last = case.gradient(dtype), case.gradient(dtype, seed=3)[0]
    given = grad, last, h, gates, weight, case.inverses(dtype, sweep.inverse), h0
    placed = [None if tensor is None else LAYOUTS[layout](tensor) for tensor in given]
    return ops.gru_bwd(*placed, *sweep, backend), given


def gradients(
    case: GRUCase, rule: tp.BackProp | tp.TargetProp | None, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    """h and all gradients, through the public function."""
    names = ("u", "weight", "bias", "h0")
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in zip(names, case.tensors(dtype), strict=True)
        if tensor is not None
    }
    h = tp.gru(**leaves, rule=rule, backend=backend)
    found = torch.autograd.grad(h, list(leaves.values()), case.gradient(dtype))
    return {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}}


def unit_of_torch(case: GRUCase) -> tuple[nn.GRU, Tensor, Tensor | None]:
    """A ``torch.nn.GRU`` whose input is u itself, in float64; u and h_0."""
    u, weight, bias, h0 = case.tensors(torch.float64)
    unit = nn.GRU(3 * case.N, case.N, dtype=torch.float64)
    with torch.no_grad():
        unit.weight_ih_l0.copy_(torch.eye(3 * case.N))
        unit.weight_hh_l0.copy_(weight)
        unit.bias_ih_l0.zero_()
        unit.bias_hh_l0.zero_()
        if bias is not None:
            unit.bias_hh_l0[2 * case.N :] = bias
    return unit, u, h0


# --- forward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, backend):
    tensors = case.tensors(dtype)
    found, plain = (ops.gru_fwd(*tensors, True, name) for name in (backend, "reference"))
    u, weight, bias, h0 = map(extended, tensors)
    exact = oracle.forward(u, weight, bias, h0)
    assert_budget(found[0], plain[0], exact, "h")
    before = oracle.states_before(extended(found[0]), h0)
    for name, *gate, answer in zip(
        "rznq", *(part[1].unbind(2) for part in (found, plain)), _gates(u, weight, bias, before), strict=True
    ):
        assert_budget(*gate, answer, name, scale=1.0)
    assert all(tensor.is_contiguous() for tensor in found)
    assert ops.gru_fwd(*tensors, False, backend)[1].shape == (0,)


def _gates(u: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, before: np.ndarray) -> list[np.ndarray]:
    steps = [oracle.gates_of(*step) for step in ((u[t], weight, bias, before[t]) for t in range(len(u)))]
    return [np.stack(gate) for gate in zip(*steps, strict=True)]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_back_propagation_is_that_of_torch(case, backend):
    unit, u, h0 = unit_of_torch(case)
    leaves = [u.requires_grad_(), *([] if h0 is None else [h0.requires_grad_()])]
    h = unit(u, None if h0 is None else h0[None])[0]
    N = case.N
    theirs = torch.autograd.grad(h, [*leaves, unit.weight_hh_l0, unit.bias_hh_l0], case.gradient(torch.float64))
    found = gradients(case, tp.BackProp(), torch.float64, backend)
    expected = {"h": h, "grad_u": theirs[0], "grad_weight": theirs[-2], "grad_bias": theirs[-1][2 * N :]}
    if h0 is not None:
        expected["grad_h0"] = theirs[1]
    for name, value in found.items():
        value, wanted = (tensor if tensor.dim() > 1 else tensor[None] for tensor in (value, expected[name].detach()))
        assert_near(value, extended(wanted), name)


# --- backward


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, id=f"{case}-{rule}")
        for case in CASES
        for rule in GRU_RULES
        # Through all inverses a displacement grows by up to 1/clip a step: the next test has them over several.
        if case.T <= 2 or not rule.startswith("layer")
    ],
)
def test_backward(case, rule, dtype, backend):
    sweep = Sweep.of(GRU_RULES[rule], "tanh")
    found, given = backward_op(case, dtype, sweep, backend)
    plain, _ = backward_op(case, dtype, sweep, "reference")
    u, weight, bias, _ = case.tensors(dtype)
    grad, last, h, _, _, feedback, h0 = map(extended, given)
    grad[-1] += last
    exact = oracle.backward(grad, extended(u), h, h0, extended(weight), extended(bias), feedback, sweep)
    jacobian = sweep.inverse == "jacobian"
    condition = condition_of(weight, sweep) if jacobian else 10.0  # 1 - n² and z(1 - z) lose digits
    for what, *parts in zip(("grad_u", "grad_h0"), found, plain, exact, strict=False):
        assert parts[0].is_contiguous()
        if 3 * case.N <= LONGEST_SUM:
            assert_budget(*parts, what, condition, rtol=sweep.rtol if jacobian else 0.0)
        else:
            assert_near(parts[0], parts[2], what, condition + sweep.rtol * condition / REFERENCE[dtype])


@pytest.mark.parametrize("rule", ["layer-total", "layer-local"])
def test_backward_through_all_inverses_over_several_steps(rule, dtype, backend):
    case, sweep = GRUCase(T=6, B=7, N=17), Sweep.of(GRU_RULES[rule], "tanh")._replace(clip=0.2)
    found, given = backward_op(case, dtype, sweep, backend)
    plain, _ = backward_op(case, dtype, sweep, "reference")
    u, weight, bias, _ = map(extended, case.tensors(dtype))
    grad, last, h, _, _, feedback, h0 = map(extended, given)
    grad[-1] += last
    exact = oracle.backward(grad, u, h, h0, weight, bias, feedback, sweep)
    for what, *parts in zip(("grad_u", "grad_h0"), found, plain, exact, strict=False):
        assert_budget(*parts, what, condition=100)


@pytest.mark.parametrize("sources", ["states", "last", "neither"])
@pytest.mark.parametrize("rule", GRU_RULES)
def test_backward_sources(rule, sources, dtype, backend):
    """A gradient that does not arrive is the same as one of zeros."""
    _, (_, _, *given) = backward_op(SMALL, dtype, Sweep.of(GRU_RULES[rule], "tanh"), "reference")
    words = *Sweep.of(GRU_RULES[rule], "tanh"), backend
    grad, last = torch.zeros_like(given[0]), torch.zeros_like(given[0][0])
    if sources == "states":
        grad = SMALL.gradient(dtype)
    elif sources == "last":
        last = SMALL.gradient(dtype)[-1]
    found = ops.gru_bwd(grad if sources == "states" else None, last if sources == "last" else None, *given, *words)
    expected = ops.gru_bwd(grad, last, *given, *words)
    for what, *pair in zip(("grad_u", "grad_h0"), found, expected, strict=True):
        assert_identical(*pair, what)
    assert found[0].any() == (sources != "neither")


def objective(rule: tp.TargetProp, case: GRUCase, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients found, and autograd's of ``Σ_t ½‖h_t - v_t‖²`` with ``torch.nn.GRUCell``; of "local", with the state
    before held constant.
    """
    found = gradients(case, rule, torch.float64, backend)
    u, weight, bias, h0 = case.tensors(torch.float64)
    N, sweep, feedback = case.N, Sweep.of(rule, "tanh"), None
    if sweep.uses_inverse:
        blocks = weight[2 * N :] if sweep.inverse == "weight" else weight.unflatten(0, (3, N))
        feedback = tp.regularized_inverse(blocks, rule.reg, power=rule.power)
    numbers = map(extended, (case.gradient(torch.float64), u, found["h"], h0, weight, bias, feedback))
    displacements = oracle.backward(*numbers, sweep)[2]
    targets = found["h"] - torch.from_numpy(displacements.astype(np.float64))
    leaves = {"u": u, "weight": weight, "bias": bias}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items() if tensor is not None}
    padded = torch.zeros(2 * N, dtype=torch.float64)
    b_hh = torch.cat([padded, torch.zeros(N, dtype=torch.float64) if bias is None else bias])
    b_ih, eye = torch.zeros(3 * N, dtype=torch.float64), torch.eye(3 * N, dtype=torch.float64)
    state, loss = torch.zeros(case.B, N, dtype=torch.float64) if h0 is None else h0, 0.0
    for t in range(case.T):
        before = state.detach() if rule.update == "local" else state
        state = torch._VF.gru_cell(u[t], before, eye, weight, b_ih, b_hh)
        loss = loss + (state - targets[t]).square().sum() / 2
    expected = torch.autograd.grad(loss, list(leaves.values()))
    return found, {f"grad_{name}": grad for name, grad in zip(leaves, expected, strict=True)}


@pytest.mark.parametrize("rule", [name for name, rule in GRU_RULES.items() if rule != tp.BackProp()])
@pytest.mark.parametrize("case", [SMALL, GRUCase(T=3, B=4, N=17, bias=False, h0=False)], ids=str)
def test_gradients_are_those_of_the_objective(case, rule, backend):
    changed = {"clip": 0.2} if GRU_RULES[rule].inverse == "layer" else {}
    rule = replace(GRU_RULES[rule], **changed)
    rule = replace(rule, rtol=1e-13)
    found, expected = objective(rule, case, backend)
    for name, wanted in expected.items():
        value, wanted = (tensor if tensor.dim() > 1 else tensor[None] for tensor in (found[name], wanted))
        assert_near(value, extended(wanted), name, condition=200)


def test_the_jacobian_is_that_of_autograd():
    """Of the oracle, which the back-ends are held against, from ``torch.nn.GRUCell``."""
    u, weight, bias, h0 = SMALL.tensors(torch.float64)
    N = SMALL.N
    zeros = torch.zeros(2 * N, dtype=torch.float64)

    def step(before: Tensor) -> Tensor:
        eye = torch.eye(3 * N, dtype=torch.float64)
        return torch._VF.gru_cell(
            u[0, :1], before[None], eye, weight, torch.cat([zeros, 0 * bias]), torch.cat([zeros, bias])
        )[0]

    expected = torch.autograd.functional.jacobian(step, h0[0])
    numbers = list(map(extended, (u[0, :1], weight, bias, h0[:1])))
    found = oracle.jacobians(oracle.gates_of(*numbers), numbers[1], numbers[3])[0]
    assert_near(expected, found, "J")


def test_weight_is_the_adjoint_where_gates_are_constant_and_tanh_is_linear(backend):
    """With P = W_nᵀ and z the same for all units: gates do not depend on a state that their weights do not see, and
    tanh of little is linear.
    """
    case, tiny = GRUCase(T=5, B=3, N=7, bias=False), 1e-9
    N = case.N
    u, weight, _, h0 = case.tensors(torch.float64)
    weight[: 2 * N] = 0
    u[..., N : 2 * N] = u[..., N : N + 1]
    u[..., 2 * N :] *= tiny
    h, gates = ops.gru_fwd(u, weight, None, tiny * h0, True, "reference")
    given = None, case.gradient(torch.float64)[0], h, gates, weight
    adjoint = ops.gru_bwd(*given, None, tiny * h0, *Sweep("tanh"), backend)
    feedback = weight[2 * N :].mT.contiguous()
    displacement = ops.gru_bwd(*given, feedback, tiny * h0, *Sweep("tanh", "weight", "local"), backend)
    assert_near(displacement[1], extended(adjoint[1]), "grad_h0")


@pytest.mark.parametrize("T", [1, 180])
def test_weight_at_power_one_half_never_grows(T, dtype, backend):
    """Whatever the gates do: with z one and zero in turn a displacement is kept by one unit and turned by the others,
    which would let it grow if 1 - z were on one side of P only.
    """
    B, N = 4, 2
    order = torch.tensor([0, 0, 0, 2, 1, 1, 1, 1, 2]).repeat(20)[-T:]
    u = torch.full((T, B, 3 * N), 40.0, dtype=dtype)
    u[:, :, N : 2 * N] = torch.tensor([[40.0, -40.0], [-40.0, 40.0], [-40.0, -40.0]], dtype=dtype)[order, None]
    weight = torch.zeros(3 * N, N, dtype=dtype)
    weight[2 * N :] = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
    h0 = torch.zeros(B, N, dtype=dtype, requires_grad=True)
    h = tp.gru(u, weight, h0, rule=tp.TargetProp(update="local"), backend=backend)
    grad = torch.randn(B, N, dtype=dtype)
    (sent,) = torch.autograd.grad(h[-1], h0, grad)
    assert (sent.norm(dim=-1) <= grad.norm(dim=-1) * (1 + 1e-5)).all()
    assert sent.norm(dim=-1).max() > 0


# --- gradcheck


@pytest.mark.parametrize("case", [GRUCase(T=3, B=2, N=3), GRUCase(T=3, B=2, N=3, h0=False, bias=False)], ids=str)
def test_gradcheck(case, backend):
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float64) if tensor is not None]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        u, weight, bias, h0 = (*inputs, None, None)[:4]
        return op.gru_states(u, weight, bias, h0, tp.BackProp(), backend)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("needed", [("u",), ("weight",), ("bias",), ("h0",), ("u", "h0")], ids="-".join)
def test_some_gradients_only(needed, backend):
    names = ("u", "weight", "bias", "h0")
    leaves = dict(zip(names, SMALL.tensors(torch.float64), strict=True))
    for name in needed:
        leaves[name].requires_grad_()
    h = tp.gru(**leaves, backend=backend)
    found = torch.autograd.grad(h, [leaves[name] for name in needed], SMALL.gradient(torch.float64))
    expected = gradients(SMALL, None, torch.float64, backend)
    for name, grad in zip(needed, found, strict=True):
        assert_identical(grad, expected[f"grad_{name}"], name)


def test_second_derivatives_are_refused(backend):
    u, weight, _, _ = SMALL.tensors(torch.float64)
    (grad,) = torch.autograd.grad(tp.gru(u.requires_grad_(), weight, backend=backend).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "rule", [tp.BackProp(), tp.TargetProp(update="local"), tp.TargetProp(inverse="jacobian", update="local")], ids=repr
)
def test_a_sequence_in_two_calls(rule, dtype, backend):
    """With the state handed on: back-propagation and local updates are those of one call."""
    case = GRUCase(T=9, B=7, N=17)
    u, weight, bias, h0 = (tensor.requires_grad_() for tensor in case.tensors(dtype))
    grad = case.gradient(dtype)
    whole = tp.gru(u, weight, h0, bias=bias, rule=rule, backend=backend)
    first = tp.gru(u[:4], weight, h0, bias=bias, rule=rule, backend=backend)
    second = tp.gru(u[4:], weight, first[-1], bias=bias, rule=rule, backend=backend)
    parts = torch.cat([first, second])
    if backend == "cpu":
        assert_identical(parts.detach(), whole.detach(), "h")
    leaves = (u, weight, bias, h0)
    one, two = (torch.autograd.grad(h, leaves, grad) for h in (whole, parts))
    for name, *pair in zip(("u", "weight", "bias", "h0"), two, one, strict=True):
        pair = [tensor if tensor.dim() > 1 else tensor[None] for tensor in pair]
        assert_near(pair[0], extended(pair[1]), name)


# --- places in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", GRU_RULES)
def test_layouts(layout, rule, dtype, backend):
    tensors = SMALL.tensors(dtype)
    place = LAYOUTS[layout]
    strided = [torch.stack([tensor, tensor], 1)[:, 0] if tensor.dim() < 2 else place(tensor) for tensor in tensors]
    found = ops.gru_fwd(*strided, True, backend)
    for what, *pair in zip(("h", "gates"), found, ops.gru_fwd(*tensors, True, backend), strict=True):
        assert_near(pair[0], extended(pair[1]), what)
    sweep = Sweep.of(GRU_RULES[rule], "tanh")
    found, expected = (backward_op(SMALL, dtype, sweep, backend, word)[0] for word in (layout, "contiguous"))
    for what, *pair in zip(("grad_u", "grad_h0"), found, expected, strict=True):
        assert_near(pair[0], extended(pair[1]), what, condition=10)


@pytest.mark.parametrize("rule", GRU_RULES)
def test_nothing_else_is_written(rule, dtype, cpu, fences):
    case = GRUCase(T=3, B=5, N=17)
    backward_op(case, dtype, Sweep.of(GRU_RULES[rule], "tanh"), "cpu")
    ops.gru_fwd(*case.tensors(dtype), True, "cpu")
    assert len(fences) >= 5
    assert_within_fences(fences)


@pytest.mark.parametrize("rule", GRU_RULES)
def test_every_instruction_set(rule, dtype, isa_level):
    case, sweep = GRUCase(T=3, B=9, N=33), Sweep.of(GRU_RULES[rule], "tanh")
    tensors = case.tensors(dtype)
    found, plain = (ops.gru_fwd(*tensors, True, name)[0] for name in ("cpu", "reference"))
    assert_budget(found, plain, oracle.forward(*map(extended, tensors)), "h")
    found, plain = (backward_op(case, dtype, sweep, name)[0] for name in ("cpu", "reference"))
    solved = sweep.rtol * condition_of(tensors[1], sweep) / REFERENCE[dtype] if sweep.inverse == "jacobian" else 0.0
    for what, *pair in zip(("grad_u", "grad_h0"), found, plain, strict=True):
        assert_near(pair[0], extended(pair[1]), what, 10 + solved)


# --- contract


@pytest.mark.parametrize("rule", GRU_RULES)
def test_deterministic(rule, dtype, backend):
    """Bit for bit the same in every run, and on the native back-end with any number of threads."""
    case, sweep = GRUCase(T=5, B=33, N=64), Sweep.of(GRU_RULES[rule], "tanh")
    first = None
    for count in (1, 1, 2, 3) if backend == "cpu" else (1, 1):
        torch.set_num_threads(count)
        found = *ops.gru_fwd(*case.tensors(dtype), True, backend), *backward_op(case, dtype, sweep, backend)[0]
        first = first or found
        if backend == "cpu":
            for what, *pair in zip(("h", "gates", "grad_u", "grad_h0"), found, first, strict=True):
                assert_identical(*pair, what)
        else:
            assert_identical(found[0], first[0], "h")


@pytest.mark.parametrize("rule", GRU_RULES)
def test_a_sample_does_not_depend_on_those_beside_it(rule, dtype, cpu):
    sweep = Sweep.of(GRU_RULES[rule], "tanh")
    found, (grad, last, h, gates, weight, feedback, h0) = backward_op(GRUCase(T=4, B=50, N=33), dtype, sweep, "cpu")
    some = slice(7, 12)
    alone = ops.gru_bwd(
        grad[:, some], last[some], h[:, some], gates[:, some], weight, feedback, h0[some], *sweep, "cpu"
    )
    assert_identical(alone[0], found[0][:, some], "grad_u")
    assert_identical(alone[1], found[1][some], "grad_h0")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("rule", GRU_RULES)
def test_not_finite_stays_in_its_sample(rule, value, dtype, backend):
    case, sweep = GRUCase(T=5, B=9, N=17), Sweep.of(GRU_RULES[rule], "tanh")
    u, *others = case.tensors(dtype)
    rest = torch.arange(case.B) != 4
    clean = ops.gru_fwd(u, *others, True, backend)
    u[2, 4, 3] = value
    found = ops.gru_fwd(u, *others, True, backend)
    for what, *pair in zip(("h", "gates"), found, clean, strict=True):
        assert_identical(pair[0][:, rest], pair[1][:, rest], what)
        assert_same_pattern(pair[0], ops.gru_fwd(u, *others, True, "reference")[what == "gates"], what)
    _, given = backward_op(case, dtype, sweep, backend)
    expected = ops.gru_bwd(*given, *sweep, backend)
    given[0][2, 4, 3] = value
    found = ops.gru_bwd(*given, *sweep, backend)
    assert_identical(found[0][:, rest], expected[0][:, rest], "grad_u")
    assert_identical(found[1][rest], expected[1][rest], "grad_h0")
    assert_identical(found[0][3:], expected[0][3:], "later")
    assert not found[0][2, 4].isfinite().all()
    if sweep.inverse == "jacobian":
        assert found[0][:2, 4].isnan().all()


def test_a_weight_that_is_not_finite_gives_nan(dtype, backend):
    _, given = backward_op(SMALL, dtype, Sweep("tanh"), "reference")
    given[4][1, 2] = torch.nan
    found = ops.gru_bwd(*given, *Sweep("tanh", "jacobian", "local"), backend)
    assert found[0][:-1].isnan().all()
    assert found[0][-1].isfinite().all()


@pytest.mark.parametrize("tight", [False, True], ids=["default", "tight"])
def test_jacobian_solves_the_equation_that_defines_it(tight, dtype, backend):
    case = GRUCase(T=3, B=6, N=33)
    rtol = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] if tight else 1e-4
    sweep = Sweep("tanh", "jacobian", "local", reg=0.1, rtol=rtol)
    u, weight, bias, h0 = case.tensors(dtype)
    h, gates = ops.gru_fwd(u, weight, bias, h0, True, "reference")
    for t in range(case.T):
        before = h[t - 1] if t else h0
        lam = case.gradient(dtype)[t]
        _, found = ops.gru_bwd(None, lam, h[t : t + 1], gates[t : t + 1], weight, None, before, *sweep, backend)
        numbers = map(extended, gates[t].unbind(1))
        jacobian = oracle.jacobians(tuple(numbers), extended(weight), extended(before))
        assert_solved(found, lam, torch.from_numpy(jacobian.astype(np.float64)), sweep.reg, rtol)


def test_what_cannot_be_solved_raises(backend):
    """float32 cannot resolve r = 1e-8 to 1e-6. The worst sample is named; float64 is the remedy."""
    case = GRUCase(T=2, B=6, N=33)
    _, (_, _, h, gates, weight, _, h0) = backward_op(case, torch.float32, Sweep("tanh"), "reference")
    grad = torch.zeros_like(h)
    grad[1, 4] = 1.0
    sweep = Sweep("tanh", "jacobian", "local", reg=1e-8, rtol=1e-6)
    text = (
        r"gru: inverse='jacobian' could not be solved in float32 at reg=1e-08: worst at time step [01], sample 4, "
        r"with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64"
    )
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        ops.gru_bwd(grad, None, h, gates, 10 * weight, None, h0, *sweep, backend)
    assert re.fullmatch(text, str(caught.value)), caught.value
    wide = (tensor.double() for tensor in (h, gates, 10 * weight))
    assert ops.gru_bwd(grad.double(), None, *wide, None, h0.double(), *sweep, backend)[0].isfinite().all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_jacobian_of_any_magnitude(scale, backend):
    sweep = Sweep("tanh", "jacobian", "local")
    _, (_, last, h, gates, weight, _, h0) = backward_op(SMALL, torch.float32, sweep, "reference")
    one, other = (
        ops.gru_bwd(None, s * last, h[:1], gates[:1], weight, None, h0, *sweep, backend)[1] for s in (1.0, scale)
    )
    assert_near(other / scale, extended(one), "grad_h0")


def test_jacobian_of_what_is_nearly_nothing(backend):
    """Displacements may decay to denormal numbers: they do not stay there."""
    case, sweep = GRUCase(T=200, B=3, N=64), Sweep("tanh", "jacobian", "local", reg=4.0)
    _, (_, last, h, gates, weight, _, h0) = backward_op(case, torch.float32, sweep, "reference")
    _, sent = ops.gru_bwd(None, 1e-30 * last, h, gates, weight, None, h0, *sweep, backend)
    assert sent.eq(0).all()


def test_singular_gram_matrix_in_backward(backend):
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).repeat(3, 1).requires_grad_()
    h = tp.gru(torch.ones(2, 1, 6), weight, rule=tp.TargetProp(power=1.0, reg=1e-30), backend=backend)
    with pytest.raises(torch.linalg.LinAlgError, match="the Gram matrix is not numerically positive definite"):
        h.sum().backward()


def test_states_changed_in_place_are_noticed(backend):
    u, weight, _, _ = SMALL.tensors(torch.float32)
    h = tp.gru(u.requires_grad_(), weight, backend=backend)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_inputs_stay_as_they_are(dtype, backend):
    tensors = SMALL.tensors(dtype)
    u, weight, bias, h0 = (tensor.clone().requires_grad_() for tensor in tensors)
    tp.gru(u, weight, h0, bias=bias, backend=backend).backward(SMALL.gradient(dtype))
    for *pair, what in zip((u, weight, bias, h0), tensors, ("u", "weight", "bias", "h0"), strict=True):
        assert_identical(pair[0].detach(), pair[1], what)


def test_calls_from_several_threads(cpu):
    cases = [GRUCase(T=10, B=7, N=33 + k) for k in range(6)]

    def work(k: int) -> Tensor:
        return gradients(cases[k], None, torch.float32, "cpu")["grad_u"]

    alone = [work(k) for k in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(work, range(len(cases))), alone, strict=True):
            assert_identical(found, expected, "grad_u")


def test_half_precision_runs_on_the_reference():
    for dtype in (torch.float16, torch.bfloat16):
        found = gradients(SMALL, tp.TargetProp(inverse="jacobian"), dtype, "auto")
        tensors = map(extended, SMALL.tensors(dtype))
        assert_near(found["h"], oracle.forward(*tensors), "h")
        assert all(value.dtype == dtype and value.isfinite().all() for value in found.values())


# --- torch


@pytest.mark.parametrize("rule", [None, tp.BackProp(), tp.TargetProp(inverse="jacobian")], ids=repr)
def test_compile(rule, backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(u: Tensor, weight: Tensor, h0: Tensor) -> Tensor:
        return tp.gru(u, weight, h0, rule=rule, backend=backend).square().sum()

    found, expected = [], []
    for results, call in ((found, compiled), (expected, compiled._torchdynamo_orig_callable)):
        u, weight, _, h0 = (
            None if t is None else t.requires_grad_() for t in GRUCase(bias=False).tensors(torch.float64)
        )
        results += [call(u, weight, h0)]
        results += torch.autograd.grad(results[0], (u, weight, h0))
    for what, *pair in zip(("loss", "u", "weight", "h0"), found, expected, strict=True):
        assert_near(pair[0].detach().reshape(1, -1), extended(pair[1]).reshape(1, -1), what)


def test_opcheck(backend):
    sweep = Sweep("tanh", "weight")
    torch.library.opcheck(ops.gru_fwd.default, (*SMALL.tensors(torch.float64), True, backend))
    _, given = backward_op(SMALL, torch.float64, sweep, "reference")
    torch.library.opcheck(ops.gru_bwd.default, (*given, *sweep, backend))


def test_meta_tensors_get_shapes_and_dtypes(dtype):
    u, weight, bias, h0 = (tensor.to("meta") for tensor in SMALL.tensors(dtype))
    h = tp.gru(u, weight, h0, bias=bias)
    assert (h.shape, h.dtype, h.device.type) == ((SMALL.T, SMALL.B, SMALL.N), dtype, "meta")


# --- errors

ONES = torch.ones
BAD = {
    "u-list": ({"u": [1.0]}, TypeError, "gru: u must be a torch.Tensor, got list"),
    "u-int": (
        {"u": ONES(4, 3, 15, dtype=torch.int32)},
        TypeError,
        "gru: u must be of dtype float16, bfloat16, float32, float64, got int32",
    ),
    "u-dim": ({"u": ONES(4, 15)}, ValueError, "gru: u must have shape [T, B, 3N] with N >= 1, got (4, 15)"),
    "u-gates": ({"u": ONES(4, 3, 16)}, ValueError, "gru: u must have shape [T, B, 3N] with N >= 1, got (4, 3, 16)"),
    "u-empty": ({"u": ONES(4, 3, 0)}, ValueError, "gru: u must have shape [T, B, 3N] with N >= 1, got (4, 3, 0)"),
    "u-T": ({"u": ONES(0, 3, 15)}, ValueError, "gru: u must have at least one time step (T >= 1), got (0, 3, 15)"),
    "weight": ({"weight": ONES(5, 5)}, ValueError, "gru: weight must have shape [3N, N] = [15, 5], got (5, 5)"),
    "weight-dtype": (
        {"weight": ONES(15, 5).double()},
        TypeError,
        "gru: weight must have the dtype of u, float32, got float64",
    ),
    "bias": ({"bias": ONES(15)}, ValueError, "gru: bias must have shape [N] = [5], got (15,)"),
    "h0": ({"h0": ONES(1, 3, 5)}, ValueError, "gru: h0 must have shape [B, N] = [3, 5], got (1, 3, 5)"),
    "h0-device": ({"h0": ONES(3, 5, device="meta")}, ValueError, "gru: h0 must be on the device of u, cpu, got meta"),
    "rule": ({"rule": "bp"}, TypeError, "gru: rule must be a TargetProp, a BackProp or None, got str"),
    "rule-mode": (
        {"rule": tp.TargetProp(inverse="layer", mode="direct")},
        ValueError,
        "gru: rule must have mode='linearized', got mode='direct'",
    ),
    "rule-clip": (
        {"rule": tp.TargetProp(inverse="layer", clip=0.5)},
        ValueError,
        "gru: rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got 0.5",
    ),
    "rule-small-clip": (
        {"rule": tp.TargetProp(inverse="layer", clip=1e-9)},
        ValueError,
        "gru: rule must have clip of at least 1.19e-07 in float32, got 1e-09",
    ),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        "gru: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
    ),
    "backend-absent": (
        {"backend": "triton"},
        tp.BackendUnavailableError,
        "gru: backend 'triton' cannot run this call: it has no kernel for this op yet. "
        "Use backend='auto' or 'reference'.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        tp.gru(**{"u": ONES(4, 3, 15), "weight": ONES(15, 5), "h0": ONES(3, 5)} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text
