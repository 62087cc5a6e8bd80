"""The gated recurrent unit: a whole training step against ``torch.nn.GRU``'s, and the forward pass against the ceiling.

A gradient arrives at the last state. Gradients are checked on the very shape first, against the float64 reference.
"""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.info import peak
from tp_kernels.ops.rnn.feedback import forget_feedback
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import Case

CASES = (Case(60, 100, 20), Case(784, 64, 16), Case(784, 128, 16), Case(784, 100, 1), Case(100, 256, 64))
SMOKE = (Case(3, 5, 2),)
RULES = {
    "tp": tp.TargetProp(),
    "layer": tp.TargetProp(inverse="layer", update="local"),
    "jacobian": tp.TargetProp(inverse="jacobian"),
    "bp": tp.BackProp(),
    "nn.GRU": None,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("benchmark_disable") else CASES
    metafunc.parametrize("case", cases, ids=lambda case: f"T{case.T}-N{case.N}-B{case.B}")
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", RULES)


def layer_of(case: Case, way: str, dtype: torch.dtype, backend: str = "auto") -> nn.Module:
    """The same weights for every way, of ``torch.nn.GRU``'s start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if way == "nn.GRU":
            return nn.GRU(case.M, case.N).to(dtype)
        return tp.nn.GRU(case.M, case.N, rule=RULES[way], backend=backend).to(dtype)


def step_of(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], dict[str, Tensor]]:
    parameters = dict(layer.named_parameters())

    def step() -> dict[str, Tensor]:
        forget_feedback()  # the weight of a training step is new
        last = layer(x)[1][0]
        return dict(zip(parameters, torch.autograd.grad(last, list(parameters.values()), grad), strict=True))

    return step


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(case.T, case.B, case.M, generator=generator), torch.randn(case.B, case.N, generator=generator)


def bench_gru(benchmark, case: Case, way: str) -> None:
    rule = "bp" if way == "nn.GRU" else way
    x, grad = inputs(case)
    with measure.settings(case.threads):
        step = step_of(layer_of(case, way, torch.float32), x, grad)
        exact, same = (
            {
                name: value.double()
                for name, value in step_of(
                    layer_of(case, rule, dtype, "reference"), x.to(dtype), grad.to(dtype)
                )().items()
            }
            for dtype in (torch.float64, torch.float32)
        )
        gate = measure.compare(step(), same, exact)
        solved = 1e-2 if way == "jacobian" else 0.0  # of a solve to rtol = 1e-4, as its condition is at most 100 here
        assert gate.error <= gate.budget + solved, f"no time without a passed check: {gate}"
        benchmark.group = f"gru {case}"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": way,
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment(case.device),
        }
        benchmark.pedantic(step, rounds=20, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds


def bench_gru_forward(benchmark, case: Case) -> None:
    """The op by itself: its products are ``2 T B N 3N`` operations."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(case.T, case.B, 3 * case.N, generator=generator)
    weight = layer_of(case, "bp", torch.float32).weight_hh_l0.detach()
    with measure.settings(case.threads):
        same, exact = (
            {"h": tp.gru(u.to(dtype), weight.to(dtype), backend="reference").double()}
            for dtype in (torch.float32, torch.float64)
        )
        gate = measure.compare({"h": tp.gru(u, weight)}, same, exact)
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = "gru forward"
        benchmark.extra_info |= {
            **asdict(case),
            "contender": "forward",
            "operations": 2 * case.T * case.B * 3 * case.N**2,
            "peak_flops": 0.0 if benchmark.disabled else peak(torch.float32),
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment(case.device),
        }
        benchmark.pedantic(tp.gru, args=(u, weight), rounds=20, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
