"""The file of a mask: safetensors, masks as packed bits, kept weights as they are, and a checksum.

Tensors "mask/<parameter>" hold the bits row-major (numpy.packbits), "weight/<parameter>" the kept initial
weights. The metadata's "header" is JSON: shapes, experiments, whole parameters, recipe, and the SHA-256 of all
tensors, which finds a flipped bit that would otherwise be a valid mask.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sparse_gen.files import atomic_write
from sparse_gen.masks.mask import Mask

FORMAT = "sparse-gen mask"
VERSION = 1


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(mask: Mask, path: str | PathLike) -> None:
    tensors = {}
    for name, keep in mask.tensors.items():
        tensors[f"mask/{name}"] = torch.from_numpy(np.packbits(keep.cpu().numpy()))
    for name, values in (mask.weights or {}).items():
        tensors[f"weight/{name}"] = values.detach().cpu().contiguous()
    header = {
        "version": VERSION,
        "shapes": {name: list(keep.shape) for name, keep in mask.tensors.items()},
        "whole": {name: list(shape) for name, shape in mask.whole.items()},
        "experiments": mask.experiments if mask.has_experiment_axis else None,
        "weights": mask.weights is not None,
        "recipe": mask.recipe,
        "sha256": _checksum(tensors),
    }
    content = save_tensors(tensors, {"format": FORMAT, "header": json.dumps(header)})
    with atomic_write(path) as file:
        file.write(content)


def load(path: str | PathLike) -> Mask:
    content = Path(path).read_bytes()
    try:
        header, tensors = _read(content)
        masks = {name: _unpack(tensors[f"mask/{name}"], shape) for name, shape in header["shapes"].items()}
        weights = None
        if header["weights"]:
            weights = {name: tensors[f"weight/{name}"] for name in [*header["shapes"], *header["whole"]]}
        return Mask(
            masks,
            experiments=header["experiments"],
            whole=header["whole"],
            weights=weights,
            recipe=header["recipe"],
        )
    except (KeyError, TypeError, AttributeError, ValueError, safetensors.SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(f"expected a mask file of sparse-gen, got {path}: {reason}") from None


def _read(content: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = load_tensors(content)
    # The library offers metadata of a file only, not of bytes: the header is eight bytes of length and JSON.
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError("it is a safetensors file of something else")
    header = json.loads(metadata["header"])
    if header["version"] != VERSION:
        raise ValueError(f"its version is {header['version']}, this release reads version {VERSION}")
    if header["sha256"] != _checksum(tensors):
        raise ValueError("its checksum is wrong, the file is damaged")
    return header, tensors


def _unpack(bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if bits.dtype != torch.uint8 or bits.numel() != (prod(shape) + 7) // 8:
        raise ValueError(f"{bits.numel()} bytes of bits do not make a mask of shape {tuple(shape)}")
    keep = np.unpackbits(bits.numpy(), count=prod(shape)).astype(bool)
    return torch.from_numpy(keep).view(shape)
