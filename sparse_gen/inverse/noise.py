"""Additive Gaussian noise, the measurement of denoising."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_gen.engine.checks import check_image
from sparse_gen.ops.philox import Stream, normal, seed_tensor


def add_noise(image: torch.Tensor, sigma: float, *, seed: int | Sequence[int] = 0, clip: bool = True) -> torch.Tensor:
    """Add seeded Gaussian noise.

    Args:
        image: (E, C, H, W) in [0, 1].
        sigma: standard deviation on the same scale, 0 to 1.
        seed: one seed (experiments then share their noise), or one an experiment.
        clip: whether to clip to [0, 1], as the papers do.

    Returns:
        The noisy image, of the image's shape.

    Raises:
        ValueError: sigma or a seed is out of range.
    """
    check_image(image, image, "image")
    if not 0 <= sigma <= 1:
        hint = f", did you mean {sigma:g}/255?" if 1 < sigma <= 255 else ""
        raise ValueError(f"expected sigma from 0 to 1, on the image's own scale, got {sigma}{hint}")
    seeds = seed_tensor(seed, image.device)
    numbers = normal(seeds, 0, Stream.NOISE, image[0].numel()).view(-1, *image.shape[1:])
    noisy = image + sigma * numbers.to(image.dtype)
    return noisy.clamp(0, 1) if clip else noisy
