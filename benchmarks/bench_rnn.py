"""One training step of a recurrent layer: target propagation, back-propagation on the same kernels, and PyTorch's.

The cells, contenders and checks are those of the regime map: the gradients are checked on the very shape first.
"""

from dataclasses import asdict

import pytest

from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import CONTENDERS, Case

CASES = (Case(60, 100, 20), Case(784, 64, 16), Case(784, 100, 16), Case(784, 256, 16), Case(784, 128, 128))
SMOKE = (Case(3, 5, 2),)
NAMES = ("tp", "tp-local", "bp", "nn.RNN", "eager")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Without timing, every line still runs, on a shape that takes no time.
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    metafunc.parametrize("name", NAMES)


def bench_rnn(benchmark, case: Case, name: str) -> None:
    contender = CONTENDERS[name]
    with measure.settings(case.threads):
        cell = measure.Cell(case)
        module = cell.module(contender)
        gate = cell.check(contender, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        step = cell.step(module)
        benchmark.group = f"rnn {case}"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": contender.label,
            "backend": cell.backend_of(contender),
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment(case.device),
        }
        benchmark.pedantic(measure.synchronized(step, cell.device), rounds=20, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
