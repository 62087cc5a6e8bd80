"""``nn.convert``: a model's recurrent layers swapped for this library's, for every layer of ``_modules.py``."""

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from _compare import assert_near
from _modules import LAYERS, B, Layer, M, N, T
from _oracle import extended
from torch import nn

import tp_kernels as tp

over_layers = pytest.mark.parametrize("layer", LAYERS, ids=str)


class Model(nn.Module):
    """A layer, one in a container, one under two names, and what is no layer of the kind."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.first = layer.theirs(M, N, batch_first=True)
        self.blocks = nn.ModuleList([nn.Sequential(layer.theirs(N, N, bias=False)), nn.LSTM(N, N)])
        self.shared = layer.theirs(N, N, dropout=0.0)
        self.again = self.shared
        self.readout = nn.Linear(N, 2)


def silent_convert(model: nn.Module, rule: object = None) -> nn.Module:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tp.nn.convert(model, rule)


@over_layers
def test_swaps_everywhere(layer):
    model = Model(layer).eval()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert silent_convert(model, tp.TargetProp(reg=0.5)) is model
    for module in (model.first, model.blocks[0][0], model.shared):
        assert type(module) is layer.ours
        assert module.rule == tp.TargetProp(reg=0.5)
        assert not module.training
    assert model.again is model.shared
    assert type(model.blocks[1]) is nn.LSTM
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(dict(model.named_parameters())) == len(parameters)
    assert (model.first.batch_first, model.blocks[0][0].bias) == (True, False)
    for ours, theirs in ((model.first, before.first), (model.shared, before.shared)):
        x = torch.randn(T, B, ours.input_size)
        assert_near(ours(x)[0], extended(theirs(x)[0]), "output")


def test_swaps_all_kinds_of_one_model():
    model = nn.ModuleDict({layer.name: layer.theirs(M, N) for layer in LAYERS} | {"LSTM": nn.LSTM(M, N)})
    silent_convert(model, tp.TargetProp(reg=0.5))
    assert [type(module) for module in model.values()] == [*(layer.ours for layer in LAYERS), nn.LSTM]
    tp.nn.convert(model, tp.BackProp())
    assert {model[layer.name].rule for layer in LAYERS} == {tp.BackProp()}


def test_keeps_the_nonlinearity():
    assert silent_convert(nn.RNN(M, N, nonlinearity="relu")).nonlinearity == "relu"


@over_layers
def test_draws_no_random_numbers(layer):
    model = Model(layer)
    state = torch.get_rng_state()
    silent_convert(model)
    assert torch.equal(torch.get_rng_state(), state)


@over_layers
def test_the_model_itself(layer):
    model = layer.theirs(M, N)
    new = silent_convert(model)
    assert type(new) is layer.ours
    assert new.rule == tp.TargetProp()
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))
    assert type(model) is layer.theirs


@over_layers
def test_gives_ours_the_new_rule(layer):
    model = nn.Sequential(layer.make(rule=tp.BackProp()), layer.theirs(N, N))
    ours = model[0]
    silent_convert(model, tp.TargetProp.paper())
    assert model[0] is ours
    assert model[0].rule == model[1].rule == tp.TargetProp.paper()
    assert silent_convert(model[0], tp.BackProp()) is ours
    assert ours.rule == tp.BackProp()


@over_layers
def test_keeps_tied_parameters(layer):
    """Between two modules, and within one."""
    model = nn.ModuleList([layer.theirs(N, N), layer.theirs(N, N)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].bias_hh_l0 = model[0].bias_ih_l0
    silent_convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert model[0].bias_hh_l0 is model[0].bias_ih_l0
    assert not any(parameter.is_meta for module in model for parameter in module._parameters.values())
    assert model[0](torch.randn(T, B, N))[0].isfinite().all()


@over_layers
def test_keeps_frozen_parameters(layer):
    model = nn.Sequential(layer.theirs(M, N))
    model[0].weight_hh_l0.requires_grad_(False)
    silent_convert(model)
    model[0](torch.randn(T, B, M))[0].sum().backward()
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_hh_l0.grad is None
    assert model[0].weight_ih_l0.grad.isfinite().all()


@over_layers
def test_an_optimizer_goes_on(layer):
    """With back-propagation a converted model takes the steps of the original, momentum included."""
    x = torch.randn(T, B, M)
    results = []
    for swap in (False, True):
        model = nn.ModuleList([layer.make_theirs(seed=2), nn.Linear(N, 1)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(6):
            if swap and step == 3:
                silent_convert(model, tp.BackProp())
                assert type(model[0]) is layer.ours
            optimizer.zero_grad()
            model[1](model[0](x)[0]).square().mean().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for found, expected in zip(*results, strict=True):
        assert_near(found, extended(expected), "parameter")


# --- what stays


def hooked(register: str) -> Callable[[Layer], nn.RNNBase]:
    def make(layer: Layer) -> nn.RNNBase:
        module = layer.theirs(M, N)
        getattr(module, register)(lambda *arguments: None)
        return module

    return make


def subclass(layer: Layer) -> nn.RNNBase:
    return type("Subclass", (layer.theirs,), {})(M, N)


def with_(name: str, value: Callable[[], object]) -> Callable[[Layer], nn.RNNBase]:
    """With something more than such a layer has."""

    def make(layer: Layer) -> nn.RNNBase:
        module = layer.theirs(M, N)
        setattr(module, name, value())
        return module

    return make


def with_a_buffer(layer: Layer) -> nn.RNNBase:
    module = layer.theirs(M, N)
    module.register_buffer("seen", torch.zeros(1))
    return module


def with_a_tensor_for_a_parameter(layer: Layer) -> nn.RNNBase:
    module = layer.theirs(M, N)
    weight = module.weight_hh_l0.detach()
    del module.weight_hh_l0
    module.weight_hh_l0 = weight
    return module


PARAMETERS = "its parameters are not weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0"
STAY = {
    "layers": (lambda layer: layer.theirs(M, N, num_layers=2), "num_layers=2 is not implemented yet"),
    "directions": (
        lambda layer: layer.theirs(M, N, bidirectional=True),
        "bidirectional=True is not implemented yet",
    ),
    "subclass": (subclass, "it is a subclass, Subclass, whose own code would be lost"),
    "parametrized": (
        lambda layer: nn.utils.parametrizations.orthogonal(layer.theirs(M, N), "weight_hh_l0"),
        "it is a subclass, Parametrized{name}, whose own code would be lost",
    ),
    "forward-hook": (hooked("register_forward_hook"), "it has hooks"),
    "pre-hook": (hooked("register_forward_pre_hook"), "it has hooks"),
    "backward-hook": (hooked("register_full_backward_hook"), "it has hooks"),
    "backward-pre-hook": (hooked("register_full_backward_pre_hook"), "it has hooks"),
    "state-dict-hook": (hooked("register_state_dict_post_hook"), "it has hooks"),
    "buffer": (with_a_buffer, "it has buffers or modules of its own"),
    "module": (with_("norm", lambda: nn.LayerNorm(N)), "it has buffers or modules of its own"),
    "parameter": (with_("scale", lambda: nn.Parameter(torch.ones(1))), PARAMETERS),
    "tensor": (with_a_tensor_for_a_parameter, PARAMETERS),
    "attribute": (with_("note", lambda: "mine"), "it has attributes of its own: note"),
    "forward": (with_("forward", lambda: lambda x: x), "it has attributes of its own: forward"),
}


@pytest.mark.parametrize("name", STAY)
@over_layers
def test_leaves_what_it_cannot_swap(layer, name):
    make, reason = STAY[name]
    reason = reason.format(name=layer.name)
    model = nn.ModuleDict({"odd": make(layer), "plain": layer.theirs(M, N)})
    odd = model["odd"]
    stays = f"stays a torch.nn.{layer.name}: {reason}"
    with pytest.warns(UserWarning, match=re.escape(reason)) as caught:
        assert tp.nn.convert(model) is model
    assert [str(w.message) for w in caught] == [f"nn.convert: 'odd' {stays}"]
    assert caught[0].filename == __file__
    assert model["odd"] is odd
    assert type(model["plain"]) is layer.ours
    with pytest.warns(UserWarning, match=re.escape(reason)) as caught:
        assert tp.nn.convert(odd) is odd
    assert [str(w.message) for w in caught] == [f"nn.convert: the model itself {stays}"]


def test_bad_calls():
    with pytest.raises(TypeError) as caught:
        tp.nn.convert(torch.ones(2))
    assert str(caught.value) == "nn.convert: model must be a torch.nn.Module, got Tensor"
    model = nn.Sequential(nn.RNN(M, N))
    with pytest.raises(TypeError) as caught:
        tp.nn.convert(model, "tp")
    assert str(caught.value) == "nn.convert: rule must be a TargetProp, a BackProp or None, got str"
    assert type(model[0]) is nn.RNN


@pytest.mark.parametrize("last", [nn.GRU, tp.nn.GRU], ids=["torch's", "ours"])
def test_changes_nothing_where_a_rule_is_not_for_a_layer(last):
    model = nn.ModuleDict({"ours": tp.nn.RNN(M, N), "rnn": nn.RNN(M, N), "gru": last(N, N)})
    with pytest.raises(ValueError, match=r"nn\.GRU: rule must have mode='linearized', got mode='direct'"):
        tp.nn.convert(model, tp.TargetProp(inverse="layer", mode="direct"))
    assert [type(module) for module in model.values()] == [tp.nn.RNN, nn.RNN, last]
    assert model["ours"].rule == tp.TargetProp()
