"""Two ways to the displacements ``λ_{t-1} = P λ_t`` of the total update, from one source at the last step.

"sweep": one pass back over time computes displacements and adjoints together, as the library does. "doubling": all
displacements first, by about log₂T large products with P, P², P⁴, …; then a sweep over the adjoints alone. Both are
checked against the float64 reference.
"""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import tp_kernels as tp
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case
from tp_kernels.rules import Sweep

CASES = (Case(60, 100, 20), Case(784, 100, 1), Case(784, 64, 16), Case(784, 100, 16), Case(784, 256, 16))
SMOKE = (Case(5, 3, 2),)
_rnn_bwd = torch.ops.tp_kernels.rnn_bwd


def sweep(last: Tensor, h: Tensor, weight: Tensor, feedback: Tensor, backend: str = "auto") -> Tensor:
    return _rnn_bwd(None, last, h, weight, feedback, None, None, None, None, *Sweep("tanh", "weight"), backend)[0]


def doubling(last: Tensor, h: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
    T, B, N = h.shape
    displacements, power, known = h.new_empty(T, B, N), feedback.mT, 1
    displacements[-1] = last
    while known < T:
        more = min(known, T - known)
        source = displacements[T - more :].view(more * B, N)
        torch.mm(source, power, out=displacements[T - known - more : T - known].view(more * B, N))
        known += more
        power = power @ power
    return _rnn_bwd(displacements, None, h, weight, None, None, None, None, None, *Sweep("tanh"), "auto")[0]


WAYS = {"sweep": sweep, "doubling": doubling}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    metafunc.parametrize("way", WAYS)


def bench_displacements(benchmark, case: Case, way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.N, case.N, generator=generator) / case.N**0.5
    h = torch.randn(case.T, case.B, case.N, generator=generator).tanh()
    last = torch.randn(case.B, case.N, generator=generator)
    with measure.settings(case.threads):
        inputs = last, h, weight, tp.regularized_inverse(weight, 1e-4, power=0.5)
        exact, same = (
            {"grad_u": sweep(*(tensor.to(dtype) for tensor in inputs), "reference").double()}
            for dtype in (torch.float64, torch.float32)
        )
        gate = measure.compare({"grad_u": WAYS[way](*inputs)}, same, exact)
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = f"displacements {case}"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": way,
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment(case.device),
        }
        benchmark.pedantic(WAYS[way], args=inputs, rounds=30, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
