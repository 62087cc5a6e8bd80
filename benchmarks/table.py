"""Markdown tables of kept results.

``python benchmarks/table.py results.json [another.json …]``, of pytest-benchmark's JSON: one row a group; the median
time of its first contender, and those of the others as multiples of it.

``python benchmarks/table.py --ratio tp nn.RNN results.json``, of the regime map's: the median time of one contender
over that of another, one row for each T and B, one column for each N.
"""

import argparse
import json
from pathlib import Path


def table(results: dict) -> str:
    """The tables of one run, one for each set of contenders."""
    groups: dict[str, dict[str, dict]] = {}
    for bench in results["benchmarks"]:
        extra = bench["extra_info"]
        contender = extra["contender"]
        if "operations" in extra:  # measured against the ceiling, not against one another
            contender = f"T={extra['T']} N={extra['N']} B={extra['B']}"
        groups.setdefault(bench["group"], {})[contender] = bench
    tables: dict[tuple[str, ...], list[str]] = {}
    for group, benches in groups.items():
        first = next(iter(benches.values()))
        if "operations" in first["extra_info"]:
            rows = [f"| {group} {name} | {_ms(bench)} | {_of_peak(bench)} |" for name, bench in benches.items()]
            tables.setdefault(("ms", "of peak"), []).extend(rows)
        else:
            # A contender that failed its check has no time, and its column says so.
            names = _names(groups, benches)
            cells = [f"{_median(benches[n]) / _median(first):.2f}" if n in benches else "–" for n in names[1:]]
            tables.setdefault((f"{names[0]}, ms", *names[1:]), []).append(
                f"| {group} | {' | '.join([_ms(first), *cells])} |"
            )
    parts = [_where(results)]
    for head, rows in tables.items():
        parts += ["", f"| | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|", *rows]
    return "\n".join(parts)


def _names(groups: dict[str, dict[str, dict]], benches: dict[str, dict]) -> list[str]:
    """All contenders of the groups that start with the same two."""
    start = list(benches)[:2]
    names: dict[str, None] = {}
    for other in groups.values():
        if list(other)[:2] == start:
            names |= dict.fromkeys(other)
    return list(names)


def _median(bench: dict) -> float:
    return bench["stats"]["median"]


def _ms(bench: dict) -> str:
    return f"{1e3 * _median(bench):.3g}"


def _of_peak(bench: dict) -> str:
    extra = bench["extra_info"]
    return f"{extra['operations'] / _median(bench) / extra['peak_flops']:.0%}"


def _where(results: dict) -> str:
    extra = results["benchmarks"][0]["extra_info"]
    threads = f"{extra['threads']} thread" + "s" * (extra["threads"] > 1)
    parts = (extra["device_name"], threads, f"torch {extra['torch']}", f"instruction set {extra['isa']}")
    return f"{' · '.join(parts)} · revision {extra['revision']} · {results['datetime'][:10]}"


def ratios(results: dict, name: str, other: str) -> str:
    """Of the regime map's records; a cell where one of the two has no time is left out."""
    mine, theirs = (
        {(r["T"], r["B"], r["N"]): r["median_s"] for r in results["records"] if r["contender"] == word}
        for word in (name, other)
    )
    cells = {where: mine[where] / theirs[where] for where in mine if mine[where] and theirs.get(where)}
    sizes = sorted({N for _, _, N in cells})
    lines = [f"| {name} / {other} | {' | '.join(f'N = {N}' for N in sizes)} |", "|---" + "|---:" * len(sizes) + "|"]
    for T, B in sorted({(T, B) for T, B, _ in cells}):
        row = (f"{cells[T, B, N]:.2f}" if (T, B, N) in cells else "–" for N in sizes)
        lines.append(f"| T = {T}, B = {B} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Markdown tables of kept results.")
    parser.add_argument("--ratio", nargs=2, metavar=("NAME", "OTHER"), help="two contenders of the regime map")
    parser.add_argument("results", nargs="+", type=Path, help="files of JSON")
    args = parser.parse_args()
    for i, path in enumerate(args.results):
        results = json.loads(path.read_text())
        print("\n" * (i > 0) + (ratios(results, *args.ratio) if args.ratio else table(results)))


if __name__ == "__main__":
    main()
