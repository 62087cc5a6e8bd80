"""One call of an op, on one back-end, held against the reference and the exact answer."""

import numpy as np
import torch
from _cases import LAYOUTS, RNNCase, matrices
from _compare import (
    assert_atanh,
    assert_average_budget,
    assert_budget,
    assert_identical,
    assert_near,
    assert_residual,
    assert_tanh,
)
from _oracle import extended, regularized_inverse, regularized_inverse_gradients, rnn_backward, rnn_forward
from torch import Tensor

import tp_kernels as tp
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels

# The inverses that go through that of the activation, whose slope is large.
THROUGH_ACTIVATION = ("layer", "difference", "direct")


def grows_and_cancels(case: RNNCase, sweep: Sweep) -> bool:
    """Whether displacements do: at the worst of many steps one side's error is several times the other's."""
    return sweep.inverse in THROUGH_ACTIVATION and case.T >= 63


def assert_long_budget(
    actual: Tensor,
    reference: Tensor,
    exact: np.ndarray,
    what: str,
    condition: float,
    reference_exact: np.ndarray | None = None,
) -> None:
    """The budget on average over time; grad_h0 is one step of many, and its error luck."""
    assert_near(actual, exact, what, condition)
    if what == "grad_u":
        assert_average_budget(actual, reference, exact, what, condition, reference_exact)


def rnn_forward_check(
    case: RNNCase, dtype: torch.dtype, backend: str, layout: str = "contiguous", device: str = "cpu"
) -> None:
    tensors = case.tensors(dtype)
    placed = [None if tensor is None else LAYOUTS[layout](tensor.to(device)) for tensor in tensors]
    found, reference = (
        ops.rnn_fwd(*given, case.nonlinearity, name) for given, name in ((placed, backend), (tensors, "reference"))
    )
    exact = rnn_forward(*map(extended, tensors), case.nonlinearity)
    assert_budget(found.cpu(), reference, exact, "h")
    assert found.is_contiguous()


def backward_op(
    grad: Tensor | None,
    last: Tensor | None,
    h: Tensor,
    weight: Tensor,
    feedback: Tensor | None,
    sweep: Sweep,
    backend: str,
    u: Tensor | None = None,
    h0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward op on a whole sequence: ``grad_u`` and ``grad_h0``."""
    grad_u, carried, through = ops.rnn_bwd(grad, last, h, weight, feedback, None, None, u, h0, *sweep, backend)
    return grad_u, through if sweep.update == "total" else carried


def condition_of_jacobian(weight: Tensor, sweep: Sweep) -> float:
    """Of ``J Jᵀ + rI`` at most: no unit's slope exceeds 1."""
    return 1 + float(torch.linalg.matrix_norm(weight.double(), 2).max()) ** 2 / sweep.reg


def rnn_backward_check(
    case: RNNCase,
    rule: tp.BackProp | tp.TargetProp,
    dtype: torch.dtype,
    backend: str,
    layout: str = "contiguous",
    device: str = "cpu",
) -> None:
    """The backward op by itself, on given states and a given P."""
    u, weight, h0 = case.tensors(dtype)
    h = ops.rnn_fwd(u, weight, h0, case.nonlinearity, "reference")
    sweep = Sweep.of(rule, case.nonlinearity)
    feedback = 0.6 * case.tensors(dtype, seed=2)[1] if sweep.uses_inverse else None
    grad, last = case.gradient(dtype), case.gradient(dtype, seed=3)[0]
    tensors = grad, last, h, weight, feedback, u, h0
    placed = [None if tensor is None else LAYOUTS[layout](tensor.to(device)) for tensor in tensors]
    found = backward_op(*placed[:5], sweep, backend, *placed[5:])
    reference = backward_op(*tensors[:5], sweep, "reference", *tensors[5:])
    whole = extended(grad)
    whole[-1] += extended(last)
    exact = rnn_backward(whole, *map(extended, (u, h, h0, weight, feedback)), sweep)
    condition, rtol = 1.0, 0.0
    if sweep.inverse in THROUGH_ACTIVATION:
        condition = 10  # 1 - h² loses digits where h is near 1
    elif sweep.inverse == "jacobian":
        condition, rtol = condition_of_jacobian(weight, sweep), sweep.rtol
    for what, *parts in zip(("grad_u", "grad_h0"), found, reference, (exact[0], exact[2]), strict=True):
        assert parts[0].is_contiguous()
        parts[0] = parts[0].cpu()
        if grows_and_cancels(case, sweep):
            assert_long_budget(*parts, what, condition)
        else:
            assert_budget(*parts, what, condition, rtol=rtol)


def capture_check(case: RNNCase, backend: str) -> None:
    """On a GPU: a training step, captured once, gives the gradients of other numbers when it is replayed on them. It
    computes P too, of the weight as it then is."""
    u, weight, h0 = (tensor.cuda().requires_grad_() for tensor in case.tensors(torch.float32))
    grad = case.gradient(torch.float32).cuda()

    def step() -> tuple[Tensor, ...]:
        h = tp.rnn(u, weight, h0, backend=backend)
        return h.detach(), *torch.autograd.grad(h, (u, weight, h0), grad)

    torch.use_deterministic_algorithms(False)  # filling memory with NaN would be captured as well
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        u.mul_(-0.5)
        weight.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    for what, *pair in zip(("h", "grad_u", "grad_weight", "grad_h0"), captured, step(), strict=True):
        assert_near(pair[0].cpu(), extended(pair[1].cpu()), what, condition=10)


def stream_check(case: RNNCase, backend: str) -> None:
    """On a GPU: it computes on the current stream, behind what comes before it there, and nowhere else."""
    tensors = [tensor.cuda() for tensor in case.tensors(torch.float32)]
    expected = tp.rnn(*tensors, backend=backend)
    late = torch.full_like(tensors[0], torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.copy_(tensors[0])
        found = tp.rnn(late, *tensors[1:], backend=backend)
    torch.cuda.synchronize()
    assert_near(found.cpu(), extended(expected.cpu()), "h")


def tanh_check(dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """With a zero weight the layer is tanh: a dense sweep over all magnitudes, and the special values."""
    info = torch.finfo(dtype)
    magnitudes = torch.logspace(np.log10(info.smallest_normal), 2.5, 200_001, dtype=torch.float64)
    dense = torch.linspace(0, 20, 300_001, dtype=torch.float64)
    special = torch.tensor([0.0, info.tiny * info.eps, info.tiny / 2, info.tiny, 1e3, info.max, torch.inf])
    positive = torch.cat([magnitudes.to(dtype), dense.to(dtype), special.to(dtype)])
    argument = torch.cat([positive, -positive, torch.tensor([torch.nan], dtype=dtype)])
    n = 64
    argument = torch.nn.functional.pad(argument, (0, -len(argument) % n))
    h = tp.rnn(argument.view(1, -1, n).to(device), torch.zeros(n, n, dtype=dtype, device=device), backend=backend)
    assert_tanh(h.flatten().cpu(), argument)


def atanh_check(dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """With P = I, "direct" takes -atanh of the target and "difference" atanh of the state less that of the target."""
    info = torch.finfo(dtype)
    largest = 1 - info.eps
    magnitudes = torch.logspace(np.log10(info.smallest_normal), 0, 100_001, dtype=torch.float64)
    near_one = 1 - torch.logspace(np.log10(info.eps), 0, 100_001, dtype=torch.float64)
    dense = torch.linspace(0, 1, 150_001, dtype=torch.float64)
    positive = torch.cat([magnitudes, near_one, dense]).to(dtype).clamp(max=largest)
    n = 128
    argument = torch.cat([positive, -positive])
    argument = argument[: len(argument) // n * n]
    x, identity = argument.view(1, -1, n).to(device), torch.eye(n, dtype=dtype, device=device)
    zero = torch.zeros_like(x)
    arguments = identity, identity, None, None, zero
    for inverse, h, displacement in (("difference", x, x), ("difference", zero, x), ("direct", zero, x)):
        sweep = Sweep("tanh", inverse, "local", clip=info.eps)
        _, found, _ = ops.rnn_bwd(displacement, None, h, *arguments, None, *sweep, backend)
        assert_atanh(found.flatten().cpu(), argument)


def small_differences_check(nonlinearity: str, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """As γ goes to 0, "difference" becomes "layer"; to full precision, although h - λ rounds to h then."""
    case = RNNCase(T=7, B=3, N=5, nonlinearity=nonlinearity)
    u, weight, h0 = case.tensors(dtype)
    h = ops.rnn_fwd(u, weight, h0, nonlinearity, "reference")
    h = {"tanh": 0.9 * h, "relu": h + 1, "identity": h}[nonlinearity]  # 1 - h² keeps its digits; above the kink
    tensors = [tensor.to(device) for tensor in (h, weight, weight.mT.contiguous())]
    found, linear = (
        backward_op(case.gradient(dtype).to(device), None, *tensors, Sweep(nonlinearity, word, "local", 1e-20), backend)
        for word in ("difference", "layer")
    )
    assert found[1].any()
    for what, *pair in zip(("grad_u", "grad_h0"), found, linear, strict=True):
        assert_near(pair[0].cpu(), extended(pair[1].cpu()), what, condition=20)


def relu_inverse_check(dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """A target below 0 is one at 0: "difference" sends back no more than the state has."""
    h = torch.tensor([[[0.0, 2.0, 2.0, 2.0]]], dtype=dtype, device=device)
    lam = torch.tensor([[3.0, 3.0, 1.0, -1.0]], dtype=dtype, device=device)
    expected = torch.tensor([[0.0, 2.0, 1.0, -1.0]], dtype=dtype)
    identity = torch.eye(4, dtype=dtype, device=device)
    for inverse in ("difference", "direct"):
        sweep = Sweep("relu", inverse, "local")
        _, found = backward_op(None, lam, h, identity, identity, sweep, backend, h)
        assert_identical(found.cpu(), expected, inverse)


def inverse_check(
    weight: Tensor,
    reg: float,
    power: float,
    backend: str,
    layout: str = "contiguous",
    on_average: bool = False,
    device: str = "cpu",
) -> None:
    """Forward, backward and the residual of the defining equation, all within the error budget."""
    r = torch.tensor(reg, dtype=weight.dtype)
    reg = float(r)
    largest = torch.linalg.matrix_norm(weight.double(), 2).flatten().tolist()
    condition = 1 + max(largest, default=0) ** 2 / reg
    exact = regularized_inverse(extended(weight), reg, power)
    grad = matrices(weight.mT.shape, weight.dtype, seed=5)
    inverse = torch.from_numpy(exact.astype(np.float64)).to(weight.dtype)
    plain = weight, grad, inverse
    given = [LAYOUTS[layout](tensor.to(device)) for tensor in plain]
    results = []
    for (w, g, p), name in ((given, backend), (plain, "reference")):
        forward = ops.regularized_inverse_fwd(w, r, power, True, name)
        outputs = forward, *ops.regularized_inverse_bwd(g, w, p, r, power, name)
        assert all(output.is_contiguous() for output in outputs)
        results.append([output.cpu() for output in outputs])
    *exact_grads, size = regularized_inverse_gradients(extended(grad), extended(weight), reg, power)
    found, reference = results
    for what, *parts in zip(("P", "grad_weight"), found, reference, (exact, exact_grads[0]), strict=False):
        if on_average:
            assert_average_budget(*parts, what, condition)
        else:
            assert_budget(*parts, what, condition)
    if on_average:  # grad_reg is one number for the whole batch, and its error luck
        assert_near(found[2], exact_grads[1], "grad_reg", condition, size)
    else:
        assert_budget(found[2], reference[2], exact_grads[1], "grad_reg", condition, size)
    assert_residual(found[0], reference[0], weight, reg, power)
