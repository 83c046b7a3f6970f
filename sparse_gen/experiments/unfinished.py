"""Runs that were interrupted: the folder that holds one, and whether it is the run that is asked for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_gen.experiments.config import DenoiseConfig, show
from sparse_gen.files import claim_folder

if TYPE_CHECKING:
    from sparse_gen.checkpoint import Checkpoints

FOLDER = "checkpoints"
# Among the checkpoints, and not beside results of an earlier run, which it would seem to belong to.
_SETTINGS = "config.yaml"
# Bits do not depend on it, and a run that ended with a disconnected mask can go on with it.
_MAY_DIFFER = ("force",)


def is_unfinished(output: Path) -> bool:
    """Whether a folder of results holds a run that can be resumed."""
    return (output / FOLDER / _SETTINGS).is_file()


def settings_of(output: Path) -> DenoiseConfig:
    """The settings of the unfinished run in a folder of results.

    Raises:
        ValueError: there is none, or its settings are damaged.
        OSError: they cannot be read.
    """
    if not is_unfinished(output):
        found = "a finished one" if (output / "metrics.json").is_file() else "none"
        raise ValueError(
            f"resume: expected a folder with an unfinished run, got {output} with {found}, "
            "name another or leave --resume out"
        )
    return DenoiseConfig.load(output / FOLDER / _SETTINGS)


def claim(output: Path, overwrite: bool, checkpoints: Checkpoints | None) -> Path:
    """`claim_folder` for a run that may be resumed.

    Raises:
        ValueError: there is nothing to resume.
        FileExistsError: the folder holds files, and neither `overwrite` nor to resume is asked for.
        OSError: as `claim_folder`.
    """
    if checkpoints is not None and checkpoints.resume:
        settings_of(output)
        return claim_folder(output, overwrite=True)
    if not overwrite and is_unfinished(output):
        raise FileExistsError(
            f"output: expected a new or empty folder, got {output} with an unfinished run in it, "
            "add --resume to go on with it or --overwrite to begin anew"
        )
    return claim_folder(output, overwrite)


def check_same(config: DenoiseConfig, output: Path) -> None:
    """Raise a ValueError that names every setting in which a run differs from the unfinished one in its folder."""
    stored, wanted = settings_of(output).plain(), config.plain()
    differing = [
        f"{name} = {show(wanted[name])} instead of {show(stored[name])}"
        for name in stored
        if name not in _MAY_DIFFER and stored[name] != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"resume: expected the settings of the run in {output}, got {', '.join(differing)}, "
            "leave them out or name another folder"
        )


def begin(config: DenoiseConfig, checkpoints: Checkpoints) -> None:
    """Store the settings before the first step.

    Raises:
        OSError: they cannot be written.
    """
    if not checkpoints.resume:
        checkpoints.clear()
    checkpoints.folder.mkdir(exist_ok=True)
    config.save(checkpoints.folder / _SETTINGS)


def finish(checkpoints: Checkpoints) -> None:
    """Remove the checkpoints of a run whose results are all written, with what a kill left half-written of them."""
    checkpoints.clear()
    (checkpoints.folder / _SETTINGS).unlink(missing_ok=True)
    for path in checkpoints.folder.glob(".*.part"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it may hold a file of the user's
        checkpoints.folder.rmdir()
