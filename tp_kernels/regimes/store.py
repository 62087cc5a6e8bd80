"""The run folder: one line of JSON for each finished measurement, safe against interruption at any point."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tp_kernels._json import finite

RECORDS = "records.jsonl"


def key_of(spec: Mapping[str, Any]) -> str:
    """Canonical JSON: equal specs give equal keys, whatever the order of their entries.

    >>> key_of({"b": 1, "a": [2]})
    '{"a":[2],"b":1}'
    """
    return json.dumps(spec, sort_keys=True, separators=(",", ":"))


class Store:
    """Records of one run folder.

    A record is appended, flushed and synced as soon as it is finished, after those that another run has appended in
    the meantime. Of two records with one key the later one holds. A last line without its end, left by a crash in the
    middle of a write, is not a record and is cut off.

    Args:
        folder: made with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RECORDS
        self.records: dict[str, dict] = {}
        self._whole = 0  # bytes up to the end of the last whole line that was read or written
        self._lines = 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                self._read(file)

    def _read(self, file: BinaryIO) -> None:
        """Go on where the last read or write ended."""
        file.seek(self._whole)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {self._lines + 1}: expected a JSON record with a 'key', got {line[:60]!r}"
                ) from error
            self._whole += len(line)
            self._lines += 1

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record through to the disk."""
        record = finite(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(record) + "\n").encode()
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            self._read(file)
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._lines += 1
        self.records[record["key"]] = record

    def has(self, key: str, environment: Mapping[str, Any]) -> bool:
        """Whether this was measured already, in this very environment: numbers of two machines do not mix."""
        record = self.records.get(key)
        return record is not None and record.get("environment") == finite(environment)
