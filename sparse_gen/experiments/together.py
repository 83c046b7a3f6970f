"""Which experiments of a sweep run at the same time, as the experiments of one search and one fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparse_gen.experiments.plan import Experiment

if TYPE_CHECKING:
    from sparse_gen.masks.mask import Mask

# What experiments of one group may differ in.
_OWN = ("image", "image_sha256", "sigma", "seed")
# Other ways to find a mask run one experiment after the other anyway.
_KINDS = ("oes", "random", "dense")


def grouped(experiments: Mapping[str, Experiment], most: int) -> list[tuple[str, ...]]:
    """The keys in groups of up to `most`, in the order of their first.

    Experiments of a group have one architecture, image size, method and density. One that its stopping rule ends stays
    alone: in a group it would be trained on until the last one stops.
    """
    if most == 1:
        return [(key,) for key in experiments]
    shapes = _shapes({experiment.config.image for experiment in experiments.values()})
    open_groups: dict[str, list[str]] = {}
    groups: list[list[str]] = []
    for key, experiment in experiments.items():
        shape = shapes[experiment.config.image]
        together = experiment.kind in _KINDS and (experiment.run_on or experiment.config.stop == "none")
        if shape is None or not together:
            groups.append([key])
            continue
        settings = {name: value for name, value in experiment.config.plain().items() if name not in _OWN}
        kind = json.dumps([settings, experiment.kind, experiment.run_on, shape], sort_keys=True)
        group = open_groups.get(kind)
        if group is None or len(group) == most:
            group = open_groups[kind] = []
            groups.append(group)
        group.append(key)
    return [tuple(group) for group in groups]


def _shapes(images: set[str]) -> dict[str, tuple[int, ...] | None]:
    """(C, H, W) of each image; None where it cannot be read, which its experiment will tell."""
    from sparse_gen.experiments.images import read_image

    shapes: dict[str, tuple[int, ...] | None] = {}
    for image in images:
        try:
            shapes[image] = tuple(read_image(image).pixels.shape[1:])
        except (OSError, ValueError):
            shapes[image] = None
    return shapes


def stacked_masks(masks: Sequence[Mask]) -> Mask:
    """Masks of one network, without stored weights, as the experiments of one."""
    import torch

    from sparse_gen.masks.mask import Mask

    names = masks[0].tensors
    tensors = {name: torch.stack([mask.tensors[name] for mask in masks]) for name in names}
    return Mask(tensors, experiments=len(masks), whole=masks[0].whole)
