"""The recurrence of every cell, on every back-end: the eight tests, the numerical contract, and what all cells share.
Oracles from outside and identities of one cell are in ``test_rnn.py`` and ``test_gru.py``.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import _oracle_recurrence as oracle
import numpy as np
import pytest
import torch
from _cases import (
    ALL_SWEEPS,
    CELLS,
    DTYPES,
    LAYOUTS,
    RULES,
    SWEEPS,
    Case,
    Inputs,
    rules_of,
)
from _checks import (
    Back,
    assert_same_bits,
    assert_same_computation,
    assert_same_numbers,
    assert_sweep_budget,
    at_least_2d,
    back_of,
    backward_check,
    condition_of_jacobian,
    exact_back,
    forward_arguments,
    forward_check,
    forward_op,
    gradients,
    layer,
    leaves_of,
)
from _compare import (
    assert_budget,
    assert_identical,
    assert_near,
    assert_same_pattern,
    assert_solved,
)
from _oracle import extended
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.ops.recurrence import feedback as feedback_module
from tp_kernels.ops.recurrence import op
from tp_kernels.ops.recurrence.cell import CELLS as LIBRARY_CELLS
from tp_kernels.ops.recurrence.feedback import RefreshedFeedback
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
BOTH = ("rnn_tanh", "gru")
"""One of each shape of a cell; the activations of the first differ in a few functions only."""

SMALL = Case(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
TINY = Case(T=3, B=2, N=3)
FEW = ("bp", "weight-total", "layer-local", "jacobian-total", "direct-total")


@pytest.fixture(params=BOTH)
def cell(request: pytest.FixtureRequest) -> str:
    return request.param


def of_rules(*names: str, cells: tuple[str, ...] = BOTH) -> pytest.MarkDecorator:
    """Each cell with each of these rules (of all) that it has."""
    pairs = [(name, rule) for name in cells for rule in rules_of(name) if not names or rule in names]
    return pytest.mark.parametrize(("cell", "rule"), pairs)


def tamed(case: Case, rule: str) -> tp.BackProp | tp.TargetProp:
    """Through all inverses of the GRU a displacement grows by up to 1/clip a step."""
    changed = {"clip": 0.2} if case.cell == "gru" and rule.startswith("layer") and case.T > 2 else {}
    return replace(RULES[rule], **changed)


def tamed_condition(case: Case, rule: str) -> float | None:
    return 100.0 if tamed(case, rule) != RULES[rule] else None


# --- forward

FORWARD = (
    *(
        case.with_(cell=cell)
        for cell in BOTH
        for case in (
            Case(T=1, B=1, N=1),
            Case(T=2, B=0, N=5),
            Case(T=2, B=33, N=17, bias=cell != "gru"),
            Case(T=3, B=49, N=33, h0=False),
            Case(T=2, B=5, N=257),
            Case(T=63, B=2, N=16),
            Case(T=64, B=1, N=3),
            Case(T=65, B=7, N=5),
            Case(T=1000, B=1, N=16),
            Case(T=4, B=16, H=3, N=9),
            Case(T=3, B=0, H=2, N=3),
            Case(T=65, B=7, H=1, N=17, bias=cell != "gru", h0=False),
        )
    ),
    *(
        case.with_(cell=cell)
        for cell in ("rnn_relu", "rnn_identity")
        for case in (Case(T=63, B=2, N=33), Case(T=4, B=16, H=3, N=64))
    ),
)


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case, dtype, backend):
    forward_check(case, dtype, backend)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@of_rules("weight-total", "jacobian-total")
def test_half_precision_runs_on_the_reference(cell, rule, name):
    dtype, case = getattr(torch, name), SMALL.with_(cell=cell)
    found = gradients(case, RULES[rule], dtype, "auto")
    exact = oracle.forward(cell, *map(extended, case.tensors(dtype)))
    assert_near(found["h"], exact, "h")
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in found.values())


# --- backward

ODD = Case(T=5, B=7, H=2, N=17)
LONG = Case(T=65, B=2, N=33, h0=False)
EDGES = (
    Case(T=1, B=1, N=1),
    Case(T=2, B=0, N=5),
    Case(T=2, B=33, N=17, bias=False),
    Case(T=3, B=49, N=33),
    Case(T=2, B=9, N=128),
    Case(T=63, B=1, N=16),
    Case(T=64, B=3, N=5),
    Case(T=1000, B=1, N=16),
    Case(T=3, B=0, H=2, N=3),
)
BACKWARD = (
    *((ODD.with_(cell=cell), rule) for cell, rule in ALL_SWEEPS),
    *((LONG.with_(cell=cell), rule) for cell, rule in SWEEPS if not (cell == "gru" and rule.startswith("layer"))),
    *(
        (case.with_(cell=cell), rule)
        for case in EDGES
        for cell in BOTH
        for rule in FEW
        if rule in rules_of(cell) and (case.T <= 3 or not rule.startswith(("layer", "direct")))
    ),
)


@pytest.mark.parametrize(("case", "rule"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in BACKWARD])
def test_backward(case, rule, dtype, backend):
    backward_check(case, tamed(case, rule), dtype, backend, condition=tamed_condition(case, rule))


@pytest.mark.parametrize("sources", ["states", "last", "neither"])
@of_rules()
def test_backward_sources(cell, rule, sources, dtype, backend):
    """A gradient that does not arrive is the same as one of zeros."""
    sweep = Sweep.of(RULES[rule])
    back = back_of(HEADS.with_(cell=cell), dtype, sweep)
    arrives = {"grad": back.grad if sources == "states" else None, "last": back.last if sources == "last" else None}
    zeros = {
        name: torch.zeros_like(getattr(back, name)) if tensor is None else tensor for name, tensor in arrives.items()
    }
    found, expected = (back.with_(**given).run(sweep, backend) for given in (arrives, zeros))
    assert_same_bits(found.swept, expected.swept)
    assert found.grad_u.any() == (sources != "neither" or sweep.inverse == "direct")


GRADIENTS = (
    *(HEADS.with_(cell=cell) for cell in CELLS),
    *(Case(T=33, B=3, N=33, cell=cell, bias=False, h0=False) for cell in BOTH),
)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, id=f"{case}-{rule}")
        for case in GRADIENTS
        for rule in rules_of(case.cell)
        if (case.cell, rule) in SWEEPS and not (case.T > 4 and case.cell == "gru" and rule.startswith("layer"))
    ],
)
def test_gradients(case, rule, dtype, backend):
    """All gradients of the public function, with the P it computes itself. Each stage answers for its own errors: at
    the states, the P and the δ that were found.
    """
    rule, condition = tamed(case, rule), tamed_condition(case, rule) or 20
    sweep, inputs = Sweep.of(rule), case.tensors(dtype)

    def found_and_exact(name: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        found = gradients(case, rule, dtype, name)
        back = Back(case.cell, found["h"], inputs.weight, grad=case.gradient(dtype), u=inputs.u, h0=inputs.h0)
        if sweep.uses_inverse:
            blocks = LIBRARY_CELLS[case.cell].inverted(inputs.weight, sweep.inverse)
            back = back.with_(feedback=tp.regularized_inverse(blocks, rule.reg, power=rule.power, backend=name))
        return found, exact_back(back, inputs.bias, sweep)._asdict()

    (found, exact), (plain, plain_exact) = found_and_exact(backend), found_and_exact("reference")
    assert_budget(found["h"], plain["h"], oracle.forward(case.cell, *map(extended, inputs)), "h")
    assert found.keys() == {
        "h",
        "grad_u",
        "grad_weight",
        *(f"grad_{x}" for x in ("bias", "h0") if inputs._asdict()[x] is not None),
    }
    for what in found.keys() - {"h"}:
        parts = [at_least_2d(results[what]) for results in (found, plain)]
        answers = [np.atleast_2d(answer[what]) for answer in (exact, plain_exact)]
        if what in ("grad_weight", "grad_bias"):
            rtol = sweep.rtol if sweep.inverse == "jacobian" else 0.0
            assert_budget(*parts, answers[0], what, condition, reference_exact=answers[1], rtol=rtol)
        else:
            assert_sweep_budget(case, sweep, *parts, answers[0], what, condition, reference_exact=answers[1])


# --- gradcheck


@pytest.mark.parametrize(
    "case",
    [
        *(TINY.with_(cell=cell) for cell in CELLS),
        *(case.with_(cell=cell) for cell in BOTH for case in (TINY.with_(H=2), TINY.with_(bias=False, h0=False))),
        *(Case(T=1, B=1, N=1, cell=cell) for cell in BOTH),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_gradcheck(case, checkpoint_every, backend):
    """Of back-propagation, through both outputs, the last state's own included."""
    leaves = leaves_of(case.tensors(torch.float64))

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(leaves, inputs, strict=True))
        return op.recurrent_layer(
            case.cell,
            given["u"],
            given["weight"],
            given.get("h0"),
            bias=given.get("bias"),
            rule=tp.BackProp(),
            checkpoint_every=checkpoint_every,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.vector_norm], ids=["linear", "not linear"])
@pytest.mark.parametrize("by_name", [False, True], ids=["backward", "grad"])
def test_second_derivatives_are_refused(by_name, loss, cell, backend):
    """Also where the gradient that arrives is a constant: the states depend on u all the same."""
    case = SMALL.with_(cell=cell)
    inputs = case.tensors(torch.float64)
    leaves = list(leaves_of(inputs).values())
    found = loss(layer(case, inputs, backend=backend))
    (grad,) = torch.autograd.grad(found, inputs.u, create_graph=True)
    penalized = found + grad.square().sum()
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(penalized, leaves) if by_name else penalized.backward()


def test_a_graph_of_the_gradients_inside_checkpoint(cell, backend):
    """What is saved is unpacked once: a checkpoint computes it again for that, and refuses a second time."""
    case = SMALL.with_(cell=cell)
    inputs = case.tensors(torch.float64)
    leaves = leaves_of(inputs)

    def function(*tensors: Tensor) -> Tensor:
        return layer(case, Inputs(*tensors), backend=backend)

    found, expected = (
        torch.autograd.grad(states.sum(), list(leaves.values()), create_graph=create_graph)
        for states, create_graph in (
            (torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False), True),
            (function(*inputs), False),
        )
    )
    assert_same_bits(dict(zip(leaves, found, strict=True)), dict(zip(leaves, expected, strict=True)))


@pytest.mark.parametrize("needed", [("u",), ("weight",), ("bias",), ("h0",), ("u", "h0")], ids="-".join)
def test_some_gradients_only(needed, cell, dtype, backend):
    """What is not asked for stays away, and leaves the others as they are."""
    case = HEADS.with_(cell=cell)
    inputs = case.tensors(dtype)
    leaves = {name: getattr(inputs, name) for name in needed if getattr(inputs, name) is not None}
    if not leaves:
        return  # a cell without a bias of its own
    for tensor in leaves.values():
        tensor.requires_grad_()
    layer(case, inputs, backend=backend).backward(case.gradient(dtype))
    expected = gradients(case, None, dtype, backend)
    for name, tensor in inputs._asdict().items():
        if name in leaves:
            assert_identical(tensor.grad, expected[f"grad_{name}"], name)
        else:
            assert tensor is None or tensor.grad is None


# --- opcheck

OPCHECK = {
    "contiguous": (SMALL, "contiguous"),
    "heads": (HEADS, "contiguous"),
    "permuted": (SMALL, "permuted"),
    "sliced": (SMALL, "sliced"),
    "B0": (SMALL.with_(B=0), "contiguous"),
    "T1": (SMALL.with_(T=1, h0=False, bias=False), "contiguous"),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, cell, backend):
    case, layout = OPCHECK[name]
    case, place = case.with_(cell=cell), LAYOUTS[layout]
    inputs = [None if tensor is None else place(tensor) for tensor in case.tensors(torch.float32)]
    for keep in (True, False):
        torch.library.opcheck(ops.recurrence_fwd, forward_arguments(cell, *inputs, keep=keep, backend=backend))
    for inverse in ("none", "layer", "jacobian", *(["direct"] if cell != "gru" else [])):
        sweep = Sweep(inverse, "local" if inverse == "layer" else "total")
        back = back_of(case, torch.float32, sweep).map(place)
        sent = back.with_(carried=back.grad[0], through=back.grad[0])
        for called in (back.with_(grad=None), sent.with_(last=None)):
            torch.library.opcheck(ops.recurrence_bwd, called.arguments(sweep, backend, sums=inverse != "layer"))


@pytest.mark.parametrize("case", [SMALL, SMALL.with_(B=0), SMALL.with_(T=1, h0=False, bias=False)], ids=str)
def test_opcheck_with_a_projection(case, cell, backend):
    case = case.with_(cell=cell)
    inputs = case.tensors(torch.float32)
    weights = {
        "projection": torch.randn(inputs.u.shape[-1], 7),
        "input_bias": torch.randn(inputs.u.shape[-1]),
    }
    x = torch.randn(case.T, case.B, 7)
    arguments = forward_arguments(cell, x, *inputs[1:], **weights, backend=backend)
    torch.library.opcheck(ops.recurrence_fwd, arguments)
    sweep = Sweep("jacobian")
    back = back_of(case, torch.float32, sweep).with_(u=x)
    torch.library.opcheck(ops.recurrence_bwd, back.arguments(sweep, backend, sums=True, **weights))


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 5, 5)], ids=str)
def test_opcheck_of_the_feedback(shape, backend):
    weight, age = torch.randn(shape), torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(ops.recurrence_feedback, (weight, 0.25, 1.0, backend))
    kept = weight.clone(), weight.clone(), age
    torch.library.opcheck(ops.recurrence_refreshed_feedback, (weight, *kept, 0.25, 1.0, 3, backend))


# --- compile


@of_rules("weight-total", "jacobian-total", "layer-local", "direct-total")
def test_compile(cell, rule, backend):
    """``layer`` and ``direct`` with dynamic shapes."""
    rule, dynamic = RULES[rule], rule in ("layer-local", "direct-total")

    def function(case: Case, inputs: Inputs) -> Tensor:
        return layer(case, inputs._replace(u=2 * inputs.u), rule=rule, backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    cases = (SMALL, Case(T=7, B=4, N=9)) if dynamic else (SMALL,)
    stance = "default"
    for case in (case.with_(cell=cell) for case in cases):
        results = []
        for called in (compiled, function):
            inputs = case.tensors(torch.float32)
            leaves = leaves_of(inputs)
            with torch.compiler.set_stance(stance if called is compiled else "default"):
                h = called(SMALL.with_(cell=cell), inputs)  # of the case it reads the cell only
            grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float32))
            results.append({"h": h.detach(), **dict(zip(leaves, grads, strict=True))})
        assert_same_numbers(*results)
        stance = "fail_on_recompile"


# --- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@of_rules(*FEW)
def test_layouts(cell, rule, layout, dtype, backend):
    for case in (Case(T=2, B=7, N=17, cell=cell), Case(T=2, B=4, H=3, N=16, cell=cell)):
        forward_check(case, dtype, backend, layout)
        backward_check(case, RULES[rule], dtype, backend, layout)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_inputs(axis, cell, dtype, backend):
    case = Case(T=5, B=4, N=6, cell=cell)
    inputs = [x.narrow(min(axis, x.dim() - 1), 0, 1).expand_as(x) for x in case.tensors(dtype) if x is not None]
    bias = [] if cell == "gru" else [None]
    inputs = Inputs(*inputs[:2], *bias, *inputs[2:])
    plain = Inputs(*(None if tensor is None else tensor.contiguous() for tensor in inputs))
    found, expected = (layer(case, given, backend=backend) for given in (inputs, plain))
    assert_near(found, extended(expected), "h")


@pytest.mark.parametrize("loss", [torch.sum, lambda h: h[-1].sum(), lambda h: h[:, 1].mean()], ids=["sum", "last", "b"])
@of_rules(*FEW)
def test_expanded_gradients(cell, rule, loss, dtype, backend):
    """``h.sum()`` sends back one number, expanded to the whole shape."""
    case = HEADS.with_(cell=cell)
    inputs = case.tensors(dtype)
    leaves = leaves_of(inputs)
    h = layer(case, inputs, rule=RULES[rule], backend=backend)
    found = torch.autograd.grad(loss(h), list(leaves.values()), retain_graph=True)
    arrives = torch.autograd.grad(loss(h), h, retain_graph=True)[0].contiguous()
    expected = torch.autograd.grad(h, list(leaves.values()), arrives)
    assert_same_bits(dict(zip(leaves, found, strict=True)), dict(zip(leaves, expected, strict=True)))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_random_shapes_and_layouts(data):
    small = st.integers(1, 40)
    cell = data.draw(st.sampled_from([*CELLS, "gru", "gru"]))
    case = Case(
        T=data.draw(st.integers(1, 12)),
        B=data.draw(st.integers(0, 50)),
        N=data.draw(small),
        H=data.draw(st.sampled_from([None, 1, 2, 5])),
        cell=cell,
        bias=data.draw(st.booleans()),
        h0=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = data.draw(st.sampled_from(list(LAYOUTS)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    rule = data.draw(st.sampled_from(list(rules_of(cell))))
    if cell == "gru" and rule.startswith("layer"):
        case = case.with_(T=min(case.T, 4))
    for backend in ("reference", "cpu") if _native.cpu_available()[0] else ("reference",):
        forward_check(case, dtype, backend, layout)
        backward_check(case, tamed(case, rule), dtype, backend, layout, condition=tamed_condition(case, rule))


# --- bad input

ONES = torch.ones
KINDS = "float16, bfloat16, float32, float64"


def bad_input(name: str) -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    """Of both cells: G gates, N = 5; and what each has of its own."""
    G = {"rnn": 1, "gru": 3}[name]
    wide, GN = 5 * G, "N" if G == 1 else "3N"
    expected = f"{name}: u must have shape [T, B, {GN}] or [T, B, H, {GN}]"
    multiple = "" if G == 1 else "a last axis of 3N with "
    units = f"{name}: u must have {multiple}N >= 1 (and H >= 1 with heads)"
    replaced = "weight" if G == 1 else "the blocks of weight it replaces P of"
    trained = ONES(5, 5).requires_grad_()
    identity = tp.TargetProp(inverse="identity")
    no_inverse = f"{name}: feedback must be None where the rule has no inverse to replace, got one with"
    bad = {
        "u-list": ({"u": [1.0]}, TypeError, f"{name}: u must be a torch.Tensor, got list"),
        "u-int": (
            {"u": ONES(4, 3, wide, dtype=torch.int64)},
            TypeError,
            f"{name}: u must be of dtype {KINDS}, got int64",
        ),
        "u-complex": (
            {"u": ONES(4, 3, wide, dtype=torch.complex64)},
            TypeError,
            f"{name}: u must be of dtype {KINDS}, got complex64",
        ),
        "u-dim": ({"u": ONES(4, 3)}, ValueError, f"{expected}, got (4, 3)"),
        "u-T": (
            {"u": ONES(0, 3, wide)},
            ValueError,
            f"{name}: u must have at least one time step (T >= 1), got (0, 3, {wide})",
        ),
        "u-N": ({"u": ONES(4, 3, 0)}, ValueError, f"{units}, got (4, 3, 0)"),
        "u-H": ({"u": ONES(4, 3, 0, wide)}, ValueError, f"{units}, got (4, 3, 0, {wide})"),
        "weight-none": ({"weight": None}, TypeError, f"{name}: weight must be a torch.Tensor, got NoneType"),
        "weight-bool": (
            {"weight": ONES(wide, 5, dtype=torch.bool)},
            TypeError,
            f"{name}: weight must be of dtype {KINDS}, got bool",
        ),
        "weight-shape": (
            {"weight": ONES(wide, 4)},
            ValueError,
            f"{name}: weight must have shape [{GN}, N] = [{wide}, 5], got ({wide}, 4)",
        ),
        "weight-heads": (
            {"u": ONES(4, 3, 2, wide)},
            ValueError,
            f"{name}: weight must have shape [H, {GN}, N] = [2, {wide}, 5], got ({wide}, 5)",
        ),
        "weight-dtype": (
            {"weight": ONES(wide, 5, dtype=torch.float64)},
            TypeError,
            f"{name}: weight must have the dtype of u, float32, got float64",
        ),
        "weight-device": (
            {"weight": ONES(wide, 5, device="meta")},
            ValueError,
            f"{name}: weight must be on the device of u, cpu, got meta",
        ),
        "h0-number": ({"h0": 0.0}, TypeError, f"{name}: h0 must be a torch.Tensor, got float"),
        "h0-shape": (
            {"h0": ONES(1, 3, 5)},
            ValueError,
            f"{name}: h0 must have shape [B, N] = [3, 5], got (1, 3, 5)",
        ),
        "h0-heads": (
            {"u": ONES(4, 3, 2, wide), "weight": ONES(2, wide, 5)},
            ValueError,
            f"{name}: h0 must have shape [B, H, N] = [3, 2, 5], got (3, 5)",
        ),
        "h0-dtype": (
            {"h0": ONES(3, 5, dtype=torch.float16)},
            TypeError,
            f"{name}: h0 must have the dtype of u, float32, got float16",
        ),
        "h0-device": (
            {"h0": ONES(3, 5, device="meta")},
            ValueError,
            f"{name}: h0 must be on the device of u, cpu, got meta",
        ),
        "rule": (
            {"rule": "bp"},
            TypeError,
            f"{name}: rule must be a TargetProp, a BackProp or None, got str",
        ),
        "rule-class": (
            {"rule": tp.BackProp},
            TypeError,
            f"{name}: rule must be a TargetProp, a BackProp or None, got type",
        ),
        "rule-small-clip": (
            {"rule": tp.TargetProp(inverse="layer", clip=1e-9)},
            ValueError,
            f"{name}: rule must have clip of at least 1.19e-07 in float32, got 1e-09",
        ),
        "rule-small-reg": (
            {"rule": tp.TargetProp(inverse="jacobian", reg=1e-50)},
            ValueError,
            f"{name}: reg must be positive and finite in float32, got 1e-50",
        ),
        "feedback-list": ({"feedback": [1.0]}, TypeError, f"{name}: feedback must be a torch.Tensor, got list"),
        "feedback-shape": (
            {"feedback": ONES(5, 4)},
            ValueError,
            f"{name}: feedback must have the shape of {replaced}, (5, 5), got (5, 4)",
        ),
        "feedback-dtype": (
            {"feedback": ONES(5, 5, dtype=torch.float64)},
            TypeError,
            f"{name}: feedback must have the dtype of {replaced}, float32, got float64",
        ),
        "feedback-device": (
            {"feedback": ONES(5, 5, device="meta")},
            ValueError,
            f"{name}: feedback must be on the device of {replaced}, cpu, got meta",
        ),
        "feedback-trained": (
            {"feedback": trained},
            ValueError,
            f"{name}: feedback must not require a gradient, as none reaches it",
        ),
        "feedback-bp": (
            {"feedback": ONES(5, 5), "rule": tp.BackProp()},
            ValueError,
            f"{no_inverse} BackProp()",
        ),
        "feedback-identity": (
            {"feedback": ONES(5, 5), "rule": identity},
            ValueError,
            f"{no_inverse} {identity}",
        ),
        "checkpoint_every": (
            {"checkpoint_every": 0},
            ValueError,
            f"{name}: checkpoint_every must be at least 1, got 0",
        ),
        "checkpoint_every-float": (
            {"checkpoint_every": 2.0},
            TypeError,
            f"{name}: checkpoint_every must be an int or None, got float",
        ),
        "checkpoint_every-bool": (
            {"checkpoint_every": True},
            TypeError,
            f"{name}: checkpoint_every must be an int or None, got bool",
        ),
        "backend": (
            {"backend": "gpu"},
            ValueError,
            f"{name}: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
        ),
    }
    own = {
        "rnn": {
            "nonlinearity": (
                {"nonlinearity": "gelu"},
                ValueError,
                "rnn: nonlinearity must be one of 'tanh', 'relu', 'identity', got 'gelu'",
            ),
        },
        "gru": {
            "u-gates": ({"u": ONES(4, 3, 16)}, ValueError, f"{units}, got (4, 3, 16)"),
            "bias-list": ({"bias": [1.0]}, TypeError, "gru: bias must be a torch.Tensor, got list"),
            "bias": ({"bias": ONES(15)}, ValueError, "gru: bias must have shape [N] = [5], got (15,)"),
            "bias-heads": (
                {"u": ONES(4, 3, 2, 15), "weight": ONES(2, 15, 5), "h0": None, "bias": ONES(5)},
                ValueError,
                "gru: bias must have shape [H, N] = [2, 5], got (5,)",
            ),
            "bias-dtype": (
                {"bias": ONES(5).double()},
                TypeError,
                "gru: bias must have the dtype of u, float32, got float64",
            ),
            "rule-mode": (
                {"rule": tp.TargetProp(inverse="layer", mode="direct")},
                ValueError,
                "gru: rule must have mode='linearized', got mode='direct'",
            ),
            "rule-clip": (
                {"rule": tp.TargetProp(inverse="layer", clip=0.5)},
                ValueError,
                "gru: rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got 0.5",
            ),
            "feedback-blocks": (
                {"feedback": ONES(5, 5), "rule": tp.TargetProp(inverse="layer")},
                ValueError,
                "gru: feedback must have the shape of the blocks of weight it replaces P of, (3, 5, 5), got (5, 5)",
            ),
        },
    }
    return bad | own[name]


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name in ("rnn", "gru") for what in bad_input(name)], ids=str
)
def test_bad_input(name, what, monkeypatch):
    """Type and text; nothing is computed."""
    changes, kind, text = bad_input(name)[what]
    monkeypatch.setattr(op, "backends", None)
    wide = 5 if name == "rnn" else 15
    with pytest.raises(kind) as caught:
        getattr(tp, name)(**{"u": ONES(4, 3, wide), "weight": ONES(wide, 5), "h0": ONES(3, 5)} | changes)
    assert type(caught.value) is kind
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["rnn", "gru"])
def test_smallest_clip(name, dtype):
    """A clip that is nothing in this dtype would divide by zero."""
    u, weight = (ONES(4, 3, 5), ONES(5, 5)) if name == "rnn" else (ONES(4, 3, 15), ONES(15, 5))
    eps = torch.finfo(dtype).eps
    called = getattr(tp, name)
    called(u.to(dtype), weight.to(dtype), rule=tp.TargetProp(inverse="layer", clip=eps))
    with pytest.raises(ValueError, match="rule must have clip of at least"):
        called(u.to(dtype), weight.to(dtype), rule=tp.TargetProp(inverse="layer", clip=eps / 2))


BAD_WORDS = {
    "none": ("", "the words inverse, update, step, clip, reg, rtol"),
    "order": ("update=total inverse=none step=1 clip=0 reg=1 rtol=1", "the words inverse, update, step, clip, reg, rtol"),
    "more": (f"{Sweep().words} nonlinearity=tanh", "the words inverse, update, step, clip, reg, rtol"),
    "number": (Sweep().words.replace("step=1.0", "step=x"), "a number as step"),
    "inverse": (
        Sweep().words.replace("inverse=none", "inverse=linearized"),
        "as inverse one of none, weight, layer, identity, jacobian, difference, direct",
    ),
    "update": (Sweep().words.replace("update=total", "update=both"), "as update one of total, local"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_words_that_are_no_sweep(name):
    """Of the op, which can be called past the public checks."""
    words, expected = BAD_WORDS[name]
    text = f"sweep must have {expected}, got {words!r}"
    *arguments, _, first, backend = back_of(SMALL, torch.float32, Sweep()).arguments(Sweep(), "reference")
    for called in (lambda: Sweep.parse(words), lambda: ops.recurrence_bwd(*arguments, words, first, backend)):
        with pytest.raises(ValueError, match="sweep must have") as caught:
            called()
        assert str(caught.value) == text


@pytest.mark.parametrize("sweep", [Sweep.of(rule) for rule in RULES.values()], ids=RULES)
def test_words_are_the_sweep(sweep):
    assert Sweep.parse(sweep.words) == sweep


def test_the_kernels_refuse_what_they_cannot_read(cell, cpu):
    """The ops themselves can be called past the public checks; addresses are never handed over then."""
    inputs = SMALL.with_(cell=cell).tensors(torch.float32)
    with pytest.raises(TypeError, match=r"all tensors must be torch.float32 on cpu, got torch.float64 on cpu"):
        forward_op(cell, inputs.u, inputs.weight.double(), backend="cpu")
    for inverse in ("weight", "layer", "direct"):
        if cell == "gru" and inverse == "direct":
            continue
        back = back_of(SMALL.with_(cell=cell), torch.float32, Sweep(inverse))
        for missing in ("feedback", "u") if inverse == "direct" else ("feedback",):
            name = cell.partition("_")[0]
            text = rf"{name}: {missing} must be a torch.Tensor with inverse='{inverse}', got None"
            with pytest.raises(TypeError, match=text):
                back.with_(**{missing: None}).run(Sweep(inverse), "cpu")
