"""The batched regularized inverse, forward and backward, against the reference and plain PyTorch under autograd.

Result and gradient are checked against the float64 reference on the very matrices first.
"""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import tp_kernels as tp
from tp_kernels.ops.regularized_inverse.op import BACKENDS
from tp_kernels.regimes import measure

REG = 0.25
SHAPES = ((1, 64, 64), (1, 100, 100), (1, 256, 256), (1, 512, 512), (64, 32, 32), (64, 64, 64), (16, 128, 128))
SMOKE = ((2, 4, 4),)


def _plain(weight: Tensor, power: float) -> Tensor:
    """What one writes without this library; autograd goes through the solve."""
    gram = weight.mT @ weight + REG * torch.eye(weight.shape[-1], dtype=weight.dtype)
    if power == 1.0:
        return torch.linalg.solve(gram, weight.mT)
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ (values.rsqrt()[..., None] * vectors.mT) @ weight.mT


CONTENDERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "tp_kernels": lambda weight, power: tp.regularized_inverse(weight, REG, power=power),
    "reference": lambda weight, power: tp.regularized_inverse(weight, REG, power=power, backend="reference"),
    "torch": _plain,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SMOKE if metafunc.config.getoption("benchmark_disable") else SHAPES
    metafunc.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))
    metafunc.parametrize("power", (1.0, 0.5), ids=lambda power: f"power={power:g}")
    metafunc.parametrize("name", CONTENDERS)


def _outputs(compute: Callable[[Tensor, float], Tensor], weight: Tensor, grad: Tensor, power: float) -> dict:
    weight = weight.clone().requires_grad_()
    inverse = compute(weight, power)
    inverse.backward(grad)
    return {"inverse": inverse.detach(), "grad_weight": weight.grad}


def bench_regularized_inverse(benchmark, shape: tuple[int, ...], power: float, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    grad = torch.randn(shape, generator=generator).mT
    with measure.settings(1):
        same = _outputs(CONTENDERS["reference"], weight, grad, power)
        exact = _outputs(CONTENDERS["reference"], weight.double(), grad.double(), power)
        gate = measure.compare(_outputs(CONTENDERS[name], weight, grad, power), same, exact)
        if name == "torch" and not gate.passed:  # a Gram matrix squares the condition number: a finding, not our bug
            pytest.skip(f"plain PyTorch fails its check here and gets no time: {gate}")
        assert gate.passed, f"no time without a passed check: {gate}"
        leaf = weight.clone().requires_grad_()

        def step() -> None:
            leaf.grad = None
            CONTENDERS[name](leaf, power).backward(grad)

        chosen = BACKENDS.resolve("reference" if name == "reference" else "auto", weight)
        backend = next(word for word, candidate in BACKENDS.backends.items() if candidate is chosen)
        benchmark.group = f"regularized_inverse {'x'.join(map(str, shape))} power={power:g}"
        benchmark.extra_info |= {
            "shape": list(shape),
            "power": power,
            "dtype": "float32",
            "threads": 1,
            "contender": name,
            "backend": "torch" if name == "torch" else backend,
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment("cpu"),
        }
        benchmark.pedantic(step, rounds=20, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
