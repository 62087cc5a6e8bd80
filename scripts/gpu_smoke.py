"""One path of the GPU code in one process, so that a fault or a hang takes down nothing else. A PASS or FAIL a line:

    python scripts/gpu_smoke.py cuda                                   # cluster, chain, triton, inverse, graphs-...
    python scripts/gpu_smoke.py cuda --device cpu --backend reference  # without a GPU: whether the script itself works

A training step in the path's precision is compared with one in float64 by the plain PyTorch back-end, on the CPU.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tp_kernels as tp

RULES = {
    "bp": tp.BackProp(),
    "weight": tp.TargetProp(),
    "local": tp.TargetProp(update="local"),
    "layer": tp.TargetProp.paper(reg=0.5),
    "jacobian": tp.TargetProp(inverse="jacobian"),
}
ALLOWED = {"float32": 2e-4, "bfloat16": 5e-2}
"""Relative errors of a path that works; a wrong one is off by much more."""
INVERSE_ALLOWED = 1e-4


@dataclass(frozen=True)
class Case:
    """One shape of ``rnn``, under each of the rules."""

    T: int
    B: int
    N: int
    rules: tuple[str, ...]
    dtype: str = "float32"
    heads: int | None = None

    def __str__(self) -> str:
        heads = "" if self.heads is None else f" H={self.heads}"
        return f"{self.dtype} T={self.T} B={self.B}{heads} N={self.N}"


TWO = ("bp", "weight")
CASES = {
    "cuda": (  # one multiprocessor: registers, then tensor cores
        Case(T=40, B=3, N=20, rules=tuple(RULES)),
        Case(T=8, B=3, N=20, rules=TWO, heads=2),
        Case(T=40, B=200, N=100, rules=("weight",)),
        Case(T=40, B=500, N=128, rules=TWO),
        Case(T=20, B=1500, N=100, rules=TWO),
        Case(T=20, B=17, N=128, rules=TWO, dtype="bfloat16"),
        Case(T=8, B=9, N=256, rules=TWO, dtype="bfloat16"),
    ),
    "cluster": (
        Case(T=40, B=3, N=129, rules=TWO),
        Case(T=40, B=16, N=256, rules=("bp", "weight", "local", "layer")),
        Case(T=20, B=16, N=512, rules=TWO),
        Case(T=20, B=100, N=512, rules=("weight",)),
        Case(T=8, B=16, N=1024, rules=TWO),
    ),
    "chain": (Case(T=20, B=16, N=1100, rules=TWO),),
    "triton": (
        Case(T=40, B=17, N=20, rules=("bp", "weight", "local", "layer")),
        Case(T=40, B=17, N=100, rules=TWO),
        Case(T=40, B=3, N=128, rules=("weight",)),
        Case(T=8, B=17, N=20, rules=("weight",), heads=2),
        Case(T=20, B=17, N=128, rules=TWO, dtype="bfloat16"),
        Case(T=8, B=3, N=200, rules=("weight",), dtype="bfloat16"),
        Case(T=8, B=17, N=33, rules=("jacobian",)),
    ),
}
GRAPHS = {"graphs-cuda": ("cuda", 100), "graphs-cluster": ("cuda", 256), "graphs-chain": ("cuda", 1100)}
GRAPHS |= {"graphs-triton": ("triton", 100)}
"""Recordings of CUDA graphs: the back-end, and N."""
PATHS = (*CASES, "inverse", *GRAPHS, "graphs-compile")


@dataclass(frozen=True)
class Place:
    """Where it runs: the device, and a back-end in the place of the path's own."""

    device: str
    backend: str | None

    def backend_or(self, name: str) -> str:
        return self.backend or name


Check = tuple[str, float, Callable[[], float]]
"""What is checked, the error that is allowed, and what gives the error."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    error = float((found.double().cpu() - exact.cpu()).norm() / exact.norm().cpu())
    return error if error == error else float("inf")


def leaves_of(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """u, W and h_0. W is near orthogonal, so that nothing fades within a case."""
    generator = torch.Generator().manual_seed(seed)
    units = (case.N,) if case.heads is None else (case.heads, case.N)
    square = torch.randn(*units, case.N, generator=generator)
    u = 0.3 * torch.randn(case.T, case.B, *units, generator=generator)
    h0 = torch.randn(case.B, *units, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (u, 0.9 * torch.linalg.qr(square)[0], h0)]


def step(leaves: list[Tensor], rule: tp.BackProp | tp.TargetProp, backend: str) -> list[Tensor]:
    """All states, and the gradients of a loss at the last and at all of them."""
    h = tp.rnn(*leaves, rule=rule, backend=backend)
    return [h.detach(), *torch.autograd.grad(h[-1].square().sum() + h.mean(), leaves)]


def rnn_error(case: Case, rule: str, backend: str, device: str) -> float:
    found = step(leaves_of(case, getattr(torch, case.dtype), device), RULES[rule], backend)
    exact = step(leaves_of(case, torch.float64, "cpu"), RULES[rule], "reference")
    return max(map(relative_error, found, exact))


def rnn_checks(path: str, place: Place) -> Iterator[Check]:
    backend = place.backend_or("triton" if path == "triton" else "cuda")
    for case in CASES[path]:
        for rule in case.rules:
            yield (
                f"{backend} {case} {rule}",
                ALLOWED[case.dtype],
                lambda case=case, rule=rule: rnn_error(case, rule, backend, place.device),
            )


def inverse_error(batch: int, N: int, power: float, backend: str, device: str) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, N, N, generator=generator) / N**0.5
    reg = 1e-2 if power == 0.5 else 0.25
    found = tp.regularized_inverse(weight.to(device), reg, power=power, backend=backend, check_errors=False)
    return relative_error(found, tp.regularized_inverse(weight.double(), reg, power=power, backend="reference"))


def inverse_checks(place: Place) -> Iterator[Check]:
    for name in ("cuda", "triton"):
        backend = place.backend_or(name)
        for batch, N in ((1, 20), (16, 64), (1, 128), (1, 256)):
            for power in (0.5, 1.0):
                yield (
                    f"{backend} {batch} of {N} × {N}, power {power}",
                    INVERSE_ALLOWED,
                    lambda case=(batch, N, power), backend=backend: inverse_error(*case, backend, place.device),
                )


def recorded(function: Callable[[], list[Tensor]], device: str) -> tuple[Callable[[], None], list[Tensor]]:
    """What runs the function again on its old memory, and its results there. On a CPU nothing is recorded."""
    if device == "cpu":
        results = function()

        def again() -> None:
            for result, anew in zip(results, function(), strict=True):
                result.copy_(anew)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def free_what_is_free(device: str) -> list[Tensor]:
    """What torch gives back it gives to these numbers, which a recording must neither read nor change."""
    if device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return [torch.full((1 << 20,), torch.nan, device=device) for _ in range(16)]


def replay_error(case: Case, rule: str, backend: str, device: str) -> float:
    """Of a step that was recorded and is replayed on other numbers."""
    leaves = leaves_of(case, torch.float32, device)
    replay, found = recorded(lambda: step(leaves, RULES[rule], backend), device)
    others = leaves_of(case, torch.float32, device, seed=1)
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    replay()
    return max(map(relative_error, found, [x.double() for x in step(others, RULES[rule], backend)]))


def repeated_error(case: Case, rule: str, backend: str, device: str) -> float:
    """Of the third call, which a path that records by itself replays, after torch has freed all that it can."""
    leaves = leaves_of(case, torch.float32, device)
    first = [x.double() for x in step(leaves, RULES[rule], backend)]
    step(leaves, RULES[rule], backend)
    others = free_what_is_free(device)
    error = max(map(relative_error, step(leaves, RULES[rule], backend), first))
    return error if all(bool(other.isnan().all()) for other in others) else float("inf")


def graph_checks(path: str, place: Place) -> Iterator[Check]:
    backend, N = GRAPHS[path]
    backend, case = place.backend_or(backend), Case(T=12, B=5, N=N, rules=TWO)
    for rule in case.rules:
        for what, error in (("repeated", repeated_error), ("replayed", replay_error)):
            yield (
                f"{backend} {case} {rule}, {what}",
                ALLOWED["float32"],
                lambda error=error, rule=rule: error(case, rule, backend, place.device),
            )


def compiled_error(case: Case, rule: str, backend: str, device: str) -> float:
    """Of the fourth call under ``mode="reduce-overhead"``: the first warm up, one records, the last replays."""
    leaves = leaves_of(case, torch.float32, device)
    compiled = torch.compile(lambda *given: tp.rnn(*given, rule=RULES[rule], backend=backend), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        h = compiled(*leaves)
        found = [x.clone() for x in (h.detach(), *torch.autograd.grad(h[-1].square().sum() + h.mean(), leaves))]
    return max(map(relative_error, found, [x.double() for x in step(leaves, RULES[rule], backend)]))


def compile_checks(place: Place) -> Iterator[Check]:
    for name, N, rules in (
        ("cuda", 20, ("weight", "jacobian")),
        ("cuda", 1100, ("weight",)),
        ("triton", 20, ("weight", "jacobian")),
    ):
        backend, case = place.backend_or(name), Case(T=6, B=3, N=N, rules=rules)
        for rule in rules:
            yield (
                f"{backend} {case} {rule}, compiled",
                ALLOWED["float32"],
                lambda case=case, rule=rule, backend=backend: compiled_error(case, rule, backend, place.device),
            )


def checks_of(path: str, place: Place) -> Iterator[Check]:
    if path in CASES:
        return rnn_checks(path, place)
    if path in GRAPHS:
        return graph_checks(path, place)
    return inverse_checks(place) if path == "inverse" else compile_checks(place)


def run(what: str, allowed: float, measure: Callable[[], float], device: str) -> dict[str, object]:
    """One line, printed and returned. What is raised is a failure that is shown; the next check may still tell more."""
    row: dict[str, object] = {"what": what, "allowed": allowed}
    try:
        error = measure()
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as raised:
        traceback.print_exc()
        lines = str(raised).splitlines() or [""]
        row |= {"passed": False, "raised": f"{type(raised).__name__}: {lines[0]}"}
        print(f"FAIL {what}: {row['raised']}", flush=True)
        return row
    row |= {"passed": error <= allowed, "error": error}
    print(f"{'PASS' if row['passed'] else 'FAIL'} {what}: error {error:.1e}, allowed {allowed:.0e}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", choices=PATHS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", help="in the place of the path's own")
    parser.add_argument("--out", type=Path, help="JSON, written anew after each check, so that a hang leaves the rest")
    given = parser.parse_args()
    torch.set_num_threads(1)  # there are other paths beside this one
    place = Place(given.device, given.backend)
    if given.device == "cpu" and given.backend is None:
        parser.error("--device cpu needs --backend: the path's own computes on a GPU")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch can use no CUDA device; --device cpu --backend reference needs none")
    rows: list[dict[str, object]] = []
    for check in checks_of(given.path, place):
        rows.append(run(*check, given.device))
        if given.out is not None:
            name = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
            report = {"path": given.path, "device": name, "torch": torch.__version__, "checks": rows}
            given.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = sum(not row["passed"] for row in rows)
    print(f"{given.path}: {len(rows) - failed} of {len(rows)} passed", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
