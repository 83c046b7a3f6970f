"""Normalisation of a bilinearly up-sampled image, done in front of the up-sampling.

    norm(up(x)) = up(γ · (x − m) / sqrt(v + ε) + β),      m = Σ up(x) / N,   v = Σ (up(x) − m)² / N,

for the weights of an interpolation sum to 1. With M = upᵀ up, which mixes direct neighbours only, N v is
(x − m) · M (x − m): the large image is never made.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sparse_gen.engine.graph import Norm
from sparse_gen.engine.steps import Loaded, Step
from sparse_gen.ops.norm_load import apply_load_reference


class UpsampledNormStep(Step):
    """Gives a `Loaded` where `leaves_load`, otherwise the small image normalised."""

    def __init__(self, norm: Norm, leaves_load: bool):
        self._eps, self._kind, self._leaves_load = norm.eps, norm.upsample, leaves_load

    def forward(self, inputs, parameters, trains):
        x, (gamma, beta) = inputs[0].contiguous(), parameters
        count = 4 * x.shape[2] * x.shape[3]
        ones = x.new_ones(1, 1, *x.shape[2:])
        weight = up_and_back(ones, self._kind)  # how often each pixel of x counts
        mean = (x * weight).sum(dim=(2, 3)) / count
        centered = x - mean[..., None, None]
        spread = up_and_back(centered, self._kind)
        rstd = ((centered * spread).sum(dim=(2, 3)) / count + self._eps).rsqrt()
        factor = gamma * rstd
        none, one = torch.zeros_like(mean), torch.ones_like(mean)
        load = torch.stack([factor, beta - mean * factor, one, one, none], dim=-1)
        out = Loaded(x, load) if self._leaves_load else apply_load_reference(x, load)
        return out, (x, mean, rstd, spread, weight)

    def backward(self, gradient, kept, parameters, needs):
        x, mean, rstd, spread, weight = kept
        gamma, _ = parameters
        count = 4 * x.shape[2] * x.shape[3]
        grad_beta = gradient.sum(dim=(2, 3))
        grad_gamma = (gradient * (x - mean[..., None, None])).sum(dim=(2, 3)) * rstd
        by_weight, by_spread = grad_beta / count, grad_gamma * rstd / count
        inner = gradient - by_weight[..., None, None] * weight - by_spread[..., None, None] * spread
        return [(gamma * rstd)[..., None, None] * inner], [grad_gamma, grad_beta]


def up_and_back(x: torch.Tensor, kind: str) -> torch.Tensor:
    """upᵀ up of x (E, C, h, w), along one axis after the other."""
    for axis in (2, 3):
        own, beside = _neighbours(x.shape[axis], kind, x.dtype, x.device)
        shape = [-1 if a == axis else 1 for a in range(4)]
        before, behind = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
        y = x * own.view(shape)
        y.narrow(axis, 1, x.shape[axis] - 1).addcmul_(before, beside.view(shape))
        y.narrow(axis, 0, x.shape[axis] - 1).addcmul_(behind, beside.view(shape))
        x = y
    return x


# Kept: while a CUDA graph is captured nothing may be copied from the host.
@lru_cache(maxsize=64)
def _neighbours(length: int, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """upᵀ up along an axis: its diagonal (length,), and what is beside it (length − 1,)."""
    i = torch.arange(length, dtype=torch.float64)
    # Shares of the neighbour: the one before in the even, the one behind in the odd up-sampled position.
    if kind == "bilinear":
        even, odd = torch.full_like(i, 0.25), torch.full_like(i, 0.25)
        even[0] = odd[-1] = 0
    else:
        even, odd = i / (2 * length - 1), (length - 1 - i) / (2 * length - 1)
    own = (1 - even) ** 2 + (1 - odd) ** 2
    own[1:] += odd[:-1] ** 2
    own[:-1] += even[1:] ** 2
    beside = (1 - odd[:-1]) * odd[:-1] + (1 - even[1:]) * even[1:]
    return own.to(device, dtype), beside.to(device, dtype)
