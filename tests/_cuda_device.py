"""What the tests of the CUDA kernels share: the device, a GPU or an emulated one, and calls of the recurrence on it."""

import pytest
import torch
from _cases import RULES, Case, Inputs
from _checks import Back, forward_op
from _compare import assert_same_pattern

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.rules import Sweep

ON_GPU = _native.cuda_available()[0] and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU that the CUDA module can use")
FLOAT = torch.float32
Rules = dict[str, tp.BackProp | tp.TargetProp]
Named = dict[str, torch.Tensor]
SWEPT = {
    name: rule for name, rule in RULES.items() if Sweep.of(rule).inverse in ("none", "identity", "weight", "layer")
}
"""What every path of the recurrence on a CUDA device has."""


def emulate(**settings: object) -> None:
    """A device of that many multiprocessors, blocks of a cluster and bytes of shared memory of a block, and the order
    of threads and blocks; a GPU is as it is.
    """
    if not ON_GPU:
        _native.cuda.emulate(**settings)


def inputs_of(case: Case, dtype: torch.dtype = FLOAT) -> Inputs:
    return Inputs(*(None if tensor is None else tensor.to(DEVICE) for tensor in case.tensors(dtype)))


def given_to(case: Case, h: torch.Tensor, dtype: torch.dtype = FLOAT) -> Back:
    """A backward pass at these states, with something of a later call's."""
    weight, grad = inputs_of(case, dtype).weight, case.gradient(dtype).to(DEVICE)
    sent = case.gradient(dtype, seed=5)[0].to(DEVICE)
    return Back(case.cell, h, weight, grad=grad, feedback=0.6 * weight.mT, carried=sent, through=sent)


def everything(case: Case, rules: Rules, dtype: torch.dtype = FLOAT, batch: slice = slice(None)) -> list[torch.Tensor]:
    """What every kernel computes for a case, or for a part of its batch, handed in in parts, too."""
    u, weight, bias, h0 = inputs_of(case, dtype)
    h = forward_op(case.cell, u[:, batch], weight, bias, None if h0 is None else h0[batch], backend="cuda").h
    back = given_to(case, h, dtype)
    grad, sent = back.grad[:, batch], back.carried[batch]
    back = back.with_(grad=grad, carried=sent, through=sent)
    found = (back.run(Sweep.of(rule), "cuda") for rule in rules.values())
    return [h, *(tensor for results in found for tensor in (results.grad_u, results.carried, results.through))]


def outputs(rules: Rules) -> int:
    """How many arrays with elements a backward pass of each rule fills."""
    sweeps = [Sweep.of(rule) for rule in rules.values()]
    return sum(1 + (sweep.inverse != "none") + (sweep.update == "total") for sweep in sweeps)


def in_two_parts(case: Case, rule: tp.BackProp | tp.TargetProp) -> tuple[Named, Named]:
    """States, δ and what is sent on, of a sequence in two calls and in one."""
    u, weight, bias, h0 = inputs_of(case)
    sweep = Sweep.of(rule)
    h = forward_op(case.cell, u, weight, bias, h0, backend="cuda").h
    states = forward_op(case.cell, u[2:], weight, bias, h[1].clone(), backend="cuda").h
    back = given_to(case, h).with_(carried=None, through=None)
    whole, later = back.run(sweep, "cuda"), back.later(2).run(sweep, "cuda")
    earlier = back.earlier(2).with_(**later.sent).run(sweep, "cuda")
    found = {"h": torch.cat([h[:2], states]), **earlier.swept}
    found["grad_u"] = torch.cat([earlier.grad_u, later.grad_u])
    return found, {"h": h, **whole.swept}


def check_not_finite(case: Case, rules: Rules, value: float, dtype: torch.dtype = FLOAT) -> None:
    """A value stays in its unit until the next step, and in its sequence for ever, as in the reference."""
    N, inputs = case.N, inputs_of(case, dtype)
    inputs.u[1, 2, N - 1] = value
    h, expected = (forward_op(case.cell, *inputs, backend=name).h for name in ("cuda", "reference"))
    assert_same_pattern(h if N == 1 else h[:2], expected if N == 1 else expected[:2], "h")
    assert h.isnan().any(-1).nonzero().tolist() == expected.isnan().any(-1).nonzero().tolist()
    back = Back(case.cell, expected, inputs.weight, grad=case.gradient(dtype).to(DEVICE), feedback=inputs.weight)
    for rule in rules.values():
        delta, wanted = (back.run(Sweep.of(rule), name).grad_u for name in ("cuda", "reference"))
        assert_same_pattern(delta.sum(-1), wanted.sum(-1), "delta")
