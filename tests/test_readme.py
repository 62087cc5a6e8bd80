"""The documents' code runs, and their commands are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_code():
    assert BLOCKS


def test_links_and_pictures_are_there():
    for document in (ROOT / "README.md", *ROOT.glob("tp_kernels/ops/*/README.md"), ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name} points to {target}"
