"""Where the time of a training step goes: ``python benchmarks/profile_step.py --T 60 --N 100 --B 20``.

Median microseconds of the native calls in one step of the default rule, of the weight gradients' products, and of what
is left: Python, autograd, allocation, the gradient of the bias. Beside each, what its operations would take
at the measured ceiling.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import torch

from tp_kernels import _native
from tp_kernels.info import peak
from tp_kernels.ops.recurrence import op
from tp_kernels.regimes import measure
from tp_kernels.regimes.cases import CONTENDERS, Case

NATIVE = {
    "recurrence_fwd": "forward, projection included",
    "recurrence_bwd": "displacements and adjoints",
    "regularized_polar": "P",
    "regularized_solve": "P",
}
PRODUCT = "weight gradients, products of torch"


def _timed(function: Callable, name: str, seconds: dict[str, float]) -> Callable:
    def timed(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return timed


class _Timed:
    """The native module, its launchers timed."""

    def __init__(self, module: object, seconds: dict[str, float]) -> None:
        self._module, self._seconds = module, seconds

    def __getattr__(self, name: str) -> object:
        function = getattr(self._module, name)
        return _timed(function, NATIVE[name], self._seconds) if name in NATIVE else function


def profile(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of each part, and of the "whole"."""
    module = _native.cpu
    samples: dict[str, list[float]] = defaultdict(list)
    with measure.settings(case.threads):
        cell = measure.Cell(case)
        step = cell.step(cell.module(CONTENDERS["tp"]))
        other = cell.step(cell.module(CONTENDERS["nn.RNN"]))  # leaves the caches as another model would
        for _ in range(rounds):
            other()
            start = time.perf_counter()
            step()
            samples["whole"].append(time.perf_counter() - start)
            seconds: dict[str, float] = defaultdict(float)
            other()
            with (
                mock.patch.object(_native, "cpu", _Timed(module, seconds)),
                # Those with the states and with the input; of each portion of a long sequence.
                mock.patch.object(op, "_accumulate", _timed(op._accumulate, PRODUCT, seconds)),
            ):
                step()
            for name, value in seconds.items():
                samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    for name, value in (("T", 60), ("N", 100), ("B", 20), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    case = Case(args.T, args.N, args.B)
    parts = profile(case, args.rounds)
    ceiling = peak(torch.float32)
    product = 2 * case.T * case.B * case.N**2
    operations = {NATIVE["recurrence_fwd"]: product, NATIVE["recurrence_bwd"]: 2 * product, PRODUCT: product}
    whole = parts.pop("whole")
    parts["the rest"] = whole - sum(parts.values())
    print(f"{case}, one thread, {ceiling / 1e9:.0f} GFLOP/s at most\n")
    print("| | µs | share | at the ceiling |\n|---|---:|---:|---:|")
    for name, seconds in (*parts.items(), ("a whole step", whole)):
        floor = f"{1e6 * operations[name] / ceiling:.0f}" if name in operations else ""
        print(f"| {name} | {1e6 * seconds:.0f} | {seconds / whole:.0%} | {floor} |")


if __name__ == "__main__":
    main()
