"""The deep decoder and its variants: a generator without an encoder, fitted from a small input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from sparse_gen.generators.blocks import (
    Generator,
    check_channels,
    check_choice,
    check_odd,
    padded_convolution,
    per_scale,
)
from sparse_gen.generators.initialise import initialise
from sparse_gen.generators.sizes import check_size


class FixedUpsample(nn.Module):
    """×2 up-sampling as a transposed convolution with the fixed 4×4 kernel outer(1, 3, 3, 1) / 16.

    Inside the image this is bilinear up-sampling; the outermost row and column see zeros beyond the edge, where
    bilinear up-sampling repeats the edge. The kernel is a constant: it is neither trained, pruned nor stored.
    """

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(row, row) / 16, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


UPSAMPLE = {
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "fixed": FixedUpsample,
    "none": nn.Identity,
}


class _Block(nn.Module):
    """Convolution without bias, ×2 up-sampling (or none), ReLU, BN."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, upsample: str):
        super().__init__()
        self.conv = padded_convolution(in_channels, out_channels, kernel, bias=False)
        self.upsample = UPSAMPLE[upsample]()
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.upsample(self.conv(x))))


class DeepDecoder(Generator):
    """`depth` blocks that up-sample, one that does not, and a 1×1 head: 100,224 parameters by default.

    The whole spatial prior is the fixed up-sampling: with 1×1 kernels no weight sees two pixels. The parameters
    are listed from the deepest block out, the head last; no convolution has a bias.

    Args:
        in_channels: channels of the input z; by default the deepest width, as in the papers.
        out_channels: channels of the image, 1 to 4.
        channels: width of each scale, outermost first; the last block has the outermost width again.
        depth: number of up-sampling blocks; by default as many as there are widths. A larger depth repeats the
            last width.
        upsample: "bilinear", "nearest", "fixed" (see `FixedUpsample`), or "none", the control: the same blocks at
            the image's own size.
        kernel: kernel size of the blocks, odd, padded by reflection: 1 in the deep decoder, 3 in the variant that
            learns its filters.
        seed: of the initialisation, see `initialise`.

    Shapes:
        z (E, in_channels, H, W), any H and W that the depth allows, to an image (E, out_channels, H, W) in (0, 1).
        z has the image's size, as for every generator; of it the decoder takes every 2^depth-th row and column
        from the first, z[..., ::2^depth, ::2^depth] (all of z with "none"). A z of independent numbers thus gives
        the small input of the papers, ⌈H / 2^depth⌉ × ⌈W / 2^depth⌉; the output is cropped.

    Raises:
        ValueError: an argument is out of range; in the forward pass, the image is too small for the depth.

    Heckel and Hand, "Deep decoder" (ICLR 2019), section 2; Heckel and Soltanolkotabi, "Denoising and
    regularization via exploiting the structural bias of convolutional generators" (ICLR 2020).
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int = 3,
        *,
        channels: Sequence[int] = (128, 128, 128, 128, 128),
        depth: int | None = None,
        upsample: str = "bilinear",
        kernel: int = 1,
        seed: int = 0,
    ):
        depth = len(channels) if depth is None else depth
        check_channels(1 if in_channels is None else in_channels, out_channels, channels, depth)
        check_odd(kernel=kernel)
        check_choice("upsample", upsample, *UPSAMPLE)
        widths = per_scale(channels, depth)
        arguments = {
            "in_channels": widths[-1] if in_channels is None else in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "depth": depth,
            "upsample": upsample,
            "kernel": kernel,
            "seed": seed,
        }
        # One pixel, up-sampled, is a constant image; reflecting n pixels takes n + 1.
        levels = 0 if upsample == "none" else depth
        super().__init__(arguments, levels, max(2, kernel // 2 + 1))
        deepest_first = [self.in_channels, *reversed(widths)]
        self.blocks = nn.ModuleList(_Block(inner, outer, kernel, upsample) for inner, outer in pairwise(deepest_first))
        self.blocks.append(_Block(widths[0], widths[0], kernel, "none"))
        self.head = nn.Conv2d(widths[0], out_channels, 1, bias=False)
        initialise(self, seed)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        height, width = z.shape[-2:]
        check_size((height, width), self.depth, self.deepest_level)
        x = z[..., :: 2**self.depth, :: 2**self.depth]
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.head(x))[..., :height, :width]
