"""The backward sweep of ``inverse="jacobian"``, r = 1/4, total update: what a regularized solve for every sample and
step costs over back-propagation on the same kernels, and by conjugate gradients over factoring.

"bp": the sweep of back-propagation. "cg": the "cpu" back-end. "cholesky": the reference. "solve": a loop over time with
batched ``torch.linalg.solve``. Each is checked against the float64 reference first. A gradient arrives at every state:
from the last one alone, displacements would decay to nothing within some hundred steps, and take no iteration there.
How many iterations "cg" takes depends on the weight: that of ``torch.nn.RNN``'s start, an orthogonal one, or a random
one of spectral radius 1.
"""

from dataclasses import asdict

import pytest
import torch
from _sweep import CELL, sources, sweep_back
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.ops.recurrence.op import solver_iterations
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case
from tp_kernels.rules import Sweep

CASES = (Case(60, 100, 20), Case(784, 64, 16))
SMOKE = (Case(5, 3, 2),)
JACOBIAN, BP = Sweep.of(tp.TargetProp(inverse="jacobian")), Sweep.of(tp.BackProp())


def weight_of(kind: str, n: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = nn.RNN(1, n).weight_hh_l0.detach()
    if kind == "orthogonal":
        weight = torch.linalg.qr(weight).Q.contiguous()
    elif kind == "radius-1":
        weight = weight / torch.linalg.eigvals(weight.double()).abs().max().float()
    return weight


def sweep(grad: Tensor, h: Tensor, weight: Tensor, rule: Sweep, backend: str) -> Tensor:
    return sweep_back(rule, h, weight, backend, grad_h=grad)


def solve(grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    grad_u, slopes = torch.empty_like(h), 1 - h.square()
    carried = through = torch.zeros_like(h[0])
    regularization = JACOBIAN.reg * torch.eye(weight.shape[0], dtype=h.dtype)
    for t in range(h.shape[0] - 1, -1, -1):
        displacement = carried + grad[t]
        grad_u[t] = slopes[t] * (displacement + through)
        through = grad_u[t] @ weight
        jacobian = slopes[t, :, :, None] * weight
        right = jacobian.mT @ displacement[..., None]
        carried = torch.linalg.solve(jacobian.mT @ jacobian + regularization, right)[..., 0]
    return grad_u


WAYS = {
    "bp": lambda *inputs: sweep(*inputs, BP, "auto"),
    "cg": lambda *inputs: sweep(*inputs, JACOBIAN, "auto"),
    "cholesky": lambda *inputs: sweep(*inputs, JACOBIAN, "reference"),
    "solve": solve,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    metafunc.parametrize("kind", ["default", "orthogonal", "radius-1"])
    metafunc.parametrize("way", WAYS)


def bench_jacobian(benchmark, case: Case, kind: str, way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = weight_of(kind, case.N)
    u = torch.randn(case.T, case.B, case.N, generator=generator)
    grad = torch.randn(case.T, case.B, case.N, generator=generator)
    rule = BP if way == "bp" else JACOBIAN
    with measure.settings(case.threads):
        inputs = grad, tp.rnn(u, weight), weight
        exact, same = (
            {"grad_u": sweep(*(tensor.to(dtype) for tensor in inputs), rule, "reference").double()}
            for dtype in (torch.float64, torch.float32)
        )
        gate = measure.compare({"grad_u": WAYS[way](*inputs)}, same, exact)
        condition = 1 + float(torch.linalg.matrix_norm(weight, 2)) ** 2 / rule.reg
        solved = rule.rtol * condition if way == "cg" else 0.0  # what an iterative solve may err by
        assert gate.error <= gate.budget + solved, f"no time without a passed check: {gate}"
        benchmark.group = f"jacobian {case} {kind}"
        benchmark.extra_info |= {
            **asdict(case),
            "weight": kind,
            "contender": way,
            "gate": asdict(gate),
            "solve_error": solved,
            "warmup": 1,
            **measure.environment(case.device),
        }
        if way == "cg":
            given = sources(*inputs[1:], grad_h=grad)
            counts = solver_iterations(CELL, rule, backend="auto", **given)
            benchmark.extra_info["iterations"] = {"mean": float(counts.float().mean()), "max": int(counts.max())}
        benchmark.pedantic(WAYS[way], args=inputs, rounds=30 if way in ("bp", "cg") else 3, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
