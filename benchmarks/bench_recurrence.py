"""The recurrence of every cell: a whole training step against PyTorch's, the forward pass against the processor's peak,
and steps in numerical conditions that processors can be slow in.

The measuring code and the checks are those of the regime map: the gradients are checked on the very shape first.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels.info import peak
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.launch import forward_outputs
from tp_kernels.ops.recurrence.op import backends
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import CONTENDERS, Case, Contender, LastState, fused, in_jax

METHODS = {
    "rnn": [CONTENDERS[name] for name in ("tp", "tp-refresh8", "tp-local", "bp", "nn.RNN", "jax", "eager")],
    "gru": [
        fused("tp", "tp", "tp", tp.TargetProp(), layer="GRU"),
        fused("layer", "tp", "layer", tp.TargetProp(inverse="layer", update="local"), layer="GRU"),
        fused("jacobian", "tp", "jacobian", tp.TargetProp(inverse="jacobian"), layer="GRU"),
        fused("bp", "bp", "bp", tp.BackProp(), layer="GRU"),
        Contender("nn.GRU", "bp", "nn.GRU", tp.BackProp(), lambda M, N, _: LastState(nn.GRU(M, N))),
        in_jax("jax", "GRU"),
    ],
    "lstm": [
        fused("tp", "tp", "tp", tp.TargetProp(), layer="LSTM"),
        fused("identity", "tp", "identity", tp.TargetProp(inverse="identity"), layer="LSTM"),
        fused("bp", "bp", "bp", tp.BackProp(), layer="LSTM"),
        Contender("nn.LSTM", "bp", "nn.LSTM", tp.BackProp(), lambda M, N, _: LastState(nn.LSTM(M, N))),
    ],
}
STEPS = {
    "rnn": (Case(60, 100, 20), Case(784, 64, 16), Case(784, 100, 16), Case(784, 256, 16), Case(784, 128, 128)),
    "gru": (Case(60, 100, 20), Case(784, 64, 16), Case(784, 128, 16), Case(784, 100, 1), Case(100, 256, 64)),
    "lstm": (Case(60, 100, 20), Case(784, 64, 16), Case(784, 100, 16), Case(784, 100, 1), Case(100, 256, 64)),
}
# By the names of their groups.
FORWARD = {
    "rnn forward tanh": "rnn_tanh",
    "rnn forward identity": "rnn_identity",
    "gru forward": "gru",
    "lstm forward": "lstm",
}
SHAPES = {
    "rnn": (*(Case(784, N, 16) for N in (64, 100, 128, 256)), Case(784, 128, 64), Case(784, 100, 1)),
    "gru": STEPS["gru"],
    "lstm": STEPS["lstm"],
}
# Spectral radius of the weight, and the size of the input. At radius 1 far steps count; at 1/3 what goes back in time
# is denormal after a hundred steps; large inputs saturate every unit, and 1 - h² becomes 0.
CONDITIONS = {"plain": (1.0, 1.0), "decaying": (1 / 3, 1.0), "saturated": (1.0, 100.0)}
SMOKE = (Case(3, 5, 2),)


def _of(op: str, cases: Iterable[Case], *rest: Iterable) -> list:
    """Parameters: the op, every case, and all of the rest."""
    found = [(f"{op}-T{case.T}-N{case.N}-B{case.B}", (op, case)) for case in cases]
    for values in rest:
        found = [
            (f"{id_}-{getattr(value, 'name', value)}", (*given, value)) for id_, given in found for value in values
        ]
    return [pytest.param(*given, id=id_) for id_, given in found]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Without timing, every line still runs, on a shape that takes no time.
    smoke = metafunc.config.getoption("benchmark_disable")
    if metafunc.function is bench_step:
        names = "op, case, method"
        rows = [row for op, cases in STEPS.items() for row in _of(op, SMOKE if smoke else cases, METHODS[op])]
    elif metafunc.function is bench_forward:
        names = "op, case, group"
        rows = [
            row
            for op, cases in SHAPES.items()
            for row in _of(op, SMOKE if smoke else cases, [group for group, cell in FORWARD.items() if op in cell])
        ]
    else:
        names = "op, case, method, condition"
        methods = [CONTENDERS[name] for name in ("tp", "bp", "nn.RNN")]
        rows = _of("rnn", SMOKE if smoke else (Case(784, 128, 16),), methods, CONDITIONS)
    metafunc.parametrize(names, rows)


def skip_where_it_cannot_run(method: Contender, case: Case) -> None:
    reason = method.why_not(case, compile_max_T=0)
    if reason is not None:
        pytest.skip(reason)


def note(benchmark, case: Case, contender: str, gate: measure.Gate, **extra: object) -> None:
    """What a kept result says beside its times."""
    benchmark.extra_info |= {
        **asdict(case),
        "contender": contender,
        "gate": asdict(gate),
        "warmup": 1,
        **measure.environment(case.device),
        **extra,
    }


def bench_step(benchmark, op: str, case: Case, method: Contender) -> None:
    """A gradient arrives at the last state."""
    skip_where_it_cannot_run(method, case)
    with measure.settings(case.threads):
        cell = measure.Cell(case, layer=op.upper())
        module = cell.module(method)
        gate = cell.check(method, module)
        # Of a solve to rtol = 1e-4, as its condition is at most 100 here.
        solved = 1e-2 if getattr(method.rule, "inverse", "") == "jacobian" else 0.0
        assert gate.error <= gate.budget + solved, f"no time without a passed check: {gate}"
        step = cell.step(module)
        benchmark.group = f"{op} {case}"
        note(benchmark, case, method.label, gate, backend=cell.backend_of(method), solve_error=solved)
        steps = method.period  # alike only in groups of so many
        benchmark.pedantic(measure.synchronized(step, cell.device), rounds=20, iterations=steps, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds


def bench_forward(benchmark, op: str, case: Case, group: str) -> None:
    """The forward pass alone: 2TBN · GN operations for G gates, and TBGN activations. With the identity in the place of
    tanh the rest is left.
    """
    cell = CELLS[FORWARD[group]]
    function: Callable[..., Tensor] = getattr(tp, op)
    options = {} if cell.gates > 1 else {"nonlinearity": cell.nonlinearity}
    with measure.settings(case.threads):
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(case.T, case.B, cell.gates * case.N, generator=generator)
        weight = measure.Cell(case, layer=op.upper()).parameters[1]

        def forward(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
            return {"h": function(u.to(dtype), weight.to(dtype), backend=backend, **options)}

        gate = measure.compare(forward("cpu"), forward("reference"), forward("reference", torch.float64))
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = group
        operations = 2 * case.T * case.B * cell.gates * case.N**2
        note(benchmark, case, "forward", gate, backend="cpu", operations=operations)
        benchmark.extra_info["peak_flops"] = 0.0 if benchmark.disabled else peak(torch.float32, case.threads)
        # Into memory that is there: what a fresh output's page faults cost is another question.
        out, run = forward_outputs(cell, u, weight, keep=False), backends(op).backends["cpu"].forward
        benchmark.pedantic(lambda: run(cell, u, weight, None, None, keep=False, out=out), rounds=50, warmup_rounds=1)


def bench_conditions(benchmark, op: str, case: Case, method: Contender, condition: str) -> None:
    radius, size = CONDITIONS[condition]
    with measure.settings(case.threads):
        if not method.fused:
            torch.set_flush_denormal(False)  # as it comes
        cell = measure.Cell(case, layer=op.upper())
        cell.parameters[1] *= radius
        cell.x *= size
        module = cell.module(method)
        gate = cell.check(method, module)
        assert gate.passed, f"no time without a passed check: {gate}"
        benchmark.group = f"{op} conditions {method.label}"
        note(benchmark, case, condition, gate, backend=cell.backend_of(method))
        benchmark.pedantic(cell.step(module), rounds=20, warmup_rounds=1)
