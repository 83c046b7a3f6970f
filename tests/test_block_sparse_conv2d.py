"""`block_sparse_conv2d`: outputs and every gradient against dense masked PyTorch in float64."""

import pytest
import torch
from blocks import block_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_gen.ops.block_sparse_conv2d import BlockPattern, block_sparse_conv2d
from sparse_gen.ops.sparse_conv2d import SparsePattern, sparse_conv2d

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def random_mask(shape, block, density, seed=0):
    """The mask, and the generator that has drawn it."""
    generator = torch.Generator().manual_seed(seed)
    return block_mask(shape, block, density, generator), generator


def dense(x, weight, bias, stride, padding, mode):
    """E separate dense convolutions."""
    outputs = []
    for e in range(len(x)):
        padded = F.pad(x[e : e + 1], [padding] * 4, mode=MODES[mode]) if padding else x[e : e + 1]
        outputs.append(F.conv2d(padded, weight[e], bias[e], stride=stride))
    return torch.cat(outputs)


def assert_equal(
    shape, block, size, *, density=0.3, stride=1, padding=None, mode="reflect", experiments=2, dtype=torch.float32,
    device="cpu", tolerance=None,
):  # fmt: skip
    padding = shape[-1] // 2 if padding is None else padding
    mask, generator = random_mask(shape, block, density)
    mask = mask.to(device)
    pattern = BlockPattern.of(mask, block, stride)
    kept = len(pattern.index)

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype)

    leaves = [normal(experiments, shape[1], *size), normal(experiments, kept), normal(experiments, shape[0])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, values, bias = leaves
    out = block_sparse_conv2d(x, values, pattern, bias, padding=padding, padding_mode=mode)

    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    flat = torch.zeros(experiments, mask.numel(), dtype=torch.float64, device=device)
    weight = flat.scatter(1, pattern.index.expand(experiments, -1), doubles[1]).view(experiments, *shape)
    expected = dense(doubles[0], weight, doubles[2], stride, padding, mode)
    assert out.shape == expected.shape
    gradient = normal(*out.shape)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= (tolerance or TOLERANCE[dtype]) * w.norm() + 1e-300


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("size", [(8, 8), (9, 23), (66, 130)])
def test_shapes(instruction_set, kernel, stride, mode, size):
    assert_equal((9, 3, kernel, kernel), (4, 1), size, stride=stride, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (7, 3), (8, 8), (16, 16), (64, 4)])
@pytest.mark.parametrize("channels", [(16, 16), (35, 21)])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(instruction_set, block, channels, stride, dtype):
    assert_equal((*channels, 3, 3), block, (13, 22), stride=stride, dtype=dtype)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_densities(instruction_set, density, stride):
    assert_equal((24, 16, 3, 3), (8, 4), (13, 22), density=density, stride=stride)


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (7, 4), (2, 0)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", list(MODES))
def test_images_that_are_worked_off_in_bands(instruction_set, kernel, padding, stride, mode):
    """More than a megabyte of padded input and of gradient, at a height that bands do not divide."""
    assert_equal(
        (12, 20, kernel, kernel), (8, 1), (167, 190), density=0.1, stride=stride, padding=padding, mode=mode,
        experiments=1,
    )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to run on")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("stride", [1, 2])
def test_on_a_gpu(monkeypatch, stride, mode, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    given = {"stride": stride, "mode": mode, "device": "cuda", "tolerance": 2e-3 if tf32 else None}
    for kernel in (1, 3, 5):
        for block in ((1, 1), (8, 8), (16, 16), (48, 5)):
            assert_equal((50, 37, kernel, kernel), block, (37, 70), **given)
    assert_equal((130, 140, 3, 3), (16, 16), (16, 16), **given)  # few pixels: the sum over channels is split
    assert_equal((128, 128, 3, 3), (16, 16), (256, 256), density=0.1, experiments=1, **given)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 8)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    size=st.tuples(st.integers(5, 40), st.integers(7, 50)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 4),
    mode=st.sampled_from(list(MODES)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    experiments=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(channels, block, kernel, size, stride, padding, mode, density, experiments, dtype):
    assert_equal(
        (*channels, *kernel), block, size, stride=stride, padding=padding, mode=mode, density=density,
        experiments=experiments, dtype=dtype,
    )  # fmt: skip


def test_it_is_sparse_conv2d_of_the_same_mask_and_values():
    mask, generator = random_mask((16, 6, 3, 3), (8, 2), 0.4)
    blocks, single = BlockPattern.of(mask, (8, 2)), SparsePattern.of(mask)
    assert torch.equal(blocks.index, single.index)
    x, values = torch.rand(1, 6, 12, 11), torch.randn(1, len(blocks.index), generator=generator)
    torch.testing.assert_close(
        block_sparse_conv2d(x, values, blocks, padding=1), sparse_conv2d(x, values, single, padding=1)
    )


def test_channels_without_a_kept_block():
    mask = torch.zeros(6, 3, 3, 3, dtype=torch.bool)
    mask[2:4, 1, 0, 2] = True
    pattern = BlockPattern.of(mask, (2, 1))
    x = torch.rand(1, 3, 6, 7, requires_grad=True)
    bias = torch.arange(1.0, 7)[None]
    out = block_sparse_conv2d(x, torch.tensor([[2.0, -1.0]]), pattern, bias, padding=1)
    assert (out[0, [0, 1, 4, 5]] == torch.tensor([1.0, 2, 5, 6])[:, None, None]).all()
    torch.testing.assert_close(out[0, 2, 1:, :-1], 3 + 2 * x[0, 1, :-1, 1:])
    torch.testing.assert_close(out[0, 3, 1:, :-1], 4 - x[0, 1, :-1, 1:])
    out.sum().backward()
    assert (x.grad[0, [0, 2]] == 0).all()
    assert (x.grad[0, 1, :-1, 1:] == 1).all()


def test_what_an_allocator_leaves_in_memory_does_not_reach_the_results(instruction_set):
    """A larger convolution of NaN fills the buffers that threads keep between calls."""
    pattern = BlockPattern.of(torch.ones(8, 4, 3, 3, dtype=torch.bool), (8, 1))
    nan = torch.full((1, 4, 90, 90), torch.nan, requires_grad=True)
    values = torch.full((1, 288), torch.nan, requires_grad=True)
    block_sparse_conv2d(nan, values, pattern, padding=1).sum().backward()
    for size in [(5, 6), (30, 31)]:
        for stride in (1, 2):
            assert_equal((8, 4, 3, 3), (8, 1), size, density=1.0, stride=stride, experiments=1)


def test_only_the_gradients_that_are_needed_are_computed():
    pattern = BlockPattern.of(torch.ones(4, 2, 3, 3, dtype=torch.bool), (4, 1))
    x, values = torch.rand(1, 2, 8, 8), torch.rand(1, 72, requires_grad=True)
    block_sparse_conv2d(x, values, pattern).sum().backward()
    assert values.grad is not None
    x.requires_grad_()
    block_sparse_conv2d(x, values.detach(), pattern).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("size", [(6, 7), (70, 70), (310, 290)])
def test_the_same_bits_at_any_thread_count_and_beside_other_experiments(instruction_set, size):
    mask, generator = random_mask((20, 8, 3, 3), (8, 1), 0.3)
    pattern = BlockPattern.of(mask, (8, 1))
    x = torch.randn(2, 8, *size, generator=generator).requires_grad_()
    values = torch.randn(2, len(pattern.index), generator=generator).requires_grad_()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = block_sparse_conv2d(x, values, pattern, padding=1)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, values])])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    one = [t[1:].detach().requires_grad_() for t in (x, values)]
    alone = block_sparse_conv2d(*one, pattern, padding=1)
    alone = [alone, *torch.autograd.grad(alone.square().sum(), one)]
    assert all(torch.equal(a, t[1:]) for a, t in zip(alone, results[0], strict=True))


def test_gradcheck():
    for stride in (1, 2):
        mask, _ = random_mask((6, 3, 3, 3), (4, 2), 0.5)
        pattern = BlockPattern.of(mask, (4, 2), stride)
        leaves = [torch.randn(2, 3, 6, 5), torch.randn(2, len(pattern.index)), torch.randn(2, 6)]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        for mode in MODES:

            def function(x, values, bias, pattern=pattern, mode=mode):
                return block_sparse_conv2d(x, values, pattern, bias, padding=1, padding_mode=mode)

            assert torch.autograd.gradcheck(function, leaves)


def test_opcheck():
    pattern = BlockPattern.of(random_mask((6, 2, 3, 3), (4, 1), 0.5)[0], (4, 1), 2)
    x = torch.randn(2, 2, 9, 8, requires_grad=True)
    values = torch.randn(2, len(pattern.index), requires_grad=True)
    bias = torch.randn(2, 6, requires_grad=True)
    parts = (pattern.index, pattern.order, pattern.columns, pattern.starts, 4, 6, 3, 3, 2, 1, 1)
    torch.library.opcheck(torch.ops.sparse_gen.block_sparse_conv2d, (x, values, bias, *parts))
    out = torch.ops.sparse_gen.block_sparse_conv2d(x, values, None, *parts).detach()
    torch.library.opcheck(
        torch.ops.sparse_gen.block_sparse_conv2d_backward, (out, x.detach(), values.detach(), *parts, True, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 8)}, "x of shape"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "pattern's 2 channels, got 3"),
        ({"x": torch.zeros(1, 2, 2, 8)}, "at least the kernel's 3×3, got 2×8"),
        ({"values": torch.zeros(1, 71)}, r"values of shape \(1, 72\), got \(1, 71\)"),
        ({"bias": torch.zeros(4)}, r"bias of shape \(1, 4\)"),
        ({"padding": -1}, "padding from 0 on"),
        ({"padding": 8, "padding_mode": "reflect"}, "more than 8 pixels a side to reflect, got 8×8"),
        ({"padding_mode": "circular"}, "padding_mode out of zeros, reflect, replicate, got 'circular'"),
    ],
)
def test_bad_arguments(change, message):
    pattern = BlockPattern.of(torch.ones(4, 2, 3, 3, dtype=torch.bool), (4, 1))
    with pytest.raises(ValueError, match=message):
        block_sparse_conv2d(**{"x": torch.zeros(1, 2, 8, 8), "values": torch.zeros(1, 72), "pattern": pattern} | change)


def test_bad_patterns():
    ones = torch.ones(10, 5, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="stride 1 or 2, got 3"):
        BlockPattern.of(ones, (4, 1), 3)
    with pytest.raises(ValueError, match="bool mask of shape"):
        BlockPattern.of(ones.float(), (4, 1))
    with pytest.raises(ValueError, match=r"each from 1 on, got \(4, 0\)"):
        BlockPattern.of(ones, (4, 0))
    ones[9, 4, 2, 1] = False
    ones[5, 3, 2, 2] = False
    message = r"constant on blocks of 4×2 channels.* output channels 4 to 7, input channels 2 to 3, tap \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        BlockPattern.of(ones, (4, 2))
    ones[4:8, 2:4, 2, 2] = False
    with pytest.raises(ValueError, match=r"output channels 8 to 9, input channels 4 to 4, tap \(2, 1\)"):
        BlockPattern.of(ones, (4, 2))
