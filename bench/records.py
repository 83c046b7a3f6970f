"""Files of results that several processes may add to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_gen.files import atomic_write


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def add(path: Path, record: dict, place: Callable[[dict], tuple]) -> None:
    """Put a record where its place has it among those that are there by now, instead of one of the same place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        others = [other for other in load(path) if place(other) != place(record)]
        with atomic_write(path, "w") as file:
            json.dump(sorted([*others, record], key=place), file, indent=1)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of all processes one at a time; the folder itself is locked, the file in it is replaced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
