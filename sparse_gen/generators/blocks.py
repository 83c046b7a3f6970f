"""What the generators are made of, and what they check of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

NEGATIVE_SLOPE = 0.2


class Generator(nn.Module):
    """A network that turns a fixed input z into an image and can tell how to build it again.

    Attributes:
        in_channels: channels that z must have.
        depth: how often the size halves between the image and the deepest level.
        deepest_level: pixels a side that the deepest level needs.
    """

    def __init__(self, arguments: dict, depth: int, deepest_level: int):
        super().__init__()
        self._arguments = arguments
        self.in_channels = arguments["in_channels"]
        self.depth = depth
        self.deepest_level = deepest_level

    def recipe(self) -> dict:
        """The class and arguments that build this network again, initialisation included."""
        return {"class": type(self).__name__, "arguments": dict(self._arguments)}


def padded_convolution(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: str = "reflect", bias: bool = True
) -> nn.Sequential:
    """A convolution that keeps the size (divides it by the stride), its padding "reflect" or "zero"."""
    margin = kernel // 2
    if margin and padding == "reflect":
        pad = nn.ReflectionPad2d(margin)
        return nn.Sequential(pad, nn.Conv2d(in_channels, out_channels, kernel, stride, bias=bias))
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel, stride, padding=margin, bias=bias))


DOWNSAMPLE = {"stride": nn.Identity, "avg": lambda: nn.AvgPool2d(2), "max": lambda: nn.MaxPool2d(2)}


class Down(nn.Module):
    """Convolution with stride 2 or a 2×2 pool after it, BN, LeakyReLU, convolution, BN, LeakyReLU: half the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, downsample: str, padding: str = "reflect"):
        super().__init__()
        stride = 2 if downsample == "stride" else 1
        self.conv1 = padded_convolution(in_channels, out_channels, kernel, stride=stride, padding=padding)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = padded_convolution(out_channels, out_channels, kernel, padding=padding)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.pool = DOWNSAMPLE[downsample]()
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.pool(self.conv1(x))))
        return self.act(self.norm2(self.conv2(x)))


class SkipConnection(nn.Module):
    """1×1 convolution, BN, LeakyReLU: what a scale passes to the decoder beside the deeper scales."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Up(nn.Module):
    """×2 up-sampling, [concatenation,] BN, convolution, BN, LeakyReLU[, 1×1 convolution, BN, LeakyReLU].

    The skip connection's channels come after the up-sampled ones, or before them with `skip_first`.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        kernel: int,
        mode: str,
        *,
        padding: str = "reflect",
        pointwise: bool = False,
        skip_first: bool = False,
    ):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode=mode)
        self.norm1 = nn.BatchNorm2d(in_channels + skip_channels)
        self.conv = padded_convolution(in_channels + skip_channels, out_channels, kernel, padding=padding)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.pointwise = nn.Conv2d(out_channels, out_channels, 1) if pointwise else None
        self.norm3 = nn.BatchNorm2d(out_channels) if pointwise else None
        self.skip_first = skip_first

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        x = self.upsample(x)
        if skip is not None:
            x = torch.cat([skip, x] if self.skip_first else [x, skip], dim=1)
        x = self.act(self.norm2(self.conv(self.norm1(x))))
        return x if self.pointwise is None else self.act(self.norm3(self.pointwise(x)))


def per_scale(values: Sequence[int], depth: int) -> list[int]:
    """One value a scale: the first `depth` of them, the last repeated where there are fewer."""
    return [*values, *[values[-1]] * depth][:depth]


def deepest_level(down_kernel: int, up_kernel: int, padding: str = "reflect") -> int:
    """Pixels a side that the deepest level of an encoder and decoder needs.

    Two, since the normalisation of a single pixel is undefined; and reflecting n pixels takes n + 1. The
    decoder's first convolution sees the level up-sampled.
    """
    if padding == "zero":
        return 2
    return max(2, down_kernel // 2 + 1, (up_kernel // 2 + 2) // 2)


def check_channels(in_channels: int, out_channels: int, channels: Sequence[int], depth: int) -> None:
    """Raise ValueError unless there are 1 to 4 channels out, at least one of every other kind, and a scale."""
    if in_channels < 1:
        raise ValueError(f"expected in_channels of at least 1, got {in_channels}")
    if not 1 <= out_channels <= 4:
        raise ValueError(f"expected out_channels from 1 to 4, got {out_channels}")
    if not channels or min(channels) < 1:
        raise ValueError(f"expected channels as one or more positive widths, got {channels!r}")
    if depth < 1:
        raise ValueError(f"expected a depth of at least 1, got {depth}")


def check_odd(**kernels: int) -> None:
    """Raise ValueError unless every kernel size is odd."""
    for name, kernel in kernels.items():
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd {name}, got {kernel}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"expected {name} {', '.join(most)} or {last}, got {value!r}")
