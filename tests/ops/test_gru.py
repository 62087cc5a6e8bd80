"""``gru``: oracles from outside, and the identities of this cell. What all cells share is in ``test_recurrence.py``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _cases import GRU_RULES, Case
from _checks import (
    assert_same_numbers,
    at_least_2d,
    back_of,
    exact_back,
    forward_op,
    gradients,
    leaves_of,
)
from _compare import assert_near
from _oracle import extended
from _oracle_recurrence import GRUStep
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.ops.gru.cell import CELL
from tp_kernels.rules import Sweep

SMALL = Case(T=4, B=3, N=5, cell="gru")
BARE = {"bias": False, "h0": False}


def step_of_torch(u: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One step of torch's own cell, whose input is u itself."""
    N = weight.shape[-1]
    eye, nothing = torch.eye(3 * N, dtype=u.dtype), torch.zeros(3 * N, dtype=u.dtype)
    own = nothing[:N] if bias is None else bias
    return torch._VF.gru_cell(u, before, eye, weight, nothing, torch.cat([nothing[: 2 * N], own]))


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case(T=9, B=33, N=17, cell="gru"),
        Case(T=5, B=2, N=64, cell="gru", **BARE),
        Case(T=1, B=1, N=1, cell="gru"),
    ],
    ids=str,
)
def test_back_propagation_is_that_of_torch(case, backend):
    """Of ``torch.nn.GRU``, whose input is u itself."""
    N = case.N
    u, weight, bias, h0 = case.tensors(torch.float64)
    unit = nn.GRU(3 * N, N, dtype=torch.float64)
    with torch.no_grad():
        unit.weight_ih_l0.copy_(torch.eye(3 * N))
        unit.weight_hh_l0.copy_(weight)
        unit.bias_ih_l0.zero_()
        unit.bias_hh_l0.zero_()
        if bias is not None:
            unit.bias_hh_l0[2 * N :] = bias
    leaves = {"u": u.requires_grad_(), "weight": unit.weight_hh_l0, "bias": unit.bias_hh_l0}
    if h0 is not None:
        leaves["h0"] = h0.requires_grad_()
    h = unit(u, None if h0 is None else h0[None])[0]
    grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float64))
    expected = {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    expected["grad_bias"] = expected["grad_bias"][2 * N :]
    if bias is None:
        del expected["grad_bias"]
    assert_same_numbers(gradients(case, tp.BackProp(), torch.float64, backend), expected)


@pytest.mark.parametrize("rule", [name for name, rule in GRU_RULES.items() if rule != tp.BackProp()])
@pytest.mark.parametrize("case", [SMALL, Case(T=3, B=4, N=17, cell="gru", **BARE)], ids=str)
def test_gradient_of_the_stated_objective(case, rule, backend):
    """Autograd of ``Σ_t ½‖h_t(θ) - v_t‖²`` with torch's own cell and v_t = h_t - λ_t constant; "local" holds h_{t-1}
    fixed.
    """
    changed = {"clip": 0.2} if GRU_RULES[rule].inverse == "layer" else {}
    rule = replace(GRU_RULES[rule], rtol=1e-13, **changed)
    found = gradients(case, rule, torch.float64, backend)
    inputs, sweep = case.tensors(torch.float64), Sweep.of(rule)
    back = back_of(case, torch.float64, sweep).with_(h=found["h"], last=None)
    if sweep.uses_inverse:
        blocks = CELL.inverted(inputs.weight, sweep.inverse)
        back = back.with_(feedback=tp.regularized_inverse(blocks, rule.reg, power=rule.power))
    lam = exact_back(back, inputs.bias, sweep).displacements[1:]
    targets = found["h"] - torch.from_numpy(lam.astype(np.float64))
    leaves = leaves_of(inputs)
    leaves.pop("h0", None)
    state, loss = torch.zeros(case.B, case.N, dtype=torch.float64) if inputs.h0 is None else inputs.h0.detach(), 0.0
    for t in range(case.T):
        before = state.detach() if rule.update == "local" else state
        state = step_of_torch(inputs.u[t], before, inputs.weight, inputs.bias)
        loss = loss + (state - targets[t]).square().sum() / 2
    for name, wanted in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert_near(at_least_2d(found[f"grad_{name}"]), extended(at_least_2d(wanted)), name, condition=200)


def test_the_jacobian_is_that_of_autograd():
    """Of the oracle, which the back-ends are held against, from torch's own cell."""
    u, weight, bias, h0 = SMALL.tensors(torch.float64)

    def step(before: Tensor) -> Tensor:
        return step_of_torch(u[0, :1], before[None], weight, bias)[0]

    expected = torch.autograd.functional.jacobian(step, h0[0])
    found = GRUStep(*map(extended, (u[0, :1], weight, bias, h0[:1]))).jacobian()
    assert_near(expected, found[0], "J")


def test_weight_is_the_adjoint_where_gates_are_constant_and_tanh_is_linear(backend):
    """With P = W_nᵀ and z the same for all units: gates do not depend on a state that their weights do not see, and
    tanh of little is linear.
    """
    case, tiny = Case(T=5, B=3, N=7, cell="gru", bias=False), 1e-9
    N = case.N
    u, weight, _, h0 = case.tensors(torch.float64)
    weight[: 2 * N] = 0
    u[..., N : 2 * N] = u[..., N : N + 1]
    u[..., 2 * N :] *= tiny
    h, kept = forward_op("gru", u, weight, None, tiny * h0, backend="reference")
    back = back_of(case, torch.float64, Sweep()).with_(h=h, kept=kept, weight=weight, h0=tiny * h0, grad=None)
    adjoint = back.run(Sweep(), backend).through
    displacement = back.with_(feedback=weight[2 * N :].mT.contiguous()).run(Sweep("weight", "local"), backend).carried
    assert_near(displacement, extended(adjoint), "grad_h0")


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


@pytest.mark.parametrize("clip", [1e-3, 0.1])
def test_gates_are_clipped(clip, dtype, backend):
    """``1/(z (1 - z))`` stops growing at ``clip``: finite where gates round to 0 and to 1."""
    N = 2
    u = torch.full((1, 2, 3 * N), 200.0, dtype=dtype)
    u[:, 1, : 2 * N] = -200
    u[..., 2 * N :] = 0
    h0 = torch.ones(2, N, dtype=dtype, requires_grad=True)
    weight = (0.5 * torch.eye(N, dtype=dtype)).repeat(3, 1)
    weight[2 * N :] = 0  # so that n = 0, and P_n = 0
    rule = tp.TargetProp(inverse="layer", update="local", reg=0.25, clip=clip)  # P_z is the identity
    h = tp.gru(u, weight, h0, rule=rule, backend=backend)
    (grad,) = torch.autograd.grad(h[-1].sum(), h0)
    low, high = np.longdouble(clip), 1 - np.longdouble(clip)
    slope = 1 / (low * high)
    exact = np.array([[high + slope] * N, [low + slope] * N])
    assert_near(grad, exact, "grad_h0", condition=10)
