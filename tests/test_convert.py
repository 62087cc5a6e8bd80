"""``nn.convert``: a model's recurrent layers swapped for this library's, for every layer of ``_modules.py``."""

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from _compare import assert_near
from _modules import ALL, B, Layer, M, N, T, parts_of
from _oracle import extended
from torch import nn

import tp_kernels as tp

over_layers = pytest.mark.parametrize("layer", ALL, ids=str)
CELLS = {f"{layer.name}Cell": layer for layer in ALL}
over_cells = pytest.mark.parametrize("name", CELLS)


class Model(nn.Module):
    """A layer, one in a container, one under two names, and what is no layer of the kind."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.first = layer.theirs(M, N, batch_first=True)
        deep = layer.theirs(N, N, num_layers=2, bidirectional=True, dropout=0.5)
        self.blocks = nn.ModuleList([nn.Sequential(layer.theirs(N, N, bias=False)), deep])
        self.shared = layer.theirs(N, N, dropout=0.0)
        self.again = self.shared
        self.readout = nn.Linear(N, 2)


def silent_convert(model: nn.Module, rule: object = None, **options: object) -> nn.Module:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tp.nn.convert(model, rule, **options)


@over_layers
def test_swaps_everywhere(layer):
    model = Model(layer).eval()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert silent_convert(model, tp.TargetProp(reg=0.5)) is model
    for module in (model.first, model.blocks[0][0], model.blocks[1], model.shared):
        assert type(module) is layer.ours
        assert module.rule == tp.TargetProp(reg=0.5)
        assert not module.training
    assert model.again is model.shared
    deep = model.blocks[1]
    assert (deep.num_layers, deep.bidirectional, deep.dropout) == (2, True, 0.5)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(dict(model.named_parameters())) == len(parameters)
    assert (model.first.batch_first, model.blocks[0][0].bias) == (True, False)
    for ours, theirs in ((model.first, before.first), (deep, before.blocks[1]), (model.shared, before.shared)):
        x = torch.randn(T, B, ours.input_size)
        assert_near(ours(x)[0], extended(theirs(x)[0]), "output")


def test_swaps_all_kinds_of_one_model():
    kinds = [*(layer.name for layer in ALL), *CELLS]
    model = nn.ModuleDict({kind: getattr(nn, kind)(M, N) for kind in kinds})
    silent_convert(model, tp.TargetProp(reg=0.5))
    assert [type(module) for module in model.values()] == [getattr(tp.nn, kind) for kind in kinds]
    tp.nn.convert(model, tp.BackProp())
    assert {module.rule for module in model.values()} == {tp.BackProp()}
    silent_convert(model, to="torch")
    assert [type(module) for module in model.values()] == [getattr(nn, kind) for kind in kinds]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@over_cells
def test_swaps_cells(name, bias):
    model = nn.Sequential(getattr(nn, name)(M, N, bias=bias))
    theirs, parameters = model[0], list(model.parameters())
    silent_convert(model, tp.BackProp())
    assert type(model[0]) is getattr(tp.nn, name)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    x = torch.randn(B, M)
    for found, expected in zip(parts_of(model[0](x)), parts_of(theirs(x)), strict=True):
        assert_near(found, extended(expected), "state")


@over_layers
def test_back_to_torch(layer):
    """The same model as before: its outputs, its parameters, its ``state_dict``."""
    model = Model(layer).eval()
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    silent_convert(model)
    assert silent_convert(model, to="torch") is model
    assert repr(model) == repr(before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.again is model.shared
    x = torch.randn(T, B, N)
    for found, expected in zip((model.shared, model.blocks[1]), (before.shared, before.blocks[1]), strict=True):
        assert torch.equal(found(x)[0], expected(x)[0])
    model.shared(x)[0].sum().backward()
    assert parameters["shared.weight_hh_l0"].grad.any()


@over_layers
def test_what_torch_does_not_have_stays(layer):
    model = nn.ModuleDict({"ends": layer.make(return_sequence=False), "plain": layer.make()})
    if layer.name == "RNN":
        model["linear"] = tp.nn.RNN(M, N, nonlinearity="identity")
        model["cell"] = tp.nn.RNNCell(M, N, nonlinearity="identity")
        model["learned"] = tp.nn.LearnedInverse(M, N)
    with pytest.warns(UserWarning, match="stays a tp_kernels") as caught:
        tp.nn.convert(model, to="torch")
    messages = [str(warning.message) for warning in caught]
    assert messages[0] == (
        f"nn.convert: 'ends' stays a tp_kernels.nn.{layer.name}: torch.nn does not have return_sequence=False"
    )
    assert [message.split("'")[1] for message in messages] == [name for name in model if name != "plain"]
    assert type(model["plain"]) is layer.theirs


@over_layers
def test_only_what_is_meant(layer):
    model = Model(layer)
    silent_convert(model, only=lambda name: name.startswith("blocks"))
    assert type(model.first) is type(model.shared) is layer.theirs
    assert type(model.blocks[0][0]) is type(model.blocks[1]) is layer.ours
    silent_convert(model, tp.BackProp(), only=lambda name: name == "again")  # its second name
    assert type(model.shared) is type(model.again) is layer.ours
    assert model.blocks[1].rule == tp.TargetProp()
    with pytest.warns(UserWarning, match=r"nothing was swapped: no recurrent layer or cell of torch\.nn was found"):
        tp.nn.convert(model, only=lambda name: False)


@pytest.mark.parametrize("to", ["tp_kernels", "torch"])
def test_nothing_to_swap_is_warned_of(to):
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"^nn.convert: nothing was swapped: no recurrent layer or cell of") as caught:
        assert tp.nn.convert(model, to=to) is model
    assert caught[0].filename == __file__


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
    ours, rule = model[0], tp.TargetProp(reg=0.5, update="local")
    silent_convert(model, rule)
    assert model[0] is ours
    assert model[0].rule == model[1].rule == rule
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


def test_a_projection_and_other_subclasses_stay():
    """Of a recurrent module nothing is left out without a word."""

    class Own(nn.RNNBase):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class OwnCell(nn.GRUCell):
        pass

    model = nn.ModuleDict({"lstm": nn.LSTM(M, N, proj_size=2), "own": Own("GRU", M, N), "cell": OwnCell(M, N)})
    kinds = [type(module) for module in model.values()]
    with pytest.warns(UserWarning, match="stays") as caught:
        tp.nn.convert(model)
    assert [str(warning.message).removeprefix("nn.convert: ") for warning in caught] == [
        "'lstm' stays a torch.nn.LSTM: proj_size=2 is not implemented yet",
        "'own' stays a Own: it is a subclass, Own, whose own code would be lost",
        "'cell' stays a torch.nn.GRUCell: it is a subclass, OwnCell, whose own code would be lost",
    ]
    assert [type(module) for module in model.values()] == kinds


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"to": "jax"}, ValueError, "nn.convert: to must be one of 'tp_kernels', 'torch', got 'jax'"),
        ({"only": ["first"]}, TypeError, "nn.convert: only must be a function of a name or None, got list"),
        (
            {"to": "torch", "rule": tp.BackProp()},
            ValueError,
            f"nn.convert: rule must be None with to='torch', whose layers have none, got {tp.BackProp()!r}",
        ),
    ],
    ids=["to", "only", "rule"],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind) as caught:
        tp.nn.convert(nn.RNN(M, N), **options)
    assert str(caught.value) == text


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
    with pytest.raises(ValueError, match=r"nn\.(GRU|LSTM): rule must have mode='linearized', got mode='direct'"):
        tp.nn.convert(model, tp.TargetProp(inverse="layer", mode="direct"))
    assert [type(module) for module in model.values()] == [tp.nn.RNN, nn.RNN, last]
    assert model["ours"].rule == tp.TargetProp()
