"""``trace``: every recorded number against NumPy, and that a trace changes nothing but the time a pass takes."""

import dataclasses
import gc
import json
import math
import sys
import weakref

import numpy as np
import pytest
import torch
from _cases import RULES
from _compare import assert_identical, assert_near
from _oracle import SLOPES, displacements, extended, regularized_inverse, rnn_backward
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tp_kernels as tp
from tp_kernels.rules import Sweep
from tp_kernels.trace import Record, Trace, _angle

M, N, T, B = 3, 5, 7, 4
NORMS = ("displacement", "adjoint", "gradient")


def layer_of(rule: object = None, dtype: torch.dtype = torch.float64, **options: object) -> tp.nn.RNN:
    """A layer whose recurrent weight and input saturate some units."""
    torch.manual_seed(1)
    layer = tp.nn.RNN(M, N, rule=rule, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight_ih_l0.mul_(4)
        layer.weight_hh_l0.mul_(2)
    return layer


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, hx, and the gradients that arrive at the two outputs."""
    numbers = torch.Generator().manual_seed(2)
    shapes = ((T, B, M), (1, B, N), (T, B, N), (1, B, N))
    return tuple(torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in shapes)


def step(layer: tp.nn.RNN, sources: str = "both", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs and all gradients of one pass."""
    x, hx, grad, grad_last = inputs(dtype)
    leaves = [x.requires_grad_(), hx.requires_grad_(), *layer.parameters()]
    output, last = layer(x.transpose(0, 1) if layer.batch_first else x, hx)
    if layer.batch_first and output is not None:
        output = output.transpose(0, 1)
    pairs = {"states": [(output, grad)], "last": [(last, grad_last)], "both": [(output, grad), (last, grad_last)]}
    outputs, arriving = zip(*pairs[sources], strict=True)
    grads = torch.autograd.grad(outputs, leaves, arriving)
    return [*(out.detach() for out in (output, last) if out is not None), *grads]


def only_record(layer: tp.nn.RNN, sources: str = "both") -> Record:
    with tp.trace(layer) as trace:
        step(layer, sources)
    (record,) = trace.records
    return record


# --- the numbers


def number(value: float | list[float]) -> Tensor:
    """What a record holds, each number a matrix of its own for the error budget."""
    return torch.tensor(value, dtype=torch.float64).view(-1, 1, 1)


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel(), b.ravel()
    return float(np.degrees(np.arccos(a.dot(b) / np.sqrt(a.dot(a) * b.dot(b)))))


def expected(layer: tp.nn.RNN, sources: str) -> dict[str, object]:
    """All of a record's numbers, from the states of the layer."""
    x, hx, grad, grad_last = inputs()
    h = extended(layer(x, hx)[0])
    g = extended(grad) if sources != "last" else np.zeros_like(h)
    if sources != "states":
        g[-1] += extended(grad_last)[0]
    weight, start, inputs_ = extended(layer.weight_hh_l0), extended(hx)[0], extended(x)
    bias = extended(layer.bias_ih_l0) + extended(layer.bias_hh_l0) if layer.bias else 0
    u = inputs_.dot(extended(layer.weight_ih_l0).T) + bias
    rule, word = layer.rule, layer.nonlinearity
    sweep = Sweep.of(rule, word)
    p = regularized_inverse(weight, rule.reg, rule.power) if sweep.uses_inverse else None
    lam = displacements(g, u, h, start, weight, p, sweep)[1:]
    mu = lam.copy()
    if sweep.update == "total":
        for t in range(T - 2, -1, -1):
            mu[t] += (SLOPES[word](h[t + 1]) * mu[t + 1]).dot(weight)
    gradients = []
    for feedback, own in ((p, sweep), (None, Sweep(word))):
        delta, grad_hh, _ = rnn_backward(g, u, h, start, weight, feedback, own)
        rows = delta.reshape(-1, N)
        biases = [rows.sum(0)] * (2 * layer.bias)
        gradients.append([rows.T.dot(inputs_.reshape(-1, M)), grad_hh, *biases])
    flat = [np.concatenate([part.ravel() for part in parts]) for parts in gradients]
    norms = {name: np.sqrt((v**2).sum(-1)) for name, v in zip(NORMS, (lam, mu, g), strict=True)}
    threshold = rule.clip if isinstance(rule, tp.TargetProp) else 1e-3
    saturated = {"tanh": abs(h) > 1 - threshold, "relu": h == 0, "identity": np.zeros(h.shape, bool)}[word]
    return {
        **{f"{name}_mean": norm.mean(1) for name, norm in norms.items()},
        **{f"{name}_max": norm.max(1) for name, norm in norms.items()},
        "saturated": saturated.mean((1, 2)),
        "angle_weight_ih": degrees(gradients[0][0], gradients[1][0]),
        "angle_weight_hh": degrees(gradients[0][1], gradients[1][1]),
        "angle_all": degrees(*flat),
        "weight_hh_norm": np.sqrt(np.linalg.eigvalsh(weight.T.dot(weight).astype(float))[-1]),
    }


def assert_record(record: Record, answer: dict[str, object]) -> None:
    for name, value in answer.items():
        # Angles and norms of products lose what their terms cancel; 1/(1 - h²) is ill-conditioned.
        assert_near(number(getattr(record, name)), np.reshape(value, (-1, 1, 1)), name, condition=100)


@pytest.mark.parametrize("sources", ["states", "last", "both"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "bp"])
def test_numbers(rule, sources, backend):
    tight = dataclasses.replace(RULES[rule], rtol=1e-14)  # of an iteration, if there is one
    layer = layer_of(tight, backend=backend)
    record = only_record(layer, sources)
    answer = expected(layer, sources)
    assert_record(record, answer)
    assert (record.layer, record.pass_index) == ("", 0)
    if tight.inverse != "jacobian":
        assert record.solver_iterations is None
    elif backend == "reference":  # a direct solve
        assert record.solver_iterations == [0] * T
    else:
        assert all(0 < count <= N + 1 for count in record.solver_iterations)
    assert 0 < sum(record.saturated) < T
    assert answer["angle_all"] > 1  # the rules differ from BP here


@pytest.mark.parametrize(("nonlinearity", "bias"), [("relu", True), ("identity", True), ("tanh", False)])
def test_numbers_of_other_layers(nonlinearity, bias, backend):
    layer = layer_of(tp.TargetProp(), nonlinearity=nonlinearity, bias=bias, backend=backend)
    record = only_record(layer)
    assert_record(record, expected(layer, "both"))
    assert (sum(record.saturated) > 0) == (nonlinearity != "identity")


@pytest.mark.parametrize("sources", ["states", "last", "both"])
def test_back_propagation_is_at_no_angle_to_itself(sources, backend):
    record = only_record(layer_of(tp.BackProp(), backend=backend), sources)
    assert record.angle_weight_ih == record.angle_weight_hh == record.angle_all == 0
    assert record.displacement_mean == record.gradient_mean
    assert record.displacement_max == record.gradient_max
    if sources == "last":
        assert record.gradient_mean[:-1] == [0] * (T - 1)
        assert min(record.adjoint_mean) > 0


def test_angles_near_0_and_180_are_exact():
    """The arc cosine would say 0, or about 1e-6, for each."""
    along, across = torch.tensor([[1.0, 0.0], [0.0, 1e-12]], dtype=torch.float64)
    for vector, answer in ((along + across, math.degrees(1e-12)), (-along, 180.0), (across, 90.0)):
        assert_near(number(_angle([along], [vector])), np.array([[[answer]]]), "angle")
    assert _angle([along], [0 * along]) is None
    assert _angle([along], [along / 0]) is None


@pytest.mark.parametrize("options", [{"batch_first": True}, {"checkpoint_every": 3}, {"checkpoint_every": 50}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_record_in_every_form(rule, options, backend):
    """Another layout, or states that are computed again, in and outside of the trace."""
    plain = only_record(layer_of(RULES[rule], backend=backend))
    found = only_record(layer_of(RULES[rule], backend=backend, **options))
    assert_same_record(found, plain)


def assert_same_record(found: Record, plain: Record) -> None:
    """The same bits; sums in another order only behind the angles."""
    for name, value in vars(plain).items():
        if name.startswith("angle"):
            actual, wanted = number(getattr(found, name)), number(value)
            assert_near(actual, extended(wanted), name, condition=100, scale=1.0)
        else:
            assert getattr(found, name) == value, name


@pytest.mark.parametrize("every", [None, 3])
def test_without_a_sequence(every, backend):
    plain = only_record(layer_of(backend=backend), "last")
    found = only_record(layer_of(backend=backend, return_sequence=False, checkpoint_every=every), "last")
    assert_same_record(found, plain)


def test_without_a_batch(backend):
    x, hx, grad, _ = inputs()
    layer = layer_of(backend=backend)
    with tp.trace(layer) as trace:
        (layer(x[:, 0], hx[:, 0])[0] * grad[:, 0]).sum().backward()
        (layer(x[:, :1], hx[:, :1])[0] * grad[:, :1]).sum().backward()
    one, batch = trace.records
    assert len(one.saturated) == T
    assert vars(one) | {"pass_index": 1} == vars(batch)
    assert one.displacement_mean == one.displacement_max


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    layer = layer_of(tp.TargetProp(update="local")).to(half)
    with tp.trace(layer) as trace:
        step(layer, dtype=half)
    exact = only_record(layer.double())
    found, wanted = (number(record.displacement_mean) for record in (trace.records[0], exact))
    assert_near(found.to(half), extended(wanted), "displacement", condition=4)


def test_numbers_that_overflow(tmp_path):
    """Shown as what they are, and ``null`` in the file: saturated units blow the paper's inverse up."""
    layer = layer_of(tp.TargetProp.paper(reg=1e-4), torch.float32)
    with torch.no_grad():
        layer.weight_ih_l0.mul_(100)
    x = torch.ones(60, B, M)
    with tp.trace(layer) as trace:
        layer(x)[1].sum().backward()
    (record,) = trace.records
    assert not math.isfinite(record.displacement_mean[0])
    assert math.isfinite(record.displacement_mean[-1])
    assert any(1e20 < norm < math.inf for norm in record.displacement_mean)  # its square is infinite in float32
    trace.save(tmp_path / "trace.json")
    (saved,) = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)["records"]
    assert saved["displacement_mean"][0] is None
    assert saved["displacement_mean"][-1] == record.displacement_mean[-1]
    trace.plot(tmp_path / "trace.png")


def test_frozen_parameters(backend):
    """No angle for what is not trained; all together are those that are."""
    layer = layer_of(backend=backend)
    full = only_record_of_training(layer)
    layer.weight_hh_l0.requires_grad_(False)
    record = only_record_of_training(layer)
    assert record.angle_weight_hh is None
    assert record.angle_weight_ih == full.angle_weight_ih
    assert record.angle_all != full.angle_all
    for name in ("bias_ih_l0", "bias_hh_l0"):
        getattr(layer, name).requires_grad_(False)
    assert only_record_of_training(layer).angle_all == record.angle_weight_ih
    layer.weight_ih_l0.requires_grad_(False)
    record = only_record_of_training(layer, inputs()[0].requires_grad_())
    assert record.angle_weight_ih is record.angle_weight_hh is record.angle_all is None
    assert record.adjoint_mean == full.adjoint_mean


def only_record_of_training(layer: tp.nn.RNN, x: Tensor | None = None) -> Record:
    with tp.trace(layer) as trace:
        layer(inputs()[0] if x is None else x)[0].square().sum().backward()
    (record,) = trace.records
    return record


def test_one_frozen_bias_counts_once():
    layer = layer_of(tp.TargetProp())
    both = only_record_of_training(layer)
    layer.bias_hh_l0.requires_grad_(False)
    one = only_record_of_training(layer)
    grads = []
    for rule in (tp.TargetProp(), tp.BackProp()):
        layer.rule = rule
        layer.zero_grad()
        layer(inputs()[0])[0].square().sum().backward()
        named = {name: extended(p.grad).ravel() for name, p in layer.named_parameters() if p.grad is not None}
        grads.append(np.concatenate([named["weight_ih_l0"], named["weight_hh_l0"], named["bias_ih_l0"]]))
    answer = np.array([[[degrees(*grads)]]])
    assert_near(number(one.angle_all), answer, "angle", condition=100)
    assert one.angle_all != both.angle_all


# --- what a trace leaves alone


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_every": 3}, {"batch_first": True}, {"bias": False}, {"return_sequence": False}],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_results_are_the_same_bits(rule, options, dtype, backend):
    layer = layer_of(RULES[rule], dtype, backend=backend, **options)
    sources = "last" if "return_sequence" in options else "both"
    plain = step(layer, sources, dtype)
    state = torch.get_rng_state()
    with tp.trace(layer) as trace:
        traced = step(layer, sources, dtype)
    assert len(trace.records) == 1
    assert torch.equal(torch.get_rng_state(), state)
    for found, wanted in zip(traced, plain, strict=True):
        assert_identical(found, wanted, "result")


def test_the_users_gradients_are_the_same_bits():
    """``.grad`` that adds up over passes, in a model with more than the layer in it."""
    results = []
    for traced in (False, True):
        torch.manual_seed(3)
        model = nn.ModuleDict({"rnn": tp.nn.RNN(M, N), "readout": nn.Linear(N, 2)})
        optimizer = torch.optim.Adam(model.parameters())
        with tp.trace(model) if traced else torch.enable_grad():
            for _ in range(3):
                for x in torch.randn(2, T, B, M):
                    model["readout"](model["rnn"](x)[0]).square().mean().backward()
                optimizer.step()
                grads = [parameter.grad.clone() for parameter in model.parameters()]
                optimizer.zero_grad()
        results.append([*grads, *(parameter.detach() for parameter in model.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_identical(found, wanted, "after training")


def hooks_of(model: nn.Module) -> int:
    return sum(len(hooks) for m in model.modules() for name, hooks in vars(m).items() if name.endswith("_hooks"))


def test_hooks_are_gone_on_exit():
    model = nn.Sequential(layer_of(), nn.Identity())
    with tp.trace(model):
        assert hooks_of(model) == 1
    assert hooks_of(model) == 0
    with pytest.raises(ArithmeticError), tp.trace(model):
        raise ArithmeticError
    assert hooks_of(model) == 0
    tp.trace(model)  # never entered
    assert hooks_of(model) == 0


@pytest.mark.parametrize("failed", [False, True])
def test_a_graph_that_outlives_the_trace_is_not_recorded(failed):
    layer = layer_of()
    try:
        with tp.trace(layer) as trace:
            last = layer(inputs()[0])[1]
            if failed:
                raise ArithmeticError
    except ArithmeticError:
        pass
    last.sum().backward()
    assert trace.records == []
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.parametrize("backward", [False, True])
def test_no_graph_is_kept_alive(backward):
    layer = layer_of()
    gc.disable()
    try:
        with tp.trace(layer) as trace:
            x = inputs()[0].requires_grad_()
            last = layer(x)[1]
            node = last.grad_fn.next_functions[0][0]
            if backward:
                last.sum().backward()
            alive = [weakref.ref(thing) for thing in (x, last, node)]
            del x, last, node
            assert all(reference() is None for reference in alive)
    finally:
        gc.enable()
    assert len(trace.records) == backward


def test_nothing_piles_up():
    """Hooks of the graphs that are gone are forgotten, not kept until the end of a long training."""
    layer = layer_of()

    def handles() -> int:
        return sum(type(thing) is torch.utils.hooks.RemovableHandle for thing in gc.get_objects())

    with tp.trace(layer, every=100):
        layer(inputs()[0])[1].sum().backward()
        before = handles()
        for _ in range(20):
            layer(inputs()[0])[1].sum().backward()
        assert handles() == before


def test_two_runs_give_the_same_records():
    assert vars(only_record(layer_of())) == vars(only_record(layer_of()))


def test_under_autocast(backend):
    layer = layer_of(dtype=torch.float32, backend=backend)
    records = []
    for enabled in (False, True):
        with tp.trace(layer) as trace, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(inputs(torch.float32)[0])[0].sum().backward()
        records += trace.records
    assert vars(records[0]) == vars(records[1])


def test_another_hook_may_change_the_output():
    layer = layer_of()
    layer.register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1].tanh()))
    with tp.trace(layer) as trace:
        layer(inputs()[0])[0].sum().backward()
    assert trace.records[0].gradient_mean == [2 * N**0.5] * T


# --- which passes


class Model(nn.Module):
    """Two layers of different sizes, one of them used twice, and what is no layer of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([tp.nn.RNN(M, N), nn.RNN(N, N)])
        self.head = tp.nn.RNN(N, N, rule=tp.BackProp())
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.head(self.blocks[1](self.blocks[0](x)[0])[0])[0])[1]


def test_layers_and_passes():
    model = Model()
    with tp.trace(model) as trace:
        for length in (3, 5):
            model(torch.randn(length, B, M)).sum().backward()
    found = [(record.layer, record.pass_index, len(record.saturated)) for record in trace.records]
    head, first = "head", "blocks.0"
    assert found == [(head, 0, 3), (head, 1, 3), (first, 0, 3), (head, 2, 5), (head, 3, 5), (first, 1, 5)]
    assert {record.angle_all for record in trace.records if record.layer == head} == {0}


def test_every():
    layer = layer_of()
    records = []
    for every in (1, 3):
        with tp.trace(layer, every=every) as trace:
            for size in range(1, 8):
                layer(size * inputs()[0])[1].sum().backward()
        records.append(trace.records)
    assert [record.pass_index for record in records[1]] == [0, 3, 6]
    assert [vars(record) for record in records[0][::3]] == [vars(record) for record in records[1]]


def test_what_is_a_pass():
    """Backward decides: a second one is a pass of its own, and a forward without gradients or without data is none."""
    layer = layer_of()
    x = inputs()[0]
    with tp.trace(layer) as trace:
        with torch.no_grad():
            layer(x)
        layer(x)
        assert trace.records == []
        layer(x[:, :0])[0].sum().backward()
        assert trace.records == []
        last = layer(x)[1]
        last.sum().backward(retain_graph=True)
        last.sum().backward()
        torch.autograd.grad(layer(x)[1].sum(), layer.weight_hh_l0)
    assert [record.pass_index for record in trace.records] == [0, 1, 2]
    first, second, third = (vars(record) | {"pass_index": None} for record in trace.records)
    assert first == second
    assert third["adjoint_mean"] == first["adjoint_mean"]
    assert third["angle_weight_hh"] == first["angle_weight_hh"]


def test_the_rule_of_the_forward_pass_counts():
    layer = layer_of(tp.TargetProp(clip=0.5))
    with tp.trace(layer) as trace:
        output = layer(inputs()[0])[0]
        layer.rule = tp.BackProp()
        output.sum().backward()
    layer.rule = tp.TargetProp(clip=0.5)
    with tp.trace(layer) as plain:
        layer(inputs()[0])[0].sum().backward()
    assert vars(trace.records[0]) == vars(plain.records[0])
    assert trace.records[0].angle_all > 0


# --- what comes out


def short_trace(model: nn.Module | None = None, passes: int = 3) -> Trace:
    model = model or layer_of()
    with tp.trace(model) as trace:
        for _ in range(passes):
            sum(output.sum() for output in model(torch.randn(T, B, M, dtype=next(model.parameters()).dtype))).backward()
    return trace


def test_json(tmp_path):
    trace = short_trace()
    trace.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)
    assert saved == trace.to_dict()
    assert [Record(**record) for record in saved["records"]] == trace.records
    trace.save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_text() == (tmp_path / "trace.json").read_text()


def test_picture(tmp_path):
    trace = short_trace(Model())
    trace.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    Trace([record for record in trace.records if record.layer == "head"]).plot(str(tmp_path / "one.svg"))
    assert (tmp_path / "one.svg").stat().st_size


def test_picture_shows_the_numbers():
    trace = short_trace()
    axes = Figure().subplots(2, 2)
    trace.plot(axes)
    norms, saturation, angles, spectral = axes.ravel()
    last = trace.records[-1]
    drawn = {line.get_label(): list(line.get_ydata()) for line in norms.lines}
    assert drawn == {
        "‖λ‖ displacement": last.displacement_mean,
        "‖μ‖ adjoint": last.adjoint_mean,
        "‖g‖ gradient": last.gradient_mean,
    }
    assert norms.get_yscale() == "log"
    assert list(norms.lines[0].get_xdata()) == list(range(1, T + 1))
    assert list(saturation.lines[0].get_ydata()) == [100 * share for share in last.saturated]
    assert list(angles.lines[2].get_ydata()) == [record.angle_all for record in trace.records]
    assert list(angles.lines[2].get_xdata()) == [0, 1, 2]
    assert list(spectral.lines[0].get_ydata()) == [record.weight_hh_norm for record in trace.records]
    assert all(axis.get_title() and axis.get_xlabel() and axis.get_ylabel() for axis in axes.ravel())


def test_bad_picture(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="record") as caught:
        Trace().plot(tmp_path / "trace.png")
    assert str(caught.value) == "Trace.plot: there must be at least one record, got none"
    trace = short_trace()
    with pytest.raises(ValueError, match="axes") as caught:
        trace.plot(Figure().subplots(1, 2))
    assert str(caught.value) == "Trace.plot: where must have 4 axes a layer, 4, got 2"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as caught:
        trace.plot(tmp_path / "trace.png")
    assert str(caught.value) == "Trace.plot: matplotlib is not installed: pip install 'tp_kernels[regimes]'"


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((torch.ones(2),), TypeError, "model must be a torch.nn.Module, got Tensor"),
        ((nn.RNN(M, N),), ValueError, "model must have a tp_kernels.nn.RNN in it, got a RNN without one"),
        ((nn.Sequential(),), ValueError, "model must have a tp_kernels.nn.RNN in it, got a Sequential without one"),
        ((tp.nn.RNN(M, N), 0), ValueError, "every must be at least 1, got 0"),
        ((tp.nn.RNN(M, N), 1.0), TypeError, "every must be an int, got float"),
        ((tp.nn.RNN(M, N), True), TypeError, "every must be an int, got bool"),
    ],
)
def test_bad_call(arguments, kind, text):
    """Raised by the call itself, before the context is entered."""
    with pytest.raises(kind) as caught:
        tp.trace(*arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == f"trace: {text}"


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph):
    """An error, not an empty trace, whether it was compiled before or not."""
    torch._dynamo.reset()  # what it remembers of this code from other tests
    layer = layer_of()
    compiled = torch.compile(layer, backend="eager", fullgraph=fullgraph)
    text = "trace: layer '' cannot be traced under torch.compile: call the model that was compiled"
    for _ in range(2):
        with tp.trace(layer), pytest.raises(RuntimeError, match=text):
            compiled(inputs()[0])
        compiled(inputs()[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_torchs_own_checkpoints(use_reentrant):
    """Those that are not reentrant give the saved tensors once, to backward itself: an error that says so."""
    layer, x = layer_of(), inputs()[0].requires_grad_()
    with tp.trace(layer) as trace:
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
        if use_reentrant:
            output.sum().backward()
            assert len(trace.records) == 1
        else:
            with pytest.raises(RuntimeError, match=r"trace: layer '' .* torch\.utils\.checkpoint.*checkpoint_every=k"):
                output.sum().backward()
