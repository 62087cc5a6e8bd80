"""Displacements parallel over time, where a rule has no state in them."""

import pytest
import torch
from _cases import LAYOUTS, Case
from _checks import Back, assert_same_numbers, exact_back, leaves_of
from _compare import assert_budget, assert_near
from _oracle import extended
from torch import Tensor

import tp_kernels as tp
from tp_kernels.ops.recurrence import op, parallel
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels
SMALL = Case(T=4, B=3, N=5)
HEADS = SMALL.with_(H=2)
CASES = (
    *(Case(T=T, B=2, N=17) for T in (1, 2, 3, 4, 5, 64, 65, 1000)),
    Case(T=4096, B=1, N=16),
    Case(T=7, B=3, H=2, N=5),
    Case(T=3, B=0, N=5),
)


@pytest.mark.parametrize("sources", ["last", "states", "both"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_displacements(case, power, sources, dtype):
    """All λ within the error budget of the step-by-step recursion. With the identity and "local", δ is λ."""
    weight, grad = case.tensors(dtype).weight, case.gradient(dtype)
    p = tp.regularized_inverse(weight, 1e-4 if power == 0.5 else 0.25, power=power)
    grad, last = grad if sources != "last" else None, case.gradient(dtype, 3)[0] if sources != "states" else None
    h = torch.zeros(case.shape, dtype=dtype)
    found = ops.recurrence_displacements(grad, last, h, p, 0.7)
    sweep = Sweep("weight", "local", step=0.7)
    back = Back("rnn_identity", h, weight, grad=grad, last=last, feedback=p)
    swept, exact = back.run(sweep, "reference"), exact_back(back, None, sweep).displacements
    step_by_step, exact = (swept.grad_u, swept.carried), (exact[1:], exact[0])
    for what, *parts in zip(("displacements", "the first one"), found, step_by_step, exact, strict=True):
        if dtype == torch.float64 and case.T >= 1000:  # squaring in the same precision: T ulp, as documented
            assert_near(parts[0], parts[2], what, condition=20)
        else:
            assert_budget(*parts, what, condition=20)
        assert parts[0].is_contiguous()


@pytest.mark.parametrize("sources", ["last", "states", "both"])
@pytest.mark.parametrize("update", ["local", "total"])
@pytest.mark.parametrize("case", [SMALL, HEADS, SMALL.with_(T=65, N=33)], ids=str)
def test_gradients_are_those_of_the_sweep(case, update, sources, dtype, backend):
    rule = tp.TargetProp(update=update, step=0.3)
    results = []
    for way in ("parallel", "sweep"):
        inputs = case.tensors(dtype)
        leaves = leaves_of(inputs)
        h, (last,), _ = op.recurrent_layer(
            case.cell, inputs.u, inputs.weight, inputs.h0, rule=rule, displacements=way, backend=backend
        )
        grads = {"last": (None, case.gradient(dtype, 3)[0]), "states": (case.gradient(dtype), None)}
        grads["both"] = grads["states"][0], grads["last"][1]
        reached = [pair for pair in zip((h, last), grads[sources], strict=True) if pair[1] is not None]
        outputs, arrived = zip(*reached, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), arrived)
        results.append(dict(zip(leaves, found, strict=True)))
    assert_same_numbers(*results)


def test_compile():
    def function(u: Tensor, weight: Tensor) -> Tensor:
        return tp.rnn(u, weight, displacements="parallel")

    u, weight, _, _ = SMALL.tensors(torch.float32)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(f(u, weight).sum(), weight)[0] for f in (torch.compile(function, fullgraph=True), function)
    ]
    assert_near(grads[0], extended(grads[1]), "grad_weight")


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("case", [SMALL, HEADS, SMALL.with_(B=0), SMALL.with_(T=1)], ids=str)
def test_opcheck(case, layout):
    grad, last = LAYOUTS[layout](case.gradient(torch.float32)), case.gradient(torch.float32)[0]
    weight = case.tensors(torch.float32).weight
    for sources in ((grad, None), (None, last), (grad, last)):
        torch.library.opcheck(ops.recurrence_displacements, (*sources, grad, weight, 0.5))


def test_where_it_is_chosen(monkeypatch):
    """One source and one long sequence of many units; everything else is swept. A GRU's gates are states."""
    calls = []
    worth_it = parallel.worth_it
    monkeypatch.setattr(parallel, "worth_it", lambda *given: calls.append(worth_it(*given)) or False)
    for cell, T, B, source in (
        ("rnn_tanh", 8192, 1, -1),
        ("rnn_tanh", 8191, 1, -1),
        ("rnn_tanh", 8192, 2, -1),
        ("rnn_tanh", 8192, 1, slice(None)),
        ("gru", 8192, 1, -1),
    ):
        wide = 256 * (3 if cell == "gru" else 1)
        weight = torch.eye(256).repeat(wide // 256, 1).requires_grad_()
        h, (last,), _ = op.recurrent_layer(cell, torch.zeros(T, B, wide), weight, None, rule=tp.TargetProp())
        (last if source == -1 else h).sum().backward()
    assert calls == [True, False, False, False]


BAD = {
    "word": ("fast", tp.TargetProp(), None, "must be one of 'auto', 'sweep', 'parallel', got 'fast'"),
    "bp": (
        "parallel",
        tp.BackProp(),
        None,
        f"='parallel' needs a rule with inverse='weight', without blend, latch and chunk, got {tp.BackProp()}",
    ),
    "checkpoints": (
        "parallel",
        tp.TargetProp(),
        2,
        "='parallel' needs all states: checkpoint_every must be None, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    word, rule, every, text = BAD[name]
    u, weight, _, _ = SMALL.tensors(torch.float32)
    separator = "" if text.startswith("=") else " "
    with pytest.raises(ValueError, match="displacements") as caught:
        tp.rnn(u, weight, rule=rule, checkpoint_every=every, displacements=word)
    assert str(caught.value) == f"rnn: displacements{separator}{text}"
    with pytest.raises(ValueError, match="displacements") as caught:
        tp.nn.RNN(2, 3, rule=rule, checkpoint_every=every, displacements=word)
    assert str(caught.value) == f"nn.RNN: displacements{separator}{text}"
