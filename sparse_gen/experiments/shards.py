"""Append-only files of results, one a process, and one table made of all of them.

A row is one line of JSON, synced before it counts. A process that is killed leaves at most one torn line, the last of
its own file, which nobody writes to again.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparse_gen.files import atomic_write, sync_folder

DONE, FAILED = "done", "failed"


def now() -> str:
    """The time for a row, which sorts as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


class Shard:
    """A process's own file of rows, made when the first comes; a context manager, or closed when the process ends."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: io.FileIO | None = None

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, which is on the disk when this returns.

        Raises:
            OSError: it cannot be written; rows before it are left.
            ValueError: a number in it is not finite.
        """
        line = json.dumps(dict(row), allow_nan=False).encode() + b"\n"
        if self._file is None:
            name = f"{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._file = open(self._folder / name, "xb", buffering=0)  # noqa: SIM115
            sync_folder(self._folder)
        if self._file.write(line) != len(line):
            raise OSError(28, "No space left on device", str(self._file.name))
        os.fsync(self._file.fileno())


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of all shards by key: of several for one key a done one counts, of failed ones the newest.

    A torn last line is left out. So is any other line that is damaged, with a warning: its experiment is done again.

    Raises:
        OSError: a shard cannot be read.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        *lines, _torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is None:
                warnings.warn(
                    f"expected rows of results, got line {number} of {path} damaged, its experiment is done again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif _rank(row) >= _rank(rows.get(row["key"])):
                rows[row["key"]] = row
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        sound = isinstance(row["key"], str) and row["status"] in (DONE, FAILED) and isinstance(row["time"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if sound else None


def _rank(row: Mapping[str, Any] | None) -> tuple[bool, str]:
    return (False, "") if row is None else (row["status"] == DONE, row["time"])


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV with the columns of all of them; None is empty, a list is JSON.

    Raises:
        OSError: as `sparse_gen.files.atomic_write`.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as Parquet with the columns of all of them.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: as `sparse_gen.files.atomic_write`.
    """
    import pyarrow
    import pyarrow.parquet

    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(table, file)
