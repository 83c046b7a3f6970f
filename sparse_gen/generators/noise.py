"""The fixed random input z of a generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_gen.ops.philox import Stream, seed_tensor, uniform


def noise_input(
    channels: int,
    size: tuple[int, int],
    *,
    seed: int | Sequence[int] = 0,
    scale: float = 0.1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw a generator's fixed input from U(0, scale).

    Args:
        channels: number of channels.
        size: height and width in pixels, those of the image.
        seed: one seed, or one an experiment.
        scale: upper end of the distribution, above 0; 0.1 in the papers.
        device: where to put it; the numbers do not depend on it.

    Returns:
        z of shape (E, channels, height, width), float32.

    Raises:
        ValueError: a size, the scale or a seed is out of range.

    Ulyanov et al., "Deep image prior" (CVPR 2018), section 2; Ghosh et al., "Optimal Eye Surgeon" (ICML 2024).
    """
    height, width = size
    if min(channels, height, width) < 1:
        raise ValueError(f"expected at least one channel and pixel, got channels={channels}, size={height}×{width}")
    if not scale > 0:
        raise ValueError(f"expected a scale above 0, got {scale}")
    seeds = seed_tensor(seed, device)
    return (uniform(seeds, 0, Stream.Z, channels * height * width) * scale).view(-1, channels, height, width)
