"""Convolution with unstructured sparse weights: only the kept ones are multiplied, forward and backward.

    out[o, y, x] = bias[o] + Σ_k value[k] · pad(in)[i_k, stride · y + ky_k, stride · x + kx_k]   over the kept k of o

The gradient of the kept values is computed for these alone, that of the input as a gather over the same weights
grouped by input channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sparse_gen.ops.convolution import (
    PADDING_MODES,
    TORCH_MODES,
    check_convolution,
    check_padding,
    register_sparse_convolution,
)


@dataclass(frozen=True)
class SparsePattern:
    """Which weights of a convolution are kept, and their order by output and by input channel.

    Attributes:
        shape: of the dense weight, (out, in, kernel height, kernel width).
        stride: 1 or 2.
        index: (kept,) int64, ascending, places in the flat dense weight: the order of the values.
        taps: (4, kept) int32, the same as output channel, input channel, row and column of the kernel.
        by_output: (out + 1,) int64, where each output channel's weights begin.
        by_input: (in · stride² + 1,) int64, where those of each input channel and phase of the tap begin in
            `input_order`.
        input_order: (kept,) int64, the weights sorted that way.
    """

    shape: tuple[int, int, int, int]
    stride: int
    index: torch.Tensor
    taps: torch.Tensor
    by_output: torch.Tensor
    by_input: torch.Tensor
    input_order: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, stride: int = 1) -> SparsePattern:
        """The pattern of a bool mask.

        Args:
            mask: (out, in, kernel height, kernel width), True where kept; all-False channels are allowed.
            stride: 1 or 2.

        Raises:
            ValueError: the mask is no such tensor, or the stride neither 1 nor 2.
        """
        if mask.ndim != 4 or mask.dtype != torch.bool or 0 in mask.shape:
            raise ValueError(
                f"expected a bool mask of shape (out, in, kh, kw), got {tuple(mask.shape)} of {mask.dtype}"
            )
        if stride not in (1, 2):
            raise ValueError(f"expected stride 1 or 2, got {stride}")
        shape = tuple(mask.shape)
        output, channel, ky, kx = taps = mask.nonzero().T.contiguous()
        group = (channel * stride + ky % stride) * stride + kx % stride
        return cls(
            shape,
            stride,
            mask.flatten().nonzero()[:, 0],
            taps.to(torch.int32),
            _starts(output, shape[0]),
            _starts(group, shape[1] * stride**2),
            group.argsort(stable=True),
        )

    def over_phases(self) -> tuple[SparsePattern, torch.Tensor]:
        """What does on `phases` what this pattern does on the image, and which of this one's values each of its is."""
        kernel_h, kernel_w = self.shape[2:]
        number = torch.full(self.shape, -1, device=self.index.device)
        number.view(-1)[self.index] = torch.arange(len(self.index), device=self.index.device)
        number = F.pad(number, (0, -kernel_w % self.stride, 0, -kernel_h % self.stride), value=-1)
        number = F.pixel_unshuffle(number, self.stride)
        return SparsePattern.of(number >= 0), number[number >= 0]


def _starts(group: torch.Tensor, groups: int) -> torch.Tensor:
    return F.pad(torch.bincount(group, minlength=groups).cumsum(0), (1, 0))


def phases(padded: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """The rows and columns of each residue modulo the stride as channels of their own: stride 1 on these is the stride.

    Args:
        padded: (E, in, H, W), with its padding.
        pattern: of the convolution that is to read it.

    Returns:
        (E, in · stride², rows, columns), as much as the kernel sees. Rows begin at cache lines, so that `sparse_conv2d`
        may read them where they lie.
    """
    (experiments, channels, *size), stride = padded.shape, pattern.stride
    kernel = pattern.shape[2:]
    rows, columns = (
        _output_size(length, k, stride, 0) + (k - 1) // stride for length, k in zip(size, kernel, strict=True)
    )
    line = 64 // padded.element_size()
    planes = padded.new_zeros(experiments, channels, stride, stride, rows, -(-columns // line) * line)
    for row in range(stride):
        for column in range(stride):
            part = padded[..., row::stride, column::stride][..., :rows, :columns]
            planes[:, :, row, column, : part.shape[2], : part.shape[3]] = part
    return planes.flatten(1, 3)[..., :columns]


def flat_index(taps: torch.Tensor, in_channels: int, kernel_h: int, kernel_w: int) -> torch.Tensor:
    """Places in the flat dense weight of (4, kept) taps."""
    output, channel, ky, kx = taps.long()
    return ((output * in_channels + channel) * kernel_h + ky) * kernel_w + kx


def sparse_conv2d_reference(
    x, values, bias, taps, by_output, by_input, input_order, out_channels, kernel_h, kernel_w, stride, padding, mode
):
    index = flat_index(taps, x.shape[1], kernel_h, kernel_w)
    outputs = []
    for e in range(len(x)):
        weight = x.new_zeros(out_channels, x.shape[1], kernel_h, kernel_w).flatten()
        weight = weight.scatter(0, index, values[e]).view(out_channels, x.shape[1], kernel_h, kernel_w)
        padded = F.pad(x[e : e + 1], [padding] * 4, mode=TORCH_MODES[mode]) if padding else x[e : e + 1]
        outputs.append(F.conv2d(padded, weight, None if bias is None else bias[e], stride=stride))
    return torch.cat(outputs)


def _output_size(length: int, kernel: int, stride: int, padding: int) -> int:
    return (length + 2 * padding - kernel) // stride + 1


def _fake(x, values, bias, taps, by_output, by_input, order, out_channels, kernel_h, kernel_w, stride, padding, mode):
    height = _output_size(x.shape[2], kernel_h, stride, padding)
    return x.new_empty(len(x), out_channels, height, _output_size(x.shape[3], kernel_w, stride, padding))


_run = register_sparse_convolution(
    "Tensor taps, Tensor by_output, Tensor by_input, Tensor input_order,"
    " int out_channels, int kernel_h, int kernel_w, int stride, int padding, int mode",
    reference=sparse_conv2d_reference,
    fake=_fake,
    loads=True,
)


def sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: SparsePattern,
    bias: torch.Tensor | None = None,
    *,
    padding: int = 0,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Convolve each experiment's image with its kept weights.

    Args:
        x: (E, in, H, W), float32 or float64, contiguous.
        values: (E, kept), in the order of `pattern.index`.
        pattern: which weights these are; shared by all experiments.
        bias: (E, out), or None.
        padding: pixels added on every side, 0 and up; reflection needs more pixels than that.
        padding_mode: "zeros", "reflect" or "replicate".

    Returns:
        (E, out, H', W'), H' = ⌊(H + 2 · padding − kernel height) / stride⌋ + 1; differentiable in x, values, bias.

    Raises:
        ValueError: shapes, dtypes, devices or the padding do not fit together.
    """
    check_convolution(x, values, bias, pattern.shape, len(pattern.index), padding_mode)
    check_padding(x, pattern.shape, padding, padding_mode)
    out_channels, _, kernel_h, kernel_w = pattern.shape
    return _run(
        x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous(),
        pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order,
        out_channels, kernel_h, kernel_w, pattern.stride, padding, PADDING_MODES.index(padding_mode), None,
    )  # fmt: skip
