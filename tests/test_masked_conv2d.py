"""`masked_conv2d`: every layout's outputs and gradients against PyTorch's separate steps in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_gpu import PretendedGpu, numbers, to_gpu
from torch.nn import functional as F

from sparse_gen.ops import masked_conv2d_layouts as layouts
from sparse_gen.ops.extension import status
from sparse_gen.ops.masked_conv2d import masked_conv2d, masked_conv2d_backward, masked_conv2d_forward
from sparse_gen.ops.masked_conv2d_layouts import LAYOUTS, UPSAMPLE, pooled_means, why_not

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
# Of these, a machine may have none.
SPLIT = ("split", "split taps")
needs_amx = pytest.mark.skipif(status().instruction_set != "amx", reason="this machine or this build has no AMX tiles")
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def dense(x, weight, bias, *, stride, padding, padding_mode, upsample, pool):
    """E separate runs of the steps as written."""
    outputs = []
    for e in range(len(x)):
        one = x[e : e + 1]
        if upsample:
            one = F.interpolate(one, scale_factor=2, mode=upsample)
        padded = F.pad(one, [padding] * 4, mode=MODES[padding_mode]) if padding else one
        out = F.conv2d(padded, weight[e], bias[e], stride=stride)
        outputs.append(F.avg_pool2d(out, 2) if pool else out)
    return torch.cat(outputs)


def assert_equal(
    shape, size, *, stride=1, padding=None, mode="reflect", upsample=None, pool=False, layout="auto", experiments=2,
    dtype=torch.float32,
):  # fmt: skip
    padding = shape[-1] // 2 if padding is None else padding
    generator = torch.Generator().manual_seed(0)

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype)

    arguments = {"stride": stride, "padding": padding, "padding_mode": mode, "upsample": upsample, "pool": pool}
    leaves = [normal(experiments, shape[1], *size), normal(experiments, *shape), normal(experiments, shape[0])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = masked_conv2d(*leaves, **arguments, layout=layout)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*doubles, **arguments)
    assert out.shape == expected.shape
    gradient = normal(*out.shape)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    # The bias's gradient is a plain sum, which may cancel: its error is measured against what is summed.
    scales = [*(w.norm() for w in want[:3]), gradient.double().abs().sum(dim=(2, 3)).norm()]
    for g, w, scale in zip(got, want, scales, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= TOLERANCE[dtype] * scale + 1e-300


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("size", [(3, 2), (4, 4), (9, 23), (33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_taps(instruction_set, kernel, mode, size, dtype, upsample):
    assert_equal((7, 3, kernel, kernel), size, mode=mode, dtype=dtype, upsample=upsample, layout="taps")


# More pixels than one band holds, more rows than are worked on at a time, and channels in several groups.
@pytest.mark.parametrize("shape", [(17, 35, 3, 3), (3, 4, 5, 5), (2, 3, 11, 11)])
@pytest.mark.parametrize("size", [(150, 31), (13, 700)])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_taps_in_bands(instruction_set, shape, size, upsample):
    assert_equal(shape, size, upsample=upsample, layout="taps", experiments=1)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("size", [(2, 2), (9, 23), (33, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phases(mode, size, dtype):
    assert_equal((5, 3, 3, 3), size, mode=mode, dtype=dtype, upsample="nearest", layout="phase")


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("size", [(8, 9), (23, 10), (66, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles(instruction_set, kernel, stride, pool, mode, size, dtype):
    layout = "direct" if stride == 2 and pool else "tiles"
    assert_equal((7, 3, kernel, kernel), size, layout=layout, stride=stride, pool=pool, mode=mode, dtype=dtype)


# More rows than one band holds, channels in several groups and, for the weight's gradient, too many for bands.
@pytest.mark.parametrize("shape", [(130, 37, 3, 3), (30, 20, 5, 3)])
@pytest.mark.parametrize("size", [(150, 31), (13, 700), (6, 5)])
@pytest.mark.parametrize("pool", [False, True])
def test_tiles_in_bands(instruction_set, shape, size, pool):
    assert_equal(shape, size, pool=pool, layout="tiles", experiments=1)


# Channels below a tile, of one tile, of several, odd and even; bands, groups of channels, and both at once.
@needs_amx
@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (16, 16, 5, 5), (40, 70, 3, 3), (33, 20, 1, 1), (5, 37, 2, 2)])
@pytest.mark.parametrize("size", [(8, 9), (23, 10), (66, 130)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_split(shape, size, stride, pool, mode):
    layout = "direct" if stride == 2 and pool else "split"
    assert_equal(shape, size, layout=layout, stride=stride, pool=pool, mode=mode)


@needs_amx
@pytest.mark.parametrize("shape", [(130, 37, 3, 3), (30, 20, 5, 3), (128, 128, 5, 5)])
@pytest.mark.parametrize("size", [(150, 31), (13, 700), (6, 5)])
@pytest.mark.parametrize("pool", [False, True])
def test_split_in_bands(shape, size, pool):
    assert_equal(shape, size, pool=pool, layout="split", experiments=1)


# Several bands of rows, taps that see an even or an odd column first, kernels wider than high.
@needs_amx
@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (16, 32, 5, 5), (33, 70, 1, 7), (5, 37, 2, 2), (3, 4, 1, 1)])
@pytest.mark.parametrize("size", [(8, 9), (23, 10), (66, 130)])
@pytest.mark.parametrize(("stride", "pool"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("mode", list(MODES))
def test_split_with_parts_that_are_kept(poisoned, shape, size, stride, pool, mode):
    ops, generator = torch.ops.sparse_gen, torch.Generator().manual_seed(0)
    arguments = (stride, 1, list(MODES).index(mode), pool)
    x, weight = torch.randn(2, shape[1], *size, generator=generator), torch.randn(2, *shape, generator=generator)
    bias = torch.randn(2, shape[0], generator=generator)
    parts = ops.masked_conv2d_split_parts(x, *shape[2:], *arguments)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = ops.masked_conv2d_split_kept(*leaves, parts, *arguments)
    expected = dense(*doubles, stride=stride, padding=1, padding_mode=mode, upsample=None, pool=pool)
    gradient = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, leaves[:2], gradient)
    for got, want in zip(
        (out, *grads), (expected, *torch.autograd.grad(expected, doubles[:2], gradient.double())), strict=True
    ):
        assert (got.double() - want).norm() <= TOLERANCE[torch.float32] * want.norm()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = ops.masked_conv2d_split_kept(*leaves, parts, *arguments)
        grads_again = torch.autograd.grad(again, leaves[:2], gradient)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, (out, *grads), (again, *grads_again)))


@needs_amx
@pytest.mark.parametrize(
    "shape", [(7, 3, 3, 3), (16, 16, 5, 5), (40, 70, 3, 3), (33, 20, 1, 1), (3, 4, 7, 7), (2, 3, 11, 11)]
)
@pytest.mark.parametrize("size", [(4, 3), (9, 23), (66, 130), (13, 700)])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_split_taps(shape, size, mode, upsample):
    assert_equal(shape, size, layout="split taps", mode=mode, upsample=upsample)


@needs_amx
@pytest.mark.parametrize("layout", SPLIT)
def test_split_is_as_exact_as_float32_where_sizes_differ_by_much(layout):
    upsample = "nearest" if layout == "split taps" else None
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 40, 30, 30, generator=generator), torch.randn(1, 24, 40, 3, 3, generator=generator)
    # Every channel of its own size, from 1e-8 to 1e8, the weights against it: all contribute alike.
    scale = torch.logspace(-8, 8, 40)
    x, weight = x * scale[:, None, None], weight / scale[:, None, None]
    steps = {"stride": 1, "padding": 1, "padding_mode": "zeros", "upsample": upsample, "pool": False}
    expected = dense(x.double(), weight.double(), [None], **steps)

    def error(layout):
        return (masked_conv2d(x, weight, **steps, layout=layout).double() - expected).norm() / expected.norm()

    assert error(layout) <= 2 * error("direct")


def test_split_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("SPARSE_GEN_ISA", "baseline")
    for layout in SPLIT:
        with pytest.raises(ValueError, match="AMX"):
            masked_conv2d(
                torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), padding=1, layout=layout,
                upsample="nearest" if layout == "split taps" else None,
            )  # fmt: skip


@pytest.mark.parametrize("layout", ["direct", "gemm"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_folds(layout, kernel, stride, pool, mode):
    for size in ((8, 8), (11, 22)):
        assert_equal((5, 3, kernel, kernel), size, layout=layout, stride=stride, pool=pool, mode=mode)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.one_of(st.sampled_from([(1, 1), (3, 3), (5, 5)]), st.tuples(st.integers(1, 7), st.integers(1, 7))),
    size=st.tuples(st.integers(5, 40), st.integers(7, 50)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 4),
    same_size=st.booleans(),
    mode=st.sampled_from(list(MODES)),
    upsample=st.sampled_from(UPSAMPLE),
    pool=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    experiments=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(
    channels, kernel, size, stride, padding, same_size, mode, upsample, pool, layout, experiments, dtype
):
    if same_size:
        padding, stride, pool = kernel[0] // 2, 1, False
    places = list(MODES).index(mode), UPSAMPLE.index(upsample)
    if why_not(layout, (*channels, *kernel), stride, padding, *places, pool):
        layout = "auto"
    if 2 * padding + 5 < kernel[0] + pool or 2 * padding + 7 < kernel[1] + pool:
        padding = 4
    assert_equal(
        (*channels, *kernel), size, stride=stride, padding=padding, mode=mode, upsample=upsample, pool=pool,
        layout=layout, experiments=experiments, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("experiments", [1, 3])
def test_experiments_as_groups_of_one_convolution(kernel, stride, padding, biased, experiments):
    generator = torch.Generator().manual_seed(0)
    shapes = [(experiments, 4, 11, 8), (experiments, 5, 4, kernel, kernel), (experiments, 5)]
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    rows = [
        F.conv2d(x[e : e + 1], weight[e], bias[e] if biased else None, stride=stride, padding=padding)
        for e in range(experiments)
    ]
    expected = torch.cat(rows)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad(expected, [x, weight], gradient)
    x, weight, bias = x.detach(), weight.detach(), bias.detach() if biased else None
    got = layouts.grouped(x, weight, bias, stride, padding)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-13)
    for needs in ((True, True), (True, False), (False, True)):
        grads = layouts.grouped_backward(gradient, x, weight, stride, padding, *needs)
        for grad, w, needed in zip(grads, want, needs, strict=True):
            assert (grad is not None) == needed
            if needed:
                torch.testing.assert_close(grad, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["direct", "phase"])
def test_on_a_gpu_one_convolution_serves_all_experiments(monkeypatch, layout):
    convolutions, original = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: convolutions.append(k.get("groups", 1)) or original(*a, **k))
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 9, 6), (3, 5, 4, 3, 3), (3, 5)]
    given = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    arguments = (1, 1, 1, UPSAMPLE.index("nearest"), False, LAYOUTS.index(layout))
    expected = masked_conv2d_forward(*given, *arguments)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    want = masked_conv2d_backward(gradient, *given[:2], *arguments, True, True)
    assert convolutions == [1, 1, 1]
    with PretendedGpu():
        there = [to_gpu(tensor) for tensor in given]
        got = masked_conv2d_forward(*there, *arguments)
        grads = masked_conv2d_backward(to_gpu(gradient), *there[:2], *arguments, True, True)
        found = [numbers(tensor) for tensor in (got, *grads)]
    assert convolutions == [1, 1, 1, 3]
    for tensor, w in zip(found, (expected, *want), strict=True):
        torch.testing.assert_close(tensor, w, rtol=1e-12, atol=1e-12)


def test_one_weight_for_all_experiments():
    x, weight, bias = torch.randn(3, 2, 6, 7), torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4)
    out = masked_conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1))
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).square().sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_means_of_pooled_convolution():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    means = pooled_means(x, 1, 0)
    assert means[0, 0, 1].tolist() == [0.75, 2.0, 3.0, 1.75]
    weight = torch.randn(2, 1, 3, 3)
    x = torch.randn(1, 1, 8, 9)
    folded = masked_conv2d(pooled_means(x, 1, 1), weight, stride=2)
    torch.testing.assert_close(folded, masked_conv2d(x, weight, padding=1, padding_mode="reflect", pool=True))


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[needs_amx] * (name in SPLIT)) for name in LAYOUTS])
def test_only_the_gradients_that_are_needed_are_computed(layout):
    scale = {"padding": 1, "layout": layout, "upsample": None if layout in ("tiles", "split") else "nearest"}
    for size in (8, 60):
        x, weight = torch.rand(1, 2, size, size), torch.rand(2, 2, 3, 3, requires_grad=True)
        masked_conv2d(x, weight, **scale).sum().backward()
        own = weight.grad
        weight.grad = None
        x.requires_grad_()
        masked_conv2d(x, weight, **scale).sum().backward()
        assert torch.equal(own, weight.grad)
        both = x.grad
        x.grad = None
        masked_conv2d(x, weight.detach(), **scale).sum().backward()
        assert torch.equal(both, x.grad)


@pytest.mark.parametrize("size", [(20, 21), (70, 71), (140, 33)])
@pytest.mark.parametrize("layout", ["taps", "tiles"])
def test_the_same_bits_at_any_thread_count_and_beside_other_experiments(instruction_set, size, layout):
    assert_the_same_bits(size, layout)


@needs_amx
@pytest.mark.parametrize("size", [(20, 21), (70, 71), (140, 33)])
@pytest.mark.parametrize("layout", SPLIT)
def test_the_same_bits_from_tiles(size, layout):
    assert_the_same_bits(size, layout)


def assert_the_same_bits(size, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, *size, generator=generator).requires_grad_()
    weight = torch.randn(2, 33, 8, 3, 3, generator=generator).requires_grad_()
    upsample = "nearest" if "taps" in layout else None
    scale = {"padding": 1, "padding_mode": "reflect", "upsample": upsample, "layout": layout}
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = masked_conv2d(x, weight, **scale)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, weight])])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone = masked_conv2d(x[1:], weight[1:], **scale)
    assert torch.equal(alone, results[0][0][1:])


LEAVES = [(2, 2, 4, 5), (2, 3, 2, 3, 3), (2, 3)]
CASES = [
    {"pool": True, "padding_mode": "reflect"},
    {"stride": 2, "layout": "gemm"},
    {"pool": True, "layout": "tiles", "padding_mode": "reflect"},
    {"stride": 2, "layout": "tiles", "padding_mode": "replicate"},
    {"upsample": "nearest", "layout": "taps", "padding_mode": "reflect"},
    {"upsample": "bilinear", "layout": "taps"},
    {"upsample": "nearest", "layout": "phase", "padding_mode": "replicate"},
    {"upsample": "bilinear", "layout": "direct", "pool": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in LEAVES]
    assert torch.autograd.gradcheck(lambda *t: masked_conv2d(*t, padding=1, **case), leaves)


def test_opcheck():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in LEAVES)
    ops = torch.ops.sparse_gen
    for arguments in ((1, 1, 1, 0, True, 0), (2, 1, 0, 0, False, 4), (1, 1, 1, 1, False, 2), (1, 1, 2, 1, False, 3)):
        torch.library.opcheck(ops.masked_conv2d, (x, weight, bias, *arguments))
        out = ops.masked_conv2d(x, weight, None, *arguments).detach()
        torch.library.opcheck(ops.masked_conv2d_backward, (out, x.detach(), weight.detach(), *arguments, True, True))
    torch.library.opcheck(ops.masked_conv2d_taps, (x, weight, bias, 1, 1, True))
    out = ops.masked_conv2d_taps(x, weight, None, 1, 1, True).detach()
    torch.library.opcheck(ops.masked_conv2d_taps_backward, (out, x.detach(), weight.detach(), 1, 1, True, True, True))


@needs_amx
def test_opcheck_of_parts_that_are_kept():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in LEAVES)
    ops = torch.ops.sparse_gen
    torch.library.opcheck(ops.masked_conv2d_split_parts, (x.detach(), 3, 3, 1, 1, 1, True))
    parts = ops.masked_conv2d_split_parts(x.detach(), 3, 3, 1, 1, 1, True)
    torch.library.opcheck(ops.masked_conv2d_split_kept, (x, weight, bias, parts, 1, 1, 1, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 8)}, "weight of shape|x of shape"),
        ({"x": torch.zeros(1, 2, 8, 8, dtype=torch.float16)}, "float32 or float64"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "channels, got 3"),
        ({"weight": torch.zeros(3, 2, 3)}, r"weight of shape \(out, in, kh, kw\)"),
        ({"weight": torch.zeros(2, 3, 2, 3, 3)}, "with E = 1 in front"),
        ({"weight": torch.zeros(3, 2, 3, 3, dtype=torch.float64)}, "weight of torch.float32 on cpu like x"),
        ({"bias": torch.zeros(2)}, r"bias of shape \(1, 3\)"),
        ({"stride": 3}, "stride 1 or 2"),
        ({"padding": 8, "padding_mode": "reflect"}, "more than 8 pixels a side to reflect, got 8×8"),
        ({"padding_mode": "circular"}, "padding_mode out of zeros, reflect, replicate, got 'circular'"),
        ({"upsample": "cubic"}, "upsample out of None, nearest, bilinear, got 'cubic'"),
        ({"layout": "fft"}, "layout out of auto, direct, .*, got 'fft'"),
        ({"layout": "phase"}, "'phase', which is for nearest up-sampling and a 3×3 kernel with padding 1"),
        ({"layout": "taps", "upsample": "nearest"}, "'taps', which is for up-sampling"),
        ({"x": torch.zeros(1, 2, 3, 3), "pool": True}, "at least one pixel, got 0×0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**{"x": torch.zeros(1, 2, 8, 8), "weight": torch.zeros(3, 2, 3, 3)} | change)
