"""One call of an op, on one back-end, held against the reference and the exact answer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import _oracle_recurrence as oracle
import numpy as np
import torch
from _cases import LAYOUTS, Case, Inputs, matrices
from _compare import (
    REFERENCE,
    assert_atanh,
    assert_average_budget,
    assert_budget,
    assert_identical,
    assert_near,
    assert_residual,
    assert_tanh,
)
from _oracle import extended, regularized_inverse, regularized_inverse_gradients
from torch import Tensor

import tp_kernels as tp
from tp_kernels.ops.recurrence import op
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.rules import Sweep

ops = torch.ops.tp_kernels

# The inverses that go through that of the activation, whose slope is large.
THROUGH_ACTIVATION = ("layer", "difference", "direct")
# Terms. A sum over all gates is one chain of 3N multiply-adds on the native back-end; torch's are summed in blocks, and
# of more terms than this by so much better that twice their error is no measure any more.
LONGEST_SUM = 512


# --- the recurrence: calls


def forward_arguments(
    cell: str,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
    every: int | None = None,
    sequence: bool = True,
    keep: bool = True,
    inverse: str = "none",
    time: tuple[Tensor | None, Tensor | None, bool] = (None, None, False),
    backend: str,
) -> tuple:
    """Of the forward op, as it takes them. With ``weight_ih``, u is the input and the bias a layer's. ``time``: the
    sizes of the batch, resets, and whether it is read in reverse.
    """
    batch_sizes, reset, reverse = time
    tensors = u, weight_ih, bias_ih, weight, bias, h0, None, None, batch_sizes, reset
    return cell, *tensors, reverse, every, sequence, keep, "auto", Sweep(inverse).words, backend


class States(NamedTuple):
    h: Tensor
    kept: Tensor


def forward_op(cell: str, *tensors: Tensor | None, **options: object) -> States:
    """The forward op, with the arguments of ``forward_arguments``."""
    h, last, ends, kept, _ = ops.recurrence_fwd(*forward_arguments(cell, *tensors, **options))
    assert_identical(last[..., : h.shape[-1]], h[-1], "the last h")
    if kept.numel():
        assert_identical(last, CELLS[cell].state(h, kept)[-1], "the last state")
    assert not ends.numel()
    return States(h, kept)


class Found(NamedTuple):
    """What the backward op gives."""

    grad_u: Tensor
    grad_weight_ih: Tensor
    grad_bias_ih: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    carried: Tensor
    through: Tensor

    @property
    def sent(self) -> dict[str, Tensor | None]:
        """To the steps before."""
        return {name: getattr(self, name) if getattr(self, name).numel() else None for name in ("carried", "through")}

    @property
    def swept(self) -> dict[str, Tensor]:
        """What comes of the sweep itself, where the rule has it: the rest are sums over time by torch."""
        named = {"grad_u": self.grad_u, "carried": self.carried, "through": self.through}
        return {what: tensor for what, tensor in named.items() if what == "grad_u" or tensor.dim() > 1}


@dataclass(frozen=True)
class Back:
    """A backward pass, and all that it is given. ``None``: it is not there."""

    cell: str
    h: Tensor
    weight: Tensor
    kept: Tensor | None = None
    grad: Tensor | None = None
    last: Tensor | None = None
    u: Tensor | None = None
    h0: Tensor | None = None
    feedback: Tensor | None = None
    carried: Tensor | None = None
    through: Tensor | None = None

    def arguments(
        self,
        sweep: Sweep,
        backend: str,
        *,
        weight_ih: Tensor | None = None,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        every: int | None = None,
        sums: bool = False,
        time: tuple[Tensor | None, Tensor | None, bool] = (None, None, False),
    ) -> tuple:
        """Of the backward op, as it takes them. ``sums``: with the gradients of W and of the cell's own bias."""
        kept = self.h.new_zeros(0) if self.kept is None else self.kept
        layer = weight_ih, bias_ih, self.weight, bias_hh
        sent = self.feedback, self.carried, self.through
        needs = True, weight_ih is not None, sums, sums and (self.cell == "gru" or weight_ih is not None)
        states = self.h0, *time, self.h, kept
        arrived = self.cell, self.grad, self.last
        return *arrived, self.u, *layer, *states, *sent, every, *needs, sweep.words, backend

    @property
    def states(self) -> Tensor:
        """All their parts."""
        return CELLS[self.cell].state(self.h, self.kept)

    def run(self, sweep: Sweep, backend: str, **options: object) -> Found:
        return Found(*ops.recurrence_bwd(*self.arguments(sweep, backend, **options)))

    def iterations(self, sweep: Sweep, backend: str) -> Tensor:
        return op.solver_iterations(
            CELLS[self.cell],
            sweep,
            grad_h=self.grad,
            grad_last=self.last,
            h=self.h,
            kept=self.h.new_zeros(0) if self.kept is None else self.kept,
            weight=self.weight,
            feedback=self.feedback,
            carried=self.carried,
            through=self.through,
            u=self.u,
            start=self.h0,
            backend=backend,
        )

    def with_(self, **changes: object) -> "Back":
        return replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor], *names: str) -> "Back":
        """With the function of those tensors that are there; of all by default."""
        names = names or tuple(field.name for field in fields(self) if field.name != "cell")
        there = {name: getattr(self, name) for name in names}
        return replace(self, **{name: function(tensor) for name, tensor in there.items() if tensor is not None})

    def of_samples(self, some: slice | Tensor) -> "Back":
        """Of a part of the batch only."""
        over_time = self.map(lambda tensor: tensor[:, some], "h", "kept", "grad", "u")
        return over_time.map(lambda tensor: tensor[some], "last", "h0", "carried", "through")

    def earlier(self, cut: int) -> "Back":
        """The steps before that one; what later ones sent is still to be put in."""
        return self.map(lambda tensor: tensor[:cut], "h", "kept", "grad", "u").with_(last=None)

    def later(self, cut: int) -> "Back":
        return self.map(lambda tensor: tensor[cut:], "h", "kept", "grad", "u").with_(h0=self.states[cut - 1])


def back_of(case: Case, dtype: torch.dtype, sweep: Sweep, seed: int = 0) -> Back:
    """On states of the reference, with some P, and gradients that arrive at all states and once more at the last."""
    inputs = case.tensors(dtype, seed)
    h, kept = forward_op(case.cell, *inputs, backend="reference")
    return Back(
        cell=case.cell,
        h=h,
        weight=inputs.weight,
        kept=kept if kept.dim() > 1 else None,
        grad=case.gradient(dtype),
        last=case.gradient_of_state(dtype),
        u=inputs.u,
        h0=inputs.h0,
        feedback=case.feedback(dtype, sweep),
    )


def layer(case: Case, inputs: Inputs, **options: object) -> Tensor:
    """The public function of the case's cell."""
    u, weight, bias, h0 = inputs
    if case.cell == "gru":
        return tp.gru(u, weight, h0, bias=bias, **options)
    if case.cell == "lstm":
        return tp.lstm(u, weight, None if h0 is None else parts_of(case.cell, h0), **options)
    return tp.rnn(u, weight, h0, nonlinearity=case.cell.removeprefix("rnn_"), **options)


def parts_of(cell: str, state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A state's first and second part, as the functions take them, or ``None``."""
    return (state, None) if state is None or CELLS[cell].states == 1 else state.chunk(2, dim=-1)


def supports(cell: str, sweep: Sweep, backend: str) -> tuple[bool, str]:
    """Whether that back-end has that rule of that cell, and the reason where it has not."""
    cell = CELLS[cell]
    return op.backends(cell.op).supports(backend, torch.empty(0), cell=cell, sweep=sweep)


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """Those that are there, by name, with gradients to come."""
    return {name: tensor.requires_grad_() for name, tensor in inputs._asdict().items() if tensor is not None}


def gradients(
    case: Case,
    rule: tp.BackProp | tp.TargetProp | None,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    **options: object,
) -> dict[str, Tensor]:
    """h and all gradients, through the public function."""
    inputs = Inputs(*(None if x is None else x.to(device) for x in case.tensors(dtype)))
    leaves = leaves_of(inputs)
    h = layer(case, inputs, rule=rule, backend=backend, **options)
    found = torch.autograd.grad(h, list(leaves.values()), case.gradient(dtype).to(device))
    named = {"h": h.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}}
    return {name: tensor.cpu() for name, tensor in named.items()}


def assert_same_numbers(found: dict[str, Tensor], expected: dict[str, Tensor], condition: float = 1.0) -> None:
    """Up to rounding, by name."""
    assert found.keys() == expected.keys()
    for what, tensor in found.items():
        assert_near(at_least_2d(tensor), extended(at_least_2d(expected[what])), what, condition)


SUMS = ("grad_weight", "grad_bias")
"""By torch, over time: their rounding depends on portions and on threads."""


def assert_same_computation(found: dict[str, Tensor], expected: dict[str, Tensor], backend: str) -> None:
    """The same bits, but in sums over time; from the reference, whose products are torch's, the same up to rounding:
    there the order of a sum may depend on where a matrix lies in memory.
    """
    assert found.keys() == expected.keys()
    for what, tensor in found.items():
        if backend == "reference" or what in SUMS:
            assert_near(at_least_2d(tensor), extended(at_least_2d(expected[what])), what)
        else:
            assert_identical(tensor, expected[what], what)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for what, tensor in found.items():
        assert_identical(tensor, expected[what], what)


def at_least_2d(tensor: Tensor) -> Tensor:
    """Errors are relative to a matrix; a vector is one of one row."""
    return tensor if tensor.dim() > 1 else tensor[None]


# --- the recurrence: checks


def grows_and_cancels(case: Case, sweep: Sweep) -> bool:
    """Whether displacements do: at the worst of many steps one side's error is several times the other's."""
    return sweep.inverse in THROUGH_ACTIVATION and case.T >= 63


def condition_of_jacobian(cell: str, weight: Tensor, sweep: Sweep) -> float:
    """Of ``J Jᵀ + rI`` at most: no slope exceeds 1, but the GRU's of z, in which a state stands, at 1/2; the LSTM's
    state stands in two.
    """
    slopes = {"gru": 4, "lstm": 8}.get(cell, 1)
    return 1 + slopes * float(torch.linalg.matrix_norm(weight.double(), 2).max()) ** 2 / sweep.reg


def condition_of(case: Case, weight: Tensor, sweep: Sweep) -> float:
    """Of one sweep back, at most."""
    if sweep.inverse == "jacobian":
        return condition_of_jacobian(case.cell, weight, sweep)
    # 1 - h² loses digits where h is near 1, and a gate's slope where that is near its ends.
    return 10.0 if case.gates > 1 or sweep.inverse in THROUGH_ACTIVATION else 1.0


def assert_sweep_budget(
    case: Case,
    sweep: Sweep,
    actual: Tensor,
    reference: Tensor,
    exact: np.ndarray,
    what: str,
    condition: float,
    reference_exact: np.ndarray | None = None,
) -> None:
    """The budget of what a sweep gives. Where displacements grow, it is on average over time; what leaves the sequence
    is one step of many there, and its error luck.
    """
    rtol = sweep.rtol if sweep.inverse == "jacobian" else 0.0
    if grows_and_cancels(case, sweep):
        assert_near(actual, exact, what, condition)
        if what == "grad_u":
            assert_average_budget(actual, reference, exact, what, condition, reference_exact)
    elif case.gates * case.N > LONGEST_SUM:
        assert_near(actual, exact, what, condition + rtol * condition / REFERENCE[actual.dtype])
    else:
        assert_budget(actual, reference, exact, what, condition, reference_exact=reference_exact, rtol=rtol)


# The same question is put to many back-ends and instruction sets; its exact answer takes longest.
_once = functools.lru_cache(maxsize=512)


@_once
def _expected_states(case: Case, dtype: torch.dtype) -> tuple[States, np.ndarray]:
    """The reference's, and the exact ones."""
    inputs = case.tensors(dtype)
    plain = forward_op(case.cell, *inputs, backend="reference")
    return plain, oracle.forward(case.cell, *map(extended, inputs))


@_once
def _expected_back(
    case: Case, dtype: torch.dtype, sweep: Sweep
) -> tuple[Back, dict[str, Tensor], dict[str, np.ndarray]]:
    """The question, the reference's answers and the exact ones."""
    back = back_of(case, dtype, sweep)
    exact = exact_back(back, case.tensors(dtype).bias, sweep)
    answers = {"grad_u": exact.grad_u, "carried": exact.displacements[0], "through": exact.through}
    return back, back.run(sweep, "reference").swept, answers


def forward_check(
    case: Case, dtype: torch.dtype, backend: str, layout: str = "contiguous", device: str = "cpu"
) -> None:
    """States, and what is kept of each step at these states."""
    inputs = case.tensors(dtype)
    placed = [None if tensor is None else LAYOUTS[layout](tensor.to(device)) for tensor in inputs]
    found, (plain, states) = forward_op(case.cell, *placed, backend=backend), _expected_states(case, dtype)
    exact = list(map(extended, inputs))
    assert_budget(found.h.cpu(), plain.h, states[..., : case.N], "h")
    assert found.h.is_contiguous()
    assert found.kept.is_contiguous()
    names = CELLS[case.cell].kept
    if names:
        answers = (
            oracle.kept(case.cell, *exact, extended(CELLS[case.cell].state(results.h, results.kept).cpu()))
            for results in (found, plain)
        )
        gates = zip(
            names,
            found.kept.cpu().unbind(-2),
            plain.kept.unbind(-2),
            *(np.moveaxis(x, -2, 0) for x in answers),
            strict=True,
        )
        for name, gate, other, answer, other_answer in gates:
            assert_budget(gate, other, answer, name, scale=1.0, reference_exact=other_answer)
    else:
        assert found.kept.numel() == 0
    without = forward_op(case.cell, *placed, keep=False, backend=backend)
    assert_identical(without.h, found.h, "h without what is kept")
    assert without.kept.shape == (0,)


def exact_back(back: Back, bias: Tensor | None, sweep: Sweep) -> oracle.Backward:
    """The oracle's answer to the same question."""
    states = extended(back.states)
    grad = np.zeros_like(states)
    if back.grad is not None:
        grad[..., : back.h.shape[-1]] = extended(back.grad)
    if back.last is not None:
        grad[-1] += extended(back.last)
    tensors = {name: extended(getattr(back, name)) for name in ("weight", "u", "h0", "feedback")}
    return oracle.backward(back.cell, sweep, grad=grad, h=states, bias=extended(bias), **tensors)


def backward_check(
    case: Case,
    rule: tp.BackProp | tp.TargetProp | Sweep,
    dtype: torch.dtype,
    backend: str,
    layout: str = "contiguous",
    device: str = "cpu",
    condition: float | None = None,
) -> None:
    """The backward op by itself, on given states and a given P: gradients in u, and all that leaves the sequence."""
    sweep = rule if isinstance(rule, Sweep) else Sweep.of(rule)
    back, plain, answers = _expected_back(case, dtype, sweep)
    found = back.map(lambda tensor: LAYOUTS[layout](tensor.to(device))).run(sweep, backend)
    condition = condition_of(case, back.weight, sweep) if condition is None else condition
    assert (found.carried.dim() > 1) == (sweep.inverse != "none")
    assert (found.through.dim() > 1) == (sweep.update == "total")
    for what, tensor in found.swept.items():
        assert tensor.is_contiguous()
        assert_sweep_budget(case, sweep, tensor.cpu(), plain[what], answers[what], what, condition)


def capture_check(case: Case, backend: str) -> None:
    """On a GPU: a training step, captured once, gives the gradients of other numbers when it is replayed on them. It
    computes P too, of the weight as it then is."""
    inputs = Inputs(*(None if tensor is None else tensor.cuda() for tensor in case.tensors(torch.float32)))
    leaves, grad = leaves_of(inputs), case.gradient(torch.float32).cuda()

    def step() -> tuple[Tensor, ...]:
        h = layer(case, inputs, backend=backend)
        return h.detach(), *torch.autograd.grad(h, list(leaves.values()), grad)

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
        inputs.u.mul_(-0.5)
        inputs.weight.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    for what, *pair in zip(("h", *leaves), captured, step(), strict=True):
        assert_near(pair[0].cpu(), extended(pair[1].cpu()), what, condition=10)


def stream_check(case: Case, backend: str) -> None:
    """On a GPU: it computes on the current stream, behind what comes before it there, and nowhere else."""
    inputs = Inputs(*(None if tensor is None else tensor.cuda() for tensor in case.tensors(torch.float32)))
    expected = layer(case, inputs, backend=backend)
    late = torch.full_like(inputs.u, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.copy_(inputs.u)
        found = layer(case, inputs._replace(u=late), backend=backend)
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
    for inverse, h in (("difference", x), ("difference", zero), ("direct", zero)):
        back = Back("rnn_tanh", h, identity, grad=x, u=zero, feedback=identity)
        found = back.run(Sweep(inverse, "local", clip=info.eps), backend)
        assert_atanh(found.carried.flatten().cpu(), argument)


def small_differences_check(cell: str, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """As γ goes to 0, "difference" becomes "layer"; to full precision, although h - λ rounds to h then."""
    sweep = Sweep("difference", "local", step=1e-20)
    back = back_of(Case(T=7, B=3, N=5, cell=cell), dtype, sweep).with_(last=None)
    h = {"rnn_tanh": 0.9 * back.h, "rnn_relu": back.h + 1, "rnn_identity": back.h}[cell]
    back = back.with_(h=h).map(lambda tensor: tensor.to(device))  # 1 - h² keeps its digits; above the kink
    found, linear = (back.run(sweep._replace(inverse=word), backend) for word in ("difference", "layer"))
    assert found.carried.any()
    for what, tensor in found.swept.items():
        assert_near(tensor.cpu(), extended(linear.swept[what].cpu()), what, condition=20)


def relu_inverse_check(dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """A target below 0 is one at 0: "difference" sends back no more than the state has."""
    h = torch.tensor([[[0.0, 2.0, 2.0, 2.0]]], dtype=dtype, device=device)
    lam = torch.tensor([[3.0, 3.0, 1.0, -1.0]], dtype=dtype, device=device)
    expected = torch.tensor([[0.0, 2.0, 1.0, -1.0]], dtype=dtype)
    identity = torch.eye(4, dtype=dtype, device=device)
    for inverse in ("difference", "direct"):
        back = Back("rnn_relu", h, identity, last=lam, u=h, feedback=identity)
        assert_identical(back.run(Sweep(inverse, "local"), backend).carried.cpu(), expected, inverse)


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
