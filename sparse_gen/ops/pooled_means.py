"""The mean of every 2×2 window of a padded image, at stride 1.

What the pool fold puts in front of a convolution: avgpool₂(conv(pad(x))) is the convolution with stride 2 of these
means, a quarter of the multiplications. The operator can read the image through a load (`norm_load`); its gradient is
then that of the loaded image.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES
from sparse_gen.ops.dispatch import LIBRARY, register_operator
from sparse_gen.ops.norm_load import apply_load_reference


def pooled_means_reference(x, load, padding, mode):
    x = x if load is None else apply_load_reference(x, load)
    padded = F.pad(x, [padding] * 4, mode=TORCH_MODES[mode]) if padding else x
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return 0.25 * (rows[..., 1:] + rows[..., :-1])


def pooled_means_backward_reference(grad_means, padding, mode):
    height, width = (length + 1 - 2 * padding for length in grad_means.shape[2:])
    with torch.enable_grad():
        x = grad_means.new_zeros(*grad_means.shape[:2], height, width).requires_grad_()
        (grad_x,) = torch.autograd.grad(pooled_means_reference(x, None, padding, mode), x, grad_means)
    return grad_x


register_operator(
    "pooled_means(Tensor x, Tensor? load, int padding, int mode) -> Tensor",
    reference=pooled_means_reference,
    fake=lambda x, load, padding, mode: x.new_empty(
        *x.shape[:2], x.shape[2] + 2 * padding - 1, x.shape[3] + 2 * padding - 1
    ),
)
register_operator(
    "pooled_means_backward(Tensor grad_means, int padding, int mode) -> Tensor",
    reference=pooled_means_backward_reference,
    fake=lambda g, padding, mode: g.new_empty(*g.shape[:2], g.shape[2] + 1 - 2 * padding, g.shape[3] + 1 - 2 * padding),
)


def _setup_context(ctx, inputs, output):
    _, _, ctx.padding, ctx.mode = inputs


def _autograd_backward(ctx, grad_means):
    return torch.ops.sparse_gen.pooled_means_backward(grad_means.contiguous(), ctx.padding, ctx.mode), None, None, None


torch.library.register_autograd(
    "sparse_gen::pooled_means", _autograd_backward, setup_context=_setup_context, lib=LIBRARY
)


def pooled_means(x: torch.Tensor, *, padding: int = 0, padding_mode: str = "zeros") -> torch.Tensor:
    """The 2×2 means, at stride 1, of each experiment's padded image.

    Args:
        x: (E, C, H, W), float32 or float64.
        padding: pixels added on every side, 0 and up; reflection needs more pixels than that.
        padding_mode: "zeros", "reflect" or "replicate".

    Returns:
        (E, C, H + 2 · padding − 1, W + 2 · padding − 1); differentiable in x.

    Raises:
        ValueError: x is no such tensor, or the padding does not fit it.
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64) or 0 in x.shape:
        raise ValueError(f"expected x of shape (E, C, H, W), float32 or float64, got {tuple(x.shape)} of {x.dtype}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"expected padding_mode out of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    if padding < 0:
        raise ValueError(f"expected a padding from 0 on, got {padding}")
    height, width = x.shape[2:]
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(f"expected more than {padding} pixels a side to reflect, got {height}×{width}")
    if min(height, width) + 2 * padding < 2:
        raise ValueError(f"expected a padded image of at least 2×2, got {height}×{width} and a padding of {padding}")
    return torch.ops.sparse_gen.pooled_means(x.contiguous(), None, padding, PADDING_MODES.index(padding_mode))
