"""``benchmarks/table.py``: what it makes of pytest-benchmark's JSON, and of the regime map's."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "table.py"
EXTRA = {"threads": 1, "device_name": "Box", "torch": "2.13", "isa": "v4", "revision": "abc"}


def bench(group: str, contender: str, median: float, **extra: object) -> dict:
    return {"group": group, "stats": {"median": median}, "extra_info": {**EXTRA, "contender": contender, **extra}}


RESULTS = {
    "datetime": "2026-11-24T12:00:00",
    "benchmarks": [
        bench("n=4", "ours", 0.001),
        bench("n=4", "torch", 0.002),
        bench("n=8", "ours", 0.004),
        bench("n=8", "torch", 0.006),
        bench("n=8", "slow", 0.4),
        bench("forward", "ours", 0.5, T=3, N=2, B=1, operations=4e9, peak_flops=1e10),
    ],
}


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """The lines that the script prints of these results, under these options."""

    def run(results: dict, *options: str) -> list[str]:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results))
        monkeypatch.setattr(sys, "argv", [str(PATH), *options, str(path)])
        runpy.run_path(str(PATH), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_table(lines: Callable[..., list[str]]) -> None:
    assert lines(RESULTS) == [
        "Box · 1 thread · torch 2.13 · instruction set v4 · revision abc · 2026-11-24",
        "",
        "| | ours, ms | torch | slow |",
        "|---|---:|---:|---:|",
        "| n=4 | 1 | 2.00 | – |",
        "| n=8 | 4 | 1.50 | 100.00 |",
        "",
        "| | ms | of peak |",
        "|---|---:|---:|",
        "| forward T=3 N=2 B=1 | 500 | 80% |",
    ]


def test_ratios(lines: Callable[..., list[str]]) -> None:
    times = {("tp", 4, 8): 3.0, ("bp", 4, 8): 2.0, ("tp", 4, 16): 5.0, ("bp", 4, 16): None, ("tp", 9, 16): 1.0}
    times |= {("bp", 9, 16): 4.0, ("eager", 4, 8): 1.0}
    records = [{"contender": name, "T": T, "B": 1, "N": N, "median_s": time} for (name, T, N), time in times.items()]
    assert lines({"records": records}, "--ratio", "tp", "bp") == [
        "| tp / bp | N = 8 | N = 16 |",
        "|---|---:|---:|",
        "| T = 4, B = 1 | 1.50 | – |",
        "| T = 9, B = 1 | – | 0.25 |",
    ]
