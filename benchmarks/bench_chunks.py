"""Long sequences, few of them: a training step in chunks of time against back-propagation on the same kernels.

P and its power serve eight steps, which are timed together.
"""

import pytest
from bench_recurrence import note, skip_where_it_cannot_run

from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import CONTENDERS, Case, Contender

SHAPES = (
    (1024, 64, 1),
    (4096, 100, 1),
    (4096, 256, 1),
    (16384, 128, 1),
    (16384, 256, 1),
    (4096, 128, 4),
    (784, 128, 16),
)
METHODS = ("tp-chunks", "tp-identity-chunks", "bp-truncated", "tp-refresh8", "bp", "nn.RNN")
SMOKE = (Case(300, 5, 1),)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("benchmark_disable")
    cases = SMOKE if smoke else [Case(T, N, B, N, threads=threads) for threads in (1, 2) for T, N, B in SHAPES]
    metafunc.parametrize(
        ("case", "method"),
        [
            pytest.param(case, CONTENDERS[name], id=f"T{case.T}-N{case.N}-B{case.B}-threads{case.threads}-{name}")
            for case in cases
            for name in METHODS
        ],
    )


def bench_chunks(benchmark, case: Case, method: Contender) -> None:
    skip_where_it_cannot_run(method, case)
    with measure.settings(case.threads):
        cell = measure.Cell(case)
        module = cell.module(method)
        gate = cell.check(method, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = f"chunks {case} threads={case.threads}"
        note(benchmark, case, method.label, gate)
        benchmark.pedantic(cell.step(module), rounds=10, iterations=method.period, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
