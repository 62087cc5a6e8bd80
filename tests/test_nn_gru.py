"""``nn.GRU``, a drop-in for ``torch.nn.GRU``, which is the oracle of outputs and gradients, and ``nn.convert`` with it.

What it shares with ``nn.RNN`` is tested there.
"""

import copy
import pickle
import warnings

import pytest
import torch
from _cases import GRU_RULES
from _compare import assert_identical, assert_near
from _modules import run
from _oracle import extended
from torch import Tensor, nn
from torch.nn import functional

import tp_kernels as tp

M, N, T, B = 3, 5, 7, 4


def pair(rule: object = None, backend: str = "auto", dtype: torch.dtype = torch.float32, **options: object) -> tuple:
    """A ``torch.nn.GRU`` and ours, from one seed."""
    modules = []
    for make, extra in ((nn.GRU, {}), (tp.nn.GRU, {"rule": rule or tp.BackProp(), "backend": backend})):
        torch.manual_seed(1)
        modules.append(make(M, N, dtype=dtype, **options, **extra))
    return tuple(modules)


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], condition: float = 2.0) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        value, wanted = (tensor if tensor.dim() > 1 else tensor[None] for tensor in (value, expected[name]))
        assert_near(value, extended(wanted), name, condition)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("layout", ["TBM", "BTM", "TM", "TM-batch_first"])
@pytest.mark.parametrize("h0", [True, False], ids=["h0", "zero"])
def test_like_torch(bias, layout, h0, dtype, backend):
    """Every layout, with and without biases: shapes, outputs and all gradients of back-propagation."""
    theirs, ours = pair(None, backend, dtype, bias=bias, batch_first=layout in ("BTM", "TM-batch_first"))
    shape = {"TBM": (T, B), "BTM": (B, T)}.get(layout, (T,))
    x, grad = torch.randn(*shape, M, dtype=dtype), torch.randn(*shape, N, dtype=dtype)
    state = (1, B, N) if len(shape) == 2 else (1, N)
    start, grad_last = torch.randn(state, dtype=dtype) if h0 else None, torch.randn(state, dtype=dtype)
    assert_alike(*(run(module, x, start, grad, grad_last) for module in (ours, theirs)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "h0"])
def test_not_finite_flows_as_in_torch(where, value, backend):
    theirs, ours = pair(None, backend)
    x, h0 = torch.randn(T, B, M), torch.randn(1, B, N)
    (x[2] if where == "input" else h0[0])[1, 2] = value
    found, expected = (module(x, h0)[0].detach() for module in (ours, theirs))
    assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("rule", GRU_RULES)
def test_the_module_is_the_op_after_a_projection(rule, dtype, backend):
    layer = pair(GRU_RULES[rule], backend, dtype)[1]
    x, h0, grad = (torch.randn(*shape, dtype=dtype) for shape in ((T, B, M), (1, B, N), (T, B, N)))
    found = torch.autograd.grad(layer(x, h0)[0], list(layer.parameters()), grad)
    outer, inner = layer.bias_hh_l0[: 2 * N], layer.bias_hh_l0[2 * N :]
    u = functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 + functional.pad(outer, (0, N)))
    h = tp.gru(u, layer.weight_hh_l0, h0[0], bias=inner, rule=layer.rule, backend=backend)
    for name, *pair_ in zip(
        dict(layer.named_parameters()), found, torch.autograd.grad(h, list(layer.parameters()), grad), strict=True
    ):
        assert_identical(*pair_, name)


def test_gradcheck(backend):
    layer = tp.nn.GRU(2, 3, rule=tp.BackProp(), backend=backend, dtype=torch.float64)
    x, h0 = torch.randn(4, 2, 2).double().requires_grad_(), torch.randn(1, 2, 3).double().requires_grad_()
    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def function(x: Tensor, h0: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, named, (x, h0))

    assert torch.autograd.gradcheck(function, (x, h0, *parameters))


def test_empty_batch(backend):
    layer = tp.nn.GRU(M, N, backend=backend)
    output, last = layer(torch.ones(T, 0, M))
    (output.sum() + last.sum()).backward()
    assert (output.shape, last.shape) == ((T, 0, N), (1, 0, N))
    assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("rule", [tp.TargetProp(), tp.TargetProp(inverse="jacobian")], ids=repr)
def test_target_propagation_trains(rule, backend):
    """The sign is that of a gradient: a step against it lowers the loss."""
    torch.manual_seed(0)
    layer, readout = tp.nn.GRU(M, 16, rule=rule, backend=backend), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.01)
    x = torch.randn(5, 32, M)
    losses = []
    for _ in range(60):
        loss = (readout(layer(x)[1][0]) - x[-3, :, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compile():
    ours = pair(tp.TargetProp())[1]
    compiled = torch.compile(ours, fullgraph=True)
    x, h0 = torch.randn(T, B, M), torch.randn(1, B, N)
    given = x, h0, torch.randn(T, B, N), torch.randn(1, B, N)
    assert_alike(
        {name.replace("_orig_mod.", ""): value for name, value in run(compiled, *given).items()}, run(ours, *given)
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_keeps_to_the_parameters_dtype(half, backend):
    """In the recurrence's backward pass as well, wherever that is called; the projection's is torch's."""
    layer, x, h0 = tp.nn.GRU(M, N, backend=backend), torch.randn(T, B, M), torch.randn(1, B, N)
    recurrent = {name: value for name, value in layer.named_parameters() if name != "weight_ih_l0"}
    with torch.autocast("cpu", half):
        output, last = layer(x.to(half), h0)
        found = torch.autograd.grad(last.sum(), list(recurrent.values()))
    assert output.dtype == torch.float32
    expected = layer(x.to(half).float(), h0)[1]
    assert_identical(last.detach(), expected.detach(), "last state")
    for name, *pair_ in zip(
        recurrent, found, torch.autograd.grad(expected.sum(), list(recurrent.values())), strict=True
    ):
        assert_identical(*pair_, name)


@pytest.mark.parametrize("make", [tp.nn.GRU, tp.nn.RNN, tp.nn.LearnedInverse])
def test_meta_tensors_get_shapes_and_dtypes(make):
    output, last = make(M, N, device="meta")(torch.ones(T, B, M, device="meta"))
    assert (output.shape, last.shape, output.device.type) == ((T, B, N), (1, B, N), "meta")


def test_without_gradients_no_gates_are_kept(backend, monkeypatch):
    kept = []
    forward = torch.ops.tp_kernels.gru_fwd
    monkeypatch.setattr(torch.ops.tp_kernels, "gru_fwd", lambda *given: kept.append(given[4]) or forward(*given))
    layer, x = tp.nn.GRU(M, N, backend=backend), torch.randn(T, B, M)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)(x)
    layer.requires_grad_(True)(x)
    assert kept == [False, False, True]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_one_seed_gives_one_network(bias, dtype):
    theirs, ours = pair(bias=bias, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert_identical(getattr(ours, name).detach(), parameter.detach(), name)
    ours.load_state_dict({name: value + 1 for name, value in theirs.state_dict().items()})
    theirs.load_state_dict(ours.state_dict())
    for name, parameter in theirs.named_parameters():
        assert_identical(getattr(ours, name).detach(), parameter.detach(), name)


def test_copies_pickles_and_repr():
    layer = tp.nn.GRU(M, N, bias=False, batch_first=True, rule=tp.BackProp(), backend="reference")
    x = torch.randn(B, T, M)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == "GRU(3, 5, bias=False, batch_first=True, rule=BackProp(), backend='reference')"
        assert_identical(again(x)[0].detach(), layer(x)[0].detach(), "output")


BAD = {
    "hidden_size": ({"hidden_size": 0}, ValueError, "nn.GRU: hidden_size must be at least 1, got 0"),
    "layers": ({"num_layers": 2}, NotImplementedError, "nn.GRU: num_layers=2 is not implemented yet"),
    "directions": ({"bidirectional": True}, NotImplementedError, "nn.GRU: bidirectional=True is not implemented yet"),
    "rule": ({"rule": 1}, TypeError, "nn.GRU: rule must be a TargetProp, a BackProp or None, got int"),
    "mode": (
        {"rule": tp.TargetProp(inverse="layer", mode="difference")},
        ValueError,
        "nn.GRU: rule must have mode='linearized', got mode='difference'",
    ),
    "clip": (
        {"rule": tp.TargetProp(inverse="layer", clip=0.6)},
        ValueError,
        "nn.GRU: rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got 0.6",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_constructor(name):
    changes, kind, text = BAD[name]
    with pytest.raises(kind) as caught:
        tp.nn.GRU(**{"input_size": M, "hidden_size": N} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_bad_call():
    layer = tp.nn.GRU(M, N)
    for given, text in (
        ((torch.ones(T, B, M + 1),), "nn.GRU: input must have shape [T, B, M] with M = 3, got (7, 4, 4)"),
        ((torch.ones(T, B, M), torch.ones(B, N)), "nn.GRU: hx must have shape [1, B, N] = [1, 4, 5], got (4, 5)"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            layer(*given)
        assert str(caught.value) == text
    layer.weight_hh_l0 = nn.Parameter(torch.ones(N, N))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer(torch.ones(T, B, M))
    assert str(caught.value) == "nn.GRU: weight_hh_l0 must have shape (15, 5), got (5, 5)"


# --- convert


def test_convert_swaps_both_kinds():
    model = nn.ModuleDict({"rnn": nn.RNN(M, N), "gru": nn.GRU(N, N, batch_first=True), "lstm": nn.LSTM(N, N)})
    parameters, state = dict(model.named_parameters()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.nn.convert(model, tp.TargetProp(reg=0.5))
    assert [type(module) for module in model.values()] == [tp.nn.RNN, tp.nn.GRU, nn.LSTM]
    assert model["gru"].rule == tp.TargetProp(reg=0.5)
    assert model["gru"].batch_first
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    tp.nn.convert(model, tp.BackProp())
    assert model["gru"].rule == model["rnn"].rule == tp.BackProp()


def test_convert_changes_nothing_where_a_rule_is_not_for_a_gru():
    model = nn.ModuleDict({"ours": tp.nn.RNN(M, N), "rnn": nn.RNN(M, N), "gru": nn.GRU(N, N)})
    with pytest.raises(ValueError, match=r"nn\.GRU: rule must have mode='linearized', got mode='direct'"):
        tp.nn.convert(model, tp.TargetProp(inverse="layer", mode="direct"))
    assert [type(module) for module in model.values()] == [tp.nn.RNN, nn.RNN, nn.GRU]
    assert model["ours"].rule == tp.TargetProp()


def test_convert_leaves_a_gru_that_it_cannot_swap():
    model = nn.ModuleDict({"gru": nn.GRU(M, N, num_layers=2)})
    text = r"nn\.convert: 'gru' stays a torch\.nn\.GRU: num_layers=2 is not implemented yet"
    with pytest.warns(UserWarning, match=text):
        tp.nn.convert(model)
    assert type(model["gru"]) is nn.GRU
