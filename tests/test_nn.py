"""``nn.RNN`` and ``nn.convert``: drop-ins for ``torch.nn.RNN``, which is the oracle of outputs and gradients."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _cases import DTYPES, RULES
from _compare import assert_budget, assert_identical, assert_near, assert_same_pattern
from _modules import run
from _oracle import extended, rnn_backward, rnn_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.ops.rnn import feedback, op
from tp_kernels.rules import Sweep

M, N, T, B = 3, 5, 7, 4


def pair(rule: object = None, backend: str = "auto", dtype: torch.dtype = torch.float32, **options: object) -> tuple:
    """A ``torch.nn.RNN`` and ours, from one seed."""
    modules = []
    for make, extra in ((nn.RNN, {}), (tp.nn.RNN, {"rule": rule or tp.BackProp(), "backend": backend})):
        torch.manual_seed(1)
        modules.append(make(M, N, dtype=dtype, **options, **extra))
    return tuple(modules)


def exact(
    module: nn.RNN, states: Tensor, x: Tensor, h0: Tensor | None, grad: Tensor, grad_last: Tensor
) -> dict[str, tuple[np.ndarray, float]]:
    """The same by the oracle, gradients at the given states: 1 - h² is ill-conditioned in h. With each answer the
    size of the terms it sums up, which its rounding errors are relative to."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    w_ih, w_hh, b_ih, b_hh = (extended(getattr(module, name, None)) for name in names)
    inputs, start = extended(x), None if h0 is None else extended(h0[0])
    flat = inputs.reshape(-1, inputs.shape[-1])
    u = flat.dot(w_ih.T).reshape(*inputs.shape[:-1], len(w_hh)) + (0 if b_ih is None else b_ih + b_hh)
    output = rnn_forward(u, w_hh, start, module.nonlinearity)
    arrives, h = extended(grad), extended(states)
    arrives[-1] += extended(grad_last)[0]
    delta, grad_hh, first = rnn_backward(arrives, u, h, start, w_hh, None, Sweep.of(tp.BackProp(), module.nonlinearity))
    rows = delta.reshape(-1, len(w_hh))
    before = np.concatenate([np.zeros_like(h[:1]) if start is None else start[None], h[:-1]]).reshape(rows.shape)
    answers = {
        "output": (output, 1.0),
        "last": (output[-1:], 1.0),
        "grad_x": (rows.dot(w_ih).reshape(x.shape), abs(rows).dot(abs(w_ih))),
        "grad_h0": (first[None], abs(delta[0]).dot(abs(w_hh))),
        "grad_weight_ih_l0": (rows.T.dot(flat), abs(rows).T.dot(abs(flat))),
        "grad_weight_hh_l0": (grad_hh, abs(rows).T.dot(abs(before))),
        "grad_bias_ih_l0": (rows.sum(axis=0), abs(rows).sum(axis=0)),
        "grad_bias_hh_l0": (rows.sum(axis=0), abs(rows).sum(axis=0)),
    }
    return {name: (answer, float(np.max(size, initial=0))) for name, (answer, size) in answers.items()}


# --- outputs and gradients


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("layout", ["TBM", "BTM", "TM", "TM-batch_first"])
@pytest.mark.parametrize("h0", [True, False], ids=["h0", "zero"])
def test_like_torch(nonlinearity, bias, layout, h0, dtype, backend):
    """Every layout, both kinds of bias: shapes, outputs and all gradients of back-propagation."""
    batch_first = layout in ("BTM", "TM-batch_first")
    theirs, ours = pair(None, backend, dtype, nonlinearity=nonlinearity, bias=bias, batch_first=batch_first)
    shape = {"TBM": (T, B), "BTM": (B, T)}.get(layout, (T,))
    x, grad = torch.randn(*shape, M, dtype=dtype), torch.randn(*shape, N, dtype=dtype)
    state = (1, B, N) if len(shape) == 2 else (1, N)
    start, grad_last = torch.randn(state, dtype=dtype) if h0 else None, torch.randn(state, dtype=dtype)
    found, expected = (run(module, x, start, grad, grad_last) for module in (ours, theirs))
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_near(value, extended(expected[name]), name)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_swap_within_the_error_budget(data):
    """``torch.nn.RNN`` is the plain code here: ours may err at most twice as much."""
    side = st.integers(1, 40)
    m, n, t, b = data.draw(side), data.draw(side), data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    options = {"nonlinearity": data.draw(st.sampled_from(["tanh", "relu"])), "bias": data.draw(st.booleans())}
    with_h0 = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    theirs = nn.RNN(m, n, dtype=dtype, **options)
    x, grad = torch.randn(t, b, m, dtype=dtype), torch.randn(t, b, n, dtype=dtype)
    start, grad_last = torch.randn(1, b, n, dtype=dtype) if with_h0 else None, torch.randn(1, b, n, dtype=dtype)
    expected = run(theirs, x, start, grad, grad_last)
    plain = exact(theirs, expected["output"], x, start, grad, grad_last)
    for backend in ("reference", "cpu") if _native.cpu_available()[0] else ("reference",):
        ours = tp.nn.RNN(m, n, dtype=dtype, **options, rule=tp.BackProp(), backend=backend)
        ours.load_state_dict(theirs.state_dict())
        found = run(ours, x, start, grad, grad_last)
        answers = exact(theirs, found["output"], x, start, grad, grad_last)
        for name, value in found.items():
            answer, scale = answers[name]
            assert_budget(value, expected[name], answer, name, scale=scale, reference_exact=plain[name][0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight_hh_l0", "h0"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_not_finite_flows_as_in_torch(nonlinearity, where, value, dtype, backend):
    """The same elements of outputs and gradients are NaN, and the same are infinite."""
    theirs, ours = pair(None, backend, dtype, nonlinearity=nonlinearity)
    x, start = torch.randn(T, B, M, dtype=dtype), torch.randn(1, B, N, dtype=dtype)
    if where == "input":
        x[2, 1] = value
        for module in (theirs, ours):  # one sign, so that the projection is not NaN already
            module.weight_ih_l0.data.abs_()
    elif where == "h0":
        start[0, 2, 3] = value
    else:
        for module in (theirs, ours):
            module.weight_hh_l0.data[3, 1] = value
    start = None if where == "weight_hh_l0" else start
    grad, grad_last = torch.randn(T, B, N, dtype=dtype), torch.randn(1, B, N, dtype=dtype)
    found, expected = (run(module, x, start, grad, grad_last) for module in (ours, theirs))
    for name in expected:
        assert_same_pattern(found[name], expected[name], name)
    assert not all(tensor.isfinite().all() for tensor in expected.values())


def test_gradcheck(backend):
    """Both outputs, through input, first state and all parameters."""
    ours = pair(None, backend, torch.float64)[1]
    x, h0 = torch.randn(3, 2, M, dtype=torch.float64), torch.randn(1, 2, N, dtype=torch.float64)
    leaves = [x.requires_grad_(), h0.requires_grad_(), *ours.parameters()]
    assert torch.autograd.gradcheck(lambda x, h0, *parameters: ours(x, h0), leaves)


@pytest.mark.parametrize("rule", RULES)
def test_the_module_is_the_op_after_a_projection(rule, dtype, backend):
    ours = pair(RULES[rule], backend, dtype)[1]
    x, h0 = torch.randn(T, B, M, dtype=dtype), torch.randn(1, B, N, dtype=dtype)
    grad = torch.randn(T, B, N, dtype=dtype)
    found = run(ours, x, h0, grad, torch.zeros(1, B, N, dtype=dtype))
    u = nn.functional.linear(x, ours.weight_ih_l0, ours.bias_ih_l0 + ours.bias_hh_l0)
    h = tp.rnn(u, ours.weight_hh_l0, h0[0], rule=RULES[rule], backend=backend)
    expected = torch.autograd.grad(h, list(ours.parameters()), grad)
    for (name, _), value in zip(ours.named_parameters(), expected, strict=True):
        assert_near(found[f"grad_{name}"], extended(value), name)


def test_identity_nonlinearity(backend):
    ours = tp.nn.RNN(M, N, nonlinearity="identity", backend=backend)
    x = torch.randn(2, B, M)
    output, _ = ours(x)
    bias = ours.bias_ih_l0 + ours.bias_hh_l0
    first = x[0] @ ours.weight_ih_l0.mT + bias
    assert_near(output[0], extended(first), "first state")
    assert_near(output[1], extended(x[1] @ ours.weight_ih_l0.mT + bias + first @ ours.weight_hh_l0.mT), "second state")


def test_empty_batch(backend):
    theirs, ours = pair(None, backend)
    x = torch.randn(T, 0, M)
    assert [value.shape for value in ours(x)] == [value.shape for value in theirs(x)]
    ours(x)[0].sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in ours.parameters())


def test_the_last_state_is_memory_of_its_own(backend):
    """A caller may change it in place, as a detached state handed on, and the outputs stay."""
    ours = pair(None, backend)[1]
    output, last = ours(torch.randn(T, B, M))
    before = output.detach().clone()
    last.detach().zero_()
    assert_identical(output.detach(), before, "output")
    output.sum().backward()


def test_target_propagation_trains(backend):
    """The sign is that of a gradient: a step against it lowers the loss."""
    torch.manual_seed(0)
    layer, readout = tp.nn.RNN(M, 16, backend=backend), nn.Linear(16, 1)
    parameters = [*layer.parameters(), *readout.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    x = torch.randn(5, 32, M)
    losses = []
    for _ in range(30):
        loss = (readout(layer(x)[1][0]) - x[-1, :, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compile():
    ours = pair(tp.TargetProp())[1]
    compiled = torch.compile(ours, fullgraph=True)
    x, h0 = torch.randn(T, B, M), torch.randn(1, B, N)
    grad, grad_last = torch.randn(T, B, N), torch.randn(1, B, N)
    found, expected = run(compiled, x, h0, grad, grad_last), run(ours, x, h0, grad, grad_last)
    for name, value in zip(expected, found.values(), strict=True):
        assert_near(value, extended(expected[name]), name)


# --- parameters and states


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_one_seed_gives_one_network(bias, dtype):
    theirs, ours = pair(bias=bias, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert_identical(getattr(ours, name).detach(), parameter.detach(), name)
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    for name, parameter in theirs.named_parameters():
        assert_identical(getattr(ours, name).detach(), parameter.detach(), name)
    assert [len(weights) for weights in ours.all_weights] == [len(weights) for weights in theirs.all_weights]
    assert all(a is b for a, b in zip(ours.all_weights[0], ours.parameters(), strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_state_dict_both_ways(bias):
    theirs, ours = pair(bias=bias)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1)
        assert not torch.equal(source.weight_hh_l0, target.weight_hh_l0)
        target.load_state_dict(source.state_dict())
        for name, parameter in source.named_parameters():
            assert_identical(getattr(target, name).detach(), parameter.detach(), name)


def test_copies_pickles_and_files():
    rule = tp.TargetProp.paper(reg=0.5)
    ours = pair(rule)[1]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = torch.randn(T, B, M)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert again.rule == rule
        assert again.weight_hh_l0 is not ours.weight_hh_l0
        assert_identical(again(x)[0].detach(), ours(x)[0].detach(), "output")


def test_to_another_dtype():
    ours = pair()[1].to(torch.float64)
    x = torch.randn(T, B, M, dtype=torch.float64)
    output, last = ours(x)
    assert output.dtype == last.dtype == torch.float64
    with pytest.raises(TypeError) as caught:
        ours(x.float())
    assert str(caught.value) == "nn.RNN: input must have the dtype of weight_ih_l0, float64, got float32"
    half = ours.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    half.sum().backward()
    assert half.dtype == ours.weight_hh_l0.grad.dtype == torch.bfloat16


def test_train_and_eval_are_the_same():
    ours = tp.nn.RNN(M, N, dropout=0.5)
    x = torch.randn(T, B, M)
    training = ours.train()(x)[0]
    assert ours.training
    assert_identical(ours.eval()(x)[0].detach(), training.detach(), "output")
    assert not ours.training


def test_attributes_are_those_of_torch():
    theirs, ours = pair(batch_first=True, bias=False, nonlinearity="relu")
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.nonlinearity == theirs.nonlinearity
    assert ours.flatten_parameters() is None


def test_repr():
    assert repr(tp.nn.RNN(2, 3, rule=tp.BackProp())) == "RNN(2, 3, rule=BackProp())"
    assert repr(tp.nn.RNN(2, 3, rule=tp.BackProp(), refresh=4)).startswith("RNN(\n  2, 3, rule=BackProp(), refresh=4\n")
    layer = tp.nn.RNN(2, 3, nonlinearity="relu", bias=False, batch_first=True, rule=tp.BackProp(), backend="reference")
    assert repr(layer) == (
        "RNN(2, 3, nonlinearity='relu', bias=False, batch_first=True, rule=BackProp(), backend='reference')"
    )


# --- bad input

NOT_YET = "is not implemented yet"
CONSTRUCTOR = {
    "input_size": ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
    "hidden_size": ({"hidden_size": -2}, ValueError, "hidden_size must be at least 1, got -2"),
    "hidden_size-float": ({"hidden_size": 4.0}, TypeError, "hidden_size must be an int, got float"),
    "input_size-bool": ({"input_size": True}, TypeError, "input_size must be an int, got bool"),
    "num_layers": ({"num_layers": 2}, NotImplementedError, f"num_layers=2 {NOT_YET}"),
    "num_layers-zero": ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    "bidirectional": ({"bidirectional": True}, NotImplementedError, f"bidirectional=True {NOT_YET}"),
    "dropout": ({"dropout": 1.5}, ValueError, "dropout must be a number in [0, 1], got 1.5"),
    "dropout-bool": ({"dropout": True}, ValueError, "dropout must be a number in [0, 1], got True"),
    "nonlinearity": (
        {"nonlinearity": "sin"},
        ValueError,
        "nonlinearity must be one of 'tanh', 'relu', 'identity', got 'sin'",
    ),
    "refresh": ({"refresh": 0}, ValueError, "refresh must be at least 1, got 0"),
    "refresh-bool": ({"refresh": True}, TypeError, "refresh must be an int, got bool"),
    "rule": ({"rule": 1}, TypeError, "rule must be a TargetProp, a BackProp or None, got int"),
    "backend": (
        {"backend": "mkl"},
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'mkl'",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_bad_constructor(name):
    changes, kind, text = CONSTRUCTOR[name]
    with pytest.raises(kind) as caught:
        tp.nn.RNN(**{"input_size": M, "hidden_size": N} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == f"nn.RNN: {text}"


X, H0 = torch.ones(T, B, M), torch.ones(1, B, N)
CALLS = {
    "list": ({}, ([1.0],), TypeError, "input must be a torch.Tensor, got list"),
    "int": (
        {},
        (X.int(),),
        TypeError,
        "input must be of dtype float16, bfloat16, float32, float64, got int32",
    ),
    "vector": ({}, (X[0, 0],), ValueError, "input must have shape [T, B, M] or [T, M], got (3,)"),
    "vector-batch_first": (
        {"batch_first": True},
        (X[0, 0],),
        ValueError,
        "input must have shape [B, T, M] or [T, M], got (3,)",
    ),
    "M": ({}, (X[..., :2],), ValueError, "input must have shape [T, B, M] with M = 3, got (7, 4, 2)"),
    "M-unbatched": ({}, (X[:, 0, :2],), ValueError, "input must have shape [T, M] with M = 3, got (7, 2)"),
    "dtype": (
        {},
        (X.double(),),
        TypeError,
        "input must have the dtype of weight_ih_l0, float32, got float64",
    ),
    "device": (
        {},
        (X.to("meta"),),
        ValueError,
        "input must be on the device of weight_ih_l0, cpu, got meta",
    ),
    "h0-dim": ({}, (X, H0[0]), ValueError, "hx must have shape [1, B, N] = [1, 4, 5], got (4, 5)"),
    "h0-batch": ({}, (X, H0[:, :2]), ValueError, "hx must have shape [1, B, N] = [1, 4, 5], got (1, 2, 5)"),
    "h0-batch_first": (
        {"batch_first": True},
        (X, H0),
        ValueError,
        "hx must have shape [1, B, N] = [1, 7, 5], got (1, 4, 5)",
    ),
    "h0-unbatched": ({}, (X[:, 0], H0), ValueError, "hx must have shape [1, N] = [1, 5], got (1, 4, 5)"),
    "h0-number": ({}, (X, 0), TypeError, "hx must be a torch.Tensor, got int"),
    "h0-dtype": ({}, (X, H0.double()), TypeError, "hx must have the dtype of input, float32, got float64"),
    "packed": (
        {},
        (nn.utils.rnn.pack_sequence([X[:, 0], X[:3, 1]]),),
        NotImplementedError,
        f"a PackedSequence as input {NOT_YET}",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name):
    options, arguments, kind, text = CALLS[name]
    layer = tp.nn.RNN(M, N, **options)
    with pytest.raises(kind) as caught:
        layer(*arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == f"nn.RNN: {text}"


@pytest.mark.parametrize("name", ["list", "int", "h0-number"])
def test_bad_call_under_autocast(name):
    """What is not of floating point is refused there as well, not cast."""
    options, arguments, kind, text = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(kind) as caught:
        tp.nn.RNN(M, N, **options)(*arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == f"nn.RNN: {text}"


def test_no_time_step():
    with pytest.raises(ValueError, match="at least one time step") as caught:
        tp.nn.RNN(M, N)(X[:0])
    assert str(caught.value) == "nn.RNN: input must have at least one time step (T >= 1), got (0, 4, 3)"


def _tangent(layer: tp.nn.RNN) -> None:
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(X, X))


def _loss(layer: tp.nn.RNN) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: torch.func.functional_call(layer, parameters, (X,))[0].sum()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (_tangent, "implement the jvp function"),
        (lambda layer: torch.func.grad(_loss(layer))(dict(layer.named_parameters())), "functorch transforms"),
        (lambda layer: torch.func.vmap(layer)(torch.stack([X, X])), "functorch transforms"),
        (lambda layer: torch.func.jvp(layer, (X,), (X,)), "functorch transforms"),
        (torch.jit.script, "aren't supported"),
    ],
    ids=["forward mode", "grad", "vmap", "jvp", "script"],
)
def test_what_only_torch_has_raises(call, text):
    """Nothing computes on without its derivatives."""
    with pytest.raises(Exception, match=text):
        call(tp.nn.RNN(M, N))


def test_functional_call():
    layer = tp.nn.RNN(M, N)
    parameters = {name: 2 * parameter.detach() for name, parameter in layer.named_parameters()}
    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    _loss(layer)(leaves).backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.load_state_dict(parameters)
    layer(X)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert_identical(leaves[name].grad, parameter.grad, name)


# --- convert


class Model(nn.Module):
    """An RNN, one in a container, one under two names, and what is no RNN."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RNN(M, N, batch_first=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.RNN(N, N, nonlinearity="relu", bias=False)), nn.LSTM(N, N)])
        self.shared = nn.RNN(N, N, dropout=0.0)
        self.again = self.shared
        self.readout = nn.Linear(N, 2)


def silent_convert(model: nn.Module, rule: object = None) -> nn.Module:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tp.nn.convert(model, rule)


def test_convert_swaps_everywhere():
    model = Model().eval()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert silent_convert(model, tp.TargetProp(reg=0.5)) is model
    for module in (model.first, model.blocks[0][0], model.shared):
        assert type(module) is tp.nn.RNN
        assert module.rule == tp.TargetProp(reg=0.5)
        assert not module.training
    assert model.again is model.shared
    assert type(model.blocks[1]) is nn.LSTM
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(dict(model.named_parameters())) == len(parameters)
    assert (model.first.batch_first, model.blocks[0][0].bias, model.blocks[0][0].nonlinearity) == (True, False, "relu")
    for ours, theirs in ((model.first, before.first), (model.shared, before.shared)):
        x = torch.randn(T, B, ours.input_size)
        assert_near(ours(x)[0], extended(theirs(x)[0]), "output")


def test_convert_draws_no_random_numbers():
    model = Model()
    state = torch.get_rng_state()
    silent_convert(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_convert_the_model_itself():
    model = nn.RNN(M, N)
    new = silent_convert(model)
    assert type(new) is tp.nn.RNN
    assert new.rule == tp.TargetProp()
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))
    assert type(model) is nn.RNN


def test_convert_gives_ours_the_new_rule():
    model = nn.Sequential(tp.nn.RNN(M, N, rule=tp.BackProp()), nn.RNN(N, N))
    ours = model[0]
    silent_convert(model, tp.TargetProp.paper())
    assert model[0] is ours
    assert model[0].rule == model[1].rule == tp.TargetProp.paper()
    assert silent_convert(model[0], tp.BackProp()) is ours
    assert ours.rule == tp.BackProp()


def test_convert_keeps_tied_parameters():
    """Between two modules, and within one."""
    model = nn.ModuleList([nn.RNN(N, N), nn.RNN(N, N)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].bias_hh_l0 = model[0].bias_ih_l0
    silent_convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert model[0].bias_hh_l0 is model[0].bias_ih_l0
    assert not any(parameter.is_meta for module in model for parameter in module._parameters.values())
    assert model[0](torch.randn(T, B, N))[0].isfinite().all()


def test_convert_keeps_frozen_parameters():
    model = nn.Sequential(nn.RNN(M, N))
    model[0].weight_hh_l0.requires_grad_(False)
    silent_convert(model)
    model[0](torch.randn(T, B, M))[0].sum().backward()
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_hh_l0.grad is None
    assert model[0].weight_ih_l0.grad.isfinite().all()


def test_an_optimizer_goes_on():
    """With back-propagation a converted model takes the steps of the original, momentum included."""
    x = torch.randn(T, B, M)
    results = []
    for swap in (False, True):
        torch.manual_seed(2)
        model = nn.ModuleList([nn.RNN(M, N), nn.Linear(N, 1)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(6):
            if swap and step == 3:
                silent_convert(model, tp.BackProp())
                assert type(model[0]) is tp.nn.RNN
            optimizer.zero_grad()
            model[1](model[0](x)[0]).square().mean().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for found, expected in zip(*results, strict=True):
        assert_near(found, extended(expected), "parameter")


class Subclass(nn.RNN):
    pass


def hooked(register: str) -> nn.RNN:
    module = nn.RNN(M, N)
    getattr(module, register)(lambda *arguments: None)
    return module


STAY = {
    "layers": (lambda: nn.RNN(M, N, num_layers=2), "num_layers=2 is not implemented yet"),
    "directions": (lambda: nn.RNN(M, N, bidirectional=True), "bidirectional=True is not implemented yet"),
    "subclass": (lambda: Subclass(M, N), "it is a subclass, Subclass, whose own code would be lost"),
    "forward-hook": (lambda: hooked("register_forward_hook"), "it has hooks"),
    "pre-hook": (lambda: hooked("register_forward_pre_hook"), "it has hooks"),
    "backward-hook": (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    "backward-pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "it has hooks"),
    "parametrized": (
        lambda: nn.utils.parametrizations.orthogonal(nn.RNN(M, N), "weight_hh_l0"),
        "it is a subclass, ParametrizedRNN, whose own code would be lost",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_convert_leaves_what_it_cannot_swap(name):
    make, reason = STAY[name]
    model = nn.ModuleDict({"odd": make(), "plain": nn.RNN(M, N)})
    odd = model["odd"]
    with pytest.warns(UserWarning, match=re.escape(reason)) as caught:
        assert tp.nn.convert(model) is model
    assert [str(w.message) for w in caught] == [f"nn.convert: 'odd' stays a torch.nn.RNN: {reason}"]
    assert caught[0].filename == __file__
    assert model["odd"] is odd
    assert type(model["plain"]) is tp.nn.RNN
    with pytest.warns(UserWarning, match=re.escape(reason)) as caught:
        assert tp.nn.convert(odd) is odd
    assert [str(w.message) for w in caught] == [f"nn.convert: the model itself stays a torch.nn.RNN: {reason}"]


def test_bad_convert():
    with pytest.raises(TypeError) as caught:
        tp.nn.convert(torch.ones(2))
    assert str(caught.value) == "nn.convert: model must be a torch.nn.Module, got Tensor"
    model = nn.Sequential(nn.RNN(M, N))
    with pytest.raises(TypeError) as caught:
        tp.nn.convert(model, "tp")
    assert str(caught.value) == "nn.convert: rule must be a TargetProp, a BackProp or None, got str"
    assert type(model[0]) is nn.RNN


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("rule", ["bp", "weight-total", "weight-local", "jacobian-total", "direct-local"])
def test_checkpoints(rule, every, batch_first, backend):
    """Recomputed states and projections change no result beyond the order of sums."""
    rule = RULES[rule]
    plain = tp.nn.RNN(M, N, rule=rule, batch_first=batch_first, backend=backend, dtype=torch.float64)
    layer = tp.nn.RNN(
        M, N, rule=rule, batch_first=batch_first, backend=backend, checkpoint_every=every, dtype=torch.float64
    )
    layer.load_state_dict(plain.state_dict())
    results = []
    for module in (plain, layer):
        x = torch.randn(B, T, M, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x_in = x if batch_first else x.transpose(0, 1)
        h0 = torch.full((1, B, N), 0.1, dtype=torch.float64, requires_grad=True)
        output, last = module(x_in, h0)
        (output.square().sum() + last.sum()).backward()
        results.append((output, last, x.grad, h0.grad, *(p.grad for p in module.parameters())))
    for found, expected in zip(*results, strict=True):
        assert_near(found, extended(expected), "checkpoints", condition=20)


def test_direct_targets_need_the_input_projection(backend):
    """The layer computes ``x Uᵀ + b`` again: the same gradients as the op has, which is given them."""
    rule = RULES["direct-total"]
    layer = tp.nn.RNN(M, N, rule=rule, backend=backend, dtype=torch.float64)
    x = torch.randn(T, B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    found = torch.autograd.grad(layer(x)[0].sum(), (w_ih, w_hh, b_ih))
    h = tp.rnn(nn.functional.linear(x, w_ih, b_ih + b_hh), w_hh, rule=rule, backend=backend)
    for what, *pair in zip(("U", "W", "b"), found, torch.autograd.grad(h.sum(), (w_ih, w_hh, b_ih)), strict=True):
        assert_near(pair[0], extended(pair[1]), what, condition=20)


def test_without_a_sequence(backend):
    """``return_sequence=False``: no output of T states, the same last state and gradients."""
    for every in (None, 3):
        layer = tp.nn.RNN(M, N, backend=backend, checkpoint_every=every, return_sequence=False)
        plain = tp.nn.RNN(M, N, backend=backend, checkpoint_every=every)
        plain.load_state_dict(layer.state_dict())
        output, last = layer(X)
        assert output is None
        last.sum().backward()
        expected = plain(X)[1]
        expected.sum().backward()
        assert torch.equal(last, expected)
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


def test_bad_return_sequence():
    with pytest.raises(TypeError) as caught:
        tp.nn.RNN(M, N, return_sequence=None)
    assert str(caught.value) == "nn.RNN: return_sequence must be a bool, got NoneType"


LEAVES = ("x", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@pytest.mark.parametrize("needed", [LEAVES, *((leaf,) for leaf in LEAVES), ("x", "bias_hh_l0"), ("weight_ih_l0", "hx")])
@pytest.mark.parametrize("every", [None, 3])
def test_some_gradients_only(needed, every, backend):
    """What is not asked for stays away, and leaves the others as ``torch.nn.RNN`` has them."""
    results = []
    for module in pair(tp.BackProp(), backend, torch.float64):
        if isinstance(module, tp.nn.RNN):
            module.checkpoint_every = every
        leaves = {name: parameter.requires_grad_(name in needed) for name, parameter in module.named_parameters()}
        leaves["x"] = X.double().requires_grad_("x" in needed)
        leaves["hx"] = torch.full((1, B, N), 0.1, dtype=torch.float64, requires_grad="hx" in needed)
        output, last = module(leaves["x"], hx=leaves["hx"])
        (output.square().sum() + last.sum()).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in LEAVES:
        found, expected = (result[name] for result in results)
        assert (found is not None) == (expected is not None) == (name in needed), name
        if name in needed:
            assert_near(found, extended(expected), name, condition=20)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sources", ["states", "last", "both"])
def test_chunks_are_one_sequence(rule, sources, dtype, backend, monkeypatch):
    """Projected and swept chunk by chunk, or all at once: the same states, δ and h_0 gradient, and the same sums."""
    results = []
    for steps in (T, 3):
        chunks = [slice(first, min(first + steps, T)) for first in range(0, T, steps)]
        monkeypatch.setattr(op, "_chunks", lambda *sizes, chunks=chunks: chunks)
        torch.manual_seed(0)
        layer = tp.nn.RNN(M, N, rule=RULES[rule], backend=backend, dtype=dtype)
        x, hx = X.clone().to(dtype).requires_grad_(), torch.full((1, B, N), 0.1, dtype=dtype, requires_grad=True)
        output, last = layer(x, hx)
        loss = output.square().sum() if sources != "last" else 0
        loss = loss + last.sum() if sources != "states" else loss
        loss.backward()
        results.append((output, last, hx.grad, x.grad, *(p.grad for p in layer.parameters())))
    for found, expected in zip(*results, strict=True):
        assert_near(found, extended(expected), "chunks", condition=20)
        assert found.abs().max() > 0


def test_chunks_cover_the_sequence():
    for sizes in ((1, 1, 1), (784, 16, 100), (3072, 512, 64), (5, 0, 7), (100, 4000, 2)):
        chunks = op._chunks(*sizes)
        assert [t for steps in chunks for t in range(steps.start, steps.stop)] == list(range(sizes[0]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_keeps_to_the_parameters_dtype(half, backend):
    """Also after a layer that autocast runs in half precision."""
    layer, plain = tp.nn.RNN(N, N, backend=backend), tp.nn.RNN(N, N, backend=backend)
    plain.load_state_dict(layer.state_dict())
    before = nn.Linear(M, N)
    with torch.autocast("cpu", half):
        features = before(X)
        output, last = layer(features, H0)
        last.sum().backward()  # without autocast too
    assert features.dtype == half
    assert output.dtype == torch.float32
    expected = plain(features.detach().float(), H0)[1]
    expected.sum().backward()
    assert_identical(last.detach(), expected.detach(), "last state")
    for name, parameter in layer.named_parameters():
        assert_identical(parameter.grad, plain.get_parameter(name).grad, name)


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("weight_hh_l0", torch.eye(N).double(), TypeError, "have the dtype of weight_ih_l0, float32, got float64"),
        ("weight_hh_l0", torch.eye(N)[:2], ValueError, f"have shape ({N}, {N}), got (2, {N})"),
        ("weight_ih_l0", torch.zeros(N, M + 1), ValueError, f"have shape ({N}, {M}), got ({N}, {M + 1})"),
        ("bias_hh_l0", torch.zeros(1), ValueError, f"have shape ({N},), got (1,)"),
    ],
)
def test_parameters_put_in_from_outside_are_checked(name, value, kind, text):
    layer = tp.nn.RNN(M, N)
    setattr(layer, name, nn.Parameter(value))
    with pytest.raises(kind) as caught:
        layer(X)
    assert str(caught.value) == f"nn.RNN: {name} must {text}"


def test_rule_is_checked_when_assigned():
    layer = tp.nn.RNN(M, N, rule=tp.BackProp())
    layer.rule = None
    assert layer.rule == tp.TargetProp()
    with pytest.raises(TypeError):
        layer.rule = "BackProp"


@pytest.mark.parametrize("name", ["bias", "batch_first", "bidirectional"])
def test_flags_are_bools(name):
    with pytest.raises(TypeError) as caught:
        tp.nn.RNN(M, N, **{name: "no"})
    assert str(caught.value) == f"nn.RNN: {name} must be a bool, got str"


@pytest.mark.parametrize("what", ["buffer", "module", "parameter", "tensor", "attribute", "forward", "state-dict-hook"])
def test_convert_leaves_what_would_be_lost(what):
    layer = nn.RNN(M, N)
    if what == "buffer":
        layer.register_buffer("seen", torch.zeros(1))
    elif what == "module":
        layer.norm = nn.LayerNorm(N)
    elif what == "parameter":
        layer.scale = nn.Parameter(torch.ones(1))
    elif what == "tensor":
        del layer.weight_hh_l0
        layer.weight_hh_l0 = torch.eye(N)
    elif what == "attribute":
        layer.note = "mine"
    elif what == "forward":
        layer.forward = lambda x: x
    else:
        layer.register_state_dict_post_hook(lambda *arguments: None)
    model = nn.ModuleDict({"rnn": layer})
    with pytest.warns(UserWarning, match=r"nn.convert: 'rnn' stays a torch.nn.RNN: it"):
        tp.nn.convert(model)
    assert model["rnn"] is layer


def test_feedback_is_a_buffer_of_its_own():
    """A fixed matrix in place of P: moved with the module, not trained, in no state_dict."""
    feedback = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(3))).Q
    torch.manual_seed(0)
    layer = tp.nn.RNN(M, N, feedback=feedback)
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]
    assert layer.double().feedback.dtype == torch.float64
    layer.float()
    layer(X)[1].sum().backward()
    weight = layer.weight_hh_l0.detach().requires_grad_()
    u = nn.functional.linear(X, layer.weight_ih_l0, layer.bias_ih_l0 + layer.bias_hh_l0).detach()
    tp.rnn(u, weight, feedback=feedback)[-1].sum().backward()
    assert_near(layer.weight_hh_l0.grad, extended(weight.grad), "grad_weight", condition=20)
    assert "feedback=..." in repr(layer)
    found = layer.weight_hh_l0.grad.clone()
    layer.feedback = None
    layer.zero_grad()
    layer(X)[1].sum().backward()
    assert not torch.allclose(layer.weight_hh_l0.grad, found)


def test_feedback_is_checked():
    text = re.escape("nn.RNN: feedback must have the shape of weight_hh_l0, (5, 5), got (3, 3)")
    with pytest.raises(ValueError, match=text):
        tp.nn.RNN(M, N, feedback=torch.eye(M))
    layer = tp.nn.RNN(M, N)
    layer.feedback = torch.eye(M)
    with pytest.raises(ValueError, match=text):
        layer(X)
    layer.feedback, layer.rule = torch.eye(N), tp.BackProp()
    with pytest.raises(ValueError, match="feedback must be None where the rule has no inverse to replace"):
        layer(X)


# --- an inverse that is not computed at every step


def moved(layer: tp.nn.RNN, share: float, seed: int) -> None:
    """The weight moves by that share of its Frobenius norm."""
    with torch.no_grad():
        direction = torch.randn(layer.weight_hh_l0.shape, generator=torch.Generator().manual_seed(seed))
        direction = direction.to(layer.weight_hh_l0)
        layer.weight_hh_l0 += share * layer.weight_hh_l0.norm() / direction.norm() * direction


def weight_gradient(layer: tp.nn.RNN, feedback: Tensor | None = None) -> Tensor:
    """Of the layer, or of one of the same parameters with a matrix in place of its inverse."""
    if feedback is not None:
        other = tp.nn.RNN(M, N, rule=layer.rule, feedback=feedback, backend=layer.backend, dtype=feedback.dtype)
        other.load_state_dict(layer.state_dict())
        layer = other
    x = torch.randn(T, B, M, generator=torch.Generator().manual_seed(0)).to(layer.weight_hh_l0)
    return torch.autograd.grad(layer(x)[1].sum(), layer.weight_hh_l0)[0]


def inverse_of(layer: tp.nn.RNN) -> Tensor:
    rule = layer.rule
    return tp.regularized_inverse(layer.weight_hh_l0.detach(), rule.reg, power=rule.power, backend=layer.backend)


@pytest.mark.parametrize("rule", [tp.TargetProp(), tp.TargetProp(inverse="layer", update="local")], ids=repr)
def test_refresh(rule, dtype, backend):
    """P of the first, fourth, seventh … weight."""
    layer = tp.nn.RNN(M, N, rule=rule, refresh=3, backend=backend, dtype=dtype)
    for step in range(8):
        if step % 3 == 0:
            p = inverse_of(layer)
        assert_identical(weight_gradient(layer), weight_gradient(layer, p), f"step {step}")
        moved(layer, 0.01, step)
        with torch.no_grad():  # no training pass
            layer(torch.ones(T, B, M, dtype=dtype))
    assert not torch.equal(p, inverse_of(layer))


def test_without_refresh_every_pass_is_exact(backend):
    layer = tp.nn.RNN(M, N, backend=backend)
    assert layer.refresh == 1
    for step in range(3):
        assert_identical(weight_gradient(layer), weight_gradient(layer, inverse_of(layer)), f"step {step}")
        moved(layer, 0.01, step)


def forget_by_moving(layer: tp.nn.RNN) -> None:
    moved(layer, 0.11, 1)


def forget_by_creeping(layer: tp.nn.RNN) -> None:
    for step in range(30):
        moved(layer, 0.05, step)


def forget_by_reset(layer: tp.nn.RNN) -> None:
    moved(layer, 0.01, 1)
    weight = layer.weight_hh_l0.detach().clone()
    layer.reset_parameters()
    with torch.no_grad():
        layer.weight_hh_l0.copy_(weight)


def forget_by_rule(layer: tp.nn.RNN) -> None:
    layer.rule = tp.TargetProp(reg=0.3)


def forget_by_dtype(layer: tp.nn.RNN) -> None:
    layer.double()


def forget_by_refresh(layer: tp.nn.RNN) -> None:
    moved(layer, 0.01, 1)
    layer.refresh = 5


@pytest.mark.parametrize(
    "change",
    [forget_by_moving, forget_by_creeping, forget_by_reset, forget_by_rule, forget_by_dtype, forget_by_refresh],
    ids=lambda change: change.__name__,
)
def test_an_inverse_that_does_not_fit_any_more_is_not_used(change, backend):
    layer = tp.nn.RNN(M, N, refresh=1000, backend=backend)
    before = inverse_of(layer)
    weight_gradient(layer)
    moved(layer, 0.01, 0)
    assert_identical(weight_gradient(layer), weight_gradient(layer, before), "with the P that is kept")
    change(layer)
    assert_identical(weight_gradient(layer), weight_gradient(layer, inverse_of(layer)), "grad_weight")


def test_only_the_cpu_looks_how_far_the_weight_has_moved():
    """To read a number of another device is to wait for it; of a meta tensor there is none to be read."""
    near, far = torch.ones(2, 2), torch.full((2, 2), 1.2)
    assert feedback._is_near(near, near)
    assert not feedback._is_near(far, near)
    assert feedback._is_near(far.to("meta"), near.to("meta"))


def test_each_pass_keeps_the_inverse_it_took(backend):
    layer = tp.nn.RNN(M, N, refresh=2, backend=backend)
    x = torch.randn(T, B, M)
    first = inverse_of(layer)
    losses = [layer(x)[1].sum()]
    layer.rule = tp.TargetProp(reg=0.3)  # so that the next pass takes another P before the first has gone back
    losses.append(layer(x)[1].sum())
    (grad,) = torch.autograd.grad(losses[0], layer.weight_ih_l0)
    other = tp.nn.RNN(M, N, feedback=first, backend=backend)
    other.load_state_dict(layer.state_dict())
    assert_identical(grad, torch.autograd.grad(other(x)[1].sum(), other.weight_ih_l0)[0], "grad_weight_ih")


def test_what_is_kept_is_no_state(backend):
    layer = tp.nn.RNN(M, N, refresh=3, backend=backend)
    weight_gradient(layer)
    assert list(layer.state_dict()) == list(nn.RNN(M, N).state_dict())
    assert len(list(layer.parameters())) == 4
    twin = copy.deepcopy(layer)
    moved(layer, 0.01, 0)
    moved(twin, 0.01, 0)
    assert_identical(weight_gradient(twin), weight_gradient(layer), "of the copy")
    layer.refresh = 1
    assert_identical(weight_gradient(layer), weight_gradient(layer, inverse_of(layer)), "exact again")


def test_refresh_is_of_no_use_to_back_propagation(backend):
    torch.manual_seed(0)
    layer = tp.nn.RNN(M, N, rule=tp.BackProp(), refresh=3, backend=backend)
    torch.manual_seed(0)
    plain = tp.nn.RNN(M, N, rule=tp.BackProp(), backend=backend)
    assert_identical(weight_gradient(layer), weight_gradient(plain), "grad_weight")


def test_refresh_compiles():
    layer = tp.nn.RNN(M, N, refresh=2)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(T, B, M)
    for step in range(4):
        if step % 2 == 0:
            p = inverse_of(layer)
        (grad,) = torch.autograd.grad(compiled(x)[1].sum(), layer.weight_hh_l0)
        other = tp.nn.RNN(M, N, feedback=p)
        other.load_state_dict(layer.state_dict())
        (expected,) = torch.autograd.grad(other(x)[1].sum(), other.weight_hh_l0)
        assert_near(grad, extended(expected), f"step {step}")
        moved(layer, 0.02, step)
