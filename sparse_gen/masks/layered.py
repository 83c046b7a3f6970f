"""A random mask with the layer densities of a searched one, for whoever wants a realistic pattern without a search."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from sparse_gen.masks.mask import Mask

# Kept fraction of the encoder's 5×5 convolutions, outermost first, and the decoder's 3×3 convolutions, deepest first,
# in the OES authors' 5 % mask for the Baboon image.
ENCODER = [0.070, 0.023, 0.016, 0.011, 0.009, 0.008, 0.006, 0.005, 0.008, 0.013, 0.028, 0.063]
DECODER = [0.169, 0.185, 0.186, 0.168, 0.201, 0.350]
HEAD = 0.646


def layered_mask(net: nn.Module, density: float = 0.05, seed: int = 0) -> Mask:
    """Keep weights of an `Hourglass` at random, layer by layer in a searched mask's proportions.

    A network of fewer scales takes the outermost ones' densities. No layer keeps more than all of its weights; the
    others then make up for it. Biases and normalisation are kept whole.

    Args:
        net: the hourglass, of at most six scales.
        density: expected fraction of all parameters to keep, in (0, 1].
        seed: of the positions.

    Raises:
        ValueError: the density is out of range, or below what is kept whole.
    """
    if not 0 < density <= 1:
        raise ValueError(f"expected density above 0 and up to 1, got {density!r}")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    profile = _profile(net)
    whole = {name: shape for name, shape in shapes.items() if name not in profile}
    total, always = (sum(map(prod, some.values())) for some in (shapes, whole))
    if density * total <= always:
        raise ValueError(
            f"expected a density above {always / total:.2g}, which biases and normalisation take, got {density}"
        )
    count = {name: prod(shapes[name]) for name in profile}
    scale = _scale(profile, count, density * total - always)
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(shapes[name], generator=generator) < min(1, scale * profile[name]) for name in profile}
    return Mask(keep, whole=whole)


def _profile(net: nn.Module) -> dict[str, float]:
    kernels = [name for name, p in net.named_parameters() if p.ndim == 4]
    encoder = [name for name in kernels if name.startswith("encoder")]
    decoder = [name for name in kernels if name.startswith("decoder")]
    profile = dict(zip(encoder, ENCODER, strict=False))
    return profile | dict(zip(reversed(decoder), reversed(DECODER), strict=False)) | {"head.weight": HEAD}


def _scale(profile: dict[str, float], count: dict[str, int], wanted: float) -> float:
    """The factor by which all densities of the profile grow so that `wanted` weights are kept."""
    low, high = 0.0, 1 / min(profile.values())
    for _ in range(60):
        middle = (low + high) / 2
        kept = sum(count[name] * min(1, middle * d) for name, d in profile.items())
        low, high = (middle, high) if kept < wanted else (low, middle)
    return high
