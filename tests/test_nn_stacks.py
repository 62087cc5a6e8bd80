"""Several layers and two directions: the outputs and, with back-propagation, the gradients of ``torch.nn``; under every
rule the gradients of single layers, one put on the other by hand.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from _cases import RULES
from _compare import assert_identical, assert_near
from _modules import ALL, ALL_AND_RULES, LAYERS, LSTM, VARIANTS, B, Layer, M, N, parts_of, skip_what_cpu_lacks
from _oracle import extended
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls_in_pieces import assert_equal_to_rounding, in_pieces
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent

T = 8
over_layers = pytest.mark.parametrize("layer", ALL, ids=str)
over_rules = pytest.mark.parametrize(("layer", "rule"), ALL_AND_RULES, ids=str)
STACKS = {
    "2 layers": {"num_layers": 2},
    "2 directions": {"bidirectional": True},
    "2 layers, 2 directions": {"num_layers": 2, "bidirectional": True},
}
over_stacks = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def make(layer: Layer, stack: dict, **options: object) -> Recurrent:
    return layer.make(**{"dtype": torch.float64} | stack | options)


State = Tensor | tuple[Tensor, ...]


def inputs(layer: Layer, stack: dict) -> tuple[Tensor, State]:
    """x and first states, in float64."""
    numbers = torch.Generator().manual_seed(0)
    count = stack.get("num_layers", 1) * (2 if stack.get("bidirectional") else 1)
    x = torch.randn(T, B, M, generator=numbers, dtype=torch.float64)
    parts = torch.randn(layer.states, count, B, N, generator=numbers, dtype=torch.float64).unbind()
    return x.requires_grad_(), layer.state([part.detach().requires_grad_() for part in parts])


def flat(outputs: tuple) -> list[Tensor]:
    """The output, if there is one, and the parts of the last states."""
    return [output for output in (outputs[0], *parts_of(outputs[1])) if output is not None]


def gradients(module: Recurrent, outputs: tuple, x: Tensor, hx: State) -> dict[str, Tensor]:
    """From gradients that arrive at all outputs."""
    numbers = torch.Generator().manual_seed(1)
    outputs = flat(outputs)
    grads = [torch.randn(output.shape, generator=numbers, dtype=output.dtype) for output in outputs[::-1]][::-1]
    named = {"x": x, **{f"hx{i}": part for i, part in enumerate(parts_of(hx))}, **dict(module.named_parameters())}
    return dict(zip(named, torch.autograd.grad(outputs, list(named.values()), grads), strict=True))


def single_layers(layer: Layer, module: Recurrent, **options: object) -> list[Recurrent]:
    """One for each layer and direction, of the module's own parameters."""
    singles = []
    for weights in module.all_weights:
        single = layer.make(weights[0].shape[1], N, bias=module.bias, dtype=torch.float64, rule=module.rule, **options)
        for name, weight in zip(single._flat_weights_names, weights, strict=True):
            setattr(single, name, weight)
        singles.append(single)
    return singles


def by_hand(
    layer: Layer, module: Recurrent, singles: list[Recurrent], x: Tensor, starts: list[State]
) -> tuple[Tensor, list[State]]:
    """One layer after the other, the second direction on the input turned round: h, and the last state of each."""
    directions = 2 if module.bidirectional else 1
    lasts = []
    for first in range(0, len(singles), directions):
        outputs = []
        for index in range(first, first + directions):
            turn: Callable[[Tensor], Tensor] = (lambda h: h.flip(0)) if index % directions else (lambda h: h)
            h, last = singles[index](turn(x), starts[index])
            outputs.append(turn(h))
            lasts.append(last)
        x = torch.cat(outputs, -1)
    return x, lasts


def split(layer: Layer, hx: State) -> list[State]:
    """The states of a stack as those of single layers."""
    return [layer.state(each) for each in zip(*(part.split(1) for part in parts_of(hx)), strict=True)]


def joined(layer: Layer, states: list[State]) -> State:
    """The states of single layers as those of a stack."""
    return layer.state([torch.cat(parts) for parts in zip(*map(parts_of, states), strict=True)])


def all_by_hand(layer: Layer, module: Recurrent, singles: list[Recurrent], x: Tensor, hx: State) -> tuple:
    h, lasts = by_hand(layer, module, singles, x, split(layer, hx))
    return h, joined(layer, lasts)


# --- as torch.nn


@settings(deadline=None, derandomize=True, max_examples=120)
@given(drawn=st.data())
def test_like_torch(drawn):
    """One seed, one network; outputs and all gradients of back-propagation, in float64."""
    layer = drawn.draw(st.sampled_from((*VARIANTS, LSTM)))
    options = {
        "num_layers": drawn.draw(st.integers(1, 3)),
        "bidirectional": drawn.draw(st.booleans()),
        "bias": drawn.draw(st.booleans()),
        "batch_first": drawn.draw(st.booleans()),
    }
    if options["num_layers"] > 1:
        options["dropout"] = drawn.draw(st.sampled_from([0.0, 0.4]))
    theirs, ours = layer.pair(dtype=torch.float64, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.checkpoint_every = drawn.draw(st.sampled_from([None, 3]))
    kind = drawn.draw(st.sampled_from(["unbatched", "padded", "packed", "sorted"]))
    lengths = drawn.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    if kind == "sorted":
        lengths = sorted(lengths, reverse=True)
    t, batch = max(lengths), [] if kind == "unbatched" else [len(lengths)]
    x = torch.randn(*([*batch, t] if options["batch_first"] else [t, *batch]), M, dtype=torch.float64)
    parts = torch.randn(layer.states, len(ours.all_weights), *batch, N, dtype=torch.float64).unbind()
    parts = parts if drawn.draw(st.booleans()) else ()
    results = []
    for module in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *parts)]
        sequence, hx = leaves[0], layer.state(leaves[1:]) if parts else None
        if kind in ("packed", "sorted"):
            sequence = pack_padded_sequence(sequence, lengths, options["batch_first"], enforce_sorted=kind == "sorted")
        torch.manual_seed(3)  # dropout
        output, last = module(sequence, hx)
        results.append([])
        if isinstance(output, PackedSequence):
            results[-1] += [part for part in output[1:] if part is not None]
            output = output.data
        outputs = [output, *parts_of(last)]
        torch.manual_seed(4)
        grads = [torch.randn(output.shape, dtype=torch.float64) for output in outputs]
        results[-1] += [*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], grads)]
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert torch.dist(found.double(), expected.double()) <= 1e-12 * torch.linalg.vector_norm(expected.double())


@over_stacks
@over_layers
def test_one_seed_gives_one_network(layer, stack):
    theirs, ours = layer.pair(**stack)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert_identical(ours.state_dict()[name], value, name)
    assert [[tuple(w.shape) for w in ws] for ws in ours.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in theirs.all_weights
    ]


@over_layers
def test_evaluation_drops_nothing(layer):
    ours, plain = (make(layer, {"num_layers": 2}, dropout=dropout) for dropout in (0.5, 0.0))
    x, hx = inputs(layer, {"num_layers": 2})
    assert not torch.equal(ours(x, hx)[0], plain(x, hx)[0])
    assert_identical(ours.eval()(x, hx)[0].detach(), plain(x, hx)[0].detach(), "output")


@over_layers
def test_repr(layer):
    ours = layer.make(2, 3, num_layers=2, dropout=0.5, bidirectional=True, rule=tp.BackProp())
    assert repr(ours) == f"{layer.name}(2, 3, num_layers=2, dropout=0.5, bidirectional=True, rule={ours.rule!r})"


# --- under every rule


@over_stacks
@over_rules
def test_single_layers_by_hand(layer, rule, stack, backend):
    """Each layer and direction has displacements of its own; down goes the gradient in the input."""
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    expected = all_by_hand(layer, module, single_layers(layer, module, backend=backend), x, hx)
    assert_equal_to_rounding(gradients(module, module(x, hx), x, hx), gradients(module, expected, x, hx))


@pytest.mark.parametrize(
    "options",
    [{"checkpoint_every": 3}, {"return_sequence": False}, {"checkpoint_every": 3, "return_sequence": False}],
    ids=str,
)
@over_stacks
@over_layers
def test_options_of_every_layer(layer, stack, options, backend):
    plain, ours = make(layer, stack, backend=backend), make(layer, stack, backend=backend, **options)
    x, hx = inputs(layer, stack)
    outputs, expected = ours(x, hx), plain(x, hx)
    if "return_sequence" in options:
        assert outputs[0] is None
        expected = (None, expected[1])
    assert_equal_to_rounding(gradients(ours, outputs, x, hx), gradients(plain, expected, x, hx))


def test_displacements_in_parallel():
    layer, stack = LAYERS[0], {"num_layers": 2}
    x, hx = inputs(layer, stack)
    found, expected = (
        gradients(module, module(x, hx), x, hx)
        for module in (make(layer, stack, displacements=how) for how in ("parallel", "sweep"))
    )
    assert_equal_to_rounding(found, expected)
    with pytest.raises(ValueError, match="displacements must be 'auto' or 'sweep' with bidirectional=True"):
        make(layer, {"bidirectional": True}, displacements="parallel")


@pytest.mark.parametrize("rule", ["weight-total", "layer-total"])
@over_stacks
@over_layers
def test_a_matrix_for_each(layer, stack, rule, backend):
    """``feedback``: one in place of each P, in the order of ``hx``."""
    if rule not in layer.rules:
        pytest.skip(f"{layer} does not have it")
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    singles = single_layers(layer, module, backend=backend)
    shape = singles[0]._inverted(singles[0].weight_hh_l0).shape
    matrices = torch.randn(len(singles), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    module.feedback = matrices
    for single, matrix in zip(singles, matrices, strict=True):
        single.feedback = matrix
    expected = all_by_hand(layer, module, singles, x, hx)
    assert_equal_to_rounding(gradients(module, module(x, hx), x, hx), gradients(module, expected, x, hx))
    module.feedback = matrices[0]
    with pytest.raises(ValueError, match=rf"feedback must have the shape of .*weight_hh_l0.*, {len(singles)} times"):
        module(x, hx)


@over_stacks
@over_layers
def test_refresh(layer, stack, backend):
    """Each layer and direction keeps a P of its own."""
    ours = make(layer, stack, backend=backend, refresh=10)
    again = copy.deepcopy(ours)
    x, hx = inputs(layer, stack)
    kept = gradients(ours, ours(x, hx), x, hx)
    with torch.no_grad():
        for names in ours._all_weights:
            ours.get_parameter(names[1]).mul_(1.01)
    p = [refreshed.kept.clone() for refreshed in ours.refreshed]
    gradients(ours, ours(x, hx), x, hx)
    assert len(p) == len(ours.all_weights)
    for refreshed, matrix in zip(ours.refreshed, p, strict=True):
        assert refreshed.age == 2
        assert torch.equal(refreshed.kept, matrix)
    assert_equal_to_rounding(gradients(again, again(x, hx), x, hx), kept)
    ours.reset_parameters()
    assert {int(refreshed.age) for refreshed in ours.refreshed} == {0}


@over_layers
def test_what_is_not_trained(layer, backend):
    """A frozen layer under one that is trained."""
    module = make(layer, {"num_layers": 2}, backend=backend)
    x = inputs(layer, {"num_layers": 2})[0].detach()
    whole = torch.autograd.grad(flat(module(x))[0].sum(), list(module.parameters()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("l1" in name)
    with tp.trace(module) as trace:
        flat(module(x))[0].sum().backward()
    for parameter, expected in zip(module.parameters(), whole, strict=True):
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            assert_near(parameter.grad, extended(expected), "gradient")
    assert [record.layer for record in trace.records] == ["l1"]


@over_stacks
@over_layers
def test_outputs_are_no_views(layer, stack):
    for batch_first in (False, True):
        ours = make(layer, stack, batch_first=batch_first)
        x, _ = inputs(layer, stack)
        for output in flat(ours(x.transpose(0, 1) if batch_first else x)):
            assert not output._is_view()


# --- in several calls


@pytest.mark.parametrize("calls", [1, 2, 7, T])
@over_rules
def test_several_calls_are_one(layer, rule, calls, backend):
    stack = {"num_layers": 2}
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    expected = gradients(module, module(x, hx), x, hx)
    assert_equal_to_rounding(gradients(module, in_pieces(module, x, hx, calls), x, hx), expected)


@pytest.mark.parametrize("changed", [False, True], ids=["as it came", "changed"])
@over_layers
def test_two_directions_hand_on(layer, changed, backend):
    """To the same direction of the next call, which single layers do one by one."""
    stack = {"bidirectional": True}
    module = make(layer, stack, backend=backend)
    x, hx = inputs(layer, stack)
    singles = single_layers(layer, module, backend=backend)
    h, last = module(x[:4], hx)
    first, lasts = by_hand(layer, module, singles, x[:4], split(layer, hx))
    if changed:
        with pytest.warns(UserWarning, match="was changed"):
            end, last = module(x[4:], layer.state([1.0 * part for part in parts_of(last)]))
        with pytest.warns(UserWarning, match="was changed"):
            expected, lasts = all_by_hand(layer, module, singles, x[4:], joined(layer, lasts))
    else:
        end, last = module(x[4:], last)
        expected, lasts = by_hand(layer, module, singles, x[4:], lasts)
        lasts = joined(layer, lasts)
    found = gradients(module, (torch.cat([h, end]), last), x, hx)
    assert_equal_to_rounding(found, gradients(module, (torch.cat([first, expected]), lasts), x, hx))


@over_layers
def test_from_two_directions_to_two_layers(layer, backend):
    """An encoder's last states, as they come: displacements go on into the encoder."""
    encoder, decoder = make(layer, {"bidirectional": True}, backend=backend), make(layer, {"num_layers": 2})
    x, hx = inputs(layer, {"bidirectional": True})
    grads = []
    for rule in (tp.TargetProp(), tp.BackProp()):
        encoder.rule = decoder.rule = rule
        output, _ = decoder(x[4:], encoder(x[:4], hx)[1])
        grads.append(torch.autograd.grad(output.sum(), list(encoder.parameters())))
    for grad, other in zip(*grads, strict=True):
        assert grad.any()
        assert not torch.allclose(grad, other)


# --- compiled and traced


@over_layers
def test_compiled(layer):
    torch._dynamo.reset()
    stack = STACKS["2 layers, 2 directions"]
    module = make(layer, stack)
    x, hx = inputs(layer, stack)

    def two_calls(x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        return in_pieces(module, x, hx, 2)

    found, expected = (
        gradients(module, call(x, hx), x, hx)
        for call in (torch.compile(two_calls, fullgraph=True, backend="aot_eager"), two_calls)
    )
    assert_equal_to_rounding(found, expected)


@over_stacks
@over_layers
def test_traced(layer, stack):
    """A record for each layer and direction, that of a single layer."""
    module = make(layer, stack)
    x, hx = inputs(layer, stack)
    with tp.trace(nn.ModuleDict({"encoder": module})) as trace:
        gradients(module, module(x, hx), x, hx)
    singles = nn.ModuleList(single_layers(layer, module))
    with tp.trace(singles) as plain:
        gradients(module, all_by_hand(layer, module, singles, x, hx), x, hx)
    names = [names[1].removeprefix("weight_hh_") for names in module._all_weights]
    found = {record.layer: record for record in trace.records}
    expected = {f"encoder.{names[int(record.layer)]}": record for record in plain.records}
    assert len(trace.records) == len(plain.records) == len(names)
    assert set(found) == set(expected)
    for name, record in found.items():
        for number in ("displacement_mean", "adjoint_max", "gradient_mean", "saturated", "weight_hh_norm"):
            assert getattr(record, number) == pytest.approx(getattr(expected[name], number), rel=1e-10), number
