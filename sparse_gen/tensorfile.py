"""Files of tensors with a JSON header and a checksum: what masks and checkpoints are stored in.

A file is safetensors, so reading one executes nothing. Its metadata holds a format name and a "header" of plain
data with a version and the SHA-256 of all tensors, which finds a flipped bit that would otherwise be a valid value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_bytes

from sparse_gen.files import atomic_write


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
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
    stamped = {**header, "version": version, "sha256": _checksum(on_cpu)}
    content = to_bytes(on_cpu, {"format": f"sparse-gen {kind}", "header": json.dumps(stamped)})
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
    try:
        # Maps the file and checks its sizes before any tensor is made: a false length allocates nothing.
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"sparse-gen {kind}":
                raise ValueError(f"{expected}, a safetensors file of something else")
            header = json.loads(metadata["header"])
            if header["version"] != version:
                raise ValueError(f"{expected} of version {header['version']}, this release reads version {version}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["sha256"] != _checksum(tensors):
                raise ValueError(f"{expected}, whose checksum is wrong: the file is damaged, fetch it again")
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else (str(error) or "?").splitlines()[0]
        raise ValueError(f"{expected}, which is damaged ({reason}), fetch it again") from None
    return header, tensors
