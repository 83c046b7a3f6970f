"""`sparse_upsample_conv2d`: outputs and every gradient against up-sample, pad and dense convolution in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_gen.ops.sparse_upsample_conv2d import TapPattern, sparse_upsample_conv2d

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
UPSAMPLE = {
    "nearest": {"mode": "nearest"},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},
}


def random_mask(shape, density):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator) < density, generator


def dense(x, weight, bias, padding, mode, upsample):
    outputs = []
    for e in range(len(x)):
        large = F.interpolate(x[e : e + 1], scale_factor=2, **UPSAMPLE[upsample])
        padded = F.pad(large, [padding] * 4, mode=MODES[mode]) if padding else large
        outputs.append(F.conv2d(padded, weight[e], bias[e]))
    return torch.cat(outputs)


def assert_equal(
    shape, size, *, density=0.3, mode="reflect", upsample="nearest", experiments=2, dtype=torch.float32, device="cpu"
):
    padding = shape[-1] // 2
    mask, generator = random_mask(shape, density)
    pattern, index = TapPattern.of(mask.to(device)), TapPattern.of(mask).pattern.index

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype)

    leaves = [normal(experiments, shape[1], *size), normal(experiments, len(index)), normal(experiments, shape[0])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    options = {"padding": padding, "padding_mode": mode, "upsample": upsample}
    out = sparse_upsample_conv2d(*leaves[:2], pattern, leaves[2], **options)

    doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    flat = torch.zeros(experiments, mask.numel(), dtype=torch.float64)
    weight = flat.scatter(1, index.expand(experiments, -1), doubles[1]).view(experiments, *shape)
    expected = dense(doubles[0], weight, doubles[2], padding, mode, upsample)
    assert out.shape == expected.shape
    gradient = normal(*out.shape)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.cpu().double())]
    # The bias's gradient is a plain sum, which may cancel: its error is measured against what is summed.
    scales = [*(w.norm() for w in want[:3]), gradient.cpu().double().abs().sum(dim=(2, 3)).norm()]
    for g, w, scale in zip(got, want, scales, strict=True):
        assert g.shape == w.shape
        assert (g.cpu().double() - w).norm() <= TOLERANCE[dtype] * scale + 1e-300


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("upsample", list(UPSAMPLE))
@pytest.mark.parametrize("size", [(2, 3), (4, 4), (9, 23), (33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(instruction_set, kernel, mode, upsample, size, dtype):
    assert_equal((5, 3, kernel, kernel), size, mode=mode, upsample=upsample, dtype=dtype)


@pytest.mark.parametrize("upsample", list(UPSAMPLE))
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_one_row_or_one_column_and_the_largest_kernel(instruction_set, mode, upsample):
    for size in ((1, 1), (1, 40), (40, 1), (3, 2)):
        assert_equal((2, 2, 11, 11), size, mode=mode, upsample=upsample)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.sampled_from([1, 3, 5]),
    size=st.tuples(st.integers(2, 30), st.integers(2, 40)),
    mode=st.sampled_from(list(MODES)),
    upsample=st.sampled_from(list(UPSAMPLE)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    experiments=st.integers(1, 3),
)
def test_any_shape(channels, kernel, size, mode, upsample, density, experiments):
    given = {"mode": mode, "upsample": upsample, "density": density, "experiments": experiments}
    assert_equal((*channels, kernel, kernel), size, **given)


@pytest.mark.parametrize("size", [(5, 7), (70, 33)])
@pytest.mark.parametrize("upsample", [1, 2, 3])
def test_an_image_read_through_a_load(instruction_set, size, upsample):
    torch.manual_seed(0)
    pattern = TapPattern.of(torch.rand(4, 3, 3, 3) < 0.4)
    inner = pattern.pattern
    parts = (inner.taps, pattern.by_tap, pattern.tap_order, inner.by_input, inner.input_order, 4, 3, 3, 1, 1, upsample)
    x, load, values = torch.randn(2, 3, *size), torch.randn(2, 3, 5), torch.randn(2, len(inner.index))
    gradient = torch.randn(2, 4, 2 * size[0], 2 * size[1])
    ops, loaded = torch.ops.sparse_gen, torch.ops.sparse_gen.apply_load(x, load)
    out = ops.sparse_upsample_conv2d(x, values, None, *parts, load)
    torch.testing.assert_close(out, ops.sparse_upsample_conv2d(loaded, values, None, *parts, None))
    got = ops.sparse_upsample_conv2d_backward(gradient, x, values, *parts, load, True, True)
    want = ops.sparse_upsample_conv2d_backward(gradient, loaded, values, *parts, None, True, True)
    torch.testing.assert_close(got, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to run on")
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("upsample", list(UPSAMPLE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(poisoned, mode, upsample, dtype):
    given = {"mode": mode, "upsample": upsample, "dtype": dtype, "device": "cuda"}
    for kernel, size in itertools.product((1, 3, 5), ((3, 4), (9, 23), (33, 65), (64, 64))):
        assert_equal((5, 3, kernel, kernel), size, **given)
    # Several steps of channels and of weights; several channels a warp.
    assert_equal((20, 130, 3, 3), (9, 13), density=0.5, **given)
    assert_equal((16, 64, 3, 3), (128, 70), **given)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to run on")
@pytest.mark.parametrize("upsample", list(UPSAMPLE))
def test_the_same_bits_on_a_gpu_run_for_run_and_beside_other_experiments(upsample):
    mask, generator = random_mask((16, 40, 3, 3), 0.3)
    pattern = TapPattern.of(mask.cuda())
    x, values = (torch.randn(2, *s, generator=generator).cuda() for s in ((40, 65, 70), (len(pattern.tap_order),)))

    def results(x, values):
        leaves = x.detach().requires_grad_(), values.detach().requires_grad_()
        out = sparse_upsample_conv2d(*leaves, pattern, padding=1, padding_mode="reflect", upsample=upsample)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = results(x, values)
    for _ in range(5):
        assert all(map(torch.equal, first, results(x, values)))
    # A gradient that begins between two pairs of pixels.
    shifted = torch.empty(first[0].numel() + 1, device="cuda")[1:].view_as(first[0])
    leaf = values.detach().requires_grad_()
    out = sparse_upsample_conv2d(x, leaf, pattern, padding=1, padding_mode="reflect", upsample=upsample)
    assert torch.equal(torch.autograd.grad(out, leaf, shifted.copy_(2 * first[0]))[0], first[2])
    # How many output channels share a block goes by the blocks there are, and must not show.
    for part, alone in zip(first, results(x[1:], values[1:]), strict=True):
        assert torch.equal(part[1:], alone)


def test_gradcheck_and_opcheck():
    mask, _ = random_mask((3, 2, 3, 3), 0.5)
    pattern = TapPattern.of(mask)
    kept = len(pattern.pattern.index)
    leaves = [torch.randn(2, 2, 3, 4), torch.randn(2, kept), torch.randn(2, 3)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    for mode, upsample in itertools.product(MODES, UPSAMPLE):

        def function(x, values, bias, mode=mode, upsample=upsample):
            return sparse_upsample_conv2d(x, values, pattern, bias, padding=1, padding_mode=mode, upsample=upsample)

        assert torch.autograd.gradcheck(function, leaves)
    inner = pattern.pattern
    x, values, _ = (leaf.detach() for leaf in leaves)
    gradient = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for kind in (1, 2, 3):
        parts = (inner.taps, pattern.by_tap, pattern.tap_order, inner.by_input, inner.input_order)
        parts += (3, 3, 3, 1, 1, kind, None)
        torch.library.opcheck(torch.ops.sparse_gen.sparse_upsample_conv2d, (*leaves, *parts))
        torch.library.opcheck(
            torch.ops.sparse_gen.sparse_upsample_conv2d_backward, (gradient, x, values, *parts, True, True)
        )


@pytest.mark.parametrize("size", [(4, 5), (31, 33), (70, 71)])
@pytest.mark.parametrize("upsample", list(UPSAMPLE))
def test_the_same_bits_at_any_thread_count_and_beside_other_experiments(instruction_set, size, upsample):
    options = {"padding": 1, "padding_mode": "reflect", "upsample": upsample}
    mask, generator = random_mask((16, 8, 3, 3), 0.3)
    pattern = TapPattern.of(mask)
    x = torch.randn(2, 8, *size, generator=generator).requires_grad_()
    values = torch.randn(2, len(pattern.pattern.index), generator=generator).requires_grad_()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = sparse_upsample_conv2d(x, values, pattern, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, values])])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone = sparse_upsample_conv2d(x[1:], values[1:], pattern, **options)
    assert torch.equal(alone, results[0][0][1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 4)}, "x of shape"),
        ({"x": torch.zeros(1, 3, 4, 4)}, "pattern's 2 channels, got 3"),
        ({"values": torch.zeros(1, 35)}, r"values of shape \(1, 36\), got \(1, 35\)"),
        ({"bias": torch.zeros(1, 2, dtype=torch.float64)}, "bias of torch.float32 on cpu like x"),
        ({"padding": 2}, "half its size as padding, got 3×3 and 2"),
        ({"padding_mode": "circular"}, "padding_mode out of zeros, reflect, replicate"),
        ({"upsample": "bicubic"}, "upsample out of nearest, bilinear, bilinear_corners, got 'bicubic'"),
    ],
)
def test_bad_arguments(change, message):
    pattern = TapPattern.of(torch.ones(2, 2, 3, 3, dtype=torch.bool))
    arguments = {"x": torch.zeros(1, 2, 4, 4), "values": torch.zeros(1, 36), "pattern": pattern, "padding": 1}
    with pytest.raises(ValueError, match=message):
        sparse_upsample_conv2d(**arguments | change)
