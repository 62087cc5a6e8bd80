"""Sequences of several lengths: a training step with ``lengths=``, uniform in 1 … T, against one of full sequences."""

from dataclasses import asdict

import pytest
import torch

import tp_kernels as tp
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case

LAYERS = ("RNN", "GRU", "LSTM")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("benchmark_disable")
    cases = [Case(7, 5, 3, 5)] if smoke else [Case(784, 100, 32, 100)]
    rows = [
        pytest.param(layer, case, id=f"{layer}-T{case.T}-N{case.N}-B{case.B}") for layer in LAYERS for case in cases
    ]
    metafunc.parametrize(("layer", "case"), rows)
    metafunc.parametrize("what", ("full", "lengths"))


def bench_lengths(benchmark, layer: str, case: Case, what: str) -> None:
    with measure.settings(case.threads):
        torch.manual_seed(0)
        module = getattr(tp.nn, layer)(case.M, case.N, rule=tp.TargetProp())
        x = torch.randn(case.T, case.B, case.M)
        lengths = torch.randint(1, case.T + 1, (case.B,)) if what == "lengths" else None

        def step() -> None:
            module.zero_grad()
            output, _ = module(x, lengths=lengths)
            output.sum().backward()

        benchmark.group = f"{layer} {case}"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": what,
            "warmup": 1,
            **measure.environment(case.device),
        }
        if lengths is not None:
            benchmark.extra_info["mean_length"] = float(lengths.double().mean())
        benchmark.pedantic(step, rounds=15, warmup_rounds=1)
