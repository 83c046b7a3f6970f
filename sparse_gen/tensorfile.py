"""Files of tensors with a JSON header and a checksum: what masks and checkpoints are stored in.

A file is safetensors, so reading one executes nothing. Its metadata has one entry, since the library writes several in
random order and equal files should have equal bytes: under the format's name the SHA-256 of header and tensors, which
finds a flipped bit that would otherwise be a valid value, and the header, plain data with a version, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_bytes

from sparse_gen.files import atomic_write


def _checksum(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor], *, kind: str, version: int, header: dict
) -> None:
    """Write a file of tensors, whole or not at all.

    Args:
        path: its name.
        tensors: copied to the CPU.
        kind: the format's name, which `read_tensors` asks for again.
        version: of the format.
        header: plain data, whatever JSON takes.

    Raises:
        OSError: the file cannot be written; what stood there is left.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**header, "version": version})
    content = to_bytes(on_cpu, {f"sparse-gen {kind}": f"{_checksum(text, on_cpu)} {text}"})
    with atomic_write(path) as file:
        file.write(content)


def read_tensors(path: str | PathLike, *, kind: str, version: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a file that `write_tensors` wrote.

    Returns:
        The header and the tensors, on the CPU.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is of another kind or version, or damaged.
    """
    expected = f"expected a sparse-gen {kind} file, got {path}"
    if not Path(path).exists():
        raise FileNotFoundError(f"{expected}, which is not there, check the name")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{expected}, which is a folder, name a file in it")
    if not Path(path).is_file():
        raise ValueError(f"{expected}, which is a device or a pipe, save it as a file first")
    damaged = ValueError(f"{expected}, which is cut off or damaged, fetch it again")
    try:
        # Maps the file and checks its sizes before any tensor is made: a false length allocates nothing.
        with safetensors.safe_open(path, "pt") as file:
            stamped = (file.metadata() or {}).get(f"sparse-gen {kind}")
            tensors = {} if stamped is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum, _, text = (stamped or "").partition(" ")
            sound = checksum == _checksum(text, tensors)
    except (OSError, MemoryError):
        raise
    # Besides SafetensorError, what torch raises for types and shapes that it does not have.
    except Exception:
        raise damaged from None
    if stamped is None:
        raise ValueError(f"{expected}, a safetensors file of something else, name another")
    header = _parse(text)
    if not isinstance(header, dict):
        raise damaged
    if header.get("version") != version:
        found = reprlib.repr(header.get("version"))
        raise ValueError(f"{expected} of version {found}, install the release that wrote it: this one reads {version}")
    if not sound:
        raise ValueError(f"{expected}, whose checksum is wrong: the file is damaged, fetch it again")
    return header, tensors


def _parse(text: str) -> object:
    """JSON's value, or None where the text is none: Python refuses huge numbers and deep nesting in its own way."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
