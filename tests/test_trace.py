"""``trace``: every recorded number against its definition, and that a trace changes nothing but time."""

import dataclasses
import gc
import json
import math
import sys
import weakref
from collections.abc import Callable

import _oracle_recurrence as oracle
import numpy as np
import pytest
import torch
from _cases import RULES
from _compare import assert_identical, assert_near
from _modules import LAYERS, LAYERS_AND_RULES, B, Layer, M, N, T, data
from _oracle import extended, regularized_inverse
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.rules import Sweep
from tp_kernels.trace import Record, Trace, _angle

NORMS = ("displacement", "adjoint", "gradient")
RNN, GRU = LAYERS[:2]
over_layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
over_rules = pytest.mark.parametrize(("kind", "rule"), LAYERS_AND_RULES, ids=str)


def layer_of(
    rule: object = None, dtype: torch.dtype = torch.float64, kind: Layer = RNN, **options: object
) -> Recurrent:
    """A layer whose recurrent weight and input saturate some units."""
    layer = kind.make(rule=rule, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight_ih_l0.mul_(4)
        layer.weight_hh_l0.mul_(2)
    return layer


def step(layer: Recurrent, sources: str = "both", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs and all gradients of one pass."""
    x, hx, grad, grad_last = data(dtype)
    leaves = [x.requires_grad_(), hx.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    output, last = layer(x.transpose(0, 1) if layer.batch_first else x, hx)
    if layer.batch_first and output is not None:
        output = output.transpose(0, 1)
    pairs = {"states": [(output, grad)], "last": [(last, grad_last)], "both": [(output, grad), (last, grad_last)]}
    outputs, arriving = zip(*pairs[sources], strict=True)
    grads = torch.autograd.grad(outputs, leaves, arriving)
    return [*(out.detach() for out in (output, last) if out is not None), *grads]


def only_record(layer: Recurrent, sources: str = "both") -> Record:
    with tp.trace(layer) as trace:
        step(layer, sources)
    (record,) = trace.records
    return record


# --- the numbers


def number(value: float | list[float]) -> Tensor:
    """What a record holds, each number a matrix of its own for the error budget."""
    return torch.tensor(value, dtype=torch.float64).view(-1, 1, 1)


def degrees(gradients: list[Tensor], others: list[Tensor]) -> float:
    a, b = (np.concatenate([extended(gradient).ravel() for gradient in of]) for of in (gradients, others))
    return float(np.degrees(np.arccos(a.dot(b) / np.sqrt(a.dot(a) * b.dot(b)))))


def step_of(layer: Recurrent) -> Callable[[Tensor, Tensor], Tensor]:
    """One time step by the cell of ``torch.nn``, from x_t and h_{t-1}, with gradients in the layer's parameters."""
    if getattr(layer, "nonlinearity", "") == "identity":
        bias = layer.bias_ih_l0 + layer.bias_hh_l0
        return lambda x, before: x @ layer.weight_ih_l0.mT + bias + before @ layer.weight_hh_l0.mT
    words = {"nonlinearity": layer.nonlinearity} if isinstance(layer, tp.nn.RNN) else {}
    cell = getattr(nn, f"{type(layer).__name__}Cell")(M, N, bias=layer.bias, **words)
    named = {name.removesuffix("_l0"): parameter for name, parameter in layer.named_parameters()}
    return lambda x, before: torch.func.functional_call(cell, named, (x, before))


def oracle_of(layer: Recurrent, t: int, before: Tensor, h: Tensor) -> oracle.ElmanStep | oracle.GRUStep:
    """Step t of the layer, in extended precision."""
    kind = next(kind for kind in LAYERS if kind.ours is type(layer))
    u, bias = kind.projected(layer, data(torch.float64)[0][t])
    return oracle.step_of(layer._cell.name, *map(extended, (u, layer.weight_hh_l0, bias, before, h)))


def inverses_of(layer: Recurrent, rule: tp.TargetProp) -> np.ndarray:
    """P of the blocks of the recurrent weight that the rule inverts."""
    blocks = extended(layer.weight_hh_l0.unflatten(0, (-1, N)).squeeze(0))
    inverted = blocks[-1] if rule.inverse == "weight" and blocks.ndim == 3 else blocks
    return regularized_inverse(inverted, rule.reg, rule.power)


def sweep_of(layer: Recurrent, rule: object, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """λ and μ, [T, B, N], and the gradients in the parameters: Jacobians and gradients of a step by autograd."""
    x, hx, *_ = data(torch.float64)
    h, cell, parameters = layer(x, hx)[0].detach(), step_of(layer), list(layer.parameters())
    lam, mu = torch.zeros(2, T, B, N, dtype=torch.float64)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    carried = through = torch.zeros(B, N, dtype=torch.float64)
    target_prop = isinstance(rule, tp.TargetProp)
    for t in range(T - 1, -1, -1):
        before = h[t - 1] if t else hx[0]
        jacobian = torch.autograd.functional.jacobian(lambda state, t=t: cell(x[t], state).sum(0), before).movedim(1, 0)
        lam[t] = carried + (rule.step if target_prop else 1) * g[t]
        mu[t] = lam[t] + through
        for total, part in zip(gradients, torch.autograd.grad(cell(x[t], before), parameters, mu[t]), strict=True):
            total += part
        through = (jacobian.mT @ mu[t][..., None])[..., 0]
        if target_prop and rule.update == "local":
            through = torch.zeros_like(through)
        if not target_prop:
            continue
        if rule.inverse == "identity":
            carried = lam[t]
        elif rule.inverse == "jacobian":
            gram = jacobian @ jacobian.mT + rule.reg * torch.eye(N, dtype=torch.float64)
            carried = (jacobian.mT @ torch.linalg.solve(gram, lam[t][..., None]))[..., 0]
        else:
            step = oracle_of(layer, t, before, h[t])
            found = step.term(extended(lam[t]), inverses_of(layer, rule), Sweep.of(rule))
            carried = torch.from_numpy(found.astype(float))
    return lam, mu, gradients


def saturation_of(layer: Recurrent) -> Tensor:
    """Of every time step, by the definition."""
    x, hx, *_ = data(torch.float64)
    h, clip = layer(x, hx)[0], layer.rule.clip if isinstance(layer.rule, tp.TargetProp) else 1e-3
    if isinstance(layer, tp.nn.GRU):
        gates = [oracle_of(layer, t, h[t - 1] if t else hx[0], h[t]) for t in range(T)]
        centred = [np.concatenate([step.n, 2 * step.r - 1, 2 * step.z - 1], axis=-1) for step in gates]
        h = torch.from_numpy(np.stack(centred).astype(float))
    found = {"relu": h == 0, "identity": h.isnan()}.get(getattr(layer, "nonlinearity", "tanh"), h.abs() > 1 - clip)
    return found.double().mean((1, 2))


def expected(layer: Recurrent, sources: str) -> dict[str, object]:
    """All of a record's numbers."""
    *_, grad, grad_last = data(torch.float64)
    g = grad.clone() if sources != "last" else torch.zeros_like(grad)
    if sources != "states":
        g[-1] += grad_last[0]
    lam, mu, gradients = sweep_of(layer, layer.rule, g)
    _, _, of_bp = sweep_of(layer, tp.BackProp(), g)
    norms = {name: v.norm(dim=-1) for name, v in zip(NORMS, (lam, mu, g), strict=True)}
    return {
        **{f"{name}_mean": norm.mean(1) for name, norm in norms.items()},
        **{f"{name}_max": norm.amax(1) for name, norm in norms.items()},
        "saturated": saturation_of(layer),
        "angle_weight_ih": degrees(gradients[:1], of_bp[:1]),
        "angle_weight_hh": degrees(gradients[1:2], of_bp[1:2]),
        "angle_all": degrees(gradients, of_bp),
        "weight_hh_norm": torch.linalg.svdvals(layer.weight_hh_l0)[0].item(),
    }


def assert_record(record: Record, answer: dict[str, object]) -> None:
    for name, value in answer.items():
        # Angles and norms of products lose what their terms cancel; 1/(1 - h²) is ill-conditioned.
        value = extended(value) if isinstance(value, Tensor) else value
        assert_near(number(getattr(record, name)), np.reshape(value, (-1, 1, 1)), name, condition=100)


@pytest.mark.parametrize("sources", ["states", "last", "both"])
@pytest.mark.parametrize(("kind", "rule"), [pair for pair in LAYERS_AND_RULES if pair[1] != "bp"], ids=str)
def test_numbers(kind, rule, sources, backend):
    tight = dataclasses.replace(RULES[rule], rtol=1e-14)  # of an iteration, if there is one
    layer = layer_of(tight, kind=kind, backend=backend)
    with torch.no_grad():
        layer.weight_ih_l0[-N:].mul_(3)  # so that some candidate of a GRU is saturated, too
    record = only_record(layer, sources)
    answer = expected(layer, sources)
    assert_record(record, answer)
    assert (record.layer, record.pass_index) == ("", 0)
    if tight.inverse != "jacobian":
        assert record.solver_iterations is None
    elif backend == "reference":  # a direct solve
        assert record.solver_iterations == [0] * T
    else:
        assert all(0 < count <= 4 * N + 50 for count in record.solver_iterations)
    assert 0 < sum(record.saturated) < T
    assert answer["angle_all"] > 1  # the rules differ from BP here


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RNN, {"nonlinearity": "relu"}),
        (RNN, {"nonlinearity": "identity"}),
        (RNN, {"bias": False}),
        (GRU, {"checkpoint_every": 3}),
    ],
    ids=str,
)
def test_numbers_of_other_layers(kind, options, backend):
    layer = layer_of(tp.TargetProp(clip=0.1), kind=kind, backend=backend, **options)
    record = only_record(layer)
    assert_record(record, expected(layer, "both"))
    assert (sum(record.saturated) > 0) == (options.get("nonlinearity") != "identity")


@pytest.mark.parametrize("sources", ["states", "last", "both"])
@over_layers
def test_back_propagation_is_at_no_angle_to_itself(kind, sources, backend):
    record = only_record(layer_of(tp.BackProp(), kind=kind, backend=backend), sources)
    assert record.angle_weight_ih == record.angle_weight_hh == record.angle_all == 0
    assert record.displacement_mean == record.gradient_mean
    assert record.displacement_max == record.gradient_max
    if sources == "last":
        assert record.gradient_mean[:-1] == [0] * (T - 1)
        assert min(record.adjoint_mean) > 0


def real_gradients(layer: Recurrent, rule: object) -> dict[str, Tensor]:
    """``.grad`` of what is trained, as an optimizer has it."""
    layer.rule = rule
    layer.zero_grad()
    x, hx, grad, grad_last = data(torch.float64)
    torch.autograd.backward(layer(x, hx), (grad, grad_last))
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.requires_grad}


FROZEN = [(), ("weight_hh_l0",), ("bias_ih_l0",), ("bias_hh_l0",), ("bias_ih_l0", "bias_hh_l0"), ("weight_ih_l0",)]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "+".join(names) or "none")
@over_layers
def test_angles_are_those_of_the_real_gradients(kind, frozen, backend):
    """All trained parameters together, each of the two biases by itself."""
    layer = layer_of(kind=kind, backend=backend)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    record = only_record(layer)
    found, of_bp = (real_gradients(layer, rule) for rule in (tp.TargetProp(), tp.BackProp()))
    assert set(found) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"} - set(frozen)
    wanted = {"angle_all": degrees(list(found.values()), list(of_bp.values()))}
    for name in ("weight_ih", "weight_hh"):
        if f"{name}_l0" in found:
            wanted[f"angle_{name}"] = degrees([found[f"{name}_l0"]], [of_bp[f"{name}_l0"]])
        else:
            assert getattr(record, f"angle_{name}") is None
    for name, value in wanted.items():
        assert_near(number(getattr(record, name)), np.reshape(value, (-1, 1, 1)), name, condition=100)


@pytest.mark.parametrize("how", ["feedback", "refresh"])
@over_layers
def test_another_matrix_in_place_of_p(kind, how, backend):
    """A fixed one; or that of a weight that was, while it serves."""
    shape, numbers = (N, N), torch.Generator().manual_seed(3)
    fixed = torch.randn(shape, generator=numbers, dtype=torch.float64)
    layer = layer_of(kind=kind, backend=backend, **{how: fixed if how == "feedback" else 100})
    plain = only_record(layer_of(kind=kind, backend=backend))
    first = only_record(layer)
    if how == "refresh":
        assert_same_record(first, plain)
        with torch.no_grad():
            layer.weight_hh_l0 += 0.04 * layer.weight_hh_l0.flip(0)
        other = layer_of(kind=kind, backend=backend, feedback=layer.refreshed[0].kept.clone())
        other.load_state_dict(layer.state_dict())
        assert_same_record(only_record(layer), only_record(other))
        layer.refresh = 1
        assert only_record(layer).displacement_mean[0] != only_record(other).displacement_mean[0]
    assert first.displacement_mean[-1] == plain.displacement_mean[-1]
    assert (first.displacement_mean[0] == plain.displacement_mean[0]) == (how == "refresh")


@over_layers
def test_a_parametrized_layer(kind):
    layer = layer_of(kind=kind)
    nn.utils.parametrizations.spectral_norm(layer, "weight_hh_l0")
    nn.utils.parametrizations.spectral_norm(layer, "bias_hh_l0")
    plain = layer_of(kind=kind)
    layer.eval()  # no further power iterations
    plain.load_state_dict({name: getattr(layer, name).detach() for name in plain.state_dict()})
    with tp.trace(layer) as trace:
        torch.autograd.backward(layer(*data(torch.float64)[:2]), data(torch.float64)[2:])
    assert_same_record(trace.records[0], only_record(plain))


def test_angles_near_0_and_180_are_exact():
    """The arc cosine would say 0, or about 1e-6, for each."""
    along, across = torch.tensor([[1.0, 0.0], [0.0, 1e-12]], dtype=torch.float64)
    for vector, answer in ((along + across, math.degrees(1e-12)), (-along, 180.0), (across, 90.0)):
        assert_near(number(_angle([along], [vector])), np.array([[[answer]]]), "angle")
    assert _angle([along], [0 * along]) is None
    assert _angle([along], [along / 0]) is None


@pytest.mark.parametrize("options", [{"batch_first": True}, {"checkpoint_every": 3}, {"checkpoint_every": 50}], ids=str)
@over_rules
def test_the_same_record_in_every_form(kind, rule, options, backend):
    """Another layout, or states that are computed again, in and outside of the trace."""
    plain = only_record(layer_of(RULES[rule], kind=kind, backend=backend))
    found = only_record(layer_of(RULES[rule], kind=kind, backend=backend, **options))
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
@over_layers
def test_without_a_sequence(kind, every, backend):
    plain = only_record(layer_of(kind=kind, backend=backend), "last")
    found = only_record(layer_of(kind=kind, backend=backend, return_sequence=False, checkpoint_every=every), "last")
    assert_same_record(found, plain)


@over_layers
def test_without_a_batch(kind, backend):
    x, hx, grad, _ = data(torch.float64)
    layer = layer_of(kind=kind, backend=backend)
    with tp.trace(layer) as trace:
        (layer(x[:, 0], hx[:, 0])[0] * grad[:, 0]).sum().backward()
        (layer(x[:, :1], hx[:, :1])[0] * grad[:, :1]).sum().backward()
    one, batch = trace.records
    assert len(one.saturated) == T
    assert vars(one) | {"pass_index": 1} == vars(batch)
    assert one.displacement_mean == one.displacement_max


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@over_layers
def test_half_precision(kind, half):
    layer = layer_of(tp.TargetProp(update="local"), kind=kind).to(half)
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


@over_layers
def test_frozen_parameters(kind, backend):
    """No angle for what is not trained; the other numbers are the same."""
    layer = layer_of(kind=kind, backend=backend)
    full = only_record(layer)
    layer.weight_hh_l0.requires_grad_(False)
    record = only_record(layer)
    assert record.angle_weight_hh is None
    assert record.angle_weight_ih == full.angle_weight_ih
    assert record.angle_all != full.angle_all
    for name in ("bias_ih_l0", "bias_hh_l0"):
        layer.get_parameter(name).requires_grad_(False)
    assert only_record(layer).angle_all == record.angle_weight_ih
    layer.weight_ih_l0.requires_grad_(False)
    record = only_record(layer)
    assert record.angle_weight_ih is record.angle_weight_hh is record.angle_all is None
    assert record.adjoint_mean == full.adjoint_mean


# --- what a trace leaves alone


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_every": 3}, {"batch_first": True}, {"bias": False}, {"return_sequence": False}],
    ids=str,
)
@over_rules
def test_results_are_the_same_bits(kind, rule, options, dtype, backend):
    layer = layer_of(RULES[rule], dtype, kind, backend=backend, **options)
    sources = "last" if "return_sequence" in options else "both"
    plain = step(layer, sources, dtype)
    state = torch.get_rng_state()
    with tp.trace(layer) as trace:
        traced = step(layer, sources, dtype)
    assert len(trace.records) == 1
    assert torch.equal(torch.get_rng_state(), state)
    for found, wanted in zip(traced, plain, strict=True):
        assert_identical(found, wanted, "result")


@over_layers
def test_the_users_gradients_are_the_same_bits(kind):
    """``.grad`` that adds up over passes, in a model with more than the layer in it."""
    results = []
    for traced in (False, True):
        torch.manual_seed(3)
        model = nn.ModuleDict({"rnn": kind.make(seed=3), "readout": nn.Linear(N, 2)})
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
            last = layer(data(torch.float64)[0])[1]
            if failed:
                raise ArithmeticError
    except ArithmeticError:
        pass
    last.sum().backward()
    assert trace.records == []
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.parametrize("backward", [False, True])
@over_layers
def test_no_graph_is_kept_alive(kind, backward):
    layer = layer_of(kind=kind)
    gc.disable()
    try:
        with tp.trace(layer) as trace:
            x = data(torch.float64)[0].requires_grad_()
            last = layer(x)[1]
            node = last.grad_fn
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
        layer(data(torch.float64)[0])[1].sum().backward()
        before = handles()
        for _ in range(20):
            layer(data(torch.float64)[0])[1].sum().backward()
        assert handles() == before


@over_layers
def test_two_runs_give_the_same_records(kind):
    assert vars(only_record(layer_of(kind=kind))) == vars(only_record(layer_of(kind=kind)))


@over_layers
def test_under_autocast(kind, backend):
    layer = layer_of(dtype=torch.float32, kind=kind, backend=backend)
    records = []
    for enabled in (False, True):
        with tp.trace(layer) as trace, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(data(torch.float32)[0])[0].sum().backward()
        records += trace.records
    assert vars(records[0]) == vars(records[1])


def test_another_hook_may_change_the_output():
    layer = layer_of()
    layer.register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1].tanh()))
    with tp.trace(layer) as trace:
        layer(data(torch.float64)[0])[0].sum().backward()
    assert trace.records[0].gradient_mean == [2 * N**0.5] * T


# --- which passes


class Model(nn.Module):
    """Two layers of different kinds and sizes, one of them used twice, and what is no layer of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([tp.nn.RNN(M, N), nn.RNN(N, N)])
        self.head = tp.nn.GRU(N, N, rule=tp.BackProp())
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
                layer(size * data(torch.float64)[0])[1].sum().backward()
        records.append(trace.records)
    assert [record.pass_index for record in records[1]] == [0, 3, 6]
    assert [vars(record) for record in records[0][::3]] == [vars(record) for record in records[1]]


def test_what_is_a_pass():
    """Backward decides: a second one is a pass of its own, and a forward without gradients or without data is none."""
    layer = layer_of()
    x = data(torch.float64)[0]
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


@over_layers
def test_the_rule_of_the_forward_pass_counts(kind):
    layer = layer_of(tp.TargetProp(clip=0.5), kind=kind)
    with tp.trace(layer) as trace:
        output = layer(data(torch.float64)[0])[0]
        layer.rule = tp.BackProp()
        output.sum().backward()
    layer.rule = tp.TargetProp(clip=0.5)
    with tp.trace(layer) as plain:
        layer(data(torch.float64)[0])[0].sum().backward()
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
        ((nn.RNN(M, N),), ValueError, "model must have a tp_kernels.nn.RNN, GRU or LSTM in it, got a RNN without one"),
        (
            (nn.Sequential(),),
            ValueError,
            "model must have a tp_kernels.nn.RNN, GRU or LSTM in it, got a Sequential without one",
        ),
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
@over_layers
def test_compiled(kind, fullgraph):
    """An error, not an empty trace, whether it was compiled before or not."""
    torch._dynamo.reset()  # what it remembers of this code from other tests
    layer = layer_of(kind=kind)
    compiled = torch.compile(layer, backend="eager", fullgraph=fullgraph)
    text = "trace: layer '' cannot be traced under torch.compile: call the model that was compiled"
    for _ in range(2):
        with tp.trace(layer), pytest.raises(RuntimeError, match=text):
            compiled(data(torch.float64)[0])
        compiled(data(torch.float64)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_torchs_own_checkpoints(use_reentrant):
    """Those that are not reentrant give the saved tensors once, to backward itself: an error that says so."""
    layer, x = layer_of(), data(torch.float64)[0].requires_grad_()
    with tp.trace(layer) as trace:
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
        if use_reentrant:
            output.sum().backward()
            assert len(trace.records) == 1
        else:
            with pytest.raises(RuntimeError, match=r"trace: layer '' .* torch\.utils\.checkpoint.*checkpoint_every=k"):
                output.sum().backward()


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_a_run_that_diverges_is_traced(kind):
    """A weight that is NaN has no spectral norm; that is what one traces for."""
    layer = layer_of(tp.TargetProp(inverse="identity"), kind=kind)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = torch.nan
    with tp.trace(layer) as trace:
        layer(data(torch.float64)[0])[1].sum().backward()
    assert math.isnan(trace.records[0].weight_hh_norm)
