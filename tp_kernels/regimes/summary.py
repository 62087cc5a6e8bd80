"""What the numbers say: verdicts and sentences, from the records and nothing else."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tp_kernels.regimes import model, train
from tp_kernels.regimes.cases import CONTENDERS

MIN_SEEDS = 3
"""With fewer seeds there is no spread to speak of, and no win or loss is called."""

RESOLUTION = 4 * 2**20
"""Peak memory below this many bytes is not compared: pages and libraries' own buffers weigh as much."""

COMPARED = {"bp": "BP on the same kernels", "nn.RNN": "torch.nn.RNN"}
"""The BP contenders that get pictures and a place in the summary; the others are in the table."""

_RACE_LABELS = {
    "tp": "TP",
    "tp-two": "TP, two step sizes",
    "tp-local": "TP, local update",
    "tp-paper": "TP, paper's code",
    "tp-paper-local": "TP, paper's formula",
    "tp-power1": "TP, power 1",
    "tp-refresh8": "TP, P every 8 steps",
    "tp-jacobian": "TP, inverse of the Jacobian",
    "tp-difference": "TP, difference targets",
    "tp-direct": "TP, direct targets",
    "tp-learned": "learned inverse",
    "tp-learned-total": "learned inverse, total update",
    "tp-identity": "identity feedback",
    "tp-identity-two": "identity feedback, two step sizes",
    "tp-random": "random feedback",
    "tp-random-two": "random feedback, two step sizes",
    "tp-first": "first weights' inverse, fixed",
    "tp-transpose": "transpose as feedback",
    "bp": "BP",
    "bp-two": "BP, two step sizes",
    "nn.RNN": "torch.nn.RNN",
    "frozen": "readout only",
}

Cell = dict[str, dict]  # one cell's records by contender


@dataclass(frozen=True)
class Finding:
    """A sentence of the summary: "win", "loss" or "level" for TP, "note", or "failure" of a check."""

    topic: str
    kind: str
    text: str


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


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def join(parts: Sequence[str]) -> str:
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


def pair_verdict(cell: Cell, name: str, other: str) -> str:
    mine, rival = cell[name], cell[other]
    if mine["q75_s"] < rival["q25_s"]:
        return "win"
    return "loss" if rival["q75_s"] < mine["q25_s"] else "level"


def shape(record: dict) -> str:
    return f"T={record['T']}, N={record['N']}, B={record['B']}"


# --- summary of the map -----------------------------------------------------------------------------------------------


STEP, MEMORY, MODEL, RACE = "Time per step", "Peak memory", "Cost model", "Time to accuracy"


def _map_findings(cells: list[Cell]) -> list[Finding]:
    findings = _gate_findings(cells)
    for name in present(cells, "tp"):
        findings += _time_findings(cells, name)
    return findings + _skipped_findings(cells) + _memory_findings(cells)


def present(cells: list[Cell], role: str) -> list[str]:
    return [
        name
        for name, contender in CONTENDERS.items()
        if contender.role == role and any(name in cell and cell[name]["median_s"] for cell in cells)
    ]


def _gate_findings(cells: list[Cell]) -> list[Finding]:
    """What must be known before any number is believed."""
    findings = []
    records = [record for cell in cells for record in cell.values()]
    failed: dict[str, list[dict]] = {}
    for record in records:
        if record["gate"] and not record["gate"]["passed"]:
            failed.setdefault(record["label"], []).append(record)
    for label, failures in failed.items():
        first, gate = failures[0], failures[0]["gate"]
        text = (
            f"{label} failed its check in {count(len(failures), 'cell')} and was not timed there. At {shape(first)} "
            f"the error of its {gate['output']} is {error_words(gate['error'])}, its budget "
            f"{error_words(gate['budget'])}."
        )
        findings.append(Finding(STEP, "failure", text))
    fallen_back = [r for r in records if r["backend"] == "reference" and CONTENDERS[r["contender"]].fused]
    if fallen_back:
        text = (
            f"{count(len(fallen_back), 'number')} of this library's contenders came from the plain-PyTorch "
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
            f"{label} was left out of {count(len(records), 'cell')}, for example at {shape(records[0])}: "
            f"{records[0]['skipped'].rstrip('.')}.",
        )
        for label, records in skipped.items()
    ]


def error_words(error: float | None) -> str:
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
    among = f"in {{}} of {count(len(verdicts), 'cell')}"
    texts = {}
    if costs := [words for other in COMPARED if (words := _ratio_words(cells, name, other))]:
        median = ", in the median over the cells" if len(verdicts) > 1 else ""
        texts["note"] = f"A step of {label} costs {join(costs)}{median}."
    if counts["win"]:
        rivals = join([CONTENDERS[rival].label for rival in present([cell for cell, _ in verdicts], "bp")])
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
            f"{rival['label']}, at {shape(rival)}."
        )
    if counts["level"]:
        texts["level"] = (
            f"{label} is level with the fastest BP contender, within the spread, {among.format(counts['level'])}."
        )
    return [Finding(STEP, kind, text) for kind, text in texts.items()]


def _best_rival(cell: Cell) -> dict:
    return min((r for r in cell.values() if r["role"] == "bp" and r["median_s"]), key=lambda r: r["median_s"])


def _where(verdicts: list[tuple[Cell, str]], kind: str) -> str:
    shapes = [shape(next(iter(cell.values()))) for cell, found in verdicts if found == kind]
    return "; ".join(shapes) if len(shapes) <= 3 else "; ".join(shapes[:3]) + f" and {len(shapes) - 3} more"


def _memory_findings(cells: list[Cell]) -> list[Finding]:
    parts = []
    for other, words in COMPARED.items():
        ratios = [found for cell in cells if (found := ratio(cell, "tp", other, "peak_bytes")) is not None]
        if ratios:
            parts.append(f"{times(statistics.median(ratios))} that of {words}")
    if not parts:
        return []
    return [Finding(MEMORY, "note", f"TP's peak memory is {join(parts)}, in the median over the cells.")]


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
            values = (*(record.get(name) for name in names), *(choice_of(record, name) for name in _CHOICES_BEFORE))
            races.setdefault(tuple(map(str, values)), []).append(record)
    return list(races.values())


_CHOICES_BEFORE = {"schedule": "constant", "clipping": "together", "beta2": 0.999}


def choice_of(record: dict, name: str) -> str | float | None:
    """A record from before there was a choice does not name it."""
    return record.get(name, _CHOICES_BEFORE[name])


def finals_of(race: list[dict]) -> dict[str, list[dict]]:
    """The final runs by contender, in the order they came: those of the point that the search chose.

    A search that was widened later may have chosen anew; the finals of the point before are then no result.
    """
    finals: dict[str, list[dict]] = {}
    for name in dict.fromkeys(record["contender"] for record in race):
        mine = [record for record in race if record["contender"] == name]
        runs = [record for record in mine if record["phase"] == "final"]
        search = [record for record in mine if record["phase"] == "search"]
        if runs and search:
            grid = [train.StepSizes(**record["step_sizes"]) for record in search]
            chosen = train.choose(grid, search).to_dict()
            runs = [run for run in runs if run["step_sizes"] == chosen]
        if runs:
            finals[name] = runs
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
        seeds = f"in none of {len(runs)} seeds" if len(runs) > 1 else "not with its one seed"
        return f"{seeds} (best accuracy, in the median: {best:.0%})"
    seconds = statistics.median(run["seconds_to_bar"] for run in passed)
    steps = statistics.median(run["steps_to_bar"] for run in passed)
    seeds = f"in {len(passed)} of {len(runs)} seeds" if len(runs) > 1 else "with its one seed"
    return f"{seeds}, after {duration(seconds)} and {steps:.0f} steps in the median"


def race_name(race: list[dict]) -> str:
    first = race[0]
    schedule = choice_of(first, "schedule")
    optimizer = first["optimizer"] if schedule == "constant" else f"{first['optimizer']} with a {schedule} schedule"
    if (beta2 := choice_of(first, "beta2")) not in (None, _CHOICES_BEFORE["beta2"]):
        optimizer += f", β₂ = {beta2:g}"
    if choice_of(first, "clipping") == "apart":
        optimizer += ", readout and layer clipped apart"
    return f"{first['task']}, {shape(first)}, {optimizer}, {first['initialization']} initialization"


def race_label(name: str) -> str:
    base, *changes = name.split(":")
    return ", ".join((_RACE_LABELS.get(base, base), *changes))


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
    finals = finals_of(race)
    findings = []
    for name, runs in finals.items():
        if runs[0]["role"] != "tp":
            continue
        kind, rival = race_verdict(finals, name)
        text = f"{race_name(race)}: {race_label(name)} passes {runs[0]['bar']:.0%} {_reached(runs)}"
        if rival:
            text += f"; {race_label(rival)} {_reached(finals[rival])}"
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
    """Whether it is the inverse that wins: a question of its own, and its rivals are every identity and random one."""
    controls = [control for control in finals if "identity" in control or "random" in control]
    lacking = [word for word in ("identity", "random") if not any(word in control for control in controls)]
    compared = "".join(
        f" {race_label(control).capitalize()} passes {_reached(finals[control])}." for control in controls
    )
    beaten = all(beats(finals[name], finals[control]) for control in controls)
    if kind == "win" and beaten and not lacking:
        text = f"Here the win is the inverse's: {race_label(name)} beats every feedback control.{compared}"
        return Finding(RACE, "win", text)
    if kind == "win" and not beaten:
        text = f"But that the inverse is what helps is not shown here: a control is as fast.{compared}"
        return Finding(RACE, "level", text)
    missing = f" {join(lacking).capitalize()} feedback did not run." if lacking else ""
    return Finding(RACE, "note", f"Nothing is claimed for the inverse itself here.{compared}{missing}")


# --- the whole summary ------------------------------------------------------------------------------------------------


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
