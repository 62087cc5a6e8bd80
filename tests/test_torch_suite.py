"""What PyTorch's own tests expect of its recurrent layers, expected of ours under ``BackProp()``.

Two sources: the samples of ``torch.testing._internal.common_modules``, and the expectations that ``test/test_nn.py`` of
PyTorch has of ``RNN``, ``GRU`` and ``LSTM``, written anew. What ours do not do is in one list, with the reason.
"""

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from _modules import ALL, LAYERS, Layer, parts_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import tp_kernels as tp

M, N, T, B = 3, 4, 5, 2
STACK = {"num_layers": 2, "bidirectional": True}

EXPECTATIONS: dict[str, Callable[[Layer], None]] = {}


def expectation(test: Callable[[Layer], None]) -> Callable[[Layer], None]:
    """To be met by every layer."""
    EXPECTATIONS[test.__name__] = test
    return test


def made(layer: Layer, *sizes: int, **options: Any) -> nn.Module:
    return layer.make(*(sizes or (M, N)), rule=tp.BackProp(), **options)


def states(layer: Layer, *shape: int) -> Tensor | tuple[Tensor, ...]:
    return layer.state([torch.randn(shape) for _ in range(layer.states)])


def outputs(module: nn.Module, *arguments: Any) -> list[Tensor]:
    """The output, packed or not, and the parts of the last state."""
    output, last = module(*arguments)
    return [output if isinstance(output, Tensor) else output.data, *parts_of(last)]


def gradients(module: nn.Module, *arguments: Any) -> list[Tensor]:
    loss = sum(part.square().sum() for part in outputs(module, *arguments))
    return list(torch.autograd.grad(loss, list(module.parameters())))


def assert_same(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, **tolerance)


# --- shapes and modes


@expectation
def shapes_of_every_mode(layer):
    for L, two, first in itertools.product((1, 2), (False, True), (False, True)):
        D = 2 if two else 1
        module = made(layer, num_layers=L, bidirectional=two, batch_first=first)
        output, last = module(torch.randn((B, T, M) if first else (T, B, M)))
        assert output.shape == ((B, T, D * N) if first else (T, B, D * N))
        assert all(part.shape == (L * D, B, N) for part in parts_of(last))


@expectation
def shapes_without_a_batch(layer):
    for first in (False, True):
        output, last = made(layer, **STACK, batch_first=first)(torch.randn(T, M), states(layer, 4, N))
        assert output.shape == (T, 2 * N)
        assert all(part.shape == (4, N) for part in parts_of(last))


@expectation
def batch_of_no_sequence(layer):
    """``test_RNN_input_size_zero``."""
    output, last = made(layer)(torch.zeros(T, 0, M))
    assert output.shape == (T, 0, N)
    assert all(part.shape == (1, 0, N) for part in parts_of(last))
    output.sum().backward()


@expectation
def no_first_state_is_zero(layer):
    """``test_rnn_initial_hidden_state``."""
    for L, two in itertools.product((1, 2), (False, True)):
        module, x = made(layer, num_layers=L, bidirectional=two), torch.randn(T, B, M)
        zero = layer.state([torch.zeros(L * (2 if two else 1), B, N)] * layer.states)
        assert_same(outputs(module, x), outputs(module, x, zero), rtol=0, atol=0)


@expectation
def batch_first_is_a_transpose(layer):
    one, other, x = made(layer, **STACK), made(layer, **STACK, batch_first=True), torch.randn(T, B, M)
    output, *last = outputs(one, x)
    transposed, *same = outputs(other, x.transpose(0, 1))
    assert_same([output, *last], [transposed.transpose(0, 1), *same])
    assert_same(gradients(one, x), gradients(other, x.transpose(0, 1)))


@expectation
def second_direction_reads_backwards(layer):
    both, x = made(layer, bidirectional=True), torch.randn(T, B, M)
    alone = made(layer)
    alone.load_state_dict({name: both.state_dict()[f"{name}_reverse"] for name in alone.state_dict()})
    assert_same([both(x)[0][..., N:]], [alone(x.flip(0))[0].flip(0)])


@expectation
def second_layer_reads_the_first(layer):
    both, x = made(layer, num_layers=2), torch.randn(T, B, M)
    values = both.state_dict()
    first, second = made(layer), made(layer, N, N)
    for module, index in ((first, 0), (second, 1)):
        module.load_state_dict({name: values[name.replace("l0", f"l{index}")] for name in module.state_dict()})
    assert_same([both(x)[0]], [second(first(x)[0])[0]])


@expectation
def last_state_goes_on(layer):
    module, x = made(layer, num_layers=2), torch.randn(T, B, M)
    _, state = module(x[:2])
    assert_same(outputs(module, x)[1:], outputs(module, x[2:], state)[1:])


@expectation
def outputs_of_torch(layer):
    for options in ({}, STACK, {"bias": False}, {"batch_first": True, "num_layers": 2}):
        theirs, ours = layer.pair(**options)
        x, start = torch.randn(B, B, 3), states(layer, len(ours._all_weights), B, 5)
        assert_same(outputs(ours, x, start), outputs(theirs, x, start))
        assert_same(gradients(ours, x, start), gradients(theirs, x, start))


@expectation
def input_of_any_strides(layer):
    module, x = made(layer), torch.randn(M, B, 2 * T)[..., ::2].permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_same(outputs(module, x), outputs(module, x.contiguous()))
    assert_same(gradients(module, x), gradients(module, x.contiguous()))


@expectation
def first_state_of_any_strides(layer):
    module, x = made(layer), torch.randn(T, B, M)
    start = layer.state([torch.randn(N, B, 1).permute(2, 1, 0) for _ in range(layer.states)])
    same = layer.state([part.contiguous() for part in parts_of(start)])
    assert_same(outputs(module, x, start), outputs(module, x, same))


@expectation
def weights_of_any_strides(layer):
    """``test_cudnn_weight_format``: gradients too."""
    module, x = made(layer), torch.randn(T, B, M)
    expected = [*outputs(module, x), *gradients(module, x)]
    for parameter in module.parameters():
        parameter.data = torch.stack((parameter.data, parameter.data), -1)[..., 0]
        assert not parameter.is_contiguous()
    assert_same([*outputs(module, x), *gradients(module, x)], expected)


@expectation
def weights_may_be_transposed(layer):
    module, x = made(layer), torch.randn(T, B, M)
    expected = [*outputs(module, x), *gradients(module, x)]
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parameter = getattr(module, name)
        parameter.data = parameter.data.T.contiguous().T
        assert not parameter.is_contiguous()
    assert_same([*outputs(module, x), *gradients(module, x)], expected)


@expectation
def weights_may_be_tied(layer):
    """``test_cudnn_weight_tying``: the optimizer moves both."""
    module, x = made(layer, N, N, num_layers=2), torch.randn(T, B, N)
    module.weight_hh_l1 = module.weight_hh_l0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(x)[0].sum().backward()
        optimizer.step()
    assert module.weight_hh_l1 is module.weight_hh_l0
    untied = made(layer, N, N, num_layers=2)
    untied.load_state_dict(module.state_dict())
    assert_same(outputs(untied, x), outputs(module, x))


@expectation
def one_sequence_of_a_batch_is_itself(layer):
    module, x = made(layer, **STACK), torch.randn(T, B, M)
    output, *last = outputs(module, x)
    alone, *state = outputs(module, x[:, 1])
    assert_same([output[:, 1], *(part[:, 1] for part in last)], [alone, *state])


# --- packed sequences

LENGTHS = (5, 3, 3, 1)


def sequences() -> list[Tensor]:
    return [torch.randn(length, M) for length in LENGTHS]


@expectation
def packed_is_each_by_itself(layer):
    """``test_variable_sequence``."""
    module, each = made(layer, **STACK), sequences()
    packed, last = module(pack_sequence(each))
    padded, lengths = pad_packed_sequence(packed)
    for b, x in enumerate(each):
        output, state = module(x[:, None])
        assert_same([padded[: lengths[b], b : b + 1]], [output])
        assert_same([part[:, b : b + 1] for part in parts_of(last)], list(parts_of(state)))


@expectation
def gradients_of_packed_are_the_sum(layer):
    module, each = made(layer, **STACK), sequences()
    alone = [gradients(module, x[:, None]) for x in each]
    assert_same(gradients(module, pack_sequence(each)), [sum(parts) for parts in zip(*alone, strict=True)])


@expectation
def packed_in_any_order(layer):
    module, each, order = made(layer, **STACK), sequences(), [2, 0, 3, 1]
    _, *last = outputs(module, pack_sequence(each))
    start = states(layer, 4, len(LENGTHS), N)
    shuffled = pack_sequence([each[i] for i in order], enforce_sorted=False)
    _, *found = outputs(module, shuffled)
    assert_same(found, [part[:, order] for part in last])
    output, state = module(shuffled, layer.state([part[:, order] for part in parts_of(start)]))
    expected, whole = module(pack_sequence(each), start)
    assert_same(list(parts_of(state)), [part[:, order] for part in parts_of(whole)])
    assert_same([pad_packed_sequence(output)[0]], [pad_packed_sequence(expected)[0][:, order]])


@expectation
def packed_of_one_length_is_plain(layer):
    module, x = made(layer, batch_first=True), torch.randn(B, T, M)
    packed, last = module(pack_padded_sequence(x, [T] * B, batch_first=True))
    output, *state = outputs(module, x)
    assert_same([pad_packed_sequence(packed, batch_first=True)[0], *parts_of(last)], [output, *state])


@expectation
def packed_like_torch(layer):
    theirs, ours = layer.pair(**STACK)
    packed, start = pack_sequence(sequences()), states(layer, 4, len(LENGTHS), 5)
    assert_same(outputs(ours, packed, start), outputs(theirs, packed, start))
    assert_same(gradients(ours, packed, start), gradients(theirs, packed, start))


@expectation
def packed_first_state_of_wrong_batch(layer):
    with pytest.raises(RuntimeError, match="hx"):
        made(layer)(pack_sequence(sequences()), states(layer, 1, len(LENGTHS) - 1, N))


# --- arguments that do not fit: what torch raises, ours does (a RuntimeError or a ValueError)


def assert_raises(module: nn.Module, *arguments: Any) -> None:
    """Before anything is computed, and with a text that names what does not fit."""
    with pytest.raises((RuntimeError, ValueError), match=r"input|hx"):
        module(*arguments)


@expectation
def input_of_wrong_width(layer):
    """``test_rnn_args_check``, here and below."""
    assert_raises(made(layer), torch.randn(T, B, M + 1))


@expectation
def input_of_wrong_dimensions(layer):
    for shape in ((M,), (1, T, B, M)):
        assert_raises(made(layer), torch.randn(shape))


@expectation
def first_state_of_wrong_size(layer):
    assert_raises(made(layer), torch.randn(T, B, M), states(layer, 1, B, N + 1))


@expectation
def first_state_of_wrong_batch(layer):
    assert_raises(made(layer), torch.randn(T, B, M), states(layer, 1, B + 1, N))


@expectation
def first_state_is_not_broadcast(layer):
    """``test_RNN_cell_no_broadcasting``, of layers."""
    assert_raises(made(layer), torch.randn(T, B, M), states(layer, 1, 1, N))


@expectation
def first_state_of_wrong_layers(layer):
    for wrong in (1, 2, 3, 5):
        assert_raises(made(layer, **STACK), torch.randn(T, B, M), states(layer, wrong, B, N))


@expectation
def first_state_of_wrong_dimensions(layer):
    assert_raises(made(layer), torch.randn(T, B, M), states(layer, 1, N))
    assert_raises(made(layer), torch.randn(T, M), states(layer, 1, 1, N))


@expectation
def no_time(layer):
    assert_raises(made(layer), torch.randn(0, B, M))


@expectation
def device_of_another_kind(layer):
    """``test_rnn_check_device``, without a GPU."""
    assert_raises(made(layer), torch.randn(T, B, M, device="meta"))
    elsewhere = layer.state([part.to("meta") for part in parts_of(states(layer, 1, B, N))])
    assert_raises(made(layer), torch.randn(T, B, M), elsewhere)


@expectation
def dtype_of_another_kind(layer):
    with pytest.raises((RuntimeError, ValueError, TypeError), match="dtype"):
        made(layer)(torch.randn(T, B, M, dtype=torch.float64))


@expectation
def sizes_must_be_positive(layer):
    for sizes in ((M, 0), (M, -1)):
        with pytest.raises(ValueError, match="hidden_size"):
            layer.ours(*sizes)
    with pytest.raises(ValueError, match="num_layers"):
        layer.ours(M, N, num_layers=0)


@expectation
def dropout_must_be_a_share(layer):
    for wrong in (-0.1, 1.1, True):
        with pytest.raises(ValueError, match="dropout"):
            layer.ours(M, N, num_layers=2, dropout=wrong)


@expectation
def dropout_of_one_layer_warns(layer):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        layer.ours(M, N, dropout=0.5)


# --- dropout


@expectation
def dropout_of_all(layer):
    """``test_RNN_dropout``: the second layer sees nothing."""
    module, x = made(layer, num_layers=2, dropout=1.0), torch.randn(T, B, M)
    assert_same([module(x)[0]], [module(torch.randn(T, B, M))[0]], rtol=0, atol=0)
    assert not torch.equal(module.eval()(x)[0], module.train()(x)[0])


@expectation
def dropout_is_drawn_anew(layer):
    """``test_RNN_dropout_state``, by the seed."""
    module, x = made(layer, 8, 8, num_layers=2, dropout=0.5), torch.randn(T, B, 8)
    torch.manual_seed(3)
    one, other = module(x)[0], module(x)[0]
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert_same([module(x)[0]], [one], rtol=0, atol=0)


@expectation
def dropout_can_be_changed(layer):
    """``test_RNN_change_dropout``."""
    module, x = made(layer, 8, 8, num_layers=2), torch.randn(T, B, 8)
    plain = module(x)[0]
    module.dropout = 0.5
    assert not torch.equal(module(x)[0], plain)
    assert_same([module.eval()(x)[0]], [plain])
    module.train().dropout = 0
    assert_same([module(x)[0]], [plain])


@expectation
def dropout_like_torch(layer):
    theirs, ours = layer.pair(num_layers=3, dropout=0.4)
    x, found = torch.randn(T, B, 3), []
    for module in (ours, theirs):
        torch.manual_seed(5)
        found.append(gradients(module, x))
    assert_same(*found)


# --- parameters, copies and files


@expectation
def names_and_order_of_parameters(layer):
    theirs, ours = layer.pair(**STACK)
    assert [(name, tuple(each.shape)) for name, each in ours.named_parameters()] == [
        (name, tuple(each.shape)) for name, each in theirs.named_parameters()
    ]
    assert [[tuple(each.shape) for each in row] for row in ours.all_weights] == [
        [tuple(each.shape) for each in row] for row in theirs.all_weights
    ]


@expectation
def initial_numbers(layer):
    theirs, ours = layer.pair(**STACK)
    assert_same(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)
    assert all(each.abs().max() <= 1 / math.sqrt(5) for each in ours.parameters())


@expectation
def state_dict_round_trip(layer):
    theirs, ours = layer.pair(**STACK)
    x = torch.randn(T, B, 3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1.0)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    assert_same(outputs(ours, x), outputs(theirs, x))
    assert theirs.load_state_dict(ours.state_dict()) == ([], [])


@expectation
def state_dict_that_does_not_fit(layer):
    values = made(layer).state_dict()
    del values["weight_hh_l0"]
    with pytest.raises(RuntimeError, match="Missing key"):
        made(layer).load_state_dict(values)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(layer, M, N + 1).load_state_dict(made(layer).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made(layer, bias=False).load_state_dict(made(layer).state_dict())


@expectation
def load_state_dict_by_assignment(layer):
    module, x = made(layer), torch.randn(T, B, M)
    values = {name: each + 1 for name, each in module.state_dict().items()}
    other = made(layer, device="meta")
    other.load_state_dict(values, assign=True)
    module.load_state_dict(values)
    assert_same(outputs(other, x), outputs(module, x))


@expectation
def deepcopy(layer):
    module, x = made(layer, **STACK), torch.randn(T, B, M)
    other = copy.deepcopy(module)
    assert_same(outputs(other, x), outputs(module, x), rtol=0, atol=0)
    with torch.no_grad():
        other.weight_hh_l1.zero_()
    assert not torch.equal(other(x)[0], module(x)[0])


@expectation
def pickled(layer):
    module, x = made(layer, **STACK, dropout=0.1).eval(), torch.randn(T, B, M)
    other = pickle.loads(pickle.dumps(module))
    assert not other.training
    assert_same(outputs(other, x), outputs(module, x), rtol=0, atol=0)


@expectation
def saved(layer):
    module, x, file = made(layer, **STACK), torch.randn(T, B, M), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same(outputs(torch.load(file, weights_only=False), x), outputs(module, x), rtol=0, atol=0)


@expectation
def parameters_may_be_replaced(layer):
    module, x = made(layer), torch.randn(T, B, M)
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    assert module._flat_weights[1] is module.weight_hh_l0
    theirs = layer.make_theirs(M, N)
    theirs.load_state_dict(module.state_dict())
    assert_same(outputs(module, x), outputs(theirs, x))


@expectation
def moved_to_another_dtype(layer):
    module = made(layer, **STACK).double()
    assert {each.dtype for each in outputs(module, torch.randn(T, B, M).double())} == {torch.float64}
    assert {each.dtype for each in gradients(module, torch.randn(T, B, M).double())} == {torch.float64}


@expectation
def built_on_meta(layer):
    """``skip_init`` and ``to_empty``."""
    module = nn.utils.skip_init(layer.ours, M, N, num_layers=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
    assert module(torch.randn(T, B, M))[0].isfinite().all()


@expectation
def weight_norm(layer):
    """``test_rnn_weight_norm``."""
    module, x = made(layer, num_layers=2), torch.randn(T, B, M)
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hh_l1"):
        before, expected = getattr(module, name).detach().clone(), module(x)[0]
        parametrizations.weight_norm(module, name)
        norms = getattr(module.parametrizations, name).original0
        torch.testing.assert_close(norms.flatten(), before.norm(dim=1))
        assert_same([module(x)[0]], [expected])
        module(x)[0].sum().backward()
        assert norms.grad.abs().sum() > 0
        nn.utils.parametrize.remove_parametrizations(module, name)
        torch.testing.assert_close(getattr(module, name).detach(), before)


@expectation
def pruned(layer):
    """``test_rnn_pruning``."""
    module, x = made(layer), torch.randn(T, B, M)
    prune.l1_unstructured(module, "weight_ih_l0", amount=5)
    assert int((module.weight_ih_l0 == 0).sum()) == 5
    theirs = layer.make_theirs(M, N)
    theirs.load_state_dict(
        {
            **{k: v for k, v in module.state_dict().items() if k in theirs.state_dict()},
            "weight_ih_l0": module.weight_ih_l0.detach(),
        }
    )
    assert_same(outputs(module, x), outputs(theirs, x))
    module(x)[0].sum().backward()
    assert (module.weight_ih_l0_orig.grad[module.weight_ih_l0_mask == 0] == 0).all()
    prune.remove(module, "weight_ih_l0")
    assert_same(outputs(module, x), outputs(theirs, x))


# --- graphs


@expectation
def graph_may_be_retained(layer):
    """``test_rnn_retain_variables``."""
    module, x = made(layer, num_layers=2), torch.randn(T, B, M)
    loss = module(x)[0].square().sum()
    parameters = list(module.parameters())
    first, *others = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(3))
    for each in others:
        assert_same(list(each), list(first), rtol=0, atol=0)


@expectation
def freed_graph_raises(layer):
    loss = made(layer)(torch.randn(T, B, M))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@expectation
def gradcheck(layer):
    module = made(layer, 2, 2, num_layers=2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(outputs(module, x)), (x,))


@expectation
def without_gradients(layer):
    module, x = made(layer), torch.randn(T, B, M)
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    with torch.inference_mode():
        output = module(x)[0]
    assert output.is_inference()
    assert_same([output.clone()], [module(x)[0].detach()])


@expectation
def frozen(layer):
    module, x = made(layer).requires_grad_(False), torch.randn(T, B, M, requires_grad=True)
    output = module(x)[0]
    output.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


@expectation
def hooks(layer):
    module, seen = made(layer), []
    module.register_forward_pre_hook(lambda module, args: seen.append("before"))
    module.register_forward_hook(lambda module, args, result: seen.append("after"))
    module.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("back"))
    module(torch.randn(T, B, M, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "after", "back"]


@expectation
def functional_call(layer):
    module, x = made(layer), torch.randn(T, B, M)
    other = layer.make(M, N, seed=9, rule=tp.BackProp())
    found, _ = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
    assert_same([found], [other(x)[0]])


@expectation
def gradients_by_torch_func(layer):
    """The whole gradient, and one for each sequence."""
    module, x = made(layer, dtype=torch.float64), torch.randn(T, B, M, dtype=torch.float64)
    parameters = {name: each.detach() for name, each in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(
            each.square().sum() for each in outputs(partial(torch.func.functional_call, module, parameters), (x,))
        )

    gradient = torch.func.grad(loss)
    assert_same(list(gradient(parameters, x).values()), gradients(module, x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        each = torch.vmap(gradient, (None, 1))(parameters, x)
    for b in range(B):
        assert_same([of_all[b] for of_all in each.values()], gradients(module, x[:, b]))


@expectation
def copied_by_a_container(layer):
    model = nn.Sequential(made(layer))
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == [f"0.{name}" for name in made(layer).state_dict()]
    assert isinstance(other[0], nn.RNNBase)
    assert repr(model).count(layer.name) == 1


@pytest.mark.parametrize("layer", ALL, ids=str)
@pytest.mark.parametrize("name", EXPECTATIONS)
def test_expectation(name, layer):
    EXPECTATIONS[name](layer)


# --- what ours do not do


class Unsupported(NamedTuple):
    """What torch's layers do and ours refuse.

    Attributes:
        reason: why.
        layers: of these names.
        call: does it, given a layer class.
        kind, text: of the error.
    """

    reason: str
    layers: tuple[str, ...]
    call: Callable[[type[nn.RNNBase]], Any]
    kind: type[Exception]
    text: str


EVERY = tuple(layer.name for layer in ALL)


def _double(kind: type[nn.RNNBase]) -> tuple[nn.RNNBase, Tensor]:
    """In double precision, where no layer of torch goes to another library."""
    return kind(M, N, dtype=torch.float64), torch.randn(T, B, M, dtype=torch.float64)


def _second_derivatives(kind: type[nn.RNNBase]) -> None:
    module, x = _double(kind)
    x.requires_grad_()
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def _tangent(kind: type[nn.RNNBase]) -> None:
    module, x = _double(kind)
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))


UNSUPPORTED = {
    "proj_size": Unsupported(
        "not implemented yet",
        ("LSTM",),
        lambda kind: kind(M, N, proj_size=2),
        NotImplementedError,
        "nn.LSTM: proj_size=2 is not implemented yet",
    ),
    "second derivatives": Unsupported(
        "a rule's gradient has none that mean anything",
        EVERY,
        _second_derivatives,
        RuntimeError,
        "tp_kernels: second derivatives are not implemented",
    ),
    "forward mode": Unsupported(
        "rules are of backward passes only", EVERY, _tangent, NotImplementedError, "implement the jvp function"
    ),
    "TorchScript": Unsupported(
        "it is deprecated, and knows no functions of autograd",
        EVERY,
        lambda kind: torch.jit.script(kind(M, N)),
        torch.jit.frontend.NotSupportedError,
        "Compiled functions can't take",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, what in UNSUPPORTED.items() for layer in what.layers]
)
def test_unsupported(name, layer):
    """Torch's layer does it still, and ours refuses it and says so."""
    what = UNSUPPORTED[name]
    what.call(getattr(nn, layer))
    with pytest.raises(what.kind, match=what.text):
        what.call(getattr(tp.nn, layer))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_projections_are_of_the_lstm_only(layer):
    """``test_projections_errors_on_gru_and_rnn``."""
    for kind in (layer.theirs, layer.ours):
        with pytest.raises((TypeError, ValueError), match="proj_size"):
            kind(M, N, proj_size=2)


def test_unsupported_is_a_tenth_at_most():
    lacking = sum(len(what.layers) for what in UNSUPPORTED.values())
    assert lacking <= 0.1 * (lacking + len(EXPECTATIONS) * len(ALL))


# --- the samples of torch's own tests


@pytest.fixture(scope="module")
def common_modules() -> Iterator[ModuleType]:
    """Imported without its freezing the flags of back-ends for the tests that come after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        yield pytest.importorskip("torch.testing._internal.common_modules")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layer", ALL, ids=str)
def test_samples_of_torch(layer, training, common_modules):
    """Outputs and gradients as of torch's layer, and without a batch as with a batch of one, which is what the samples
    are for. Those with ``proj_size`` are refused, and nothing else is.
    """
    (info,) = (info for info in common_modules.module_db if info.module_cls is layer.theirs)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    assert len(samples) >= 16
    for sample in samples:
        arguments, options = sample.constructor_input.args, dict(sample.constructor_input.kwargs)
        if options.get("proj_size"):
            with pytest.raises(NotImplementedError, match="proj_size"):
                layer.ours(*arguments, **options)
            continue
        options["dtype"] = torch.float64
        theirs = layer.theirs(*arguments, **options).train(training)
        ours = layer.ours(*arguments, rule=tp.BackProp(), **options).train(training)
        ours.load_state_dict(theirs.state_dict())
        called = sample.forward_input.args
        assert_same(outputs(ours, *called), outputs(theirs, *called))
        assert_same(gradients(ours, *called), gradients(theirs, *called))
        if sample.reference_fn is not None:
            expected, state = sample.reference_fn(ours, *called)
            assert_same(outputs(ours, *called), [expected, *parts_of(state)])
