"""Normalisation as a map that whoever reads the image applies on the way: the normalised image is never stored.

    v = factor₂ · LeakyReLU(factor · x + shift) + shift₂,

with one such *load* a channel, takes in a normalisation with its activation and, if wanted, a second normalisation
behind it. The backward goes through both in three passes over the channel. `apply_load` is for those who cannot read
that way: x (E, C, H, W) and load (E, C, 5) to what a reader sees.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse_gen.ops.dispatch import register_operator
from sparse_gen.ops.norm_act import norm_act_backward_reference, norm_act_reference

# Numbers a channel: factor, shift, slope, second factor, second shift.
LOAD = 5


def apply_load_reference(x, load):
    factor, shift, slope, factor2, shift2 = (part[..., None] for part in load.split(1, dim=-1))
    z = x * factor + shift
    return torch.where(z > 0, z, slope * z) * factor2 + shift2


def _affine(gamma, beta, mean, rstd):
    return gamma * rstd, beta - mean * gamma * rstd


def norm_load_reference(x, gamma, beta, eps, slope, gamma2, beta2, eps2):
    y, mean, rstd = norm_act_reference(x, gamma, beta, eps, slope)
    load = [*_affine(gamma, beta, mean, rstd), torch.full_like(mean, slope)]
    if gamma2 is None:
        return torch.stack([*load, torch.ones_like(mean), torch.zeros_like(mean)], dim=-1), torch.stack(
            [mean, rstd, torch.zeros_like(mean), torch.ones_like(mean)], dim=-1
        )
    _, mean2, rstd2 = norm_act_reference(y, gamma2, beta2, eps2, 1.0)
    load += _affine(gamma2, beta2, mean2, rstd2)
    return torch.stack(load, dim=-1), torch.stack([mean, rstd, mean2, rstd2], dim=-1)


def norm_load_backward_reference(grad, x, gamma, beta, slope, gamma2, beta2, moments):
    mean, rstd, mean2, rstd2 = moments.unbind(dim=-1)
    if gamma2 is None:
        nothing = torch.zeros_like(gamma)
        return *norm_act_backward_reference(grad, x, gamma, beta, mean, rstd, slope), nothing, nothing.clone()
    factor, shift = _affine(gamma, beta, mean, rstd)
    y = F.leaky_relu(x * factor[..., None, None] + shift[..., None, None], slope)
    grad_y, *second = norm_act_backward_reference(grad, y, gamma2, beta2, mean2, rstd2, 1.0)
    return *norm_act_backward_reference(grad_y, x, gamma, beta, mean, rstd, slope), *second


register_operator(
    "apply_load(Tensor x, Tensor load) -> Tensor",
    reference=apply_load_reference,
    fake=lambda x, load: torch.empty_like(x),
)
register_operator(
    "norm_load(Tensor x, Tensor gamma, Tensor beta, float eps, float slope, Tensor? gamma2, Tensor? beta2, float eps2)"
    " -> (Tensor, Tensor)",
    reference=norm_load_reference,
    fake=lambda x, gamma, *_: (gamma.new_empty(*gamma.shape, LOAD), gamma.new_empty(*gamma.shape, 4)),
)
register_operator(
    "norm_load_backward(Tensor grad, Tensor x, Tensor gamma, Tensor beta, float slope, Tensor? gamma2, Tensor? beta2,"
    " Tensor moments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_load_backward_reference,
    fake=lambda grad, x, gamma, *_: (torch.empty_like(x), *(torch.empty_like(gamma) for _ in range(4))),
)
