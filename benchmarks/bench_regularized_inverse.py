"""The batched regularized inverse against the reference and every way to it that PyTorch has.

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
SHAPES = (
    *((4096, 4, 4), (1024, 8, 8), (1024, 16, 16), (256, 32, 32), (64, 64, 64), (16, 128, 128)),
    *((1, n, n) for n in (64, 100, 128, 256, 512, 1024)),
)
SMOKE = ((2, 4, 4),)


def _gram(weight: Tensor) -> Tensor:
    return weight.mT @ weight + REG * torch.eye(weight.shape[-1], dtype=weight.dtype)


def _solve(weight: Tensor) -> Tensor:
    return torch.linalg.solve(_gram(weight), weight.mT)


def _cholesky_solve(weight: Tensor) -> Tensor:
    return torch.cholesky_solve(weight.mT, torch.linalg.cholesky(_gram(weight)))


def _pinv(weight: Tensor) -> Tensor:
    """The pseudo-inverse of [W; √r I] is [P, …]."""
    n = weight.shape[-1]
    below = REG**0.5 * torch.eye(n, dtype=weight.dtype).expand(*weight.shape[:-2], n, n)
    return torch.linalg.pinv(torch.cat([weight, below], dim=-2))[..., : weight.shape[-2]]


def _eigh(weight: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_gram(weight))
    return vectors @ (values.rsqrt()[..., None] * vectors.mT) @ weight.mT


def _svd(weight: Tensor) -> Tensor:
    left, gains, right = torch.linalg.svd(weight, full_matrices=False)
    return right.mT @ ((gains / (gains**2 + REG).sqrt())[..., None] * left.mT)


# What one writes without this library, by power; autograd goes through it.
PLAIN = {
    1.0: {"torch solve": _solve, "torch cholesky_solve": _cholesky_solve, "torch pinv": _pinv},
    0.5: {"torch svd": _svd, "torch eigh": _eigh},
}


def _contenders(power: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "tp_kernels": lambda weight: tp.regularized_inverse(weight, REG, power=power),
        "reference": lambda weight: tp.regularized_inverse(weight, REG, power=power, backend="reference"),
        **PLAIN[power],
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = SMOKE if metafunc.config.getoption("benchmark_disable") else SHAPES
    metafunc.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))
    contenders = [(power, name) for power in PLAIN for name in _contenders(power)]
    ids = [f"power={power:g}-{name.replace(' ', '-')}" for power, name in contenders]
    metafunc.parametrize(("power", "name"), contenders, ids=ids)
    metafunc.parametrize("what", ("forward", "step"))


def _outputs(compute: Callable[[Tensor], Tensor], weight: Tensor, grad: Tensor) -> dict:
    weight = weight.clone().requires_grad_()
    inverse = compute(weight)
    inverse.backward(grad)
    return {"inverse": inverse.detach(), "grad_weight": weight.grad}


def bench_regularized_inverse(benchmark, shape: tuple[int, ...], power: float, name: str, what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    grad = torch.randn(shape, generator=generator).mT
    contenders = _contenders(power)
    compute = contenders[name]
    with measure.settings(1):
        same = _outputs(contenders["reference"], weight, grad)
        exact = _outputs(contenders["reference"], weight.double(), grad.double())
        gate = measure.compare(_outputs(compute, weight, grad), same, exact)
        if name.startswith("torch") and not gate.passed:  # a finding, not our bug
            pytest.skip(f"plain PyTorch fails its check here and gets no time: {gate}")
        assert gate.passed, f"no time without a passed check: {gate}"
        leaf = weight.clone().requires_grad_()

        def step() -> None:
            leaf.grad = None
            compute(leaf).backward(grad)

        chosen = BACKENDS.resolve("reference" if name == "reference" else "auto", weight)
        backend = next(word for word, candidate in BACKENDS.backends.items() if candidate is chosen)
        benchmark.group = f"regularized_inverse {'x'.join(map(str, shape))} power={power:g} {what}"
        benchmark.extra_info |= {
            "shape": list(shape),
            "power": power,
            "dtype": "float32",
            "threads": 1,
            "contender": name,
            "backend": "torch" if name.startswith("torch") else backend,
            "gate": asdict(gate),
            "warmup": 1,
            **measure.environment("cpu"),
        }
        rounds = 7 if shape[-1] > 256 else 25
        benchmark.pedantic(step if what == "step" else lambda: compute(weight), rounds=rounds, warmup_rounds=1)
        benchmark.extra_info["rounds"] = 0 if benchmark.disabled else benchmark.stats.stats.rounds
