"""`masked_conv2d` against up-sample, pad, convolution and pool in PyTorch, channels_last, forward and backward."""

import pytest
import torch
from tolerance import tolerance
from torch.nn import functional as F

from sparse_gen.ops.masked_conv2d import masked_conv2d

# in, out, kernel, size of the input, and what is folded in: layers of the hourglass at 512² and 256².
POOL, NEAREST = {"pool": True}, {"upsample": "nearest"}
SHAPES = [
    (32, 16, 5, 256, POOL),
    (16, 16, 5, 256, {}),
    (64, 64, 5, 64, {}),
    (128, 128, 5, 8, {}),
    (128, 128, 3, 16, NEAREST),
    (64, 32, 3, 128, NEAREST),
    (32, 16, 3, 256, NEAREST),
    (16, 3, 1, 512, {}),
]


def dense(x, weight, padding, *, upsample=None, pool=False):
    large = F.interpolate(x, scale_factor=2, mode=upsample) if upsample else x
    padded = F.pad(large, [padding] * 4, mode="reflect") if padding else large
    out = F.conv2d(padded, weight)
    return F.avg_pool2d(out, 2) if pool else out


def assert_equal(x, weight, gradient, padding, folded) -> float:
    """Output and gradients against float64; returns the largest norm-wise error."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = masked_conv2d(*leaves, padding=padding, padding_mode="reflect", **folded)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*doubles, padding, **folded)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= tolerance(x)
    return error


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}_{s[2]}x{s[2]}_{s[3]}{''.join(s[4])}")
def bench_masked_conv2d(compare, device, shape):
    in_channels, out_channels, kernel, size, folded = shape
    torch.manual_seed(0)
    x = torch.randn(1, in_channels, size, size, device=device)
    weight = torch.randn(out_channels, in_channels, kernel, kernel, device=device)
    large = 2 * size if "upsample" in folded else size // 2 if "pool" in folded else size
    gradient = torch.randn(1, out_channels, large, large, device=device)
    error = assert_equal(x, weight, gradient, kernel // 2, folded)

    plain = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
    plain_gradient = gradient.contiguous(memory_format=torch.channels_last)
    ours = [x.requires_grad_(), weight.requires_grad_()]

    def run():
        out = masked_conv2d(*ours, padding=kernel // 2, padding_mode="reflect", **folded)
        torch.autograd.grad(out, ours, gradient)

    providers = {
        "plain": lambda: torch.autograd.grad(dense(*plain, kernel // 2, **folded), plain, plain_gradient),
        "ours": run,
    }
    steps = "".join(f", {name}" for name in folded)
    case = f"{in_channels} to {out_channels}, {kernel}×{kernel}, {size}²{steps}, forward + backward"
    compare("masked_conv2d", case, providers, error=error, rounds=21)
