"""What PyTorch does to a model beside calling it: exporting, tracing and transforming it, counting its flops. Layers
keep their gradients through it, or say that they cannot.
"""

import io
import subprocess
import sys

import pytest
import torch
from _cases import RULES
from _checks import assert_identical
from _modules import ALL, ALL_AND_RULES, LSTM, Layer, M, N
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent

T, B = 6, 3
over_layers = pytest.mark.parametrize("layer", ALL, ids=str)


class Model(nn.Module):
    """A linear layer, ours, and a linear one on top: what is lost in between is seen in the first."""

    def __init__(self, layer: Recurrent, calls: int = 1, **options: object) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(M, M), layer, nn.Linear(N * (1 + layer.bidirectional), 2)
        self.calls, self.options = calls, options

    def forward(self, x: Tensor) -> Tensor:
        time = 1 if self.layer.batch_first else 0
        x, outputs, state = self.before(x), [], None
        for piece in (x,) if self.calls == 1 else x.chunk(self.calls, time):
            output, state = self.layer(piece, state, **self.options)
            outputs.append(output)
        return self.after(torch.cat(outputs, time)).square().sum()


def model_of(layer: Layer, calls: int = 1, **options: object) -> tuple[Model, Tensor]:
    x = torch.randn(B, T, M) if options.get("batch_first") else torch.randn(T, B, M)
    return Model(layer.make(**options), calls), x


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


VARIANTS = {
    "batch first": {"batch_first": True},
    "stack": {"num_layers": 2, "bidirectional": True},
    "checkpoints": {"checkpoint_every": 2},
    "refresh": {"refresh": 3},
    "feedback": {"feedback": torch.eye(N).flip(0)},
    "latch": {"rule": tp.TargetProp(blend=0.5, latch=0.3), "calls": 2},
    "chunks": {"rule": tp.TargetProp(inverse="identity", chunk=2, overlap=1)},
    "two calls": {"calls": 2},
    "two calls of a stack": {"calls": 2, "num_layers": 2, "batch_first": True},
}

# --- torch.export


@pytest.mark.parametrize(("layer", "rule"), ALL_AND_RULES, ids=str)
def test_an_exported_model_trains_by_its_rule(layer, rule):
    model, x = model_of(layer, rule=RULES[rule])
    assert_same(gradients_of(torch.export.export(model, (x,)).module(), x), gradients_of(model, x))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", VARIANTS)
@over_layers
def test_an_exported_model_trains(layer, name, strict):
    """Also what was saved; and one that was exported where no parameter was trained."""
    model, x = model_of(layer, **VARIANTS[name])
    model.requires_grad_(name != "two calls")
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module().requires_grad_(True)
    assert_same(gradients_of(loaded, x), gradients_of(model.requires_grad_(True), x))


@pytest.mark.parametrize("dimension", [0, 1], ids=["T", "B"])
@over_layers
def test_an_exported_model_of_any_size_trains(layer, dimension):
    model, x = model_of(layer)
    exported = torch.export.export(model, (x,), dynamic_shapes=({dimension: torch.export.Dim("size")},)).module()
    x = torch.cat((x, 2 * x), dimension)
    assert_same(gradients_of(exported, x), gradients_of(model, x))


@over_layers
def test_an_exported_model_with_resets_trains(layer):
    layer, x = layer.make(), torch.randn(T, B, M)
    model = Model(layer, reset=torch.tensor([False, True, False]).expand(T, B))
    assert_same(gradients_of(torch.export.export(model, (x,)).module(), x), gradients_of(model, x))


@over_layers
def test_an_exported_model_keeps_to_torchs_word_on_lengths(layer):
    """Whether they are valid depends on their values: torch refuses, and nothing is exported without them."""
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Model(layer.make(), lengths=[T, 2, 4]), (torch.randn(T, B, M),))


@over_layers
def test_a_graph_without_what_backward_needs_says_so(layer):
    model, x = model_of(layer)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    with pytest.raises(RuntimeError, match=f"{layer.name.lower()}: this graph was made where gradients were disabled"):
        exported(x).backward()


def test_a_file_of_another_process_needs_the_library(tmp_path):
    """torch names the operator that is missing, and with it the library; with the import it loads."""
    model, x = model_of(LSTM)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    load = f"import torch; torch.export.load({str(tmp_path / 'model.pt2')!r}).module()"
    plain = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert plain.returncode
    assert "tp_kernels" in plain.stderr
    subprocess.run([sys.executable, "-c", f"import tp_kernels; {load}"], check=True, capture_output=True)


def test_a_learned_inverse_is_not_traced_without_its_gradients():
    layer, x = tp.nn.LearnedInverse(M, N), torch.randn(T, B, M)
    for call in (
        lambda: torch.export.export(Model(layer), (x,)),
        lambda: make_fx(layer)(x),
        lambda: torch.func.grad(lambda x: layer(x)[0].sum())(x),
    ):
        with pytest.raises(NotImplementedError, match=r"nn\.LearnedInverse: training by torch.export"):
            call()


# --- make_fx


@pytest.mark.parametrize("trained", [False, True], ids=["", "of trained tensors"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["", "pre-dispatch"])
@pytest.mark.parametrize("calls", [1, 2])
@over_layers
def test_a_traced_model_trains(layer, calls, pre_dispatch, mode, trained):
    model, x = model_of(layer, calls, batch_first=True)
    parameters = {name: parameter.requires_grad_(trained) for name, parameter in parameters_of(model).items()}

    def function(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(parameters, x)
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    found = torch.autograd.grad(graph(leaves, x), list(leaves.values()))
    assert_same(dict(zip(leaves, found, strict=True)), gradients_of(model, x))


@over_layers
def test_a_traced_step_is_a_step(layer):
    model, x = model_of(layer)
    graph = make_fx(lambda parameters, x: torch.func.grad(_loss(model))(parameters, x))(parameters_of(model), x)
    assert_same(graph(parameters_of(model), x), gradients_of(model, x))
    leaves = {name: parameter.requires_grad_() for name, parameter in parameters_of(model).items()}
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        sum(value.sum() for value in graph(leaves, x).values()).backward()


def test_a_traced_inverse_has_its_gradient():
    weight = torch.randn(4, 3, dtype=torch.float64)
    graph = make_fx(lambda weight: tp.regularized_inverse(weight, 0.5))(weight)
    torch.autograd.gradcheck(graph, weight.requires_grad_())


# --- torch.func


def _loss(model: nn.Module):
    return lambda parameters, x: torch.func.functional_call(model, parameters, (x,))


@pytest.mark.parametrize(("layer", "rule"), ALL_AND_RULES, ids=str)
def test_func_grad(layer, rule):
    model, x = model_of(layer, rule=RULES[rule])
    assert_same(torch.func.grad(_loss(model))(parameters_of(model), x), gradients_of(model, x))


@pytest.mark.parametrize("name", VARIANTS)
@over_layers
def test_func_grad_and_vjp_of_variants(layer, name):
    model, x = model_of(layer, **VARIANTS[name])
    expected = gradients_of(model, x)
    assert_same(torch.func.grad(_loss(model))(parameters_of(model), x), expected)
    _, back = torch.func.vjp(_loss(model), parameters_of(model), x)
    found, _ = back(torch.ones(()))
    assert_same(found, expected)


@over_layers
def test_jacrev(layer):
    """Each row is the gradient of one output, by one backward pass each."""
    ours, x = layer.make(), torch.randn(T, B, M)
    jacobian = torch.func.jacrev(lambda x: ours(x)[0][-1])(x)
    leaf = x.clone().requires_grad_()
    (row,) = torch.autograd.grad(ours(leaf)[0][-1, 1, 2], leaf)
    assert jacobian.shape == (B, N, T, B, M)
    torch.testing.assert_close(jacobian[1, 2], row)


@over_layers
def test_vmap(layer):
    """Over inputs, over parameters, under and over gradients."""
    model, x = model_of(layer)
    one = parameters_of(model)
    both = {name: torch.stack((value, 2 * value)) for name, value in one.items()}
    two = {name: 2 * value for name, value in one.items()}
    over_x = torch.func.vmap(_loss(model), (None, 0))(one, torch.stack((x, 2 * x)))
    torch.testing.assert_close(over_x, torch.stack((model(x), model(2 * x))))
    found = torch.func.vmap(torch.func.grad(_loss(model)), (0, None))(both, x)
    expected = torch.func.grad(_loss(model))(two, x)
    assert_same({name: value[1] for name, value in found.items()}, expected)
    leaves = {name: value.requires_grad_() for name, value in both.items()}
    torch.func.vmap(_loss(model), (0, None))(leaves, x).sum().backward()
    assert_same({name: value.grad[1] for name, value in leaves.items()}, expected)


@pytest.mark.parametrize("enabled", [True, False], ids=["", "no grad"])
@over_layers
def test_what_has_no_derivative_raises(layer, enabled):
    """Forward mode, also where gradients are off, and second derivatives."""
    model, x = model_of(layer)
    of_x = lambda x: _loss(model)(parameters_of(model), x)  # noqa: E731
    with torch.set_grad_enabled(enabled):
        for call in (lambda: torch.func.jvp(of_x, (x,), (x,)), lambda: torch.func.jacfwd(of_x)(x)):
            with pytest.raises(NotImplementedError, match="jvp"):
                call()
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda x: torch.func.grad(of_x)(x).sum())(x)


@over_layers
def test_a_state_that_was_changed_is_warned_of_under_func(layer):
    ours, x = layer.make(), torch.randn(T, B, M)

    def function(x: Tensor) -> Tensor:
        _, state = ours(x)
        state = 2 * state if layer.states == 1 else tuple(2 * part for part in state)
        return ours(x, state)[0].sum()

    with pytest.warns(UserWarning, match="was changed after a layer of tp_kernels had returned it"):
        torch.func.grad(function)(x)


# --- torch.fx


CELLS = [tp.nn.RNNCell, tp.nn.GRUCell, tp.nn.LSTMCell]


@pytest.mark.parametrize("make", [*(layer.ours for layer in ALL), tp.nn.LearnedInverse, *CELLS])
def test_a_module_is_a_leaf_of_a_symbolic_trace(make):
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make(M, N)

        def forward(self, x: Tensor) -> Tensor:
            first = self.layer(2 * x)
            return self.layer(x, first if make in CELLS else first[1])

    model, x = Calls(), torch.randn(B, M) if make in CELLS else torch.randn(T, B, M)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["layer", "layer"]
    for found, expected in zip(graph(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_op_is_one_node_of_a_symbolic_trace():
    def function(u: Tensor, weight: Tensor) -> Tensor:
        return tp.rnn(u, weight, rule=tp.BackProp()).sum() + tp.regularized_inverse(weight, 0.5).sum()

    graph, u, weight = torch.fx.symbolic_trace(function), torch.randn(T, B, N), torch.eye(N)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert tp.rnn in called
    assert tp.regularized_inverse in called
    torch.testing.assert_close(graph(u, weight), function(u, weight))


# --- flops


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
@over_layers
def test_flops_are_those_of_torchs_layer(layer, bias):
    """Under back-propagation, where each product of ours is one of theirs."""

    def count(module: nn.Module) -> tuple[int, int]:
        x, outputs = torch.randn(T, B, M, requires_grad=True), []
        state = layer.state([torch.randn(1, B, N, requires_grad=True) for _ in range(layer.states)])
        with torch.backends.mkldnn.flags(enabled=False):  # its LSTM is not counted
            forward = flops(lambda: outputs.append(module(x, state)[0]))
        return forward, flops(lambda: outputs[0].sum().backward())

    theirs, ours = map(count, layer.pair(bias=bias))
    assert ours == theirs
    assert ours[0] == 2 * T * B * layer.gates * N * (M + N)


@over_layers
def test_flops_of_a_rule(layer):
    """The products with P, and P itself; and with checkpoints the forward pass once more."""

    def backward(**options: object) -> int:
        output, _ = layer.make(**options)(torch.randn(T, B, M))
        return flops(lambda: output.sum().backward())

    forward, projection = 2 * T * B * layer.gates * N * (M + N), 2 * T * B * layer.gates * N * M
    bp = 2 * forward - projection  # no gradient in x
    assert backward(rule=tp.BackProp()) == bp
    assert backward(rule=tp.BackProp(), checkpoint_every=2) == bp + forward
    inverse = 4 * N**3 + N**3 // 3
    assert backward(rule=tp.TargetProp(power=1.0)) == bp + 2 * T * B * N * N + inverse
    local = tp.TargetProp(power=1.0, update="local")
    assert backward(rule=local) == bp + 2 * T * B * N * N + inverse - 2 * T * B * layer.gates * N * N
    assert backward(rule=tp.TargetProp(inverse="jacobian")) == bp  # its solves are not counted


def test_flops_of_heads():
    u, weight = torch.randn(T, B, 2, N), torch.randn(2, N, N, requires_grad=True)
    assert flops(lambda: tp.rnn(u, weight)) == 2 * T * B * 2 * N * N
    h = tp.rnn(u, weight, rule=tp.TargetProp(power=1.0))
    products = 3 * 2 * T * B * 2 * N * N  # displacement, adjoint, gradient
    assert flops(lambda: h.sum().backward()) == products + 2 * (4 * N**3 + N**3 // 3)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_flops_of_the_inverse(power):
    weight = torch.randn(2, 7, 4, requires_grad=True)
    forward = 4 * 7 * 16 + 64 // 3 if power == 1.0 else 8 * 7 * 16 + 20 * 64
    products = 6 * 7 * 16 if power == 1.0 else 8 * 7 * 16 + 10 * 64
    outputs = []
    assert flops(lambda: outputs.append(tp.regularized_inverse(weight, 0.5, power=power))) == 2 * forward
    assert flops(lambda: outputs[0].sum().backward()) == 2 * (forward + products)


def test_the_counter_is_not_imported_with_the_library():
    """It imports triton."""
    script = "import sys, tp_kernels; sys.exit('torch.utils.flop_counter' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- autocast


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layers
def test_under_autocast_the_output_has_the_dtype_of_torchs(layer, dtype, state):
    """So that one can be written into the other. Inside, and in last states, it is the parameters'."""
    theirs, ours = layer.pair()
    x = torch.randn(T, B, M, dtype=dtype)
    states = [None if state is None else torch.zeros(1, B, N, dtype=state) for _ in range(layer.states)]
    hx = None if state is None else layer.state(states)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = theirs(x, hx)
        output, last = ours(x, hx)
    assert output.dtype == expected.dtype
    mask = torch.rand(T, B) < 0.5
    expected[mask] = output[mask]
    float_x, float_hx = x.float(), None if state is None else layer.state([part.float() for part in states])
    plain, plain_last = ours(float_x, float_hx)
    assert_identical(output.detach(), plain.detach().to(output.dtype), "output")
    pairs = ((last, plain_last),) if layer.states == 1 else zip(last, plain_last, strict=True)
    for found, wanted in pairs:
        assert_identical(found.detach(), wanted.detach(), "last state")


@over_layers
def test_double_precision_stays_under_autocast(layer):
    theirs, ours = layer.pair(dtype=torch.float64)
    x = torch.randn(T, B, M, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x)[0].dtype == theirs(x)[0].dtype == torch.float64


# --- changes in place


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@over_layers
def test_an_output_changed_in_place_is_an_error_with_its_cure(layer, batch_first):
    """torch's layers keep other tensors for backward, but for oneDNN's LSTM. Last states are free."""
    ours, x = layer.make(batch_first=batch_first), torch.randn(B, T, M)
    output, last = ours(x)
    for part in (last,) if layer.states == 1 else last:
        part.mul_(2)
    (output.sum() + part.sum()).backward()
    output, _ = ours(x)
    output[0] = 0
    with pytest.raises(RuntimeError, match=rf"^{layer.name.lower()}: .* output = output.clone\(\)"):
        output.sum().backward()
    output, _ = ours(x)
    output = output.clone()
    output[0] = 0
    output.sum().backward()
