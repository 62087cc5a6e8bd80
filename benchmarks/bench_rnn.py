"""The recurrent layer: a whole training step against PyTorch's, the forward pass against the processor's ceiling, and
steps in numerical conditions that processors can be slow in.

The cells, contenders and checks are those of the regime map: the gradients are checked on the very shape first.
"""

from dataclasses import asdict

import pytest
import torch

import tp_kernels as tp
from tp_kernels.info import peak
from tp_kernels.ops.rnn.backends import BACKENDS
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import CONTENDERS, Case

CASES = (Case(60, 100, 20), Case(784, 64, 16), Case(784, 100, 16), Case(784, 256, 16), Case(784, 128, 128))
FORWARD = (*(Case(784, N, 16) for N in (64, 100, 128, 256)), Case(784, 128, 64), Case(784, 100, 1))
SMOKE = (Case(3, 5, 2),)
NAMES = ("tp", "tp-refresh8", "tp-local", "bp", "nn.RNN", "eager")
# Spectral radius of the weight, and the size of the input. At radius 1 far steps count; at 1/3 what goes back in time
# is denormal after a hundred steps; large inputs saturate every unit, and 1 - h² becomes 0.
CONDITIONS = {"plain": (1.0, 1.0), "decaying": (1 / 3, 1.0), "saturated": (1.0, 100.0)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Without timing, every line still runs, on a shape that takes no time.
    smoke = metafunc.config.getoption("benchmark_disable")
    by_function = {"bench_rnn": CASES, "bench_rnn_forward": FORWARD, "bench_rnn_conditions": (Case(784, 128, 16),)}
    cases = SMOKE if smoke else by_function[metafunc.function.__name__]
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES if metafunc.function is bench_rnn else ("tp", "bp", "nn.RNN"))
    if "condition" in metafunc.fixturenames:
        metafunc.parametrize("condition", CONDITIONS)


def _note(benchmark, case: Case, contender: str, gate: measure.Gate, **extra: object) -> None:
    benchmark.extra_info |= {
        **asdict(case),
        "contender": contender,
        "gate": asdict(gate),
        "warmup": 1,
        **measure.environment(case.device),
        **extra,
    }


def bench_rnn(benchmark, case: Case, name: str) -> None:
    contender = CONTENDERS[name]
    with measure.settings(case.threads):
        cell = measure.Cell(case)
        module = cell.module(contender)
        gate = cell.check(contender, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        step = cell.step(module)
        benchmark.group = f"rnn {case}"
        _note(benchmark, case, contender.label, gate, backend=cell.backend_of(contender))
        steps = contender.period  # alike only in groups of so many
        benchmark.pedantic(measure.synchronized(step, cell.device), rounds=20, iterations=steps, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
def bench_rnn_forward(benchmark, case: Case, nonlinearity: str) -> None:
    """The forward pass alone: 2TBN² operations and TBN times tanh. With the identity in its place the rest is left."""
    with measure.settings(case.threads):
        cell = measure.Cell(case)
        generator = torch.Generator().manual_seed(0)
        u, weight = torch.randn(case.T, case.B, case.N, generator=generator), cell.parameters[1]

        def forward(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
            return {"h": tp.rnn(u.to(dtype), weight.to(dtype), nonlinearity=nonlinearity, backend=backend)}

        gate = measure.compare(forward("cpu"), forward("reference"), forward("reference", torch.float64))
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = f"rnn forward {nonlinearity}"
        _note(benchmark, case, "BP, same kernels", gate, backend="cpu", operations=2 * case.T * case.B * case.N**2)
        benchmark.extra_info["peak_flops"] = peak(cell.dtype, case.threads)
        # Into memory that is there: what a fresh output's page faults cost is another question.
        h = torch.empty_like(u)
        run = BACKENDS.backends["cpu"].forward
        benchmark.pedantic(lambda: run(u, weight, None, nonlinearity, out=h), rounds=50, warmup_rounds=1)


def bench_rnn_conditions(benchmark, case: Case, name: str, condition: str) -> None:
    radius, size = CONDITIONS[condition]
    contender = CONTENDERS[name]
    with measure.settings(case.threads):
        if name == "nn.RNN":
            torch.set_flush_denormal(False)  # as it comes
        cell = measure.Cell(case)
        cell.parameters[1] *= radius
        cell.x *= size
        module = cell.module(contender)
        gate = cell.check(contender, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = f"rnn conditions {contender.label}"
        _note(benchmark, case, condition, gate, backend=cell.backend_of(contender))
        benchmark.pedantic(cell.step(module), rounds=20, warmup_rounds=1)
