"""Convolution of a dense (soft-masked) weight with the resampling around it folded in.

    out = [2×2 average pool] · conv, weight and stride · pad · [up-sample ×2] · x       for each experiment by itself

A pool becomes the stride of a convolution of 2×2 means, a quarter of the multiplications. Behind nearest ×2
up-sampling, every tap is a 1×1 convolution on the small image (layout "taps": 9 multiplications a small pixel for 3×3
instead of 36), or the four phases of the output are 2×2 convolutions with summed taps (layout "phase": 16).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES, check_convolution, register_sparse_convolution
from sparse_gen.ops.dispatch import LIBRARY, register_operator
from sparse_gen.ops.masked_conv2d_layouts import LAYOUTS, UPSAMPLE, layout_for, why_not

_ARGUMENTS = "int stride, int padding, int mode, int upsample, bool pool, int layout"


def masked_conv2d_reference(x, weight, bias, stride, padding, mode, upsample, pool, _layout):
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode=UPSAMPLE[upsample])
    padded = F.pad(x, [padding] * 4, mode=TORCH_MODES[mode]) if padding else x
    own_bias = [None] * len(x) if bias is None else bias
    convolved = torch.cat([F.conv2d(padded[e : e + 1], weight[e], own_bias[e], stride=stride) for e in range(len(x))])
    return F.avg_pool2d(convolved, 2) if pool else convolved


def output_size(length: int, kernel: int, stride: int, padding: int, upsample: int, pool: bool) -> int:
    convolved = (length * (2 if upsample else 1) + 2 * padding - kernel) // stride + 1
    return convolved // 2 if pool else convolved


def _fake(x, weight, bias, stride, padding, _mode, upsample, pool, _layout):
    _, out_channels, _, kernel_h, kernel_w = weight.shape
    height = output_size(x.shape[2], kernel_h, stride, padding, upsample, pool)
    width = output_size(x.shape[3], kernel_w, stride, padding, upsample, pool)
    return x.new_empty(len(x), out_channels, height, width)


register_sparse_convolution(_ARGUMENTS, reference=masked_conv2d_reference, fake=_fake)


def masked_conv2d_forward(x, weight, bias, stride=1, padding=0, mode=0, upsample=0, pool=False, layout=0):
    """The forward pass without checks and without autograd, for callers that keep their own tape.

    Args:
        x, weight, bias: as in `masked_conv2d`, contiguous, weight and bias with their leading E.
        stride, padding, pool: as there.
        mode, upsample, layout: places in PADDING_MODES, UPSAMPLE and LAYOUTS.
    """
    run = layout_for(x, weight, stride, padding, mode, upsample, pool, layout)
    return run.forward(x, weight, bias, stride, padding, mode, upsample, pool)


def masked_conv2d_backward(
    grad_out, x, weight, stride, padding, mode, upsample, pool, layout, needs_grad_x, needs_grad_weight
):
    """The gradients by x and weight, each an empty tensor where not needed; arguments as in `masked_conv2d_forward`.

    That by the bias is the sum of `grad_out` over its last two axes.
    """
    if not (needs_grad_x or needs_grad_weight):
        return x.new_empty(0), x.new_empty(0)
    run = layout_for(x, weight, stride, padding, mode, upsample, pool, layout)
    return run.backward(grad_out, x, weight, stride, padding, mode, upsample, pool, needs_grad_x, needs_grad_weight)


def _loaded_reference(x, weight, bias, *arguments):
    return masked_conv2d_reference(x, weight, bias, *arguments, 0)


# For a GPU, whose kernel reads through a load on the way.
register_sparse_convolution(
    "int stride, int padding, int mode, int upsample, bool pool",
    reference=_loaded_reference,
    fake=lambda *given: _fake(*given, 0),
    loads=True,
    name="masked_conv2d_loaded",
)


def _taps_reference(x, weight, bias, padding, mode, bilinear):
    return masked_conv2d_reference(x, weight, bias, 1, padding, mode, 2 if bilinear else 1, False, 0)


def _tiles_reference(x, weight, bias, stride, padding, mode, pool):
    return masked_conv2d_reference(x, weight, bias, stride, padding, mode, 0, pool, 0)


# Layouts as compiled, and on AMX tiles; without the library, the reference.
for _name in ("taps", "split_taps"):
    register_sparse_convolution(
        "int padding, int mode, bool bilinear",
        reference=_taps_reference,
        fake=lambda x, weight, *_: x.new_empty(len(x), weight.shape[1], 2 * x.shape[2], 2 * x.shape[3]),
        name=f"masked_conv2d_{_name}",
    )
for _name in ("tiles", "split"):
    register_sparse_convolution(
        "int stride, int padding, int mode, bool pool",
        reference=_tiles_reference,
        fake=lambda x, weight, bias, stride, padding, mode, pool: _fake(
            x, weight, bias, stride, padding, mode, 0, pool, 0
        ),
        name=f"masked_conv2d_{_name}",
    )
# What "split" makes of an image, kept for one that stays the same: the operator reads it instead. The reference has no
# use for it.
register_operator(
    "masked_conv2d_split_parts(Tensor x, int kernel_h, int kernel_w, int stride, int padding, int mode, bool pool)"
    " -> Tensor",
    reference=lambda x, *_: x.new_empty(len(x), 0, dtype=torch.uint8),
    fake=lambda x, *_: x.new_empty(len(x), torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8),
    stem="masked_conv2d",
)
register_sparse_convolution(
    "Tensor parts, int stride, int padding, int mode, bool pool",
    reference=lambda x, weight, bias, _, *arguments: _tiles_reference(x, weight, bias, *arguments),
    fake=lambda x, weight, bias, _, stride, padding, mode, pool: _fake(
        x, weight, bias, stride, padding, mode, 0, pool, 0
    ),
    name="masked_conv2d_split_kept",
)
LIBRARY.impl("masked_conv2d", masked_conv2d_forward, "CPU")
LIBRARY.impl("masked_conv2d_backward", masked_conv2d_backward, "CPU")


def masked_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    padding_mode: str = "zeros",
    upsample: str | None = None,
    pool: bool = False,
    layout: str = "auto",
) -> torch.Tensor:
    """Convolve each experiment's image, up-sampled before and pooled after where asked for.

    Args:
        x: (E, in, H, W), float32 or float64.
        weight: (E, out, in, kernel height, kernel width), or without E: shared by all experiments.
        bias: (E, out), (out,), or None.
        stride: 1 or 2.
        padding: pixels added on every side of the (up-sampled) image; reflection needs more pixels than that.
        padding_mode: "zeros", "reflect" or "replicate".
        upsample: ×2 before the padding: None, "nearest" or "bilinear" (corners not aligned).
        pool: whether the output is averaged over 2×2 windows, an odd last row or column left out.
        layout: how it is computed: "auto", or or one out of LAYOUTS that can do it.

    Returns:
        (E, out, H', W'); differentiable in x, weight and bias.

    Raises:
        ValueError: shapes, dtypes, devices, the padding or the layout do not fit together.
    """
    if weight.ndim == 4:
        weight = weight.expand(len(x), *weight.shape)
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(len(x), -1)
    _check(x, weight, bias, stride, padding, padding_mode, upsample, pool, layout)
    mode, scale, layout_index = PADDING_MODES.index(padding_mode), UPSAMPLE.index(upsample), LAYOUTS.index(layout)
    reason = why_not(layout, weight.shape, stride, padding, mode, scale, pool)
    if reason:
        raise ValueError(f"expected a layout that fits, got {layout!r}, which is for {reason}")
    return torch.ops.sparse_gen.masked_conv2d(
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(),
        stride, padding, mode, scale, pool, layout_index,
    )  # fmt: skip


def _check(x, weight, bias, stride, padding, padding_mode, upsample, pool, layout) -> None:
    if weight.ndim != 5 or 0 in weight.shape or len(weight) != len(x):
        raise ValueError(
            f"expected weight of shape (out, in, kh, kw), or with E = {len(x)} in front, got {tuple(weight.shape)}"
        )
    check_convolution(x, None, bias, weight.shape[1:], 0, padding_mode)
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"expected weight of {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}")
    if stride not in (1, 2) or padding < 0:
        raise ValueError(f"expected stride 1 or 2 and padding from 0 on, got {stride} and {padding}")
    for name, given, known in (("upsample", upsample, UPSAMPLE), ("layout", layout, LAYOUTS)):
        if given not in known:
            raise ValueError(f"expected {name} out of {', '.join(map(str, known))}, got {given!r}")
    height, width = (length * (2 if upsample else 1) for length in x.shape[2:])
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(f"expected more than {padding} pixels a side to reflect, got {height}×{width}")
    sizes = [
        output_size(length, kernel, stride, padding, 0, pool)
        for length, kernel in zip((height, width), weight.shape[3:], strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"expected an output of at least one pixel, got {sizes[0]}×{sizes[1]} from {height}×{width} pixels, a "
            f"kernel of {weight.shape[3]}×{weight.shape[4]}, padding {padding}, stride {stride} and pool {pool}"
        )
