"""``rnn``: oracles from outside, and the identities of this cell. What all cells share is in ``test_recurrence.py``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _cases import NONLINEARITIES, RULES, Case, Inputs
from _checks import (
    assert_same_numbers,
    atanh_check,
    back_of,
    exact_back,
    gradients,
    layer,
    leaves_of,
    relu_inverse_check,
    small_differences_check,
    tanh_check,
)
from _compare import assert_differences, assert_identical, assert_near
from _oracle import extended
from _oracle_recurrence import SLOPES
from torch import Tensor

import tp_kernels as tp
from tp_kernels.ops.recurrence import parallel
from tp_kernels.rules import Sweep

CASE = Case(T=7, B=3, N=5)
MODES = ({"inverse": "layer", "mode": "difference"}, {"inverse": "layer", "mode": "direct"})
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}
of_every_activation = pytest.mark.parametrize("cell", [f"rnn_{word}" for word in NONLINEARITIES])


# --- the activations


def test_tanh_accuracy(dtype, backend):
    tanh_check(dtype, backend)


def test_atanh_accuracy(dtype, backend):
    atanh_check(dtype, backend)


@pytest.mark.parametrize("nonlinearity", ["relu", "identity"])
def test_exact_activations(nonlinearity, dtype, backend):
    values = torch.tensor([0.0, -0.0, 1e-37, -1e-37, 1.5, -1.5, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    u = values.to(dtype).view(1, 1, -1)
    h = tp.rnn(u, torch.zeros(len(values), len(values), dtype=dtype), nonlinearity=nonlinearity, backend=backend)
    assert_identical(h, u.relu() if nonlinearity == "relu" else u, "h")


@pytest.mark.parametrize("clip", [1e-3, 0.1])
def test_saturated_units_are_clipped(clip, dtype, backend):
    """``1/(1 - h²)`` stops growing at ``|h| = 1 - clip``: finite where h rounds to 1."""
    n = 3
    u = torch.full((2, 2, n), 50.0, dtype=dtype)
    u[:, 1] = -50
    weight = (0.5 * torch.eye(n, dtype=dtype)).requires_grad_()
    h0 = torch.zeros(2, n, dtype=dtype, requires_grad=True)
    rule = tp.TargetProp(inverse="layer", update="local", reg=0.25, clip=clip)
    h = tp.rnn(u, weight, h0, rule=rule, backend=backend)
    assert h.abs().eq(1).all()
    (grad,) = torch.autograd.grad(h[-1].sum(), h0)
    gain = 1 / (1 - (1 - np.longdouble(clip)) ** 2)  # P is the identity: s/(s² + r) = 1 at s = 1/2, r = 1/4
    assert_near(grad, np.full((2, n), gain**2), "grad_h0")


# --- oracles from outside


def numpy_inverse(weight: np.ndarray, reg: float, power: float) -> np.ndarray:
    if power == 1.0:
        return np.linalg.solve(weight.T @ weight + reg * np.eye(len(weight)), weight.T)
    left, gains, right = np.linalg.svd(weight)
    return right.T @ np.diag(gains / (gains**2 + reg) ** power) @ left.T


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_back_propagation_is_that_of_torch(nonlinearity, backend):
    """Of ``torch.nn.RNN``, whose input is u itself."""
    case = CASE.with_(cell=f"rnn_{nonlinearity}")
    found = gradients(case, tp.BackProp(), torch.float64, backend)
    u, weight, _, h0 = case.tensors(torch.float64)
    unit = torch.nn.RNN(case.N, case.N, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    with torch.no_grad():
        unit.weight_ih_l0.copy_(torch.eye(case.N))
        unit.weight_hh_l0.copy_(weight)
    leaves = {"u": u.requires_grad_(), "weight": unit.weight_hh_l0, "h0": h0.requires_grad_()}
    h = unit(u, h0[None])[0]
    grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float64))
    expected = {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    assert_same_numbers(found, expected)


@of_every_activation
@pytest.mark.parametrize("rule", [name for name in RULES if name != "bp"])
def test_gradient_of_the_stated_objective(rule, cell, backend):
    """Autograd of ``Σ_t ½‖h_t(θ) - v_t‖²`` with ``v_t = h_t - λ_t`` constant; "local" holds h_{t-1} fixed."""
    rule = replace(RULES[rule], rtol=1e-13)
    case = Case(T=6, B=3, N=4, cell=cell)
    found = gradients(case, rule, torch.float64, backend)
    inputs = case.tensors(torch.float64)
    p = torch.from_numpy(numpy_inverse(inputs.weight.numpy(), rule.reg, rule.power))
    sweep = Sweep.of(rule)
    back = back_of(case, torch.float64, sweep).with_(h=found["h"], last=None, feedback=p)
    lam = exact_back(back, None, sweep).displacements.astype(np.float64)
    targets = found["h"] - torch.from_numpy(lam[1:])
    u, weight, _, h0 = inputs
    leaves = leaves_of(inputs)
    objective, state = 0.0, h0
    for t in range(case.T):
        before = state.detach() if rule.update == "local" else state
        state = ACTIVATIONS[cell.removeprefix("rnn_")](u[t] + before @ weight.mT)
        objective = objective + (state - targets[t]).square().sum() / 2
    if rule.update == "local":
        assert_near(found["grad_h0"], lam[0].astype(np.longdouble), "grad_h0", condition=20)
        del leaves["h0"]
    expected = torch.autograd.grad(objective, list(leaves.values()))
    for name, grad in zip(leaves, expected, strict=True):
        assert_near(found[f"grad_{name}"], extended(grad), name, condition=20)


@of_every_activation
def test_layer_inverse_is_the_jacobian_of_the_regularized_inverse(cell, backend):
    """Central differences of ``f⁻¹(v) = P(a⁻¹(v) - u_t)`` at h_t, along λ_t."""
    case, nonlinearity = Case(T=2, B=3, N=4, cell=cell), cell.removeprefix("rnn_")
    inputs = case.tensors(torch.float64)
    rule = tp.TargetProp(inverse="layer", update="local", clip=1e-6)
    source = case.gradient(torch.float64)[-1]
    leaves = (inputs.u.requires_grad_(), inputs.h0.requires_grad_())
    h = layer(case, inputs, rule=rule, backend=backend)
    grad_u, grad_h0 = torch.autograd.grad(h[-1], leaves, source)
    h, u = h.detach(), inputs.u.detach()
    if nonlinearity == "relu":  # differences across the kink are none
        h = torch.where(h > 0, h, -1)
    inverse_activation = ACTIVATIONS | {"tanh": torch.atanh}
    inverse = torch.from_numpy(numpy_inverse(inputs.weight.numpy(), rule.reg, rule.power))

    def carried(lam: Tensor, t: int) -> Tensor:
        small = 1e-6
        high, low = (
            (inverse_activation[nonlinearity](h[t] + sign * small * lam) - u[t]) @ inverse.mT for sign in (1, -1)
        )
        return (high - low) / (2 * small)

    first = carried(source, 1)
    slope = torch.from_numpy(SLOPES[nonlinearity](h[0].numpy()))
    assert_differences(grad_u[0], slope * first, "δ_1")
    assert_differences(grad_h0, carried(first, 0), "λ_0")


# --- identities


@pytest.mark.parametrize("rule", ["bp", "weight-total", "identity-total", "layer-total", "jacobian-total"])
def test_through_the_recurrence_h0_gets_the_transpose(rule, backend):
    """``∂h_0 = Wᵀ D_1 μ_1``, and ``∂u_1 = D_1 μ_1``."""
    found = gradients(CASE, RULES[rule], torch.float64, backend)
    weight = CASE.tensors(torch.float64).weight
    assert_near(found["grad_h0"], extended(found["grad_u"][0]) @ extended(weight), "grad_h0")


def test_the_last_step_is_the_slope_times_the_gradient(dtype, backend):
    found = gradients(CASE, None, dtype, backend)
    exact = (1 - extended(found["h"][-1]) ** 2) * extended(CASE.gradient(dtype)[-1])
    assert_near(found["grad_u"][-1], exact, "δ_T")


@of_every_activation
def test_small_differences_are_linear(cell, dtype, backend):
    small_differences_check(cell, dtype, backend)


def test_relu_counts_as_its_own_inverse(dtype, backend):
    relu_inverse_check(dtype, backend)


def linear_gradients(rule: tp.BackProp | tp.TargetProp, backend: str) -> dict[str, Tensor]:
    """Of a linear layer with an orthogonal weight."""
    case = CASE.with_(cell="rnn_identity")
    u, weight, _, h0 = case.tensors(torch.float64)
    inputs = Inputs(u, torch.linalg.qr(weight).Q, None, h0)
    leaves = leaves_of(inputs)
    h = layer(case, inputs, rule=rule, backend=backend)
    grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float64))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("update", ["total", "local"])
def test_modes_agree_where_the_inverse_is_exact(update, backend):
    """r to 0: f⁻¹(h_t) = h_{t-1}, so "direct", "difference" and "layer" are one."""
    first, *others = (
        linear_gradients(tp.TargetProp(**way, update=update, reg=1e-15, step=0.5), backend)
        for way in ({"inverse": "layer"}, *MODES)
    )
    for other in others:
        assert_same_numbers(other, first, condition=20)


def test_an_orthogonal_weight_makes_target_propagation_back_propagation(backend):
    """At power 1/2, P = Wᵀ/√(1 + r), and "local" then is BP as r goes to 0."""
    rules = (tp.TargetProp(update="local", reg=1e-14), tp.BackProp())
    assert_same_numbers(*(linear_gradients(rule, backend) for rule in rules), condition=20)


def test_identity_gives_every_step_the_sum_of_later_gradients(dtype, backend):
    found = gradients(CASE, tp.TargetProp(inverse="identity", update="local"), dtype, backend)
    later = np.cumsum(extended(CASE.gradient(dtype))[::-1], axis=0)[::-1]
    assert_near(found["grad_u"], (1 - extended(found["h"]) ** 2) * later, "grad_u")
    assert_near(found["grad_h0"], later[0], "grad_h0")


def test_identity_feedback_is_the_identity_rule(dtype, backend):
    found = gradients(CASE, tp.TargetProp(), dtype, backend, feedback=torch.eye(CASE.N, dtype=dtype))
    assert_same_numbers(found, gradients(CASE, tp.TargetProp(inverse="identity"), dtype, backend))


def test_an_orthogonal_weight_is_solved_in_one_iteration(dtype, cpu):
    """W Wᵀ = I leaves a diagonal matrix of D² + r, whatever the slopes; and a Gram matrix knows it."""
    sweep = Sweep("jacobian")
    back = back_of(Case(T=6, B=60, N=33), dtype, sweep).with_(grad=None)
    orthogonal = torch.linalg.qr(back.weight).Q.contiguous()
    assert back.with_(weight=orthogonal).iterations(sweep, "cpu").eq(1).all()


def test_what_was_measured_on_the_cpu_holds_there():
    """On another device the sweep is taken, until somebody has measured it."""
    for device, expected in (("cpu", True), ("meta", False)):
        h = torch.empty((8192, 1, 256), device=device)
        assert parallel.worth_it(None, h) is expected
        assert parallel.worth_it(h, h) is False
