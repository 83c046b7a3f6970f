"""`sparse_conv2d` against oneDNN's (or cuDNN's) dense convolution of the masked weight, forward and backward.

And against SparseProp (Nikdan et al., ICML 2023), the one public sparse convolution for CPUs that has a backward pass,
where `pip install sparseprop` was run: it is no dependency of the project.
"""

from importlib.util import find_spec

import pytest
import torch
from tolerance import tolerance
from torch.nn import functional as F

from sparse_gen.ops.sparse_conv2d import SparsePattern, sparse_conv2d

# in, out, kernel, size, density: layers of the published 5 % masks on the hourglass.
SHAPES = [
    (32, 16, 5, 256, 0.07),
    (128, 128, 5, 32, 0.008),
    (128, 128, 3, 64, 0.19),
    (128, 64, 3, 128, 0.17),
    (64, 32, 3, 256, 0.20),
]


def assert_equal(x, values, pattern, weight, gradient) -> float:
    """Output and gradients against float64; returns the largest norm-wise error."""
    kernel = weight.shape[-1]
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
    out = sparse_conv2d(*leaves, pattern, padding=kernel // 2)
    doubles = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.conv2d(*doubles, padding=kernel // 2)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    want[2] = want[2].flatten()[pattern.index][None]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= tolerance(x)
    return error


def bench_sparseprop():
    """Only says whether it is there, and was therefore measured in the cases below."""
    pytest.importorskip("sparseprop", reason="SparseProp is not measured: pip install sparseprop")


def sparseprop_step(x, weight, gradient, pattern, backward):
    """SparseProp's convolution as a provider, compared with the dense one first."""
    from sparseprop.modules import SparseConv2d

    # Its default vectorises over the batch, and gives wrong results for a batch of one.
    convolve = SparseConv2d(weight, padding=weight.shape[-1] // 2, stride=1, vectorizing_over_on=True)
    leaves = [x.clone().requires_grad_(), convolve.W_val]

    def step():
        out = convolve(leaves[0])
        return [out, *torch.autograd.grad(out, leaves, gradient)] if backward else [out]

    doubles = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.conv2d(*doubles, padding=weight.shape[-1] // 2)
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    want[2] = want[2].flatten()[pattern.index]
    for got, wanted in zip(step(), want, strict=False):
        assert (got.double() - wanted).norm() <= 5e-6 * wanted.norm()
    return step


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}_{s[2]}x{s[2]}_{s[3]}")
def bench_sparse_conv2d(compare, device, shape, backward):
    in_channels, out_channels, kernel, size, density = shape
    torch.manual_seed(0)
    mask = torch.rand(out_channels, in_channels, kernel, kernel, device=device) < density
    pattern = SparsePattern.of(mask)
    x, gradient = (torch.randn(1, channels, size, size, device=device) for channels in (in_channels, out_channels))
    values = torch.randn(1, len(pattern.index), device=device)
    weight = torch.zeros(mask.numel(), device=device).scatter(0, pattern.index, values[0]).view(mask.shape)
    error = assert_equal(x, values, pattern, weight, gradient)

    dense = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
    sparse = [x.requires_grad_(), values.requires_grad_()]

    def plain():
        out = F.conv2d(*dense, padding=kernel // 2)
        if backward:
            torch.autograd.grad(out, dense, gradient)

    def ours():
        out = sparse_conv2d(*sparse, pattern, padding=kernel // 2)
        if backward:
            torch.autograd.grad(out, sparse, gradient)

    providers = {"plain": plain, "ours": ours}
    if device == "cpu" and find_spec("sparseprop"):
        providers["sparseprop"] = sparseprop_step(x.detach(), weight.detach(), gradient, pattern, backward)
    passes = "forward + backward" if backward else "forward"
    case = f"{in_channels} to {out_channels}, {kernel}×{kernel}, {size}², density {density}, {passes}"
    compare("sparse_conv2d", case, providers, error=error, rounds=21)
