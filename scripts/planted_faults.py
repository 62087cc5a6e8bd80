"""Does a test catch what it should? Plants the faults of ``planted_faults.toml`` one by one and runs the test of each.

    python scripts/planted_faults.py                  # all: some seconds each
    python scripts/planted_faults.py --only 'check-*' # by name or pattern; may be given several times
    python scripts/planted_faults.py --list

Works on a copy of the package and the tests in a temporary folder. First all of these tests have to pass as things are.
Exit status 1: a fault was not caught, or could not be planted as its code is not there any more.
"""

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
TABLE = Path(__file__).with_suffix(".toml")
COPIED = ("tp_kernels", "tests", "conftest.py", "pyproject.toml")
PASSED, FAILED = 0, 1  # of pytest; anything else is no verdict


@dataclass(frozen=True)
class Fault:
    """``code`` in ``file``, a path in tp_kernels/, becomes ``fault``; ``test`` is what pytest is given."""

    name: str
    file: str
    code: str
    fault: str
    test: str

    def planted(self, folder: Path) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the code is not there exactly once.
        """
        text = (folder / "tp_kernels" / self.file).read_text()
        count = text.count(self.code)
        if count != 1:
            raise ValueError(f"its code is {count} times in tp_kernels/{self.file}, expected once")
        return text.replace(self.code, self.fault)


def faults() -> list[Fault]:
    return [Fault(name, **entry) for name, entry in tomllib.loads(TABLE.read_text()).items()]


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """In the copy, whose package comes first on the path."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "--no-header")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def verdict(fault: Fault, folder: Path) -> str:
    """ "caught", or why not."""
    path = folder / "tp_kernels" / fault.file
    sound = path.read_text()
    try:
        path.write_text(fault.planted(folder))
        ran = run_tests(folder, fault.test)
    except ValueError as error:
        return f"NOT PLANTED: {error}"
    finally:
        path.write_text(sound)
    if ran.returncode == FAILED:
        return "caught"
    if ran.returncode == PASSED:
        return f"NOT CAUGHT by {fault.test}"
    return f"NO VERDICT: pytest ended with {ran.returncode}: {(ran.stdout + ran.stderr).strip()[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a name, or a pattern such as 'check-*'")
    parser.add_argument("--list", action="store_true", help="name, file and test of each, and run nothing")
    args = parser.parse_args()
    every = faults()
    for pattern in args.only or ():
        if not any(fnmatch.fnmatchcase(fault.name, pattern) for fault in every):
            parser.error(f"--only: no fault is named {pattern!r}; --list has all names")
    chosen = [
        fault
        for fault in every
        if args.only is None or any(fnmatch.fnmatchcase(fault.name, pattern) for pattern in args.only)
    ]
    if args.list:
        for fault in chosen:
            print(f"{fault.name}: tp_kernels/{fault.file}: {fault.test}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            source, target = ROOT / part, folder / part
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
        ran = run_tests(folder, *dict.fromkeys(fault.test for fault in chosen))
        if ran.returncode != PASSED:
            print(ran.stdout + ran.stderr, "planted_faults: the tests have to pass without a fault", sep="\n")
            return 1
        missed = 0
        for number, fault in enumerate(chosen, 1):
            start = time.perf_counter()
            said = verdict(fault, folder)
            missed += said != "caught"
            seconds = time.perf_counter() - start
            print(f"[{number}/{len(chosen)}] {fault.name}: {said} ({seconds:.0f} s)", flush=True)
    print(f"planted_faults: {len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
