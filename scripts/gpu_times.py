"""Microseconds a step of this library's layers and of cuDNN's, without what the host adds, as JSON:

    python scripts/gpu_times.py --out times.json --N 64,128,256 --B 1,16
    python scripts/gpu_times.py --out times.json --device cpu --contenders cpu,torch --T 8,4 --N 16 --B 2

The second line is for trying the script without a GPU. A pass over a whole sequence is recorded in a CUDA graph and
replayed. From the shorter to the longer length the time grows by what the steps in between take; what a pass does once,
such as computing the inverse of the weight, drops out.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import tp_kernels as tp

RULES = {"bp": tp.BackProp(), "tp": tp.TargetProp(), "tp-local": tp.TargetProp(update="local")}
LAYERS = {"RNN": tp.nn.RNN, "GRU": tp.nn.GRU}
LIBRARY = "torch"
"""The contender that is torch's own layers: on a GPU cuDNN's."""
ROUNDS, REPLAYS = 7, 2


class Shape(NamedTuple):
    dtype: str
    N: int
    B: int


class Entry(NamedTuple):
    """One pass of one layer. ``rule``: of backward; ``None``: the forward pass alone, without gradients."""

    contender: str
    layer: str
    rule: str | None

    def make(self, shape: Shape, device: str) -> nn.Module:
        words = {"device": device, "dtype": getattr(torch, shape.dtype)}
        if self.contender == LIBRARY:
            return getattr(nn, self.layer)(shape.N, shape.N, **words)
        rule = RULES[self.rule or "bp"]
        return LAYERS[self.layer](shape.N, shape.N, rule=rule, backend=self.contender, **words)


def entries(contenders: list[str]) -> Iterator[Entry]:
    for name in contenders:
        if name == LIBRARY:
            for layer in ("RNN", "GRU", "LSTM"):
                yield from (Entry(name, layer, rule) for rule in (None, "bp"))
        else:
            for layer in LAYERS:
                yield from (Entry(name, layer, rule) for rule in (None, *RULES))


def one_pass(entry: Entry, shape: Shape, T: int, device: str) -> Callable[[], object]:
    """A forward pass, or a training step that a loss at the last state sends back."""
    layer = entry.make(shape, device)
    parameters = list(layer.parameters())
    x = torch.randn(T, shape.B, shape.N, device=device, dtype=parameters[0].dtype)
    grad = torch.randn_like(x[0])

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    def step() -> object:
        return torch.autograd.grad(layer(x)[0][-1], parameters, grad)

    return forward if entry.rule is None else step


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """What replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], device: str) -> float:
    """The median of several rounds."""
    times = []
    if device == "cpu":
        run()
        for _ in range(ROUNDS):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    replay = recorded(run)
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


def measure(entry: Entry, shape: Shape, lengths: tuple[int, int], device: str) -> dict[str, object]:
    """A row. What cannot run, or cannot be recorded, is a row that says so: a finding, too."""
    row: dict[str, object] = {**entry._asdict(), **shape._asdict()}
    try:
        long, short = (milliseconds(one_pass(entry, shape, T, device), device) for T in lengths)
    except Exception as error:
        if device != "cpu":
            torch.cuda.synchronize()  # raises where the device is lost, and with it all that would follow
        return row | {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    slope = (long - short) * 1e3 / (lengths[0] - lengths[1])
    return row | {"us_per_step": slope, "ms_long": long, "ms_short": short}


def line(row: dict[str, object]) -> str:
    what = f"{row['contender']:10}{row['layer']:5}{row['rule'] or 'forward':9}"
    result = row.get("error") or f"{row['us_per_step']:9.3f} us a step"
    return f"{what}{row['dtype']:9} N={row['N']:<5} B={row['B']:<5}{result}"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON, written anew after each row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--contenders", default="cuda,triton,torch", help="back-ends, and torch for its own layers")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--N", type=numbers, default="64,128,256")
    parser.add_argument("--B", type=numbers, default="16")
    parser.add_argument("--T", type=numbers, default="784,112", help="the two lengths, the longer first")
    parser.add_argument("--seconds", type=float, default=60, help="after which nothing new is begun")
    given = parser.parse_args()
    if len(given.T) != 2 or given.T[0] <= given.T[1]:
        parser.error(f"--T must be two lengths, the longer first, got {','.join(map(str, given.T))}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch can use no CUDA device; --device cpu needs none")
    # float32 is float32, for cuDNN as well.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    end = time.monotonic() + given.seconds
    name = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
    report = {"device": name, "torch": torch.__version__, "T": given.T, "left_out": 0, "rows": []}
    shapes = itertools.starmap(Shape, itertools.product(given.dtypes.split(","), given.N, given.B))
    todo = list(itertools.product(shapes, entries(given.contenders.split(","))))
    for done, (shape, entry) in enumerate(todo):
        if time.monotonic() > end:
            report["left_out"] = len(todo) - done
            break
        report["rows"].append(measure(entry, shape, tuple(given.T), given.device))
        print(line(report["rows"][-1]), flush=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    measured = [row for row in report["rows"] if "error" not in row]
    print(f"times: {len(measured)} of {len(todo)}, {report['left_out']} left out for want of time")
    raise SystemExit(not measured)


if __name__ == "__main__":
    main()
