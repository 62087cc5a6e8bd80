"""The price of a call: steps and forward passes of next to no work, of one time step, and of short sequences, where
Python is most of the time. A drop-in should cost no more than what it replaces.
"""

import pytest
import torch
from bench_recurrence import METHODS, note, skip_where_it_cannot_run

from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case, Contender

CASES = (Case(1, 2, 1), Case(1, 128, 8), Case(60, 100, 20))
SMOKE = (Case(1, 2, 1),)
NAMES = {"rnn": ("tp", "tp-refresh8", "bp", "nn.RNN", "jax"), "gru": ("tp", "bp", "nn.GRU", "jax")}
REPEATS = 24  # calls a round: one is too short for the clock; refresh=8 is alike in groups of eight


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize(
        ("op", "case", "method"),
        [
            pytest.param(op, case, method, id=f"{op}-T{case.T}-N{case.N}-B{case.B}-{method.name}")
            for op, names in NAMES.items()
            for case in cases
            for method in METHODS[op]
            if method.name in names
        ],
    )
    metafunc.parametrize("what", ("step", "forward"))


def bench_call(benchmark, op: str, case: Case, method: Contender, what: str) -> None:
    skip_where_it_cannot_run(method, case)
    if method.library != "torch" and what == "forward":
        pytest.skip("within torch its arrays are copied: only its own step is a time")
    with measure.settings(case.threads):
        cell = measure.Cell(case, layer=op.upper())
        module = cell.module(method)
        gate = cell.check(method, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        step = cell.step(module)

        @torch.no_grad()
        def forward() -> None:
            module(cell.x)

        benchmark.group = f"{op} {what} {case}"
        note(benchmark, case, method.label, gate)
        run = step if what == "step" else forward
        benchmark.pedantic(run, rounds=50, iterations=REPEATS, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
