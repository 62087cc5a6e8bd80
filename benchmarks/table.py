"""A Markdown table from pytest-benchmark's JSON: ``python benchmarks/table.py results.json [another.json …]``.

One row a group; the median time of its first contender, and those of the others as multiples of it.
"""

import json
import sys
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


if __name__ == "__main__":
    print("\n\n".join(table(json.loads(Path(path).read_text())) for path in sys.argv[1:]))
