"""``LearnedInverse``: targets, gradients and the inverse's own loss against NumPy; and that it learns."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from _compare import assert_identical, assert_near, assert_same_pattern
from _modules import count_evaluations
from _oracle import extended
from _oracle_recurrence import ACTIVATIONS, SLOPES, weight_gradient
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.regimes.tasks import make_task

M, N, T, B = 3, 5, 7, 4
INVERSE = ("inverse_ih_l0", "inverse_hh_l0", "inverse_bias_l0")
RECURRENT = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def layer_of(dtype: torch.dtype = torch.float64, **options: object) -> tp.nn.LearnedInverse:
    torch.manual_seed(1)
    return tp.nn.LearnedInverse(M, N, dtype=dtype, **options)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, hx, and the gradients that arrive at the two outputs."""
    numbers = torch.Generator().manual_seed(2)
    shapes = ((T, B, M), (1, B, N), (T, B, N), (1, B, N))
    return tuple(torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in shapes)


def run(
    layer: tp.nn.LearnedInverse, dtype: torch.dtype = torch.float64, h0: bool = True, seed: int = 5
) -> dict[str, Tensor]:
    """Outputs and all gradients of one pass, under names."""
    x, hx, grad, grad_last = inputs(dtype)
    leaves = {"x": x.requires_grad_()} | ({"hx": hx.requires_grad_()} if h0 else {}) | dict(layer.named_parameters())
    output, last = layer(x, hx if h0 else None)
    torch.manual_seed(seed)
    grads = torch.autograd.grad((output, last), list(leaves.values()), (grad, grad_last))
    return {"output": output.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}


def expected(layer: tp.nn.LearnedInverse, h0: bool = True, seed: int = 5) -> dict[str, np.ndarray]:
    """The recursion of the targets themselves, word for word, and all that follows from them."""
    x, hx, grad, grad_last = map(extended, inputs())
    w_ih, w_hh, b_ih, b_hh, u_b, v, c = (
        extended(getattr(layer, name, None)) if getattr(layer, name, None) is not None else 0.0
        for name in (*RECURRENT, *INVERSE)
    )
    a, slope = ACTIVATIONS[layer.nonlinearity], SLOPES[layer.nonlinearity]
    start = hx[0] if h0 else np.zeros_like(hx[0])
    h = [start]
    for x_t in x:
        h.append(a(x_t.dot(w_ih.T) + b_ih + b_hh + h[-1].dot(w_hh.T)))
    h = np.stack(h)  # h[t] is h_t, and x[t - 1] is x_t
    g = np.concatenate([np.zeros_like(start)[None], grad])
    g[T] += grad_last[0]

    def inverse(state: np.ndarray, t: int) -> np.ndarray:
        return a(state.dot(v.T) + x[t - 1].dot(u_b.T) + c)

    targets = np.empty_like(h)
    targets[T] = h[T] - layer.step * g[T]
    for t in range(T, 0, -1):
        targets[t - 1] = h[t - 1] + inverse(targets[t], t) - inverse(h[t], t) - layer.step * g[t - 1]
    adjoint = h - targets
    if layer.update == "total":
        for t in range(T - 1, 0, -1):
            adjoint[t] += (slope(h[t + 1]) * adjoint[t + 1]).dot(w_hh)
    delta = slope(h[1:]) * adjoint[1:]
    first = delta[0].dot(w_hh) if layer.update == "total" else adjoint[0]
    bias = delta.sum((0, 1))
    answer = {
        "output": h[1:],
        "last": h[T:],
        "x": delta.dot(w_ih),
        "hx": first[None],
        "weight_ih_l0": delta.reshape(-1, N).T.dot(x.reshape(-1, M)),
        "weight_hh_l0": weight_gradient(delta, h[1:], start),
        "bias_ih_l0": bias,
        "bias_hh_l0": bias,
    }
    torch.manual_seed(seed)
    noisy = h[:-1] + layer.noise * extended(torch.randn(T, B, N, dtype=torch.float64))
    after = a(x.dot(w_ih.T) + b_ih + b_hh + noisy.dot(w_hh.T))
    found = a(after.dot(v.T) + x.dot(u_b.T) + c)
    rows = (2 * slope(found) * (found - noisy) / (T * B)).reshape(-1, N)
    answer |= {
        "inverse_ih_l0": rows.T.dot(x.reshape(-1, M)),
        "inverse_hh_l0": rows.T.dot(after.reshape(-1, N)),
        "inverse_bias_l0": rows.sum(0),
    }
    return answer


@pytest.mark.parametrize("h0", [True, False], ids=["h0", "zero"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("update", ["local", "total"])
def test_targets_and_gradients(update, nonlinearity, bias, h0, backend):
    layer = layer_of(update=update, nonlinearity=nonlinearity, bias=bias, step=0.7, noise=0.3, backend=backend)
    found, answer = run(layer, h0=h0), expected(layer, h0)
    assert set(found) == set(answer) - ({"hx"} if not h0 else set()) - (
        set() if bias else {"bias_ih_l0", "bias_hh_l0", "inverse_bias_l0"}
    )
    for name, value in found.items():
        assert_near(value, answer[name], name, condition=20)
        assert value.abs().max() > 0, name


@pytest.mark.parametrize("update", ["local", "total"])
def test_float32(update, backend):
    layer = layer_of(torch.float32, update=update, noise=0.0, backend=backend)
    found, answer = run(layer, torch.float32), run(copy.deepcopy(layer).double())
    for name, value in found.items():
        assert_near(value, extended(answer[name]), name, condition=20)


def test_a_perfect_inverse_of_a_linear_layer():
    """With V = W⁻¹, U_b = -W⁻¹U and c = -W⁻¹b displacements are those of the inverse itself, and nothing is left to
    reconstruct."""
    layer = layer_of(nonlinearity="identity", noise=1.0)
    with torch.no_grad():
        inverse = torch.linalg.inv(layer.weight_hh_l0)
        layer.inverse_hh_l0.copy_(inverse)
        layer.inverse_ih_l0.copy_(-inverse @ layer.weight_ih_l0)
        layer.inverse_bias_l0.copy_(-inverse @ (layer.bias_ih_l0 + layer.bias_hh_l0))
    x, hx, _, grad_last = inputs()
    hx.requires_grad_()
    output, last = layer(x, hx)
    last.backward(grad_last)
    assert_near(layer.invert(output[1:], x[1:]).detach(), extended(output[:-1]), "state before", condition=1e4)
    power = np.linalg.matrix_power(inverse.numpy(), T)
    assert_near(hx.grad[0], extended(grad_last[0]).dot(power.T), "displacement", condition=1e4)
    for name in INVERSE:
        assert_near(layer.get_parameter(name).grad, np.zeros(layer.get_parameter(name).shape), name, 1e4, scale=1.0)


def test_the_two_losses_stay_apart():
    """The inverse's parameters have the gradient of their own loss, whatever the model's; and only they have it."""
    layer = layer_of()
    grads = []
    for factor in (1.0, 2.0):
        layer.zero_grad()
        x = inputs()[0].requires_grad_()
        torch.manual_seed(5)
        (factor * layer(x)[1].sum()).backward()
        grads.append({"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()})
    for name in INVERSE:
        assert_identical(grads[0][name], grads[1][name], name)
    layer.zero_grad()
    x = inputs()[0].requires_grad_()
    (0 * layer(x)[1].sum()).backward()
    for gradient in (x.grad, *(layer.get_parameter(name).grad for name in RECURRENT)):
        assert not gradient.any()
    assert all(layer.get_parameter(name).grad.any() for name in INVERSE)


def test_noise_is_drawn_in_backward_and_repeats_with_the_seed():
    layer = layer_of()
    first, again, other = run(layer, seed=5), run(layer, seed=5), run(layer, seed=6)
    for name, value in first.items():
        assert_identical(again[name], value, name)
        assert torch.equal(other[name], value) == (name not in INVERSE), name
    state = torch.get_rng_state()
    layer(inputs()[0])
    layer.noise = 0.0
    run(layer, seed=5)
    torch.manual_seed(5)
    expected_state = torch.get_rng_state()
    run(layer, seed=5)
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert not torch.equal(state, expected_state)


def test_reconstruction_falls_when_trained():
    layer = layer_of(torch.float32)
    x = torch.randn(20, 16, M)

    def loss() -> float:
        with torch.no_grad():
            h = layer(x)[0]
            return (layer.invert(h[1:], x[1:]) - h[:-1]).square().sum(-1).mean().item()

    before = loss()
    inverse = [layer.get_parameter(name) for name in INVERSE]
    optimizer = torch.optim.Adam(inverse, 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        layer(x)[1].sum().backward()
        optimizer.step()
    assert loss() < before / 10


@pytest.mark.parametrize("update", ["local", "total"])
def test_learns_temporal_order(update):
    """One optimizer trains the layer, its inverse and the readout; four classes, chance is a quarter."""
    task = make_task("temporal-order", T=10)
    generator = torch.Generator().manual_seed(0)
    layer, readout = tp.nn.LearnedInverse(6, 32, update=update), nn.Linear(32, 4)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], 3e-3)
    for _ in range(300):
        x, y = task.batch(generator, 20)
        optimizer.zero_grad()
        task.loss(readout(layer(x)[1][0]), y).backward()
        optimizer.step()
    x, y = task.held_out("test")
    assert task.correct(readout(layer(x)[1][0]), y).float().mean() > 0.9


# --- a drop-in for torch.nn.RNN


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_one_seed_gives_the_network_of_torch(bias):
    torch.manual_seed(3)
    theirs = nn.RNN(M, N, bias=bias)
    torch.manual_seed(3)
    ours = tp.nn.LearnedInverse(M, N, bias=bias)
    assert list(ours.state_dict()) == [*theirs.state_dict(), *INVERSE[: 3 if bias else 2]]
    for name, parameter in theirs.named_parameters():
        assert_identical(ours.get_parameter(name).detach(), parameter.detach(), name)
    x = torch.randn(T, B, M)
    for found, answer in zip(ours(x), theirs(x), strict=True):
        assert_near(found, extended(answer), "output")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == list(INVERSE[: 3 if bias else 2])
    assert unexpected == []


@pytest.mark.parametrize("layout", ["BTM", "TM"])
def test_layouts(layout):
    plain, other = layer_of(noise=0.0), layer_of(noise=0.0, batch_first=layout == "BTM")
    x, _, grad, grad_last = inputs()
    x, grad, grad_last = (x, grad, grad_last) if layout == "BTM" else (x[:, :1], grad[:, :1], grad_last[:, :1])
    change = (lambda t: t.transpose(0, 1)) if layout == "BTM" else (lambda t: t[:, 0])
    output, last = plain(x)
    torch.autograd.backward((output, last), (grad, grad_last))
    found, found_last = other(change(x))
    torch.autograd.backward((found, found_last), (change(grad), grad_last if layout == "BTM" else grad_last[0]))
    assert_near(found, extended(change(output)), "output")
    assert found_last.shape == ((1, B, N) if layout == "BTM" else (1, N))
    for name, parameter in plain.named_parameters():
        assert_near(other.get_parameter(name).grad, extended(parameter.grad), name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_under_autocast_it_computes_in_the_parameters_dtype(half):
    layer, x = layer_of(torch.float32, noise=0.0), torch.randn(T, B, M)
    output, last = layer(x)
    plain = torch.autograd.grad(last.sum(), list(layer.parameters()))
    with torch.autocast("cpu", half):
        found, found_last = layer(x)
        gradients = torch.autograd.grad(found_last.sum(), list(layer.parameters()))
    assert_identical(found.detach(), output.detach().to(half), "output")
    assert_identical(found_last.detach(), last.detach(), "last state")
    for name, *pair in zip(dict(layer.named_parameters()), gradients, plain, strict=True):
        assert_identical(*pair, name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_not_finite_flows_as_in_torch(value):
    layer = layer_of(torch.float32)
    theirs = nn.RNN(M, N)
    theirs.load_state_dict({name: parameter for name, parameter in layer.state_dict().items() if name in RECURRENT})
    x = torch.randn(T, B, M)
    x[2, 1] = value
    assert_same_pattern(layer(x)[0], theirs(x)[0], "output")


def test_frozen_parameters():
    """What is not trained has no gradient, and draws no noise where it is the whole inverse."""
    layer = layer_of()
    for name in ("inverse_ih_l0", "weight_hh_l0"):
        layer.get_parameter(name).requires_grad_(False)
    torch.manual_seed(5)
    layer(*inputs()[:2])[1].backward(inputs()[3])
    torch.manual_seed(5)
    full = layer_of()
    torch.manual_seed(5)
    full(*inputs()[:2])[1].backward(inputs()[3])
    for name, parameter in layer.named_parameters():
        if name in ("inverse_ih_l0", "weight_hh_l0"):
            assert parameter.grad is None
        else:
            assert_identical(parameter.grad, full.get_parameter(name).grad, name)
    for name in INVERSE:
        layer.get_parameter(name).requires_grad_(False)
    state = torch.get_rng_state()
    layer(inputs()[0])[1].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_parametrized_weight_is_evaluated_once_a_pass():
    layer = layer_of()
    counters = count_evaluations(layer)
    layer(*inputs()[:2])[1].sum().backward()
    assert {name: counter.evaluations for name, counter in counters.items()} == dict.fromkeys(counters, 1)


def test_empty_batch():
    layer = layer_of()
    layer(torch.randn(T, 0, M, dtype=torch.float64))[0].sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())


def test_second_derivatives_are_refused():
    layer, x = layer_of(), inputs()[0]
    output = layer(x)[0].sum()
    (grad,) = torch.autograd.grad(output, layer.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(output + grad.sum(), layer.weight_hh_l0)


def test_compile():
    torch._dynamo.reset()  # what it remembers of this code from other tests
    layer, x = layer_of(noise=0), inputs()[0]
    layer(x)[0].sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, backend="eager")(x)[0].sum().backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert_identical(parameter.grad, grad, "gradient")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, backend="eager", fullgraph=True)(x)


def test_copies_and_pickles():
    layer = layer_of(update="total", step=0.5)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == "LearnedInverse(3, 5, update='total', step=0.5, noise=0.1)"
        for name, value in run(layer).items():
            assert_identical(run(again)[name], value, name)


def test_it_takes_no_rule():
    model = nn.Sequential(tp.nn.RNN(M, N), nn.RNN(M, N), layer_of())
    with pytest.raises(TypeError) as caught:
        tp.nn.convert(model, tp.BackProp())
    assert (model[0].rule, type(model[1])) == (tp.TargetProp(), nn.RNN), "changed before the error"
    text = f"nn.LearnedInverse: rule must be None (it learns its inverse), got {tp.BackProp()!r}"
    assert str(caught.value) == text
    with pytest.raises(ValueError, match=re.escape("trace: model must have a tp_kernels.nn.RNN, GRU or LSTM in it")):
        tp.trace(model[2:])


BAD = {
    "update": ({"update": "none"}, ValueError, "nn.LearnedInverse: update must be one of 'local', 'total', got 'none'"),
    "update-kind": ({"update": 1}, TypeError, "nn.LearnedInverse: update must be a str, got int"),
    "step": ({"step": 0}, ValueError, "nn.LearnedInverse: step must be positive and finite, got 0"),
    "step-kind": ({"step": "1"}, TypeError, "nn.LearnedInverse: step must be a real number, got str"),
    "noise": ({"noise": -0.1}, ValueError, "nn.LearnedInverse: noise must be at least 0 and finite, got -0.1"),
    "noise-nan": ({"noise": math.nan}, ValueError, "nn.LearnedInverse: noise must be at least 0 and finite, got nan"),
    "layers": ({"num_layers": 2}, NotImplementedError, "nn.LearnedInverse: num_layers=2 is not implemented yet"),
    "hidden_size": ({"hidden_size": 0}, ValueError, "nn.LearnedInverse: hidden_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_constructor(name):
    changes, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        tp.nn.LearnedInverse(**{"input_size": M, "hidden_size": N} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_bad_call():
    layer = layer_of()
    with pytest.raises(TypeError, match="input must have the dtype of weight_ih_l0, float64, got float32"):
        layer(torch.ones(T, B, M))
    with pytest.raises(ValueError, match=re.escape("hx must have shape [1, B, N] = [1, 4, 5], got (4, 5)")):
        layer(torch.ones(T, B, M).double(), torch.ones(B, N).double())
    layer.inverse_hh_l0 = nn.Parameter(torch.ones(N, M).double())
    with pytest.raises(ValueError, match="inverse_hh_l0") as caught:
        layer(torch.ones(T, B, M).double())
    assert str(caught.value) == "nn.LearnedInverse: inverse_hh_l0 must have shape (5, 5), got (5, 3)"
