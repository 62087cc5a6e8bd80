"""The recurrence in Triton: on a GPU where there is one, else in Triton's interpreter (``TRITON_INTERPRET=1``).

The checks, oracles and budgets are those of every back-end; the cases are few and small where they are interpreted, at
about two milliseconds a step.
"""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
from _cases import HEAD_CASES, LAYOUTS, NONLINEARITIES, RULES, TILE_CASES, TIME_CASES, Case, Inputs
from _checks import (
    THROUGH_ACTIVATION,
    Back,
    assert_same_bits,
    assert_same_computation,
    assert_same_numbers,
    atanh_check,
    back_of,
    backward_check,
    capture_check,
    forward_arguments,
    forward_check,
    forward_op,
    gradients,
    layer,
    leaves_of,
    relu_inverse_check,
    small_differences_check,
    stream_check,
    tanh_check,
)
from _compare import assert_identical, assert_near, assert_same_pattern, assert_solved
from _oracle import extended

import tp_kernels as tp
from conftest import absent
from tp_kernels import _triton
from tp_kernels.ops.recurrence import op, triton_blocks
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
TABLE = op.backends("rnn")
ON_GPU = torch.cuda.is_available() and not _triton.interpreted()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = Case(T=4, B=3, N=5)
HEADS = SMALL.with_(H=3)
# Every padded width and one that is full; one, several and partial tiles; no rows; heads; every activation.
CASES = (
    Case(T=1, B=1, N=1),
    Case(T=16, B=5, N=16),
    Case(T=4, B=17, N=33, cell="rnn_relu", h0=False),
    Case(T=3, B=0, N=5),
    Case(T=3, B=18, H=3, N=5),
    Case(T=4, B=2, H=2, N=20, cell="rnn_identity"),
    Case(T=3, B=33, N=64, cell="rnn_identity"),
    Case(T=2, B=3, N=100),
    Case(T=2, B=3, N=128, cell="rnn_relu"),
)
# In float32 only: in half precision plain code is not near the exact answer of all of them.
GPU_CASES = tuple(case for case in TILE_CASES[::7] + TIME_CASES + HEAD_CASES if case.N <= 128) if ON_GPU else ()
# In half precision and on many cases.
FEW = ("bp", "weight-total", "layer-local", "identity-total", "jacobian-total", "difference-local", "direct-total")
BACKWARD = [
    pytest.param(case, rule, dtype, id=f"{case}-{rule}-{name}")
    for case in CASES + GPU_CASES
    for rule in RULES
    for name, dtype in DTYPES.items()
    if (name == "float32" or case in CASES) and (rule in FEW or (name == "float32" and case in CASES))
]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter's, of NaN


@pytest.fixture(autouse=True)
def device() -> str:
    ok, reason = TABLE.available("triton")
    if not ok:
        absent("triton", reason)
    return "cuda" if ON_GPU else "cpu"


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    return Inputs(*(None if tensor is None else tensor.to(device) for tensor in case.tensors(dtype)))


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


# --- forward and backward


FORWARD = [
    pytest.param(case, dtype, id=f"{case}-{name}")
    for case in CASES + GPU_CASES
    for name, dtype in DTYPES.items()
    if name == "float32" or case in CASES
]


@pytest.mark.parametrize(("case", "dtype"), FORWARD)
def test_forward(case, dtype, device):
    forward_check(case, dtype, "triton", device=device)


def test_tanh_accuracy(device):
    tanh_check(torch.float32, "triton", device)


def test_atanh_accuracy(device):
    atanh_check(torch.float32, "triton", device)


@pytest.mark.parametrize(("case", "rule", "dtype"), BACKWARD)
def test_backward(case, rule, dtype, device):
    rule = RULES[rule]
    inverse = Sweep.of(rule).inverse
    if inverse in ("difference", "direct") and case.T > 16 and dtype != torch.float32:
        pytest.skip("displacements that grow over so many steps leave the range of half precision")
    if inverse in THROUGH_ACTIVATION and case.cell == "rnn_tanh":
        if case.T > 100 or (case.T > 10 and dtype == torch.float16 and inverse == "layer"):
            pytest.skip("1/(1 - h²) at every step overflows, or leaves no digit")
        if dtype != torch.float32:
            rule = replace(rule, clip=0.1)  # below the dtype's eps it is refused, and near it no digit would be left
    backward_check(case, rule, dtype, "triton", device=device)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_widest_in_half_precision(name, device):
    case = Case(T=2, B=3, N=200)
    forward_check(case, DTYPES[name], "triton", device=device)
    for rule in ("bp", "weight-total", "direct-total"):
        backward_check(case, RULES[rule], DTYPES[name], "triton", device=device)


# --- through the public function


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", [SMALL, HEADS.with_(N=20)], ids=str)
def test_gradients(case, rule, device):
    """With the P it computes itself, against float64."""
    found = gradients(case, RULES[rule], torch.float32, "triton", device)
    exact = gradients(case, RULES[rule], torch.float64, "reference")
    condition = 100 if Sweep.of(RULES[rule]).uses_inverse else 20  # P's own errors count here
    for what, tensor in found.items():
        assert_near(tensor, extended(exact[what]), what, condition)


@pytest.mark.parametrize("rule", [*FEW, "identity-local", "jacobian-local", "difference-total", "direct-local"])
def test_half_precision_gradients(rule, dtype, device):
    rule = replace(RULES[rule], clip=0.1) if rule != "bp" else RULES[rule]
    found = gradients(SMALL, rule, dtype, "triton", device)
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_checkpoints(rule, every, device):
    checkpoints_check(rule, every, device)


def checkpoints_check(rule: str, every: int, device: str) -> None:
    """The same bits in float32, where what is sent from portion to portion is not rounded."""
    case = SMALL.with_(T=5)
    plain, found = (
        gradients(case, RULES[rule], torch.float32, "triton", device, checkpoint_every=count) for count in (None, every)
    )
    assert_same_computation(found, plain, "triton")


@pytest.mark.parametrize("rule", ["bp", "weight-total", "layer-local", "difference-total", "direct-local"])
def test_layer(rule, device):
    """``nn.RNN``, with its input projection."""
    torch.manual_seed(1)
    layers = {name: tp.nn.RNN(4, 20, rule=RULES[rule], backend=name) for name in ("triton", "reference")}
    layers["reference"].load_state_dict(layers["triton"].state_dict())
    x, results = torch.randn(5, 3, 4), []
    for name, module in layers.items():
        module, place = (module.to(device), device) if name == "triton" else (module.double(), "cpu")
        output, _ = module(x.to(place, module.weight_hh_l0.dtype))
        output.square().sum().backward()
        results.append([output.detach().cpu(), *(p.grad.cpu() for p in module.parameters())])
    for k, pair in enumerate(zip(*results, strict=True)):
        assert_near(pair[0], extended(pair[1]), f"number {k}", condition=100)


# --- opcheck and compile


OPCHECK = {
    "heads": (HEADS, "contiguous"),
    "permuted": (SMALL, "permuted"),
    "sliced": (SMALL, "sliced"),
    "B0": (SMALL.with_(B=0), "contiguous"),
    "T1": (SMALL.with_(T=1), "contiguous"),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, device):
    case, layout = OPCHECK[name]
    inputs = [None if x is None else LAYOUTS[layout](x.to(device)) for x in case.tensors(torch.float32)]
    torch.library.opcheck(ops.recurrence_fwd, forward_arguments(case.cell, *inputs, backend="triton"))
    for inverse in ("layer", "direct"):
        sweep = Sweep(inverse)
        back = back_of(case, torch.float32, sweep).map(lambda tensor: LAYOUTS[layout](tensor.to(device)))
        sent = back.with_(grad=None, carried=back.grad[0], through=back.grad[0])
        for given in (back.with_(last=None), sent):
            torch.library.opcheck(ops.recurrence_bwd, given.arguments(sweep, "triton"))


def test_compile(device):
    def function(u: torch.Tensor, weight: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
        return tp.rnn(2 * u, weight, h0, backend="triton") + 1

    u, weight, _, h0 = SMALL.tensors(torch.float32)
    leaves = {"u": u, "weight": weight, "h0": h0}
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in leaves.items()}
    results = []
    for called in (torch.compile(function, fullgraph=True), function):
        h = called(**leaves)
        grads = torch.autograd.grad(h, list(leaves.values()), SMALL.gradient(torch.float32).to(device))
        results.append({name: x.detach().cpu() for name, x in zip(("h", *leaves), (h, *grads), strict=True)})
    assert_same_numbers(*results)


# --- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [Case(T=3, B=4, N=17), Case(T=2, B=3, H=3, N=16)], ids=str)
def test_layouts(case, layout, device):
    forward_check(case, torch.float32, "triton", layout, device)
    for rule in ("bp", "weight-total", "layer-local", "direct-total"):
        backward_check(case, RULES[rule], torch.float32, "triton", layout, device)


@pytest.mark.parametrize("loss", [torch.sum, lambda h: h[-1].sum(), lambda h: h[:, 1].mean()], ids=["sum", "last", "b"])
def test_expanded_gradients(loss, device):
    inputs = inputs_of(HEADS, torch.float32, device)
    leaves = leaves_of(inputs)
    h = layer(HEADS, inputs, backend="triton")
    found = torch.autograd.grad(loss(h), list(leaves.values()), retain_graph=True)
    arrives = torch.autograd.grad(loss(h), h, retain_graph=True)[0].contiguous()
    expected = torch.autograd.grad(h, list(leaves.values()), arrives)
    assert_same_bits(dict(zip(leaves, found, strict=True)), dict(zip(leaves, expected, strict=True)))


# --- "difference" and "direct"


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_small_differences_are_linear(nonlinearity, device):
    small_differences_check(f"rnn_{nonlinearity}", torch.float32, "triton", device)


def test_relu_counts_as_its_own_inverse(dtype, device):
    relu_inverse_check(dtype, "triton", device)


def test_the_inverse_of_the_activation_takes_small_tiles(device, monkeypatch):
    """Larger ones would spill registers, as the kernels that are compiled ahead of time show."""
    many, choose, asked = 10**6, triton_blocks.choose, []
    monkeypatch.setattr(triton_blocks, "choose", lambda *given: asked.append(given[3]) or choose(*given))
    for word in ("layer", "difference", "direct"):
        backward_check(SMALL, RULES[f"{word}-total"], torch.float32, "triton", device=device)
    assert asked == ["layer", "difference", "direct"]
    few = {(N, word): choose(N, many, torch.bfloat16, word).rows == 16 for N in (5, 200) for word in ("none", *asked)}
    assert {key for key, small in few.items() if not small} == {(5, "none"), (5, "layer"), (200, "none")}


# --- the solve of "jacobian"


def solved(ratio: float, dtype: torch.dtype, case: Case, device: str) -> tuple[Back, Sweep]:
    """A gradient at every step, h and W, with ``r = ratio ‖W‖²``, ‖W‖ = 1."""
    weight = case.tensors(torch.float64).weight
    weight /= torch.linalg.matrix_norm(weight, 2)[..., None, None]
    h = case.gradient(torch.float64, seed=4).tanh()
    back = Back("rnn_tanh", h, weight, grad=case.gradient(torch.float64))
    return back.map(lambda tensor: tensor.to(device, dtype)), Sweep("jacobian", reg=ratio)


@pytest.mark.parametrize("case", [Case(T=4, B=18, N=33), Case(T=3, B=3, H=2, N=20)], ids=str)
def test_iterations_of_jacobian(case, dtype, device):
    """Those of the CPU's float32, but for one more or less where a residual is rounded about rtol."""
    back, sweep = solved(0.05, dtype, case, device)
    back = back.with_(last=back.grad[0])
    found = back.iterations(sweep, "triton").cpu()
    assert found.shape == back.h.shape[:-1]
    assert found.dtype == torch.int32
    assert 5 < found.max() < 30
    if not TABLE.available("cpu")[0]:
        absent("cpu", TABLE.available("cpu")[1])
    expected = back.map(lambda tensor: tensor.float().cpu()).iterations(sweep, "cpu")
    assert (found - expected).abs().max() <= 1
    back.grad[:, 1] = 0
    none = back.with_(last=None).iterations(sweep, "triton")
    assert none[:, 1].eq(0).all()
    assert none[:, 0].ne(0).all()


@pytest.mark.parametrize("ratio", [1e-3, 0.1], ids=str)
def test_jacobian_solves_the_equation_that_defines_it(ratio, device):
    """To rtol, where the recursion of residuals is trusted and where they are computed anew (small r)."""
    back, sweep = solved(ratio, torch.float32, Case(T=1, B=5, N=33), device)
    found = back.run(sweep._replace(update="local"), "triton").carried
    jacobian = (1 - back.h[0].double().square())[..., None] * back.weight.double()
    assert_solved(found.cpu(), back.grad[0].cpu(), jacobian.cpu(), ratio, sweep.rtol)


@pytest.mark.parametrize("H", [None, 2])
def test_what_cannot_be_solved_raises(H, device):
    """With the words of the other back-ends; ``first`` counts."""
    back, sweep = solved(1e-6, torch.float32, Case(T=3, B=18, N=33, H=H), device)
    sweep = sweep._replace(rtol=1e-6, update="local")
    late = torch.zeros_like(back.grad)
    late[0, 17] = back.grad[0, 17]
    back = back.with_(cell="rnn_identity", grad=late)
    head = "" if H is None else ", head [01]"
    text = (
        "rnn: inverse='jacobian' could not be solved in float32 at reg=1e-06: worst at time step {}, sample 17"
        rf"{head}, with a relative residual of \S+, above rtol=1e-06; use a larger reg, a larger rtol or float64"
    )
    with pytest.raises(torch.linalg.LinAlgError, match=f"^{text.format(7)}$"):
        back.run(sweep, "triton", first=7)
    with pytest.raises(torch.linalg.LinAlgError, match=f"^{text.format(0)}$"):
        back.iterations(sweep, "triton")


def test_a_weight_too_large_to_square_raises(device):
    """W Wᵀ overflows although all numbers are finite."""
    back, sweep = solved(0.25, torch.float32, SMALL, device)
    with pytest.raises(torch.linalg.LinAlgError, match="could not be solved in float32"):
        back.with_(weight=1e25 * back.weight).run(sweep, "triton")


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_jacobian_of_any_magnitude(scale, device):
    """To the bit: the solve is in a unit of its own."""
    back, sweep = solved(0.25, torch.float32, SMALL, device)
    one, other = (back.with_(grad=factor * back.grad).run(sweep, "triton").swept for factor in (1, scale))
    assert_same_bits({what: tensor / scale for what, tensor in other.items()}, one)


def test_samples_of_jacobian_are_independent(dtype, device):
    """To the bit: alone, and beside a row that needs more iterations, or is not finite."""
    back, sweep = solved(0.05, dtype, Case(T=3, B=18, N=17), device)
    together = back.run(sweep, "triton")
    spoilt = back.grad.clone()
    spoilt[2, 3, 4] = torch.nan
    others = torch.arange(18, device=device) != 3
    found = back.with_(grad=spoilt).run(sweep, "triton")
    assert found.carried[3].isnan().all()
    assert_identical(found.grad_u[:, others], together.grad_u[:, others], "grad_u")
    for b in (0, 17):
        alone = back.of_samples(slice(b, b + 1)).run(sweep, "triton")
        assert_identical(alone.grad_u, together.grad_u[:, b : b + 1], f"sample {b}")
        assert_identical(alone.carried, together.carried[b : b + 1], f"sample {b}")


def test_jacobian_of_a_weight_that_is_not_finite(device):
    back, sweep = solved(0.25, torch.float32, SMALL, device)
    back.weight[1, 2] = torch.inf
    found = back.run(sweep, "triton")
    assert found.carried.isnan().all()
    assert found.grad_u[-1].isfinite().all()


# --- contract


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_nan_and_infinity_flow_through(nonlinearity, value, dtype, device):
    """As in the reference; N = 5 leaves units of the block that are not there, which must not send them on."""
    case = SMALL.with_(cell=f"rnn_{nonlinearity}")
    inputs = case.tensors(dtype)
    inputs.u[1, 1, 2] = value
    expected = forward_op(case.cell, *inputs, backend="reference").h
    there = [None if tensor is None else tensor.to(device) for tensor in inputs]
    assert_same_pattern(forward_op(case.cell, *there, backend="triton").h.cpu(), expected, "h")
    back = back_of(case, dtype, Sweep())
    back.grad[2, 1, 2] = value
    # Through a positive weight infinities stay infinities for all steps that are left.
    matrices = (back.weight, back.weight.abs())
    for matrix, inverse in itertools.product(matrices, ("none", "weight", "difference", "direct")):
        sweep = Sweep(inverse, clip=0.1)
        given = back.with_(weight=matrix, feedback=matrix)
        plain = given.run(sweep, "reference").swept
        for what, tensor in given.map(lambda tensor: tensor.to(device)).run(sweep, "triton").swept.items():
            assert_same_pattern(tensor.cpu(), plain[what], f"{what} of {inverse}")


def test_samples_are_independent_and_runs_agree(dtype, device):
    case = Case(T=3, B=18, N=17)
    together, again = (gradients(case, tp.TargetProp(), dtype, "triton", device) for _ in range(2))
    assert_same_bits(again, together)
    u, weight, _, h0 = inputs_of(case, dtype, device)
    for b in (0, 17):
        alone = tp.rnn(u[:, b : b + 1], weight, h0[b : b + 1], backend="triton")
        assert_identical(alone.cpu(), together["h"][:, b : b + 1], f"sample {b}")


@pytest.mark.parametrize("rule", ["weight-total", "layer-total", "difference-total", "direct-total"])
@pytest.mark.parametrize("case", [SMALL, HEADS], ids=str)
def test_two_sweeps_where_one_does_not_fit(case, rule, dtype, device, monkeypatch):
    """Displacements, then their back-propagation: the same numbers as both at once."""
    asked = []
    monkeypatch.setattr(
        triton_blocks, "fits", lambda tensor, matrices, size=None: matrices < 2 or bool(asked.append(matrices))
    )
    backward_check(case, replace(RULES[rule], clip=0.1), dtype, "triton", device=device)
    assert asked == [2]
    if case is SMALL:
        checkpoints_check(rule, 3, device)


def test_what_it_refuses(device):
    """With the reason, and ``auto`` goes on."""
    place = "cuda:0" if ON_GPU else "cpu"

    def refused(size: int = 5, dtype: torch.dtype = torch.float32, inverse: str = "none", on: str = device) -> str:
        tensor = torch.ones(1, 1, size, dtype=dtype, device=on)
        ok, reason = triton_blocks.supports(tensor, size=size, sweep=Sweep(inverse))
        assert not ok
        assert not TABLE.supports("triton", tensor, size=size, sweep=Sweep(inverse))[0]
        return reason

    if not ON_GPU or torch.cuda.get_device_properties(0).shared_memory_per_block_optin >= 163 * 1024:
        assert refused(129) == f"the weight has to fit on chip, N <= 128 in float32 on {place}, and N = 129"
        assert refused(300, torch.bfloat16) == (
            f"the weight has to fit on chip, N <= 256 in bfloat16 on {place}, and N = 300"
        )
        assert refused(200, torch.bfloat16, "jacobian") == (
            f"inverse='jacobian' is solved in float32 with W Wᵀ on chip, N <= 128 on {place}, and N = 200"
        )
    assert refused(dtype=torch.float64) == "it computes float32, bfloat16 and float16, and the tensors are float64"
    assert refused(on="meta").endswith("and the tensors are on meta")
    u, weight, _, _ = inputs_of(SMALL, torch.float32, device)
    back = Back("rnn_tanh", u, weight, grad=u, u=u, feedback=weight)
    with pytest.raises(TypeError, match=r"rnn: feedback must be a torch.Tensor with inverse='layer', got None"):
        back.with_(feedback=None).run(Sweep("layer"), "triton")
    with pytest.raises(TypeError, match=r"rnn: u must be a torch.Tensor with inverse='direct', got None"):
        back.with_(u=None).run(Sweep("direct"), "triton")
    with pytest.raises(TypeError, match=r"rnn: all tensors must be torch.float32 on .*, got torch.float16"):
        back.with_(u=u.half()).run(Sweep("direct"), "triton")
    with pytest.raises(TypeError, match=r"rnn: all tensors must be torch.float32 on"):
        forward_op("rnn_tanh", u, weight.half(), backend="triton")


WIDE = Case(T=2, B=3, N=200)  # "jacobian" is solved in float32, which has no room for this


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_rule_it_has_not_fails_at_the_call(compiled, device):
    """And not in backward; without gradients no rule is asked for."""
    rule, refusal = tp.TargetProp(inverse="jacobian"), "inverse='jacobian' is solved in float32 with W Wᵀ on chip"

    def function(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return tp.rnn(u, weight, rule=rule, backend="triton")

    called = torch.compile(function, fullgraph=True) if compiled else function
    tensors = inputs_of(WIDE, torch.bfloat16, device)[:2]
    expected = tp.rnn(*tensors, backend="triton")
    assert_identical(called(*tensors), expected, "h")
    tensors[1].requires_grad_()
    with pytest.raises(tp.BackendUnavailableError, match=f"backend 'triton' cannot run this call: {refusal}"):
        called(*tensors)
    with torch.no_grad():
        assert_identical(called(*tensors), expected, "h")
    layer = tp.nn.RNN(4, WIDE.N, rule=rule, backend="triton").to(device, torch.bfloat16)
    with pytest.raises(tp.BackendUnavailableError, match=refusal):
        layer(torch.ones(2, 3, 4, device=device, dtype=torch.bfloat16))


def test_auto(device):
    """On CPU tensors it never is Triton, not even interpreted; on a GPU it is wherever that can run."""
    chosen = TABLE.resolve("auto", torch.ones(1, 1, 5, device=device), size=5)
    assert chosen is TABLE.backends["triton"] if ON_GPU else chosen is not TABLE.backends["triton"]
    wide = TABLE.resolve("auto", torch.ones(1, device=device, dtype=torch.float64), size=5)
    assert wide is not TABLE.backends["triton"]


def test_auto_takes_one_back_end_for_both_passes(device, monkeypatch):
    """Not the first with forward and another one for backward; without gradients the first with forward."""
    monkeypatch.setitem(TABLE.preference, device, ("triton", "reference"))
    leaves = inputs_of(WIDE, torch.bfloat16, device)[:2]
    rule = tp.TargetProp(inverse="jacobian")
    states = {name: tp.rnn(*leaves, rule=rule, backend=name) for name in ("auto", "triton", "reference")}
    assert not torch.equal(states["triton"], states["reference"])
    assert_identical(states["auto"], states["triton"], "h without gradients")
    leaves[0].requires_grad_()
    h = tp.rnn(*leaves, rule=rule, backend="auto")
    assert_identical(h.detach(), states["reference"], "h")
    assert torch.autograd.grad(h.sum(), leaves[0])[0].isfinite().all()
    rule = tp.TargetProp(inverse="layer", mode="direct", clip=0.1)
    assert_identical(tp.rnn(*leaves, rule=rule, backend="auto").detach(), states["triton"], "h of a rule it has")


# --- on a GPU only

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU that this torch can use")


@needs_gpu
def test_graph_capture_and_replay():
    capture_check(SMALL, "triton")


@needs_gpu
def test_on_another_stream():
    stream_check(SMALL, "triton")


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_on_the_second_gpu():
    assert_same_bits(*(gradients(SMALL, tp.TargetProp(), torch.float32, "triton", f"cuda:{index}") for index in (0, 1)))


@needs_gpu
def test_a_last_batch_compiles_nothing(device, monkeypatch):
    """Nor does another length."""
    import triton

    module = importlib.import_module(f"{triton_blocks.__package__}.triton_kernel")
    for kernel in (module.forward_kernel, module.backward_kernel):
        kernel.device_caches.clear()  # what other tests have compiled
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["repr"]))
    for T, B in ((5, 20), (5, 13), (4, 20), (16, 16)):
        before = len(compiled)
        gradients(Case(T=T, B=B, N=45), tp.TargetProp(), torch.float32, device)
        assert (before == 0) == (len(compiled) > before), f"T = {T}, B = {B}: {compiled[before:]}"


@needs_gpu
def test_more_heads_than_an_axis_of_the_grid_takes(device):
    """There are 65,535 places on every axis but the first."""
    u = torch.rand(2, 1, 70_000, 2, device=device)
    weight = torch.eye(2, device=device).repeat(70_000, 1, 1)
    expected = torch.stack([u[0].tanh(), (u[1] + u[0].tanh()).tanh()])
    assert_near(tp.rnn(u, weight, backend="triton").cpu(), extended(expected.cpu()), "h", condition=10)


@needs_gpu
def test_tf32_only_where_torch_was_told(device, monkeypatch):
    """``allow_tf32`` is off in the other tests, which hold float32 to its own budget."""
    assert not torch.backends.cuda.matmul.allow_tf32
    case = Case(T=2, B=16, N=64)
    tensors = inputs_of(case, torch.float32, device)[:2]
    exact = tp.rnn(*tensors, backend="triton")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert not torch.equal(tp.rnn(*tensors, backend="triton"), exact)
