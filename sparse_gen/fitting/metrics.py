"""How close an image is to the clean one."""

from __future__ import annotations

import torch


def psnr(image: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, over all channels and pixels jointly.

    Args:
        image, clean: (E, C, H, W), in [0, 1], not quantised.

    Returns:
        (E,) on the images' device; infinite where they are equal.

    Raises:
        ValueError: the shapes differ.
    """
    if image.shape[1:] != clean.shape[1:]:
        raise ValueError(f"expected two images of one shape, got {tuple(image.shape)} and {tuple(clean.shape)}")
    return -10 * (image - clean).square().mean(dim=(1, 2, 3)).log10()


def ssim(image: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Structural similarity, scikit-image's with its default 7×7 window (smaller on smaller images).

    Args:
        image, clean: (E, C, H, W) in [0, 1].

    Returns:
        (E,) float64 on the CPU.

    Raises:
        ValueError: the shapes differ, or the image has fewer than 3 pixels a side.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).
    """
    from skimage.metrics import structural_similarity

    if image.shape[1:] != clean.shape[1:]:
        raise ValueError(f"expected two images of one shape, got {tuple(image.shape)} and {tuple(clean.shape)}")
    side = min(image.shape[-2:])
    if side < 3:
        raise ValueError(f"expected an image of at least 3 pixels a side, got {side}")
    window = min(7, side - (side + 1) % 2)
    clean = clean.expand(len(image), *clean.shape[1:])
    pairs = zip(image.detach().cpu().double().numpy(), clean.detach().cpu().double().numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(a, b, win_size=window, channel_axis=0, data_range=1.0) for a, b in pairs]
    )
