"""``tp_kernels.nn``: every recurrent layer as the drop-in that it is for its counterpart in ``torch.nn``, which is the
oracle of outputs and of back-propagation's gradients.

Tests are over the layers of ``_modules.py``; only what one layer alone has is tested by itself.
"""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import _oracle_recurrence as oracle
import numpy as np
import pytest
import torch
from _cases import DTYPES, RULES
from _compare import assert_budget, assert_identical, assert_near, assert_same_pattern
from _modules import LAYERS, LAYERS_AND_RULES, VARIANTS, B, Layer, M, N, T, count_evaluations, data, run
from _oracle import extended
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels._validate import ShapeError
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.recurrence import feedback, op
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import Sweep

over_layers = pytest.mark.parametrize("layer", LAYERS, ids=str)
over_variants = pytest.mark.parametrize("layer", VARIANTS, ids=str)
over_rules = pytest.mark.parametrize(("layer", "rule"), LAYERS_AND_RULES, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])


def gradients(module: Recurrent, x: Tensor, **arguments: Tensor) -> dict[str, Tensor]:
    """Of all parameters, from the last state."""
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(module(x, **arguments)[1].sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], condition: float = 1.0) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_near(value, extended(expected[name]), name, condition)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_identical(value, expected[name], name)


# --- outputs and gradients


@over_variants
@with_and_without_bias
@pytest.mark.parametrize("layout", ["TBM", "BTM", "TM", "TM-batch_first"])
@pytest.mark.parametrize("h0", [True, False], ids=["h0", "zero"])
def test_like_torch(layer, bias, layout, h0, dtype, backend):
    """Every layout, with and without biases: shapes, outputs and all gradients of back-propagation."""
    theirs, ours = layer.pair(backend=backend, dtype=dtype, bias=bias, batch_first=layout in ("BTM", "TM-batch_first"))
    x, hx, grad, grad_last = data(dtype, batch=(B,) if "B" in layout.partition("-")[0] else ())
    if layout == "BTM":
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    assert_alike(*(run(module, x, hx if h0 else None, grad, grad_last) for module in (ours, theirs)), condition=2)


def exact(
    layer: Layer, module: nn.RNNBase, states: Tensor, x: Tensor, h0: Tensor | None, grad: Tensor, grad_last: Tensor
) -> dict[str, tuple[np.ndarray, float]]:
    """The same by the oracle, gradients at the given states: slopes of activations are ill-conditioned in h. With each
    answer the size of the terms it sums up, which its rounding errors are relative to."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    w_ih, w_hh, b_ih, b_hh = (extended(getattr(module, name, None)) for name in names)
    inputs, start = extended(x), None if h0 is None else extended(h0[0])
    arrives = extended(grad)
    arrives[-1] += extended(grad_last)[0]
    flat, bias = inputs.reshape(-1, inputs.shape[-1]), None
    u = flat.dot(w_ih.T).reshape(*inputs.shape[:-1], len(w_ih))
    if b_ih is not None:  # the recurrent one: all of it, or what is not the cell's own
        outer = b_hh
        if layer.own_bias:
            outer, bias = np.split(b_hh, [-w_hh.shape[1]])
            outer = np.concatenate([outer, 0 * bias])
        u = u + b_ih + outer
    h = extended(states)
    given = {"h": h, "weight": w_hh, "u": u, "h0": start, "bias": bias}
    output = oracle.forward(layer.cell, u, w_hh, bias, start)
    back = oracle.backward(layer.cell, Sweep(), grad=arrives, **given)
    rows, into = back.grad_u.reshape(-1, len(w_ih)), back.into.reshape(-1, len(w_hh))
    before = oracle.states_before(h, start).reshape(len(rows), w_hh.shape[1])
    answers = {
        "output": (output, 1.0),
        "last": (output[-1:], 1.0),
        "grad_x": (rows.dot(w_ih).reshape(x.shape), abs(rows).dot(abs(w_ih))),
        "grad_h0": (back.grad_h0[None], abs(into[: x.shape[1]]).dot(abs(w_hh))),
        "grad_weight_ih_l0": (rows.T.dot(flat), abs(rows).T.dot(abs(flat))),
        "grad_weight_hh_l0": (back.grad_weight, abs(into).T.dot(abs(before))),
        "grad_bias_ih_l0": (rows.sum(axis=0), abs(rows).sum(axis=0)),
        "grad_bias_hh_l0": (into.sum(axis=0), abs(into).sum(axis=0)),
    }
    return {name: (answer, float(np.max(size, initial=0))) for name, (answer, size) in answers.items()}


@settings(deadline=None, derandomize=True, max_examples=80)
@given(data=st.data())
def test_swap_within_the_error_budget(data):
    """The layer of ``torch.nn`` is the plain code here: ours may err at most twice as much."""
    side, layer = st.integers(1, 40), data.draw(st.sampled_from(VARIANTS))
    m, n, t, b = data.draw(side), data.draw(side), data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    bias, with_h0 = data.draw(st.booleans()), data.draw(st.booleans())
    theirs = layer.make_theirs(m, n, dtype=dtype, bias=bias, seed=data.draw(st.integers(0, 99)))
    x, grad = torch.randn(t, b, m, dtype=dtype), torch.randn(t, b, n, dtype=dtype)
    start, grad_last = torch.randn(1, b, n, dtype=dtype) if with_h0 else None, torch.randn(1, b, n, dtype=dtype)
    expected = run(theirs, x, start, grad, grad_last)
    plain = exact(layer, theirs, expected["output"], x, start, grad, grad_last)
    for backend in ("reference", "cpu") if _native.cpu_available()[0] else ("reference",):
        ours = layer.make(m, n, dtype=dtype, bias=bias, rule=tp.BackProp(), backend=backend)
        ours.load_state_dict(theirs.state_dict())
        found = run(ours, x, start, grad, grad_last)
        answers = exact(layer, theirs, found["output"], x, start, grad, grad_last)
        for name, value in found.items():
            answer, scale = answers[name]
            assert_budget(value, expected[name], answer, name, scale=scale, reference_exact=plain[name][0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight_hh_l0", "h0"])
@over_variants
def test_not_finite_flows_as_in_torch(layer, where, value, dtype, backend):
    """The same elements of the outputs are not finite. Where there is one gate, the same elements of outputs and
    gradients are NaN, and the same are infinite; how far an infinite gate's zero slope reaches is torch's own."""
    theirs, ours = layer.pair(backend=backend, dtype=dtype)
    x, start, grad, grad_last = data(dtype)
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
    found, expected = (run(module, x, start, grad, grad_last) for module in (ours, theirs))
    for name in ("output", "last"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name
    for name in expected if layer.gates == 1 else ():
        assert_same_pattern(found[name], expected[name], name)
    assert not all(tensor.isfinite().all() for tensor in expected.values())


@over_layers
def test_gradcheck(layer, backend):
    """Both outputs, through input, first state and all parameters."""
    ours = layer.make(rule=tp.BackProp(), backend=backend, dtype=torch.float64)
    x, h0 = torch.randn(3, 2, M, dtype=torch.float64), torch.randn(1, 2, N, dtype=torch.float64)
    leaves = [x.requires_grad_(), h0.requires_grad_(), *ours.parameters()]
    assert torch.autograd.gradcheck(lambda x, h0, *parameters: ours(x, h0), leaves)


@over_rules
def test_the_module_is_the_op_after_a_projection(layer, rule, dtype, backend):
    ours = layer.make(rule=RULES[rule], backend=backend, dtype=dtype)
    x, h0, grad, _ = data(dtype)
    parameters = dict(ours.named_parameters())
    found, expected = (
        dict(zip(parameters, torch.autograd.grad(h, list(parameters.values()), grad), strict=True))
        for h in (ours(x, h0)[0], layer.by_op(ours, x, h0[0]))
    )
    assert_alike(found, expected, condition=2)


def test_identity_nonlinearity(backend):
    ours = tp.nn.RNN(M, N, nonlinearity="identity", backend=backend)
    x = torch.randn(2, B, M)
    output, _ = ours(x)
    bias = ours.bias_ih_l0 + ours.bias_hh_l0
    first = x[0] @ ours.weight_ih_l0.mT + bias
    assert_near(output[0], extended(first), "first state")
    assert_near(output[1], extended(x[1] @ ours.weight_ih_l0.mT + bias + first @ ours.weight_hh_l0.mT), "second state")


@over_layers
def test_empty_batch(layer, backend):
    theirs, ours = layer.pair(backend=backend)
    x = torch.randn(T, 0, M)
    output, last = ours(x)
    assert [value.shape for value in (output, last)] == [value.shape for value in theirs(x)]
    (output.sum() + last.sum()).backward()
    assert all(parameter.grad.eq(0).all() for parameter in ours.parameters())


@over_layers
def test_the_last_state_is_memory_of_its_own(layer, backend):
    """A caller may change it in place, as a detached state handed on, and the outputs stay."""
    output, last = layer.make(backend=backend)(torch.randn(T, B, M))
    before = output.detach().clone()
    last.detach().zero_()
    assert_identical(output.detach(), before, "output")
    output.sum().backward()


@pytest.mark.parametrize("every", [None, 3])
@over_layers
def test_an_output_changed_in_place_raises_in_backward(layer, every, backend):
    """It computes from the states; with checkpoints these are its own."""
    output, _ = layer.make(backend=backend, checkpoint_every=every)(torch.randn(T, B, M))
    output.add_(1)
    if every is None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        output.sum().backward()


@pytest.mark.parametrize("rule", [tp.TargetProp(), tp.TargetProp(inverse="jacobian")], ids=lambda rule: rule.inverse)
@over_layers
def test_target_propagation_trains(layer, rule, backend):
    """The sign is that of a gradient: a step against it lowers the loss."""
    ours, readout = layer.make(M, 16, rule=rule, backend=backend, seed=0), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*ours.parameters(), *readout.parameters()], lr=0.01)
    x = torch.randn(5, 32, M)
    losses = []
    for _ in range(60):
        loss = (readout(ours(x)[1][0]) - x[-3, :, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 3}], ids=str)
@over_layers
def test_compile(layer, options):
    """As one graph; and, with sizes that differ from call to call, as one graph for all of them."""
    torch._dynamo.reset()  # what it remembers of this code from other tests
    ours = layer.make(**options)
    given = data()
    assert_alike(run(torch.compile(ours, fullgraph=True), *given), run(ours, *given))
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=count)
    for length, batch in ((T, B), (9, 2), (6, 3)) if not options else ((T, B),):  # chunks are unrolled
        x, grad = torch.randn(length, batch, M), torch.randn(length, batch, N)
        states = torch.randn(2, 1, batch, N)
        assert_alike(run(compiled, x, states[0], grad, states[1]), run(ours, x, states[0], grad, states[1]))
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [*(layer.ours for layer in LAYERS), tp.nn.LearnedInverse])
def test_meta_tensors_get_shapes_and_dtypes(make):
    output, last = make(M, N, device="meta", dtype=torch.float64)(torch.ones(T, B, M, device="meta").double())
    assert (output.shape, last.shape, output.device.type) == ((T, B, N), (1, B, N), "meta")
    assert output.dtype == last.dtype == torch.float64
    output.sum().backward()


@over_layers
def test_without_gradients_nothing_is_kept(layer, backend, monkeypatch):
    kept = []
    forward = op._run_forward

    def spy(*arguments: object) -> tuple[Tensor, ...]:
        kept.append(arguments[14])
        return forward(*arguments)

    monkeypatch.setattr(op, "_run_forward", spy)
    ours, x = layer.make(backend=backend), torch.randn(T, B, M)
    with torch.no_grad():
        ours(x)
    ours.requires_grad_(False)(x)
    ours.requires_grad_(True)(x)
    assert kept == [False, False, True]


# --- parameters and states


@over_layers
@with_and_without_bias
def test_one_seed_gives_one_network(layer, bias, dtype):
    theirs, ours = layer.pair(bias=bias, dtype=dtype)
    for _ in range(2):
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
        torch.manual_seed(3)
        theirs.reset_parameters()
        torch.manual_seed(3)
        ours.reset_parameters()
    assert [len(weights) for weights in ours.all_weights] == [len(weights) for weights in theirs.all_weights]
    assert all(a is b for a, b in zip(ours.all_weights[0], ours.parameters(), strict=True))


@over_layers
@with_and_without_bias
def test_state_dict_both_ways(layer, bias):
    theirs, ours = layer.pair(bias=bias)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1)
        assert not torch.equal(source.weight_hh_l0, target.weight_hh_l0)
        target.load_state_dict(source.state_dict())
        assert_same_bits(target.state_dict(), source.state_dict())


def _through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2, "return_sequence": False}, {"refresh": 3}], ids=str)
@over_layers
def test_copies_pickles_and_files(layer, options):
    ours = layer.make(rule=tp.TargetProp.paper(reg=0.5), **options)
    x, hx, *_ = data()
    gradients(ours, x, hx=hx)  # what refresh keeps is copied, too
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _through_a_file):
        again = copied(ours)
        assert repr(again) == repr(ours)
        assert again.rule == ours.rule
        assert again.weight_hh_l0 is not ours.weight_hh_l0
        assert_same_bits(gradients(again, x, hx=hx), gradients(copy.deepcopy(ours), x, hx=hx))


@over_layers
def test_to_another_dtype(layer):
    ours = layer.make().to(torch.float64)
    x = torch.randn(T, B, M, dtype=torch.float64)
    output, last = ours(x)
    assert output.dtype == last.dtype == torch.float64
    with pytest.raises(TypeError) as caught:
        ours(x.float())
    expected = f"nn.{layer.name}: input must have the dtype of weight_ih_l0, float64, got float32"
    assert str(caught.value) == expected
    half = ours.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    half.sum().backward()
    assert half.dtype == ours.weight_hh_l0.grad.dtype == torch.bfloat16


@over_layers
def test_train_and_eval_are_the_same(layer):
    with pytest.warns(UserWarning, match="dropout"):
        ours = layer.make(dropout=0.5)
    x = torch.randn(T, B, M)
    training = ours.train()(x)[0]
    assert ours.training
    assert_identical(ours.eval()(x)[0].detach(), training.detach(), "output")
    assert not ours.training


@over_variants
def test_attributes_are_those_of_torch(layer):
    theirs, ours = layer.pair(batch_first=True, bias=False)
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    for name in (*names, *layer.options, "mode", "proj_size", "_flat_weights_names", "_all_weights"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.flatten_parameters() is None
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@over_layers
def test_is_one_of_torchs_recurrent_layers(layer):
    """``isinstance``, initialization by ``apply``, and the methods that others call or override."""
    theirs, ours = layer.pair()

    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.RNNBase):
            for weight in module._flat_weights:
                nn.init.constant_(weight, 0.25)

    nn.Sequential(theirs, ours).apply(fill)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    for module in (theirs, ours):
        assert module.get_expected_hidden_size(X, None) == (1, B, N)
        assert module.check_forward_args(X, H0, None) is None
        for x, hx in ((X[0], H0), (X[..., :2], H0), (X, H0[:, :2])):
            with pytest.raises(RuntimeError):
                module.check_forward_args(x, hx, None)
        order = torch.tensor([2, 0, 1, 3])
        assert torch.equal(module.permute_hidden(H0, order), H0[:, order])


@over_layers
def test_arguments_may_be_of_numpy(layer):
    ours = layer.make(np.int64(M), N, num_layers=np.int64(1), bidirectional=0, dropout=np.float32(0))
    assert repr(ours) == repr(layer.make())


@over_layers
def test_dropout_of_one_layer_is_warned_of(layer):
    for make in (layer.make, layer.make_theirs):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
            make(dropout=0.5)


@over_layers
def test_a_parametrized_layer_can_be_moved_and_copied(layer):
    ours = layer.make(N, N)
    nn.utils.parametrizations.orthogonal(ours, "weight_hh_l0")
    again = copy.deepcopy(ours.double())
    assert torch.equal(again.weight_hh_l0, ours.weight_hh_l0)


@pytest.mark.parametrize("name", ["M", "no-time", "h0-batch"])
@over_layers
def test_wrong_shapes_raise_what_torch_raises(layer, name):
    _, arguments, kind, _ = CALLS[name]
    for module in layer.pair():
        with pytest.raises(RuntimeError):
            module(*arguments)
    assert issubclass(kind, ValueError)


@over_layers
def test_repr(layer):
    assert repr(layer.make(2, 3, rule=tp.BackProp())) == f"{layer.name}(2, 3, rule={tp.BackProp()!r})"
    refreshed = repr(layer.make(2, 3, rule=tp.BackProp(), refresh=4))
    assert refreshed.startswith(f"{layer.name}(\n  2, 3, rule={tp.BackProp()!r}, refresh=4\n")
    other = layer.make(
        2,
        3,
        bias=False,
        batch_first=True,
        rule=tp.BackProp(),
        checkpoint_every=5,
        return_sequence=False,
        backend="reference",
    )
    assert repr(other) == (
        f"{layer.name}(2, 3, bias=False, batch_first=True, rule={tp.BackProp()!r}, checkpoint_every=5, "
        "return_sequence=False, backend='reference')"
    )


def test_repr_of_what_an_rnn_has():
    layer = tp.nn.RNN(2, 3, nonlinearity="relu", displacements="sweep", rule=tp.BackProp())
    assert repr(layer) == f"RNN(2, 3, nonlinearity='relu', rule={tp.BackProp()!r}, displacements='sweep')"


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"checkpoint_every": 3}, {"refresh": 2}, {"rule": tp.BackProp()}],
    ids=str,
)
@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
@over_layers
def test_a_parametrized_weight_is_evaluated_once_a_pass(layer, traced, options):
    """Spectral normalization, dropout of weights: another evaluation would be another weight."""
    ours = layer.make(**options)
    counters = count_evaluations(ours)
    x, hx, grad, grad_last = data()
    for passes in (1, 2):
        with tp.trace(ours) if traced else torch.enable_grad():
            torch.autograd.backward(ours(x, hx), (grad, grad_last))
        assert {name: counter.evaluations for name, counter in counters.items()} == dict.fromkeys(counters, passes)


@pytest.mark.parametrize("rule", [tp.TargetProp(), tp.BackProp()], ids=["tp", "bp"])
@over_layers
def test_a_parametrized_layer_has_the_gradients_of_a_plain_one(layer, rule, backend):
    ours = layer.make(N, N, rule=rule, backend=backend, dtype=torch.float64)
    nn.utils.parametrizations.orthogonal(ours, "weight_hh_l0")
    plain = layer.make(N, N, rule=rule, backend=backend, dtype=torch.float64)
    weight = ours.weight_hh_l0
    plain.load_state_dict({**plain.state_dict(), "weight_hh_l0": weight.detach()})
    x = torch.randn(T, B, N, dtype=torch.float64)
    ours(x)[1].sum().backward()
    (expected,) = torch.autograd.grad(
        weight, ours.parametrizations.weight_hh_l0.original, gradients(plain, x)["weight_hh_l0"]
    )
    assert_near(ours.parametrizations.weight_hh_l0.original.grad, extended(expected), "grad", condition=20)
    assert_identical(ours.bias_ih_l0.grad, gradients(plain, x)["bias_ih_l0"], "grad_bias")


# --- bad input

NOT_YET = "is not implemented yet"
CONSTRUCTOR = {
    "input_size": ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
    "hidden_size": ({"hidden_size": -2}, ValueError, "hidden_size must be at least 1, got -2"),
    "hidden_size-float": ({"hidden_size": 4.0}, TypeError, "hidden_size must be an int, got float"),
    "input_size-bool": ({"input_size": True}, TypeError, "input_size must be an int, got bool"),
    "num_layers-zero": ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    "num_layers-float": ({"num_layers": 2.0}, TypeError, "num_layers must be an int, got float"),
    "bidirectional-str": ({"bidirectional": "no"}, TypeError, "bidirectional must be a bool, got str"),
    "bias-str": ({"bias": "no"}, TypeError, "bias must be a bool, got str"),
    "batch_first-str": ({"batch_first": "no"}, TypeError, "batch_first must be a bool, got str"),
    "dropout": ({"dropout": 1.5}, ValueError, "dropout must be a number in [0, 1], got 1.5"),
    "dropout-bool": ({"dropout": True}, ValueError, "dropout must be a number in [0, 1], got True"),
    "checkpoint_every": ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
    "checkpoint_every-float": (
        {"checkpoint_every": 2.0},
        TypeError,
        "checkpoint_every must be an int or None, got float",
    ),
    "return_sequence": ({"return_sequence": None}, TypeError, "return_sequence must be a bool, got NoneType"),
    "refresh": ({"refresh": 0}, ValueError, "refresh must be at least 1, got 0"),
    "refresh-bool": ({"refresh": True}, TypeError, "refresh must be an int, got bool"),
    "rule": ({"rule": 1}, TypeError, "rule must be a TargetProp, a BackProp or None, got int"),
    "feedback": ({"feedback": 1}, TypeError, "feedback must be a torch.Tensor, got int"),
    "backend": (
        {"backend": "mkl"},
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'mkl'",
    ),
}
# What only one layer can be told.
OWN = {
    "RNN-nonlinearity": (
        {"nonlinearity": "sin"},
        ValueError,
        "nonlinearity must be one of 'tanh', 'relu', 'identity', got 'sin'",
    ),
    "RNN-displacements": (
        {"displacements": "all"},
        ValueError,
        "displacements must be one of 'auto', 'sweep', 'parallel', got 'all'",
    ),
    "GRU-mode": (
        {"rule": tp.TargetProp(inverse="layer", mode="difference")},
        ValueError,
        "rule must have mode='linearized', got mode='difference'",
    ),
    "GRU-clip": (
        {"rule": tp.TargetProp(inverse="layer", clip=0.6)},
        ValueError,
        "rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got 0.6",
    ),
}


def assert_refused(make: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert type(caught.value) is kind
    assert str(caught.value) == text


@pytest.mark.parametrize("name", CONSTRUCTOR)
@over_layers
def test_bad_constructor(layer, name):
    changes, kind, text = CONSTRUCTOR[name]
    arguments = {"input_size": M, "hidden_size": N} | changes
    assert_refused(lambda: layer.ours(**arguments), kind, f"nn.{layer.name}: {text}")


@pytest.mark.parametrize("name", OWN)
def test_bad_constructor_of_one_layer(name):
    (changes, kind, text), layer = OWN[name], name.partition("-")[0]
    assert_refused(lambda: getattr(tp.nn, layer)(M, N, **changes), kind, f"nn.{layer}: {text}")


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
    "M": ({}, (X[..., :2],), ShapeError, "input must have shape [T, B, M] with M = 3, got (7, 4, 2)"),
    "M-unbatched": ({}, (X[:, 0, :2],), ShapeError, "input must have shape [T, M] with M = 3, got (7, 2)"),
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
    "no-time": ({}, (X[:0],), ShapeError, "input must have at least one time step (T >= 1), got (0, 4, 3)"),
    "h0-dim": ({}, (X, H0[0]), ShapeError, "hx must have shape [1, B, N] = [1, 4, 5], got (4, 5)"),
    "h0-batch": ({}, (X, H0[:, :2]), ShapeError, "hx must have shape [1, B, N] = [1, 4, 5], got (1, 2, 5)"),
    "h0-batch_first": (
        {"batch_first": True},
        (X, H0),
        ShapeError,
        "hx must have shape [1, B, N] = [1, 7, 5], got (1, 4, 5)",
    ),
    "h0-unbatched": ({}, (X[:, 0], H0), ShapeError, "hx must have shape [1, N] = [1, 5], got (1, 4, 5)"),
    "h0-number": ({}, (X, 0), TypeError, "hx must be a torch.Tensor, got int"),
    "h0-dtype": ({}, (X, H0.double()), TypeError, "hx must have the dtype of input, float32, got float64"),
}


@pytest.mark.parametrize("name", CALLS)
@over_layers
def test_bad_call(layer, name):
    options, arguments, kind, text = CALLS[name]
    ours = layer.make(**options)
    assert_refused(lambda: ours(*arguments), kind, f"nn.{layer.name}: {text}")


@pytest.mark.parametrize("name", ["list", "int", "h0-number"])
@over_layers
def test_bad_call_under_autocast(layer, name):
    """What is not of floating point is refused there as well, not cast."""
    options, arguments, kind, text = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert_refused(lambda: layer.make(**options)(*arguments), kind, f"nn.{layer.name}: {text}")


OUTSIDE = {
    "dtype": ("weight_hh_l0", lambda rows: torch.zeros(rows, N).double(), TypeError, "dtype"),
    "rows": ("weight_hh_l0", lambda rows: torch.zeros(rows - 1, N), ValueError, "shape"),
    "columns": ("weight_ih_l0", lambda rows: torch.zeros(rows, M + 1), ValueError, "shape"),
    "bias": ("bias_hh_l0", lambda rows: torch.zeros(1), ValueError, "shape"),
}


@pytest.mark.parametrize("name", OUTSIDE)
@over_layers
def test_parameters_put_in_from_outside_are_checked(layer, name):
    parameter, value, kind, what = OUTSIDE[name]
    ours = layer.make()
    shape = tuple(getattr(ours, parameter).shape)
    value = value(shape[0])
    text = f"have shape {shape}, got {tuple(value.shape)}"
    if what == "dtype":
        text = "have the dtype of weight_ih_l0, float32, got float64"
    setattr(ours, parameter, nn.Parameter(value))
    assert_refused(lambda: ours(X), kind, f"nn.{layer.name}: {parameter} must {text}")


@over_layers
def test_rule_is_checked_when_assigned(layer):
    ours = layer.make(rule=tp.BackProp())
    ours.rule = None
    assert ours.rule == tp.TargetProp()
    text = f"nn.{layer.name}: rule must be a TargetProp, a BackProp or None, got str"
    assert_refused(lambda: setattr(ours, "rule", "BackProp"), TypeError, text)


def _tangent(layer: Recurrent) -> None:
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(X, X))


def _loss(layer: Recurrent) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: torch.func.functional_call(layer, parameters, (X,))[0].sum()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (_tangent, "implement the jvp function"),
        (lambda layer: torch.func.jvp(layer, (X,), (X,)), "implement the jvp function"),
        (torch.jit.script, "Compiled functions can't take|expected str instance"),
    ],
    ids=["forward mode", "jvp", "script"],
)
@over_layers
def test_what_only_torch_has_raises(layer, call, text):
    """Nothing computes on without its derivatives."""
    with pytest.raises(Exception, match=text):
        call(layer.make())


@over_layers
def test_second_derivatives_are_refused(layer):
    ours = layer.make()
    output = ours(X)[0].sum()
    (grad,) = torch.autograd.grad(output, ours.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(output + grad.sum(), ours.weight_hh_l0)


@over_layers
def test_functional_call(layer):
    ours = layer.make()
    parameters = {name: 2 * parameter.detach() for name, parameter in ours.named_parameters()}
    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    _loss(ours)(leaves).backward()
    assert all(parameter.grad is None for parameter in ours.parameters())
    ours.load_state_dict(parameters)
    ours(X)[0].sum().backward()
    for name, parameter in ours.named_parameters():
        assert_identical(leaves[name].grad, parameter.grad, name)


# --- portions of time: checkpoints and chunks


@pytest.mark.parametrize(("every", "batch_first"), [(1, False), (3, True), (3, False), (50, False)])
@over_rules
def test_checkpoints(layer, rule, every, batch_first, backend):
    """The same states, and gradients that differ by the order of sums only."""
    options = {"rule": RULES[rule], "batch_first": batch_first, "backend": backend, "dtype": torch.float64}
    given = data(torch.float64, batch_first=batch_first)
    plain = run(layer.make(**options), *given)
    found = run(layer.make(checkpoint_every=every, **options), *given)
    assert_alike(found, plain, condition=20)
    for name in ("output", "last") if backend == "cpu" else ():
        assert_identical(found[name], plain[name], name)


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


@pytest.mark.parametrize("every", [None, 3])
@over_layers
def test_without_a_sequence(layer, every, backend):
    """``return_sequence=False``: no output of T states, the same last state and gradients."""
    plain = layer.make(backend=backend, checkpoint_every=every)
    ours = layer.make(backend=backend, checkpoint_every=every, return_sequence=False)
    output, last = ours(X)
    assert output is None
    assert_identical(last.detach(), plain(X)[1].detach(), "last state")
    assert_same_bits(gradients(ours, X), gradients(plain, X))


LEAVES = ("x", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@pytest.mark.parametrize(
    "needed",
    [LEAVES, *((leaf,) for leaf in LEAVES), ("x", "bias_hh_l0"), ("weight_ih_l0", "hx")],
    ids=lambda needed: "all" if needed == LEAVES else "+".join(needed),
)
@pytest.mark.parametrize("every", [None, 3])
@over_layers
def test_some_gradients_only(layer, needed, every, backend):
    """What is not asked for stays away, and leaves the others as ``torch.nn`` has them."""
    results = []
    theirs, ours = layer.pair(backend=backend, dtype=torch.float64)
    ours.checkpoint_every = every
    for module in (ours, theirs):
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


@pytest.mark.parametrize("sources", ["states", "last", "both"])
@over_rules
def test_chunks_are_one_sequence(layer, rule, sources, dtype, backend, monkeypatch):
    """Projected and swept chunk by chunk, or all at once: the same states, δ and h_0 gradient, and the same sums."""
    results = []
    for steps in (T, 3):
        monkeypatch.setattr(op, "_portion", lambda *sizes, steps=steps: steps)
        ours = layer.make(rule=RULES[rule], backend=backend, dtype=dtype)
        x, hx, grad, grad_last = data(dtype)
        leaves = [x.requires_grad_(), hx.requires_grad_(), *ours.parameters()]
        output, last = ours(x, hx)
        given = {"states": [(output, grad)], "last": [(last, grad_last)], "both": [(output, grad), (last, grad_last)]}
        outputs, arriving = zip(*given[sources], strict=True)
        found = torch.autograd.grad(outputs, leaves, arriving)
        results.append((output, last, *found))
    for found, expected in zip(*results, strict=True):
        assert_near(found, extended(expected), "chunks", condition=20)
        assert found.abs().max() > 0


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_portions_cover_the_sequence(reverse):
    """In reading order; a GPU takes the whole of it."""
    for device in ("cpu", "cuda"):
        for sizes in ((1, 1, 1), (784, 16, 100), (3072, 512, 64), (5, 0, 7), (100, 4000, 2)):
            time = Timeline(sizes[0], reverse=reverse)
            portions = time.portions(op._portion(torch.device(device), *sizes))
            steps = [range(portion.start, portion.stop) for portion in portions]
            read = [t for part in steps for t in (reversed(part) if reverse else part)]
            assert read == list(time.order())
            assert len(portions) == 1 or device == "cpu"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@over_layers
def test_under_autocast_a_layer_computes_in_the_parameters_dtype(layer, half, backend):
    """Also after a layer that autocast runs in half precision, and wherever backward is called. What it puts out is
    rounded to the dtype of torch's output.
    """
    ours = layer.make(N, N, backend=backend)
    before = nn.Linear(M, N)
    with torch.autocast("cpu", half):
        features = before(X)
        output, last = ours(features, H0)
        inside = torch.autograd.grad(last.sum(), list(ours.parameters()), retain_graph=True)
    outside = torch.autograd.grad(last.sum(), list(ours.parameters()))
    assert features.dtype == half
    expected = gradients(ours, features.detach().float(), hx=H0)
    states, last_state = ours(features.float(), H0)
    assert_identical(output.detach(), states.detach().to(output.dtype), "output")
    assert_identical(last.detach(), last_state.detach(), "last state")
    for found in (inside, outside):
        assert_same_bits(dict(zip(expected, found, strict=True)), expected)


# --- a fixed matrix in place of P


def inverse_of(layer: Recurrent) -> Tensor:
    """P of the blocks that the rule inverts: the last one for "weight", all of them for "layer"."""
    rule, blocks = layer.rule, layer.weight_hh_l0.detach().unflatten(0, (-1, layer.hidden_size))
    inverted = blocks[-1] if rule.inverse == "weight" or len(blocks) == 1 else blocks
    return tp.regularized_inverse(inverted, rule.reg, power=rule.power, backend=layer.backend)


USING_P = ("weight-total", "weight-local", "layer-total")


@pytest.mark.parametrize("rule", USING_P)
@over_layers
def test_feedback_is_a_buffer_of_its_own(layer, rule):
    """A fixed matrix in place of P: moved with the module, not trained, in no state_dict."""
    feedback = torch.randn(inverse_of(layer.make(rule=RULES[rule])).shape, generator=torch.Generator().manual_seed(3))
    ours = layer.make(rule=RULES[rule], feedback=feedback)
    assert list(ours.state_dict()) == [name for name, _ in ours.named_parameters()]
    assert ours.double().feedback.dtype == torch.float64
    ours.float()
    found = gradients(ours, X)
    h = layer.by_op(ours, X, feedback=feedback)
    expected = torch.autograd.grad(h[-1].sum(), list(ours.parameters()))
    assert_alike(found, dict(zip(found, expected, strict=True)), condition=20)
    assert "feedback=..." in repr(ours)
    ours.feedback = inverse_of(ours)
    of_p = gradients(ours, X)
    ours.feedback = None
    assert_same_bits(gradients(ours, X), of_p)
    assert not torch.allclose(of_p["weight_hh_l0"], found["weight_hh_l0"])


@over_layers
def test_feedback_is_checked(layer):
    what = "weight_hh_l0" if layer.gates == 1 else "the blocks of weight_hh_l0 it replaces P of"
    text = f"nn.{layer.name}: feedback must have the shape of {what}, (5, 5), got (3, 3)"
    assert_refused(lambda: layer.make(feedback=torch.eye(M)), ValueError, text)
    ours = layer.make()
    ours.feedback = torch.eye(M)
    assert_refused(lambda: ours(X), ValueError, text)
    ours.feedback, ours.rule = torch.eye(N), tp.BackProp()
    with pytest.raises(ValueError, match="feedback must be None where the rule has no inverse to replace"):
        ours(X)


# --- an inverse that is not computed at every step


def moved(layer: Recurrent, share: float, seed: int) -> None:
    """The weight moves by that share of its Frobenius norm."""
    with torch.no_grad():
        direction = torch.randn(layer.weight_hh_l0.shape, generator=torch.Generator().manual_seed(seed))
        direction = direction.to(layer.weight_hh_l0)
        layer.weight_hh_l0 += share * layer.weight_hh_l0.norm() / direction.norm() * direction


def weight_gradient(layer: Recurrent, feedback: Tensor | None = None) -> Tensor:
    """Of the layer, or of one of the same parameters with a matrix in place of its inverse."""
    if feedback is not None:
        other = type(layer)(M, N, rule=layer.rule, feedback=feedback, backend=layer.backend, dtype=feedback.dtype)
        other.load_state_dict(layer.state_dict())
        layer = other
    return gradients(layer, data(layer.weight_hh_l0.dtype)[0])["weight_hh_l0"]


@pytest.mark.parametrize("rule", ["weight-total", "layer-local"])
@over_layers
def test_refresh(layer, rule, dtype, backend):
    """P of the first, fourth, seventh … weight."""
    ours = layer.make(rule=RULES[rule], refresh=3, backend=backend, dtype=dtype)
    for step in range(8):
        if step % 3 == 0:
            p = inverse_of(ours)
        assert_identical(weight_gradient(ours), weight_gradient(ours, p), f"step {step}")
        moved(ours, 0.01, step)
        with torch.no_grad():  # no training pass
            ours(torch.ones(T, B, M, dtype=dtype))
    assert not torch.equal(p, inverse_of(ours))


@over_layers
def test_without_refresh_every_pass_is_exact(layer, backend):
    ours = layer.make(backend=backend)
    assert ours.refresh == 1
    for step in range(3):
        assert_identical(weight_gradient(ours), weight_gradient(ours, inverse_of(ours)), f"step {step}")
        moved(ours, 0.01, step)


def forget_by_moving(layer: Recurrent) -> None:
    moved(layer, 0.2, 1)


def forget_by_creeping(layer: Recurrent) -> None:
    for step in range(30):
        moved(layer, 0.05, step)


def forget_by_reset(layer: Recurrent) -> None:
    moved(layer, 0.01, 1)
    weight = layer.weight_hh_l0.detach().clone()
    layer.reset_parameters()
    with torch.no_grad():
        layer.weight_hh_l0.copy_(weight)


def forget_by_rule(layer: Recurrent) -> None:
    layer.rule = tp.TargetProp(reg=0.3)


def forget_by_another_inverse(layer: Recurrent) -> None:
    """Which may be one of other blocks."""
    layer.rule = tp.TargetProp(inverse="layer")


def forget_by_dtype(layer: Recurrent) -> None:
    layer.double()


def forget_by_refresh(layer: Recurrent) -> None:
    moved(layer, 0.01, 1)
    layer.refresh = 5


@pytest.mark.parametrize(
    "change",
    [
        forget_by_moving,
        forget_by_creeping,
        forget_by_reset,
        forget_by_rule,
        forget_by_another_inverse,
        forget_by_dtype,
        forget_by_refresh,
    ],
    ids=lambda change: change.__name__,
)
@over_layers
def test_an_inverse_that_does_not_fit_any_more_is_not_used(layer, change, backend):
    ours = layer.make(refresh=1000, backend=backend)
    before = inverse_of(ours)
    weight_gradient(ours)
    moved(ours, 0.01, 0)
    assert_identical(weight_gradient(ours), weight_gradient(ours, before), "with the P that is kept")
    change(ours)
    assert_identical(weight_gradient(ours), weight_gradient(ours, inverse_of(ours)), "grad_weight")


def test_only_the_cpu_looks_how_far_the_weight_has_moved():
    """To read a number of another device is to wait for it; of a meta tensor there is none to be read."""
    near, far = torch.ones(2, 2), torch.full((2, 2), 1.2)
    assert feedback._is_near(near, near)
    assert not feedback._is_near(far, near)
    assert feedback._is_near(far.to("meta"), near.to("meta"))


@over_layers
def test_each_pass_keeps_the_inverse_it_took(layer, backend):
    ours = layer.make(refresh=2, backend=backend)
    x = torch.randn(T, B, M)
    first = inverse_of(ours)
    last = ours(x)[1].sum()
    ours.rule = tp.TargetProp(reg=0.3)  # so that the next pass takes another P before the first has gone back
    ours(x)
    (grad,) = torch.autograd.grad(last, ours.weight_ih_l0)
    other = layer.make(feedback=first, backend=backend)
    other.load_state_dict(ours.state_dict())
    assert_identical(grad, gradients(other, x)["weight_ih_l0"], "grad_weight_ih")


@over_layers
def test_what_is_kept_is_no_state(layer, backend):
    ours = layer.make(refresh=3, backend=backend)
    weight_gradient(ours)
    assert list(ours.state_dict()) == list(layer.make_theirs().state_dict())
    assert len(list(ours.parameters())) == 4
    twin = copy.deepcopy(ours)
    moved(ours, 0.01, 0)
    moved(twin, 0.01, 0)
    assert_identical(weight_gradient(twin), weight_gradient(ours), "of the copy")
    ours.refresh = 1
    assert_identical(weight_gradient(ours), weight_gradient(ours, inverse_of(ours)), "exact again")


@over_layers
def test_refresh_is_of_no_use_to_back_propagation(layer, backend):
    refreshed, plain = (layer.make(rule=tp.BackProp(), backend=backend, **kept) for kept in ({"refresh": 3}, {}))
    assert_identical(weight_gradient(refreshed), weight_gradient(plain), "grad_weight")


@over_layers
def test_refresh_compiles(layer):
    torch._dynamo.reset()
    ours = layer.make(refresh=2)
    compiled = torch.compile(ours, fullgraph=True)
    x = data()[0]
    for step in range(4):
        if step % 2 == 0:
            p = inverse_of(ours)
        (grad,) = torch.autograd.grad(compiled(x)[1].sum(), ours.weight_hh_l0)
        assert_near(grad, extended(weight_gradient(ours, p)), f"step {step}")
        moved(ours, 0.02, step)


# --- what public bug reports of other libraries led to


@pytest.mark.parametrize("batch_first", [False, True], ids=["TBM", "BTM"])
@over_layers
def test_outputs_are_no_views(layer, batch_first, backend):
    """So both can be detached in place, as torch's can."""
    ours = layer.make(batch_first=batch_first, backend=backend)
    output, last = ours(data()[0])
    assert not output._is_view()
    assert not last._is_view()
    assert not output.detach_().requires_grad
    assert not last.detach_().requires_grad


@pytest.mark.parametrize("checkpoint_every", [None, 3], ids=["all states", "checkpoints"])
@over_layers
def test_two_graphs_serve_every_shape(layer, checkpoint_every):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer.make(checkpoint_every=checkpoint_every), fullgraph=True, backend=counter)
    for time, batch in ((7, 2), (9, 3), (12, 4), (30, 5), (4, 2), (2, 2)):
        compiled(torch.randn(time, batch, M))[0].sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [False, True])
@over_layers
def test_a_pass_that_is_run_twice_counts_once(layer, use_reentrant, backend):
    """Of ``torch.utils.checkpoint``, which runs forward again in backward."""
    ours = layer.make(refresh=10, backend=backend)
    for age in (1, 2, 3):
        x = data()[0].requires_grad_()
        checkpoint(lambda x: ours(x)[1], x, use_reentrant=use_reentrant).sum().backward()
        assert ours.refreshed[0].age == age


@over_layers
def test_an_inverse_goes_with_its_layer(layer, cpu):
    feedback.forget_feedback()
    ours = layer.make(backend="cpu")
    ours(data()[0])[1].sum().backward()
    assert len(feedback._kept) == 1
    del ours
    gc.collect()
    assert not feedback._kept


@over_layers
def test_layers_on_many_threads(layer, backend):
    """What is kept of their weights is shared; each finds its own gradients."""
    x, many = data()[0], [layer.make(seed=seed, backend=backend) for seed in range(8)]

    def gradient(ours: Recurrent) -> Tensor:
        for _ in range(10):
            feedback.forget_feedback()
            (found,) = torch.autograd.grad(ours(x)[1].sum(), ours.weight_hh_l0)
        return found

    expected = [gradient(ours) for ours in many]
    with ThreadPoolExecutor(8) as pool:
        for found, alone in zip(pool.map(gradient, many), expected, strict=True):
            assert_near(found, extended(alone), "grad_weight_hh")


@pytest.mark.parametrize("rule", ["bp", "weight-total", "layer-local"])
@over_layers
def test_batched_gradients(layer, rule, backend):
    """``is_grads_batched`` and ``jacobian(vectorize=True)`` give what one row after the other gives."""
    ours = layer.make(rule=RULES[rule], backend=backend, dtype=torch.float64)
    x = data(torch.float64)[0]
    batched, one_by_one = (
        torch.autograd.functional.jacobian(lambda x: ours(x)[1], x, vectorize=vectorize) for vectorize in (True, False)
    )
    torch.testing.assert_close(batched, one_by_one, rtol=1e-12, atol=1e-12)


@over_layers
def test_only_what_is_trained_gets_a_gradient(layer, backend):
    """Each set of frozen parameters: the gradients of the others are those of a layer that is trained as a whole."""
    whole, x = layer.make(backend=backend), data()[0]
    expected = gradients(whole, x)
    for mask in range(15):
        ours = layer.make(backend=backend)
        for i, parameter in enumerate(ours.parameters()):
            parameter.requires_grad_(not mask >> i & 1)
        ours(x)[1].sum().backward()
        for name, parameter in ours.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.requires_grad:
                assert_near(parameter.grad, extended(expected[name]), name)


@over_layers
def test_no_gradient_at_all(layer, backend):
    """From a function behind the layer that gives none."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, tensor: Tensor) -> Tensor:
            return tensor.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    ours = layer.make(backend=backend)
    Nothing.apply(ours(data()[0])[1]).backward()
    assert all(parameter.grad is None for parameter in ours.parameters())


@over_layers
def test_loading_forgets_the_inverse(layer, backend):
    ours = layer.make(refresh=10, backend=backend)
    weight_gradient(ours)
    assert ours.refreshed[0].age == 1
    ours.load_state_dict(ours.state_dict())
    assert ours.refreshed[0].age == 0
