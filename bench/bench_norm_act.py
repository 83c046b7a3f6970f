"""`norm_act` against torch's batch_norm and leaky_relu, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from sparse_gen.ops.norm_act import norm_act

SLOPE = 0.2


def dense(x, gamma, beta):
    return F.leaky_relu(F.batch_norm(x, None, None, gamma[0], beta[0], training=True), SLOPE)


def assert_equal(leaves, gradient) -> float:
    """Output and gradients against float64; returns the largest norm-wise error."""
    out = norm_act(*leaves, slope=SLOPE)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*doubles)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= 5e-6
    return error


@pytest.mark.parametrize(("channels", "size"), [(16, 512), (16, 256), (64, 64), (128, 16)])
def bench_norm_act(compare, device, channels, size):
    torch.manual_seed(0)
    x, gradient = (torch.randn(1, channels, size, size, device=device) for _ in range(2))
    gamma, beta = (torch.randn(1, channels, device=device) for _ in range(2))
    leaves = [leaf.requires_grad_() for leaf in (x, gamma, beta)]
    error = assert_equal(leaves, gradient)
    last = [leaf.detach().requires_grad_() for leaf in leaves]
    last[0] = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    last_gradient = gradient.contiguous(memory_format=torch.channels_last)
    providers = {
        "plain": lambda: torch.autograd.grad(dense(*last), last, last_gradient),
        "contiguous": lambda: torch.autograd.grad(dense(*leaves), leaves, gradient),
        "ours": lambda: torch.autograd.grad(norm_act(*leaves, slope=SLOPE), leaves, gradient),
    }
    compare("norm_act", f"{channels} channels, {size}², forward + backward", providers, error=error, rounds=21)
