"""Files that are either complete or absent: written beside their name, then renamed into place."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes its name only once everything in it has reached the disk.

    What stood at `path` stays untouched until the block ends, and stays for good if the block
    raises; a reader never sees half a file.

    Args:
        path: the final name. A symbolic link is followed, its target replaced.
        mode: `"wb"` for bytes, `"w"` for UTF-8 text with `\\n` line ends.

    Raises:
        ValueError: for another mode.
        OSError: if the folder is missing or read-only, the disk full, or `path` a folder.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'mode: expected "wb" or "w", got {mode!r}, use one of the two')
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"expected a file name to write to, got the folder {target}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    # os.open and not tempfile: mkstemp makes 0600 files, and the rename would keep that.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` as indented JSON, without NaN and infinities: JSON has no word for them.

    Raises:
        ValueError: if a value is not finite.
        OSError: as `atomic_write`.
    """
    text = json.dumps(data, indent=2, allow_nan=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def write_yaml(path: str | os.PathLike[str], data: Mapping[str, Any], heading: str = "") -> None:
    """Write `data` as YAML in the order of its keys, below `heading` as a comment.

    Raises:
        OSError: as `atomic_write`.
    """
    import yaml

    text = yaml.safe_dump(dict(data), sort_keys=False, default_flow_style=None, allow_unicode=True)
    with atomic_write(path, "w") as file:
        if heading:
            file.write(f"# {heading}\n")
        file.write(text)


def claim_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Make the folder a run will write to, and find out now, not after the run, if it cannot.

    Args:
        path: made with its parents where it is missing.
        overwrite: whether a folder that already holds files may be used.

    Returns:
        The folder.

    Raises:
        FileExistsError: if `path` is a file, or holds files and `overwrite` is not given.
        OSError: if the folder cannot be made or written to.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: expected a folder, got the file {folder}, name another")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise FileExistsError(
            f"output: expected a new or empty folder, got {folder} with files in it, name another or add --overwrite"
        )
    probe = folder / f".writable.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output: expected a folder that can be written to, got {folder} ({error.strerror}), name another"
        ) from None
    return folder


def claim_file(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Find out now, not after the run, if the file it is to write cannot be written; nothing is left behind.

    Args:
        path: the file; its folder is made where it is missing.
        overwrite: whether a file that is there may be replaced.

    Returns:
        The path.

    Raises:
        FileExistsError: if the file is there and `overwrite` is not given.
        OSError: if it is a folder, or its folder cannot be made or written to.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"output: expected the name of a file, got the folder {file}, name a file in it")
    if file.exists() and not overwrite:
        raise FileExistsError(f"output: expected a new file, got {file}, name another or add --overwrite")
    claim_folder(file.parent, overwrite=True)
    return file


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends without it


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; systems that cannot open a folder need no such thing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
