"""``rnn``: the eight tests, oracles from outside, and the identities of the algorithm."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from _cases import (
    DTYPES,
    HEAD_CASES,
    LAYOUTS,
    NONLINEARITIES,
    RULES,
    TILE_CASES,
    TIME_CASES,
    RNNCase,
)
from _checks import (
    assert_long_budget,
    atanh_check,
    backward_op,
    condition_of_jacobian,
    grows_and_cancels,
    relu_inverse_check,
    rnn_backward_check,
    rnn_forward_check,
    small_differences_check,
    tanh_check,
)
from _compare import (
    assert_budget,
    assert_differences,
    assert_identical,
    assert_near,
    assert_same_pattern,
    assert_solved,
)
from _oracle import SLOPES, displacements, extended, rnn_backward, rnn_forward, weight_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.ops.rnn import feedback, op, parallel, reference
from tp_kernels.rules import Sweep

SMALL = RNNCase(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
TINY = RNNCase(T=3, B=2, N=3)
ops = torch.ops.tp_kernels


def gradients(
    case: RNNCase,
    rule: tp.BackProp | tp.TargetProp | None,
    dtype: torch.dtype,
    backend: str,
    feedback: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """h and the gradients in u, W and h_0 (where there is one), through the public function."""
    leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype) if tensor is not None]
    h = tp.rnn(*leaves, feedback=feedback, nonlinearity=case.nonlinearity, rule=rule, backend=backend)
    return h.detach(), *torch.autograd.grad(h, leaves, case.gradient(dtype))


def assert_same_computation(actual: Tensor, expected: Tensor, what: str, backend: str) -> None:
    """The same bits; from the reference, whose products are torch's, the same up to rounding: there the order of a sum
    may depend on where a matrix lies in memory.
    """
    if backend == "reference":
        assert_near(actual, extended(expected), what)
    else:
        assert_identical(actual, expected, what)


# --- forward


@pytest.mark.parametrize("case", TILE_CASES + TIME_CASES + HEAD_CASES, ids=str)
def test_forward(case, dtype, backend):
    rnn_forward_check(case, dtype, backend)


def test_tanh_accuracy(dtype, backend):
    tanh_check(dtype, backend)


def test_atanh_accuracy(dtype, backend):
    atanh_check(dtype, backend)


@pytest.mark.parametrize("nonlinearity", ["relu", "identity"])
def test_exact_activations(nonlinearity, dtype, backend):
    values = torch.tensor([0.0, -0.0, 1e-37, -1e-37, 1.5, -1.5, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    u = values.to(dtype).view(1, 1, -1)
    h = tp.rnn(u, torch.zeros(len(values), len(values), dtype=dtype), nonlinearity=nonlinearity, backend=backend)
    assert_identical(h, u.relu() if nonlinearity == "relu" else u, "h")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_runs_on_the_reference(name):
    dtype = getattr(torch, name)
    u, weight, h0 = (tensor.requires_grad_() for tensor in SMALL.tensors(dtype))
    h = tp.rnn(u, weight, h0)
    exact = rnn_forward(*map(extended, (u, weight, h0)), "tanh")
    assert_near(h, exact, "h")
    torch.autograd.backward(h, SMALL.gradient(dtype))
    assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in (u, weight, h0))


# --- backward

BACKWARD_RULES = ("bp", "weight-total", "layer-local", "jacobian-total", "direct-total")


@pytest.mark.parametrize("rule", BACKWARD_RULES)
@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_backward_tiles(case, rule, dtype, backend):
    rnn_backward_check(case, RULES[rule], dtype, backend)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, id=f"{case}-{rule}")
        for case in TIME_CASES + HEAD_CASES
        for rule in RULES
        if not (rule.startswith(("layer", "difference", "direct")) and case.nonlinearity == "tanh" and case.T == 1000)
    ],
)
def test_backward_times_and_heads(case, rule, dtype, backend):
    rnn_backward_check(case, RULES[rule], dtype, backend)


@pytest.mark.parametrize("sources", ["states", "last", "neither"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", [SMALL, HEADS], ids=str)
def test_backward_sources(case, rule, sources, dtype, backend):
    """A gradient that does not arrive is the same as one of zeros."""
    u, weight, h0 = case.tensors(dtype)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "reference")
    sweep = Sweep.of(RULES[rule], case.nonlinearity)
    feedback = weight.mT.contiguous() if sweep.uses_inverse else None
    grad, last = torch.zeros_like(h), torch.zeros_like(h[-1])
    if sources == "states":
        grad = case.gradient(dtype)
    elif sources == "last":
        last = case.gradient(dtype)[-1]
    arrives = grad if sources == "states" else None, last if sources == "last" else None
    found = backward_op(*arrives, h, weight, feedback, sweep, backend, u, h0)
    expected = backward_op(grad, last, h, weight, feedback, sweep, backend, u, h0)
    for what, *pair in zip(("grad_u", "grad_h0"), found, expected, strict=True):
        assert_identical(*pair, what)
    assert found[0].any() == (sources != "neither" or sweep.inverse == "direct")


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [SMALL, HEADS, SMALL.with_(h0=False), SMALL.with_(T=65, N=33)], ids=str)
def test_gradients(shape, rule, nonlinearity, dtype, backend):
    """All gradients of the public function, with the P it computes itself."""
    case = shape.with_(nonlinearity=nonlinearity)
    rule = RULES[rule]
    sweep = Sweep.of(rule, nonlinearity)
    tensors = case.tensors(dtype)
    u, weight, h0 = map(extended, tensors)
    found, reference = (gradients(case, rule, dtype, name) for name in (backend, "reference"))
    assert_budget(found[0], reference[0], rnn_forward(u, weight, h0, nonlinearity), "h")

    def exact(h: Tensor, delta: Tensor, name: str) -> tuple[np.ndarray, ...]:
        """At the states, the P and the δ that were found: each stage answers for its own errors."""
        feedback = None
        if sweep.uses_inverse:
            feedback = extended(tp.regularized_inverse(tensors[1], rule.reg, power=rule.power, backend=name))
        grad_u, _, grad_h0 = rnn_backward(extended(case.gradient(dtype)), u, extended(h), h0, weight, feedback, sweep)
        return grad_u, weight_gradient(extended(delta), extended(h), h0), grad_h0

    answers = exact(*found[:2], backend), exact(*reference[:2], "reference")
    rtol = sweep.rtol if sweep.inverse == "jacobian" else 0.0
    for what, *parts in zip(("grad_u", "grad_weight", "grad_h0"), found[1:], reference[1:], *answers, strict=False):
        actual, plain, answer, plain_answer = parts
        if what != "grad_weight" and grows_and_cancels(case, sweep):
            assert_long_budget(actual, plain, answer, what, condition=20, reference_exact=plain_answer)
        else:
            assert_budget(actual, plain, answer, what, condition=20, reference_exact=plain_answer, rtol=rtol)
    assert len(found) == (4 if case.h0 else 3)


# --- gradcheck


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("case", [TINY, TINY.with_(H=2), TINY.with_(h0=False), RNNCase(T=1, B=1, N=1)], ids=str)
def test_gradcheck(case, nonlinearity, backend):
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float64) if tensor is not None]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        u, weight, h0 = (*inputs, None)[:3]
        return op.rnn_layer(
            *(u, None, None, weight, h0),
            feedback=None,
            nonlinearity=nonlinearity,
            rule=tp.BackProp(),
            checkpoint_every=None,
            return_sequence=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.vector_norm], ids=["linear", "not linear"])
@pytest.mark.parametrize("by_name", [False, True], ids=["backward", "grad"])
def test_second_derivatives_are_refused(by_name, loss, backend):
    """Also where the gradient that arrives is a constant: the states depend on u all the same."""
    u, weight, _ = SMALL.tensors(torch.float64)
    leaves = [u.requires_grad_(), weight.requires_grad_()]
    found = loss(tp.rnn(u, weight, backend=backend))
    (grad,) = torch.autograd.grad(found, u, create_graph=True)
    penalized = found + grad.square().sum()
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(penalized, leaves) if by_name else penalized.backward()


def test_a_graph_of_the_gradients_inside_checkpoint(backend):
    """What is saved is unpacked once: a checkpoint computes it again for that, and refuses a second time."""
    u, weight, _ = SMALL.tensors(torch.float64)
    leaves = [u.requires_grad_(), weight.requires_grad_()]
    found, expected = (
        torch.autograd.grad(states.sum(), leaves, create_graph=create_graph)
        for states, create_graph in (
            (torch.utils.checkpoint.checkpoint(tp.rnn, *leaves, backend=backend, use_reentrant=False), True),
            (tp.rnn(*leaves, backend=backend), False),
        )
    )
    for what, *grads in zip(("grad_u", "grad_weight"), found, expected, strict=True):
        assert_identical(*grads, what)


@pytest.mark.parametrize("needed", ["u", "weight", "h0"])
def test_one_gradient_at_a_time(needed, dtype, backend):
    """What is not asked for stays away, and leaves the others as they are."""
    inputs = dict(zip(("u", "weight", "h0"), SMALL.tensors(dtype), strict=True))
    inputs[needed].requires_grad_()
    tp.rnn(**inputs, backend=backend).backward(SMALL.gradient(dtype))
    expected = dict(zip(("h", "u", "weight", "h0"), gradients(SMALL, None, dtype, backend), strict=True))
    assert_identical(inputs[needed].grad, expected[needed], needed)
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


# --- opcheck

OPCHECK = {
    "contiguous": (SMALL, "contiguous"),
    "heads": (HEADS, "contiguous"),
    "permuted": (SMALL, "permuted"),
    "sliced": (SMALL, "sliced"),
    "B0": (SMALL.with_(B=0), "contiguous"),
    "T1": (SMALL.with_(T=1, h0=False), "contiguous"),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, dtype, backend):
    case, layout = OPCHECK[name]
    u, weight, h0 = (None if tensor is None else LAYOUTS[layout](tensor) for tensor in case.tensors(dtype))
    torch.library.opcheck(ops.rnn_fwd, (u, weight, h0, "tanh", backend))
    grad = LAYOUTS[layout](case.gradient(dtype))
    for sources in ((grad, None), (None, grad[-1]), (grad, grad[0])):
        words = (*Sweep("tanh", "layer"), backend)
        torch.library.opcheck(ops.rnn_bwd, (*sources, u.tanh(), weight, weight, None, None, None, None, *words))
    for inverse, p in (("none", None), ("direct", weight), ("jacobian", None)):
        sent = (grad, None, u.tanh(), weight, p, grad[0], grad[0], u, h0, *Sweep("tanh", inverse), backend)
        torch.library.opcheck(ops.rnn_bwd, sent)
    torch.library.opcheck(ops.rnn_iterations, sent)
    if u.dim() == 3:
        layer = (grad, weight, weight[0], u.tanh(), weight, h0, weight, grad[0], grad[0], *Sweep("tanh", "layer"))
        for needed in ((True, True, True), (False, False, False)):
            torch.library.opcheck(ops.rnn_layer_bwd, (grad, grad[0], *layer, *needed, backend))
        torch.library.opcheck(ops.rnn_layer_fwd, (u, weight, weight[0], weight, h0, "tanh", backend))
    torch.library.opcheck(ops.rnn_feedback, (weight, 0.25, 1.0, backend))
    age = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(
        ops.rnn_refreshed_feedback, (weight, weight.clone(), weight.clone(), age, 0.25, 1.0, 3, backend)
    )


def test_what_must_not_be_recorded():
    """Ops that wait for the device, or count on the host, tell torch.compile so; each other one may be recorded."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "tp_kernels::" in name}
    tagged = {name for name in names if torch.Tag.cudagraph_unsafe in getattr(ops, name).default.tags}
    twins = {"rnn_bwd_waiting", "rnn_layer_bwd_waiting", "gru_bwd_waiting"}
    assert tagged == twins | {"rnn_iterations", "rnn_refreshed_feedback"}
    for name in twins:
        twin, own = (str(getattr(ops, each).default._schema) for each in (name, name.removesuffix("_waiting")))
        assert twin.replace("_waiting", "") == own


@pytest.mark.parametrize("cell", ["rnn", "rnn-layer", "gru"])
def test_a_pass_that_waits_calls_the_op_that_says_so(cell):
    """The solves of "jacobian" are checked by reading their residuals."""
    called: list[str] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.append(str(function))
            return function(*arguments, **(options or {}))

    for inverse in ("jacobian", "weight"):
        rule = tp.TargetProp(inverse=inverse)
        layer = tp.nn.GRU(3, 5, rule=rule) if cell == "gru" else tp.nn.RNN(3, 5, rule=rule)
        with Calls():
            if cell == "rnn":
                weight = layer.weight_hh_l0
                tp.rnn(torch.ones(4, 2, 5), weight, rule=rule).sum().backward()
            else:
                layer(torch.ones(4, 2, 3))[0].sum().backward()
        name = f"tp_kernels.{cell.replace('-', '_')}_bwd"
        assert (f"{name}_waiting.default" in called) == (inverse == "jacobian")
        assert (f"{name}.default" in called) == (inverse != "jacobian")
        called.clear()


# --- compile


@pytest.mark.parametrize("rule", ["weight-total", "jacobian-total", "layer-local", "direct-total"])
def test_compile(rule, backend):
    rule, dynamic = RULES[rule], rule in ("layer-local", "direct-total")

    def function(u: Tensor, weight: Tensor, h0: Tensor) -> Tensor:
        return tp.rnn(2 * u, weight, h0, rule=rule, backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    cases = (SMALL, RNNCase(T=7, B=4, N=9)) if dynamic else (SMALL,)
    stance = "default"
    for case in cases:
        leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
        with torch.compiler.set_stance(stance):
            found = compiled(*leaves)
        expected = function(*leaves)
        assert_near(found, extended(expected), "h")
        grads = (torch.autograd.grad(h, leaves, case.gradient(torch.float32)) for h in (found, expected))
        for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), *grads, strict=True):
            assert_near(pair[0], extended(pair[1]), what)
        stance = "fail_on_recompile"


# --- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [RNNCase(T=5, B=7, N=17), RNNCase(T=3, B=4, H=3, N=16)], ids=str)
def test_layouts(case, layout, dtype, backend):
    rnn_forward_check(case, dtype, backend, layout)
    for rule in BACKWARD_RULES:
        rnn_backward_check(case, RULES[rule], dtype, backend, layout)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_inputs(axis, dtype, backend):
    case = RNNCase(T=5, B=4, N=6)
    tensors = [tensor.narrow(min(axis, tensor.dim() - 1), 0, 1).expand_as(tensor) for tensor in case.tensors(dtype)]
    found = tp.rnn(*tensors, backend=backend)
    expected = tp.rnn(*(tensor.contiguous() for tensor in tensors), backend=backend)
    assert_near(found, extended(expected), "h")


@pytest.mark.parametrize("rule", BACKWARD_RULES)
@pytest.mark.parametrize("loss", [torch.sum, lambda h: h[-1].sum(), lambda h: h[:, 1].mean()], ids=["sum", "last", "b"])
@pytest.mark.parametrize("case", [SMALL, HEADS], ids=str)
def test_expanded_gradients(case, loss, rule, dtype, backend):
    """``h.sum()`` sends back one number, expanded to the whole shape."""
    leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
    h = tp.rnn(*leaves, rule=RULES[rule], backend=backend)
    found = torch.autograd.grad(loss(h), leaves, retain_graph=True)
    arrives = torch.autograd.grad(loss(h), h, retain_graph=True)[0].contiguous()
    expected = torch.autograd.grad(h, leaves, arrives)
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), found, expected, strict=True):
        assert_identical(*pair, what)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_random_shapes_and_layouts(data):
    small = st.integers(1, 40)
    case = RNNCase(
        T=data.draw(st.integers(1, 12)),
        B=data.draw(st.integers(0, 40)),
        N=data.draw(small),
        H=data.draw(st.sampled_from([None, 1, 2, 5])),
        nonlinearity=data.draw(st.sampled_from(NONLINEARITIES)),
        h0=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = data.draw(st.sampled_from(list(LAYOUTS)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    rule = RULES[data.draw(st.sampled_from(list(RULES)))]
    for backend in ("reference", "cpu") if _native.cpu_available()[0] else ("reference",):
        rnn_forward_check(case, dtype, backend, layout)
        rnn_backward_check(case, rule, dtype, backend, layout)


# --- bad input


def arguments(**changes: object) -> dict[str, object]:
    u, weight, h0 = SMALL.tensors(torch.float32)
    return {"u": u, "weight": weight, "h0": h0} | changes


ONES = torch.ones
KINDS = "float16, bfloat16, float32, float64"
BAD_INPUT = {
    "u-list": ({"u": [1.0]}, TypeError, "rnn: u must be a torch.Tensor, got list"),
    "u-int": ({"u": ONES(4, 3, 5, dtype=torch.int64)}, TypeError, f"rnn: u must be of dtype {KINDS}, got int64"),
    "u-complex": (
        {"u": ONES(4, 3, 5, dtype=torch.complex64)},
        TypeError,
        f"rnn: u must be of dtype {KINDS}, got complex64",
    ),
    "u-dim": ({"u": ONES(4, 3)}, ValueError, "rnn: u must have shape [T, B, N] or [T, B, H, N], got (4, 3)"),
    "u-T": ({"u": ONES(0, 3, 5)}, ValueError, "rnn: u must have at least one time step (T >= 1), got (0, 3, 5)"),
    "u-N": ({"u": ONES(4, 3, 0)}, ValueError, "rnn: u must have N >= 1 (and H >= 1 with heads), got (4, 3, 0)"),
    "u-H": ({"u": ONES(4, 3, 0, 5)}, ValueError, "rnn: u must have N >= 1 (and H >= 1 with heads), got (4, 3, 0, 5)"),
    "weight-none": ({"weight": None}, TypeError, "rnn: weight must be a torch.Tensor, got NoneType"),
    "weight-bool": (
        {"weight": ONES(5, 5, dtype=torch.bool)},
        TypeError,
        f"rnn: weight must be of dtype {KINDS}, got bool",
    ),
    "weight-shape": (
        {"weight": ONES(5, 4)},
        ValueError,
        "rnn: weight must have shape [N, N] = [5, 5], got (5, 4)",
    ),
    "weight-heads": (
        {"u": ONES(4, 3, 2, 5)},
        ValueError,
        "rnn: weight must have shape [H, N, N] = [2, 5, 5], got (5, 5)",
    ),
    "weight-dtype": (
        {"weight": ONES(5, 5, dtype=torch.float64)},
        TypeError,
        "rnn: weight must have the dtype of u, float32, got float64",
    ),
    "weight-device": (
        {"weight": ONES(5, 5, device="meta")},
        ValueError,
        "rnn: weight must be on the device of u, cpu, got meta",
    ),
    "h0-number": ({"h0": 0.0}, TypeError, "rnn: h0 must be a torch.Tensor, got float"),
    "h0-shape": ({"h0": ONES(1, 3, 5)}, ValueError, "rnn: h0 must have shape [B, N] = [3, 5], got (1, 3, 5)"),
    "h0-heads": (
        {"u": ONES(4, 3, 2, 5), "weight": ONES(2, 5, 5)},
        ValueError,
        "rnn: h0 must have shape [B, H, N] = [3, 2, 5], got (3, 5)",
    ),
    "h0-dtype": (
        {"h0": ONES(3, 5, dtype=torch.float16)},
        TypeError,
        "rnn: h0 must have the dtype of u, float32, got float16",
    ),
    "h0-device": ({"h0": ONES(3, 5, device="meta")}, ValueError, "rnn: h0 must be on the device of u, cpu, got meta"),
    "nonlinearity": (
        {"nonlinearity": "gelu"},
        ValueError,
        "rnn: nonlinearity must be one of 'tanh', 'relu', 'identity', got 'gelu'",
    ),
    "rule": ({"rule": "bp"}, TypeError, "rnn: rule must be a TargetProp, a BackProp or None, got str"),
    "rule-class": (
        {"rule": tp.BackProp},
        TypeError,
        "rnn: rule must be a TargetProp, a BackProp or None, got type",
    ),
    "feedback-list": ({"feedback": [1.0]}, TypeError, "rnn: feedback must be a torch.Tensor, got list"),
    "feedback-shape": (
        {"feedback": ONES(5, 4)},
        ValueError,
        "rnn: feedback must have the shape of weight, (5, 5), got (5, 4)",
    ),
    "feedback-dtype": (
        {"feedback": ONES(5, 5, dtype=torch.float64)},
        TypeError,
        "rnn: feedback must have the dtype of weight, float32, got float64",
    ),
    "feedback-device": (
        {"feedback": ONES(5, 5, device="meta")},
        ValueError,
        "rnn: feedback must be on the device of weight, cpu, got meta",
    ),
    "feedback-trained": (
        {"feedback": ONES(5, 5).requires_grad_()},
        ValueError,
        "rnn: feedback must not require a gradient, as none reaches it",
    ),
    "feedback-bp": (
        {"feedback": ONES(5, 5), "rule": tp.BackProp()},
        ValueError,
        "rnn: feedback must be None where the rule has no inverse to replace, got one with BackProp()",
    ),
    "feedback-identity": (
        {"feedback": ONES(5, 5), "rule": tp.TargetProp(inverse="identity")},
        ValueError,
        "rnn: feedback must be None where the rule has no inverse to replace, got one with "
        f"{tp.TargetProp(inverse='identity')}",
    ),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        "rnn: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, monkeypatch):
    """Type and text; nothing is computed."""
    changes, kind, text = BAD_INPUT[name]
    monkeypatch.setattr(op, "BACKENDS", None)
    with pytest.raises(kind) as caught:
        tp.rnn(**arguments(**changes))
    assert type(caught.value) is kind
    assert str(caught.value) == text


# --- contract


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("rule", RULES)
def test_deterministic(rule, nonlinearity, dtype, backend):
    """Bit for bit the same in every run, and with any number of threads on the native back-end. From one P: at power
    1/2 in float64 it is torch's decomposition, which keeps its own promises.
    """
    case = RNNCase(T=9, B=33, N=64, nonlinearity=nonlinearity)
    rule, first, feedback = RULES[rule], None, None
    if Sweep.of(rule, nonlinearity).uses_inverse:
        feedback = tp.regularized_inverse(case.tensors(dtype)[1], rule.reg, power=rule.power, backend=backend)
    for count in (1, 1, 2, 2, 3) if backend == "cpu" else (1, 1):
        torch.set_num_threads(count)
        found = gradients(case, rule, dtype, backend, feedback)
        first = first or found
        for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, first, strict=True):
            if what != "grad_weight" or count == 1:  # one product by torch, whose order of sums follows the threads
                assert_identical(*pair, what)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_not_finite_stays_in_its_sample(nonlinearity, value, dtype, backend):
    case = RNNCase(T=5, B=33, N=17, nonlinearity=nonlinearity)
    u, weight, h0 = case.tensors(dtype)
    clean = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, backend=backend)
    u[2, 4, 3] = value
    h = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, backend=backend)
    others = torch.arange(case.B) != 4
    assert_identical(h[:, others], clean[:, others], "other samples")
    assert_identical(h[:2], clean[:2], "time before")
    expected = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, backend="reference")
    assert_same_pattern(h, expected, "h")
    if np.isnan(value):
        assert h[2, 4].isnan().sum() == 1
        assert h[3:, 4].isnan().all()


@pytest.mark.parametrize("inverse", ["weight", "layer"])
def test_a_weight_that_is_not_finite_gives_nan(inverse, dtype, backend):
    case = RNNCase(T=3, B=2, N=4)
    u, weight, _ = case.tensors(dtype)
    weight[1, 2] = torch.nan
    u.requires_grad_()
    h = tp.rnn(u, weight, rule=tp.TargetProp(inverse=inverse), backend=backend)
    h.sum().backward()
    expected = tp.rnn(u.detach(), weight, backend="reference")
    assert_same_pattern(h, expected, "h")
    assert u.grad[0].isnan().all()


def test_singular_gram_matrix_in_backward(backend):
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    h = tp.rnn(torch.ones(2, 1, 2), weight, rule=tp.TargetProp(power=1.0, reg=1e-30), backend=backend)
    text = (
        "regularized_inverse: the Gram matrix is not numerically positive definite in float32 at reg=1e-30; "
        "use a larger reg or float64"
    )
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        h.sum().backward()
    assert str(caught.value) == text


@pytest.mark.parametrize("clip", [1e-3, 0.1])
def test_saturated_units_are_clipped(clip, dtype, backend):
    """``1/(1 - h²)`` stops growing at ``|h| = 1 - clip``: finite where h rounds to 1."""
    n = 3
    u = torch.full((2, 2, n), 50.0, dtype=dtype)
    u[:, 1] = -50
    weight = (0.5 * torch.eye(n, dtype=dtype)).requires_grad_()
    h0 = torch.zeros(2, n, dtype=dtype, requires_grad=True)
    rule = tp.TargetProp(inverse="layer", update="local", reg=0.25, clip=clip)
    h = tp.rnn(u, weight, h0, rule=rule, backend=backend)
    assert h.abs().eq(1).all()
    (grad,) = torch.autograd.grad(h[-1].sum(), h0)
    gain = 1 / (1 - (1 - np.longdouble(clip)) ** 2)  # P is the identity: s/(s² + r) = 1 at s = 1/2, r = 1/4
    assert_near(grad, np.full((2, n), gain**2), "grad_h0")


def test_calls_from_several_threads(backend):
    """The native kernels run without the interpreter's lock: calls side by side give what they give alone."""
    cases = [RNNCase(T=20, B=7, N=33, nonlinearity=NONLINEARITIES[k % 3]) for k in range(9)]

    def work(k: int) -> tuple[Tensor, ...]:
        return gradients(cases[k], tp.TargetProp(power=1.0), torch.float32, backend)

    alone = [work(k) for k in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(len(cases))))
    for found, expected in zip(together, alone, strict=True):
        for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, expected, strict=True):
            if what == "grad_weight":  # a product by torch
                assert_near(pair[0], extended(pair[1]), what)
            else:
                assert_same_computation(*pair, what, backend)


def test_states_changed_in_place_are_noticed(backend):
    u, weight, _ = SMALL.tensors(torch.float32)
    h = tp.rnn(u.requires_grad_(), weight, backend=backend)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_inputs_stay_as_they_are(dtype, backend):
    inputs = SMALL.tensors(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    grad = SMALL.gradient(dtype)
    tp.rnn(*leaves, backend=backend).backward(grad)
    for what, *pair in zip(("u", "weight", "h0"), (leaf.detach() for leaf in leaves), inputs, strict=True):
        assert_identical(*pair, what)
    assert_identical(grad, SMALL.gradient(dtype), "gradient")


# --- contract of the solve of "jacobian"

# As tight as the dtype lets a solve with a condition of some tens be.
TIGHT = {torch.float32: 1e-6, torch.float64: 1e-14}


def scaled_jacobian(
    ratio: float, dtype: torch.dtype, nonlinearity: str = "identity", H: int | None = None
) -> tuple[RNNCase, Tensor, Tensor, Tensor, tp.TargetProp]:
    """h, W, a displacement and a rule with ``r = ratio ‖W‖²``, ‖W‖ = 1, some units saturated."""
    case = RNNCase(T=3, B=6, N=33, H=H, nonlinearity=nonlinearity)
    _, weight, h0 = case.tensors(torch.float64)
    weight /= torch.linalg.matrix_norm(weight, 2)[..., None, None]
    h = reference.ACTIVATIONS[nonlinearity](2 * case.gradient(torch.float64, seed=4))
    rule = tp.TargetProp(inverse="jacobian", update="local", reg=ratio)
    return case, h.to(dtype), weight.to(dtype), h0.to(dtype), rule


@pytest.mark.parametrize("tight", [False, True], ids=["default", "tight"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_jacobian_solves_the_equation_that_defines_it(nonlinearity, tight, dtype, backend):
    case, h, weight, lam, rule = scaled_jacobian(0.1, dtype, nonlinearity)
    if tight:
        rule = replace(rule, rtol=TIGHT[dtype])
    sweep = Sweep.of(rule, nonlinearity)
    for t in range(case.T):
        _, found = backward_op(None, lam, h[t : t + 1], weight, None, sweep, backend)
        slope = torch.from_numpy(SLOPES[nonlinearity](h[t].double().numpy()))
        assert_solved(found, lam, slope[:, :, None] * weight.double(), rule.reg, rule.rtol)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("shape", [RNNCase(T=20, B=7, N=17), RNNCase(T=3, B=5, H=2, N=33), RNNCase(N=1)], ids=str)
def test_a_tight_solve_meets_the_ordinary_budget(shape, nonlinearity, dtype, backend):
    """As if it were direct: no term in rtol."""
    case = shape.with_(nonlinearity=nonlinearity)
    _, weight, _ = case.tensors(dtype)
    h = ops.rnn_fwd(*case.tensors(dtype), nonlinearity, "reference")
    sweep = Sweep(nonlinearity, "jacobian", reg=0.25, rtol=TIGHT[dtype])
    grad = case.gradient(dtype)
    found, plain = (backward_op(grad, None, h, weight, None, sweep, name) for name in (backend, "reference"))
    exact = rnn_backward(extended(grad), None, extended(h), None, extended(weight), None, sweep)
    for what, *parts in zip(("grad_u", "grad_h0"), found, plain, (exact[0], exact[2]), strict=True):
        assert_budget(*parts, what, condition_of_jacobian(weight, sweep))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("ratio", "dtype"), [(1e-3, torch.float32), (1e-12, torch.float64)], ids=str)
def test_smallest_regularization_of_jacobian(ratio, dtype, nonlinearity, backend):
    """r over ‖J‖², at the default rtol: it is solved, and the residual is there."""
    _, h, weight, lam, rule = scaled_jacobian(ratio, dtype, nonlinearity)
    _, found = backward_op(None, lam, h[:1], weight, None, Sweep.of(rule, nonlinearity), backend)
    slope = torch.from_numpy(SLOPES[nonlinearity](h[0].double().numpy()))
    assert_solved(found, lam, slope[:, :, None] * weight.double(), rule.reg, rule.rtol)


@pytest.mark.parametrize("H", [None, 2])
def test_what_cannot_be_solved_raises(H, backend):
    """float32 cannot resolve r = 1e-6 ‖J‖² to 1e-6. The worst sample is named; float64 is the remedy."""
    _, h, weight, _, rule = scaled_jacobian(1e-6, torch.float32, H=H)
    rule = replace(rule, rtol=1e-6)
    grad = torch.zeros_like(h)
    grad[1, 4] = 1.0  # λ is zero elsewhere, and before
    h_index = "" if H is None else r", head [01]"
    text = (
        r"rnn: inverse='jacobian' could not be solved in float32 at reg=1e-06: worst at time step [01], sample 4"
        rf"{h_index}, with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64"
    )
    arguments = None, None, None, None, *Sweep.of(rule, "identity"), backend
    for function in (ops.rnn_bwd, ops.rnn_iterations):
        with pytest.raises(torch.linalg.LinAlgError) as caught:
            function(grad, None, h, weight, None, *arguments)
        assert re.fullmatch(text, str(caught.value))
    wide = (tensor.double() for tensor in (grad, h, weight))
    found = ops.rnn_bwd(next(wide), None, *wide, None, *arguments)
    assert found[0].isfinite().all()


def test_a_weight_too_large_to_square_raises(backend):
    """W Wᵀ overflows although all numbers are finite."""
    _, h, weight, lam, rule = scaled_jacobian(0.25, torch.float32)
    with pytest.raises(torch.linalg.LinAlgError, match="could not be solved in float32"):
        backward_op(None, lam, h, 1e25 * weight, None, Sweep.of(rule, "identity"), backend)


@pytest.mark.parametrize("portions", ["checkpoints", "chunks"])
def test_the_time_step_that_is_named_counts_from_the_start(portions, backend, monkeypatch):
    """Also where backward works portion by portion; here the last one is one step."""
    case = RNNCase(T=9, B=3, N=33, nonlinearity="identity")
    u, weight, _ = case.tensors(torch.float32)
    monkeypatch.setattr(op, "_chunks", lambda T, B, N: [slice(t, min(t + 2, T)) for t in range(0, T, 2)])
    h, _ = op.rnn_layer(
        *(u, torch.eye(case.N) if portions == "chunks" else None, None, weight.requires_grad_(), None),
        nonlinearity="identity",
        rule=tp.TargetProp(inverse="jacobian", update="local", reg=1e-7, rtol=1e-6),
        checkpoint_every=2 if portions == "checkpoints" else None,
        return_sequence=True,
        backend=backend,
    )
    with pytest.raises(torch.linalg.LinAlgError, match="worst at time step 8, sample 1,"):
        h[8, 1].sum().backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "state"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_jacobian_of_what_is_not_finite(nonlinearity, where, value, dtype, backend):
    """NaN for that sample from there on back, no error, and not a bit of another sample changed."""
    case = RNNCase(T=5, B=9, N=17, nonlinearity=nonlinearity)
    u, weight, _ = case.tensors(dtype)
    h, grad = ops.rnn_fwd(u, weight, None, nonlinearity, "reference"), case.gradient(dtype)
    arguments = weight, None, None, None, None, None, *Sweep(nonlinearity, "jacobian", "local"), backend
    clean = ops.rnn_bwd(grad, None, h, *arguments)
    (grad if where == "gradient" else h)[2, 4, 3] = value
    found = ops.rnn_bwd(grad, None, h, *arguments)
    others = torch.arange(case.B) != 4
    for what, *pair in zip(("grad_u", "grad_h0"), found, clean, strict=False):
        assert_identical(pair[0][..., others, :], pair[1][..., others, :], what)
    assert_identical(found[0][3:], clean[0][3:], "later")
    if where == "gradient" or nonlinearity == "tanh":
        assert found[0][:2, 4].isnan().all() or nonlinearity == "relu"
        assert found[1][4].isnan().all()


def test_jacobian_of_a_weight_that_is_not_finite(dtype, backend):
    case = RNNCase(T=3, B=2, N=5)
    u, weight, _ = case.tensors(dtype)
    h = ops.rnn_fwd(u, weight, None, "tanh", "reference")
    weight[1, 2] = torch.nan
    found = ops.rnn_bwd(None, h[0], h, weight, *[None] * 5, *Sweep("tanh", "jacobian", "local"), backend)
    assert found[0][:-1].isnan().all()
    assert found[0][-1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_jacobian_of_any_magnitude(nonlinearity, scale, backend):
    """No square over- or underflows: displacements may decay over thousands of steps."""
    _, h, weight, lam, rule = scaled_jacobian(0.25, torch.float32, nonlinearity)
    one, other = (
        backward_op(None, s * lam, h, weight, None, Sweep.of(rule, nonlinearity), backend)[1].double()
        for s in (1.0, 2.0 ** round(np.log2(scale)))
    )
    assert_near(other.float() / 2.0 ** round(np.log2(scale)), extended(one), "grad_h0")


def test_jacobian_of_denormal_numbers(backend):
    """Displacements may decay to nothing: no error on the way."""
    _, h, weight, lam, rule = scaled_jacobian(0.25, torch.float32)
    for scale in (1e-38, 1e-40, 1e-44):
        _, found = backward_op(None, scale * lam, h, weight, None, Sweep.of(rule, "identity"), backend)
        assert found.abs().max() <= scale * lam.abs().max()


def test_jacobian_of_zero_is_zero(dtype, backend):
    """Exactly, and without an iteration: where no gradient arrives there is nothing to solve."""
    _, h, weight, lam, rule = scaled_jacobian(0.25, dtype)
    lam[2] = 0
    arguments = None, None, None, None, *Sweep.of(rule, "identity"), backend
    _, found, _ = ops.rnn_bwd(None, lam, h, weight, None, *arguments)
    assert_identical(found[2], torch.zeros_like(lam[2]), "grad_h0")
    assert found[[0, 1, 3, 4, 5]].ne(0).all()
    assert ops.rnn_iterations(None, lam, h, weight, None, *arguments)[:, 2].eq(0).all()


def test_iterations(dtype, backend):
    """The reference takes none. An orthogonal weight takes one with any slopes; others a few, whatever the threads."""
    case = RNNCase(T=6, B=60, N=33)
    u, weight, _ = case.tensors(dtype)
    orthogonal = torch.linalg.qr(weight).Q.contiguous()
    sweep = Sweep("tanh", "jacobian")
    counts = []
    for matrix in (orthogonal, weight):
        h = ops.rnn_fwd(u, matrix, None, "tanh", "reference")
        for threads in (1, 3):
            torch.set_num_threads(threads)
            counts.append(ops.rnn_iterations(None, h[0], h, matrix, *[None] * 5, *sweep, backend))
            assert counts[-1].shape == (6, 60)
            assert counts[-1].dtype == torch.int32
    if backend == "reference":
        assert not any(count.any() for count in counts)
        return
    assert counts[0].eq(1).all()
    assert torch.equal(counts[2], counts[3])
    assert counts[2].unique().numel() > 1
    assert 1 < counts[2].max() < 20


def test_samples_of_jacobian_are_independent(dtype, backend):
    """Alone, in other company or on another thread: a sample's result is the same to the bit on the native back-end."""
    case, h, weight, lam, rule = scaled_jacobian(0.05, dtype, "tanh")
    sweep = Sweep.of(rule, "tanh")
    together = backward_op(None, lam, h, weight, None, sweep, backend)
    for b in range(case.B):
        alone = backward_op(None, lam[b : b + 1], h[:, b : b + 1], weight, None, sweep, backend)
        parts = together[0][:, b : b + 1], together[1][b : b + 1]
        for what, *pair in zip(("grad_u", "grad_h0"), parts, alone, strict=True):
            if backend == "cpu":
                assert_identical(*pair, what)
            else:
                assert_near(pair[0], extended(pair[1]), what, condition=20)


# --- oracles from outside


def numpy_inverse(weight: np.ndarray, reg: float, power: float) -> np.ndarray:
    if power == 1.0:
        return np.linalg.solve(weight.T @ weight + reg * np.eye(len(weight)), weight.T)
    left, gains, right = np.linalg.svd(weight)
    return right.T @ np.diag(gains / (gains**2 + reg) ** power) @ left.T


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("rule", [name for name in RULES if name != "bp"])
def test_gradient_of_the_stated_objective(rule, nonlinearity, backend):
    """Autograd of ``Σ_t ½‖h_t(θ) - v_t‖²`` with ``v_t = h_t - λ_t`` constant; "local" holds h_{t-1} fixed."""
    rule = replace(RULES[rule], rtol=1e-13)
    case = RNNCase(T=6, B=3, N=4, nonlinearity=nonlinearity)
    h, *found = gradients(case, rule, torch.float64, backend)
    u, weight, h0 = (tensor.requires_grad_() for tensor in case.tensors(torch.float64))
    feedback = numpy_inverse(weight.detach().numpy(), rule.reg, rule.power)
    grad = case.gradient(torch.float64).numpy()
    arrays = (tensor.detach().numpy() for tensor in (u, h, h0, weight))
    lam = displacements(grad, *arrays, feedback, Sweep.of(rule, nonlinearity))
    targets = h - torch.from_numpy(lam[1:])
    activation = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}[nonlinearity]
    objective, state = 0.0, h0
    for t in range(case.T):
        before = state.detach() if rule.update == "local" else state
        state = activation(u[t] + before @ weight.mT)
        objective = objective + (state - targets[t]).square().sum() / 2
    leaves = (u, weight, h0) if rule.update == "total" else (u, weight)
    expected = torch.autograd.grad(objective, leaves)
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), found, expected, strict=False):
        assert_near(pair[0], extended(pair[1]), what, condition=20)
    if rule.update == "local":
        assert_near(found[2], lam[0].astype(np.longdouble), "grad_h0", condition=20)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_layer_inverse_is_the_jacobian_of_the_regularized_inverse(nonlinearity, backend):
    """Central differences of ``f⁻¹(v) = P(a⁻¹(v) - u_t)`` at h_t, along λ_t."""
    case = RNNCase(T=2, B=3, N=4, nonlinearity=nonlinearity)
    u, weight, h0 = case.tensors(torch.float64)
    rule = tp.TargetProp(inverse="layer", update="local", clip=1e-6)
    source = case.gradient(torch.float64)[-1]
    leaves = (u.requires_grad_(), h0.requires_grad_())
    h = tp.rnn(u, weight, h0, nonlinearity=nonlinearity, rule=rule, backend=backend)
    grad_u, grad_h0 = torch.autograd.grad(h[-1], leaves, source)
    h, u = h.detach(), u.detach()
    if nonlinearity == "relu":  # differences across the kink are none
        h = torch.where(h > 0, h, -1)
    inverse_activation = {"tanh": torch.atanh, "relu": torch.relu, "identity": lambda v: v}[nonlinearity]
    inverse = torch.from_numpy(numpy_inverse(weight.numpy(), rule.reg, rule.power))

    def carried(lam: Tensor, t: int) -> Tensor:
        small = 1e-6
        high, low = ((inverse_activation(h[t] + sign * small * lam) - u[t]) @ inverse.mT for sign in (1, -1))
        return (high - low) / (2 * small)

    first = carried(source, 1)
    slope = torch.from_numpy(SLOPES[nonlinearity](h[0].numpy()))
    assert_differences(grad_u[0], slope * first, "δ_1")
    assert_differences(grad_h0, carried(first, 0), "λ_0")


# --- identities

IDENTITY_CASE = RNNCase(T=7, B=3, N=5)
INVERSES = ("weight", "layer", "identity", "jacobian")
MODES = ({"inverse": "layer", "mode": "difference"}, {"inverse": "layer", "mode": "direct"})
WAYS = (*({"inverse": inverse} for inverse in INVERSES), *MODES)


def test_none_is_the_default_rule(dtype, backend):
    defaults = gradients(IDENTITY_CASE, None, dtype, backend)
    for what, *pair in zip("huwg", defaults, gradients(IDENTITY_CASE, tp.TargetProp(), dtype, backend), strict=True):
        assert_identical(*pair, what)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_leaves_the_forward_pass_alone(rule, dtype, backend):
    h = gradients(IDENTITY_CASE, RULES[rule], dtype, backend)[0]
    assert_identical(h, gradients(IDENTITY_CASE, tp.BackProp(), dtype, backend)[0], "h")


@pytest.mark.parametrize("rule", ["bp", "weight-total", "identity-total", "layer-total", "jacobian-total"])
def test_through_the_recurrence_h0_gets_the_transpose(rule, backend):
    """``∂h_0 = Wᵀ D_1 μ_1``, and ``∂u_1 = D_1 μ_1``."""
    _, grad_u, _, grad_h0 = gradients(IDENTITY_CASE, RULES[rule], torch.float64, backend)
    weight = IDENTITY_CASE.tensors(torch.float64)[1]
    assert_near(grad_h0, extended(grad_u[0]) @ extended(weight), "grad_h0")


@pytest.mark.parametrize("update", ["total", "local"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_last_step_is_that_of_back_propagation(way, update, dtype, backend):
    found = gradients(IDENTITY_CASE, tp.TargetProp(**way, update=update), dtype, backend)[1]
    assert_identical(found[-1], gradients(IDENTITY_CASE, tp.BackProp(), dtype, backend)[1][-1], "δ_T")
    h = gradients(IDENTITY_CASE, None, dtype, backend)[0]
    exact = (1 - extended(h[-1]) ** 2) * extended(IDENTITY_CASE.gradient(dtype)[-1])
    assert_near(found[-1], exact, "δ_T")


@pytest.mark.parametrize("update", ["total", "local"])
@pytest.mark.parametrize("inverse", INVERSES)
def test_the_step_is_a_mere_scale(inverse, update, dtype, backend):
    """A power of two scales without rounding."""
    one, eighth = (
        gradients(IDENTITY_CASE, tp.TargetProp(inverse=inverse, update=update, step=step), dtype, backend)
        for step in (1.0, 0.125)
    )
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), one[1:], eighth[1:], strict=True):
        assert_identical(pair[0] / 8, pair[1], what)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_small_differences_are_linear(nonlinearity, dtype, backend):
    small_differences_check(nonlinearity, dtype, backend)


@pytest.mark.parametrize("update", ["total", "local"])
def test_modes_agree_where_the_inverse_is_exact(update, backend):
    """Linear layer, W orthogonal, r to 0: f⁻¹(h_t) = h_{t-1}, so "direct", "difference" and "layer" are one."""
    case = IDENTITY_CASE.with_(nonlinearity="identity")
    u, weight, h0 = case.tensors(torch.float64)
    weight = torch.linalg.qr(weight).Q
    found = []
    for way in ({"inverse": "layer"}, *MODES):
        leaves = [tensor.clone().requires_grad_() for tensor in (u, weight, h0)]
        rule = tp.TargetProp(**way, update=update, reg=1e-15, step=0.5)
        h = tp.rnn(*leaves, nonlinearity="identity", rule=rule, backend=backend)
        found.append(torch.autograd.grad(h, leaves, case.gradient(torch.float64)))
    for other in found[1:]:
        for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), other, found[0], strict=True):
            assert_near(pair[0], extended(pair[1]), what, condition=20)


def test_relu_counts_as_its_own_inverse(dtype, backend):
    relu_inverse_check(dtype, backend)


@pytest.mark.parametrize("rule", RULES)
def test_the_layer_is_the_op_chunk_by_chunk(rule, dtype, backend, monkeypatch):
    """With U = I nothing but the order of sums in the weight's gradient differs, whatever the chunks."""
    case = SMALL.with_(T=7)
    rule, grad = RULES[rule], case.gradient(dtype)
    expected = gradients(case, rule, dtype, backend)
    for size in (1, 3, 7):
        monkeypatch.setattr(op, "_chunks", lambda T, B, N, n=size: [slice(t, min(t + n, T)) for t in range(0, T, n)])
        leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
        u, weight, h0 = leaves
        h, _ = op.rnn_layer(
            *(u, torch.eye(case.N, dtype=dtype), None, weight, h0),
            nonlinearity=case.nonlinearity,
            rule=rule,
            checkpoint_every=None,
            return_sequence=True,
            backend=backend,
        )
        found = h.detach(), *torch.autograd.grad(h, leaves, grad)
        for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, expected, strict=True):
            if what == "grad_weight":
                assert_near(pair[0], extended(pair[1]), what)
            else:
                assert_same_computation(*pair, what, backend)


def test_identity_gives_every_step_the_sum_of_later_gradients(dtype, backend):
    rule = tp.TargetProp(inverse="identity", update="local")
    h, grad_u, _, grad_h0 = gradients(IDENTITY_CASE, rule, dtype, backend)
    later = np.cumsum(extended(IDENTITY_CASE.gradient(dtype))[::-1], axis=0)[::-1]
    assert_near(grad_u, (1 - extended(h) ** 2) * later, "grad_u")
    assert_near(grad_h0, later[0], "grad_h0")


def test_an_orthogonal_weight_makes_target_propagation_back_propagation(backend):
    """Linear layer, W orthogonal, α = 1/2: P = Wᵀ/√(1 + r), and "local" then is BP as r goes to 0."""
    case = IDENTITY_CASE.with_(nonlinearity="identity")
    u, weight, h0 = case.tensors(torch.float64)
    weight = torch.linalg.qr(weight).Q
    found = []
    for rule in (tp.TargetProp(update="local", reg=1e-14), tp.BackProp()):
        leaves = [tensor.clone().requires_grad_() for tensor in (u, weight, h0)]
        h = tp.rnn(*leaves, nonlinearity="identity", rule=rule, backend=backend)
        found.append(torch.autograd.grad(h, leaves, case.gradient(torch.float64)))
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), *found, strict=True):
        assert_near(pair[0], extended(pair[1]), what, condition=20)


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("case", [IDENTITY_CASE, IDENTITY_CASE.with_(H=2)], ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith(("weight", "layer"))])
def test_feedback_takes_the_place_of_the_inverse(rule, case, every, dtype, backend):
    """The rule's own P put in gives the same bits; any other matrix, the oracle's recursion with that matrix."""
    rule = RULES[rule]

    def found(feedback: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
        h = tp.rnn(*leaves, feedback=feedback, rule=rule, checkpoint_every=every, backend=backend)
        return h.detach(), *torch.autograd.grad(h, leaves, case.gradient(dtype))

    u, weight, h0 = case.tensors(dtype)
    names = ("h", "grad_u", "grad_weight", "grad_h0")
    own = tp.regularized_inverse(weight, rule.reg, power=rule.power, backend=backend)
    for what, *pair in zip(names, found(own), found(None), strict=True):
        assert_identical(*pair, what)
    other = torch.linalg.qr(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(dtype)).Q
    h, *grads = found(other)
    exact = rnn_backward(
        *(extended(tensor) for tensor in (case.gradient(dtype), u, h, h0, weight, other)), Sweep.of(rule, "tanh")
    )
    for what, grad, answer in zip(names[1:], grads, exact, strict=True):
        assert_near(grad, answer, what, condition=20)


def test_identity_feedback_is_the_identity_rule(dtype, backend):
    leaves = [tensor.requires_grad_() for tensor in IDENTITY_CASE.tensors(dtype)]
    h = tp.rnn(*leaves, feedback=torch.eye(IDENTITY_CASE.N, dtype=dtype), rule=tp.TargetProp(), backend=backend)
    found = torch.autograd.grad(h, leaves, IDENTITY_CASE.gradient(dtype))
    expected = gradients(IDENTITY_CASE, tp.TargetProp(inverse="identity"), dtype, backend)[1:]
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), found, expected, strict=True):
        assert_near(pair[0], extended(pair[1]), what)


@pytest.mark.parametrize("cut", [1, 3, 6])
@pytest.mark.parametrize(
    "rule",
    [tp.BackProp(), *(tp.TargetProp(**way, update="local", rtol=1e-13) for way in WAYS)],
    ids=str,
)
@pytest.mark.parametrize("case", [IDENTITY_CASE, IDENTITY_CASE.with_(H=2)], ids=str)
def test_a_sequence_cut_in_two(case, rule, cut, backend):
    """With γ = 1 and the state handed on, two calls give the gradients of one."""
    whole = gradients(case, rule, torch.float64, backend)
    u, weight, h0 = (tensor.requires_grad_() for tensor in case.tensors(torch.float64))
    first = tp.rnn(u[:cut], weight, h0, rule=rule, backend=backend)
    second = tp.rnn(u[cut:], weight, first[-1], rule=rule, backend=backend)
    h = torch.cat([first, second])
    found = (h, *torch.autograd.grad(h, (u, weight, h0), case.gradient(torch.float64)))
    for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, whole, strict=True):
        assert_near(pair[0], extended(pair[1]), what)


@pytest.mark.parametrize("rule", RULES)
def test_heads_are_independent_calls(rule, dtype, backend):
    case = RNNCase(T=5, B=7, N=17, H=3)
    u, weight, h0 = case.tensors(dtype)
    grad = case.gradient(dtype)
    together = gradients(case, RULES[rule], dtype, backend)
    for k in range(case.H):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (u[:, :, k], weight[k], h0[:, k])]
        h = tp.rnn(*leaves, rule=RULES[rule], backend=backend)
        alone = (h, *torch.autograd.grad(h, leaves, grad[:, :, k]))
        parts = (together[0][:, :, k], together[1][:, :, k], together[2][k], together[3][:, k])
        for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), parts, alone, strict=True):
            assert_near(pair[0], extended(pair[1]), f"{what} of head {k}")


def test_samples_are_independent(dtype, backend):
    case = RNNCase(T=4, B=7, N=17)
    tensors = case.tensors(dtype)
    together = tp.rnn(*tensors, backend=backend)
    for b in range(case.B):
        alone = tp.rnn(tensors[0][:, b : b + 1], tensors[1], tensors[2][b : b + 1], backend=backend)
        assert_near(alone, extended(together[:, b : b + 1]), f"sample {b}")


# --- checkpoints, calls in a row, and the inverse that is kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", [SMALL.with_(T=7), HEADS.with_(T=7)], ids=str)
def test_backward_in_two_calls(case, rule, dtype, backend):
    """What the later steps send on makes two calls the same as one, bit for bit, for every rule."""
    u, weight, h0 = case.tensors(dtype)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, backend)
    sweep = Sweep.of(RULES[rule], case.nonlinearity)
    feedback = weight.mT.contiguous() if sweep.uses_inverse else None
    grad, last = case.gradient(dtype), case.gradient(dtype, seed=3)[0]
    whole = ops.rnn_bwd(grad, last, h, weight, feedback, None, None, u, h0, *sweep, backend)
    later = ops.rnn_bwd(grad[4:], last, h[4:], weight, feedback, None, None, u[4:], h[3], *sweep, backend)
    sent = [tensor if tensor.numel() else None for tensor in later[1:]]
    earlier = ops.rnn_bwd(grad[:4], None, h[:4], weight, feedback, *sent, u[:4], h0, *sweep, backend)
    assert_identical(torch.cat([earlier[0], later[0]]), whole[0], "grad_u")
    for what, *pair in zip(("carried", "through"), earlier[1:], whole[1:], strict=True):
        assert_identical(*pair, what)
    assert (whole[1].numel() == 0) == (sweep.inverse == "none")
    assert (whole[2].numel() == 0) == (sweep.update == "local")


@pytest.mark.parametrize("every", [1, 3, 7, 100])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", [SMALL.with_(T=7), HEADS.with_(T=7), SMALL.with_(T=7, h0=False)], ids=str)
def test_checkpoints(case, rule, every, dtype, backend):
    """States and their gradients are the same bits; the weight's gradient is the same sum in other portions."""
    rule = RULES[rule]
    plain = gradients(case, rule, dtype, backend)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype) if tensor is not None]
    h = tp.rnn(*leaves, nonlinearity=case.nonlinearity, rule=rule, checkpoint_every=every, backend=backend)
    found = h.detach(), *torch.autograd.grad(h, leaves, case.gradient(dtype))
    for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, plain, strict=False):
        if what == "grad_weight":
            assert_near(pair[0], extended(pair[1]), what)
        else:
            assert_same_computation(*pair, what, backend)


def test_checkpoints_are_all_that_is_kept(backend):
    """Of 12 steps, every third: 4 states, and the input they are computed again from."""
    u, weight, _ = SMALL.with_(T=12).tensors(torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        tp.rnn(u.requires_grad_(), weight, checkpoint_every=3, backend=backend)
    assert sorted(tensor.shape for tensor in kept) == sorted([u.shape, weight.shape, (4, *u.shape[1:])])


@pytest.mark.parametrize(("every", "kind", "text"), [
    (0, ValueError, "rnn: checkpoint_every must be at least 1, got 0"),
    (2.0, TypeError, "rnn: checkpoint_every must be an int or None, got float"),
    (True, TypeError, "rnn: checkpoint_every must be an int or None, got bool"),
])  # fmt: skip
def test_bad_checkpoints(every, kind, text):
    u, weight, _ = SMALL.tensors(torch.float32)
    with pytest.raises(kind) as caught:
        tp.rnn(u, weight, checkpoint_every=every)
    assert str(caught.value) == text


def test_inverse_is_computed_once_for_one_weight(monkeypatch):
    """Several backward passes with one weight factor it once; any change of it, by value, is noticed."""
    computed = []
    native = _native.cpu
    if native is None:
        pytest.skip(_native.cpu_available()[1])
    solve = native.regularized_solve

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

        def regularized_solve(self, **arguments: object) -> None:
            computed.append(1)
            solve(**arguments)

    monkeypatch.setattr(_native, "cpu", Counting())
    rule = tp.TargetProp(power=1.0)
    u, weight, _ = SMALL.tensors(torch.float32)
    weight.requires_grad_()

    def grad() -> Tensor:
        return torch.autograd.grad(tp.rnn(u, weight, rule=rule).sum(), weight)[0]

    feedback.forget_feedback()
    first = grad()
    assert_identical(grad(), first, "grad_weight")
    assert len(computed) == 1
    weight.data[0, 0] += 0.5  # a change that bumps no version counter
    changed = grad()
    assert len(computed) == 2
    assert not torch.equal(changed, first)
    rule = tp.TargetProp(power=1.0, reg=0.5)
    assert not torch.equal(grad(), changed)
    assert len(computed) == 3
    # Two layers that take turns do not drive out each other's.
    other = SMALL.tensors(torch.float32, seed=5)[1].requires_grad_()
    for matrix in (weight, other, weight, other):
        tp.rnn(u, matrix, rule=rule).sum().backward()
    assert len(computed) == 4


def test_smallest_clip(dtype):
    """A clip that is nothing in this dtype would divide by zero."""
    u, weight, _ = SMALL.tensors(dtype)
    eps = torch.finfo(dtype).eps
    tp.rnn(u, weight, rule=tp.TargetProp(inverse="layer", clip=eps))
    with pytest.raises(ValueError, match="clip") as caught:
        tp.rnn(u, weight, rule=tp.TargetProp(inverse="layer", clip=eps / 2))
    name = str(dtype).removeprefix("torch.")
    assert str(caught.value) == f"rnn: rule must have clip of at least {eps:.3g} in {name}, got {eps / 2!r}"


def test_the_kernels_refuse_what_they_cannot_read(backend):
    """The ops themselves can be called past the public checks; addresses are never handed over then."""
    u, weight, h0 = SMALL.tensors(torch.float32)
    if backend == "cpu":
        with pytest.raises(TypeError, match=r"all tensors must be torch.float32 on cpu, got torch.float64 on cpu"):
            ops.rnn_fwd(u, weight.double(), h0, "tanh", backend)
        with pytest.raises(TypeError, match=r"rnn: feedback must be a torch.Tensor with inverse='layer', got None"):
            backward_op(None, h0, u, weight, None, Sweep("tanh", "layer"), backend)
        with pytest.raises(TypeError, match=r"rnn: u must be a torch.Tensor with inverse='direct', got None"):
            backward_op(None, h0, u, weight, weight, Sweep("tanh", "direct"), backend)


def test_under_autocast(backend):
    tensors = SMALL.tensors(torch.float32)
    expected = gradients(SMALL, None, torch.float32, backend)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        h = tp.rnn(*leaves, backend=backend)
    found = h.detach(), *torch.autograd.grad(h, leaves, SMALL.gradient(torch.float32))
    for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), found, expected, strict=True):
        assert_identical(*pair, what)


# --- displacements in parallel over time

PARALLEL_CASES = (
    *(RNNCase(T=T, B=2, N=17) for T in (1, 2, 3, 4, 5, 64, 65, 1000)),
    RNNCase(T=4096, B=1, N=16),
    RNNCase(T=7, B=3, H=2, N=5),
    RNNCase(T=3, B=0, N=5),
)


@pytest.mark.parametrize("sources", ["last", "states", "both"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_parallel_displacements(case, power, sources, dtype):
    """All λ within the error budget of the step-by-step recursion. With the identity and "local", δ is λ."""
    weight, grad = case.tensors(dtype)[1], case.gradient(dtype)
    p = tp.regularized_inverse(weight, 1e-4 if power == 0.5 else 0.25, power=power)
    grad, last = grad if sources != "last" else None, case.gradient(dtype, 3)[0] if sources != "states" else None
    h = torch.zeros(case.shape, dtype=dtype)
    found = ops.rnn_displacements(grad, last, h, p, 0.7)
    sweep = Sweep("identity", "weight", "local", step=0.7)
    step_by_step = backward_op(grad, last, h, weight, p, sweep, "reference")
    arrives = extended(h if grad is None else grad).copy()
    if last is not None:
        arrives[-1] += extended(last)
    exact, _, first = rnn_backward(arrives, None, extended(h), None, extended(weight), extended(p), sweep)
    for what, *parts in zip(("displacements", "the first one"), found, step_by_step, (exact, first), strict=True):
        if dtype == torch.float64 and case.T >= 1000:  # squaring in the same precision: T ulp, as documented
            assert_near(parts[0], parts[2], what, condition=20)
        else:
            assert_budget(*parts, what, condition=20)
        assert parts[0].is_contiguous()


@pytest.mark.parametrize("sources", ["last", "states", "both"])
@pytest.mark.parametrize("update", ["local", "total"])
@pytest.mark.parametrize("case", [SMALL, HEADS, SMALL.with_(T=65, N=33)], ids=str)
def test_parallel_gradients_are_those_of_the_sweep(case, update, sources, dtype, backend):
    rule = tp.TargetProp(update=update, step=0.3)
    results = []
    for way in ("parallel", "sweep"):
        leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
        h, last = op.rnn_layer(
            *(leaves[0], None, None, *leaves[1:]),
            nonlinearity="tanh",
            rule=rule,
            checkpoint_every=None,
            return_sequence=True,
            displacements=way,
            backend=backend,
        )
        grads = {"last": (None, case.gradient(dtype, 3)[0]), "states": (case.gradient(dtype), None)}
        grads["both"] = grads["states"][0], grads["last"][1]
        reached = [pair for pair in zip((h, last), grads[sources], strict=True) if pair[1] is not None]
        outputs, arrived = zip(*reached, strict=True)
        results.append(torch.autograd.grad(outputs, leaves, arrived))
    for what, *pair in zip(("grad_u", "grad_weight", "grad_h0"), *results, strict=True):
        assert_near(pair[0], extended(pair[1]), what)


def test_what_was_measured_on_the_cpu_holds_there():
    """On another device the sweep is taken, until somebody has measured it."""
    for device, expected in (("cpu", True), ("meta", False)):
        h = torch.empty((8192, 1, 256), device=device)
        assert parallel.worth_it(None, h) is expected
        assert parallel.worth_it(h, h) is False


def test_parallel_compiles():
    def function(u: Tensor, weight: Tensor) -> Tensor:
        return tp.rnn(u, weight, displacements="parallel")

    u, weight, _ = SMALL.tensors(torch.float32)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(f(u, weight).sum(), weight)[0] for f in (torch.compile(function, fullgraph=True), function)
    ]
    assert_near(grads[0], extended(grads[1]), "grad_weight")


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("case", [SMALL, HEADS, SMALL.with_(B=0), SMALL.with_(T=1)], ids=str)
def test_parallel_opcheck(case, layout, dtype):
    grad, last = LAYOUTS[layout](case.gradient(dtype)), case.gradient(dtype)[0]
    weight = case.tensors(dtype)[1]
    for sources in ((grad, None), (None, last), (grad, last)):
        torch.library.opcheck(ops.rnn_displacements, (*sources, grad, weight, 0.5))


def test_where_parallel_is_chosen(monkeypatch):
    """One source and one long sequence of many units; everything else is swept."""
    calls = []
    worth_it = parallel.worth_it
    monkeypatch.setattr(parallel, "worth_it", lambda *given: calls.append(worth_it(*given)) or False)
    weight = torch.eye(256).requires_grad_()
    for T, B, source in ((8192, 1, -1), (8191, 1, -1), (8192, 2, -1), (8192, 1, slice(None))):
        h, last = op.rnn_layer(
            *(torch.zeros(T, B, 256), None, None, weight, None),
            nonlinearity="tanh",
            rule=tp.TargetProp(),
            checkpoint_every=None,
            return_sequence=True,
            backend="auto",
        )
        (last if source == -1 else h).sum().backward()
    assert calls == [True, False, False, False]


BAD_DISPLACEMENTS = {
    "word": ("fast", tp.TargetProp(), None, "must be one of 'auto', 'sweep', 'parallel', got 'fast'"),
    "bp": ("parallel", tp.BackProp(), None, "='parallel' needs a rule with inverse='weight', got BackProp()"),
    "checkpoints": (
        "parallel",
        tp.TargetProp(),
        2,
        "='parallel' needs all states: checkpoint_every must be None, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD_DISPLACEMENTS)
def test_bad_displacements(name):
    word, rule, every, text = BAD_DISPLACEMENTS[name]
    u, weight, _ = SMALL.tensors(torch.float32)
    separator = "" if text.startswith("=") else " "
    with pytest.raises(ValueError, match="displacements") as caught:
        tp.rnn(u, weight, rule=rule, checkpoint_every=every, displacements=word)
    assert str(caught.value) == f"rnn: displacements{separator}{text}"
    with pytest.raises(ValueError, match="displacements") as caught:
        tp.nn.RNN(2, 3, rule=rule, checkpoint_every=every, displacements=word)
    assert str(caught.value) == f"nn.RNN: displacements{separator}{text}"
