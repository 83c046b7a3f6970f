"""The energy of an image's spectrum by frequency."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _membership(height: int, width: int, rings: int, device: torch.device) -> torch.Tensor:
    """(frequencies of rfft2, rings): how often each frequency of the whole spectrum counts in each ring."""
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    columns = torch.fft.rfftfreq(width, device=device)[None]
    # 1 at the Nyquist frequency along an axis; the corners beyond belong to the outermost ring.
    radius = 2 * (rows.square() + columns.square()).sqrt()
    ring = (radius * rings).long().clamp_max(rings - 1)
    conjugates = torch.full_like(radius, 2, dtype=torch.float64)
    conjugates[:, 0] = 1
    if width % 2 == 0:
        conjugates[:, -1] = 1
    return torch.nn.functional.one_hot(ring.flatten(), rings) * conjugates.flatten()[:, None]


def ring_energies(image: torch.Tensor, rings: int = 5) -> torch.Tensor:
    """The energy of an image's spectrum in rings of equal width around zero frequency.

    Args:
        image: (E, C, H, W), real; an output, or its difference from a target.
        rings: how many, from zero frequency to the Nyquist frequency of an axis (the last holds the corners too).

    Returns:
        (E, rings), summing over rings to the mean square of the image (Parseval), on the image's device.

    Chakrabarty & Maji, "The spectral bias of the deep image prior" (2019), section 3.
    """
    height, width = image.shape[-2:]
    # Double: a weak high ring would drown in the rounding of a sum that holds the mean.
    spectrum = torch.fft.rfft2(image.double(), norm="forward")
    energy = spectrum.real.square().add_(spectrum.imag.square()).mean(dim=1).flatten(1)
    return (energy @ _membership(height, width, rings, image.device)).to(image.dtype)
