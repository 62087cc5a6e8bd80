"""The command line: ``python -m tp_kernels.regimes``."""

import argparse
import functools
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from tp_kernels._backends import NAMES
    from tp_kernels.regimes import measure, report, summary, tasks, train
    from tp_kernels.regimes.cases import CONTENDERS, DTYPES, PIXELS, PRESETS, spec
    from tp_kernels.regimes.store import RECORDS, Store, key_of
except ModuleNotFoundError as error:
    sys.exit(f"python -m tp_kernels.regimes: {error.name} is not installed: pip install 'tp_kernels[regimes]'")

DESCRIPTION = """\
Where does target propagation (TP) beat back-propagation (BP) on this machine?

  map     time per step and peak memory, over T x N x B; every number is checked first
  race    time to accuracy on a task, with the same search budget for every contender
  report  tables, pictures and a page from what was measured

Without a command: map, then race, then report. Results are kept as they come: Ctrl-C loses
the cell or run at hand, and the same command goes on from there."""

EXAMPLES = """\
examples:
  python -m tp_kernels.regimes --preset quick
  python -m tp_kernels.regimes map --T 64,784,3072 --N 100 --B 16 --dtype float32 --threads 1
  python -m tp_kernels.regimes race --task temporal-order --T 60 --seeds 3
  python -m tp_kernels.regimes report --out regimes_out/quick
"""

console = Console(highlight=False)


# --- flags: what a reader raises, argparse prints with the name of its flag ----------------------------------


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def integers(text: str) -> tuple[int, ...]:
    """``"64,784"`` -> (64, 784), in the order given, each once."""
    parts = _split(text)
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, like 64,784, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def one_of(several: Callable[[str], tuple], text: str, kind: str) -> Any:
    """``several(text)``, which must be one."""
    try:
        (value,) = several(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected {kind}, got {text!r}") from None
    return value


def integer(text: str) -> int:
    return one_of(integers, text, "one positive integer")


def input_size(text: str) -> int | str:
    return text if text == "pixels" else one_of(integers, text, "a positive integer or 'pixels'")


def numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(map(float, _split(text)))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"expected positive numbers separated by commas, like 1e-2,1e-3, got {text!r}")
    return values


def number(text: str) -> float:
    return one_of(numbers, text, "one positive number")


def share(text: str) -> float:
    value = one_of(numbers, text, "a number in (0, 1]")
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return value


def words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        parts = _split(text)
        for part in parts:
            if part not in known:
                raise argparse.ArgumentTypeError(f"expected names out of {', '.join(known)}, got {part!r}")
        return tuple(dict.fromkeys(parts))

    return read


def race_contenders(text: str) -> tuple[str, ...]:
    parts = _split(text)
    for part in parts:
        try:
            train.contender_of(part)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("race: ")) from None
    return tuple(dict.fromkeys(parts))


def device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:0, got {text!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {text!r}: torch sees no CUDA device")
    return text


def folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


def _add_shared(to: argparse.ArgumentParser, default: object) -> None:
    add = functools.partial(to.add_argument, default=default)
    add("--preset", choices=PRESETS, help="a named set of everything below (without it: default)")
    add(
        "--out",
        type=folder,
        metavar="DIR",
        help="run folder (default: regimes_out/ and the preset's name, or custom with flags of a command)",
    )
    add("--device", type=device, help="cpu, cuda or cuda:0")
    add("--threads", type=integer, help="CPU threads")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(
        prog="python -m tp_kernels.regimes", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw
    )
    _add_shared(main, None)
    commands = main.add_subparsers(dest="command", metavar="{map,race,report}")

    one = commands.add_parser(
        "map",
        formatter_class=raw,
        help="time per step and peak memory",
        description="Time per step and peak memory of every contender, for every T, N and B. A flag takes the place "
        "of the preset's\nvalue. Before a contender is timed, its gradients are checked on that very shape.",
        epilog="contenders:\n"
        + "".join(f"  {c.name:10} {c.label}\n" for c in CONTENDERS.values())
        + "jax takes part where it is installed: python -m pip install 'tp_kernels[jax]'\n",
    )
    # Absent flags leave what was given before the command: ``--preset quick map``.
    _add_shared(one, argparse.SUPPRESS)
    grid = one.add_argument_group("what to measure")
    grid.add_argument("--T", type=integers, help="sequence lengths, such as 64,784,3072")
    grid.add_argument("--N", type=integers, help="hidden sizes")
    grid.add_argument("--B", type=integers, help="batch sizes")
    grid.add_argument("--M", type=input_size, help=f"input size, or 'pixels': {PIXELS}/T, a 28x28 image in T chunks")
    grid.add_argument("--dtype", choices=DTYPES)
    grid.add_argument("--contenders", type=words(tuple(CONTENDERS)), metavar="A,B", help="out of the list below")
    grid.add_argument("--backend", choices=("auto", *NAMES), default="auto", help="of this library's contenders")
    effort = one.add_argument_group("how long to look")
    effort.add_argument("--seconds", type=number, help="aimed at for one cell, all contenders together")
    effort.add_argument("--min-rounds", type=integer, help="rounds of one cell at least")
    effort.add_argument("--max-rounds", type=integer, help="rounds of one cell at most")
    effort.add_argument("--step-limit", type=number, help="leave out a contender whose step takes more seconds")
    effort.add_argument("--compile-max-T", type=integer, help="longest T that torch.compile is tried on")
    effort.add_argument("--no-memory", dest="memory", action="store_const", const=False, help="no peak memory")

    two = commands.add_parser(
        "race",
        formatter_class=raw,
        help="time to accuracy",
        description="Seconds and steps until the running test accuracy passes the task's bar. Every contender searches "
        "as many step\nsizes, on a validation set and seeds of its own; the chosen ones run on fresh seeds.",
        epilog=textwrap.fill(f"tasks: {', '.join(tasks.TASKS)}", 100)
        + "\n"
        + textwrap.fill(f"contenders: {', '.join(train.CONTENDERS)}", 100),
    )
    _add_shared(two, argparse.SUPPRESS)
    race = two.add_argument_group("what to run")
    race.add_argument("--task", type=words(tuple(tasks.TASKS)), metavar="A,B", help="out of the list below")
    race.add_argument("--T", type=integers, help="sequence lengths")
    race.add_argument("--N", type=integers, help="hidden sizes")
    race.add_argument("--B", type=integers, help="batch sizes")
    race.add_argument(
        "--contenders",
        type=race_contenders,
        metavar="A,B",
        help="out of the list below, those of TP also with another rule, as in tp:reg=0.01 or tp-two:power=1:reg=0.1",
    )
    race.add_argument("--seeds", type=integer, help="number of seeds of the final runs")
    race.add_argument("--search-seeds", type=integer, help="number of seeds of each point of the search")
    race.add_argument("--step-sizes", type=numbers, metavar="X,Y", help="the search grid")
    race.add_argument("--optimizer", choices=train.OPTIMIZERS)
    race.add_argument("--beta2", type=share, help="Adam's β₂, of its mean of squared gradients")
    race.add_argument("--schedule", choices=train.SCHEDULES, help="of the step sizes")
    race.add_argument(
        "--clipping", choices=train.CLIPPINGS, help="of the gradient with adam: readout and layer together or apart"
    )
    race.add_argument("--initialization", choices=train.INITIALIZATIONS, help="of the recurrent weight")
    race.add_argument("--steps", type=integer, help="training steps of one run at most")
    race.add_argument("--evaluate-every", type=integer, help="training steps between two evaluations")
    race.add_argument("--bar", type=share, help="accuracy to pass, in (0, 1]")
    race.add_argument("--reg", type=number, help="regularization r of tp-paper and tp-paper-local")
    race.add_argument("--gamma", type=number, help="step γ from state to target of tp-paper and tp-paper-local")
    race.add_argument("--data", type=folder, metavar="DIR", help="IDX files (MNIST, Fashion-MNIST) for the idx tasks")

    three = commands.add_parser(
        "report", help="tables, pictures and the page", description="Compile what a run folder has into a report."
    )
    help_ = "run folder (default: the last one written to in regimes_out/)"
    three.add_argument("--out", type=folder, metavar="DIR", default=argparse.SUPPRESS, help=help_)
    return main


# --- commands ---------------------------------------------------------------------------------------------------------


def _progress(done: ProgressColumn) -> Progress:
    # The longest description first: a bar that moves with every line of text is hard to read. On 80 columns the bar
    # gives way, and no number does.
    columns = (TextColumn("{task.description:<44}"), BarColumn(bar_width=None), done)
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, expand=True)


def _own(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """The flags that the user gave, out of ``names``."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


_GRID_FLAGS = ("T", "N", "B", "M", "dtype", "contenders")


def _out(args: argparse.Namespace, own_grid: bool) -> Path:
    if args.out is not None:
        return args.out
    return Path("regimes_out") / ("custom" if own_grid else args.preset or "default")


def _check_writable(folder: Path) -> None:
    """Before hours are measured, and nothing is made."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--out must be a folder that can be written to, got {folder}: {reason}") from error


def run_map(args: argparse.Namespace, store: Store) -> None:
    """Measure every cell that the store does not have whole."""
    preset = PRESETS[args.preset or "default"]
    given = _own(args, (*_GRID_FLAGS, "device", "threads"))
    pixels = given.get("M") == "pixels"
    grid = preset.grid.override(**{name: value for name, value in given.items() if value != "pixels"})
    grid = replace(grid, M=None) if pixels else grid
    effort_flags = ("seconds", "min_rounds", "max_rounds", "step_limit", "compile_max_T", "memory")
    effort = replace(preset.effort, **_own(args, effort_flags))
    if effort.min_rounds > effort.max_rounds:
        raise ValueError(f"map: --min-rounds must be at most --max-rounds={effort.max_rounds}, got {effort.min_rounds}")
    backend = getattr(args, "backend", "auto")
    here = measure.environment(grid.device)
    cases = grid.cases()
    # A ratio is of two numbers of one run: a cell that lacks one contender is measured again whole.
    missing = [
        case
        for case in cases
        if not all(store.has(key_of(spec(case, name, backend)), here) for name in grid.contenders)
    ]
    _mention_others(store, here)
    if len(missing) < len(cases):
        console.print(f"map: {len(cases) - len(missing)} of {len(cases)} cells measured before, kept")
    with _progress(MofNCompleteColumn()) as progress:
        bar = progress.add_task("map", total=len(missing))
        for case in missing:
            progress.update(bar, description=f"map: {case}")
            for record in measure.measure_cell(case, grid.contenders, effort, backend):
                store.append(record)
            progress.advance(bar)


def _mention_others(store: Store, here: dict) -> None:
    versions = {name: here[name] for name in ("device_name", "torch", "tp_kernels", "isa", "revision")}
    others = sum(
        any(record["environment"].get(name) != value for name, value in versions.items())
        for record in store.records.values()
    )
    if others:
        console.print(
            f"{others} records in {store.folder} are of another machine or version: measured again if asked for"
        )


_RACE_FLAGS = (
    *("task", "T", "N", "B", "contenders", "seeds", "search_seeds", "step_sizes", "optimizer", "beta2"),
    *("schedule", "clipping", "initialization", "steps", "evaluate_every", "bar", "reg", "gamma", "device", "data"),
)


def run_race(args: argparse.Namespace, store: Store) -> None:
    """Run every race that the store does not have."""
    flags = _RACE_FLAGS if args.command == "race" else ("device",)
    plan = train.plan(args.preset, **_own(args, flags))
    here = measure.environment(args.device or "cpu")
    threads = args.threads or PRESETS[args.preset or "default"].grid.threads
    here = here | {"threads": threads}
    done = {key: record for key, record in store.records.items() if store.has(key, here)}
    with _progress(TaskProgressColumn()) as progress, measure.settings(threads):
        bar = progress.add_task("race", total=None)
        train.race(
            plan,
            done,
            on_record=lambda record: store.append(record | {"environment": here}),
            progress=lambda description, behind, total: progress.update(
                bar, description=_shortened(description), completed=behind, total=total
            ),
        )


def _shortened(description: str) -> str:
    return description.split(", ")[0].replace(" (", ": ").rstrip(")")


def run_report(store: Store) -> None:
    """Write the report and print its summary."""
    if not store.records:
        raise ValueError(f"report: --out must be a run folder with finished records in {RECORDS}, got {store.folder}")
    findings = report.write(list(store.records.values()), store.folder)
    if not findings:
        console.print("report: nothing to compare: that takes TP and BP side by side, in one cell or one race")
    for topic, found in summary.by_topic(findings):
        console.print(f"\n[bold]{topic}[/bold]")
        for finding in found:
            line = Table.grid(padding=(0, 2))
            line.add_row(f"[{report.COLOURS[finding.kind]}]{finding.kind:7}[/]", escape(finding.text))
            console.print(Padding.indent(line, 2))
    console.print(f"\n[bold]{store.folder / 'index.html'}[/bold]", soft_wrap=True)


def _latest_run() -> Path:
    runs = sorted(Path("regimes_out").glob(f"*/{RECORDS}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("report: --out must be a run folder; there is none in regimes_out/ to take by itself")
    return runs[-1].parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for a wrong argument or a file that cannot be read or written, 130 after Ctrl-C."""
    options = parser()
    args = options.parse_args(arguments)
    store = None
    try:
        if args.command == "report":
            run_report(Store(args.out or _latest_run()))
            return 0
        own_grid = bool(_own(args, [*_GRID_FLAGS, *_RACE_FLAGS[:-2]])) if args.command else False
        store = Store(_out(args, own_grid))
        _check_writable(store.folder)
        if args.command in (None, "map"):
            run_map(args, store)
        if args.command in (None, "race"):
            run_race(args, store)
        run_report(store)
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: error: {error}\n")
    except KeyboardInterrupt:
        kept = len(store.records) if store else 0
        console.print(
            f"\ninterrupted: {kept} records kept{f' in {store.path}' if kept else ''}; the same command goes on from "
            "there, and 'report' shows what there is",
            soft_wrap=True,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
