"""The hourglass of Optimal Eye Surgeon: an encoder and a decoder without (or with) skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from sparse_gen.generators.initialise import initialise
from sparse_gen.generators.sizes import DEEPEST_LEVEL, check_size, extend_by_reflection

NEGATIVE_SLOPE = 0.2


def _padded_convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    pad = [nn.ReflectionPad2d(kernel // 2)] if kernel > 1 else []
    return nn.Sequential(*pad, nn.Conv2d(in_channels, out_channels, kernel))


class _Down(nn.Module):
    """Convolution, 2×2 average pool, BN, LeakyReLU, convolution, BN, LeakyReLU: half the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.conv1 = _padded_convolution(in_channels, out_channels, kernel)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _padded_convolution(out_channels, out_channels, kernel)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(2)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.pool(self.conv1(x))))
        return self.act(self.norm2(self.conv2(x)))


class _Skip(nn.Module):
    """1×1 convolution, BN, LeakyReLU: what a scale passes to the decoder beside the deeper scales."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class _Up(nn.Module):
    """×2 up-sampling, [concatenation,] BN, convolution, BN, LeakyReLU: twice the size."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, kernel: int, mode: str):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode=mode)
        self.norm1 = nn.BatchNorm2d(in_channels + skip_channels)
        self.conv = _padded_convolution(in_channels + skip_channels, out_channels, kernel)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        x = self.upsample(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.act(self.norm2(self.conv(self.norm1(x))))


class Hourglass(nn.Module):
    """Encoder and decoder over several scales; 3,008,867 parameters by default.

    The parameters are listed from the outermost scale in, then along the decoder from the deepest scale out,
    the head last: the order of the masks that the authors published.

    Args:
        in_channels: channels of the input z.
        out_channels: channels of the image, 1 to 4.
        channels: width of each scale, outermost first; the decoder mirrors them.
        depth: number of scales; by default as many as there are widths. A larger depth repeats the last width.
        down_kernel: kernel size of the encoder, odd.
        up_kernel: kernel size of the decoder, odd.
        upsample: "nearest" or "bilinear".
        skip_channels: channels of the 1×1 skip connection of each scale; 0 for none.
        seed: of the initialisation, see `initialise`.

    Shapes:
        z (E, in_channels, H, W), any H and W that the depth allows, to an image (E, out_channels, H, W) in (0, 1).
        Inside, z is extended by reflection to the next multiple of 2^depth and the output cropped.

    Raises:
        ValueError: an argument is out of range; in the forward pass, the image is too small for the depth.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), appendix; batch statistics are those of the one image.
    """

    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int = 3,
        *,
        channels: Sequence[int] = (16, 32, 64, 128, 128, 128),
        depth: int | None = None,
        down_kernel: int = 5,
        up_kernel: int = 3,
        upsample: str = "nearest",
        skip_channels: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        depth = len(channels) if depth is None else depth
        _check(in_channels, out_channels, channels, depth, down_kernel, up_kernel, upsample, skip_channels)
        self._arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "depth": depth,
            "down_kernel": down_kernel,
            "up_kernel": up_kernel,
            "upsample": upsample,
            "skip_channels": skip_channels,
            "seed": seed,
        }
        self.depth = depth
        self.deepest_level = max(DEEPEST_LEVEL, down_kernel // 2 + 1)
        widths = [*channels, *[channels[-1]] * depth][:depth]
        scales = list(pairwise([in_channels, *widths]))
        self.encoder = nn.ModuleList(_Down(outer, inner, down_kernel) for outer, inner in scales)
        self.skips = nn.ModuleList(_Skip(outer, skip_channels) for outer, _ in scales if skip_channels)
        deepest_first = [widths[-1], *reversed(widths)]
        self.decoder = nn.ModuleList(
            _Up(inner, skip_channels, outer, up_kernel, upsample) for inner, outer in pairwise(deepest_first)
        )
        self.head = nn.Conv2d(widths[0], out_channels, 1)
        initialise(self, seed)

    def recipe(self) -> dict:
        """The class and arguments that build this network again, initialisation included."""
        return {"class": type(self).__name__, "arguments": dict(self._arguments)}

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        height, width = z.shape[-2:]
        check_size((height, width), self.depth, self.deepest_level)
        x = extend_by_reflection(z, self.depth)
        outer = []
        for down in self.encoder:
            outer.append(x)
            x = down(x)
        for scale, up in zip(reversed(range(self.depth)), self.decoder, strict=True):
            x = up(x, self.skips[scale](outer[scale]) if self.skips else None)
        return torch.sigmoid(self.head(x))[..., :height, :width]


def _check(in_channels, out_channels, channels, depth, down_kernel, up_kernel, upsample, skip_channels):
    if in_channels < 1:
        raise ValueError(f"expected in_channels of at least 1, got {in_channels}")
    if not 1 <= out_channels <= 4:
        raise ValueError(f"expected out_channels from 1 to 4, got {out_channels}")
    if not channels or min(channels) < 1:
        raise ValueError(f"expected channels as one or more positive widths, got {channels!r}")
    if depth < 1:
        raise ValueError(f"expected a depth of at least 1, got {depth}")
    for name, kernel in {"down_kernel": down_kernel, "up_kernel": up_kernel}.items():
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd {name}, got {kernel}")
    if upsample not in ("nearest", "bilinear"):
        raise ValueError(f"expected upsample 'nearest' or 'bilinear', got {upsample!r}")
    if skip_channels < 0:
        raise ValueError(f"expected skip_channels of at least 0, got {skip_channels}")
