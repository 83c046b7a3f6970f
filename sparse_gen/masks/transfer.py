"""A mask found for one image and initialisation, used for another."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.stack import initial_weights, template
from sparse_gen.masks.connectivity import DisconnectedMaskWarning, probe_connectivity
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.search import network_recipe

WEIGHTS = ("keep", "reinitialise")
WIDTHS = ("same", "tile")
# What belongs to the place where a mask was found, not to how.
_PLACE = ("net", "z", "noise", "image_sha256", "target", "transfer")


def transfer(
    mask: Mask,
    net: nn.Module,
    *,
    weights: str,
    width: str = "same",
    z: torch.Tensor | None = None,
    recipe: dict[str, Any] | None = None,
) -> Mask:
    """Move a mask to another image, size, noise, initialisation or width.

    Args:
        mask: as it was found, or moved before.
        net: the network that it is to mask, or a `stack` of as many as the mask has experiments. Size, noise and image
            are no part of it.
        weights: "keep" trains (mask, θ_in), the weights that the mask holds; "reinitialise" trains the network's own.
            The two are different claims, so there is no default.
        width: "same" takes a network of the same shapes only; "tile" fits the channels of any width by repeating or
            cutting off the mask's: channel c takes after channel c modulo as many as there were.
        z: (E, C, H, W), to find out whether the moved mask lets a signal through; None does not look.
        recipe: what is new about z, noise and image, as plain data; it replaces the mask's own entries.

    Returns:
        A mask of the network, holding the weights to train from. Its recipe tells what was kept and, under
        "transfer", where it comes from.

    Raises:
        ValueError: shapes differ and `width` or `weights` does not allow it, both of which are named; or weights are to
            be kept that the mask does not hold.

    Warns:
        DisconnectedMaskWarning: the moved mask cuts the network.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), section 3.3, whose code moves the mask to fresh weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"expected weights as one of {', '.join(WEIGHTS)}, got {weights!r}")
    if width not in WIDTHS:
        raise ValueError(f"expected width as one of {', '.join(WIDTHS)}, got {width!r}")
    one = template(net)
    layout = ParameterLayout.of(one)
    initial = initial_weights(net, layout)
    if len(initial) not in (1, mask.experiments):
        raise ValueError(f"expected a stack of {mask.experiments} networks (or one), got {len(initial)}")
    same = _check_shapes(mask, layout, width)
    if weights == "keep" and mask.weights is None:
        raise ValueError("expected a mask that holds its weights, got one without, use weights='reinitialise'")
    if weights == "keep" and not same:
        raise ValueError(
            "expected weights='reinitialise' for another width, got 'keep': the initialisation depends on the width"
        )

    tensors = {n: tiled(keep, layout.shapes[n], mask.has_experiment_axis) for n, keep in mask.tensors.items()}
    whole = {name: tuple(layout.shapes[name]) for name in mask.whole}
    experiments = mask.experiments if mask.has_experiment_axis else None
    values = dict(mask.weights) if weights == "keep" else _kept(layout.views(initial), tensors, whole, mask.experiments)
    place = {name: mask.recipe[name] for name in _PLACE if name in mask.recipe}
    moved = {
        **mask.recipe,
        **({} if weights == "keep" else network_recipe(net)),
        **(recipe or {}),
        "transfer": {"weights": weights, "width": width, "from": place},
    }
    result = Mask(tensors, experiments=experiments, whole=whole, weights=values, recipe=moved)
    if z is not None:
        _warn_if_cut(one, result, z)
    return result


def tiled(keep: torch.Tensor, shape: tuple[int, ...], has_experiment_axis: bool = False) -> torch.Tensor:
    """`keep` with its channels repeated or cut off until it has the shape; channel c is channel c modulo as before."""
    first = 1 if has_experiment_axis else 0
    for dim, length in enumerate(shape, start=first):
        if keep.shape[dim] != length:
            keep = keep.index_select(dim, torch.arange(length, device=keep.device) % keep.shape[dim])
    return keep


def _check_shapes(mask: Mask, layout: ParameterLayout, width: str) -> bool:
    """Whether all shapes are the network's; a ValueError unless they can be made so."""
    shapes = {layer.name: layer.shape for layer in mask.layers()}
    wanted = {name: tuple(shape) for name, shape in layout.shapes.items()}
    for name in [*shapes, *wanted]:
        if name not in shapes or name not in wanted:
            lacking = "mask" if name in wanted else "network"
            raise ValueError(
                f"expected a mask of the same layers, got {name} {shapes.get(name) or wanted[name]}, which the "
                f"{lacking} lacks: a mask moves to another width, not to another depth or kind of network"
            )
    for name, shape in shapes.items():
        if shape == wanted[name]:
            continue
        if len(shape) != len(wanted[name]) or shape[2:] != wanted[name][2:]:
            raise ValueError(f"expected a mask of the same kernels, got {name} of {shape} for {wanted[name]}")
        if width == "same":
            raise ValueError(
                f"expected a mask of this network, whose {name} is {wanted[name]}, got {shape}, "
                "use width='tile' to repeat or cut off its channels"
            )
    return shapes == wanted


def _kept(initial: dict[str, torch.Tensor], tensors, whole, experiments: int) -> dict[str, torch.Tensor]:
    kept = {}
    for name, values in initial.items():
        rows = values.expand(experiments, *values.shape[1:])
        kept[name] = rows.flatten().clone() if name in whole else rows[tensors[name].view(rows.shape)]
    return {name: values.cpu() for name, values in kept.items()}


def _warn_if_cut(network: nn.Module, mask: Mask, z: torch.Tensor) -> None:
    values = {name: tensor.to(z) for name, tensor in mask.dense_weights(network).items()}
    found = probe_connectivity(training_copy(network), values, z)
    if not found.connected:
        warnings.warn(
            f"the moved mask disconnects the network at {found.disconnected_at}: its output is constant and cannot be "
            "trained",
            DisconnectedMaskWarning,
            stacklevel=3,
        )
