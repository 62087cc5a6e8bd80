"""Sequences of several lengths, and such that start anew in between: each as it is alone, under every rule."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from _cases import RULES
from _compare import assert_identical
from _modules import ALL, ALL_AND_RULES, B, Layer, M, N, parts_of, skip_what_cpu_lacks
from test_calls_in_pieces import assert_equal_to_rounding
from test_nn_stacks import STACKS, flat, gradients, inputs, make, over_stacks
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent

T = 8
LENGTHS = [5, 8, 1, 5]  # of B sequences, not sorted
over_layers = pytest.mark.parametrize("layer", ALL, ids=str)
over_rules = pytest.mark.parametrize(("layer", "rule"), ALL_AND_RULES, ids=str)
DEEP = STACKS["2 layers, 2 directions"]


def resets() -> Tensor:
    """[T, B]: at the beginning, in between, twice in a row, at the end and never."""
    reset = torch.zeros(T, B, dtype=torch.bool)
    for sequence, steps in enumerate(((0, 3), (4, 5), (), (7,))):
        reset[list(steps), sequence] = True
    return reset


def segments(reset: Tensor | None, length: int) -> Iterator[tuple[int, int]]:
    """The parts of one sequence: the first step, and the one behind the last."""
    cuts = [] if reset is None else [t for t in range(1, length) if reset[t]]
    return zip([0, *cuts], [*cuts, length], strict=True)


def alone(
    layer: Layer, module: Recurrent, x: Tensor, hx: Tensor, lengths: list[int], reset: Tensor | None = None
) -> tuple[Tensor, object]:
    """Each part of each sequence in a call of its own: the states, padded with zeros, and the last ones."""
    states, lasts = [], []
    directions = 2 if module.bidirectional else 1
    backwards = torch.tensor([index % directions for index in range(len(module.all_weights))], dtype=torch.bool)
    for sequence, length in enumerate(lengths):
        found, ends = [], []
        of_sequence = None if reset is None else reset[:, sequence]
        for first, stop in segments(of_sequence, length):
            # The first state is that of the first part read, and the last one that after the last.
            from_hx = torch.where(backwards, stop == length, first == 0 and not (reset is not None and of_sequence[0]))
            starts = [torch.where(from_hx[:, None, None], part[:, [sequence]], 0) for part in parts_of(hx)]
            h, last = module(x[first:stop, [sequence]], layer.state(starts))
            found.append(h)
            ends.append(parts_of(last))
        last = [torch.where(backwards[:, None, None], *both) for both in zip(ends[0], ends[-1], strict=True)]
        states.append(torch.nn.functional.pad(torch.cat(found), (0, 0, 0, 0, 0, len(x) - length)))
        lasts.append(last)
    return torch.cat(states, 1), layer.state([torch.cat(parts, 1) for parts in zip(*lasts, strict=True)])


@over_stacks
@over_rules
def test_each_sequence_as_it_is_alone(layer, rule, stack, backend):
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    found = module(x, hx, lengths=LENGTHS)
    expected = alone(layer, module, x, hx, LENGTHS)
    for one, other in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert_equal_to_rounding(gradients(module, found, x, hx), gradients(module, expected, x, hx))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@over_stacks
@over_rules
def test_nothing_passes_where_a_state_starts_anew(layer, rule, stack, lengths, backend):
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    found = module(x, hx, lengths=lengths, reset=resets())
    expected = alone(layer, module, x, hx, lengths or [T] * B, resets())
    for one, other in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert_equal_to_rounding(gradients(module, found, x, hx), gradients(module, expected, x, hx))


@pytest.mark.parametrize("with_hx", [False, True], ids=["zero", "hx"])
@over_layers
def test_packed_and_padded_are_the_same(layer, with_hx, backend):
    module = make(layer, DEEP, backend=backend)
    x, hx = inputs(layer, DEEP)
    hx = hx if with_hx else None
    reset = resets()
    padded = module(x, hx, lengths=torch.tensor(LENGTHS, dtype=torch.int32), reset=reset)
    order = pack_padded_sequence(reset, LENGTHS, enforce_sorted=False).data
    packed = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx, reset=order)
    assert isinstance(packed[0], PackedSequence)
    expected = pack_padded_sequence(padded[0], LENGTHS, enforce_sorted=False)
    for one, other in zip(packed[0], expected, strict=True):
        assert_identical(one, other, "packed")
    for one, other in zip(parts_of(packed[1]), parts_of(padded[1]), strict=True):
        assert_identical(one, other, "last")
    assert not any(padded[0][length:, sequence].any() for sequence, length in enumerate(LENGTHS))


@pytest.mark.parametrize("every", [None, 3])
@over_layers
def test_in_every_layout(layer, every, backend):
    """``batch_first``, a sequence without a batch, and without an output of all states."""
    plain, first = (make(layer, DEEP, backend=backend, batch_first=each) for each in (False, True))
    ends = make(layer, DEEP, backend=backend, return_sequence=False, checkpoint_every=every)
    first.checkpoint_every = every
    x, hx = inputs(layer, DEEP)
    for lengths in (None, LENGTHS):
        h, last = plain(x, hx, lengths=lengths, reset=resets())
        turned, last_of_turned = first(x.transpose(0, 1), hx, lengths=lengths, reset=resets().T)
        expected = gradients(plain, (h, last), x, hx)
        assert_equal_to_rounding(gradients(first, (turned.transpose(0, 1), last_of_turned), x, hx), expected)
        output, end = ends(x, hx, lengths=lengths, reset=resets())
        assert output is None
        _, last = plain(x, hx, lengths=lengths, reset=resets())
        assert_equal_to_rounding(gradients(ends, (None, end), x, hx), gradients(plain, (None, last), x, hx))
    for module in (plain, first):
        h, last = plain(x, hx, reset=resets())
        one, end = module(x[:, 0], layer.state([part[:, 0] for part in parts_of(hx)]), reset=resets()[:, 0])
        torch.testing.assert_close(one, h[:, 0])
        torch.testing.assert_close(parts_of(end)[0], parts_of(last)[0][:, 0])


@over_rules
def test_several_calls_of_several_lengths(layer, rule, backend):
    """Sorted otherwise in every call: the gradients of sequences that were put together before."""
    stack = {"num_layers": 2}
    skip_what_cpu_lacks(layer, rule, backend)
    module = make(layer, stack, rule=RULES[rule], backend=backend)
    x, hx = inputs(layer, stack)
    lengths = [[2, 4, 1, 3], [4, 1, 2, 3]]
    pieces, last = [], hx
    for piece, of_piece in zip(x.split(4), lengths, strict=True):
        h, last = module(piece, last, lengths=of_piece)
        pieces.append(h)
    sums = [sum(both) for both in zip(*lengths, strict=True)]
    together = torch.zeros_like(x)
    for sequence, (first, second) in enumerate(zip(*lengths, strict=True)):
        steps = [*range(first), *range(4, 4 + second)]
        together = together.index_put((torch.arange(len(steps)), torch.tensor(sequence)), x[steps, sequence])
    whole, last_of_whole = module(together, hx, lengths=sums)
    states = torch.zeros_like(torch.cat(pieces))
    for sequence, (first, second) in enumerate(zip(*lengths, strict=True)):
        steps = torch.tensor([*range(first), *range(4, 4 + second)])
        states = states.index_put((steps, torch.tensor(sequence)), whole[: len(steps), sequence])
    found = gradients(module, (torch.cat(pieces), last), x, hx)
    assert_equal_to_rounding(found, gradients(module, (states, last_of_whole), x, hx))


@over_layers
def test_a_trace_of_several_lengths(layer):
    """At each step the largest norm of the sequences that are there; a second direction begins at their ends."""
    module = make(layer, {"bidirectional": True})
    x, hx = inputs(layer, {"bidirectional": True})
    with tp.trace(module) as trace:
        flat(module(x, hx, lengths=LENGTHS))[0].sum().backward()
    singles = []
    for sequence, length in enumerate(LENGTHS):
        with tp.trace(module) as of_one:
            start = layer.state([part[:, [sequence]] for part in parts_of(hx)])
            flat(module(x[:length, [sequence]], start))[0].sum().backward()
        singles.append({record.layer: record for record in of_one.records})
    for record in trace.records:
        order = range(T) if record.layer == "l0" else range(T - 1, -1, -1)
        for name in ("displacement_max", "adjoint_max", "gradient_max"):
            expected = []
            for t in order:
                there = [single for single, length in zip(singles, LENGTHS, strict=True) if t < length]
                lists = [getattr(single[record.layer], name) for single in there]
                expected.append(max(each[t] if record.layer == "l0" else each[-1 - t] for each in lists))
            assert getattr(record, name) == pytest.approx(expected), (record.layer, name)
    assert {record.layer for record in trace.records} == {"l0", "l0_reverse"}


@over_layers
def test_a_trace_of_what_starts_anew(layer):
    """The angle of back-propagation to itself is none."""
    module = make(layer, DEEP, rule=tp.BackProp())
    x, hx = inputs(layer, DEEP)
    with tp.trace(module) as trace:
        gradients(module, module(x, hx, lengths=LENGTHS, reset=resets()), x, hx)
    assert [record.angle_all for record in trace.records] == [0.0] * 4


# --- bad input

X = torch.ones(T, B, M, dtype=torch.float64)
PACKED = pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
RESET = torch.zeros(T, B, dtype=torch.bool)
SIZES = torch.tensor([2, 1])
BAD: dict[str, tuple[object, dict, type[Exception], str]] = {
    "zero": (X, {"lengths": [0, 1, 2, 3]}, ValueError, "lengths must be between 1 and T = 8, got 0 for sequence 0"),
    "long": (X, {"lengths": [1, 2, 3, 9]}, ValueError, "lengths must be between 1 and T = 8, got 9 for sequence 3"),
    "count": (X, {"lengths": [1, 2]}, ValueError, "lengths must have shape [B] = [4], got (2,)"),
    "matrix": (
        X,
        {"lengths": torch.ones(4, 1, dtype=torch.int64)},
        ValueError,
        "lengths must have shape [B] = [4], got (4, 1)",
    ),
    "floats": (X, {"lengths": torch.ones(4)}, TypeError, "lengths must be of an integer dtype, got float32"),
    "float": (X, {"lengths": [1.0] * 4}, TypeError, "lengths must be a list of ints, got [1.0, 1.0, 1.0, 1.0]"),
    "int": (X, {"lengths": 3}, TypeError, "lengths must be a list of ints or a torch.Tensor, got int"),
    "twice": (
        PACKED,
        {"lengths": LENGTHS},
        ValueError,
        "lengths must be None with a PackedSequence, which has its own",
    ),
    "no batch": (
        X[:, 0],
        {"lengths": [8]},
        ValueError,
        "lengths must be None without a batch, with input of shape [T, M]",
    ),
    "reset-dtype": (X, {"reset": RESET.int()}, TypeError, "reset must be of dtype bool, got int32"),
    "reset-list": (X, {"reset": [True]}, TypeError, "reset must be a torch.Tensor, got list"),
    "reset-shape": (X, {"reset": RESET.T}, ValueError, "reset must have shape [T, B] = [8, 4], got (4, 8)"),
    "reset-packed": (PACKED, {"reset": RESET}, ValueError, "reset must have shape [P] = [19], got (8, 4)"),
    "reset-no-batch": (X[:, 0], {"reset": RESET}, ValueError, "reset must have shape [T] = [8], got (8, 4)"),
    "reset-device": (
        X,
        {"reset": RESET.to("meta")},
        ValueError,
        "reset must be on cpu, where the input is, got meta",
    ),
    "M": (
        pack_sequence([X[:, 0, :2]]),
        {},
        ValueError,
        "input must have shape [P, M] where it is packed, with M = 3, got (8, 2)",
    ),
    "rows": (
        PackedSequence(X[:4, 0], SIZES),
        {},
        ValueError,
        "input must have as many rows as its batch_sizes sum up to, 3, got 4",
    ),
    "sizes": (
        PackedSequence(X[:3, 0], SIZES.flip(0)),
        {},
        ValueError,
        "input must have batch_sizes that are positive and never grow, got [1, 2]",
    ),
    "hx": (PACKED, {"hx": 2}, ValueError, "hx must have shape [1, B, N] = [1, 4, 5], got (1, 2, 5)"),
}


@pytest.mark.parametrize("name", BAD)
@over_layers
def test_bad_call(layer, name, monkeypatch):
    """Before anything is computed."""
    sequence, options, kind, text = BAD[name]
    if "hx" in options:
        zeros = torch.zeros(1, options["hx"], N, dtype=torch.float64)
        options, text = {"hx": layer.state([zeros] * layer.states)}, text if layer.states == 1 else f"hx[0]{text[2:]}"
    module = make(layer, {})
    compute: Callable[..., None] = lambda *arguments, **options: pytest.fail("it computes")  # noqa: E731
    monkeypatch.setattr(type(module), "_stack", compute)
    with pytest.raises(kind, match=re.escape(f"nn.{layer.name}: {text}")):
        module(sequence, **options)
