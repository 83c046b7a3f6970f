"""×2 up-sampling, nearest or bilinear, padding and a sparse convolution as one operator, by the tap fold.

Every tap is run as a 1×1 convolution on the *small* image, one plane an output channel and tap; the planes are then
up-sampled, shifted by their tap and added. That takes a quarter of the multiplications of the convolution on the large
image, at any density, and is exact. The gradients go the same way back: the output's gradient is first added up in the
tap planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sparse_gen.ops.convolution import (
    PADDING_MODES,
    UPSAMPLE,
    check_convolution,
    register_sparse_convolution,
    upsampled,
)
from sparse_gen.ops.sparse_conv2d import SparsePattern, sparse_conv2d_reference


@dataclass(frozen=True)
class TapPattern:
    """Which weights of a convolution are kept, grouped by output channel and tap.

    Attributes:
        pattern: the weights themselves, and their order by input channel.
        by_tap: (out · taps + 1,) int64, where each output channel's and tap's weights begin in `tap_order`.
        tap_order: (kept,) int64.
    """

    pattern: SparsePattern
    by_tap: torch.Tensor
    tap_order: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor) -> TapPattern:
        """The pattern of a bool mask (out, in, kernel height, kernel width).

        Raises:
            ValueError: the mask is no such tensor.
        """
        pattern = SparsePattern.of(mask)
        out_channels, _, kernel_h, kernel_w = pattern.shape
        output, _, ky, kx = pattern.taps.long()
        plane = (output * kernel_h + ky) * kernel_w + kx
        starts = F.pad(torch.bincount(plane, minlength=out_channels * kernel_h * kernel_w).cumsum(0), (1, 0))
        return cls(pattern, starts, plane.argsort(stable=True))


def sparse_upsample_conv2d_reference(
    x,
    values,
    bias,
    taps,
    by_tap,
    _tap_order,
    by_input,
    order,
    out_channels,
    kernel_h,
    kernel_w,
    padding,
    mode,
    upsample,
):
    large, pattern = upsampled(x, UPSAMPLE[upsample]), (taps, by_tap, by_input, order)
    return sparse_conv2d_reference(large, values, bias, *pattern, out_channels, kernel_h, kernel_w, 1, padding, mode)


def _fake(x, values, bias, taps, by_tap, tap_order, by_input, input_order, out_channels, *_):
    return x.new_empty(len(x), out_channels, 2 * x.shape[2], 2 * x.shape[3])


_run = register_sparse_convolution(
    "Tensor taps, Tensor by_tap, Tensor tap_order, Tensor by_input, Tensor input_order,"
    " int out_channels, int kernel_h, int kernel_w, int padding, int mode, int upsample",
    reference=sparse_upsample_conv2d_reference,
    fake=_fake,
    loads=True,
)


def sparse_upsample_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: TapPattern,
    bias: torch.Tensor | None = None,
    *,
    padding: int,
    padding_mode: str = "zeros",
    upsample: str = "nearest",
) -> torch.Tensor:
    """Convolve each experiment's image, up-sampled ×2, with its kept weights at stride 1.

    Args:
        x: (E, in, h, w), float32 or float64.
        values: (E, kept), in the order of `pattern.pattern.index`.
        pattern: which weights these are; the kernel is odd.
        bias: (E, out), or None.
        padding: of the up-sampled image, half the kernel's size rounded down, so that the output is twice as large
            as x.
        padding_mode: "zeros", "reflect" or "replicate".
        upsample: "nearest", "bilinear" or "bilinear_corners" (with the corners aligned).

    Returns:
        (E, out, 2 h, 2 w); differentiable in x, values and bias.

    Raises:
        ValueError: shapes, dtypes, devices, kernel, padding or up-sampling do not fit together.
    """
    _check(x, values, pattern.pattern, bias, padding, padding_mode, upsample)
    out_channels, _, kernel_h, kernel_w = pattern.pattern.shape
    return _run(
        x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous(),
        pattern.pattern.taps, pattern.by_tap, pattern.tap_order, pattern.pattern.by_input,
        pattern.pattern.input_order, out_channels, kernel_h, kernel_w, padding, PADDING_MODES.index(padding_mode),
        UPSAMPLE.index(upsample), None,
    )  # fmt: skip


def _check(x, values, pattern: SparsePattern, bias, padding, padding_mode, upsample) -> None:
    check_convolution(x, values, bias, pattern.shape, len(pattern.index), padding_mode)
    if upsample not in UPSAMPLE[1:]:
        raise ValueError(f"expected upsample out of {', '.join(UPSAMPLE[1:])}, got {upsample!r}")
    _, _, kernel_h, kernel_w = pattern.shape
    if kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h > 11 or padding != kernel_h // 2:
        raise ValueError(
            "expected a square odd kernel up to 11 and half its size as padding, got "
            f"{kernel_h}×{kernel_w} and {padding}"
        )
    if padding_mode == "reflect" and padding >= 2 * min(x.shape[2:]):
        raise ValueError(
            f"expected more than {padding} up-sampled pixels a side to reflect, got {2 * min(x.shape[2:])}"
        )
