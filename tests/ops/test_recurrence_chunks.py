"""Chunks of time, and blends of displacements and gradients: against sums written out, and by their identities."""

import random

import pytest
import torch
from _cases import matrices
from torch import Tensor

import tp_kernels as tp
from tp_kernels.ops.recurrence import cuda, triton_blocks
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.rules import BackProp, Rule, Sweep, TargetProp

T, B, M, N = 11, 3, 4, 5
OPS = {"rnn_tanh": "rnn", "gru": "gru", "lstm": "lstm"}
over_cells = pytest.mark.parametrize("cell", OPS)


def random_like(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in shapes]


class Layer:
    """A layer's parameters, its input, and what arrives at its outputs."""

    def __init__(self, cell: str, sizes: tuple[int, int, int, int] = (T, B, M, N), seed: int = 0) -> None:
        steps, batch, width, units = sizes
        self.cell, rows, states = cell, CELLS[cell].gates * units, CELLS[cell].states
        self.x, self.weight_ih, self.bias = random_like((steps, batch, width), (rows, width), (rows,), seed=seed)
        self.weight_hh = matrices((rows, units), torch.float64, seed)
        self.starts = random_like(*[(1, batch, units)] * states, seed=seed + 1)
        self.grad, *self.grad_lasts = random_like((steps, batch, units), *[(1, batch, units)] * states, seed=seed + 2)

    def leaves(self) -> list[Tensor]:
        tensors = (self.x, self.weight_ih, self.bias, self.weight_hh, *self.starts)
        return [tensor.clone().requires_grad_() for tensor in tensors]

    def gradients(self, rule: Rule, backend: str, loss: str = "everywhere", **options: object) -> list[Tensor]:
        """In x, W_ih, b, W_hh and the first states."""
        leaves = x, weight_ih, bias, weight_hh, *starts = self.leaves()
        nothing = torch.zeros_like(bias)
        h, lasts, _ = recurrent_layer(
            self.cell,
            x,
            weight_hh,
            *starts,
            weight_ih=weight_ih,
            bias_ih=bias,
            bias_hh=nothing,
            rule=rule,
            backend=backend,
            **options,
        )
        outputs, arriving = list(lasts), list(self.grad_lasts)
        if loss == "everywhere":
            outputs, arriving = [*outputs, h], [*arriving, self.grad]
        return list(torch.autograd.grad(outputs, leaves, arriving))


def assert_equal_to_rounding(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = (one - other).abs().max() / other.abs().max()
        assert error < tolerance, f"gradient {index}: relative error {error:.3g}"


def written_out(layer: Layer, rule: Rule, loss: str) -> list[Tensor]:
    """The gradients of an Elman layer: every displacement a sum over all later steps, every adjoint one over those that
    its chunk knows of.
    """
    sweep, (chunk, overlap) = Sweep.of(rule), (rule.chunk, rule.overlap)
    weight, h = layer.weight_hh, [layer.starts[0][0]]
    for x in layer.x:
        h.append(torch.tanh(x @ layer.weight_ih.T + layer.bias + h[-1] @ weight.T))
    g = layer.grad.clone() if loss == "everywhere" else torch.zeros_like(layer.grad)
    g[-1] += layer.grad_lasts[0][0]
    back = {"identity": torch.eye(N, dtype=torch.float64), "none": torch.zeros_like(weight)}.get(sweep.inverse)
    if back is None:
        back = tp.regularized_inverse(weight, sweep.reg, power=sweep.power)
    powers = [torch.linalg.matrix_power(back, k) for k in range(T)]
    slopes = [1 - state.square() for state in h[1:]]
    sources = []
    for t in range(T):
        displacement = sum(sweep.step * g[s] @ powers[s - t].T for s in range(t, T))
        latched = sum(sweep.step * g[s] for s in range(t, T))
        sources.append(g[t] + sweep.blend * (displacement - g[t]) + sweep.latch * (latched - g[t]))
    deltas = []
    for t in range(T):
        adjoint = torch.zeros_like(g[0])
        for s in range(t, min(T, (t // chunk + 1) * chunk + overlap)):
            part = sources[s]
            for step in range(s, t, -1):
                part = (slopes[step] * part) @ weight
            adjoint += part
        deltas.append(slopes[t] * adjoint)
    delta, before = torch.stack(deltas), torch.stack(h[:-1])
    return [
        delta @ layer.weight_ih,
        torch.einsum("tbn,tbm->nm", delta, layer.x),
        delta.sum((0, 1)),
        torch.einsum("tbn,tbm->nm", delta, before),
        (delta[0] @ weight)[None],
    ]


@pytest.mark.parametrize("loss", ["everywhere", "last"])
@pytest.mark.parametrize(("chunk", "overlap"), [(3, 2), (4, 0), (1, 0), (5, 9), (2, 1), (10, 1), (6, 6)])
@pytest.mark.parametrize(
    "rule",
    [
        BackProp,
        lambda **cut: TargetProp(step=0.7, **cut),
        lambda **cut: TargetProp(inverse="identity", step=1.3, **cut),
        lambda **cut: TargetProp(blend=0.3, latch=0.2, step=0.7, **cut),
        lambda **cut: TargetProp(inverse="identity", blend=0.05, **cut),
    ],
    ids=["bp", "weight", "identity", "weight and latch", "identity blended"],
)
def test_the_truncated_sum(rule, chunk, overlap, loss, backend):
    layer, rule = Layer("rnn_tanh"), rule(chunk=chunk, overlap=overlap)
    # Without a step T there is no state before it: where BP has no source its truncated gradients are zero.
    expected = written_out(layer, rule, loss)
    for found, wanted in zip(layer.gradients(rule, backend, loss), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-11 * wanted.abs().max()


@over_cells
@pytest.mark.parametrize("chunk", [T, T + 1, 100])
def test_a_chunk_of_all_steps_has_the_bits_of_the_whole(cell, chunk, backend):
    layer = Layer(cell)
    for whole, cut in (
        (BackProp(), BackProp(chunk=chunk, overlap=2)),
        (TargetProp(inverse="identity", blend=0.2), TargetProp(inverse="identity", blend=0.2, chunk=chunk)),
    ):
        for found, expected in zip(layer.gradients(cut, backend), layer.gradients(whole, backend), strict=True):
            assert torch.equal(found, expected)


@over_cells
def test_chunks_of_one_step_are_the_local_update(cell, backend):
    layer = Layer(cell)
    found = layer.gradients(TargetProp(inverse="identity", chunk=1), backend)
    expected = layer.gradients(TargetProp(inverse="identity", update="local"), backend)
    starts = len(layer.starts)  # what the first state is sent is λ_0 there, and Jᵀ μ_1 here
    assert_equal_to_rounding(found[:-starts], expected[:-starts])


def test_auto_is_the_stated_formula(backend):
    layer = Layer("rnn_tanh", (60, 2, 3, 4))
    found = layer.gradients(TargetProp(chunk="auto"), backend)
    for one, other in zip(found, layer.gradients(TargetProp(chunk=12, overlap=5), backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 4}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("inverse", ["identity", "weight", "layer", "jacobian"])
@over_cells
def test_a_blend_is_linear(cell, inverse, options, backend):
    """Gradients are ``1 - β - β'`` of back-propagation's, β of the inverse's and β' of identity's."""
    if inverse not in CELLS[cell].inverses or (backend, cell, inverse) == ("cpu", "lstm", "jacobian"):
        pytest.skip(f"{cell} on {backend} has no {inverse!r}")
    layer, shares = Layer(cell), (0.3, 0.0 if inverse == "identity" else 0.2)
    numbers = {"inverse": inverse, "step": 0.7, "clip": 0.1, "rtol": 1e-13}
    found = layer.gradients(TargetProp(blend=shares[0], latch=shares[1], **numbers), backend, **options)
    rules = (BackProp(), TargetProp(**numbers), TargetProp(inverse="identity", step=0.7))
    parts = [layer.gradients(rule, backend, **options) for rule in rules]
    expected = [
        (1 - sum(shares)) * bp + shares[0] * one + shares[1] * other for bp, one, other in zip(*parts, strict=True)
    ]
    assert_equal_to_rounding(found, expected)


@over_cells
def test_a_blend_of_nearly_nothing_is_back_propagation(cell, backend):
    layer = Layer(cell)
    found = layer.gradients(TargetProp(inverse="identity", blend=1e-14), backend)
    assert_equal_to_rounding(found, layer.gradients(BackProp(), backend))


@pytest.mark.parametrize("calls", [1, 2, T])
@over_cells
def test_a_blend_in_several_calls(cell, calls, backend):
    """Both displacements and the adjoint go from call to call."""
    inverse = "weight" if "weight" in CELLS[cell].inverses else "identity"
    torch.manual_seed(0)
    kind = {"rnn_tanh": tp.nn.RNN, "gru": tp.nn.GRU, "lstm": tp.nn.LSTM}[cell]
    rule = TargetProp(inverse=inverse, blend=0.3, latch=0.2)
    module = kind(M, N, rule=rule, backend=backend, dtype=torch.float64)
    x, grad = random_like((T, B, M), (T, B, N))
    results = []
    for pieces in (1, calls):
        state, outputs = None, []
        for part in x.split(-(-T // pieces)):
            output, state = module(part, state)
            outputs.append(output)
        last = state[0] if isinstance(state, tuple) else state
        loss = (torch.cat(outputs) * grad).sum() + last.square().sum()
        results.append(list(torch.autograd.grad(loss, list(module.parameters()))))
    assert_equal_to_rounding(results[1], results[0])


def rule_at_random(numbers: random.Random, cell: str) -> Rule:
    cut = {"chunk": numbers.randint(1, 6), "overlap": numbers.randint(0, 5)} if numbers.random() < 0.7 else {}
    if numbers.random() < 0.2:
        return BackProp(**cut)
    inverses = CELLS[cell].without_states if cut else ("identity", "weight")
    inverse, blend = numbers.choice(inverses), numbers.choice([1.0, 0.3, 0.05])
    latch = 0.0 if inverse == "identity" or blend == 1 else numbers.choice([0.0, 0.5])
    return TargetProp(inverse=inverse, blend=blend, latch=latch, step=numbers.choice([1.0, 0.7]), **cut)


@pytest.mark.parametrize("seed", range(20))
@over_cells
def test_the_cpu_kernels_do_what_the_reference_does(cell, seed, backend):
    """Of any sizes, with heads, resets and gradients of any strides."""
    if backend == "reference":
        pytest.skip("it is what the others are held against")
    numbers = random.Random(seed)
    rule, steps, batch, units = rule_at_random(numbers, cell), *(numbers.randint(1, top) for top in (23, 60, 20))
    heads = [numbers.randint(1, 3)] if numbers.random() < 0.4 else []
    gates, states = CELLS[cell].gates, CELLS[cell].states
    shape = (steps, batch, *heads)
    u, grad, *starts = random_like(
        (*shape, gates * units), (batch, steps, *heads, units), *[(batch, *heads, units)] * states
    )
    weight = 0.5 * matrices((*heads, gates * units, units), torch.float64)
    reset = torch.rand(steps, batch, generator=torch.Generator().manual_seed(seed)) < 0.2
    reset = reset if numbers.random() < 0.5 else None
    everywhere, results = numbers.random() < 0.7, []
    for name in ("reference", backend):
        leaves = [tensor.clone().requires_grad_() for tensor in (u, weight, *starts)]
        hx = leaves[2] if states == 1 else tuple(leaves[2:])
        h, last = getattr(tp, OPS[cell])(*leaves[:2], hx, rule=rule, reset=reset, return_last=True, backend=name)
        lasts = (last,) if states == 1 else last
        loss = sum(part.square().sum() for part in lasts)
        if everywhere:
            loss = loss + (h * grad.transpose(0, 1)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads, backend):
    if backend == "reference":
        pytest.skip("its products are torch's")
    layer = Layer("rnn_tanh", (50, 2, 3, 17))
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(layer.gradients(TargetProp(chunk=4, overlap=2, blend=0.3), backend)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_float32(dtype, backend):
    """Powers of P are computed in double precision: a displacement over many chunks has the digits of a sweep's."""
    kind = tp.nn.RNN(3, 16, rule=TargetProp(chunk=8, overlap=4), backend=backend, dtype=dtype)
    whole = tp.nn.RNN(3, 16, rule=TargetProp(chunk=8, overlap=4), backend="reference", dtype=torch.float64)
    whole.load_state_dict(kind.state_dict())
    x = random_like((300, 1, 3))[0]
    results = []
    for module, given in ((kind, x.to(dtype)), (whole, x)):
        module(given)[1].sum().backward()
        results.append(module.weight_hh_l0.grad.double())
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    assert (results[0] - results[1]).abs().max() <= tolerance * results[1].abs().max()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TargetProp(blend=0), ValueError, "blend must be in"),
        (lambda: TargetProp(blend=1.5), ValueError, "blend must be in"),
        (lambda: TargetProp(blend=float("nan")), ValueError, "blend must be in"),
        (lambda: TargetProp(blend="auto"), TypeError, "blend must be a real number"),
        (lambda: TargetProp(latch=0.1), ValueError, "latch must be in"),
        (lambda: TargetProp(blend=0.5, latch=-0.1), ValueError, "latch must be in"),
        (lambda: TargetProp(inverse="identity", blend=0.5, latch=0.1), ValueError, "latch must be 0"),
        (lambda: TargetProp(blend=0.5, update="local"), ValueError, "update must be 'total' with blend"),
        (
            lambda: TargetProp(inverse="layer", mode="direct", blend=0.5),
            ValueError,
            "mode must be 'linearized' with blend",
        ),
        (lambda: TargetProp(chunk=0), ValueError, "chunk must be at least 1"),
        (lambda: TargetProp(chunk=2.0), TypeError, "chunk must be an int, 'auto' or None"),
        (lambda: TargetProp(chunk=True), TypeError, "chunk must be"),
        (lambda: TargetProp(chunk="all"), TypeError, "chunk must be"),
        (lambda: TargetProp(chunk=3, overlap=-1), ValueError, "overlap must be at least 0"),
        (lambda: TargetProp(overlap=1), ValueError, "overlap must be None without chunk"),
        (lambda: BackProp(overlap=1), ValueError, "overlap must be None without chunk"),
        (lambda: TargetProp(chunk="auto", overlap=3), ValueError, "overlap must be None with chunk='auto'"),
        (lambda: TargetProp(chunk=3, update="local"), ValueError, "update must be 'total' with chunk"),
        (lambda: TargetProp(chunk=3, inverse="layer"), ValueError, "inverse must be 'weight' or 'identity' with chunk"),
        (lambda: tp.nn.GRU(2, 3, rule=TargetProp(chunk=3)), ValueError, "must have as inverse one of 'identity'"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_checkpoints_and_chunks_exclude_each_other(backend):
    module = tp.nn.RNN(2, 3, rule=TargetProp(chunk=3), checkpoint_every=2, backend=backend)
    with pytest.raises(ValueError, match="checkpoint_every must be None with a rule that has chunk"):
        module(torch.randn(5, 1, 2))


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("changes", [{"blend": 0.5}, {"latch": 0.1, "blend": 0.5}, {"chunk": 3}], ids=str)
def test_a_gpu_refuses_what_it_has_no_kernel_for(name, changes, monkeypatch):
    """It would compute the rule without them."""
    module = {"triton": triton_blocks, "cuda": cuda}[name]
    for checked in ("_triton", "_native"):
        if hasattr(module, checked):
            monkeypatch.setattr(getattr(module, checked), "supports" if checked == "_triton" else "cuda_supports", _yes)
    ok, reason = module.supports(torch.empty(1), size=1, sweep=Sweep.of(TargetProp(**changes)))
    assert not ok
    assert "blend, latch or chunk" in reason


def _yes(*arguments: object, **options: object) -> tuple[bool, str]:
    return True, ""
