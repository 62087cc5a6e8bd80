"""What the tests of the CUDA kernels share: the device, a GPU or an emulated one, and calls of ``rnn`` on it."""

import pytest
import torch
from _cases import RULES, RNNCase
from _compare import assert_same_pattern

import tp_kernels as tp
from tp_kernels import _native
from tp_kernels.rules import Sweep

ON_GPU = _native.cuda_available()[0] and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU that the CUDA module can use")
FLOAT = torch.float32
Rules = dict[str, tp.BackProp | tp.TargetProp]
ops = torch.ops.tp_kernels
SWEPT = {
    name: rule
    for name, rule in RULES.items()
    if Sweep.of(rule, "tanh").inverse in ("none", "identity", "weight", "layer")
}
"""What every path of ``rnn`` on a CUDA device has."""


def emulate(**settings: object) -> None:
    """A device of that many multiprocessors, blocks of a cluster and bytes of shared memory of a block, and the order
    of threads and blocks; a GPU is as it is.
    """
    if not ON_GPU:
        _native.cuda.emulate(**settings)


def tensors_of(case: RNNCase, dtype: torch.dtype = FLOAT) -> list[torch.Tensor]:
    """u, W, h_0 and what arrives from the loss."""
    return [tensor.to(DEVICE) for tensor in (*case.tensors(dtype), case.gradient(dtype))]


def everything(
    case: RNNCase, rules: Rules, dtype: torch.dtype = FLOAT, batch: slice = slice(None)
) -> list[torch.Tensor]:
    """What every kernel computes for a case, or for a part of its batch, handed in in parts, too."""
    u, weight, h0, grad = tensors_of(case, dtype)
    u, h0, grad = u[:, batch], h0[batch], grad[:, batch]
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "cuda")
    results = [h]
    for rule in rules.values():
        sweep = Sweep.of(rule, case.nonlinearity)
        arguments = grad, None, h, weight, 0.6 * weight.mT, h0, h0, None, None
        results += ops.rnn_bwd(*arguments, *sweep, "cuda")
    return results


def in_two_parts(case: RNNCase, rule: tp.BackProp | tp.TargetProp) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States, δ and what is sent on, of a sequence in two calls and in one."""
    u, weight, h0, grad = tensors_of(case)
    sweep = Sweep.of(rule, case.nonlinearity)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "cuda")
    states = ops.rnn_fwd(u[2:], weight, h[1].clone(), case.nonlinearity, "cuda")
    whole = ops.rnn_bwd(grad, None, h, weight, weight, None, None, None, None, *sweep, "cuda")
    later, *sent = ops.rnn_bwd(grad[2:], None, h[2:], weight, weight, None, None, None, None, *sweep, "cuda")
    sent = (tensor if tensor.numel() else None for tensor in sent)
    first, *sent = ops.rnn_bwd(grad[:2], None, h[:2], weight, weight, *sent, None, None, *sweep, "cuda")
    return [torch.cat([h[:2], states]), torch.cat([first, later]), *sent], [h, *whole]


def check_not_finite(case: RNNCase, rules: Rules, value: float, dtype: torch.dtype = FLOAT) -> None:
    """A value stays in its unit until the next step, and in its sequence for ever, as in the reference."""
    N, nonlinearity = case.N, case.nonlinearity
    u, weight, h0, grad = tensors_of(case, dtype)
    u[1, 2, N - 1] = value
    h, expected = (ops.rnn_fwd(u, weight, h0, nonlinearity, name) for name in ("cuda", "reference"))
    assert_same_pattern(h if N == 1 else h[:2], expected if N == 1 else expected[:2], "h")
    assert h.isnan().any(-1).nonzero().tolist() == expected.isnan().any(-1).nonzero().tolist()
    for rule in rules.values():
        sweep = Sweep.of(rule, nonlinearity)
        arguments = grad, None, expected, weight, weight, None, None, None, None, *sweep
        delta, wanted = (ops.rnn_bwd(*arguments, name)[0] for name in ("cuda", "reference"))
        assert_same_pattern(delta.sum(-1), wanted.sum(-1), "delta")
