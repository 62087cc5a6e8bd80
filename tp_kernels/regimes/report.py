"""What a reader sees: the summary in words, heat maps, curves and tables, all from the records and nothing else."""

import base64
import csv
import importlib.resources
import itertools
import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2

from tp_kernels.regimes import model, pictures
from tp_kernels.regimes.cases import CONTENDERS
from tp_kernels.regimes.summary import (
    COMPARED,
    RESOLUTION,
    Cell,
    Finding,
    by_topic,
    cells_of,
    count,
    duration,
    error_words,
    finals_of,
    fit,
    join,
    mebibytes,
    present,
    race_label,
    race_name,
    race_verdict,
    races_of,
    ratio,
    summarize,
    times,
    verdict,
)

COLOURS = {"win": "#5b3a8c", "loss": "#b35806", "level": "#6b7280", "note": "#2563eb", "failure": "#dc2626"}


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


# --- sections ---------------------------------------------------------------------------------------------------------


def _time_section(cells: list[Cell]) -> Section:
    section = Section(
        "Time per training step",
        [
            "Each number is the median time of TP's step over that of another contender, from rounds in which all "
            "contenders take turns. “Level”: the middle halves of the two overlap. Dashed line: to its right the "
            f"inverse is predicted to cost less than {model.INVERSE_SHARE:.0%} of BP's operations. "
            f"{join(sorted({r['dtype'] for c in cells for r in c.values()}))}, input size M\u00a0=\u00a0"
            f"{join([str(M) for M in sorted({r['M'] for c in cells for r in c.values()})])}; "
            "recurrent weights of spectral radius 1; denormal numbers count as zero for every contender.",
        ],
    )
    for name in present(cells, "tp"):
        for other in COMPARED if name == "tp" else ("bp",):
            title = f"Time per step: {CONTENDERS[name].label} over {CONTENDERS[other].label}"
            picture = pictures.heat_maps(cells, name, other, "median_s", title)
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
        check = f"{error_words(gate['error'])} ≤ {error_words(gate['budget'])}" if gate and gate["passed"] else "–"
        check = (
            f"{error_words(gate['error'])} > {error_words(gate['budget'])}" if gate and not gate["passed"] else check
        )
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
    caption = f"All {count(len(rows), 'number')} of the map, with their checks (error ≤ budget)"
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
        picture = pictures.heat_maps(cells, "tp", other, "peak_bytes", title)
        if picture:
            section.pictures.append((f"memory_tp_over_{other}.png", title, picture))
    return section


def _model_section(cells: list[Cell], fitted: model.Fit) -> Section:
    errors = join([f"{CONTENDERS[name].label} {error:.0%}" for name, error in fitted.errors.items()])
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
        [("model.png", "Measured against predicted time per step", pictures.model_errors(cells, fitted))],
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
        finals = finals_of(race)
        if finals and all(run["curve"] for runs in finals.values() for run in runs):
            name = f"race_{race[0]['task']}_T{race[0]['T']}_N{race[0]['N']}_B{race[0]['B']}_{index}.png"
            section.pictures.append((name, race_name(race), pictures.race_curves(race)))
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
                    race_label(name),
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
    return Table(f"{race_name(race)}: the final runs", head, rows)


def _search_table(race: list[dict]) -> Table:
    chosen = {(run["contender"], _sizes(run["step_sizes"])) for run in race if run["phase"] == "final"}
    rows = [
        [
            race_label(run["contender"]),
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
    return Table(f"{race_name(race)}: the search", head, rows)


# --- the whole report -------------------------------------------------------------------------------------------------


def _tiles(cells: list[Cell], races: list[list[dict]]) -> list[Tile]:
    tiles = []
    for other, words in COMPARED.items():
        ratios = [found for cell in cells if (found := ratio(cell, "tp", other)) is not None]
        if ratios:
            tiles.append(Tile(times(statistics.median(ratios)), f"TP's time per step over {words}, median of cells"))
    verdicts = Counter(found for cell in cells if (found := verdict(cell, "tp")))
    if verdicts:
        tiles.append(Tile(f"{verdicts['win']} of {verdicts.total()}", "cells where TP's step beats every BP contender"))
    called = [race_verdict(finals_of(race), "tp")[0] for race in races if "tp" in finals_of(race)]
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
        threads = [count(threads, "thread")] if threads else []
        words[" · ".join([found["device_name"], *threads, *versions, *extra])] += 1
    return words.most_common()


def _ratios(cells: list[Cell], environments: list[tuple[str, int]]) -> str:
    """A Markdown table: the median step of each contender over that of each BP contender of the same cell."""
    pairs = [
        (mine, other)
        for mine in present(cells, "tp")
        for other in ("bp", "nn.RNN", "eager", "compile", "jax")
        if any(mine in cell and other in cell for cell in cells)
    ]
    shares = [name for name in ("tp", "bp") if any(_share_of_peak(cell, name) for cell in cells)]
    shapes = [next(iter(cell.values())) for cell in cells]
    keys = ["T", "B", "N", *(key for key in ("dtype", "device", "threads") if len({s[key] for s in shapes}) > 1)]
    head = [*keys, "TP, ms", *(f"{CONTENDERS[m].label} / {CONTENDERS[o].label}" for m, o in pairs)]
    head += [f"{CONTENDERS[name].label}, of peak" for name in shares]
    rows = []
    for cell, shape in zip(cells, shapes, strict=True):

        def median(name: str, cell: Cell = cell) -> float | None:
            return cell[name]["median_s"] if name in cell else None

        quotients = [median(m) / median(o) if median(m) and median(o) else None for m, o in pairs]
        milliseconds = f"{1e3 * median('tp'):.2f}" if median("tp") else "–"
        rows.append([*(str(shape[key]) for key in keys), milliseconds])
        rows[-1] += ["–" if quotient is None else f"{quotient:.2f}" for quotient in quotients]
        rows[-1] += [f"{share:.0%}" if (share := _share_of_peak(cell, name)) else "–" for name in shares]
    title = "Median time of a training step, as a ratio: below 1 the first is faster."
    if shares:
        title += (
            " Of peak: the operations of a step (tp_kernels/regimes/model.py) a second, over those of a fused "
            "multiply-add loop measured in the same run."
        )
    return "\n".join([title, "", *_where(environments), "", *_markdown(head, rows), ""])


def _share_of_peak(cell: Cell, name: str) -> float | None:
    record = cell.get(name)
    if not record or not record["median_s"] or not record.get("peak_flops"):
        return None
    count = model.operations(*(record[key] for key in ("contender", "T", "N", "B", "M")))
    return count / record["median_s"] / record["peak_flops"]


def _standings(races: list[list[dict]], environments: list[tuple[str, int]]) -> str:
    """A Markdown table a race: how many seeds of each contender pass the bar, when, and how far all of them get."""
    parts = []
    for race in races:
        rows = []
        for name, runs in finals_of(race).items():
            passed = [run for run in runs if run["steps_to_bar"] is not None]
            rows.append(
                [
                    race_label(name),
                    _sizes(runs[0]["step_sizes"]),
                    f"{len(passed)} of {len(runs)}",
                    _median_and_range([run["steps_to_bar"] for run in passed], "{:.0f}"),
                    _median_and_range([run["seconds_to_bar"] for run in passed], "{:.3g}"),
                    _median_and_range([run["best_accuracy"] for run in runs], "{:.1%}"),
                    _median_and_range([run["final_accuracy"] for run in runs], "{:.1%}"),
                ]
            )
        bar = f"{race[0]['bar']:.0%}"
        head = ["contender", "step size", f"seeds to {bar}", f"steps to {bar}", f"seconds to {bar}", "best", "last"]
        parts += [f"**{race_name(race)}**, at most {race[0]['max_steps']} steps", "", *_markdown(head, rows), ""]
    title = (
        "Final runs, on the test set: median and range over the seeds; steps and seconds are those of the seeds that "
        "pass. A run stops at the bar."
    )
    return "\n".join([title, "", *_where(environments), "", *parts])


def _median_and_range(values: list[float], form: str) -> str:
    if not values:
        return "–"
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows)]


def _where(environments: list[tuple[str, int]]) -> list[str]:
    return [f"- {words} ({count(number, 'record')})" for words, number in environments]


def write(records: list[dict], folder: Path) -> list[Finding]:
    """Write results.json and .csv, ratios.md, standings.md, the pictures and index.html into ``folder``.

    Returns:
        the summary.
    """
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
    head = {"summary": [asdict(finding) for finding in findings], "model": asdict(fitted) if fitted else None}
    lines = ",\n".join(map(json.dumps, records))  # a record a line: curves are long
    results = f'{json.dumps(head)[:-1]}, "records": [\n{lines}\n]}}\n'
    (folder / "results.json").write_text(results, encoding="utf-8")
    _write_csv(records, folder / "results.csv")
    if cells:
        (folder / "ratios.md").write_text(_ratios(cells, _environments(records)), encoding="utf-8")
    if any(finals_of(race) for race in races):
        (folder / "standings.md").write_text(_standings(races, _environments(records)), encoding="utf-8")
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
    # The width in pixels is in bytes 16 to 19 of a PNG.
    environment.filters["shown_width"] = lambda content: int.from_bytes(content[16:20], "big") * 100 // pictures.DPI
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.from_string(template).render(
        findings=findings, tiles=tiles, sections=sections, environments=environments, colours=COLOURS
    )
