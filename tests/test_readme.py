"""The documents' code runs, and their commands are there."""

import json
import re
from pathlib import Path

import pytest

from tp_kernels.regimes.__main__ import parser

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"
# A source distribution, which has a PKG-INFO, leaves the measurements of the findings out.
needs_results = pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="no measurements in a source distribution")


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_code():
    assert BLOCKS


DOCUMENTS = [
    document
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "tp_kernels/ops/*/*.md")
    for document in sorted(ROOT.glob(pattern))
]


@needs_results
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_and_pictures_are_there(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


FINDINGS = (ROOT / "docs" / "findings.md").read_text().replace("\\\n", " ")
RACES = re.findall(r"^    python -m tp_kernels\.regimes (race .*)$", FINDINGS, flags=re.MULTILINE)


@needs_results
@pytest.mark.parametrize("command", RACES, ids=lambda command: re.search(r"--out (\S+)", command)[1])
def test_commands_of_the_findings_are_those_of_the_records(command):
    arguments = parser().parse_args(command.split())
    records = json.loads((RESULTS / arguments.out / "results.json").read_text())["records"]
    finals = [record for record in records if record["phase"] == "final"]
    assert {record["contender"] for record in finals} == set(arguments.contenders)
    for name in ("task", "T"):
        assert {record[name] for record in finals} == set(getattr(arguments, name))
    defaults = {"initialization": "default", "optimizer": "adam", "schedule": "constant", "clipping": "together"}
    for name, value in (defaults | {"beta2": 0.999}).items():
        assert {record.get(name, value) for record in finals} == {getattr(arguments, name) or value}
    assert {record["max_steps"] for record in finals} == {arguments.steps}
    assert {record["seed"] for record in finals} == set(range(arguments.seeds or 3))
    searched = 0 if len(arguments.step_sizes or ()) == 1 else arguments.search_seeds or 1
    assert len({record["seed"] for record in records if record["phase"] == "search"}) == searched
