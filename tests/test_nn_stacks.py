"""Several layers and two directions: the outputs and, with back-propagation, the gradients of ``torch.nn``; under every
rule the gradients of single layers, one put on the other by hand.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from _cases import RULES
from _compare import assert_identical, assert_near
from _modules import LAYERS, LAYERS_AND_RULES, VARIANTS, B, Layer, M, N
from _oracle import extended
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls_in_pieces import assert_equal_to_rounding, in_pieces
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent

T = 8
over_layers = pytest.mark.parametrize("layer", LAYERS, ids=str)
over_rules = pytest.mark.parametrize(("layer", "rule"), LAYERS_AND_RULES, ids=str)
STACKS = {
    "2 layers": {"num_layers": 2},
    "2 directions": {"bidirectional": True},
    "2 layers, 2 directions": {"num_layers": 2, "bidirectional": True},
}
over_stacks = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def make(layer: Layer, stack: dict, **options: object) -> Recurrent:
    return layer.make(**{"dtype": torch.float64} | stack | options)


def inputs(stack: dict) -> tuple[Tensor, Tensor]:
    """x and first states, in float64."""
    numbers = torch.Generator().manual_seed(0)
    count = stack.get("num_layers", 1) * (2 if stack.get("bidirectional") else 1)
    x = torch.randn(T, B, M, generator=numbers, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(count, B, N, generator=numbers, dtype=torch.float64).requires_grad_()


def gradients(module: Recurrent, outputs: tuple[Tensor, Tensor], *leaves: Tensor) -> dict[str, Tensor]:
    """From gradients that arrive at all outputs."""
    numbers = torch.Generator().manual_seed(1)
    outputs = [output for output in outputs if output is not None]
    grads = [torch.randn(output.shape, generator=numbers, dtype=output.dtype) for output in outputs]
    named = dict(zip(("x", "hx"), leaves, strict=True)) | dict(module.named_parameters())
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


def by_hand(module: Recurrent, singles: list[Recurrent], x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
    """One layer after the other, the second direction on the input turned round."""
    directions = 2 if module.bidirectional else 1
    lasts = []
    for first in range(0, len(singles), directions):
        outputs = []
        for index in range(first, first + directions):
            turn: Callable[[Tensor], Tensor] = (lambda h: h.flip(0)) if index % directions else (lambda h: h)
            h, last = singles[index](turn(x), hx[index : index + 1])
            outputs.append(turn(h))
            lasts.append(last)
        x = torch.cat(outputs, -1)
    return x, torch.cat(lasts)


# --- as torch.nn


@settings(deadline=None, derandomize=True, max_examples=60)
@given(drawn=st.data())
def test_like_torch(drawn):
    """One seed, one network; outputs and all gradients of back-propagation, in float64."""
    layer = drawn.draw(st.sampled_from(VARIANTS))
    batch_first = drawn.draw(st.booleans())
    options = {
        "num_layers": drawn.draw(st.integers(1, 3)),
        "bidirectional": drawn.draw(st.booleans()),
        "bias": drawn.draw(st.booleans()),
        "batch_first": batch_first,
        "dropout": drawn.draw(st.sampled_from([0.0, 0.4])),
    }
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    every = drawn.draw(st.sampled_from([None, 3]))
    batched, t = drawn.draw(st.booleans()), drawn.draw(st.integers(1, 9))
    theirs, ours = layer.pair(dtype=torch.float64, **options)
    ours.checkpoint_every = every
    count = len(ours.all_weights)
    batch = [drawn.draw(st.integers(1, 5))] if batched else []
    x = torch.randn(*([*batch, t] if batch_first else [t, *batch]), M, dtype=torch.float64)
    hx = torch.randn(count, *batch, N, dtype=torch.float64) if drawn.draw(st.booleans()) else None
    results = []
    for module in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, hx) if tensor is not None]
        torch.manual_seed(3)  # dropout
        outputs = module(*leaves)
        torch.manual_seed(4)
        grads = [torch.randn(output.shape, dtype=output.dtype) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], grads)])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert torch.dist(found, expected) <= 1e-12 * torch.linalg.vector_norm(expected)


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
    x, hx = inputs({"num_layers": 2})
    assert not torch.equal(ours(x, hx)[0], plain(x, hx)[0])
    assert_identical(ours.eval()(x, hx)[0].detach(), plain(x, hx)[0].detach(), "output")


@over_layers
def test_repr(layer):
    ours = layer.make(2, 3, num_layers=2, dropout=0.5, bidirectional=True, rule=tp.BackProp())
    assert repr(ours) == f"{layer.name}(2, 3, num_layers=2, dropout=0.5, bidirectional=True, rule=BackProp())"


# --- under every rule


@over_stacks
@over_rules
def test_single_layers_by_hand(layer, rule, stack, backend):
    """Each layer and direction has displacements of its own; down goes the gradient in the input."""
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(stack)
    expected = by_hand(module, single_layers(layer, module, backend=backend), x, hx)
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
    x, hx = inputs(stack)
    outputs, expected = ours(x, hx), plain(x, hx)
    if "return_sequence" in options:
        assert outputs[0] is None
        expected = (None, expected[1])
    assert_equal_to_rounding(gradients(ours, outputs, x, hx), gradients(plain, expected, x, hx))


def test_displacements_in_parallel():
    stack = {"num_layers": 2}
    x, hx = inputs(stack)
    found, expected = (
        gradients(module, module(x, hx), x, hx)
        for module in (make(LAYERS[0], stack, displacements=how) for how in ("parallel", "sweep"))
    )
    assert_equal_to_rounding(found, expected)
    with pytest.raises(ValueError, match="displacements must be 'auto' or 'sweep' with bidirectional=True"):
        make(LAYERS[0], {"bidirectional": True}, displacements="parallel")


@pytest.mark.parametrize("rule", ["weight-total", "layer-total"])
@over_stacks
@over_layers
def test_a_matrix_for_each(layer, stack, rule, backend):
    """``feedback``: one in place of each P, in the order of ``hx``."""
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(stack)
    singles = single_layers(layer, module, backend=backend)
    shape = singles[0]._inverted(singles[0].weight_hh_l0).shape
    matrices = torch.randn(len(singles), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    module.feedback = matrices
    for single, matrix in zip(singles, matrices, strict=True):
        single.feedback = matrix
    expected = by_hand(module, singles, x, hx)
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
    x, hx = inputs(stack)
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
    x, hx = (tensor.detach() for tensor in inputs({"num_layers": 2}))
    whole = torch.autograd.grad(module(x, hx)[1].sum(), list(module.parameters()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("l1" in name)
    with tp.trace(module) as trace:
        module(x, hx)[1].sum().backward()
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
        x, _ = inputs(stack)
        for output in ours(x.transpose(0, 1) if batch_first else x):
            assert not output._is_view()


# --- in several calls


@pytest.mark.parametrize("calls", [1, 2, 7, T])
@over_rules
def test_several_calls_are_one(layer, rule, calls, backend):
    stack = {"num_layers": 2}
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(stack)
    expected = gradients(module, module(x, hx), x, hx)
    assert_equal_to_rounding(gradients(module, in_pieces(module, x, hx, calls), x, hx), expected)


@pytest.mark.parametrize("changed", [False, True], ids=["as it came", "changed"])
@over_layers
def test_two_directions_hand_on(layer, changed, backend):
    """To the same direction of the next call, which single layers do one by one."""
    stack = {"bidirectional": True}
    module = make(layer, stack, backend=backend)
    x, hx = inputs(stack)
    h, last = module(x[:4], hx)
    singles = single_layers(layer, module, backend=backend)
    ahead, last_ahead = singles[0](x[:4], hx[:1])
    back, last_back = singles[1](x[:4].flip(0), hx[1:])
    if changed:
        with pytest.warns(UserWarning, match="was changed"):
            outputs = module(x[4:], 1.0 * last)
        with pytest.warns(UserWarning, match="was changed"):
            expected = by_hand(module, singles, x[4:], torch.cat([last_ahead, last_back]))
    else:
        outputs = module(x[4:], last)
        (h_ahead, end_ahead), (h_back, end_back) = singles[0](x[4:], last_ahead), singles[1](x[4:].flip(0), last_back)
        expected = torch.cat([h_ahead, h_back.flip(0)], -1), torch.cat([end_ahead, end_back])
    first = torch.cat([ahead, back.flip(0)], -1)
    found = gradients(module, (torch.cat([h, outputs[0]]), outputs[1]), x, hx)
    assert_equal_to_rounding(found, gradients(module, (torch.cat([first, expected[0]]), expected[1]), x, hx))


@over_layers
def test_from_two_directions_to_two_layers(layer, backend):
    """An encoder's last states, as they come: displacements go on into the encoder."""
    encoder, decoder = make(layer, {"bidirectional": True}, backend=backend), make(layer, {"num_layers": 2})
    x, hx = inputs({"bidirectional": True})
    _, last = decoder(x[4:], encoder(x[:4], hx)[1])
    found = torch.autograd.grad(last.sum(), list(encoder.parameters()), retain_graph=True)
    encoder.rule = decoder.rule = tp.BackProp()
    _, last = decoder(x[4:], encoder(x[:4], hx)[1])
    for grad, other in zip(found, torch.autograd.grad(last.sum(), list(encoder.parameters())), strict=True):
        assert grad.any()
        assert not torch.allclose(grad, other)


# --- compiled and traced


@over_layers
def test_compiled(layer):
    torch._dynamo.reset()
    stack = STACKS["2 layers, 2 directions"]
    module = make(layer, stack)
    x, hx = inputs(stack)

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
    x, hx = inputs(stack)
    with tp.trace(nn.ModuleDict({"encoder": module})) as trace:
        gradients(module, module(x, hx), x, hx)
    singles = nn.ModuleList(single_layers(layer, module))
    with tp.trace(singles) as plain:
        gradients(module, by_hand(module, singles, x, hx), x, hx)
    names = [names[1].removeprefix("weight_hh_") for names in module._all_weights]
    found = {record.layer: record for record in trace.records}
    expected = {f"encoder.{names[int(record.layer)]}": record for record in plain.records}
    assert len(trace.records) == len(plain.records) == len(names)
    assert set(found) == set(expected)
    for name, record in found.items():
        for number in ("displacement_mean", "adjoint_max", "gradient_mean", "saturated", "weight_hh_norm"):
            assert getattr(record, number) == pytest.approx(getattr(expected[name], number), rel=1e-10), number
