"""`sparse_upsample_conv2d` against up-sample, pad and dense convolution in PyTorch, forward and backward."""

import pytest
import torch
from tolerance import tolerance
from torch.nn import functional as F

from sparse_gen.ops.sparse_upsample_conv2d import TapPattern, sparse_upsample_conv2d

# in, out, size before up-sampling, density: the decoder of the hourglass with a published 5 % mask, and 512².
SHAPES = [(128, 128, 32, 0.19), (128, 64, 64, 0.17), (64, 32, 128, 0.19), (32, 16, 256, 0.35)]


def dense(x, weight, upsample):
    large = F.interpolate(x, scale_factor=2, mode=upsample)
    return F.conv2d(F.pad(large, (1, 1, 1, 1), mode="reflect"), weight)


def assert_equal(x, values, pattern, weight, gradient, upsample) -> float:
    """Output and gradients against float64; returns the largest norm-wise error."""
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
    out = sparse_upsample_conv2d(*leaves, pattern, padding=1, padding_mode="reflect", upsample=upsample)
    doubles = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = dense(*doubles, upsample)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    want[2] = want[2].flatten()[pattern.pattern.index][None]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= tolerance(x)
    return error


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}_{2 * s[2]}")
def bench_sparse_upsample_conv2d(compare, device, shape, upsample):
    in_channels, out_channels, size, density = shape
    torch.manual_seed(0)
    mask = torch.rand(out_channels, in_channels, 3, 3, device=device) < density
    pattern = TapPattern.of(mask)
    x = torch.randn(1, in_channels, size, size, device=device)
    gradient = torch.randn(1, out_channels, 2 * size, 2 * size, device=device)
    values = torch.randn(1, len(pattern.pattern.index), device=device)
    weight = torch.zeros(mask.numel(), device=device).scatter(0, pattern.pattern.index, values[0]).view(mask.shape)
    error = assert_equal(x, values, pattern, weight, gradient, upsample)

    plain = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
    plain_gradient = gradient.contiguous(memory_format=torch.channels_last)
    ours = [x.requires_grad_(), values.requires_grad_()]
    providers = {
        "plain": lambda: torch.autograd.grad(dense(*plain, upsample), plain, plain_gradient),
        "ours": lambda: torch.autograd.grad(
            sparse_upsample_conv2d(*ours, pattern, padding=1, padding_mode="reflect", upsample=upsample), ours, gradient
        ),
    }
    case = f"{in_channels} to {out_channels}, 3×3, to {2 * size}², density {density}, forward + backward"
    case = case if upsample == "nearest" else f"{upsample}, {case}"
    compare("sparse_upsample_conv2d", case, providers, error=error, rounds=21)
