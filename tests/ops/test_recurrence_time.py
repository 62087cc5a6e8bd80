"""Sequences of several lengths, read from either end, that start anew on the way: of every cell, on every back-end.

The oracle packs nothing: it calls the function for each sequence by itself, once for each part between two resets,
turned round where it is read in reverse.
"""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from _cases import RULES, Case, Inputs, rules_of
from _checks import (
    Back,
    assert_same_bits,
    assert_same_numbers,
    at_least_2d,
    forward_arguments,
    layer,
    leaves_of,
    parts_of,
    supports,
)
from _compare import assert_near
from _oracle import extended
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import tp_kernels as tp
from tp_kernels.ops.recurrence import op, parallel
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.rules import Rule, Sweep

ops = torch.ops.tp_kernels
DOUBLE = torch.float64
KINDS = ("rnn_tanh", "gru", "lstm")
FEW = ("bp", "weight-total", "layer-local", "jacobian-total", "identity-local", "direct-total")
LENGTHS = (7, 5, 5, 1)


@dataclass(frozen=True)
class Question:
    """A call of a layer, [T, B, M], or without a projection of an op, [T, B(, H), G N], and the gradients that arrive.
    With ``lengths``, the longest first, x is packed; ``None``: all are of length T.
    """

    cell: str
    rule: Rule
    leaves: dict[str, Tensor]
    lengths: tuple[int, ...] | None
    reset: Tensor | None
    reverse: bool
    arrives: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        cell: str,
        rule: Rule,
        *,
        T: int = 7,
        B: int = 4,
        M: int | None = 3,
        N: int = 5,
        H: int | None = None,
        lengths: tuple[int, ...] | None = None,
        resets: float = 0.25,
        reverse: bool = False,
        start: bool = True,
        dtype: torch.dtype = DOUBLE,
        seed: int = 0,
    ) -> "Question":
        """Without M there is no projection; ``resets``: how often."""
        numbers = torch.Generator().manual_seed(seed)
        wide, S, heads = CELLS[cell].gates * N, CELLS[cell].states, () if H is None else (H,)
        steps = (T, B) if lengths is None else (sum(lengths),)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=numbers, dtype=DOUBLE).to(dtype)

        layers = () if M is None else (1,)
        leaves = {"x": randn(*steps, *heads, wide if M is None else M), "weight_hh": 0.5 * randn(*heads, wide, N)}
        if M is not None:
            leaves |= {"weight_ih": randn(wide, M), "bias_ih": randn(wide), "bias_hh": randn(wide)}
        if start:
            leaves["start"] = randn(*layers, B, *heads, S * N)
        arrives = {"h": randn(*steps, *heads, N), "last": randn(*layers, B, *heads, S * N)}
        arrives["relay"] = randn(2, B, *heads, S * N)
        reset = torch.rand(steps, generator=numbers) < resets if resets else None
        return cls(cell, rule, leaves, lengths, reset, reverse, arrives)

    @property
    def sizes(self) -> Tensor | None:
        """Of the batch at each step."""
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(max(self.lengths))])

    @property
    def time(self) -> tuple[Tensor | None, Tensor | None, bool]:
        """As the ops take it."""
        return self.sizes, self.reset, self.reverse

    def rows(self, array: Tensor, sequence: int) -> Tensor:
        """Of one sequence, in the order of time."""
        if self.lengths is None:
            return array[:, sequence]
        firsts = [0, *self.sizes.cumsum(0).tolist()]
        return torch.stack([array[firsts[t] + sequence] for t in range(self.lengths[sequence])])

    def call(self, leaves: dict[str, Tensor], **options: object) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """h, the last state, all parts, and the relay."""
        given = {name: leaves.get(name) for name in ("weight_ih", "bias_ih", "bias_hh")}
        start = parts_of(self.cell, leaves.get("start"))
        h, last, relay = recurrent_layer(
            self.cell, leaves["x"], leaves["weight_hh"], *start, rule=self.rule, **given, **options
        )
        return h, torch.cat(last, dim=-1), relay

    def together(self, sequence: bool = True, **options: object) -> dict[str, Tensor]:
        """In one call: states and gradients."""
        leaves = fresh(self.leaves)
        sizes, reset, reverse = self.time
        given = {"batch_sizes": sizes, "reset": reset, "reverse": reverse, "return_sequence": sequence}
        h, last, relay = self.call(leaves, **given, **options)
        assert (h is not None) == sequence
        return found(leaves, {"h": h, "last": last, "relay": relay}, self.arrives)

    def alone(self, sequence: bool = True, **options: object) -> dict[str, Tensor]:
        """The same by the reference, each sequence by itself and piece by piece."""
        leaves = fresh(self.leaves)
        parameters = {name: leaf for name, leaf in leaves.items() if name not in ("x", "start")}
        outputs, arrives = {}, {}
        for b in range(self.arrives["relay"].shape[1]):
            x, grad_h = self.rows(leaves["x"], b), self.rows(self.arrives["h"], b)
            reset = torch.zeros(len(x), dtype=torch.bool) if self.reset is None else self.rows(self.reset, b)
            if self.reverse:
                x, grad_h, reset = x.flip(0), grad_h.flip(0), reset.flip(0)
            cuts = [t for t in range(len(x)) if t == 0 or reset[t]]
            for first, end in zip(cuts, [*cuts[1:], len(x)], strict=True):
                given = parameters | {"x": x[first:end, None]}
                if first == 0 and not reset[0] and "start" in leaves:
                    given["start"] = self.of_sequences(leaves["start"], slice(b, b + 1))
                outputs[f"h {b} {first}"], last, relay = self.call(given, backend="reference", **options)
                arrives[f"h {b} {first}"] = grad_h[first:end, None]
            outputs |= {f"last {b}": last, f"relay {b}": relay}
            arrives |= {f"last {b}": self.of_sequences(self.arrives["last"], slice(b, b + 1))}
            arrives |= {f"relay {b}": self.arrives["relay"][:, b : b + 1]}
        if not sequence:
            outputs = {name: None if name.startswith("h") else output for name, output in outputs.items()}
        return found(leaves, outputs, arrives)

    def of_sequences(self, state: Tensor, some: slice | Tensor) -> Tensor:
        return state[:, some] if "weight_ih" in self.leaves else state[some]


def fresh(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}


def found(
    leaves: dict[str, Tensor], outputs: dict[str, Tensor | None], arrives: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients, and the states in the order of ``outputs``, one after another."""
    outputs = {name: output for name, output in outputs.items() if output is not None}
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [arrives[name] for name in outputs], materialize_grads=True
    )
    states = {name: output.detach() for name, output in outputs.items() if not name.startswith("relay")}
    return states | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same_answers(question: Question, actual: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    """Of one call and of all those of single sequences."""
    B = question.arrives["relay"].shape[1]
    for b in range(B):
        if "h" in actual:
            h = question.rows(actual["h"], b)
            pieces = [state[:, 0] for name, state in alone.items() if name.startswith(f"h {b} ")]
            expected = torch.cat(pieces)
            assert_near(h, extended(expected.flip(0) if question.reverse else expected), f"h of sequence {b}")
        last = question.of_sequences(actual["last"], slice(b, b + 1))
        assert_near(last, extended(alone[f"last {b}"]), f"last state of sequence {b}")
    for name in (name for name in actual if name.startswith("grad_")):
        assert_near(at_least_2d(actual[name]), extended(at_least_2d(alone[name])), name, condition=100)


def tamed(cell: str, name: str) -> Rule:
    """Displacements that do not grow, as the rules of the GRU with "layer" let them, and solves that are exact."""
    if name == "bp":
        return RULES[name]
    rule = RULES[name]
    clip = 0.2 if rule.inverse == "layer" else rule.clip
    return tp.TargetProp(rule.reg, rule.inverse, rule.update, rule.mode, rule.power, rule.step, clip, 1e-13)


@pytest.mark.parametrize(("every", "portion"), [(None, 99), (5, 2)])
@pytest.mark.parametrize(("cell", "rule"), [(cell, rule) for cell in KINDS for rule in FEW if rule in rules_of(cell)])
def test_each_sequence_is_a_call_of_its_own(cell, rule, every, portion, monkeypatch):
    """With a loss on every h, on the last states, and with what a later call sends back. Of the reference, with which
    the native kernels are compared below.
    """
    monkeypatch.setattr(op, "_portion", lambda *sizes: portion)
    for lengths in (LENGTHS, None):
        for reverse in (False, True):
            question = Question.of(cell, tamed(cell, rule), lengths=lengths, reverse=reverse)
            assert question.reset.any()
            actual = question.together(checkpoint_every=every, backend="reference")
            assert_same_answers(question, actual, question.alone())


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", KINDS)
def test_a_loss_on_the_last_states_alone(cell, reverse, every):
    """They end at several steps."""
    question = Question.of(cell, RULES["weight-total"], lengths=LENGTHS, reverse=reverse)
    actual = question.together(sequence=False, checkpoint_every=every, backend="reference")
    assert_same_answers(question, actual, question.alone(sequence=False))


@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("cell", KINDS)
def test_reset_of_the_functions(cell, H, backend):
    """A call with resets is one call for each part of each sequence, in each head."""
    case = Case(T=6, B=2, N=5, H=H, cell=cell)
    cuts = ((0, 2, 6), (0, 3, 4, 6))  # of each sequence
    reset = torch.zeros(case.T, case.B, dtype=torch.bool)
    for b, times in enumerate(cuts):
        reset[list(times[1:-1]), b] = True
    results = []
    for together in (True, False):
        inputs = case.tensors(DOUBLE)
        leaves = leaves_of(inputs)
        if together:
            h = layer(case, inputs, reset=reset, backend=backend)
        else:
            columns = []
            for b, times in enumerate(cuts):
                here, pieces = slice(b, b + 1), []
                for first, end in itertools.pairwise(times):
                    start = inputs.h0[here] if first == 0 else None
                    given = Inputs(inputs.u[first:end, here], inputs.weight, inputs.bias, start)
                    pieces.append(layer(case, given, backend="reference"))
                columns.append(torch.cat(pieces))
            h = torch.cat(columns, dim=1)
        grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(DOUBLE))
        results.append({"h": h.detach(), **dict(zip(leaves, grads, strict=True))})
    assert_same_numbers(*results, condition=20)


@pytest.mark.parametrize("cell", KINDS)
def test_the_native_kernels_are_the_reference(cell, cpu, monkeypatch):
    """Random lengths, resets, directions, heads, portions, checkpoints and threads."""
    numbers = random.Random(0)
    names = [name for name in rules_of(cell) if supports(cell, Sweep.of(RULES[name]), "cpu")[0]]
    for seed in range(60):
        T, B, packed = numbers.randint(1, 9), numbers.choice([1, 2, 7, 20, 60]), numbers.random() < 0.7
        lengths = tuple(sorted((numbers.randint(1, T) for _ in range(B)), reverse=True)) if packed else None
        M = numbers.choice([None, 1, 9])
        question = Question.of(
            cell,
            tamed(cell, numbers.choice(names)),
            T=T,
            B=B,
            M=M,
            H=numbers.choice([None, 2]) if M is None else None,
            N=numbers.randint(1, 20),
            lengths=lengths,
            resets=numbers.choice([0, 0.2, 0.9]),
            reverse=numbers.random() < 0.5,
            start=packed or numbers.random() < 0.7,
            seed=seed,
        )
        portion = numbers.choice([1, 2, 4, 99])
        monkeypatch.setattr(op, "_portion", lambda *sizes, portion=portion: portion)
        torch.set_num_threads(numbers.choice([1, 2, 3]))
        options = {"checkpoint_every": numbers.choice([None, None, 1, 3]), "sequence": numbers.random() < 0.7}
        actual, expected = (question.together(backend=name, **options) for name in ("cpu", "reference"))
        condition = 1000.0 if Sweep.of(question.rule).inverse == "jacobian" else 100.0
        assert_same_numbers(actual, expected, condition)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rule", ["bp", "weight-total"])
@pytest.mark.parametrize("cell", KINDS)
def test_a_sequence_does_not_depend_on_others(cell, rule, reverse, cpu):
    """To the bit, whatever is beside it in a tile, and with any number of threads."""
    lengths = tuple(sorted((1 + 7 * b % 9 for b in range(60)), reverse=True))
    given = {"M": None, "N": 17, "reverse": reverse, "dtype": torch.float32}
    question = Question.of(cell, RULES[rule], B=60, lengths=lengths, **given)
    some = [0, 7, 8, 31, 47, 48, 59]
    few = Question.of(cell, RULES[rule], B=len(some), lengths=tuple(lengths[b] for b in some), **given)
    rows = torch.tensor([[b < size for size in question.sizes.tolist()] for b in range(60)])  # [B, T]
    numbers = torch.full(rows.shape, -1)
    numbers.T[rows.T] = torch.arange(len(question.leaves["x"]))
    kept = numbers[some].T.flatten()
    kept = kept[kept >= 0]
    few = Question(
        cell,
        few.rule,
        question.leaves | {"x": question.leaves["x"][kept], "start": question.leaves["start"][some]},
        few.lengths,
        question.reset[kept],
        reverse,
        {"h": question.arrives["h"][kept], "last": question.arrives["last"][some]}
        | {"relay": question.arrives["relay"][:, some]},
    )
    matrix = {} if rule != "weight-total" else {"feedback": 0.2 * torch.randn(17, 17)}
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(question.together(backend="cpu", **matrix))
        answers[-1].pop("grad_weight_hh")  # a sum over all, by torch
    alone = few.together(backend="cpu", **matrix)
    alone.pop("grad_weight_hh")
    for other in answers[1:]:
        assert_same_bits(other, answers[0])
    of_some = {name: tensor[kept if name in ("h", "grad_x") else some] for name, tensor in answers[0].items()}
    assert_same_bits(of_some, alone)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", KINDS)
def test_not_even_nan_crosses_a_reset(cell, reverse, backend):
    """Neither forwards nor backwards, nor to another sequence. The gradient in W is a sum over all."""
    question = Question.of(cell, RULES["weight-total"], M=None, reverse=reverse, resets=0)
    reset = torch.zeros(7, 4, dtype=torch.bool)
    reset[3, 1] = True
    x, arrives = question.leaves["x"], question.arrives["h"].clone()
    x = x.clone()
    first, second = (1, 5) if not reverse else (5, 1)
    x[first, 1, 0] = torch.nan
    bad = Question(cell, question.rule, question.leaves | {"x": x}, None, reset, reverse, question.arrives)
    clean = Question(cell, question.rule, question.leaves, None, reset, reverse, question.arrives)
    matrix = {"feedback": 0.2 * torch.randn(5, 5, dtype=DOUBLE)}
    wrong, right = (asked.together(backend=backend, **matrix) for asked in (bad, clean))
    after = torch.ones(7, 4, dtype=torch.bool)
    after[(slice(0, 3) if not reverse else slice(4, 7)), 1] = False
    if reverse:
        after[3, 1] = True
    assert not wrong["h"][~after].isfinite().all()
    for name in ("h", "grad_x"):
        assert_near(wrong[name][after], extended(right[name][after]), name)
    arrives[second, 1, 0] = torch.nan
    arrived = Question(cell, question.rule, question.leaves, None, reset, reverse, question.arrives | {"h": arrives})
    wrong = arrived.together(backend=backend, **matrix)
    assert not wrong["grad_x"][second, 1].isfinite().all()
    assert_near(wrong["grad_x"][~after], extended(right["grad_x"][~after]), "grad_x")
    assert_near(wrong["grad_start"], extended(right["grad_start"]), "grad_start")


@pytest.mark.parametrize("cell", KINDS)
def test_opcheck(cell, backend):
    """Packed, with resets, in reverse: with a projection and checkpoints, and without."""
    question = Question.of(cell, tp.TargetProp(), lengths=LENGTHS, reverse=True, dtype=torch.float32)
    x, weight, start = (question.leaves[name] for name in ("x", "weight_hh", "start"))
    projection = {name: question.leaves[name] for name in ("weight_ih", "bias_ih")}
    given = {"time": question.time, "backend": backend}
    biased = cell, x, weight, question.leaves["bias_hh"], start
    for every, sequence in ((None, True), (3, True), (3, False)):
        options = {"every": every, "sequence": sequence, **projection}
        torch.library.opcheck(ops.recurrence_fwd, forward_arguments(*biased, **options, **given))
    sweep = Sweep("weight")
    arguments = forward_arguments(*biased, **projection, **given)
    h, _, _, kept, _ = ops.recurrence_fwd(*arguments)
    ends = ops.recurrence_fwd(*forward_arguments(*biased, every=3, **projection, **given))[2]
    last, feedback = question.arrives["last"], 0.2 * torch.randn(5, 5)
    back = Back(cell, h, weight, kept if kept.dim() > 1 else None, question.arrives["h"], last, x, start, feedback)
    options = {"bias_hh": question.leaves["bias_hh"], "sums": True, **projection, **given}
    torch.library.opcheck(ops.recurrence_bwd, back.arguments(sweep, **options))
    anew = back.with_(h=ends, kept=None)
    torch.library.opcheck(ops.recurrence_bwd, anew.arguments(sweep, every=3, **options))


@pytest.mark.parametrize(
    ("cell", "rule", "dynamic"),
    [("rnn_tanh", "weight-total", False), ("gru", "bp", True), ("lstm", "weight-total", True)],
)
def test_compile(cell, rule, dynamic, backend):
    """Of packed sequences, without a break of the graph; ``dynamic``: of other sizes without compiling anew."""
    torch._dynamo.reset()

    def function(leaves: dict[str, Tensor], sizes: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        given = {"batch_sizes": sizes, "reset": reset, "reverse": True, "backend": backend}
        h, last, _ = Question.call(question, leaves, **given)
        return 2 * h, last

    compiled, stance = torch.compile(function, fullgraph=True, dynamic=dynamic), "default"
    for lengths in (LENGTHS, (9, 8, 8, 3, 2)) if dynamic else (LENGTHS,):
        question = Question.of(cell, RULES[rule], B=len(lengths), lengths=lengths, dtype=torch.float32)
        results = []
        for called in (compiled, function):
            leaves = fresh(question.leaves)
            with torch.compiler.set_stance(stance if called is compiled else "default"):
                h, last = called(leaves, question.sizes, question.reset)
            results.append(found(leaves, {"h": h, "last": last}, question.arrives))
        assert_same_numbers(*results)
        stance = "fail_on_recompile"


@pytest.mark.parametrize("what", ["batch_sizes", "reset", "reverse"])
def test_displacements_at_once_are_refused(what, monkeypatch):
    """Before anything is computed."""
    question = Question.of("rnn_tanh", tp.TargetProp(), lengths=LENGTHS)
    given = {"batch_sizes": question.sizes, "reset": question.reset, "reverse": True}
    monkeypatch.setattr(op, "backends", None)
    with pytest.raises(ValueError, match="displacements") as caught:
        question.call(question.leaves, displacements="parallel", **{what: given[what]})
    assert str(caught.value) == (
        "rnn: displacements must be 'auto' or 'sweep' with lengths, reset or reverse, got 'parallel'"
    )


@pytest.mark.parametrize(
    "given", [{"lengths": LENGTHS, "resets": 0}, {"resets": 0.3}, {"resets": 0, "reverse": True}], ids=str
)
def test_displacements_are_swept_where_they_cannot_be_had_at_once(given, backend, monkeypatch):
    """Also where that would be worth it."""
    question = Question.of("rnn_tanh", tp.TargetProp(), **given)
    expected = question.together(displacements="sweep", backend=backend)
    monkeypatch.setattr(parallel, "worth_it", lambda *arguments: True)
    assert_same_bits(question.together(displacements="auto", backend=backend), expected)


BAD_RESETS = {
    "list": ([True], TypeError, "reset must be a torch.Tensor, got list"),
    "int": (torch.zeros(4, 3, dtype=torch.int64), TypeError, "reset must be of dtype bool, got int64"),
    "shape": (
        torch.zeros(3, 4, dtype=torch.bool),
        ValueError,
        "reset must have shape [T, B] = [4, 3], got (3, 4)",
    ),
    "device": (
        torch.zeros(4, 3, dtype=torch.bool, device="meta"),
        ValueError,
        "reset must be on cpu, where the input is, got meta",
    ),
}


@pytest.mark.parametrize("what", BAD_RESETS)
@pytest.mark.parametrize("cell", KINDS)
def test_bad_reset(cell, what, monkeypatch):
    """Type and text; nothing is computed."""
    reset, kind, text = BAD_RESETS[what]
    case = Case(T=4, B=3, N=5, cell=cell)
    monkeypatch.setattr(op, "backends", None)
    with pytest.raises(kind) as caught:
        layer(case, case.tensors(torch.float32), reset=reset)
    assert type(caught.value) is kind
    assert str(caught.value) == f"{case.op}: {text}"


def test_rows_of_the_oracle_are_those_of_torch():
    """Where it looks for a sequence's rows."""
    x = torch.randn(7, 4, 3)
    packed = pack_padded_sequence(x, LENGTHS)
    question = Question.of("rnn_tanh", tp.BackProp(), lengths=LENGTHS)
    assert torch.equal(question.sizes, packed.batch_sizes)
    for b, length in enumerate(LENGTHS):
        assert torch.equal(question.rows(packed.data, b), x[:length, b])
