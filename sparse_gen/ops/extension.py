"""The compiled library: where it is, whether it loaded, how it was built."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

_INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled kernels are there; `reason` says why not, `build` how they were built."""

    available: bool
    reason: str | None = None
    build: dict = field(default_factory=dict)

    @property
    def instruction_set(self) -> str | None:
        """The instruction set in use now; `SPARSE_GEN_ISA` asks for a lower one."""
        if not self.available:
            return None
        return _INSTRUCTION_SETS[torch.ops.sparse_gen.instruction_set()]


def _read_build_record() -> dict:
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@cache
def status() -> ExtensionStatus:
    """Load the compiled library, once, and say how that went.

    Returns:
        `ExtensionStatus`; a missing library is not an error, the references take its place.
    """
    build = _read_build_record()
    name = build.get("library")
    if name is None:
        reason = build.get("reason") or "the package was never built: run `pip install -e .` in its source folder"
        return ExtensionStatus(False, reason, build)
    try:
        torch.ops.load_library(_PACKAGE / name)
    except OSError as error:
        first_line = str(error).splitlines()[0]
        return ExtensionStatus(False, f"{name} does not load into torch {torch.__version__}: {first_line}", build)
    return ExtensionStatus(True, None, build)


def library() -> Path | None:
    """The compiled library's file, None where there is none in use."""
    return _PACKAGE / status().build["library"] if status().available else None


@cache
def warn_without_extension() -> None:
    """Say once, at first use, that the references are doing the work."""
    if not status().available:
        warnings.warn(
            f"sparse-gen runs on its plain-PyTorch reference, which is slower: {status().reason}",
            RuntimeWarning,
            stacklevel=4,
        )
