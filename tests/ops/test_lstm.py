"""``lstm``: oracles from outside, and identities of this cell. What all cells share is in ``test_recurrence.py``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _cases import LSTM_RULES, Case
from _checks import (
    Back,
    assert_same_numbers,
    at_least_2d,
    back_of,
    exact_back,
    forward_op,
    gradients,
    leaves_of,
    parts_of,
    supports,
)
from _compare import assert_identical, assert_near
from _oracle import extended
from _oracle_recurrence import LSTMStep
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.ops.lstm.cell import CELL
from tp_kernels.ops.recurrence import op
from tp_kernels.ops.recurrence.cell import Step
from tp_kernels.rules import Sweep

SMALL = Case(T=4, B=3, N=5, cell="lstm")
DOUBLE = torch.float64
WEIGHT = Sweep("weight", "local")


def step_of_torch(u: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """One step of torch's own cell, whose input is u itself; states side by side."""
    wide = u.shape[-1]
    eye, nothing = torch.eye(wide, dtype=u.dtype), torch.zeros(wide, dtype=u.dtype)
    return torch.cat(torch._VF.lstm_cell(u, before.chunk(2, dim=-1), eye, weight, nothing, nothing), dim=-1)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case(T=9, B=33, N=17, cell="lstm"),
        Case(T=5, B=2, N=64, cell="lstm", h0=False),
        Case(T=1, B=1, N=1, cell="lstm"),
    ],
    ids=str,
)
def test_back_propagation_is_that_of_torch(case, backend):
    """Of ``torch.nn.LSTM``, whose input is u itself, from a loss on all h and on the last h and c."""
    N = case.N
    unit = nn.LSTM(4 * N, N, dtype=DOUBLE)
    with torch.no_grad():
        unit.weight_ih_l0.copy_(torch.eye(4 * N))
        unit.weight_hh_l0.copy_(case.tensors(DOUBLE).weight)
        unit.bias_ih_l0.zero_()
        unit.bias_hh_l0.zero_()

    def ours(u: Tensor, weight: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return tp.lstm(u, weight, start, rule=tp.BackProp(), return_last=True, backend=backend)

    def theirs(u: Tensor, weight: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        start = None if start is None else tuple(part[None] for part in start)
        h, last = torch.func.functional_call(unit, {"weight_hh_l0": weight}, (u, start))
        return h, [part[0] for part in last]

    results = []
    for called in (ours, theirs):
        inputs = case.tensors(DOUBLE)
        leaves = leaves_of(inputs)
        start = None if inputs.h0 is None else parts_of("lstm", inputs.h0)
        h, (h_last, c_last) = called(inputs.u, inputs.weight, start)
        arrives = case.gradient(DOUBLE), *case.gradient_of_state(DOUBLE).chunk(2, dim=-1)
        grads = torch.autograd.grad((h, h_last, c_last), list(leaves.values()), arrives)
        found = {"h": h, "last h": h_last, "last c": c_last, **dict(zip(leaves, grads, strict=True))}
        results.append({name: tensor.detach() for name, tensor in found.items()})
    assert_same_numbers(*results)


@pytest.mark.parametrize("rule", [name for name, rule in LSTM_RULES.items() if rule != tp.BackProp()])
@pytest.mark.parametrize("case", [SMALL, Case(T=3, B=4, N=17, cell="lstm", h0=False)], ids=str)
def test_gradient_of_the_stated_objective(case, rule, backend):
    """Autograd of ``Σ_t ½‖s_t(θ) - v_t‖²`` over both parts of the states s, with torch's own cell and v_t = s_t - λ_t
    constant; "local" holds s_{t-1} fixed.
    """
    rule = replace(LSTM_RULES[rule], rtol=1e-13)
    inputs, sweep = case.tensors(DOUBLE), Sweep.of(rule)
    ok, reason = supports("lstm", sweep, backend)
    if not ok:
        pytest.skip(f"back-end {backend!r}: {reason}")
    found = gradients(case, rule, DOUBLE, backend)
    back = back_of(case, DOUBLE, sweep).with_(last=None)
    if sweep.uses_inverse:
        blocks = CELL.inverted(inputs.weight, sweep.inverse)
        back = back.with_(feedback=tp.regularized_inverse(blocks, rule.reg, power=rule.power))
    lam = exact_back(back, None, sweep).displacements[1:]
    targets = back.states - torch.from_numpy(lam.astype(np.float64))
    leaves = leaves_of(inputs)
    leaves.pop("h0", None)
    state, loss = torch.zeros(case.state_shape, dtype=DOUBLE) if inputs.h0 is None else inputs.h0.detach(), 0.0
    for t in range(case.T):
        before = state.detach() if rule.update == "local" else state
        state = step_of_torch(inputs.u[t], before, inputs.weight)
        loss = loss + (state - targets[t]).square().sum() / 2
    for name, wanted in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert_near(at_least_2d(found[f"grad_{name}"]), extended(at_least_2d(wanted)), name, condition=200)


def test_the_jacobian_is_that_of_autograd():
    """Of the reference, and of the oracle, which the back-ends are held against, from torch's own cell."""
    u, weight, _, start = SMALL.tensors(DOUBLE)

    def step(before: Tensor) -> Tensor:
        return step_of_torch(u[0, :1], before[None], weight)[0]

    expected = torch.autograd.functional.jacobian(step, start[0])
    after, kept = CELL.forward(u[0, :1], start[:1, : SMALL.N] @ weight.mT, None, start[:1])
    found = CELL.jacobian(Step(after, kept, start[:1], u[0, :1]), weight, DOUBLE)
    assert_near(found[0], extended(expected), "J of the reference")
    of_oracle = LSTMStep(*map(extended, (u[0, :1], weight, None, start[:1]))).jacobian()
    assert_near(expected, of_oracle[0], "J of the oracle")


# --- "weight": how a displacement goes through the gates


def through_gates(kappa: Tensor, feedback: Tensor, backend: str, **gates: Tensor | float) -> tuple[Tensor, Tensor]:
    """λ^h and λ^c of one step back, [B, N] each, from a displacement κ of c at these gates, i and f."""
    gates = {"g": 0.0, "o": 0.5, "c": 0.0} | gates
    kept = torch.stack([torch.as_tensor(gates[name], dtype=kappa.dtype).expand_as(kappa) for name in CELL.kept], dim=-2)
    N = kappa.shape[-1]
    weight, nothing = torch.zeros(4 * N, N, dtype=kappa.dtype), torch.zeros_like(kappa)
    back = Back("lstm", nothing[None], weight, kept=kept[None], last=torch.cat((nothing, kappa), -1), feedback=feedback)
    return back.run(WEIGHT, backend).carried.chunk(2, dim=-1)


def test_gates_that_are_open_or_closed(dtype, backend):
    """A displacement goes where the gates let the state come from, each of two of them half."""
    kappa = torch.randn(3, 7, dtype=dtype)
    feedback = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q.to(dtype)
    nothing, turned = torch.zeros_like(kappa), kappa @ feedback.mT
    for i, f, of_h, of_c in (
        (0.0, 1.0, nothing, kappa),
        (1.0, 0.0, turned, nothing),
        (1.0, 1.0, turned / 2, kappa / 2),
        (0.25, 0.5, turned / 4, kappa / 2),
        (0.0, 0.0, nothing, nothing),
    ):
        found = through_gates(kappa, feedback, backend, i=i, f=f)
        for what, *pair in zip(("λ^h", "λ^c"), found, (of_h, of_c), strict=True):
            assert_near(pair[0], extended(pair[1]), f"{what} with i = {i} and f = {f}")


def test_both_parts_of_a_displacement_are_one_of_c(dtype, backend):
    """``κ = λ^c + o λ^h``; with i = 0 and f = 1 it stays as it is over many steps, to the bit."""
    case = Case(T=100, B=3, N=7, cell="lstm")
    kept = torch.zeros(case.T, case.B, 5, case.N, dtype=dtype)
    kept[:, :, CELL.kept.index("f")] = 1
    kept[:, :, CELL.kept.index("o")] = 0.5
    last, feedback = case.gradient_of_state(dtype), torch.eye(case.N, dtype=dtype)
    weight, h = case.tensors(dtype).weight, torch.zeros(case.shape, dtype=dtype)
    back = Back("lstm", h, weight, kept=kept, last=last, feedback=feedback)
    of_h, of_c = last.chunk(2, dim=-1)
    expected = torch.cat((torch.zeros_like(of_h), of_c + of_h / 2), dim=-1)
    assert_identical(back.run(WEIGHT, backend).carried, expected, "displacement")


def test_weight_is_the_adjoint_where_gates_are_constant_and_tanh_is_linear(backend):
    """With P = W_gᵀ, i the same for all units and i + f at most 1: gates do not depend on a state that their weights do
    not see, and tanh of little is linear.
    """
    case, tiny = Case(T=5, B=3, N=7, cell="lstm"), 1e-9
    N = case.N
    u, weight, _, start = case.tensors(DOUBLE)
    weight[: 2 * N] = weight[3 * N :] = 0
    u[..., : 2 * N] = -u[..., : 2 * N].abs()
    u[..., :N] = u[..., :1]
    u[..., 2 * N : 3 * N] *= tiny
    h, kept = forward_op("lstm", u, weight, None, tiny * start, backend="reference")
    given = {"h": h, "kept": kept, "weight": weight, "h0": tiny * start, "grad": None}
    back = back_of(case, DOUBLE, Sweep()).with_(**given)
    adjoint = back.run(Sweep(), backend).through
    displacement = back.with_(feedback=weight[2 * N : 3 * N].mT.contiguous()).run(WEIGHT, backend).carried
    assert_near(displacement, extended(adjoint), "gradient of the first state")


@pytest.mark.parametrize("gates", ["random", "open or closed", "open"])
def test_weight_never_makes_a_displacement_grow(gates, dtype, backend):
    """κ in one step, whatever the gates, those of the step before included, and whatever P with a gain of at most 1."""
    B, N = 500, 6
    draw = {"random": torch.rand, "open or closed": lambda *shape: torch.rand(*shape).round(), "open": torch.ones}[
        gates
    ]
    i, f, before = (draw(B, N).to(dtype) for _ in range(3))
    kappa, longest = torch.randn(B, N, dtype=dtype), 0.0
    u, _, v = torch.linalg.svd(torch.randn(N, N, dtype=torch.float64))
    for gains in (torch.ones(N), torch.rand(N), torch.eye(N)[0]):
        of_h, of_c = through_gates(kappa, (u * gains @ v).to(dtype), backend, i=i, f=f)
        later = of_c + before * of_h
        allowed = kappa.norm(dim=-1) * (1 + 1e-5)
        assert (later.norm(dim=-1) <= allowed).all()
        assert (torch.cat((of_h, of_c), dim=-1).norm(dim=-1) <= allowed).all()
        longest = max(longest, float((later.norm(dim=-1) / allowed).max()))
    assert longest > 0.5


@pytest.mark.parametrize("T", [1, 180])
def test_weight_at_power_one_half_never_grows(T, dtype, backend):
    """Over many steps, with gates that are all open, open and closed in turn, and random."""
    B, N = 6, 4
    pattern = torch.randn(T, B, 4 * N, dtype=dtype) * 4
    pattern[:, 0] = 40
    pattern[:, 1, : 2 * N] = 40 * (-1.0) ** torch.arange(2 * N)
    pattern[::2, 2] = -40
    weight = torch.randn(4 * N, N, dtype=dtype)
    start = tuple(torch.randn(B, N, dtype=dtype, requires_grad=True) for _ in range(2))
    rule = tp.TargetProp(update="local", reg=1e-8)
    h = tp.lstm(pattern, weight, start, rule=rule, backend=backend)
    arrives = torch.randn(B, N, dtype=dtype)
    sent = torch.cat(torch.autograd.grad(h[-1], start, arrives), dim=-1)
    assert (sent.norm(dim=-1) <= arrives.norm(dim=-1) * (1 + 1e-5)).all()
    assert sent.norm(dim=-1).max() > 0


def largest_gain(divided: bool, steps: int) -> float:
    """Of κ over so many steps, by gradient ascent over i, f, the o' of the step before and a P for each of many starts.
    Each P is scaled to a gain of at most 1, as that of power 1/2 has.
    """
    starts, N = 24, 3
    logits = torch.randn(3, steps, starts, 1, N, dtype=DOUBLE).requires_grad_()
    matrix = torch.randn(starts, N, N, dtype=DOUBLE).requires_grad_()
    unknown = torch.zeros(starts, N, N, dtype=DOUBLE)
    optimizer = torch.optim.Adam([logits, matrix], lr=0.2)
    largest = 0.0
    for _ in range(250):
        feedback = matrix / torch.linalg.matrix_norm(matrix, 2).clamp(min=1)[:, None, None]
        kappa = torch.eye(N, dtype=DOUBLE).expand(starts, N, N)  # of each, N displacements
        for i, f, before in logits.sigmoid().expand(-1, -1, -1, N, -1).unbind(1):
            if divided:
                of_c = torch.cat((torch.zeros_like(kappa), kappa), dim=-1)
                step = Step(unknown, (i, f, unknown, unknown, unknown), unknown, None)
                (sent,), scale, past = CELL.term("weight", of_c, step, 0.0)
            else:
                sent, scale, past = i.sqrt() * kappa, i.sqrt(), f * kappa
            kappa = past + before * scale * (sent @ feedback.mT)
        gains = torch.linalg.matrix_norm(kappa, 2)
        largest = max(largest, float(gains.detach().max()))
        optimizer.zero_grad()
        (-gains.sum()).backward()
        optimizer.step()
    return largest


@pytest.mark.parametrize("steps", [1, 3])
def test_no_gates_make_weight_grow(steps):
    """A search for a counterexample comes up to a gain of 1 and not beyond. Without the division by i + f it finds one,
    of nearly 2 a step.
    """
    assert 0.9 < largest_gain(divided=True, steps=steps) <= 1 + 1e-12
    assert largest_gain(divided=False, steps=steps) > 1.9**steps


# --- what only this function is told

ONES = torch.ones
BAD_INPUT = {
    "hx-tensor": (
        {"hx": ONES(3, 5)},
        TypeError,
        "lstm: hx must be a tuple of two tensors or None, got Tensor",
    ),
    "hx-three": ({"hx": (ONES(3, 5),) * 3}, ValueError, "lstm: hx must be a tuple of two tensors, got 3"),
    "hx-half": ({"hx": (ONES(3, 5), None)}, TypeError, "lstm: hx[1] must be a torch.Tensor, got NoneType"),
    "h0-shape": (
        {"hx": (ONES(1, 3, 5), ONES(3, 5))},
        ValueError,
        "lstm: hx[0] must have shape [B, N] = [3, 5], got (1, 3, 5)",
    ),
    "c0-shape": (
        {"hx": (ONES(3, 5), ONES(3, 10))},
        ValueError,
        "lstm: hx[1] must have shape [B, N] = [3, 5], got (3, 10)",
    ),
    "c0-heads": (
        {"u": ONES(4, 3, 2, 20), "weight": ONES(2, 20, 5), "hx": (ONES(3, 2, 5), ONES(3, 5))},
        ValueError,
        "lstm: hx[1] must have shape [B, H, N] = [3, 2, 5], got (3, 5)",
    ),
    "c0-dtype": (
        {"hx": (ONES(3, 5), ONES(3, 5).double())},
        TypeError,
        "lstm: hx[1] must have the dtype of u, float32, got float64",
    ),
    "c0-device": (
        {"hx": (ONES(3, 5), ONES(3, 5, device="meta"))},
        ValueError,
        "lstm: hx[1] must be on the device of u, cpu, got meta",
    ),
    "u-gates": (
        {"u": ONES(4, 3, 15)},
        ValueError,
        "lstm: u must have a last axis of 4N with N >= 1 (and H >= 1 with heads), got (4, 3, 15)",
    ),
    "weight-shape": (
        {"weight": ONES(15, 5)},
        ValueError,
        "lstm: weight must have shape [4N, N] = [20, 5], got (15, 5)",
    ),
    "rule-layer": (
        {"rule": tp.TargetProp(inverse="layer")},
        ValueError,
        "lstm: rule must have as inverse one of 'identity', 'weight', 'jacobian', got 'layer'",
    ),
    **{
        f"rule-{mode}": (
            {"rule": tp.TargetProp(inverse="layer", mode=mode)},
            ValueError,
            f"lstm: rule must have mode='linearized', got mode={mode!r}",
        )
        for mode in ("difference", "direct")
    },
    "feedback-blocks": (
        {"feedback": ONES(20, 5)},
        ValueError,
        "lstm: feedback must have the shape of the blocks of weight it replaces P of, (5, 5), got (20, 5)",
    ),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input(what, monkeypatch):
    """Type and text; nothing is computed."""
    changes, kind, text = BAD_INPUT[what]
    monkeypatch.setattr(op, "backends", None)
    with pytest.raises(kind) as caught:
        tp.lstm(**{"u": ONES(4, 3, 20), "weight": ONES(20, 5)} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_what_the_native_back_end_does_not_solve_is_refused(cpu):
    """By name, when it is called; "auto" takes the reference."""
    case, rule = SMALL, tp.TargetProp(inverse="jacobian")
    with pytest.raises(tp.BackendUnavailableError) as caught:
        gradients(case, rule, torch.float32, "cpu")
    assert str(caught.value) == (
        "lstm: backend 'cpu' cannot run this call: it does not solve inverse='jacobian' for a state of 2 parts. "
        "Use backend='auto' or 'reference'."
    )
    found, expected = (gradients(case, rule, torch.float32, name) for name in ("auto", "reference"))
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("rule", ["bp", "weight-total"])
def test_compile_with_both_states(rule, backend):
    """In and out."""
    torch._dynamo.reset()

    def function(u: Tensor, weight: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, (h_last, c_last) = tp.lstm(u, weight, (2 * h0, c0), rule=LSTM_RULES[rule], return_last=True, backend=backend)
        return h, h_last, c_last + 1

    results = []
    for called in (torch.compile(function, fullgraph=True), function):
        inputs = SMALL.tensors(torch.float32)
        leaves = [inputs.u, inputs.weight, *(part.clone() for part in parts_of("lstm", inputs.h0))]
        outputs = called(*(leaf.requires_grad_() for leaf in leaves))
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        names = "h", "last h", "last c", "grad_u", "grad_weight", "grad_h0", "grad_c0"
        results.append(dict(zip(names, (*(output.detach() for output in outputs), *grads), strict=True)))
    assert_same_numbers(*results)
