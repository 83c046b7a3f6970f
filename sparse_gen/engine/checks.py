"""Checks of what every public entry takes: an input z and an image y."""

from __future__ import annotations

import torch


def check_input(z: torch.Tensor, name: str = "z") -> None:
    """Raise ValueError unless z is a finite float tensor of shape (E, C, H, W)."""
    if not isinstance(z, torch.Tensor):
        raise ValueError(f"expected {name} as a tensor, got {type(z).__name__}")
    if z.ndim != 4 or 0 in z.shape:
        raise ValueError(f"expected {name} of shape (E, C, H, W), got {tuple(z.shape)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected {name} of float32 (or float64), got {z.dtype}, convert it with .float()")
    if not z.isfinite().all():
        raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")


# A measurement that was not clipped: σ is at most 1 and our normal numbers at most 5.3.
_UNCLIPPED = 5.5


def check_image(image: torch.Tensor, z: torch.Tensor, name: str = "image") -> None:
    """Raise ValueError unless the image is (E, C, H, W), C from 1 to 4, in [0, 1], of z's size and device."""
    _check_pair(image, z, name, 0.0)


def check_measurement(y: torch.Tensor, z: torch.Tensor) -> None:
    """The same for a measurement y, which noise may lead out of [0, 1]."""
    _check_pair(y, z, "y", _UNCLIPPED)


def _check_pair(image: torch.Tensor, z: torch.Tensor, name: str, beyond: float) -> None:
    check_input(image, name)
    if not 1 <= image.shape[1] <= 4:
        raise ValueError(f"expected {name} with 1 to 4 channels, got {image.shape[1]}")
    if image.shape[-2:] != z.shape[-2:]:
        raise ValueError(
            f"expected {name} and z of one size, got {image.shape[-2]}×{image.shape[-1]} and "
            f"{z.shape[-2]}×{z.shape[-1]}"
        )
    if len(image) != 1 and len(z) != 1 and len(image) != len(z):
        raise ValueError(f"expected as many experiments in {name} as in z, got {len(image)} and {len(z)}")
    if image.device != z.device or image.dtype != z.dtype:
        raise ValueError(f"expected {name} of {z.dtype} on {z.device} like z, got {image.dtype} on {image.device}")
    low, high = image.aminmax()
    if low < -beyond or high > 1 + beyond:
        raise ValueError(f"expected {name} in [0, 1], got values from {low:.3g} to {high:.3g}, scale it (8 bit: /255)")


def check_pixel_weight(weight: torch.Tensor, y: torch.Tensor) -> None:
    """Raise ValueError unless it can weight the squared errors to y, (E, C, H, W)."""
    fits = (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 4
        and all(own in (1, wanted) for own, wanted in zip(weight.shape, y.shape, strict=True))
    )
    if not fits:
        got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"expected pixel_weight as a tensor that broadcasts to {tuple(y.shape)}, got {got}")
    if weight.dtype != y.dtype or weight.device != y.device:
        raise ValueError(
            f"expected pixel_weight as {y.dtype} on {y.device} like y, got {weight.dtype} on {weight.device}"
        )
    if not (weight.isfinite().all() and (weight >= 0).all() and (weight > 0).any()):
        raise ValueError(
            "expected pixel_weight finite and from 0 on, above 0 somewhere, got values from "
            f"{weight.min().item():g} to {weight.max().item():g}"
        )


def check_output(output: torch.Tensor, y: torch.Tensor) -> None:
    """Raise ValueError if the network's output is not of the image's shape."""
    if output.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"expected y of the network's output shape (C, H, W) = {tuple(output.shape[1:])}, got {tuple(y.shape[1:])}"
        )


def check_count(value: int, name: str, minimum: int = 1) -> None:
    """Raise ValueError unless value is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"expected {name} as an integer of at least {minimum}, got {value!r}")


def check_positive(value: float, name: str) -> None:
    """Raise ValueError unless value is a finite number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"expected {name} above 0, got {value!r}")
