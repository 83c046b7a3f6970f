"""The head of a generator in one operator: normalise, LeakyReLU, 1×1 convolution to a few channels.

    out[o] = bias[o] + Σ_c weight[o, c] · LeakyReLU(gamma[c] · (x[c] − mean[c]) / √(variance[c] + eps) + beta[c])

The normalised image, as large as x, is never stored, neither forward nor backward.
"""

from __future__ import annotations

import torch

from sparse_gen.ops.dispatch import LIBRARY, register_operator
from sparse_gen.ops.norm_act import norm_act_backward_reference, norm_act_reference
from sparse_gen.ops.norm_load import apply_load_reference

# More output channels than this no longer fit into registers beside each other.
MOST_CHANNELS = 4


def norm_head_reference(x, gamma, beta, weight, bias, eps, slope):
    y, mean, rstd = norm_act_reference(x, gamma, beta, eps, slope)
    out = torch.einsum("eoc,echw->eohw", weight, y)
    return out if bias is None else out + bias[..., None, None], mean, rstd


def norm_head_backward_reference(grad_out, x, gamma, beta, weight, mean, rstd, slope):
    z = (x - mean[..., None, None]) * (gamma * rstd)[..., None, None] + beta[..., None, None]
    y = torch.where(z > 0, z, slope * z)
    grad_weight = torch.einsum("eohw,echw->eoc", grad_out, y)
    grad_y = torch.einsum("eoc,eohw->echw", weight, grad_out)
    grads = norm_act_backward_reference(grad_y, x, gamma, beta, mean, rstd, slope)
    return *grads, grad_weight


def norm_head_backward_in_place_reference(grad_out, x, *rest):
    grad_x, *grads = norm_head_backward_reference(grad_out, x, *rest)
    x.copy_(grad_x)
    return tuple(grads)


def loaded_head_reference(x, load, weight, bias, sigmoid):
    out = torch.einsum("eoc,echw->eohw", weight, apply_load_reference(x, load))
    out = out if bias is None else out + bias[..., None, None]
    return out.sigmoid() if sigmoid else out


def loaded_head_backward_in_place_reference(grad_out, y, x, gamma, beta, weight, moments, slope):
    grad_out = grad_out if y is None else grad_out * y * (1 - y)
    mean, rstd = moments[..., 0], moments[..., 1]
    grads = norm_head_backward_in_place_reference(grad_out, x, gamma, beta, weight, mean, rstd, slope)
    return *grads, grad_out.sum(dim=(2, 3))


register_operator(
    "norm_head(Tensor x, Tensor gamma, Tensor beta, Tensor weight, Tensor? bias, float eps, float slope)"
    " -> (Tensor, Tensor, Tensor)",
    reference=norm_head_reference,
    fake=lambda x, gamma, beta, weight, *_: (
        x.new_empty(len(x), weight.shape[1], *x.shape[2:]),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
    ),
)
# Where the convolution in front has left load and moments, see `conv_norm`; with the sigmoid behind it, if wanted, of
# which the backward asks for the output y. x becomes its gradient; the others are of gamma, beta, weight and bias.
register_operator(
    "loaded_head(Tensor x, Tensor load, Tensor weight, Tensor? bias, bool sigmoid) -> Tensor",
    reference=loaded_head_reference,
    fake=lambda x, load, weight, *_: x.new_empty(len(x), weight.shape[1], *x.shape[2:]),
)
register_operator(
    "loaded_head_backward_(Tensor grad_out, Tensor? y, Tensor(a!) x, Tensor gamma, Tensor beta, Tensor weight,"
    " Tensor moments, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=loaded_head_backward_in_place_reference,
    fake=lambda grad_out, y, x, gamma, beta, weight, *_: (
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[:2]),
    ),
)
register_operator(
    "norm_head_backward(Tensor grad_out, Tensor x, Tensor gamma, Tensor beta, Tensor weight, Tensor mean,"
    " Tensor rstd, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=norm_head_backward_reference,
    fake=lambda grad_out, x, gamma, beta, weight, *_: (
        torch.empty_like(x),
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(weight),
    ),
)
register_operator(
    # x becomes its gradient: as large as the image, it is the most that a step would hold at once.
    "norm_head_backward_(Tensor grad_out, Tensor(a!) x, Tensor gamma, Tensor beta, Tensor weight, Tensor mean,"
    " Tensor rstd, float slope) -> (Tensor, Tensor, Tensor)",
    reference=norm_head_backward_in_place_reference,
    fake=lambda grad_out, x, gamma, beta, weight, *_: (
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(weight),
    ),
)


def _setup_context(ctx, inputs, output):
    x, gamma, beta, weight, bias, _, ctx.slope = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, gamma, beta, weight, mean, rstd)


def _autograd_backward(ctx, grad_out, _grad_mean, _grad_rstd):
    grads = torch.ops.sparse_gen.norm_head_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.slope)
    return *grads, grad_out.sum(dim=(2, 3)) if ctx.has_bias else None, None, None


torch.library.register_autograd("sparse_gen::norm_head", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)


def norm_head(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    slope: float = 1.0,
) -> torch.Tensor:
    """Normalise each channel of each experiment by its own statistics, LeakyReLU, then mix channels pixel by pixel.

    Args:
        x: (E, C, H, W), float32 or float64.
        gamma, beta: (E, C).
        weight: (E, out, C), out from 1 to 4.
        bias: (E, out), or None.
        eps: added to the variance.
        slope: of the activation below zero, from 0 (ReLU) to 1 (none).

    Returns:
        (E, out, H, W); differentiable in x, gamma, beta, weight and bias.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a number is out of its range.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), appendix: the hourglass's last layers.
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64) or 0 in x.shape:
        raise ValueError(f"expected x of shape (E, C, H, W), float32 or float64, got {tuple(x.shape)} of {x.dtype}")
    if weight.ndim != 3 or not 1 <= weight.shape[1] <= MOST_CHANNELS:
        raise ValueError(f"expected weight of shape (E, out, C), out from 1 to 4, got {tuple(weight.shape)}")
    out = weight.shape[1]
    expected = {"gamma": x.shape[:2], "beta": x.shape[:2], "weight": (len(x), out, x.shape[1]), "bias": (len(x), out)}
    for name, tensor in {"gamma": gamma, "beta": beta, "weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(expected[name]):
            raise ValueError(f"expected {name} of shape {tuple(expected[name])}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"expected {name} of {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )
    if not eps >= 0 or not 0 <= slope <= 1:
        raise ValueError(f"expected eps from 0 on and slope from 0 to 1, got {eps} and {slope}")
    bias = None if bias is None else bias.contiguous()
    tensors = (x.contiguous(), gamma.contiguous(), beta.contiguous(), weight.contiguous(), bias)
    return torch.ops.sparse_gen.norm_head(*tensors, eps, slope)[0]
