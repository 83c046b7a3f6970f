"""`sparse_conv2d`: outputs and every gradient against dense masked PyTorch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_gen.ops.sparse_conv2d import SparsePattern, phases, sparse_conv2d

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def random_mask(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) < density, generator


def dense(x, weight, bias, stride, padding, mode):
    """E separate dense convolutions."""
    outputs = []
    for e in range(len(x)):
        padded = F.pad(x[e : e + 1], [padding] * 4, mode=MODES[mode]) if padding else x[e : e + 1]
        outputs.append(F.conv2d(padded, weight[e], bias[e], stride=stride))
    return torch.cat(outputs)


def assert_equal(
    shape, size, *, density=0.3, stride=1, padding=None, mode="reflect", experiments=2, dtype=torch.float32,
    device="cpu",
):  # fmt: skip
    padding = shape[-1] // 2 if padding is None else padding
    mask, generator = random_mask(shape, density)
    pattern, index = SparsePattern.of(mask.to(device), stride), SparsePattern.of(mask, stride).index
    kept = len(index)

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype)

    leaves = [normal(experiments, shape[1], *size), normal(experiments, kept), normal(experiments, shape[0])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, values, bias = leaves
    out = sparse_conv2d(x, values, pattern, bias, padding=padding, padding_mode=mode)

    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    flat = torch.zeros(experiments, mask.numel(), dtype=torch.float64)
    weight = flat.scatter(1, index.expand(experiments, -1), doubles[1]).view(experiments, *shape)
    expected = dense(doubles[0], weight, doubles[2], stride, padding, mode)
    assert out.shape == expected.shape
    gradient = normal(*out.shape)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.cpu().double())]
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.cpu().double() - w).norm() <= TOLERANCE[dtype] * w.norm() + 1e-300


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to run on")
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(poisoned, mode, stride, dtype):
    for kernel in (1, 3, 5):
        for size in ((5, 7), (9, 23), (66, 70)):
            assert_equal((5, 3, kernel, kernel), size, stride=stride, mode=mode, dtype=dtype, device="cuda")


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("size", [(8, 8), (9, 23), (31, 17), (66, 130)])
def test_shapes(instruction_set, kernel, stride, mode, size):
    assert_equal((5, 3, kernel, kernel), size, stride=stride, mode=mode)


@pytest.mark.parametrize("shape", [(3, 60, 5, 5), (60, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 23), (66, 130), (68, 132)])
def test_copies_of_many_weights_a_row_and_of_few(instruction_set, shape, stride, size):
    assert_equal(shape, size, density=0.5, stride=stride)


# Rows of whole vectors, of one to several tiles: there the sums of a kernel column may be shifted in registers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [(1, 3), (3, 3), (4, 5), (2, 7)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize(
    "size", [(1, 8), (5, 16), (37, 32), (9, 48), (35, 64), (3, 80), (21, 128), (19, 240), (2, 528)]
)
def test_rows_of_whole_vectors(instruction_set, size, density, kernel, dtype):
    assert_equal((9, 11, *kernel), size, density=density, dtype=dtype, padding=kernel[1] // 2, mode="zeros")


@pytest.mark.parametrize("shape", [(3, 150, 5, 5), (150, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.9])
@pytest.mark.parametrize("size", [(17, 32), (20, 256)])
def test_blocks_of_channels_of_whole_vectors(instruction_set, shape, density, size):
    assert_equal(shape, size, density=density, mode="zeros")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_densities(instruction_set, density, stride, dtype):
    assert_equal((7, 6, 3, 3), (13, 22), density=density, stride=stride, dtype=dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    size=st.tuples(st.integers(5, 40), st.integers(7, 50)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 4),
    mode=st.sampled_from(list(MODES)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    experiments=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(channels, kernel, size, stride, padding, mode, density, experiments, dtype):
    assert_equal(
        (*channels, *kernel), size, stride=stride, padding=padding, mode=mode, density=density,
        experiments=experiments, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("outputs", [4, 33])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", range(len(MODES)))
@pytest.mark.parametrize("size", [(5, 7), (70, 63), (40, 64)])
def test_an_image_read_through_a_load(instruction_set, size, mode, stride, outputs):
    torch.manual_seed(0)
    pattern = SparsePattern.of(torch.rand(outputs, 5, 3, 3) < 0.8, stride)
    parts = (pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order, outputs, 3, 3, stride, 1, mode)
    x, load, values = torch.randn(2, 5, *size), torch.randn(2, 5, 5), torch.randn(2, len(pattern.index))
    ops, loaded = torch.ops.sparse_gen, torch.ops.sparse_gen.apply_load(x, load)
    out = ops.sparse_conv2d(x, values, None, *parts, load)
    torch.testing.assert_close(out, ops.sparse_conv2d(loaded, values, None, *parts, None))
    gradient = torch.randn_like(out)
    got = ops.sparse_conv2d_backward(gradient, x, values, *parts, load, True, True)
    want = ops.sparse_conv2d_backward(gradient, loaded, values, *parts, None, True, True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("outputs", [4, 33])
@pytest.mark.parametrize(("width", "pitch"), [(66, 80), (66, 67), (130, 144), (65, 80)])
def test_rows_that_lie_apart(instruction_set, width, pitch, outputs):
    torch.manual_seed(0)
    pattern = SparsePattern.of(torch.rand(outputs, 20, 3, 3) < 0.8)
    parts = (pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order, outputs, 3, 3, 1, 0, 0, None)
    x, values = torch.randn(2, 20, 41, pitch)[:, :, :40, :width], torch.randn(2, len(pattern.index))
    ops = torch.ops.sparse_gen
    out = ops.sparse_conv2d(x, values, None, *parts)
    torch.testing.assert_close(out, ops.sparse_conv2d(x.contiguous(), values, None, *parts))
    gradient = torch.randn_like(out)
    got = ops.sparse_conv2d_backward(gradient, x, values, *parts, True, True)
    want = ops.sparse_conv2d_backward(gradient, x.contiguous(), values, *parts, True, True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (5, 4), (5, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 23), (70, 131), (67, 134)])
def test_the_phases_of_an_image(kernel, stride, size):
    torch.manual_seed(0)
    pattern = SparsePattern.of(torch.rand(4, 20, *kernel) < 0.2, stride)
    over, order = pattern.over_phases()
    assert over.stride == 1
    x, values = torch.randn(2, 20, *size, dtype=torch.float64), torch.randn(2, len(order), dtype=torch.float64)
    values.requires_grad_()
    want = sparse_conv2d(x, values, pattern)
    seen = phases(x, pattern)
    parts = (over.taps, over.by_output, over.by_input, over.input_order, *over.shape[::2], over.shape[3], 1, 0, 0, None)
    got = torch.ops.sparse_gen.sparse_conv2d(seen, values[:, order], None, *parts)
    torch.testing.assert_close(got, want)
    gradient = torch.randn_like(want)
    gradients = [torch.autograd.grad(out, values, gradient)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients)


def test_channels_without_a_kept_weight():
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    mask[2, 1, 0, 2] = True
    pattern = SparsePattern.of(mask)
    x = torch.rand(1, 3, 6, 7, requires_grad=True)
    out = sparse_conv2d(x, torch.tensor([[2.0]]), pattern, torch.tensor([[1.0, 2, 3, 4]]), padding=1)
    assert (out[0, [0, 1, 3]] == torch.tensor([1.0, 2, 4])[:, None, None]).all()
    torch.testing.assert_close(out[0, 2, 1:, :-1], 3 + 2 * x[0, 1, :-1, 1:])
    out.sum().backward()
    assert (x.grad[0, [0, 2]] == 0).all()


def test_only_the_gradients_that_are_needed_are_computed():
    pattern = SparsePattern.of(torch.ones(2, 2, 3, 3, dtype=torch.bool))
    x, values = torch.rand(1, 2, 8, 8), torch.rand(1, 36, requires_grad=True)
    sparse_conv2d(x, values, pattern).sum().backward()
    assert values.grad is not None
    x.requires_grad_()
    sparse_conv2d(x, values.detach(), pattern).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("width", [64, 70, 144])
def test_the_same_bits_at_any_thread_count_and_beside_other_experiments(instruction_set, width):
    mask, generator = random_mask((16, 8, 3, 3), 0.3)
    pattern = SparsePattern.of(mask)
    x = torch.randn(2, 8, 70, width, generator=generator).requires_grad_()
    values = torch.randn(2, len(pattern.index), generator=generator).requires_grad_()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = sparse_conv2d(x, values, pattern, padding=1)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, values])])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone = sparse_conv2d(x[1:], values[1:], pattern, padding=1)
    assert torch.equal(alone, results[0][0][1:])


def test_gradcheck():
    for stride in (1, 2):
        mask, _ = random_mask((3, 2, 3, 3), 0.5)
        pattern = SparsePattern.of(mask, stride)
        leaves = [torch.randn(2, 2, 6, 5), torch.randn(2, len(pattern.index)), torch.randn(2, 3)]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        for mode in MODES:

            def function(x, values, bias, pattern=pattern, mode=mode):
                return sparse_conv2d(x, values, pattern, bias, padding=1, padding_mode=mode)

            assert torch.autograd.gradcheck(function, leaves)


def test_opcheck():
    pattern = SparsePattern.of(random_mask((3, 2, 3, 3), 0.5)[0], 2)
    x = torch.randn(2, 2, 9, 8, requires_grad=True)
    values = torch.randn(2, len(pattern.index), requires_grad=True)
    bias = torch.randn(2, 3, requires_grad=True)
    parts = (pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order, 3, 3, 3, 2, 1, 1, None)
    torch.library.opcheck(torch.ops.sparse_gen.sparse_conv2d, (x, values, bias, *parts))
    out = torch.ops.sparse_gen.sparse_conv2d(x, values, None, *parts).detach()
    torch.library.opcheck(
        torch.ops.sparse_gen.sparse_conv2d_backward, (out, x.detach(), values.detach(), *parts, True, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 8)}, "x of shape"),
        ({"x": torch.zeros(1, 2, 8, 8, dtype=torch.float16)}, "float32 or float64"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "pattern's 2 channels, got 3"),
        ({"x": torch.zeros(1, 2, 2, 8)}, "at least the kernel's 3×3, got 2×8"),
        ({"values": torch.zeros(1, 35)}, r"values of shape \(1, 36\), got \(1, 35\)"),
        ({"values": torch.zeros(1, 36, dtype=torch.float64)}, "values of torch.float32 on cpu like x"),
        ({"bias": torch.zeros(2)}, r"bias of shape \(1, 2\)"),
        ({"padding": -1}, "padding from 0 on"),
        ({"padding": 8, "padding_mode": "reflect"}, "more than 8 pixels a side to reflect, got 8×8"),
        ({"padding_mode": "circular"}, "padding_mode out of zeros, reflect, replicate, got 'circular'"),
    ],
)
def test_bad_arguments(change, message):
    pattern = SparsePattern.of(torch.ones(2, 2, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        sparse_conv2d(**{"x": torch.zeros(1, 2, 8, 8), "values": torch.zeros(1, 36), "pattern": pattern} | change)


def test_bad_patterns():
    with pytest.raises(ValueError, match="stride 1 or 2, got 3"):
        SparsePattern.of(torch.ones(2, 2, 3, 3, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="bool mask of shape"):
        SparsePattern.of(torch.ones(2, 2, 3, 3))
