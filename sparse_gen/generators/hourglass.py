"""The hourglass of Optimal Eye Surgeon: an encoder and a decoder without (or with) skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from sparse_gen.generators.blocks import (
    Down,
    Generator,
    SkipConnection,
    Up,
    check_channels,
    check_choice,
    check_odd,
    deepest_level,
    per_scale,
)
from sparse_gen.generators.initialise import initialise
from sparse_gen.generators.sizes import DEEPEST_LEVEL, check_size, extend_by_reflection


class Hourglass(Generator):
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
        depth = len(channels) if depth is None else depth
        check_channels(in_channels, out_channels, channels, depth)
        check_odd(down_kernel=down_kernel, up_kernel=up_kernel)
        check_choice("upsample", upsample, "nearest", "bilinear")
        if skip_channels < 0:
            raise ValueError(f"expected skip_channels of at least 0, got {skip_channels}")
        arguments = {
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
        super().__init__(arguments, depth, max(DEEPEST_LEVEL, deepest_level(down_kernel, up_kernel)))
        widths = per_scale(channels, depth)
        scales = list(pairwise([in_channels, *widths]))
        self.encoder = nn.ModuleList(Down(outer, inner, down_kernel, "avg") for outer, inner in scales)
        self.skips = nn.ModuleList(SkipConnection(outer, skip_channels) for outer, _ in scales if skip_channels)
        deepest_first = [widths[-1], *reversed(widths)]
        self.decoder = nn.ModuleList(
            Up(inner, skip_channels, outer, up_kernel, upsample) for inner, outer in pairwise(deepest_first)
        )
        self.head = nn.Conv2d(widths[0], out_channels, 1)
        initialise(self, seed)

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
