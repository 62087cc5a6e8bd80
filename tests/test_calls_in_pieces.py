"""A sequence in several calls: the state that one call hands on to the next, as it came or changed."""

import copy
import pickle
import warnings

import pytest
import torch
from _cases import RULES, Case
from _checks import layer as layer_of
from _compare import assert_identical
from _modules import LAYERS, LAYERS_AND_RULES, M, N
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent

T, B = 14, 2
STEP_BY_STEP = tp.TargetProp(inverse="identity", step=0.7)
over_layers = pytest.mark.parametrize("layer", LAYERS, ids=str)


@pytest.fixture(autouse=True)
def no_warnings():
    """A state that is handed on as it came is nothing to be warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*state that this call begins with was changed")
        yield


def inputs(shape: tuple[int, ...] = (T, B)) -> tuple[Tensor, Tensor]:
    """x and a first state, in float64."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, M, generator=numbers, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(1, *shape[1:], N, generator=numbers, dtype=torch.float64).requires_grad_()


def in_pieces(module: Recurrent, x: Tensor, h0: Tensor | None, calls: int, time: int = 0) -> tuple[Tensor, Tensor]:
    states, h = [], h0
    for piece in x.split(-(-x.shape[time] // calls), dim=time):
        output, h = module(piece, h)
        states.append(output)
    return torch.cat(states, dim=time), h


def gradients(module: Recurrent, outputs: tuple[Tensor, Tensor], *leaves: Tensor) -> dict[str, Tensor]:
    """From a loss at every state and one more at the last one."""
    numbers = torch.Generator().manual_seed(1)
    grads = [torch.randn(output.shape, generator=numbers, dtype=output.dtype) for output in outputs]
    named = {"x": leaves[0], "h0": leaves[1], **dict(module.named_parameters())}
    found = torch.autograd.grad(outputs, list(named.values()), grads)
    return dict(zip(named, found, strict=True))


def assert_equal_to_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("every", [None, 3], ids=["all states", "checkpoints"])
@pytest.mark.parametrize("calls", [1, 2, 7, T])
@pytest.mark.parametrize(("layer", "rule"), LAYERS_AND_RULES, ids=str)
def test_several_calls_are_one(layer, rule, calls, every, backend):
    module = layer.make(rule=RULES[rule], backend=backend, dtype=torch.float64, checkpoint_every=every)
    x, h0 = inputs()
    expected = gradients(module, module(x, h0), x, h0)
    assert_equal_to_rounding(gradients(module, in_pieces(module, x, h0, calls), x, h0), expected)


@pytest.mark.parametrize("layout", ["batch_first", "unbatched"])
@over_layers
def test_in_every_layout(layer, layout, backend):
    batch_first, time = layout == "batch_first", int(layout == "batch_first")
    module = layer.make(backend=backend, dtype=torch.float64, batch_first=batch_first)
    x, h0 = inputs((T,) if layout == "unbatched" else (T, B))
    given = x.transpose(0, 1) if batch_first else x
    expected = gradients(module, module(given, h0), x, h0)
    assert_equal_to_rounding(gradients(module, in_pieces(module, given, h0, 4, time), x, h0), expected)


@pytest.mark.parametrize("calls", [2, 7])
@pytest.mark.parametrize("rule", ["weight-total", "layer-local", "jacobian-total", "bp"])
@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_of_the_ops(cell, H, rule, calls, backend):
    case = Case(T=7, B=3, N=5, H=H, cell=cell)
    given = case.tensors(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in given if tensor is not None]
    whole = layer_of(case, given, rule=RULES[rule], backend=backend)
    parts, h = [], given.h0
    for u in given.u.split(-(-7 // calls)):
        states, h = layer_of(case, given._replace(u=u, h0=h), rule=RULES[rule], backend=backend, return_last=True)
        parts.append(states)
    grad = case.gradient(torch.float64)
    for found, expected in zip(
        torch.autograd.grad(torch.cat(parts), leaves, grad), torch.autograd.grad(whole, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_displacements_in_parallel(backend):
    module = tp.nn.RNN(
        M, N, displacements="parallel", rule=tp.TargetProp(step=0.5), backend=backend, dtype=torch.float64
    )
    x, h0 = inputs()
    expected = gradients(module, module(x, h0), x, h0)
    assert_equal_to_rounding(gradients(module, in_pieces(module, x, h0, 3), x, h0), expected)


@over_layers
def test_a_call_of_one_step_after_the_other_is_not_back_propagation(layer, backend):
    """As it was when the adjoint was handed on alone."""
    x, h0 = inputs()
    found = {}
    for rule in (tp.TargetProp(), tp.BackProp()):
        module = layer.make(rule=rule, backend=backend, dtype=torch.float64)
        _, last = in_pieces(module, x, h0, T)
        (found[type(rule)],) = torch.autograd.grad(last.sum(), module.weight_hh_l0)
    difference = torch.dist(*found.values()) / torch.linalg.vector_norm(found[tp.BackProp])
    assert difference > 0.1


@pytest.mark.parametrize("decoder", LAYERS, ids=str)
@over_layers
def test_from_one_layer_to_another(layer, decoder, backend):
    """An encoder's last state that a decoder begins with: displacements go on into the encoder. With the decoder's
    weights equal to the encoder's it is one sequence.
    """
    module = layer.make(backend=backend, dtype=torch.float64)
    other = decoder.make(backend=backend, dtype=torch.float64)
    x, h0 = inputs()
    _, last = other(x[7:], module(x[:7], h0)[1])
    grads = torch.autograd.grad(last.sum(), [x, *module.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    if layer is decoder:
        other.load_state_dict(module.state_dict())
        _, last = other(x[7:], module(x[:7], h0)[1])
        _, whole = module(x, h0)
        found, expected = (torch.autograd.grad(end.sum(), x)[0] for end in (last, whole))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@over_layers
def test_a_state_that_two_calls_begin_with(layer, backend):
    """What both send back adds up."""
    module = layer.make(backend=backend, dtype=torch.float64)
    x, h0 = inputs()

    def from_fork(*weights: float) -> Tensor:
        _, last = module(x[:4], h0)
        ends = [module(x[first:][:5], last)[1].sum() for first in (4, 9)]
        return torch.autograd.grad(sum(w * end for w, end in zip(weights, ends, strict=True)), module.weight_hh_l0)[0]

    torch.testing.assert_close(from_fork(1, 2), from_fork(1, 0) + 2 * from_fork(0, 1), rtol=1e-10, atol=1e-12)


# --- changed in between

CHANGES = {
    "masked": lambda output, h: h * 0.5,
    "a copy": lambda output, h: h.clone(),
    "indexed": lambda output, h: h[:, :],
    "the output's last": lambda output, h: output[-1:],
    "projected": lambda output, h: nn.functional.linear(h, torch.eye(N, dtype=h.dtype)),
    "in place": lambda output, h: h.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@over_layers
def test_a_changed_state_is_warned_of(layer, change, backend):
    module = layer.make(backend=backend, dtype=torch.float64)
    x, _ = inputs()
    output, h = module(x)
    changed = CHANGES[change](output, h)
    with pytest.warns(
        UserWarning, match=f"nn.{layer.name}: the state that this call begins with was changed"
    ) as caught:
        module(x, changed)
    assert len(caught) == 1
    assert "Hand on the last state as the layer returned it" in str(caught[0].message)
    assert caught[0].filename == __file__, "the warning does not point to the call"


@over_layers
def test_through_a_changed_state_the_adjoint_goes_back(layer, backend):
    """As the gradient of the state: so says the warning."""
    module = layer.make(backend=backend, dtype=torch.float64)
    x, h0 = inputs()
    _, h = module(x[:7], h0)
    with pytest.warns(UserWarning, match="was changed"):
        _, last = module(x[7:], 1.0 * h)
    (found,) = torch.autograd.grad(last.sum(), x)
    leaf = h.detach().requires_grad_()
    _, last = module(x[7:], leaf)
    adjoint, later = torch.autograd.grad(last.sum(), [leaf, x])
    (earlier,) = torch.autograd.grad(module(x[:7], h0)[1], x, adjoint)
    assert_identical(found, earlier + later, "grad_x")


@pytest.mark.parametrize("kept", [0, 1], ids=["h", "c"])
def test_a_state_of_two_parts_is_as_it_came_only_as_a_whole(kept, backend):
    """One part that came with the other changed: the adjoint of both goes back, as through two that were changed."""
    module = tp.nn.LSTM(M, N, backend=backend, dtype=torch.float64)
    x, _ = inputs()
    found = []
    for changed in ((0, 1), (1 - kept,)):
        _, state = module(x[:7])
        state = [1.0 * part if index in changed else part for index, part in enumerate(state)]
        with pytest.warns(UserWarning, match=r"nn\.LSTM: the state that this call begins with was changed") as caught:
            output, _ = module(x[7:], state)
        assert len(caught) == 1
        found.append(torch.autograd.grad(output.sum(), [x, *module.parameters()]))
    for one, other in zip(*found, strict=True):
        assert_identical(one, other, "gradient")


@pytest.mark.parametrize("rule", [tp.TargetProp(), tp.BackProp()], ids=["tp", "bp"])
@over_layers
def test_nothing_to_warn_of(layer, rule, backend):
    """A cut sequence, a learned first state, no gradients, and back-propagation, whose gradient is one vector."""
    module = layer.make(rule=rule, backend=backend, dtype=torch.float64)
    x, h0 = inputs()
    _, h = module(x, h0 * 1.0)
    module(x, h.detach() * 0.5)
    with torch.no_grad():
        module(x, h * 0.5)
    if isinstance(rule, tp.BackProp):
        module(x, h * 0.5)


@over_layers
def test_back_propagation_before_targets(layer, backend):
    """The state is as it came; of a rule without displacements it brings none along."""
    first, then = (layer.make(rule=rule, backend=backend, dtype=torch.float64) for rule in (tp.BackProp(), None))
    x, _ = inputs()
    _, last = then(x[7:], first(x[:7])[1])
    last.sum().backward()
    assert first.weight_hh_l0.grad.any()


@over_layers
def test_a_hook_that_replaces_the_state_is_warned_of(layer, backend):
    module = layer.make(backend=backend, dtype=torch.float64)
    module.register_full_backward_hook(lambda *given: None)
    x, _ = inputs()
    with pytest.warns(UserWarning, match="by a hook or wrapper"):
        module(x[7:], module(x[:7])[1])


@over_layers
def test_reentrant_checkpoints_are_warned_of(layer, backend):
    """They cut the state off before the layer sees it."""
    module = layer.make(backend=backend, dtype=torch.float64)
    x, _ = inputs()
    _, h = checkpoint(module, x[:7], use_reentrant=True)
    _, last = checkpoint(module, x[7:], h, use_reentrant=True)
    with pytest.warns(UserWarning, match="use_reentrant=True, which cuts it off"):
        last.sum().backward()


@pytest.mark.parametrize("leaf", [False, True], ids=["detached", "a leaf again"])
@over_layers
def test_a_detached_state_cuts_the_sequence(layer, leaf, backend):
    module = layer.make(backend=backend, dtype=torch.float64)
    x, h0 = inputs()
    _, h = module(x[:7], h0)
    h.detach_().requires_grad_(leaf)
    assert_identical(copy.deepcopy(h).detach(), h.detach(), "a copy")
    _, last = module(x[7:], h)
    if leaf:
        (adjoint,) = torch.autograd.grad(last.sum(), h, retain_graph=True)
        assert adjoint.any()
    (grad,) = torch.autograd.grad(last.sum(), x)
    assert not grad[:7].any()
    assert grad[7:].any()


@over_layers
def test_a_state_is_a_tensor_like_any_other(layer, backend):
    """It can be copied, saved, moved and sent; what it brings along stays behind."""
    module = layer.make(backend=backend)
    _, h = module(torch.randn(T, B, M))
    detached = h.detach()
    assert_identical(pickle.loads(pickle.dumps(detached)), detached, "pickled")
    assert_identical(detached.share_memory_(), h.detach(), "shared")
    assert h.double().dtype == torch.float64


# --- under torch.compile, and checkpointed


def two_calls(module: Recurrent, x: Tensor) -> Tensor:
    _, h = module(x[:7])
    output, last = module(x[7:], h)
    return output.sum() + last.sum() + h.sum()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("rule", ["weight-total", "bp"])
@over_layers
def test_compiled_together(layer, rule, dynamic):
    torch._dynamo.reset()
    module = layer.make(rule=RULES[rule], dtype=torch.float64)
    x, _ = inputs()
    found, expected = (
        torch.autograd.grad(function(module, x), [x, *module.parameters()])
        for function in (torch.compile(two_calls, fullgraph=True, dynamic=dynamic), two_calls)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@over_layers
def test_compiled_one_by_one(layer):
    torch._dynamo.reset()
    module = layer.make(dtype=torch.float64)
    x, _ = inputs()
    found, expected = (
        torch.autograd.grad(two_calls(each, x), [x, *module.parameters()])
        for each in (torch.compile(module, fullgraph=True), module)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_compiled_and_changed_in_place():
    torch._dynamo.reset()
    module = tp.nn.RNN(M, N, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        _, h = module(x)
        h.mul_(0.5)
        return module(x, h)[1]

    with pytest.raises(RuntimeError, match=r"nn\.RNN: the state was changed in place"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(inputs()[0])


def test_compiled_after_a_call_that_was_not():
    torch._dynamo.reset()
    module = tp.nn.RNN(M, N, dtype=torch.float64)
    x, _ = inputs()
    _, h = module(x)
    with pytest.raises(Exception, match="comes from a call that was not compiled"):
        torch.compile(module, fullgraph=True, backend="aot_eager")(x, h)


@over_layers
def test_checkpointed(layer, backend):
    module = layer.make(backend=backend, dtype=torch.float64)
    x, _ = inputs()

    def checkpointed(x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return checkpoint(module, x, h, use_reentrant=False)

    found, expected = (
        torch.autograd.grad(two_calls(each, x), [x, *module.parameters()]) for each in (checkpointed, module)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- traced


@over_layers
def test_a_trace_sees_what_the_next_call_sends(layer, backend):
    """The displacements of the first of two calls are those of these steps in one."""
    module = layer.make(backend=backend, dtype=torch.float64, rule=STEP_BY_STEP)
    x, h0 = inputs()
    records = []
    for calls in (1, 2):
        with tp.trace(module) as trace:
            in_pieces(module, x, h0, calls)[1].sum().backward()
        records.append(trace.records)
    (whole,), (later, earlier) = records
    for name in ("displacement_mean", "adjoint_mean", "gradient_mean"):
        pieces = torch.tensor([*getattr(earlier, name), *getattr(later, name)])
        torch.testing.assert_close(pieces, torch.tensor(getattr(whole, name)), rtol=1e-5, atol=1e-7)
