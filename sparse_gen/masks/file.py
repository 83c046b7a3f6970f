"""The file of a mask: masks as packed bits, kept weights as they are, and a header.

Tensors "mask/<parameter>" hold the bits row-major (numpy.packbits), "weight/<parameter>" the kept initial weights and,
where they are wanted, "logits/<parameter>" the logits of the search. The header holds shapes, experiments, the
parameters kept whole, and the recipe.
"""

from __future__ import annotations

from math import prod
from os import PathLike
from textwrap import shorten

import numpy as np
import torch

from sparse_gen.masks.mask import Mask
from sparse_gen.tensorfile import read_tensors, write_tensors

VERSION = 1


def save(mask: Mask, path: str | PathLike) -> None:
    tensors = {}
    for name, keep in mask.tensors.items():
        tensors[f"mask/{name}"] = torch.from_numpy(np.packbits(keep.cpu().numpy()))
    for name, values in (mask.weights or {}).items():
        tensors[f"weight/{name}"] = values
    for name, values in (mask.logits or {}).items():
        tensors[f"logits/{name}"] = values
    header = {
        "shapes": {name: list(keep.shape) for name, keep in mask.tensors.items()},
        "whole": {name: list(shape) for name, shape in mask.whole.items()},
        "experiments": mask.experiments if mask.has_experiment_axis else None,
        "weights": mask.weights is not None,
        "logits": mask.logits is not None,
        "recipe": mask.recipe,
    }
    write_tensors(path, tensors, kind="mask", version=VERSION, header=header)


def load(path: str | PathLike) -> Mask:
    header, tensors = read_tensors(path, kind="mask", version=VERSION)
    try:
        shapes, whole = _shapes(header["shapes"]), _shapes(header["whole"])
        experiments, recipe = header["experiments"], header["recipe"]
        if not (experiments is None or type(experiments) is int):
            raise TypeError(f"{experiments!r} is no number of experiments")
        if not isinstance(recipe, dict):
            raise TypeError("the recipe is no mapping")
        masks = {name: _unpack(tensors[f"mask/{name}"], shape) for name, shape in shapes.items()}
        weights = {name: tensors[f"weight/{name}"] for name in [*shapes, *whole]} if header["weights"] else None
        # Files of before there were logits do not mention them.
        logits = {name: tensors[f"logits/{name}"] for name in shapes} if header.get("logits") else None
        return Mask(masks, experiments=experiments, whole=whole, weights=weights, logits=logits, recipe=recipe)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else shorten(str(error), 300)
        raise ValueError(f"expected a sparse-gen mask file, got {path}, whose content does not fit: {reason}") from None


def _shapes(listed: dict) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(shape) for name, shape in listed.items()}
    for name, shape in shapes.items():
        if not all(type(length) is int and length >= 1 for length in shape):
            raise ValueError(f"{shape} is no shape of {name}")
    return shapes


def _unpack(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    # Before anything is made from the shape: the bits, which are there, bound what is allocated.
    if bits.dtype != torch.uint8 or bits.ndim != 1 or len(bits) != (prod(shape) + 7) // 8:
        raise ValueError(f"{bits.numel()} bytes of bits make no mask of shape {shape}")
    keep = np.unpackbits(bits.numpy(), count=prod(shape)).astype(bool)
    return torch.from_numpy(keep).view(shape)
