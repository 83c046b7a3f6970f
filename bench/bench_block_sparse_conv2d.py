"""`block_sparse_conv2d` against oneDNN's (or cuDNN's) dense convolution and `sparse_conv2d` at the same density."""

import pytest
import torch
from tolerance import tolerance
from torch.nn import functional as F

from sparse_gen.ops.block_sparse_conv2d import BlockPattern, block_sparse_conv2d
from sparse_gen.ops.sparse_conv2d import SparsePattern, sparse_conv2d

# In, out, kernel, size; the last is the GPU's target.
ON_GPU = (128, 128, 3, 256)
SHAPES = [(128, 128, 3, 64), (64, 32, 3, 256), ON_GPU]
BLOCKS = [(4, 1), (8, 1), (16, 1), (8, 8), (16, 16)]


def block_mask(shape, block, density, device):
    """Exactly ⌊density · blocks⌋ blocks, so that small numbers of them are no lottery."""
    grid = (shape[0] // block[0], shape[1] // block[1], *shape[2:])
    score = torch.rand(grid, device=device)
    kept = torch.zeros(score.numel(), dtype=torch.bool, device=device)
    kept[score.flatten().argsort()[: int(density * score.numel())]] = True
    return kept.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def assert_equal(x, values, pattern, weight, gradient) -> float:
    """Output and gradients against float64; returns the largest norm-wise error."""
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
    out = block_sparse_conv2d(*leaves, pattern, padding=weight.shape[-1] // 2)
    doubles = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.conv2d(*doubles, padding=weight.shape[-1] // 2)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    want[2] = want[2].flatten()[pattern.index][None]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= tolerance(x)
    return error


def triton_provider(x, values, pattern, gradient, padding, backward):
    """Triton's kernels, which the operator leaves for those in CUDA C++ where these were compiled."""
    kernels = pytest.importorskip("sparse_gen.kernels.block_sparse_conv2d", reason="triton is not installed")
    out_channels, _, *kernel = pattern.shape
    lists = pattern.index, pattern.order, pattern.columns, pattern.starts, pattern.block[0]
    given = *lists, out_channels, *kernel, pattern.stride, padding, 0

    def run():
        kernels.block_sparse_conv2d(x, values, None, *given)
        if backward:
            kernels.block_sparse_conv2d_backward(gradient, x, values, *given, True, True)

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}_{s[2]}x{s[2]}_{s[3]}")
def bench_block_sparse_conv2d(compare, device, shape, block, density, backward):
    if shape == ON_GPU and device == "cpu":
        pytest.skip("a shape for GPUs")
    in_channels, out_channels, kernel, size = shape
    torch.manual_seed(0)
    weight_shape = (out_channels, in_channels, kernel, kernel)
    mask = block_mask(weight_shape, block, density, device)
    pattern = BlockPattern.of(mask, block)
    # As many weights as a scattered mask.
    scattered = SparsePattern.of(mask.flatten()[torch.randperm(mask.numel(), device=device)].view(weight_shape))
    x, gradient = (torch.randn(1, channels, size, size, device=device) for channels in (in_channels, out_channels))
    values = torch.randn(1, len(pattern.index), device=device)
    weight = torch.zeros(mask.numel(), device=device).scatter(0, pattern.index, values[0]).view(weight_shape)
    error = assert_equal(x, values, pattern, weight, gradient)

    dense = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
    last_gradient = gradient.contiguous(memory_format=torch.channels_last)
    sparse = [x.requires_grad_(), values.requires_grad_()]

    def provider(function, leaves, gradient):
        def run():
            out = function(*leaves)
            if backward:
                torch.autograd.grad(out, leaves, gradient)

        return run

    padding = kernel // 2
    providers = {
        "plain": provider(lambda x, w: F.conv2d(x, w, padding=padding), dense, last_gradient),
        "sparse_conv2d": provider(lambda x, v: sparse_conv2d(x, v, scattered, padding=padding), sparse, gradient),
        "ours": provider(lambda x, v: block_sparse_conv2d(x, v, pattern, padding=padding), sparse, gradient),
    }
    if device == "cuda":
        providers["triton"] = triton_provider(x.detach(), values.detach(), pattern, gradient, padding, backward)
    passes = "forward + backward" if backward else "forward"
    case = (
        f"{in_channels} to {out_channels}, {kernel}×{kernel}, {size}², blocks {block[0]}×{block[1]}, "
        f"density {density}, {passes}"
    )
    compare("block_sparse_conv2d", case, providers, error=error, rounds=13)
