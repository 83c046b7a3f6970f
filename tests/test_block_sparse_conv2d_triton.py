"""Triton's `block_sparse_conv2d`: output and every gradient against torch in float64, its lists and machine code."""

import pytest
import torch
from ahead_of_time import assert_tensor_cores, compile_for_sm_90
from blocks import block_mask

from sparse_gen.ops.block_sparse_conv2d import BlockPattern, block_sparse_conv2d_reference

# DESIGN's norm-wise errors against float64. The interpreter multiplies "tf32" in float32, a GPU does not.
TOLERANCE = {"ieee": 5e-6, "tf32": 2e-3, "bf16": 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(poisoned, monkeypatch):
    kernel = pytest.importorskip("sparse_gen.kernels.block_sparse_conv2d", reason="triton is not installed")
    monkeypatch.setattr(kernel, "precision_of_torch", lambda: "ieee")
    return kernel


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(pattern, padding, mode):
    given = [t.to(DEVICE) for t in (pattern.index, pattern.order, pattern.columns, pattern.starts)]
    out_channels, _, kernel_h, kernel_w = pattern.shape
    return *given, pattern.block[0], out_channels, kernel_h, kernel_w, pattern.stride, padding, mode


def compare(kernel, mask, block, stride, padding, mode, size, precision="ieee"):
    pattern = BlockPattern.of(mask, block, stride)
    x, values = normal(2, mask.shape[1], *size), normal(2, len(pattern.index), seed=1)
    bias = normal(2, len(mask), seed=2)
    leaves = [x.double().requires_grad_(), values.double().requires_grad_()]
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments_of(pattern, padding, mode)]
    want = block_sparse_conv2d_reference(*leaves, bias.double(), *on_cpu)
    gradient = normal(*want.shape, seed=3)
    arguments = arguments_of(pattern, padding, mode)
    x, values, bias, gradient = (t.to(DEVICE) for t in (x, values, bias, gradient))
    out = kernel.block_sparse_conv2d(x, values, bias, *arguments)
    grads = kernel.block_sparse_conv2d_backward(gradient, x, values, *arguments, True, True)
    wanted = [want, *torch.autograd.grad(want, leaves, gradient.double().cpu())]
    for g, w in zip([out, *grads], wanted, strict=True):
        assert g.shape == w.shape
        assert (g.cpu().double() - w).norm() <= TOLERANCE[precision] * w.norm()


# (out, in, kernel), block, (stride, padding, mode) and size; the last blocks of most are cut.
CASES = [
    ((10, 12, 3), (4, 4), (1, 1, 1), (5, 6)),
    ((9, 13, 3), (8, 8), (2, 1, 0), (7, 6)),
    ((20, 17, 5), (16, 16), (1, 2, 2), (3, 4)),
    ((35, 40, 3), (32, 32), (1, 1, 0), (3, 4)),
    ((70, 66, 1), (64, 64), (1, 0, 0), (3, 3)),
    ((17, 24, 3), (8, 16), (2, 1, 1), (5, 5)),
    ((6, 5, 1), (1, 1), (2, 0, 0), (4, 5)),
    ((11, 8, 3), (2, 3), (2, 1, 2), (6, 7)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("shape", "block", "geometry", "size"), CASES, ids=str)
def test_output_and_gradients(kernel, shape, block, geometry, size):
    out_channels, channels, length = shape
    mask = block_mask((out_channels, channels, length, length), block, 0.4)
    compare(kernel, mask, block, *geometry, size)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions(kernel, monkeypatch, precision):
    monkeypatch.setattr(kernel, "precision_of_torch", lambda: precision)
    compare(kernel, block_mask((8, 16, 3, 3), (8, 8), 0.5), (8, 8), 1, 1, 1, (4, 5), precision)


@pytest.mark.interpreter
@pytest.mark.parametrize("stride", [1, 2])
def test_split_sums(kernel, monkeypatch, stride):
    monkeypatch.setattr("sparse_gen.kernels.splits.MIN_ITERATIONS", 1)
    compare(kernel, block_mask((8, 16, 3, 3), (8, 8), 0.5), (8, 8), stride, 1, 1, (4, 5))


@pytest.mark.interpreter
def test_blocks_without_a_kept_weight(kernel):
    mask = block_mask((12, 12, 3, 3), (4, 4), 0.6)
    mask[4:8] = False
    mask[:, 4:8] = False
    compare(kernel, mask, (4, 4), 1, 1, 0, (4, 5))


@pytest.mark.interpreter
def test_pruned_blocks_are_not_visited(kernel):
    """What only pruned weights read may be NaN; times a zero it would still be NaN."""
    mask = torch.ones(8, 12, 3, 3, dtype=torch.bool)
    mask[:, 4:8] = False
    mask[4:] = False
    pattern = BlockPattern.of(mask, (4, 4))
    x, values = normal(1, 12, 4, 5).to(DEVICE), normal(1, len(pattern.index)).to(DEVICE)
    x[:, 4:8] = torch.nan
    gradient = normal(1, 8, 4, 5).to(DEVICE)
    gradient[:, 4:] = torch.nan
    arguments = arguments_of(pattern, 1, 1)
    out = kernel.block_sparse_conv2d(x, values, None, *arguments)
    grad_x, grad_values = kernel.block_sparse_conv2d_backward(gradient, x, values, *arguments, True, True)
    assert all(t.isfinite().all() for t in (out, grad_x, grad_values))
    assert (out[:, 4:] == 0).all()
    assert (grad_x[:, 4:8] == 0).all()


@pytest.mark.interpreter
def test_nothing_kept_leaves_the_bias(kernel):
    pattern = BlockPattern.of(torch.zeros(5, 6, 3, 3, dtype=torch.bool), (4, 4))
    x, values, bias = normal(2, 6, 4, 5).to(DEVICE), torch.empty(2, 0, device=DEVICE), normal(2, 5).to(DEVICE)
    arguments = arguments_of(pattern, 1, 1)
    out = kernel.block_sparse_conv2d(x, values, bias, *arguments)
    assert torch.equal(out, bias[:, :, None, None].expand_as(out))
    grad_x, grad_values = kernel.block_sparse_conv2d_backward(out, x, values, *arguments, True, True)
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert grad_values.shape == (2, 0)


@pytest.mark.interpreter
def test_the_same_bits_beside_other_experiments(kernel):
    pattern = BlockPattern.of(block_mask((8, 12, 3, 3), (4, 4), 0.5), (4, 4))
    x, values = normal(3, 12, 5, 4).to(DEVICE), normal(3, len(pattern.index), seed=1).to(DEVICE)
    gradient, arguments = normal(3, 8, 5, 4, seed=2).to(DEVICE), arguments_of(pattern, 1, 1)

    def results(rows):
        out = kernel.block_sparse_conv2d(x[rows], values[rows], None, *arguments)
        given = gradient[rows], x[rows], values[rows], *arguments
        return out, *kernel.block_sparse_conv2d_backward(*given, True, True)

    for alone, together in zip(results(slice(1, 2)), results(slice(None)), strict=True):
        assert torch.equal(alone, together[1:2])


@pytest.mark.interpreter
@pytest.mark.parametrize("block", [(4, 4), (8, 16), (3, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_lists_by_input_block(block, stride):
    lists_of = pytest.importorskip("sparse_gen.kernels.block_lists", reason="triton is not installed").block_lists
    mask = block_mask((18, 37, 3, 3), block, 0.3)
    pattern = BlockPattern.of(mask, block, stride)
    lists = lists_of(pattern.index, pattern.starts, pattern.shape, stride)
    assert lists_of(pattern.index, pattern.starts, pattern.shape, stride) is lists
    assert lists.block_in % block[1] == 0
    assert torch.equal(lists.order.sort().values, torch.arange(len(pattern.index)))
    # Item by item and channel by channel, the order meets the weights that the items name.
    place, visited = 0, torch.zeros_like(mask)
    for group, (start, stop) in enumerate(zip(lists.starts.tolist(), lists.starts.tolist()[1:], strict=False)):
        first = group // stride**2 * lists.block_in
        for output, ky, kx in lists.items[:, start:stop].T.tolist():
            assert (ky % stride) * stride + kx % stride == group % stride**2
            for channel in range(first, min(first + lists.block_in, 37)):
                expected = ((output * 37 + channel) * 3 + ky) * 3 + kx
                assert pattern.index[lists.order[place]] == expected
                visited[output, channel, ky, kx] = True
                place += 1
    assert torch.equal(visited, mask)
    # Every column of an output block is in one chunk.
    covered = [
        (block_, column)
        for block_, column in lists.chunks.T.tolist()
        for column in range(column, min(column + 64, pattern.starts[block_ + 1].item()))
    ]
    expected = [
        (block_, column)
        for block_ in range(len(pattern.starts) - 1)
        for column in range(pattern.starts[block_], pattern.starts[block_ + 1])
    ]
    assert covered == expected


# A block of 8 has the tile of one of 16, half of it empty: with 8 columns Triton leaves wgmma for mma.sync.
@pytest.mark.aot
@pytest.mark.parametrize(("precision", "block"), [("ieee", 16), ("tf32", 8), ("tf32", 64), ("bf16", 8), ("bf16", 64)])
def test_compiles_for_sm_90(precision, block):
    splits = pytest.importorskip("sparse_gen.kernels.splits", reason="triton is not installed")

    def configuration(name, rows, depth, constants, **types):
        blocks = splits.tile(rows, block, depth, precision)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        return name, types, constants | blocks | {"PRECISION": precision}, options

    padding = {"STRIDE": 1, "PADDING": 1, "MODE": 1}
    lists = {"p_order": "*i64", "p_starts": "*i64", "p_columns": "*i32", "p_items": "*i32", "p_chunks": "*i32"}
    compiled = compile_for_sm_90(
        "block_sparse_conv2d",
        [
            configuration("_forward_kernel", 4096, 64, padding | {"BIAS": True}, **lists),
            configuration("_plane_gradient_kernel", 4096, 64, {"STRIDE": 1, "OFFSET": 0}, **lists),
            configuration("_values_gradient_kernel", 64, 4096, padding, **lists),
        ],
    )
    for code in compiled:
        # Two programs to a multiprocessor's shared memory; registers as Triton 3.6 needs them, up to 190.
        code.assert_within(shared=113 << 10, registers=192)
        assert_tensor_cores(code, precision)
