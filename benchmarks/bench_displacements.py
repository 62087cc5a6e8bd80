"""Two ways to the displacements ``λ_{t-1} = P λ_t``, from one source at the last step, within a whole backward sweep.

"sweep": one pass back over time computes displacements and adjoints together, T steps one after another. "parallel":
all displacements first, about log₂T large products with P, P², P⁴, … one after another, then the adjoints (total) or
nothing more (local). Both are checked against the float64 reference.
"""

from dataclasses import asdict

import pytest
import torch
from _sweep import sweep_back
from torch import Tensor

import tp_kernels as tp
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case
from tp_kernels.rules import Sweep

CASES = (
    *(Case(T, 256, 1) for T in (64, 256, 1024, 4096, 16384)),
    *(Case(T, 512, 1) for T in (784, 4096)),
    *(Case(60, 100, 20), Case(784, 100, 1), Case(4096, 100, 1), Case(784, 64, 16), Case(784, 256, 16)),
)
SMOKE = (Case(5, 3, 2),)


def sweep(
    last: Tensor, h: Tensor, weight: Tensor, feedback: Tensor, update: str, backend: str = "auto"
) -> dict[str, Tensor]:
    rule = Sweep("weight", update)
    return {"grad_u": sweep_back(rule, h, weight, backend, grad_last=last, feedback=feedback)}


def parallel(last: Tensor, h: Tensor, weight: Tensor, feedback: Tensor, update: str) -> dict[str, Tensor]:
    displacements, _ = torch.ops.tp_kernels.recurrence_displacements(None, last, h, feedback, 1.0)
    return {"grad_u": sweep_back(Sweep("none", update), h, weight, grad_h=displacements)}


WAYS = {"sweep": sweep, "parallel": parallel}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    metafunc.parametrize("update", ("local", "total"))
    metafunc.parametrize("way", WAYS)


def bench_displacements(benchmark, case: Case, update: str, way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.init.orthogonal_(torch.empty(case.N, case.N), generator=generator)
    h = torch.randn(case.T, case.B, case.N, generator=generator).tanh()
    last = torch.randn(case.B, case.N, generator=generator)
    with measure.settings(case.threads):
        inputs = last, h, weight, tp.regularized_inverse(weight, 1e-4, power=0.5)
        exact, same = (
            {k: v.double() for k, v in sweep(*(tensor.to(dtype) for tensor in inputs), update, "reference").items()}
            for dtype in (torch.float64, torch.float32)
        )
        gate = measure.compare(WAYS[way](*inputs, update), same, exact)
        assert gate.passed, f"no time without a passed check: {gate}"
        depth = case.T if way == "sweep" or update == "total" else (case.T - 1).bit_length() + 1
        benchmark.group = f"displacements {update} {case}, depth {case.T} and {(case.T - 1).bit_length() + 1}"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": way,
            "sequential_depth": depth,
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment(case.device),
        }
        benchmark.pedantic(WAYS[way], args=(*inputs, update), rounds=15, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
