"""How a number is made: the check of a cell's gradients first, then interleaved timing and peak memory.

A step is a forward pass over [T, B, M] and a backward pass from a given gradient of the last state, as in sequence
classification: all weight gradients and the regularized inverse included, no optimizer, no gradient of the input.
"""

import contextlib
import gc
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tp_kernels
from tp_kernels import _native
from tp_kernels.info import peak
from tp_kernels.ops.recurrence.feedback import forget_feedback
from tp_kernels.ops.recurrence.op import backends
from tp_kernels.regimes.cases import CONTENDERS, DTYPES, Case, Contender, Effort, LastState, spec
from tp_kernels.regimes.store import key_of
from tp_kernels.rules import Rule

# Relative error that passes whatever the reference's own error in that dtype: a reference can be lucky.
FLOORS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_GATE_OPERATIONS = 1e10  # of the reference for one check, about a second; beyond it fewer sequences are checked


@cache
def environment(device: str) -> dict:
    """Where the numbers come from: device, versions, instruction set and git revision."""
    where = torch.device(device)
    return {
        "device_name": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": version("jax") if find_spec("jax") else None,
        "cuda": torch.version.cuda,
        "tp_kernels": tp_kernels.__version__,
        "isa": None if _native.cpu is None else _native.cpu.isa_level(),
        "revision": _revision(),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str | None:
    """Of the checkout this package is part of; ``None`` where it is installed without one."""
    package = Path(tp_kernels.__file__).parent
    try:
        # Inside somebody else's checkout (a virtual environment in a project) the file is not tracked.
        for command in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty"]):
            done = subprocess.run(["git", *command], cwd=package, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Gate:
    """The verdict of a check: the relative error farthest out (or least far in), its budget and where it arose.

    Args:
        passed: every output is within its budget.
        error: ‖output - float64 reference‖ / ‖float64 reference‖ of the worst output.
        budget: twice the error of the reference in the same dtype, plus the dtype's floor.
        output: the name of that output.
        B: how many of the sequences that the contender ran were checked; ``None`` where there are none to count.
    """

    passed: bool
    error: float
    budget: float
    output: str
    B: int | None = None


def compare(outputs: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Gate:
    """Check ``outputs`` against the error budget ``2 err(same_dtype) + floor``, all errors relative to ``exact``."""
    worst = None
    for name, true in exact.items():
        scale = true.norm().clamp_min(torch.finfo(torch.float64).tiny)
        error = float((outputs[name].double() - true).norm() / scale)
        budget = 2 * float((same_dtype[name].double() - true).norm() / scale) + FLOORS[outputs[name].dtype]
        gate = Gate(error <= budget, error, budget, name)  # false for NaN too
        if worst is None or not gate.passed or (worst.passed and gate.error / gate.budget > worst.error / worst.budget):
            worst = gate
    return worst


class Cell:
    """One case made real: the input, the gradient of the last state and the parameters that all contenders share.

    ``layer`` is the name of their layer in ``torch.nn`` and here.
    """

    def __init__(self, case: Case, backend: str = "auto", layer: str = "RNN") -> None:
        self.case, self.backend, self.layer = case, backend, layer
        self.device, self.dtype = torch.device(case.device), DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(0)
        kind = {"device": self.device, "dtype": self.dtype}
        self.x = torch.randn(case.T, case.B, case.M, generator=generator).to(**kind)
        self.grad = torch.randn(case.B, case.N, generator=generator).to(**kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.parameters = [p.detach() for p in getattr(nn, layer)(case.M, case.N).parameters()]
        if layer == "RNN":
            # torch.nn.RNN's own start has a spectral radius near 1/√3, and gradients vanish within a hundred steps. At
            # radius 1 far steps count, in the check as well; beyond it, rounding errors grow from step to step.
            self.parameters[1] /= torch.linalg.eigvals(self.parameters[1].double()).abs().max()
        self.parameters = [parameter.to(**kind) for parameter in self.parameters]
        self._references: dict[Rule, tuple[dict, dict]] = {}
        # Sequences whose gradients are checked: a few, spread over the batch, where the reference would take long.
        count = min(case.B, max(2, int(_GATE_OPERATIONS / (8 * case.T * case.N**2))))
        self.checked = torch.linspace(0, case.B - 1, count).round().long().to(self.device)

    def module(self, contender: Contender) -> nn.Module:
        return self._with_parameters(contender.build(self.case.M, self.case.N, self.backend), self.dtype)

    def _with_parameters(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        module = module.to(device=self.device, dtype=dtype)
        with torch.no_grad():  # layers and cells of torch.nn and ours list their four parameters in one order
            for parameter, value in zip(module.parameters(), self.parameters, strict=True):
                parameter.copy_(value)
        return module

    def step(self, module: nn.Module) -> Callable[[], None]:
        """The training step that is measured; the module's own, where it has one that leaves torch out."""
        own = getattr(module, "training_step", None)
        if own is not None:
            return own(self.x, self.grad)
        parameters = list(module.parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            forget_feedback()  # in training the weight is another one at every step
            module(self.x).backward(self.grad)

        return step

    def check(self, contender: Contender, module: nn.Module) -> Gate:
        """Run ``module`` on this very shape and compare the last state and every gradient with the reference's.

        Where only some sequences are checked, the others get a zero gradient: then the weight gradients are those
        of the checked ones, and the contender still runs all B.
        """
        mask = torch.zeros_like(self.grad)
        mask[self.checked] = 1
        outputs = _outputs(module, self.x, self.grad * mask, self.checked)
        if contender.rule not in self._references:
            self._references[contender.rule] = tuple(
                self._reference(contender.rule, dtype) for dtype in (self.dtype, torch.float64)
            )
        gate = compare(outputs, *self._references[contender.rule])
        return replace(gate, B=len(self.checked))

    def _reference(self, rule: Rule, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = getattr(tp_kernels.nn, self.layer)(self.case.M, self.case.N, rule=rule, backend="reference")
        module = self._with_parameters(LastState(layer), dtype)
        x, grad = self.x[:, self.checked].to(dtype), self.grad[self.checked].to(dtype)
        return {name: value.double() for name, value in _outputs(module, x, grad, slice(None)).items()}

    def backend_of(self, contender: Contender) -> str:
        """The back-end that runs the recurrence."""
        if not contender.fused:
            return contender.library
        table = backends(self.layer.lower())
        chosen = table.resolve(self.backend, self.x, size=self.case.N)
        return next(name for name, backend in table.backends.items() if backend is chosen)


_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _outputs(module: nn.Module, x: Tensor, grad: Tensor, checked: Tensor | slice) -> dict[str, Tensor]:
    module.zero_grad()
    last = module(x)
    last.backward(grad)
    gradients = {f"grad_{name}": p.grad for name, p in zip(_PARAMETERS, module.parameters(), strict=True)}
    return {"last state": last.detach()[checked], **gradients}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``step``, and the device waited for."""

    def run() -> None:
        step()
        _synchronize(device)

    return run


def seconds_of(step: Callable[[], None], device: torch.device, steps: int = 1) -> float:
    """Wall-clock seconds of one step, or the mean of several; the device is waited for on both sides."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / steps


@contextlib.contextmanager
def settings(threads: int) -> Iterator[None]:
    """The number of CPU threads, and denormal numbers taken as zero, as this library's kernels do by themselves.

    Gradients of long sequences pass through denormal numbers on their way to zero, and then most of the time of
    ``torch.nn.RNN`` can go into them: that would be counted for whoever is compared with it.
    """
    before = torch.get_num_threads()
    flushed = float(torch.tensor(torch.finfo(torch.float32).tiny) / 2) == 0
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the threads of a pool take it over from the one that starts them
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)


def measure_cell(case: Case, names: tuple[str, ...], effort: Effort, backend: str = "auto") -> list[dict]:
    """Check, then time, every contender of one cell side by side: one record each.

    A contender that fails its check gets ``passed: False`` and no time; one that cannot take part, a reason in
    ``skipped``. The rest run in rounds, each round in a new random order, so that a slow moment hits all alike.
    """
    with settings(case.threads):
        cell = Cell(case, backend)
        records, steps = {}, {}
        for name in names:
            contender = CONTENDERS[name]
            record = records[name] = _blank(case, contender, backend)
            record["skipped"] = contender.why_not(case, effort.compile_max_T)
            if record["skipped"] is None:
                record["skipped"] = _prepare(cell, contender, effort, record, steps)
        ceiling = peak(cell.dtype, case.threads) if _has_ceiling(cell) else None
        for name, seconds in _rounds(steps, effort, cell.device).items():
            low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
            records[name] |= {"seconds": seconds, "median_s": median, "q25_s": low, "q75_s": high}
            records[name] |= {"rounds": len(seconds), "warmup": 3, "period": CONTENDERS[name].period}
            records[name]["peak_flops"] = ceiling
        for name in steps:
            if effort.memory:
                records[name] |= peak_memory(case, name, backend)
    return list(records.values())


def _has_ceiling(cell: Cell) -> bool:
    """Whether the native module's multiply-add loop measures what this cell runs on."""
    return cell.device.type == "cpu" and _native.cpu_supports(cell.x)[0] and _native.cpu_available()[0]


def _blank(case: Case, contender: Contender, backend: str) -> dict:
    nothing = ("median_s", "q25_s", "q75_s", "peak_bytes", "peak_skipped", "gate", "skipped", "backend")
    return {
        **spec(case, contender.name, backend),
        "key": key_of(spec(case, contender.name, backend)),
        "role": contender.role,
        "label": contender.label,
        **dict.fromkeys(nothing),
        "seconds": [],
        "rounds": 0,
        "warmup": 0,
        "environment": environment(case.device),
    }


def _prepare(cell: Cell, contender: Contender, effort: Effort, record: dict, steps: dict) -> str | None:
    """Check one contender and leave its warmed-up step in ``steps``; returns why it takes no part, if it does not."""
    try:
        module = cell.module(contender)
        gate = cell.check(contender, module)
    except (torch.OutOfMemoryError, RuntimeError, torch.linalg.LinAlgError) as error:
        # Shown in the report: a contender that cannot run a shape is a finding, and the others still can.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    record["gate"] = asdict(gate)
    record["backend"] = cell.backend_of(contender)
    if not gate.passed:
        return None
    step = cell.step(module)
    once = seconds_of(step, cell.device)
    if once > effort.step_limit:
        return f"one step took {once:.3g} s, over --step-limit={effort.step_limit:g}"
    seconds_of(step, cell.device)
    steps[contender.name] = step
    return None


def _rounds(steps: Mapping[str, Callable], effort: Effort, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, round by round; as many rounds as fit in ``effort.seconds``, within its bounds."""
    names, order = list(steps), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(effort.max_rounds if names else 0):
            if done >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                break
            for name in order.sample(names, len(names)):
                seconds[name].append(seconds_of(steps[name], device, CONTENDERS[name].period))
    finally:
        if collecting:
            gc.enable()
    return seconds


def peak_memory(case: Case, name: str, backend: str) -> dict:
    """Peak growth of memory during one step, in bytes, parameters and input not counted.

    On CUDA ``max_memory_allocated`` after a reset. On the CPU the peak of the resident memory in a process of its
    own: what an earlier step left in the allocator would hide what this one takes.
    """
    if torch.device(case.device).type == "cuda":
        return {"peak_bytes": _cuda_peak(case, name, backend)}
    if name in ("compile", "jax"):
        return {"peak_skipped": "a fresh process would compile again"}
    with ProcessPoolExecutor(1, mp_context=_fresh_processes()) as pool:
        try:
            return {"peak_bytes": pool.submit(_cpu_peak, case, name, backend).result()}
        except BrokenProcessPool:
            return {"peak_skipped": "the process that measured it was killed, most likely for want of memory"}


@cache
def _fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes that have imported torch and done nothing else: forked, on Linux, from a server that did so once."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The second is what autograd imports, with sympy, at the first backward pass from a given gradient.
    context.set_forkserver_preload([__name__, "torch.fx.experimental.symbolic_shapes"])
    return context


def _cpu_peak(case: Case, name: str, backend: str) -> int:
    torch.set_num_threads(case.threads)
    contender = CONTENDERS[name]
    short = Cell(replace(case, T=2), backend)
    short.step(short.module(contender))()  # loads what is loaded at first use
    del short
    cell = Cell(case, backend)
    step = cell.step(cell.module(contender))
    gc.collect()
    before = _resident()
    step()
    return max(0, _peak_resident() - before)


def _cuda_peak(case: Case, name: str, backend: str) -> int:
    cell = Cell(case, backend)
    step = cell.step(cell.module(CONTENDERS[name]))
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(cell.device)
    before = torch.cuda.memory_allocated(cell.device)
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(cell.device) - before


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _resident() -> int:
    """Resident memory now, in bytes; the peak is set back to it where the system can do that."""
    if sys.platform != "linux":
        return _peak_resident()
    with contextlib.suppress(OSError):  # not allowed in some containers: then the peak so far is the baseline
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _status("VmHWM")


def _peak_resident() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
