"""What a reader sees: the summary in words, heat maps, curves and tables, all from the records and nothing else."""

import base64
import csv
import importlib.resources
import io
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tp_kernels.regimes import model
from tp_kernels.regimes.cases import CONTENDERS

MIN_SEEDS = 3
"""With fewer seeds there is no spread to speak of, and no win or loss is called."""

RESOLUTION = 4 * 2**20
"""Peak memory below this many bytes is not compared: pages and libraries' own buffers weigh as much."""

COLOURS = {"win": "#5b3a8c", "loss": "#b35806", "level": "#6b7280", "note": "#2563eb", "failure": "#dc2626"}

# Okabe and Ito's palette, told apart by every kind of colour vision; line styles tell the roles apart as well.
_CURVE_COLOURS = {
    "tp": "#5b3a8c",
    "tp-local": "#CC79A7",
    "tp-paper": "#0072B2",
    "tp-paper-local": "#56B4E9",
    "tp-identity": "#009E73",
    "bp": "#D55E00",
    "bp-two": "#E69F00",
    "nn.RNN": "#8c510a",
    "frozen": "#6b7280",
}
_STYLES = {"tp": "-", "bp": "--", "control": ":"}
_RACE_LABELS = {
    "tp": "TP",
    "tp-local": "TP, local update",
    "tp-paper": "TP, paper's code",
    "tp-paper-local": "TP, paper's formula",
    "tp-identity": "identity feedback",
    "bp": "BP",
    "bp-two": "BP, two step sizes",
    "nn.RNN": "torch.nn.RNN",
    "frozen": "readout only",
}

COMPARED = {"bp": "BP on the same kernels", "nn.RNN": "torch.nn.RNN"}
"""The BP contenders that get pictures and a place in the summary; the others are in the table."""

Cell = dict[str, dict]  # one cell's records by contender


@dataclass(frozen=True)
class Finding:
    """A sentence of the summary: "win", "loss" or "level" for TP, "note", or "failure" of a check."""

    topic: str
    kind: str
    text: str


@dataclass(frozen=True)
class Tile:
    """A number at a glance."""

    value: str
    caption: str


@dataclass
class Section:
    """One part of the page: pictures as (file name, caption, bytes of a PNG), a table, and paragraphs."""

    title: str
    words: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str, bytes]] = field(default_factory=list)
    tables: list["Table"] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    rows: list[list[str]]
    failed: frozenset[int] = frozenset()  # rows shown in red


# --- numbers as words -------------------------------------------------------------------------------------------------


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.3g} MiB" if count >= RESOLUTION else f"< {RESOLUTION >> 20} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def cells_of(records: Iterable[dict]) -> list[Cell]:
    """Records of kind "cell" put together cell by cell, ordered by B, N and T."""
    cells: dict[tuple, Cell] = {}
    for record in records:
        if record["kind"] == "cell":
            names = ("device", "dtype", "threads", "M", "B", "N", "T")
            cells.setdefault(tuple(record[name] for name in names), {})[record["contender"]] = record
    return [cells[key] for key in sorted(cells)]


def verdict(cell: Cell, name: str) -> str | None:
    """ "win" where contender ``name`` beats every BP contender measured by more than the spread, "loss" where one of
    them beats it by more than the spread, else "level". The spread is the quartiles. ``None``: nothing to compare.
    """
    mine = cell.get(name)
    rivals = [record for record in cell.values() if record["role"] == "bp" and record["median_s"]]
    if not (mine and mine["median_s"] and rivals):
        return None
    if all(mine["q75_s"] < rival["q25_s"] for rival in rivals):
        return "win"
    return "loss" if any(rival["q75_s"] < mine["q25_s"] for rival in rivals) else "level"


def ratio(cell: Cell, name: str, other: str, quantity: str = "median_s") -> float | None:
    """Of one contender's number over another's in the same cell."""
    values = [cell[contender][quantity] if contender in cell else None for contender in (name, other)]
    if None in values or (quantity == "peak_bytes" and max(values) < RESOLUTION):
        return None
    return values[0] / max(values[1], 1 if quantity == "peak_bytes" else 0)


def _pair_verdict(cell: Cell, name: str, other: str) -> str:
    mine, rival = cell[name], cell[other]
    if mine["q75_s"] < rival["q25_s"]:
        return "win"
    return "loss" if rival["q75_s"] < mine["q25_s"] else "level"


def _shape(record: dict) -> str:
    return f"T={record['T']}, N={record['N']}, B={record['B']}"


# --- summary of the map -----------------------------------------------------------------------------------------------


STEP, MEMORY, MODEL, RACE = "Time per step", "Peak memory", "Cost model", "Time to accuracy"


def _map_findings(cells: list[Cell]) -> list[Finding]:
    findings = _gate_findings(cells)
    for name in _present(cells, "tp"):
        findings += _time_findings(cells, name)
    return findings + _skipped_findings(cells) + _memory_findings(cells)


def _present(cells: list[Cell], role: str) -> list[str]:
    return [
        name
        for name, contender in CONTENDERS.items()
        if contender.role == role and any(name in cell and cell[name]["median_s"] for cell in cells)
    ]


def _gate_findings(cells: list[Cell]) -> list[Finding]:
    """What must be known before any number is believed."""
    findings = []
    records = [record for cell in cells for record in cell.values()]
    for record in records:
        gate = record["gate"]
        if gate and not gate["passed"]:
            text = (
                f"{record['label']} failed its check at {_shape(record)}: the error of its {gate['output']} is "
                f"{_error(gate['error'])}, its budget {_error(gate['budget'])}. It was not timed there."
            )
            findings.append(Finding(STEP, "failure", text))
    fallen_back = [r for r in records if r["backend"] == "reference" and CONTENDERS[r["contender"]].fused]
    if fallen_back:
        text = (
            f"{_count(len(fallen_back), 'number')} of this library's contenders came from the plain-PyTorch "
            "reference back-end, not from its kernels: they say what the rule computes, not how fast it can be."
        )
        findings.append(Finding(STEP, "failure", text))
    return findings


def _skipped_findings(cells: list[Cell]) -> list[Finding]:
    """Contenders that were left out, each with the number of cells and a reason."""
    skipped: dict[str, list[dict]] = {}
    for record in (record for cell in cells for record in cell.values()):
        if record["skipped"]:
            skipped.setdefault(record["label"], []).append(record)
    return [
        Finding(
            STEP,
            "note",
            f"{label} was left out of {_count(len(records), 'cell')}, for example at {_shape(records[0])}: "
            f"{records[0]['skipped']}.",
        )
        for label, records in skipped.items()
    ]


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"  # JSON has no NaN


def _ratio_words(cells: list[Cell], name: str, other: str) -> str | None:
    ratios = [found for cell in cells if (found := ratio(cell, name, other)) is not None]
    if not ratios:
        return None
    spread = "" if len(ratios) == 1 else f" ({times(min(ratios))} to {times(max(ratios))})"
    return f"{times(statistics.median(ratios))} {COMPARED[other]}{spread}"


def _time_findings(cells: list[Cell], name: str) -> list[Finding]:
    label = CONTENDERS[name].label
    verdicts = [(cell, found) for cell in cells if (found := verdict(cell, name))]
    if not verdicts:
        return []
    counts = Counter(found for _, found in verdicts)
    among = f"in {{}} of {_count(len(verdicts), 'cell')}"
    texts = {}
    if costs := [words for other in COMPARED if (words := _ratio_words(cells, name, other))]:
        median = ", in the median over the cells" if len(verdicts) > 1 else ""
        texts["note"] = f"A step of {label} costs {_join(costs)}{median}."
    if counts["win"]:
        rivals = _join([CONTENDERS[rival].label for rival in _present([cell for cell, _ in verdicts], "bp")])
        texts["win"] = (
            f"{label} is faster per step than every BP contender ({rivals}), by more than the spread, "
            f"{among.format(counts['win'])}: {_where(verdicts, 'win')}."
        )
    if counts["loss"]:
        slower = [(cell[name], _best_rival(cell)) for cell, found in verdicts if found == "loss"]
        worst, rival = max(slower, key=lambda pair: pair[0]["median_s"] / pair[1]["median_s"])
        texts["loss"] = (
            f"{label} is slower per step than the fastest BP contender, by more than the spread, "
            f"{among.format(counts['loss'])}; at worst {times(worst['median_s'] / rival['median_s'])} "
            f"{rival['label']}, at {_shape(rival)}."
        )
    if counts["level"]:
        texts["level"] = (
            f"{label} is level with the fastest BP contender, within the spread, {among.format(counts['level'])}."
        )
    return [Finding(STEP, kind, text) for kind, text in texts.items()]


def _best_rival(cell: Cell) -> dict:
    return min((r for r in cell.values() if r["role"] == "bp" and r["median_s"]), key=lambda r: r["median_s"])


def _where(verdicts: list[tuple[Cell, str]], kind: str) -> str:
    shapes = [_shape(next(iter(cell.values()))) for cell, found in verdicts if found == kind]
    return "; ".join(shapes) if len(shapes) <= 3 else "; ".join(shapes[:3]) + f" and {len(shapes) - 3} more"


def _memory_findings(cells: list[Cell]) -> list[Finding]:
    parts = []
    for other, words in COMPARED.items():
        ratios = [found for cell in cells if (found := ratio(cell, "tp", other, "peak_bytes")) is not None]
        if ratios:
            parts.append(f"{times(statistics.median(ratios))} that of {words}")
    if not parts:
        return []
    return [Finding(MEMORY, "note", f"TP's peak memory is {_join(parts)}, in the median over the cells.")]


def fit(cells: list[Cell]) -> model.Fit | None:
    return model.fit(record for cell in cells for record in cell.values())


def _model_finding(fitted: model.Fit) -> Finding:
    tp = f" and by {fitted.errors['tp']:.0%} for TP, which it has not seen" if "tp" in fitted.errors else ""
    text = (
        f"Fitted to BP's cells: {duration(fitted.seconds_per_call)} for a call, {duration(fitted.seconds_per_step)} "
        f"for a sequential step and {fitted.operations_per_second / 1e9:.3g} GFLOP/s. In the median it is off by "
        f"{fitted.errors['bp']:.0%} for BP{tp}."
    )
    return Finding(MODEL, "note", text)


# --- summary of the race ----------------------------------------------------------------------------------------------


def races_of(records: Iterable[dict]) -> list[list[dict]]:
    """Records of kind "run" put together by task, sizes and training set-up."""
    races: dict[tuple, list[dict]] = {}
    for record in records:
        if record["kind"] == "run":
            names = ("task", "T", "N", "B", "optimizer", "initialization", "bar", "device", "max_steps")
            races.setdefault(tuple(str(record.get(name)) for name in names), []).append(record)
    return list(races.values())


def _finals(race: list[dict]) -> dict[str, list[dict]]:
    """The final runs by contender, in the order they came."""
    finals: dict[str, list[dict]] = {}
    for record in race:
        if record["phase"] == "final":
            finals.setdefault(record["contender"], []).append(record)
    return finals


def _times(runs: list[dict]) -> list[float]:
    return [math.inf if run["seconds_to_bar"] is None else run["seconds_to_bar"] for run in runs]


def beats(mine: list[dict], others: list[dict]) -> bool:
    """Every seed of ``mine`` passes the bar, and the slowest one before the fastest of ``others``."""
    return max(_times(mine)) < min(_times(others))


def _reached(runs: list[dict]) -> str:
    """How many seeds pass the bar, and when."""
    passed = [run for run in runs if run["seconds_to_bar"] is not None]
    if not passed:
        best = statistics.median(run["best_accuracy"] for run in runs)
        return f"in none of {_count(len(runs), 'seed')} (median of the best accuracy: {best:.0%})"
    seconds = statistics.median(run["seconds_to_bar"] for run in passed)
    steps = statistics.median(run["steps_to_bar"] for run in passed)
    which = (
        f"in {len(passed)} of {_count(len(runs), 'seed')}"
        if len(runs) > 1 or len(passed) < len(runs)
        else "with its one seed"
    )
    return f"{which}, after {duration(seconds)} and {steps:.0f} steps in the median"


def _race_name(race: list[dict]) -> str:
    first = race[0]
    return f"{first['task']}, {_shape(first)}, {first['optimizer']}, {first['initialization']} initialization"


def _label(name: str) -> str:
    return _RACE_LABELS.get(name, name)


def race_verdict(finals: dict[str, list[dict]], name: str) -> tuple[str, str]:
    """Of one TP contender against BP: "win", "loss", "level" or "note" (no verdict), and the rival that decides.

    The readout-only control counts as a rival: what needs no recurrent learning is no win for a way to do it.
    """
    rivals = {rival: runs for rival, runs in finals.items() if runs[0]["role"] == "bp" or rival == "frozen"}
    if not any(runs[0]["role"] == "bp" for runs in rivals.values()):
        return "note", ""
    best = min(rivals, key=lambda rival: (statistics.median(_times(rivals[rival])), -_best(rivals[rival])))
    if min(len(runs) for runs in (finals[name], *rivals.values())) < MIN_SEEDS:
        return "note", best
    if all(beats(finals[name], runs) for runs in rivals.values()):
        return "win", best
    beaten_by = [rival for rival, runs in rivals.items() if beats(runs, finals[name])]
    return ("loss", best if best in beaten_by else beaten_by[0]) if beaten_by else ("level", best)


def _best(runs: list[dict]) -> float:
    return statistics.median(run["best_accuracy"] for run in runs)


def _race_findings(race: list[dict]) -> list[Finding]:
    finals = _finals(race)
    findings = []
    for name, runs in finals.items():
        if runs[0]["role"] != "tp":
            continue
        kind, rival = race_verdict(finals, name)
        text = f"{_race_name(race)}: {_label(name)} passes {runs[0]['bar']:.0%} {_reached(runs)}"
        if rival:
            text += f"; {_label(rival)} {_reached(finals[rival])}"
        text += {
            "win": ". A win for TP: it is there before every BP contender, whatever the seed.",
            "loss": ". A loss for TP: BP is there before it, whatever the seed.",
            "level": ". No verdict: the spread over the seeds is larger than the difference.",
            "note": f". With fewer than {MIN_SEEDS} seeds of each this is no verdict."
            if rival
            else ". No BP contender ran, so there is nothing to beat.",
        }[kind]
        findings.append(Finding(RACE, kind, text))
        findings.append(_inverse_finding(finals, name, kind))
    return findings


def _inverse_finding(finals: dict[str, list[dict]], name: str, kind: str) -> Finding:
    """Whether it is the inverse that wins: a question of its own."""
    identity = finals.get("tp-identity")
    random = next((runs for control, runs in finals.items() if "random" in control), None)
    lacking = [word for word, runs in (("identity", identity), ("random orthogonal", random)) if not runs]
    compared = "" if not identity else f" Identity feedback, which has no inverse at all, passes {_reached(identity)}."
    if kind == "win" and not lacking:
        if beats(finals[name], identity) and beats(finals[name], random):
            return Finding(
                RACE, "win", f"Here the win is the inverse's: {_label(name)} beats both feedback controls.{compared}"
            )
        return Finding(
            RACE, "level", f"That the inverse is what helps is not shown here: a control is as fast.{compared}"
        )
    if kind == "win" and identity and not beats(finals[name], identity):
        return Finding(RACE, "level", f"But that the inverse is what helps is not shown here.{compared}")
    missing = f" {_join([word.capitalize() for word in lacking])} feedback did not run." if lacking else ""
    return Finding(RACE, "note", f"Nothing is claimed for the inverse itself here.{compared}{missing}")


# --- pictures ---------------------------------------------------------------------------------------------------------

_INK, _FAINT, _RED = "#1f2937", "#9ca3af", "#dc2626"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def heat_maps(cells: list[Cell], name: str, other: str, quantity: str, title: str) -> bytes | None:
    """T x N maps of ``name`` over ``other``, one for each B; ``None`` where no cell has both."""
    found = [cell for cell in cells if name in cell and other in cell]
    if not any(ratio(cell, name, other, quantity) is not None for cell in found):
        return None
    axes_values = {letter: sorted({cell[name][letter] for cell in found}) for letter in "TNB"}
    lengths, widths, batches = axes_values.values()
    size = (max(2.6, 0.72 * len(lengths) + 0.6), max(1.5, 0.56 * len(widths) + 0.4))
    columns = min(len(batches), max(1, int(13 / size[0])))
    rows = -(-len(batches) // columns)
    figure = Figure(figsize=(size[0] * columns + 1.2, (size[1] + 0.75) * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    logs = [abs(math.log2(r)) for cell in found if (r := ratio(cell, name, other, quantity)) is not None and r > 0]
    norm = Normalize(-max(1.0, *logs), max(1.0, *logs))
    image = None
    for axis, batch in itertools.zip_longest(axes, batches):
        if batch is None:
            axis.set_visible(False)
            continue
        values = np.full((len(widths), len(lengths)), np.nan)
        for cell in found:
            record = cell[name]
            if record["B"] != batch:
                continue
            row, column = widths.index(record["N"]), lengths.index(record["T"])
            value = ratio(cell, name, other, quantity)
            values[row, column] = np.nan if value is None or value <= 0 else math.log2(value)
            _annotate(axis, cell, name, other, quantity, value, column, row, norm)
        axis.set_facecolor("#f3f4f6")
        image = axis.imshow(values, cmap="PuOr_r", norm=norm, origin="lower", aspect="auto")
        axis.set_title(f"B = {batch}", fontsize=10, color=_INK)
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(widths)), widths)
        axis.set_xlabel("T, sequence length", fontsize=9)
        axis.set_ylabel("N, hidden size", fontsize=9)
        axis.tick_params(length=0, labelsize=9)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(widths) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        axis.tick_params(which="minor", length=0)
        if quantity == "median_s" and other == "bp":
            _draw_boundary(axis, lengths, widths, batch, found[0][name]["M"])
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.9, pad=0.015)
    ticks = np.linspace(norm.vmin, norm.vmax, 5)
    bar.set_ticks(ticks, labels=[times(2**tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    better = "less" if quantity == "peak_bytes" else "faster"
    bar.set_label(f"purple: TP {better}", fontsize=8)
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left", weight="bold")
    return _png(figure)


def _annotate(
    axis, cell: Cell, name: str, other: str, quantity: str, value: float | None, x: int, y: int, norm: Normalize
) -> None:
    failed = [record for record in (cell[name], cell[other]) if record["gate"] and not record["gate"]["passed"]]
    style = {"ha": "center", "va": "center", "fontsize": 8.5}
    if failed:
        axis.text(x, y, "check\nfailed", color=_RED, weight="bold", **(style | {"fontsize": 7.5}))
        axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=_RED, linewidth=1.5))
        return
    if value is None:
        small = quantity == "peak_bytes" and cell[name]["peak_bytes"] is not None
        axis.text(x, y, f"< {RESOLUTION >> 20} MiB" if small else "–", color=_FAINT, **(style | {"fontsize": 7}))
        return
    dark = value > 0 and abs(math.log2(value)) > 0.62 * norm.vmax
    level = quantity == "median_s" and _pair_verdict(cell, name, other) == "level"
    text = times(value) + ("\nlevel" if level else "")
    axis.text(x, y, text, color="white" if dark else _INK, style="italic" if level else "normal", **style)


def _draw_boundary(axis, lengths: list[int], widths: list[int], batch: int, input_size: int) -> None:
    """The line to the right of which the inverse is predicted to cost less than a tenth of BP's operations."""
    if len(lengths) < 2:
        return
    rows = np.arange(len(widths) + 1) - 0.5
    # Between two rows N is their geometric mean; beyond the first and last it goes on as before.
    logs = np.log(widths)
    step = np.diff(logs) if len(widths) > 1 else np.array([math.log(2)])
    edges = np.concatenate(([logs[0] - step[0] / 2], (logs[:-1] + logs[1:]) / 2, [logs[-1] + step[-1] / 2]))
    wanted = [math.log(model.boundary_length(math.exp(edge), batch, input_size)) for edge in edges]
    at = np.log(lengths)
    columns = np.interp(wanted, at, np.arange(len(lengths)), left=-0.5, right=len(lengths) - 0.5)
    axis.plot(columns, rows, color=_INK, linewidth=1.6, linestyle=(0, (4, 2)))
    axis.set_xlim(-0.5, len(lengths) - 0.5)
    axis.set_ylim(-0.5, len(widths) - 0.5)


def model_picture(cells: list[Cell], fitted: model.Fit) -> bytes:
    """Predicted against measured seconds; on the diagonal the model is right."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axis = figure.subplots()
    drawn = []
    markers = {
        "bp": ("o", "#E69F00"),
        "tp": ("^", "#5b3a8c"),
        "tp-local": ("s", "#CC79A7"),
        "tp-layer": ("D", "#56B4E9"),
    }
    for name, (marker, colour) in markers.items():
        points = [cell[name] for cell in cells if name in cell and cell[name]["median_s"]]
        if points:
            predicted, measured = [fitted.seconds(p) for p in points], [p["median_s"] for p in points]
            drawn += predicted + measured
            axis.scatter(
                predicted, measured, s=22, marker=marker, color=colour, alpha=0.8, label=CONTENDERS[name].label
            )
    limits = [min(drawn) / 1.5, max(drawn) * 1.5]
    axis.plot(limits, limits, color=_FAINT, linewidth=1, zorder=0)
    axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    axis.set_xlabel("predicted seconds per step", fontsize=9)
    axis.set_ylabel("measured seconds per step", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    _bare(axis)
    return _png(figure)


def _bare(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(color="#eef0f3", linewidth=0.8)
    axis.set_axisbelow(True)


def race_picture(race: list[dict]) -> bytes:
    """Accuracy over seconds and over steps: the median over the seeds, and their whole spread."""
    finals = _finals(race)
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    for axis, quantity in zip(figure.subplots(1, 2, sharey=True), ("seconds", "step"), strict=True):
        for name, runs in finals.items():
            curves = [run["curve"] for run in runs if run["curve"]]
            # A run that passed the bar stopped there: seeds are compared as far as all of them went.
            end = min(curve[-1][quantity] for curve in curves)
            grid = np.linspace(0, end, 200)
            lines = np.array(
                [np.interp(grid, [p[quantity] for p in curve], [p["accuracy"] for p in curve]) for curve in curves]
            )
            colour, style = _CURVE_COLOURS.get(name, _INK), _STYLES[runs[0]["role"]]
            axis.plot(grid, np.median(lines, axis=0), color=colour, linestyle=style, linewidth=1.8, label=_label(name))
            axis.fill_between(grid, lines.min(axis=0), lines.max(axis=0), color=colour, alpha=0.12, linewidth=0)
            passed = [run for run in runs if run["seconds_to_bar"] is not None]
            where = [run[f"{'seconds' if quantity == 'seconds' else 'steps'}_to_bar"] for run in passed]
            axis.plot(where, [runs[0]["bar"]] * len(where), "|", color=colour, markersize=11, markeredgewidth=2)
        axis.axhline(race[0]["bar"], color=_INK, linewidth=0.8)
        axis.set_ylim(0, 1.02)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds of training" if quantity == "seconds" else "training steps", fontsize=9)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _bare(axis)
    figure.axes[0].set_ylabel("accuracy on the test set", fontsize=9)
    figure.axes[1].annotate(
        f"bar {race[0]['bar']:.0%}", (1.01, race[0]["bar"]), xycoords=("axes fraction", "data"),
        va="center", fontsize=8, color=_INK,
    )  # fmt: skip
    figure.suptitle(_race_name(race), fontsize=11, color=_INK, x=0.01, ha="left", weight="bold")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return _png(figure)


# --- sections ---------------------------------------------------------------------------------------------------------


def _time_section(cells: list[Cell]) -> Section:
    section = Section(
        "Time per training step",
        [
            "Each number is the median time of TP's step over that of another contender, from rounds in which all "
            "contenders take turns. “Level”: the middle halves of the two overlap. Dashed line: to its right the "
            f"inverse is predicted to cost less than {model.INVERSE_SHARE:.0%} of BP's operations. "
            f"{_join(sorted({r['dtype'] for c in cells for r in c.values()}))}, input size M = "
            f"{_join([str(M) for M in sorted({r['M'] for c in cells for r in c.values()})])}.",
        ],
    )
    for name in _present(cells, "tp"):
        for other in COMPARED if name == "tp" else ("bp",):
            title = f"Time per step: {CONTENDERS[name].label} over {CONTENDERS[other].label}"
            picture = heat_maps(cells, name, other, "median_s", title)
            if picture:
                section.pictures.append((f"time_{name}_over_{other}.png", title, picture))
    section.tables.append(_cell_table(cells))
    return section


def _cell_table(cells: list[Cell]) -> Table:
    rows, failed = [], []
    for record in (record for cell in cells for record in cell.values()):
        gate = record["gate"]
        if gate and not gate["passed"]:
            failed.append(len(rows))
        if record["median_s"]:
            measured = [duration(record[q]) for q in ("median_s", "q25_s", "q75_s")]
        else:
            measured = [record["skipped"] or "check failed: not timed", "", ""]
        peak = record["peak_bytes"]
        check = f"{_error(gate['error'])} ≤ {_error(gate['budget'])}" if gate and gate["passed"] else "–"
        check = f"{_error(gate['error'])} > {_error(gate['budget'])}" if gate and not gate["passed"] else check
        rows.append(
            [
                *(str(record[letter]) for letter in "TNBM"),
                record["label"],
                record["backend"] or "–",
                *measured,
                str(record["rounds"]),
                mebibytes(peak) if peak is not None else record["peak_skipped"] or "–",
                check,
            ]
        )
    head = [*"TNBM", "contender", "back-end", "median", "lower quartile", "upper quartile", "rounds", "peak memory"]
    caption = f"All {_count(len(rows), 'number')} of the map, with their checks (error ≤ budget)"
    return Table(caption, [*head, "check"], rows, frozenset(failed))


def _memory_section(cells: list[Cell]) -> Section:
    section = Section(
        "Peak memory of the same step",
        [
            "The most memory that one step takes on top of parameters and input: on CUDA what the allocator handed "
            "out, on the CPU the growth of the resident memory in a fresh process. Under "
            f"{RESOLUTION >> 20} MiB nothing is compared."
        ],
    )
    for other in COMPARED:
        title = f"Peak memory: TP over {CONTENDERS[other].label}"
        picture = heat_maps(cells, "tp", other, "peak_bytes", title)
        if picture:
            section.pictures.append((f"memory_tp_over_{other}.png", title, picture))
    return section


def _model_section(cells: list[Cell], fitted: model.Fit) -> Section:
    errors = _join([f"{CONTENDERS[name].label} {error:.0%}" for name, error in fitted.errors.items()])
    rows = [
        [
            *(str(record[letter]) for letter in "TNBM"),
            record["label"],
            duration(record["median_s"]),
            duration(fitted.seconds(record)),
            times(fitted.seconds(record) / record["median_s"]),
        ]
        for cell in cells
        for name, record in cell.items()
        if name in model.FUSED and record["median_s"]
    ]
    return Section(
        "Cost model",
        [
            "What operation counts alone would predict. Three constants are fitted to BP's cells: "
            f"{duration(fitted.seconds_per_call)} for a call, {duration(fitted.seconds_per_step)} for a sequential "
            f"step and {fitted.operations_per_second / 1e9:.3g} GFLOP/s; TP is then predicted, not fitted. Median "
            f"error: {errors}. A contender far above the diagonal does work that the count does not know."
        ],
        [("model.png", "Measured against predicted time per step", model_picture(cells, fitted))],
        [
            Table(
                "Model against measurement, cell by cell",
                [*"TNBM", "contender", "measured", "predicted", "ratio"],
                rows,
            )
        ],
    )


def _race_section(races: list[list[dict]]) -> Section:
    section = Section(
        "Time to accuracy",
        [
            "Every contender searched as many step sizes, on a validation set and with seeds of its own; the chosen "
            "one then ran on fresh seeds and the test set. Lines: median over the seeds; bands: all of them, as far as "
            "all ran; ticks: where a seed passed the bar. Seconds are those of training alone. “Identity feedback” is "
            "TP without the inverse, “readout only” leaves the recurrent layer as it was born."
        ],
    )
    for index, race in enumerate(races):
        finals = _finals(race)
        if finals and all(run["curve"] for runs in finals.values() for run in runs):
            name = f"race_{race[0]['task']}_T{race[0]['T']}_N{race[0]['N']}_B{race[0]['B']}_{index}.png"
            section.pictures.append((name, _race_name(race), race_picture(race)))
        section.tables += [_final_table(race, finals), _search_table(race)]
    return section


def _sizes(sizes: dict) -> str:
    return ", ".join(f"{value:g}" if name == "all" else f"{name} {value:g}" for name, value in sizes.items())


def _final_table(race: list[dict], finals: dict[str, list[dict]]) -> Table:
    rows = []
    for name, runs in finals.items():
        for run in runs:
            reached = run["seconds_to_bar"] is not None
            rows.append(
                [
                    _label(name),
                    str(run["seed"]),
                    _sizes(run["step_sizes"]),
                    duration(run["seconds_to_bar"]) if reached else "not reached",
                    str(run["steps_to_bar"]) if reached else f"not within {run['steps']}",
                    f"{run['best_accuracy']:.1%}",
                    f"{run['final_accuracy']:.1%}",
                    run.get("message") or "",
                ]
            )
    head = ["contender", "seed", "step size", "time to bar", "steps to bar", "best accuracy", "last accuracy", "remark"]
    return Table(f"{_race_name(race)}: the final runs", head, rows)


def _search_table(race: list[dict]) -> Table:
    chosen = {(run["contender"], _sizes(run["step_sizes"])) for run in race if run["phase"] == "final"}
    rows = [
        [
            _label(run["contender"]),
            _sizes(run["step_sizes"]),
            str(run["seed"]),
            "not reached" if run["steps_to_bar"] is None else str(run["steps_to_bar"]),
            f"{run['best_accuracy']:.1%}",
            "chosen" if (run["contender"], _sizes(run["step_sizes"])) in chosen else "",
        ]
        for run in race
        if run["phase"] == "search"
    ]
    head = ["contender", "step size", "seed", "steps to bar", "best accuracy", ""]
    return Table(f"{_race_name(race)}: the search", head, rows)


# --- the whole report -------------------------------------------------------------------------------------------------


def summarize(records: list[dict]) -> list[Finding]:
    """The summary: what the numbers say in words, map first."""
    cells = cells_of(records)
    findings = _map_findings(cells)
    if fitted := fit(cells):
        findings.append(_model_finding(fitted))
    for race in races_of(records):
        findings += _race_findings(race)
    return findings


def by_topic(findings: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """The findings under their topics, failures first in each."""
    ordered = sorted(findings, key=lambda finding: finding.kind != "failure")
    topics = dict.fromkeys(finding.topic for finding in findings)
    return [(topic, [finding for finding in ordered if finding.topic == topic]) for topic in topics]


def _tiles(cells: list[Cell], races: list[list[dict]]) -> list[Tile]:
    tiles = []
    for other, words in COMPARED.items():
        ratios = [found for cell in cells if (found := ratio(cell, "tp", other)) is not None]
        if ratios:
            tiles.append(Tile(times(statistics.median(ratios)), f"TP's time per step over {words}, median of cells"))
    verdicts = Counter(found for cell in cells if (found := verdict(cell, "tp")))
    if verdicts:
        tiles.append(Tile(f"{verdicts['win']} of {verdicts.total()}", "cells where TP's step beats every BP contender"))
    called = [race_verdict(_finals(race), "tp")[0] for race in races if "tp" in _finals(race)]
    if called:
        won = called.count("win")
        tiles.append(Tile(f"{won} of {len(called)}", "tasks where TP reaches the bar before every BP contender"))
    gates = [record["gate"] for cell in cells for record in cell.values() if record["gate"]]
    if gates:
        passed = sum(gate["passed"] for gate in gates)
        tiles.append(Tile(f"{passed} of {len(gates)}", "checks against the float64 reference passed"))
    return tiles


def _environments(records: list[dict]) -> list[tuple[str, int]]:
    """Every environment there are records of, as words, with their number."""
    words = Counter()
    for record in records:
        found = record["environment"]
        versions = [f"{name} {found[name]}" for name in ("python", "torch", "tp_kernels") if found.get(name)]
        extra = [f"{label} {found[name]}" for name, label in (("isa", "instruction set"), ("revision", "revision"),
                 ("cuda", "CUDA")) if found.get(name)]  # fmt: skip
        threads = record.get("threads") or found.get("threads")
        threads = [_count(threads, "thread")] if threads else []
        words[" · ".join([found["device_name"], *threads, *versions, *extra])] += 1
    return words.most_common()


def write(records: list[dict], folder: Path) -> list[Finding]:
    """Write results.json, results.csv, the pictures and index.html into ``folder``; returns the summary."""
    cells, races, findings = cells_of(records), races_of(records), summarize(records)
    fitted = fit(cells)
    sections = []
    if races:
        sections.append(_race_section(races))
    if cells:
        sections[:0] = [_time_section(cells), _memory_section(cells)]
        sections[2:2] = [_model_section(cells, fitted)] if fitted else []
    sections = [section for section in sections if section.pictures or section.tables]
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "summary": [asdict(finding) for finding in findings],
        "model": asdict(fitted) if fitted else None,
        "records": records,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    _write_csv(records, folder / "results.csv")
    for stale in itertools.chain(*(folder.glob(f"{kind}*.png") for kind in ("time_", "memory_", "model", "race_"))):
        stale.unlink()  # pictures of an earlier report that this one may not have
    for name, _, content in itertools.chain.from_iterable(section.pictures for section in sections):
        (folder / name).write_bytes(content)
    (folder / "index.html").write_text(
        _page(findings, _tiles(cells, races), sections, _environments(records)), encoding="utf-8"
    )
    return findings


def _write_csv(records: list[dict], path: Path) -> None:
    """One line a record; lists (single rounds, curves) are in results.json only."""
    rows = []
    for record in records:
        row = {}
        for name, value in record.items():
            if isinstance(value, dict):
                row |= {f"{name}.{inner}": entry for inner, entry in value.items()}
            elif not isinstance(value, list) and name != "key":
                row[name] = value
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _page(
    findings: list[Finding], tiles: list[Tile], sections: list[Section], environments: list[tuple[str, int]]
) -> str:
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["by_topic"] = by_topic
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.from_string(template).render(
        findings=findings, tiles=tiles, sections=sections, environments=environments, colours=COLOURS
    )
