"""Batch normalisation by the image's own statistics and LeakyReLU, in one operator.

    y = LeakyReLU(gamma · (x − mean) / √(variance + eps) + beta),   mean and biased variance over each channel's image

Nothing but x is kept for the backward: normalised values and the activation's sign are found again from it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse_gen.ops.dispatch import LIBRARY, register_operator


def norm_act_reference(x, gamma, beta, eps, slope):
    mean = x.mean(dim=(2, 3))
    rstd = (x.var(dim=(2, 3), correction=0) + eps).rsqrt()
    z = (x - mean[..., None, None]) * (gamma * rstd)[..., None, None] + beta[..., None, None]
    return F.leaky_relu(z, slope), mean, rstd


def norm_act_backward_reference(grad_y, x, gamma, beta, mean, rstd, slope):
    normalised = (x - mean[..., None, None]) * rstd[..., None, None]
    z = normalised * gamma[..., None, None] + beta[..., None, None]
    grad_z = torch.where(z > 0, grad_y, slope * grad_y)
    grad_beta, grad_gamma = grad_z.sum(dim=(2, 3)), (grad_z * normalised).sum(dim=(2, 3))
    count = x.shape[2] * x.shape[3]
    centred = grad_z - (grad_beta / count)[..., None, None] - normalised * (grad_gamma / count)[..., None, None]
    return centred * (gamma * rstd)[..., None, None], grad_gamma, grad_beta


register_operator(
    "norm_act(Tensor x, Tensor gamma, Tensor beta, float eps, float slope) -> (Tensor, Tensor, Tensor)",
    reference=norm_act_reference,
    fake=lambda x, gamma, *_: (torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)),
)
register_operator(
    "norm_act_backward(Tensor grad_y, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, float slope)"
    " -> (Tensor, Tensor, Tensor)",
    reference=norm_act_backward_reference,
    fake=lambda grad_y, x, gamma, *_: (torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)),
)


def _setup_context(ctx, inputs, output):
    x, gamma, beta, _, ctx.slope = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, gamma, beta, mean, rstd)


def _autograd_backward(ctx, grad_y, _grad_mean, _grad_rstd):
    grads = torch.ops.sparse_gen.norm_act_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.slope)
    return *grads, None, None


torch.library.register_autograd("sparse_gen::norm_act", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)


def norm_act(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, *, eps: float = 1e-5, slope: float = 1.0
) -> torch.Tensor:
    """Normalise each channel of each experiment by its own statistics, then LeakyReLU.

    Args:
        x: (E, C, H, W), float32 or float64.
        gamma, beta: (E, C).
        eps: added to the variance.
        slope: of the activation below zero, from 0 (ReLU) to 1 (none).

    Returns:
        y, of x's shape; differentiable in x, gamma and beta.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a number is out of its range.

    Ioffe & Szegedy, "Batch normalization" (ICML 2015), algorithm 1, with a batch of one image.
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64) or 0 in x.shape:
        raise ValueError(f"expected x of shape (E, C, H, W), float32 or float64, got {tuple(x.shape)} of {x.dtype}")
    for name, tensor in {"gamma": gamma, "beta": beta}.items():
        if tensor.shape != x.shape[:2]:
            raise ValueError(f"expected {name} of shape {tuple(x.shape[:2])}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"expected {name} of {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )
    if not eps >= 0 or not 0 <= slope <= 1:
        raise ValueError(f"expected eps from 0 on and slope from 0 to 1, got {eps} and {slope}")
    return torch.ops.sparse_gen.norm_act(x.contiguous(), gamma.contiguous(), beta.contiguous(), eps, slope)[0]
