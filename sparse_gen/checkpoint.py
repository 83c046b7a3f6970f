"""Checkpoints of a running search or fit, so that a kill at any moment loses at most a few seconds."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from sparse_gen.history import History
from sparse_gen.ops.extension import status
from sparse_gen.tensorfile import read_tensors, write_tensors

VERSION = 2  # 2: Adam's state of a compiled generator is one tensor for all experiments
KEPT = 2
_PART = "part-"


class RunInterrupted(Exception):
    """A run was asked to stop, and has stored where it was."""


class OtherRunError(ValueError):
    """A checkpoint is of a run that differs from the one that is to be resumed."""


class _Stop:
    """Whether to stop, shared by a run and its parts."""

    requested = False


class Checkpoints:
    """The folder in which a run stores where it is.

    Args:
        folder: made if missing. A search and a fit may share it; another run may not.
        seconds: at most this long between two checkpoints.
        resume: go on from the newest sound checkpoint in the folder, if there is one.

    Files are written under another name, synced and renamed, and the last two are kept: should the newest be torn,
    the one before it serves. A checkpoint knows what bits depend on (settings, seeds, inputs, threads, instruction
    set, torch version), and a run that differs in any of them is refused.
    """

    def __init__(self, folder: str | PathLike, *, seconds: float = 60.0, resume: bool = False):
        if not seconds >= 0:
            raise ValueError(f"expected the seconds between checkpoints from 0 on, got {seconds}")
        self.folder, self.seconds, self.resume = Path(folder), seconds, resume
        self._stop = _Stop()
        self._saved_at = self._began_at = time.monotonic()
        self._seconds_before: dict[str, float] = {}

    def request_stop(self) -> None:
        """Ask the run to store where it is and to raise `RunInterrupted`; safe to call in a signal handler."""
        self._stop.requested = True

    def seconds_before(self, name: str) -> float:
        """What earlier sessions spent on the steps that a "search" or "fit" resumed from; 0 before it is loaded."""
        return self._seconds_before.get(name, 0.0)

    def newest(self) -> tuple[str, int] | None:
        """The stage, "search" or "fit", and the number of its steps that are stored; None where nothing is."""
        for name in ("fit", "search"):
            for path in self._newest_first(name):
                return name, int(path.stem.rsplit("-", 1)[1])
        return None

    def load(self, name: str, identity: Mapping[str, Any]) -> tuple[int, dict[str, torch.Tensor], History] | None:
        """The newest sound state of the run, or None where there is none or none is wanted.

        Args:
            name: "search" or "fit".
            identity: everything besides the environment that the run's bits depend on, as plain data.

        Raises:
            OtherRunError: the folder holds the state of a run that differs; the message says in what.
            OSError: the folder cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved_at = self._began_at = time.monotonic()
        if not self.resume:
            return None
        for path in self._newest_first(name):
            try:
                header, tensors = read_tensors(path, kind="checkpoint", version=VERSION)
                found = header["identity"] | header["environment"]
                step, columns = int(header["step"]), list(header["columns"])
                seconds = float(header.get("seconds", 0))
                history = History.restored(header["history_steps"], {c: tensors.pop(f"history/{c}") for c in columns})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                warnings.warn(f"{error}; the checkpoint before it is used, if any", RuntimeWarning, stacklevel=3)
                continue
            _check_same(found, {**_environment(), **identity}, path)  # other threads may also mean another plan
            self._seconds_before[name] = seconds
            return step, tensors, history
        return None

    def due(self, *, last: bool = False) -> bool:
        """Whether `store` would write now: it is time to, the run ends (`last`) or was asked to."""
        return last or self._stop.requested or time.monotonic() - self._saved_at >= self.seconds

    def store(
        self,
        name: str,
        identity: Mapping[str, Any],
        step: int,
        state: Callable[[], Mapping[str, torch.Tensor]],
        history: History,
        *,
        last: bool = False,
        due: bool = False,
    ) -> None:
        """Write a checkpoint if it is time to, the run ends or was asked to.

        Args:
            name: "search" or "fit".
            identity: as for `load`.
            step: how many steps are done.
            state: gives the tensors to store; called only if they are.
            history: recorded so far.
            last: the run is complete.
            due: it is time to, however long the last is ago.

        Raises:
            RunInterrupted: after writing, if `request_stop` was called and the run is not complete.
            OSError: the folder cannot be written; the checkpoints before stay.
        """
        if not (due or self.due(last=last)):
            return
        # Not made again: its disk may have been unmounted, and what is there now would be another one.
        if not self.folder.is_dir():
            raise FileNotFoundError(f"expected the folder {self.folder} to store the run in, which is gone")
        tensors = {**state(), **{f"history/{column}": history[column] for column in history.columns}}
        header = {
            "step": step,
            "seconds": self.seconds_before(name) + time.monotonic() - self._began_at,
            "identity": dict(identity),
            "environment": _environment(),
            "history_steps": history.step,
            "columns": list(history.columns),
        }
        path = self.folder / f"{name}-{step:09d}.safetensors"
        write_tensors(path, tensors, kind="checkpoint", version=VERSION, header=header)
        for old in self._newest_first(name)[KEPT:]:
            old.unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        if self._stop.requested and not last:
            raise RunInterrupted(f"stopped after step {step} of the {name}, which is stored in {self.folder}")

    def plan(self, name: str) -> Path:
        """Where the plan of a "search" or "fit" is kept, which the run needs to go on with the same bits."""
        return self.folder / f"plan-{name}.json"

    def part(self, name: str) -> Checkpoints:
        """Those of a part of the run, such as a round of a search, in a folder of its own in this one.

        Asking the whole run to stop stops its parts; clearing it clears them.
        """
        part = Checkpoints(self.folder / f"{_PART}{name}", seconds=self.seconds, resume=self.resume)
        part._stop = self._stop
        return part

    def clear(self) -> None:
        """Delete the checkpoints of this folder: the run they belong to is complete."""
        for name in ("search", "fit"):
            for path in [*self._newest_first(name), self.plan(name)]:
                path.unlink(missing_ok=True)
        for folder in self.folder.glob(f"{_PART}*"):
            self.part(folder.name.removeprefix(_PART)).clear()
            with suppress(OSError):  # it may hold a file of the user's
                folder.rmdir()

    def _newest_first(self, name: str) -> list[Path]:
        pattern = re.compile(rf"{name}-\d{{9}}\.safetensors")
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if pattern.fullmatch(p.name)), reverse=True)


def fingerprint(*tensors: torch.Tensor) -> str:
    """The SHA-256 of tensors' bytes, as part of a run's identity."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _environment() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": status().instruction_set,
        "torch": torch.__version__,
    }


_ADVICE = {
    "threads": "call torch.set_num_threads (command line: --threads)",
    "instruction_set": "resume on a machine like the one that began it",
    "torch": "resume with the version that began it",
    "gpu": "resume on the card that began it",
}


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise OtherRunError(
                f"expected to resume the run of {path.parent}, which has {key} = {found.get(key)!r}, got "
                f"{wanted.get(key)!r}, {_ADVICE.get(key, 'use its settings or another folder')}"
            )
