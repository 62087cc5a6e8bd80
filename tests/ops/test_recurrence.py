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
    parts_of,
    supports,
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
from tp_kernels.ops.recurrence import op
from tp_kernels.ops.recurrence.cell import CELLS as LIBRARY_CELLS
from tp_kernels.ops.recurrence.feedback import RefreshedFeedback, forget_feedback
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
KINDS = ("rnn_tanh", "gru", "lstm")
"""One of each shape of a cell; the activations of the first differ in a few functions only."""
SOLVED = tuple(cell for cell in CELLS if cell != "lstm")
"""Those with a solver of "jacobian" on every back-end. What the reference does is the same for all."""

SMALL = Case(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
TINY = Case(T=3, B=2, N=3)
FLOAT = torch.float32  # where the question is not one of precision
FEW = ("bp", "weight-total", "layer-local", "jacobian-total", "direct-total")
of_both = pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])


@pytest.fixture(params=KINDS)
def cell(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def supported(request: pytest.FixtureRequest) -> None:
    """A back-end that does not have the rule of that cell is skipped with its reason."""
    given = getattr(request.node, "callspec", None)
    cell, rule, backend = (given and given.params.get(name) for name in ("cell", "rule", "backend"))
    if given and "case" in given.params:
        cell = given.params["case"].cell
    if given and "way" in given.params:
        rule = tp.TargetProp(**given.params["way"])
    if cell and rule and backend:
        ok, reason = supports(cell, Sweep.of(RULES[rule] if isinstance(rule, str) else rule), backend)
        if not ok:
            pytest.skip(f"back-end {backend!r}: {reason}")


def of_rules(*names: str) -> pytest.MarkDecorator:
    """Each cell with each of these rules that it has, or with all that are in ``SWEEPS``."""
    pairs = [(name, rule) for name, rule in SWEEPS if name in KINDS and (not names or rule in names)]
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
        for cell in KINDS
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
        if cell != "lstm" or 2 <= case.T <= 4
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
    assert_near(found["h"], exact[..., : case.N], "h")
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
        for cell in KINDS
        for rule in FEW
        if rule in rules_of(cell)
        and (cell != "lstm" or rule == "weight-total")
        and (case.T <= 3 or not rule.startswith(("layer", "direct")))
    ),
)


@pytest.mark.parametrize(
    ("case", "rule", "backend"),
    [
        pytest.param(case, rule, name, id=f"{case}-{rule}-{name}")
        for case, rule in BACKWARD
        for name in ("reference", "cpu")
        if name == "cpu" or case.with_(cell=ODD.cell) == ODD  # what the others are checked against is held to the
    ],  # exact answer each time
    indirect=["backend"],
)
def test_backward(case, rule, dtype, backend):
    backward_check(case, tamed(case, rule), dtype, backend, condition=tamed_condition(case, rule))


@of_rules()
def test_backward_sources(cell, rule, backend):
    """A gradient that does not arrive is the same as one of zeros."""
    sweep = Sweep.of(RULES[rule])
    back = back_of(HEADS.with_(cell=cell), FLOAT, sweep)
    zeros = back.map(torch.zeros_like, "grad", "last")
    for sources in ("grad", "last", "neither"):
        arrives = {name: getattr(back, name) for name in ("grad", "last") if name == sources}
        found = back.with_(**({"grad": None, "last": None} | arrives)).run(sweep, backend)
        expected = zeros.with_(**arrives).run(sweep, backend)
        assert_same_bits(found.swept, expected.swept)
        assert found.grad_u.any() == (sources != "neither" or sweep.inverse == "direct")


GRADIENTS = (
    *(HEADS.with_(cell=cell) for cell in CELLS),
    *(Case(T=33, B=3, N=33, cell=cell, bias=False, h0=False) for cell in KINDS),
)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, id=f"{case}-{rule}")
        for case in GRADIENTS
        for rule in rules_of(case.cell)
        if (case.cell, rule) in SWEEPS
        and not (case.T > 4 and case.cell == "gru" and rule.startswith("layer"))
        and not (case.T > 4 and case.cell == "lstm" and rule != "weight-total")
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
        kept = forward_op(case.cell, *inputs, backend=name).kept
        given = {"grad": case.gradient(dtype), "u": inputs.u, "h0": inputs.h0}
        back = Back(case.cell, found["h"], inputs.weight, kept=kept, **given)
        if sweep.uses_inverse:
            blocks = LIBRARY_CELLS[case.cell].inverted(inputs.weight, sweep.inverse)
            back = back.with_(feedback=tp.regularized_inverse(blocks, rule.reg, power=rule.power, backend=name))
        return found, exact_back(back, inputs.bias, sweep)._asdict()

    (found, exact), (plain, plain_exact) = found_and_exact(backend), found_and_exact("reference")
    states = oracle.forward(case.cell, *map(extended, inputs))
    assert_budget(found["h"], plain["h"], states[..., : case.N], "h")
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
        *(case.with_(cell=cell) for cell in KINDS for case in (TINY.with_(H=2), TINY.with_(bias=False, h0=False))),
        *(Case(T=1, B=1, N=1, cell=cell) for cell in ("rnn_tanh", "gru")),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_gradcheck(case, checkpoint_every, backend):
    """Of back-propagation, through all outputs, the last state's own included."""
    leaves = leaves_of(case.tensors(torch.float64))

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, inputs, strict=True))
        h, last, _ = op.recurrent_layer(
            case.cell,
            given["u"],
            given["weight"],
            *parts_of(case.cell, given.get("h0")),
            bias_hh=given.get("bias"),
            rule=tp.BackProp(),
            checkpoint_every=checkpoint_every,
            backend=backend,
        )
        return h, *last

    assert torch.autograd.gradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.vector_norm], ids=["linear", "not linear"])
@pytest.mark.parametrize("by_name", [False, True], ids=["backward", "grad"])
@of_both
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


@of_both
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
    for inverse in ("none", "weight", "layer", "jacobian", "direct"):
        sweep = Sweep(inverse, "local" if inverse in ("weight", "layer") else "total")
        if inverse not in ("none", *LIBRARY_CELLS[cell].inverses) or not supports(cell, sweep, backend)[0]:
            continue
        back = back_of(case, torch.float32, sweep).map(place)
        sent = back.with_(carried=back.last, through=back.last)
        for called in (back.with_(grad=None), sent.with_(last=None)):
            torch.library.opcheck(ops.recurrence_bwd, called.arguments(sweep, backend, sums=inverse != "layer"))


@pytest.mark.parametrize("case", [SMALL, SMALL.with_(B=0), SMALL.with_(T=1, h0=False, bias=False)], ids=str)
def test_opcheck_with_a_projection(case, cell, backend):
    case = case.with_(cell=cell)
    inputs = case.tensors(torch.float32)
    wide = inputs.u.shape[-1]
    weight_ih, bias_ih, bias_hh = torch.randn(wide, 7), torch.randn(wide), torch.randn(wide)
    x, start = torch.randn(case.T, case.B, 7), None if inputs.h0 is None else inputs.h0[None]
    options = {"weight_ih": weight_ih, "bias_ih": bias_ih, "backend": backend}
    for every, sequence in ((None, True), (3, True), (3, False)):
        arguments = forward_arguments(cell, x, inputs.weight, bias_hh, start, **options, every=every, sequence=sequence)
        torch.library.opcheck(ops.recurrence_fwd, arguments)
    sweep = Sweep("jacobian" if supports(cell, Sweep("jacobian"), backend)[0] else "identity")
    back = back_of(case, torch.float32, sweep)
    back = back.with_(u=x, h0=start, last=back.last[None])
    torch.library.opcheck(ops.recurrence_bwd, back.arguments(sweep, sums=True, bias_hh=bias_hh, **options))
    ends = torch.stack([*back.states[2:-1:3], back.states[-1]])
    back = back.with_(h=ends, kept=None)
    torch.library.opcheck(ops.recurrence_bwd, back.arguments(sweep, sums=True, bias_hh=bias_hh, every=3, **options))


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 5, 5)], ids=str)
def test_opcheck_of_the_feedback(shape, backend):
    weight, age = torch.randn(shape), torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(ops.recurrence_feedback, (weight, Sweep("weight").words, backend))
    kept = weight.clone(), weight.clone(), age
    torch.library.opcheck(ops.recurrence_refreshed_feedback, (weight, *kept, Sweep("weight").words, 3, backend))


def test_what_must_not_be_recorded():
    """Ops that wait for the device, or count on the host, tell torch.compile so; each other one may be recorded."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "tp_kernels::" in name}
    tagged = {name for name in names if torch.Tag.cudagraph_unsafe in getattr(ops, name).default.tags}
    assert tagged == {"recurrence_bwd_waiting", "recurrence_refreshed_feedback"}
    twin, own = (str(getattr(ops, name).default._schema) for name in ("recurrence_bwd_waiting", "recurrence_bwd"))
    assert twin.replace("_waiting", "") == own


@pytest.mark.parametrize("layer", [tp.nn.RNN, tp.nn.GRU])
@pytest.mark.parametrize("inverse", ["jacobian", "weight"])
def test_a_pass_that_waits_calls_the_op_that_says_so(layer, inverse):
    """The solves of "jacobian" are checked by reading their residuals."""
    called: list[str] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.append(str(function))
            return function(*arguments, **(options or {}))

    module = layer(3, 5, rule=tp.TargetProp(inverse=inverse))
    with Calls():
        module(torch.ones(4, 2, 3))[0].sum().backward()
    assert ("tp_kernels.recurrence_bwd_waiting.default" in called) == (inverse == "jacobian")
    assert ("tp_kernels.recurrence_bwd.default" in called) == (inverse != "jacobian")


# --- compile


@of_rules("weight-total", "jacobian-total", "layer-local", "direct-total")
def test_compile(cell, rule, backend):
    """``layer`` and ``direct`` with dynamic shapes."""
    rule, dynamic = RULES[rule], rule in ("layer-local", "direct-total")
    torch._dynamo.reset()  # what other tests compiled counts towards the limit of recompilations

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
@pytest.mark.parametrize(
    ("cell", "rule"),
    [("rnn_tanh", "weight-total"), ("rnn_tanh", "direct-local"), ("gru", "layer-total")],
)
def test_layouts(cell, rule, layout, dtype, backend):
    for case in (Case(T=2, B=7, N=17, cell=cell), Case(T=2, B=4, H=3, N=16, cell=cell)):
        forward_check(case, dtype, backend, layout)
        backward_check(case, RULES[rule], dtype, backend, layout)


@of_both
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_inputs(axis, cell, dtype, backend):
    case = Case(T=5, B=4, N=6, cell=cell)
    inputs = [x.narrow(min(axis, x.dim() - 1), 0, 1).expand_as(x) for x in case.tensors(dtype) if x is not None]
    bias = [] if cell == "gru" else [None]
    inputs = Inputs(*inputs[:2], *bias, *inputs[2:])
    plain = Inputs(*(None if tensor is None else tensor.contiguous() for tensor in inputs))
    found, expected = (layer(case, given, backend=backend) for given in (inputs, plain))
    assert_near(found, extended(expected), "h")


@of_rules(*FEW)
def test_expanded_gradients(cell, rule, backend):
    """``h.sum()`` sends back one number, expanded to the whole shape."""
    case = HEADS.with_(cell=cell)
    inputs = case.tensors(FLOAT)
    leaves = leaves_of(inputs)
    h = layer(case, inputs, rule=RULES[rule], backend=backend)
    for loss in (h.sum(), h[-1].sum(), h[:, 1].mean()):
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        arrives = torch.autograd.grad(loss, h, retain_graph=True)[0].contiguous()
        expected = torch.autograd.grad(h, list(leaves.values()), arrives, retain_graph=True)
        assert_same_bits(dict(zip(leaves, found, strict=True)), dict(zip(leaves, expected, strict=True)))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_random_shapes_and_layouts(data):
    small = st.integers(1, 40)
    cell = data.draw(st.sampled_from([*CELLS, "gru", "gru", "lstm"]))
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
        if supports(cell, Sweep.of(RULES[rule]), backend)[0]:
            backward_check(case, tamed(case, rule), dtype, backend, layout, condition=tamed_condition(case, rule))


# --- bad input

ONES = torch.ones
FLOATING = "float16, bfloat16, float32, float64"


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
            f"{name}: u must be of dtype {FLOATING}, got int64",
        ),
        "u-complex": (
            {"u": ONES(4, 3, wide, dtype=torch.complex64)},
            TypeError,
            f"{name}: u must be of dtype {FLOATING}, got complex64",
        ),
        "u-sparse": (
            {"u": ONES(4, 3, wide).to_sparse()},
            TypeError,
            f"{name}: u must be a dense tensor, got one of layout torch.sparse_coo",
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
            f"{name}: weight must be of dtype {FLOATING}, got bool",
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
        "rule-large-step": (
            {"rule": tp.TargetProp(step=1e39)},
            ValueError,
            f"{name}: rule must have step between 1.18e-38 and 3.4e+38 in float32, got 1e+39",
        ),
        "rule-small-step": (
            {"rule": tp.TargetProp(step=1e-46)},
            ValueError,
            f"{name}: rule must have step between 1.18e-38 and 3.4e+38 in float32, got 1e-46",
        ),
        "rule-small-rtol": (
            {"rule": tp.TargetProp(inverse="jacobian", rtol=1e-40)},
            ValueError,
            f"{name}: rule must have rtol between 1.18e-38 and 3.4e+38 in float32, got 1e-40",
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
            f"{no_inverse} {tp.BackProp()}",
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
    "none": ("", "the words inverse, update, step, clip, reg, rtol, power, blend, latch, chunk, overlap"),
    "order": (
        "update=total inverse=none step=1 clip=0 reg=1 rtol=1",
        "the words inverse, update, step, clip, reg, rtol, power, blend, latch, chunk, overlap",
    ),
    "more": (
        f"{Sweep().words} nonlinearity=tanh",
        "the words inverse, update, step, clip, reg, rtol, power, blend, latch, chunk, overlap",
    ),
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
    *arguments, _, backend = back_of(SMALL, torch.float32, Sweep()).arguments(Sweep(), "reference")
    for called in (lambda: Sweep.parse(words), lambda: ops.recurrence_bwd(*arguments, words, backend)):
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
        if inverse not in LIBRARY_CELLS[cell].inverses:
            continue
        back = back_of(SMALL.with_(cell=cell), torch.float32, Sweep(inverse))
        for missing in ("feedback", "u") if inverse == "direct" else ("feedback",):
            name = cell.partition("_")[0]
            text = rf"{name}: {missing} must be a torch.Tensor with inverse='{inverse}', got None"
            with pytest.raises(TypeError, match=text):
                back.with_(**{missing: None}).run(Sweep(inverse), "cpu")


# --- contract


@of_rules(*FEW)
def test_deterministic(cell, rule, dtype, backend):
    """Bit for bit the same in every run, and with any number of threads on the native back-end. From given P: at power
    1/2 in float64 it is torch's decomposition, which keeps its own promises.
    """
    case, first = Case(T=5, B=33, N=64, cell=cell), None
    matrix = case.feedback(dtype, Sweep.of(RULES[rule]))
    for count in (1, 1, 2, 3) if backend == "cpu" else (1, 1):
        torch.set_num_threads(count)
        found = gradients(case, RULES[rule], dtype, backend, feedback=matrix)
        first = first or found
        if count > 1:
            assert_same_computation(found, first, backend)
        elif backend == "cpu":
            assert_same_bits(found, first)
        else:
            assert_identical(found["h"], first["h"], "h")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_not_finite_stays_in_its_sample(cell, value, dtype, backend):
    case = Case(T=5, B=33, N=17, cell=cell)
    inputs = case.tensors(dtype)
    others = torch.arange(case.B) != 4
    clean = forward_op(cell, *inputs, backend=backend)
    inputs.u[2, 4, 3] = value
    found, expected = (forward_op(cell, *inputs, backend=name) for name in (backend, "reference"))
    for what, tensor in found._asdict().items():
        if tensor.numel():
            assert_identical(tensor[:, others], getattr(clean, what)[:, others], f"{what} of other samples")
            assert_identical(tensor[:2], getattr(clean, what)[:2], f"{what} before")
            assert_same_pattern(tensor, getattr(expected, what), what)
    if np.isnan(value):
        assert found.h[2, 4].isnan().sum() == 1
        assert found.h[3:, 4].isnan().all()


@of_rules()
def test_a_gradient_that_is_not_finite_stays_in_its_sample(cell, rule, backend):
    sweep = Sweep.of(RULES[rule])
    back = back_of(Case(T=5, B=9, N=17, cell=cell), FLOAT, sweep)
    clean = back.run(sweep, backend)
    others = torch.arange(9) != 4
    for value in (torch.nan, torch.inf):
        back.grad[2, 4, 3] = value
        found, expected = (back.run(sweep, name) for name in (backend, "reference"))
        assert_identical(found.grad_u[:, others], clean.grad_u[:, others], "grad_u of other samples")
        assert_identical(found.grad_u[3:], clean.grad_u[3:], "grad_u of later steps")
        assert not found.grad_u[2, 4].isfinite().all()
        for what in found.swept.keys() - {"grad_u"}:
            tensor, plain = found.swept[what], expected.swept[what]
            assert_identical(tensor[others], clean.swept[what][others], f"{what} of other samples")
            assert torch.equal(tensor.isfinite().all(-1), plain.isfinite().all(-1))


@of_rules("weight-total", "layer-total")
def test_a_weight_that_is_not_finite_gives_nan(cell, rule, dtype, backend):
    inputs = Case(T=3, B=2, N=4, cell=cell).tensors(dtype)
    LIBRARY_CELLS[cell].inverted(inputs.weight, "weight")[-1, 2] = torch.nan
    inputs.u.requires_grad_()
    case = Case(cell=cell)
    h = layer(case, inputs, rule=RULES[rule], backend=backend)
    h.sum().backward()
    assert_same_pattern(h.detach(), layer(case, inputs, backend="reference").detach(), "h")
    assert inputs.u.grad[0].isnan().all()


def test_singular_gram_matrix_in_backward(cell, backend):
    gates = SMALL.with_(cell=cell).gates
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).repeat(gates, 1).requires_grad_()
    inputs = Inputs(torch.ones(2, 1, 2 * gates), weight, None, None)
    h = layer(Case(cell=cell), inputs, rule=tp.TargetProp(power=1.0, reg=1e-30), backend=backend)
    text = (
        "regularized_inverse: the Gram matrix is not numerically positive definite in float32 at reg=1e-30; "
        "use a larger reg or float64"
    )
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        h.sum().backward()
    assert str(caught.value) == text


def test_calls_from_several_threads(backend):
    """The native kernels run without the interpreter's lock: calls side by side give what they give alone."""
    cases = [Case(T=20, B=7, N=33, cell=CELLS[k % len(CELLS)]) for k in range(12)]

    def work(case: Case) -> dict[str, Tensor]:
        return gradients(case, tp.TargetProp(power=1.0), torch.float32, backend)

    alone = [work(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(work, cases), alone, strict=True):
            assert_same_computation(found, expected, backend)


def test_states_changed_in_place_are_noticed(cell, backend):
    inputs = SMALL.with_(cell=cell).tensors(torch.float32)
    inputs.u.requires_grad_()
    h = layer(SMALL.with_(cell=cell), inputs, backend=backend)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_inputs_stay_as_they_are(cell, dtype, backend):
    case = SMALL.with_(cell=cell)
    inputs = Inputs(*(None if tensor is None else tensor.clone() for tensor in case.tensors(dtype)))
    leaves_of(inputs)
    grad = case.gradient(dtype)
    layer(case, inputs, backend=backend).backward(grad)
    for name, tensor in case.tensors(dtype)._asdict().items():
        if tensor is not None:
            assert_identical(getattr(inputs, name).detach(), tensor, name)
    assert_identical(grad, case.gradient(dtype), "gradient")


@of_rules("weight-total", "jacobian-total")
def test_under_autocast(cell, rule, backend):
    case = SMALL.with_(cell=cell)
    expected = gradients(case, RULES[rule], torch.float32, backend)
    inputs = case.tensors(torch.float32)
    leaves = leaves_of(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(case, inputs, rule=RULES[rule], backend=backend)
        found = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float32))
    named = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    assert_same_bits({"h": h.detach()} | named, expected)


def test_meta_tensors_get_shapes_and_dtypes(cell, dtype):
    """No back-end runs: the fakes answer."""
    for case in (SMALL.with_(cell=cell), HEADS.with_(cell=cell)):
        inputs = Inputs(*(None if tensor is None else tensor.to("meta") for tensor in case.tensors(dtype)))
        h = layer(case, inputs)
        assert (h.shape, h.dtype, h.device.type) == (case.shape, dtype, "meta")


# --- contract of the solve of "jacobian"

# As tight as the dtype lets a solve with a condition of some tens be.
TIGHT = {torch.float32: 1e-6, torch.float64: 1e-14}
of_solved = pytest.mark.parametrize("cell", SOLVED)


def to_solve(ratio: float, dtype: torch.dtype, cell: str, *, H: int | None = None, rtol: float = 1e-4) -> Back:
    """One displacement, and states of which some units are saturated; ``r = ratio ‖W‖²``, ‖W‖ = 1. No state is what
    forward gives: only what is kept and h count.
    """
    case = Case(T=3, B=6, N=33, H=H, cell=cell)
    inputs = case.tensors(torch.float64)
    inputs.weight.div_(torch.linalg.matrix_norm(inputs.weight, 2)[..., None, None])
    activation = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu}.get(cell, lambda z: z)
    h, kept = activation(2 * case.gradient(torch.float64, seed=4)), None
    if cell == "gru":
        h, kept = forward_op(cell, *inputs, backend="reference")
    lam = case.tensors(torch.float64).h0
    return Back(cell, h, inputs.weight, kept=kept, last=lam, u=inputs.u, h0=inputs.h0).map(lambda x: x.to(dtype))


def solve_of(ratio: float, rtol: float = 1e-4) -> Sweep:
    return Sweep("jacobian", "local", reg=ratio, rtol=rtol)


def jacobian_at(back: Back, t: int) -> Tensor:
    """[B, N, N] in float64, of the oracle, at the states and gates that are given."""
    before = back.h[t - 1] if t else back.h0
    numbers = [extended(x) for x in (back.u[t], back.weight, None, before, back.h[t])]
    step = oracle.step_of(back.cell, *numbers)
    if back.kept is not None:
        step.r, step.z, step.n, step.q = map(extended, back.kept[t].unbind(-2))
    return torch.from_numpy(step.jacobian().astype(np.float64))


def at_step(back: Back, t: int) -> Back:
    """The sequence of that step only."""
    one = back.map(lambda tensor: tensor[t : t + 1], "h", "kept", "grad", "u")
    return one.with_(h0=back.h[t - 1]) if t else one


@pytest.mark.parametrize("tight", [False, True], ids=["default", "tight"])
@of_solved
def test_jacobian_solves_the_equation_that_defines_it(cell, tight, dtype, backend):
    sweep = solve_of(0.1, TIGHT[dtype] if tight else 1e-4)
    back = to_solve(0.1, dtype, cell)
    for t in range(3):
        found = at_step(back, t).run(sweep, backend).carried
        assert_solved(found, back.last, jacobian_at(back, t), sweep.reg, sweep.rtol)


@pytest.mark.parametrize("shape", [Case(T=20, B=7, N=17), Case(T=3, B=5, H=2, N=33), Case(N=1)], ids=str)
@of_solved
def test_a_tight_solve_meets_the_ordinary_budget(cell, shape, dtype, backend):
    """As if it were direct: no term in rtol; but in what the last solve itself sends on, and for the GRU, whose
    condition is four times as large.
    """
    case = shape.with_(cell=cell)
    sweep = Sweep("jacobian", reg=0.25, rtol=TIGHT[dtype])
    back = back_of(case, dtype, sweep).with_(last=None)
    found, plain = (back.run(sweep, name).swept for name in (backend, "reference"))
    exact = exact_back(back, case.tensors(dtype).bias, sweep)
    answers = {"grad_u": exact.grad_u, "carried": exact.displacements[0], "through": exact.through}
    condition = max(10.0, condition_of_jacobian(cell, back.weight, sweep))
    for what, tensor in found.items():
        rtol = sweep.rtol if cell == "gru" or what == "carried" else 0.0
        assert_budget(tensor, plain[what], answers[what], what, condition, rtol=rtol)


@of_solved
@pytest.mark.parametrize(("ratio", "dtype"), [(1e-3, torch.float32), (1e-12, torch.float64)], ids=str)
def test_smallest_regularization_of_jacobian(ratio, dtype, cell, backend):
    """r over ‖J‖², at the default rtol: it is solved, and the residual is there."""
    back = at_step(to_solve(ratio, dtype, cell), 0)
    found = back.run(solve_of(ratio), backend).carried
    assert_solved(found, back.last, jacobian_at(back, 0), ratio, 1e-4)


@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("cell", ["rnn_identity", "gru"])
def test_what_cannot_be_solved_raises(cell, H, backend):
    """float32 cannot resolve such a small r to 1e-6. The worst sample is named; float64 is the remedy."""
    reg = 1e-6 if cell != "gru" else 1e-8
    sweep = solve_of(reg, 1e-6)
    back = to_solve(reg, torch.float32, cell, H=H)
    grad = torch.zeros_like(back.h)
    grad[1, 4] = 1.0  # λ is zero elsewhere, and before
    back = back.with_(grad=grad, last=None)
    if cell == "gru":
        back = back.with_(weight=10 * back.weight)
    name, head = cell.partition("_")[0], "" if H is None else r", head [01]"
    text = (
        rf"{name}: inverse='jacobian' could not be solved in float32 at reg={reg:g}: worst at time step (\d+), sample 4"
        rf"{head}, with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64"
    )
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        back.run(sweep, backend)
    found = re.fullmatch(text, str(caught.value))
    assert found, caught.value
    assert int(found[1]) in (0, 1)
    with pytest.raises(torch.linalg.LinAlgError):
        back.iterations(sweep, backend)
    assert back.map(torch.Tensor.double).run(sweep, backend).grad_u.isfinite().all()


@of_both
def test_a_weight_too_large_to_square_raises(cell, backend):
    """W Wᵀ overflows although all numbers are finite."""
    back = to_solve(0.25, torch.float32, cell)
    with pytest.raises(torch.linalg.LinAlgError, match="could not be solved in float32"):
        back.with_(weight=1e25 * back.weight).run(solve_of(0.25), backend)


@pytest.mark.parametrize("portions", ["checkpoints", "chunks"])
@pytest.mark.parametrize("cell", ["rnn_identity", "gru"])
def test_the_time_step_that_is_named_counts_from_the_start(cell, portions, backend, monkeypatch):
    """Also where backward works portion by portion; here the last one is one step."""
    case = Case(T=9, B=3, N=33, cell=cell, bias=False, h0=False)
    inputs = case.tensors(torch.float32)
    wide = case.gates * case.N
    scale = 10 if cell == "gru" else 1
    monkeypatch.setattr(op, "_portion", lambda *sizes: 2)
    h, *_ = op.recurrent_layer(
        cell,
        inputs.u,
        (scale * inputs.weight).requires_grad_(),
        None,
        weight_ih=torch.eye(wide) if portions == "chunks" else None,
        rule=tp.TargetProp(inverse="jacobian", update="local", reg=1e-8, rtol=1e-6),
        checkpoint_every=2 if portions == "checkpoints" else None,
        backend=backend,
    )
    with pytest.raises(torch.linalg.LinAlgError, match="worst at time step 8, sample 1,"):
        h[8, 1].sum().backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(
    ("cell", "where"),
    [(cell, where) for cell in SOLVED for where in ("gradient", "state", "kept") if cell == "gru" or where != "kept"],
)
def test_jacobian_of_what_is_not_finite(cell, where, value, dtype, backend):
    """NaN for that sample from there on back, no error, and not a bit of another sample changed."""
    sweep = Sweep("jacobian", "local")
    back = back_of(Case(T=5, B=9, N=17, cell=cell), dtype, sweep).with_(last=None)
    clean = back.run(sweep, backend)
    {"gradient": back.grad, "state": back.h}.get(where, back.kept)[2, 4, ..., 3] = value
    found = back.run(sweep, backend)
    others = torch.arange(9) != 4
    assert_identical(found.grad_u[:, others], clean.grad_u[:, others], "grad_u")
    assert_identical(found.carried[others], clean.carried[others], "carried")
    later = 4 if where == "state" and cell == "gru" else 3  # the state is what the next step starts from
    assert_identical(found.grad_u[later:], clean.grad_u[later:], "later")
    if where != "state" or cell in ("rnn_tanh", "gru"):
        assert found.carried[4].isnan().all()
        assert found.grad_u[:2, 4].isnan().all() or cell == "rnn_relu"


@of_both
def test_jacobian_of_a_weight_that_is_not_finite(cell, dtype, backend):
    sweep = Sweep("jacobian", "local")
    back = back_of(Case(T=3, B=2, N=5, cell=cell), dtype, sweep)
    back.weight[1, 2] = torch.nan
    found = back.run(sweep, backend)
    assert found.grad_u[:-1].isnan().all()
    assert found.grad_u[-1].isfinite().all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@of_solved
def test_jacobian_of_any_magnitude(cell, scale, backend):
    """No square over- or underflows: displacements may decay over thousands of steps."""
    back = to_solve(0.25, torch.float32, cell)
    one, other = (back.with_(last=s * back.last).run(solve_of(0.25), backend).carried for s in (1.0, scale))
    assert_near(other / scale, extended(one), "carried")


@of_both
def test_jacobian_of_denormal_numbers(cell, backend):
    """Displacements may decay to nothing: no error on the way."""
    back = to_solve(0.25, torch.float32, cell)
    for scale in (1e-38, 1e-40, 1e-44):
        found = back.with_(last=scale * back.last).run(solve_of(0.25), backend).carried
        assert found.abs().max() <= 2 * scale * back.last.abs().max()


@of_both
def test_jacobian_of_what_is_nearly_nothing(cell, backend):
    """Displacements may decay to denormal numbers: they do not stay there."""
    sweep = Sweep("jacobian", "local", reg=4.0)
    back = back_of(Case(T=200, B=3, N=33, cell=cell), torch.float32, sweep)
    assert back.with_(grad=None, last=1e-30 * back.last).run(sweep, backend).carried.eq(0).all()


@of_both
def test_jacobian_of_zero_is_zero(cell, dtype, backend):
    """Exactly, and without an iteration: where no gradient arrives there is nothing to solve."""
    back, sweep = to_solve(0.25, dtype, cell), solve_of(0.25)
    back.last[2] = 0
    found = back.run(sweep, backend).carried
    assert_identical(found[2], torch.zeros_like(found[2]), "carried")
    assert found[[0, 1, 3, 4, 5]].ne(0).all()
    assert back.iterations(sweep, backend)[:, 2].eq(0).all()


@of_both
def test_iterations(cell, dtype, backend):
    """The reference takes none; the native solver a few, whatever the threads."""
    sweep = Sweep("jacobian")
    for case in (Case(T=6, B=60, N=33, cell=cell), Case(T=2, B=3, H=2, N=5, cell=cell)):
        back, counts = back_of(case, dtype, sweep).with_(grad=None), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            counts.append(back.iterations(sweep, backend))
            assert counts[-1].shape == case.shape[:-1]
            assert counts[-1].dtype == torch.int32
        assert torch.equal(*counts)
        if backend == "reference":
            assert not counts[0].any()
            continue
        assert counts[0].min() >= 1
        assert 1 < counts[0].max() < 20
        assert counts[0].unique().numel() > 1


@of_both
def test_samples_of_jacobian_are_independent(cell, dtype, backend):
    """Alone, in other company or on another thread: a sample's result is the same to the bit on the native back-end."""
    back, sweep = to_solve(0.05, dtype, cell), solve_of(0.05)
    together = back.run(sweep, backend)
    for b in range(6):
        some = slice(b, b + 1)
        alone = back.of_samples(some).run(sweep, backend)
        parts = {"grad_u": together.grad_u[:, some], "carried": together.carried[some]}
        for what, part in parts.items():
            if backend == "cpu":
                assert_identical(part, getattr(alone, what), what)
            else:
                assert_near(part, extended(getattr(alone, what)), what, condition=20)


# --- identities

WAYS = (
    *({"inverse": inverse} for inverse in ("weight", "layer", "identity", "jacobian")),
    *({"inverse": "layer", "mode": mode} for mode in ("difference", "direct")),
)
MEDIUM = Case(T=7, B=3, N=5)


def of_ways(linear: bool = False) -> pytest.MarkDecorator:
    """Of each cell, those that it has; or only those that are linear in the gradient that arrives."""
    return pytest.mark.parametrize(
        ("cell", "way"),
        [
            pytest.param(cell, way, id=f"{cell}-{way.get('mode', way['inverse'])}")
            for cell in KINDS
            for way in WAYS
            if way.get("mode", way["inverse"]) in LIBRARY_CELLS[cell].inverses and not ("mode" in way and linear)
        ],
    )


def test_none_is_the_default_rule(cell, dtype, backend):
    case = MEDIUM.with_(cell=cell)
    defaults = gradients(case, None, dtype, backend)
    assert_same_bits(defaults, gradients(case, tp.TargetProp(), dtype, backend))


def test_the_rule_leaves_the_forward_pass_alone(cell, dtype, backend):
    case = MEDIUM.with_(cell=cell)
    expected = gradients(case, tp.BackProp(), dtype, backend)["h"]
    for name, rule in rules_of(cell).items():
        if supports(cell, Sweep.of(rule), backend)[0]:
            assert_identical(gradients(case, rule, dtype, backend)["h"], expected, f"h with {name}")


@pytest.mark.parametrize("update", ["total", "local"])
@of_ways()
def test_the_last_step_is_that_of_back_propagation(cell, way, update, backend):
    case = MEDIUM.with_(cell=cell)
    found = gradients(case, tp.TargetProp(**way, update=update), FLOAT, backend)["grad_u"]
    expected = gradients(case, tp.BackProp(), FLOAT, backend)["grad_u"]
    assert_identical(found[-1], expected[-1], "δ_T")


@pytest.mark.parametrize("update", ["total", "local"])
@of_ways(linear=True)
def test_the_step_is_a_mere_scale(cell, way, update, backend):
    """Where the rule is linear. A power of two scales without rounding."""
    one, eighth = (
        gradients(MEDIUM.with_(cell=cell), tp.TargetProp(**way, update=update, step=step), FLOAT, backend)
        for step in (1.0, 0.125)
    )
    assert_same_bits({what: x if what == "h" else x / 8 for what, x in one.items()}, eighth)


@pytest.mark.parametrize("every", [None, 3])
@of_rules("weight-total", "weight-local", "layer-total", "layer-local", "layerhalf-local", "difference-total")
def test_feedback_takes_the_place_of_the_inverse(cell, rule, every, dtype, backend):
    """The rule's own P put in gives the same bits; any other matrix, the oracle's recursion with that matrix."""
    case = HEADS.with_(cell=cell)
    condition, rule = tamed_condition(case, rule) or 20, tamed(case, rule)
    inputs, sweep = case.tensors(dtype), Sweep.of(rule)
    blocks = LIBRARY_CELLS[cell].inverted(inputs.weight, sweep.inverse)
    own = tp.regularized_inverse(blocks, rule.reg, power=rule.power, backend=backend)

    def found(matrix: Tensor | None) -> dict[str, Tensor]:
        return gradients(case, rule, dtype, backend, feedback=matrix, checkpoint_every=every)

    assert_same_bits(found(own), found(None))
    other = torch.linalg.qr(torch.randn(blocks.shape, generator=torch.Generator().manual_seed(2)).to(dtype)).Q
    results = found(other)
    kept = forward_op(cell, *inputs, backend=backend).kept
    given = {"grad": case.gradient(dtype), "u": inputs.u, "h0": inputs.h0, "feedback": other}
    back = Back(cell, results["h"], inputs.weight, kept=kept, **given)
    exact = exact_back(back, inputs.bias, sweep)._asdict()
    for what in results.keys() - {"h"}:
        assert_near(at_least_2d(results[what]), np.atleast_2d(exact[what]), what, condition)


@pytest.mark.parametrize("H", [None, 2])
@of_ways()
def test_a_sequence_cut_in_two(cell, way, H, backend):
    """With γ = 1 and the state handed on, two calls give the gradients of one: of every local rule."""
    for cut in (1, 3, 6):
        rule = tp.TargetProp(**way, update="local", rtol=1e-13, clip=0.1)
        halves_check(MEDIUM.with_(cell=cell, H=H), rule, cut, backend)


@pytest.mark.parametrize("H", [None, 2])
def test_back_propagation_cut_in_two(cell, H, backend):
    halves_check(MEDIUM.with_(cell=cell, H=H), tp.BackProp(), 3, backend)


def halves_check(case: Case, rule: tp.BackProp | tp.TargetProp, cut: int, backend: str) -> None:
    whole = gradients(case, rule, torch.float64, backend)
    inputs = case.tensors(torch.float64)
    leaves = leaves_of(inputs)
    first, last = layer(case, inputs._replace(u=inputs.u[:cut]), rule=rule, backend=backend, return_last=True)
    last = first[-1] if case.states == 1 else torch.cat(last, dim=-1)  # as a tensor like any other
    second = layer(case, inputs._replace(u=inputs.u[cut:], h0=last), rule=rule, backend=backend)
    h = torch.cat([first, second])
    grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(torch.float64))
    found = {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    assert_same_numbers(found, whole, condition=20)


@of_rules()
def test_heads_are_independent_calls(cell, rule, backend):
    case = Case(T=4, B=7, N=17, H=3, cell=cell)
    inputs, grad = case.tensors(FLOAT), case.gradient(FLOAT)
    rule, condition = tamed(case, rule), tamed_condition(case, rule) or 1
    together = gradients(case, rule, FLOAT, backend)
    axes = {"h": 2, "grad_u": 2, "grad_weight": 0, "grad_bias": 0, "grad_h0": 1}
    for k in range(case.H):
        u, weight, bias, h0 = inputs
        alone = Inputs(u[:, :, k], weight[k], None if bias is None else bias[k], h0[:, k])
        alone = Inputs(*(None if tensor is None else tensor.clone() for tensor in alone))
        leaves = leaves_of(alone)
        h = layer(case, alone, rule=rule, backend=backend)
        grads = torch.autograd.grad(h, list(leaves.values()), grad[:, :, k])
        expected = {"h": h.detach(), **{f"grad_{name}": x for name, x in zip(leaves, grads, strict=True)}}
        assert_same_numbers({what: x.select(axes[what], k) for what, x in together.items()}, expected, condition)


@of_rules()
def test_samples_are_independent(cell, rule, backend):
    """To the bit on the native back-end, whatever is beside them in a tile."""
    sweep = Sweep.of(RULES[rule])
    back = back_of(Case(T=4, B=50, N=33, cell=cell), FLOAT, sweep)
    together = back.run(sweep, backend)
    some = slice(7, 12)
    alone = back.of_samples(some).run(sweep, backend)
    for what, tensor in together.swept.items():
        part = tensor[:, some] if what == "grad_u" else tensor[some]
        if backend == "cpu":
            assert_identical(getattr(alone, what), part, what)
        else:
            assert_near(getattr(alone, what), extended(part), what, condition=20)


# --- checkpoints, calls in a row, and the inverse that is kept


@of_rules()
def test_backward_in_two_calls(cell, rule, backend):
    """What the later steps send on makes two calls the same as one, bit for bit, for every rule."""
    sweep = Sweep.of(RULES[rule])
    back = back_of(MEDIUM.with_(cell=cell, H=2), FLOAT, sweep)
    whole = back.run(sweep, backend)
    later = back.later(4).run(sweep, backend)
    earlier = back.earlier(4).with_(**later.sent).run(sweep, backend)
    assert_identical(torch.cat([earlier.grad_u, later.grad_u]), whole.grad_u, "grad_u")
    assert_same_bits(_there(earlier.sent), _there(whole.sent))
    assert (whole.sent["carried"] is None) == (sweep.inverse == "none")
    assert (whole.sent["through"] is None) == (sweep.update == "local")


def _there(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@of_rules("bp", "weight-total", "layer-total", "identity-total", "jacobian-total", "direct-total")
def test_parts_sent_on_in_two_calls_of_the_op(cell, rule, dtype, backend):
    """All gradients of the op: those of the two calls add up to those of one."""
    sweep = Sweep.of(RULES[rule])
    back = back_of(MEDIUM.with_(cell=cell, H=2), dtype, sweep)
    whole = back.run(sweep, backend, sums=True)
    later = back.later(4).run(sweep, backend, sums=True)
    earlier = back.earlier(4).with_(**later.sent).run(sweep, backend, sums=True)
    for what in ("grad_weight", "grad_bias"):
        parts = [getattr(results, what) for results in (earlier, later, whole)]
        if parts[2].numel():
            assert_near(parts[0] + parts[1], extended(parts[2]), what)
    unsent = back.earlier(4).run(sweep, backend)
    assert not torch.equal(unsent.grad_u, whole.grad_u[:4])


@of_rules()
def test_checkpoints(cell, rule, backend):
    """States and their gradients are the same bits; sums over time are the same in other portions."""
    for case in (MEDIUM.with_(cell=cell, H=2), MEDIUM.with_(cell=cell, h0=False, bias=False)):
        plain = gradients(case, RULES[rule], FLOAT, backend)
        for every in (1, 2, 3, case.T, case.T + 1):
            found = gradients(case, RULES[rule], FLOAT, backend, checkpoint_every=every)
            assert_same_computation(found, plain, backend)


def test_checkpoints_are_all_that_is_kept(cell, backend):
    """Of 12 steps, every third: 4 states, and the input they are computed again from."""
    case = SMALL.with_(T=12, cell=cell, h0=False)
    inputs, saved = case.tensors(torch.float64), []
    inputs.u.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(case, inputs, checkpoint_every=3, backend=backend)
    expected = [tensor.shape for tensor in inputs if tensor is not None]
    assert sorted(tensor.shape for tensor in saved) == sorted([*expected, (4, *case.state_shape)])


def test_without_checkpoints_states_and_what_the_cell_keeps_are_saved(cell, backend):
    case = SMALL.with_(cell=cell, h0=False)
    inputs, saved = case.tensors(torch.float64), []
    inputs.weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(case, inputs, backend=backend)
    own = {"gru": [(5,), (4, 3, 4, 5)], "lstm": [(4, 3, 5, 5)]}  # a bias, and what is kept
    expected = [inputs.weight.shape, case.shape, *own.get(cell, [])]
    assert sorted(tuple(tensor.shape) for tensor in saved) == sorted(map(tuple, expected))


@of_rules("bp", "weight-total", "layer-local", "jacobian-total", "direct-total")
@pytest.mark.parametrize("every", [None, 3])
def test_without_the_sequence(cell, rule, every, backend):
    """``return_sequence=False``: the last state only, and the gradients that arrive at it."""
    case = MEDIUM.with_(cell=cell)
    grad, results = case.gradient_of_state(FLOAT).split(case.N, dim=-1), []
    for sequence in (True, False):
        inputs = case.tensors(FLOAT)
        leaves = leaves_of(inputs)
        h, last, _ = op.recurrent_layer(
            cell,
            inputs.u,
            inputs.weight,
            *parts_of(cell, inputs.h0),
            bias_hh=inputs.bias,
            rule=RULES[rule],
            checkpoint_every=every,
            return_sequence=sequence,
            backend=backend,
        )
        assert (h is None) != sequence
        grads = torch.autograd.grad(last, list(leaves.values()), grad)
        results.append({"last": torch.cat(last, dim=-1).detach(), **dict(zip(leaves, grads, strict=True))})
    assert_same_bits(*results)


@of_rules()
def test_the_layer_is_the_op_chunk_by_chunk(cell, rule, backend, monkeypatch):
    """With U = I nothing but the order of sums over time differs, whatever the chunks."""
    case = MEDIUM.with_(cell=cell)
    wide = case.gates * case.N
    expected = gradients(case, RULES[rule], FLOAT, backend)
    delta = extended(expected["grad_u"]).reshape(-1, wide)
    for size in (1, 3, 7):
        monkeypatch.setattr(op, "_portion", lambda *sizes, size=size: size)
        inputs = case.tensors(FLOAT)
        weight_ih, bias_ih = torch.eye(wide, dtype=FLOAT), torch.zeros(wide, dtype=FLOAT)
        bias_hh = None if inputs.bias is None else torch.cat((torch.zeros(wide - case.N, dtype=FLOAT), inputs.bias))
        if bias_hh is None:
            bias_hh = torch.zeros(wide, dtype=FLOAT)
        leaves = {"u": inputs.u, "weight": inputs.weight, "bias": bias_hh, "h0": inputs.h0}
        leaves |= {"weight_ih": weight_ih, "bias_ih": bias_ih}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        h, *_ = op.recurrent_layer(
            cell,
            inputs.u,
            inputs.weight,
            *parts_of(cell, inputs.h0[None]),
            weight_ih=weight_ih,
            bias_ih=bias_ih,
            bias_hh=bias_hh,
            rule=RULES[rule],
            backend=backend,
        )
        grads = torch.autograd.grad(h, list(leaves.values()), case.gradient(FLOAT))
        found = {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
        of_weight_ih, of_bias_ih, of_bias = (found.pop(f"grad_{name}") for name in ("weight_ih", "bias_ih", "bias"))
        if inputs.bias is not None:
            found["grad_bias"] = of_bias[-case.N :]
        assert_same_computation({name: found[name] for name in expected}, expected, backend)
        assert_near(of_weight_ih, delta.T.dot(extended(inputs.u).reshape(-1, wide)), "grad_weight_ih")
        assert_near(of_bias_ih[None], delta.sum(0)[None], "grad_bias_ih")
        outer = wide - case.N if inputs.bias is not None else wide
        assert_identical(of_bias[:outer], of_bias_ih[:outer], "grad_bias_hh")


def test_inverse_is_computed_once_for_one_weight(cell, cpu, monkeypatch):
    """Several backward passes with one weight factor it once; any change of it, by value, is noticed."""
    computed, native = [], _native.cpu

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

        def regularized_solve(self, **arguments: object) -> None:
            computed.append(1)
            native.regularized_solve(**arguments)

    monkeypatch.setattr(_native, "cpu", Counting())
    rule, case = tp.TargetProp(power=1.0), SMALL.with_(cell=cell)
    inputs = case.tensors(torch.float32)
    inputs.weight.requires_grad_()

    def grad() -> Tensor:
        return torch.autograd.grad(layer(case, inputs, rule=rule).sum(), inputs.weight)[0]

    forget_feedback()
    first = grad()
    assert_identical(grad(), first, "grad_weight")
    assert len(computed) == 1
    # a change that bumps no version counter
    LIBRARY_CELLS[cell].inverted(inputs.weight.data, rule.inverse)[-1, 0] += 0.5
    changed = grad()
    assert len(computed) == 2
    assert not torch.equal(changed, first)
    rule = tp.TargetProp(power=1.0, reg=0.5)
    assert not torch.equal(grad(), changed)
    assert len(computed) == 3
    # Two layers that take turns do not drive out each other's.
    other = case.tensors(torch.float32, seed=5).weight.requires_grad_()
    for matrix in (inputs.weight, other, inputs.weight, other):
        layer(case, inputs._replace(weight=matrix), rule=rule).sum().backward()
    assert len(computed) == 4


@of_rules("weight-total", "layer-total")
def test_refreshed_feedback(cell, rule, dtype, backend):
    """P of the weight as it was at the first of k calls; anew at the k-th after it, or where the weight has moved."""
    rule, case = RULES[rule], SMALL.with_(cell=cell)
    blocks = LIBRARY_CELLS[cell].inverted(case.tensors(dtype).weight, rule.inverse).clone()

    def inverse(weight: Tensor) -> Tensor:
        return tp.regularized_inverse(weight, rule.reg, power=rule.power, backend=backend)

    refreshed = RefreshedFeedback(blocks, 3)
    first = inverse(blocks)
    for _ in range(3):
        assert_identical(refreshed(blocks, rule, backend), first, "P")
        blocks = 1.01 * blocks
    assert_identical(refreshed(blocks, rule, backend), inverse(blocks), "P after 3 calls")
    moved = 1.2 * blocks
    assert_identical(refreshed(moved, rule, backend), inverse(moved), "P of a weight that has moved")
    nearly = 1.01 * moved
    assert_identical(refreshed(nearly, rule, backend), inverse(moved), "P of a weight that has hardly moved")
    refreshed.forget()
    assert_identical(refreshed(nearly, rule, backend), inverse(nearly), "P after forgetting")


# --- which back-end


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_cell_without_a_kernel_there_is_refused(cell, name):
    """By name with the reason; it is in no list of candidates."""
    table, case = op.backends(cell), SMALL.with_(cell=cell)
    assert name not in table.backends
    assert all(name not in candidates for candidates in table.preference.values())
    with pytest.raises(tp.BackendUnavailableError) as caught:
        layer(case, case.tensors(FLOAT), backend=name)
    assert str(caught.value) == (
        f"{cell}: backend {name!r} cannot run this call: it has no kernel for {cell} yet. "
        "Use backend='auto' or 'reference'."
    )
