"""Heat maps of the map's cells, the cost model against the measurement, and the curves of the races, as PNGs."""

import io
import itertools
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tp_kernels.regimes import model
from tp_kernels.regimes.cases import CONTENDERS
from tp_kernels.regimes.summary import (
    RESOLUTION,
    Cell,
    finals_of,
    pair_verdict,
    race_label,
    race_name,
    ratio,
    times,
)

# Okabe and Ito's palette, told apart by every kind of colour vision; line styles tell the roles apart as well.
CURVE_COLOURS = {
    "tp": "#5b3a8c",
    "tp-two": "#3A0CA3",
    "tp-local": "#CC79A7",
    "tp-paper": "#0072B2",
    "tp-paper-local": "#56B4E9",
    "tp-power1": "#B8A000",
    "tp-refresh8": "#B39DDB",
    "tp-jacobian": "#E11D48",
    "tp-difference": "#0E7490",
    "tp-direct": "#22D3EE",
    "tp-learned": "#A16207",
    "tp-learned-total": "#EAB308",
    "tp-identity": "#009E73",
    "tp-identity-two": "#66C2A5",
    "tp-random": "#000000",
    "tp-random-two": "#4B5563",
    "tp-first": "#7A9A01",
    "tp-transpose": "#C4A484",
    "bp": "#D55E00",
    "bp-two": "#E69F00",
    "nn.RNN": "#8c510a",
    "frozen": "#6b7280",
}
_STYLES = {"tp": "-", "bp": "--", "control": ":"}

DPI = 150  # drawn for fine screens, shown at 100
_INK, _FAINT, _RED = "#1f2937", "#9ca3af", "#dc2626"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def heat_maps(cells: list[Cell], name: str, other: str, quantity: str, title: str) -> bytes | None:
    """T x N maps of ``name`` over ``other``, one for each B; ``None`` where no cell has both."""
    found = [cell for cell in cells if name in cell and other in cell]
    if not any(ratio(cell, name, other, quantity) is not None for cell in found):
        return None
    axes_values = {letter: sorted({cell[name][letter] for cell in found}) for letter in "TNB"}
    lengths, widths, batches = axes_values.values()
    size = (max(2.6, 0.62 * len(lengths) + 0.5), max(1.5, 0.56 * len(widths) + 0.4))
    columns = min(len(batches), max(1, int(13 / size[0])))
    rows = -(-len(batches) // columns)
    figure = Figure(figsize=(size[0] * columns + 1.2, (size[1] + 0.75) * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    logs = [abs(math.log2(r)) for cell in found if (r := ratio(cell, name, other, quantity)) is not None and r > 0]
    # One extreme cell must not bleach all others: colours end at 8x, numbers do not.
    end = min(max(1.0, *logs), 3.0)
    norm = Normalize(-end, end)
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
    bar = figure.colorbar(
        image, ax=axes.tolist(), shrink=0.9, aspect=30, pad=0.015, extend="both" if max(logs) > end else "neither"
    )
    ticks = np.linspace(norm.vmin, norm.vmax, 5)
    bar.set_ticks(ticks, labels=[times(2**tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    better = "less" if quantity == "peak_bytes" else "faster"
    bar.set_label(f"purple: TP {better}", fontsize=8)
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left", weight="bold")
    return _png(figure)


def _annotate(
    axis: Axes, cell: Cell, name: str, other: str, quantity: str, value: float | None, x: int, y: int, norm: Normalize
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
    level = quantity == "median_s" and pair_verdict(cell, name, other) == "level"
    text = times(value) + ("\nlevel" if level else "")
    axis.text(x, y, text, color="white" if dark else _INK, style="italic" if level else "normal", **style)


def _draw_boundary(axis: Axes, lengths: list[int], widths: list[int], batch: int, input_size: int) -> None:
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
    axis.plot(columns, rows, color=_INK, linewidth=1.6, alpha=0.5, linestyle=(0, (4, 2)))
    axis.set_xlim(-0.5, len(lengths) - 0.5)
    axis.set_ylim(-0.5, len(widths) - 0.5)


def model_errors(cells: list[Cell], fitted: model.Fit) -> bytes:
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


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(color="#eef0f3", linewidth=0.8)
    axis.set_axisbelow(True)


def race_curves(race: list[dict]) -> bytes:
    """Accuracy over seconds and over steps: the median over the seeds, and their whole spread."""
    finals = finals_of(race)
    # One whose rule the user changed has no colour of its own: it takes one that is free here, while there are any.
    free = (colour for name, colour in CURVE_COLOURS.items() if name not in finals)
    colours = {name: CURVE_COLOURS.get(name) or next(free, _INK) for name in finals}
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
            colour, style = colours[name], _STYLES[runs[0]["role"]]
            axis.plot(
                grid, np.median(lines, axis=0), color=colour, linestyle=style, linewidth=1.8, label=race_label(name)
            )
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
    figure.suptitle(race_name(race), fontsize=11, color=_INK, x=0.01, ha="left", weight="bold")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return _png(figure)
