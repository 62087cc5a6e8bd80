"""Cells: those of ``torch.nn`` with back-propagation, and in a chain the layer, under every rule."""

import copy
import re

import pytest
import torch
from _cases import RULES
from _compare import assert_identical
from _modules import ALL, ALL_AND_RULES, B, Layer, M, N, parts_of, skip_what_cpu_lacks
from test_calls_in_pieces import assert_equal_to_rounding
from test_nn_stacks import State, flat, gradients, inputs, make
from test_nn_time import resets
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels._validate import ShapeError
from tp_kernels.nn.cells import RecurrentCell

T = 8
over_cells = pytest.mark.parametrize("layer", ALL, ids=lambda layer: f"{layer}Cell")
over_rules = pytest.mark.parametrize(("layer", "rule"), ALL_AND_RULES, ids=str)


def cell_of(layer: Layer, **options: object) -> RecurrentCell:
    torch.manual_seed(1)
    return getattr(tp.nn, f"{layer.name}Cell")(M, N, **{"dtype": torch.float64} | options)


def pair(layer: Layer, **options: object) -> tuple[nn.RNNCellBase, RecurrentCell]:
    """Theirs and ours, of one seed."""
    torch.manual_seed(1)
    theirs = getattr(nn, f"{layer.name}Cell")(M, N, dtype=torch.float64, **options)
    return theirs, cell_of(layer, rule=tp.BackProp(), **options)


def chain(cell: RecurrentCell, x: Tensor, hx: State, reset: Tensor | None = None) -> tuple[Tensor, State]:
    """Step by step: all h, and the last state."""
    states = []
    for t, step in enumerate(x):
        hx = cell(step, hx) if reset is None else cell(step, hx, reset=reset[t])
        states.append(parts_of(hx)[0])
    return torch.stack(states), hx


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "zero"])
@pytest.mark.parametrize("batch", [(B,), ()], ids=["batch", "no batch"])
@over_cells
def test_like_torch(layer, batch, with_hx, bias, backend):
    """One seed, one cell; outputs and gradients."""
    theirs, ours = pair(layer, bias=bias)
    ours.backend = backend
    assert isinstance(ours, nn.RNNCellBase)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_identical(ours.state_dict()[name], value, name)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        leaves = [
            torch.randn(*batch, size, dtype=torch.float64, requires_grad=True) for size in (M, *[N] * layer.states)
        ]
        leaves = leaves if with_hx else leaves[:1]
        states = parts_of(module(leaves[0], layer.state(leaves[1:]) if with_hx else None))
        loss = sum(((2 + i) * state).sin().sum() for i, state in enumerate(states))
        results.append([*states, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearity(nonlinearity):
    torch.manual_seed(1)
    theirs = nn.RNNCell(M, N, nonlinearity=nonlinearity)
    torch.manual_seed(1)
    ours = tp.nn.RNNCell(M, N, nonlinearity=nonlinearity)
    x = torch.randn(B, M)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("reset", [None, resets()], ids=["plain", "resets"])
@over_rules
def test_a_chain_is_a_layer(layer, rule, reset, backend):
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, {}, rule=RULES[rule], backend=backend)
    cell = cell_of(layer, rule=RULES[rule], backend=backend)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(module, f"{name}_l0"))
    x, hx = inputs(layer, {})
    h, last = chain(cell, x, layer.state([part[0] for part in parts_of(hx)]), reset)
    found = gradients(module, (h, layer.state([part[None] for part in parts_of(last)])), x, hx)
    assert_equal_to_rounding(found, gradients(module, module(x, hx, reset=reset), x, hx))


@over_cells
def test_a_chain_without_a_batch(layer, backend):
    cell = cell_of(layer, backend=backend)
    x, hx = inputs(layer, {})
    grads = []
    for at in (slice(0, 1), 0):
        start = layer.state([part[0, at] for part in parts_of(hx)])
        h, _ = chain(cell, x[:, at], start)
        grads.append(torch.autograd.grad(h.sin().sum(), list(cell.parameters())))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@over_cells
def test_a_changed_state_is_warned_of(layer):
    cell = cell_of(layer)
    x, hx = inputs(layer, {})
    state = cell(x[0], layer.state([part[0] for part in parts_of(hx)]))
    with pytest.warns(UserWarning, match=rf"nn\.{layer.name}Cell: the state that this call begins with") as caught:
        cell(x[1], layer.state([0.5 * part for part in parts_of(state)]))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@over_cells
def test_a_state_is_no_view(layer):
    cell = cell_of(layer)
    for state in parts_of(cell(torch.randn(B, M, dtype=torch.float64))):
        assert not state.detach_().requires_grad


@over_cells
def test_compiled(layer):
    torch._dynamo.reset()
    cell = cell_of(layer)
    x, hx = inputs(layer, {})
    hx = layer.state([part[0] for part in parts_of(hx)])

    def two_steps(x: Tensor, hx: State) -> tuple[Tensor, State]:
        return chain(cell, x[:2], hx)

    found, expected = (
        torch.autograd.grad(flat(call(x, hx))[0].sin().sum(), list(cell.parameters()))
        for call in (torch.compile(two_steps, fullgraph=True, backend="aot_eager"), two_steps)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@over_cells
def test_under_autocast(layer):
    cell = cell_of(layer, dtype=torch.float32)
    x = torch.randn(B, M)
    with torch.autocast("cpu", torch.bfloat16):
        found = cell(x.bfloat16())
    expected = cell(x.bfloat16().float())
    for one, other in zip(parts_of(found), parts_of(expected), strict=True):
        assert_identical(one.detach(), other.detach(), "state")


@over_cells
def test_repr_and_copies(layer):
    cell = cell_of(layer, rule=tp.BackProp(), bias=False, backend="reference")
    text = f"{layer.name}Cell({M}, {N}, bias=False, rule={cell.rule!r}, backend='reference')"
    assert repr(cell) == repr(copy.deepcopy(cell)) == text


X = torch.ones(B, M, dtype=torch.float64)
BAD = {
    "dims": ((X[None],), {}, ValueError, "input must have shape [B, M] or [M], got (1, 4, 3)"),
    "M": ((X[:, :2],), {}, ShapeError, "input must have shape [B, M] with M = 3, got (4, 2)"),
    "dtype": ((X.float(),), {}, TypeError, "input must have the dtype of weight_ih, float64, got float32"),
    "list": (([1.0],), {}, TypeError, "input must be a torch.Tensor, got list"),
    "reset": (
        (X,),
        {"reset": torch.zeros(2, dtype=torch.bool)},
        ValueError,
        "reset must have shape [B] = [4], got (2,)",
    ),
}


@pytest.mark.parametrize("name", BAD)
@over_cells
def test_bad_call(layer, name):
    arguments, options, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(f"nn.{layer.name}Cell: {text}")):
        cell_of(layer)(*arguments, **options)


@over_cells
def test_bad_states_and_parameters(layer):
    cell = cell_of(layer)
    first = "hx" if layer.states == 1 else "hx[0]"
    for shape in ((2, N), (1, B, N), (N,)):
        with pytest.raises(ShapeError, match=re.escape(f"{first} must have shape [B, N] = [4, 5], got {shape}")):
            cell(X, layer.state([torch.zeros(shape, dtype=torch.float64)] * layer.states))
    with pytest.raises(TypeError):
        cell(X, 3)
    with pytest.raises(TypeError, match="rule must be a TargetProp, a BackProp or None, got int"):
        cell.rule = 1
    cell.weight_hh = nn.Parameter(torch.zeros(N, N + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight_hh must have shape"):
        cell(X)


def test_a_pair_is_two_tensors():
    cell = tp.nn.LSTMCell(M, N)
    with pytest.raises(ValueError, match=r"nn.LSTMCell: hx must be a tuple of two tensors, got 3"):
        cell(torch.ones(B, M), (torch.ones(B, N),) * 3)
    with pytest.raises(TypeError, match=r"nn.LSTMCell: hx must be a tuple of two tensors or None, got Tensor"):
        cell(torch.ones(B, M), torch.ones(B, N))
