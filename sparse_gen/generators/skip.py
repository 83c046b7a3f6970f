"""The encoder and decoder with skip connections of the deep image prior and the lottery image prior."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from sparse_gen.generators.blocks import (
    DOWNSAMPLE,
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
from sparse_gen.generators.sizes import check_size, extend_by_reflection


class _Scale(nn.Module):
    """What a scale passes down, and what it passes to the decoder (None without a skip connection)."""

    def __init__(self, outer: int, inner: int, skip_channels: int, kernel: int, downsample: str, padding: str):
        super().__init__()
        self.skip = SkipConnection(outer, skip_channels) if skip_channels else None
        self.down = Down(outer, inner, kernel, downsample, padding)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        beside = None if self.skip is None else self.skip(x)
        return self.down(x), beside


class Skip(Generator):
    """Encoder and decoder with a narrow skip connection at every scale; 2,217,831 parameters by default.

    The defaults are the lottery image prior's. The parameters are listed from the outermost scale in, each scale's
    skip connection first, then along the decoder from the deepest scale out, the head last: the order of the
    authors' `skip`, which also concatenates the skip connection's channels first.

    Args:
        in_channels: channels of the input z.
        out_channels: channels of the image, 1 to 4.
        channels: width of each scale, outermost first; the decoder mirrors them.
        depth: number of scales; by default as many as there are widths. A larger depth repeats the last width.
        skip_channels: channels of the 1×1 skip connections: one number, or one a scale, outermost first, the last
            repeated; 0 for none.
        down_kernel: kernel size of the encoder, odd.
        up_kernel: kernel size of the decoder, odd.
        downsample: "stride" (of each scale's first convolution), or "avg" or "max", a 2×2 pool after it.
        upsample: "nearest" or "bilinear".
        padding: "reflect" or "zero".
        need_1x1_up: a 1×1 convolution, BN and LeakyReLU after each scale of the decoder.
        seed: of the initialisation, see `initialise`.

    Shapes:
        z (E, in_channels, H, W), any H and W that the depth allows, to an image (E, out_channels, H, W) in (0, 1).
        Inside, z is extended by reflection to the next multiple of 2^depth and the output cropped.

    Raises:
        ValueError: an argument is out of range; in the forward pass, the image is too small for the depth.

    Ulyanov et al., "Deep image prior" (CVPR 2018), supplementary material; "Chasing better deep image priors between
    over- and under-parameterization" (TMLR 2023). Batch statistics are those of the one image.
    """

    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int = 3,
        *,
        channels: Sequence[int] = (128, 128, 128, 128, 128),
        depth: int | None = None,
        skip_channels: int | Sequence[int] = 4,
        down_kernel: int = 3,
        up_kernel: int = 3,
        downsample: str = "stride",
        upsample: str = "bilinear",
        padding: str = "reflect",
        need_1x1_up: bool = True,
        seed: int = 0,
    ):
        depth = len(channels) if depth is None else depth
        skips = [skip_channels] if isinstance(skip_channels, int) else list(skip_channels)
        check_channels(in_channels, out_channels, channels, depth)
        check_odd(down_kernel=down_kernel, up_kernel=up_kernel)
        check_choice("downsample", downsample, *DOWNSAMPLE)
        check_choice("upsample", upsample, "nearest", "bilinear")
        check_choice("padding", padding, "reflect", "zero")
        if not skips or min(skips) < 0:
            raise ValueError(f"expected skip_channels of at least 0, one number or one a scale, got {skip_channels!r}")
        arguments = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "depth": depth,
            "skip_channels": skip_channels if isinstance(skip_channels, int) else skips,
            "down_kernel": down_kernel,
            "up_kernel": up_kernel,
            "downsample": downsample,
            "upsample": upsample,
            "padding": padding,
            "need_1x1_up": need_1x1_up,
            "seed": seed,
        }
        super().__init__(arguments, depth, deepest_level(down_kernel, up_kernel, padding))
        widths, skips = per_scale(channels, depth), per_scale(skips, depth)
        self.encoder = nn.ModuleList(
            _Scale(outer, inner, skip, down_kernel, downsample, padding)
            for (outer, inner), skip in zip(pairwise([in_channels, *widths]), skips, strict=True)
        )
        deepest_first = [widths[-1], *reversed(widths)]
        self.decoder = nn.ModuleList(
            Up(inner, skip, outer, up_kernel, upsample, padding=padding, pointwise=need_1x1_up, skip_first=True)
            for (inner, outer), skip in zip(pairwise(deepest_first), reversed(skips), strict=True)
        )
        self.head = nn.Conv2d(widths[0], out_channels, 1)
        initialise(self, seed)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        height, width = z.shape[-2:]
        check_size((height, width), self.depth, self.deepest_level)
        x = extend_by_reflection(z, self.depth)
        passed = []
        for scale in self.encoder:
            x, beside = scale(x)
            passed.append(beside)
        for up in self.decoder:
            x = up(x, passed.pop())
        return torch.sigmoid(self.head(x))[..., :height, :width]
