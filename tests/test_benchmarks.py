"""``benchmarks/table.py``: what it makes of pytest-benchmark's JSON."""

import json
import runpy
import sys
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


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    monkeypatch.setattr(sys, "argv", [str(PATH), str(path)])
    runpy.run_path(str(PATH), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
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
