"""Triton's `masked_conv2d`: output and every gradient against torch in float64, and the machine code."""

import pytest
import torch
from ahead_of_time import assert_tensor_cores, compile_for_sm_90
from torch.nn import functional as F

from sparse_gen.ops.norm_load import apply_load_reference

# DESIGN's norm-wise errors against float64. The interpreter multiplies "tf32" in float32, a GPU does not.
TOLERANCE = {"ieee": 5e-6, "tf32": 2e-3, "bf16": 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("constant", "reflect", "replicate")
UPSAMPLE = (None, "nearest", "bilinear")


@pytest.fixture
def kernel(poisoned):
    return pytest.importorskip("sparse_gen.kernels.masked_conv2d", reason="triton is not installed")


@pytest.fixture
def short_splits(kernel, monkeypatch):
    """Splits even the shortest sum."""
    monkeypatch.setattr("sparse_gen.kernels.splits.MIN_ITERATIONS", 1)
    return kernel


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(x, weight, bias, stride, padding, mode, upsample, pool):
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode=UPSAMPLE[upsample])
    x = F.pad(x, [padding] * 4, mode=MODES[mode]) if padding else x
    bias = [None] * len(x) if bias is None else bias
    out = torch.cat([F.conv2d(x[e : e + 1], weight[e], bias[e], stride=stride) for e in range(len(x))])
    return F.avg_pool2d(out, 2) if pool else out


def assert_close(got, want, precision="ieee"):
    assert got.shape == want.shape
    assert (got.cpu().double() - want).norm() <= TOLERANCE[precision] * want.norm()


def compare(kernel, x, weight, bias, arguments, precision="ieee"):
    """Output and both gradients of the operator's arguments (stride, padding, mode, upsample, pool)."""
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    want = dense(*leaves, None if bias is None else bias.double(), *arguments)
    gradient = normal(*want.shape, seed=1)
    on_device = [t if t is None else t.to(DEVICE) for t in (x, weight, bias, gradient)]
    got = kernel.masked_conv2d(*on_device[:3], *arguments, 0)
    assert_close(got, want, precision)
    backward = kernel.masked_conv2d_backward(on_device[3], *on_device[:2], *arguments, 0, True, True)
    for g, w in zip(backward, torch.autograd.grad(want, leaves, gradient.double()), strict=True):
        assert_close(g, w, precision)


# (in, out, kernel, height, width) and (stride, padding, mode, upsample, pool)
CASES = [
    ((5, 6, 3, 7, 9), (1, 1, 1, 0, False)),
    ((5, 6, 3, 7, 9), (1, 1, 0, 0, False)),
    ((5, 6, 3, 7, 9), (1, 1, 2, 0, False)),
    ((3, 4, 5, 6, 7), (1, 2, 1, 0, False)),
    ((3, 4, 5, 6, 7), (2, 2, 2, 0, False)),
    ((5, 6, 3, 9, 8), (2, 1, 0, 0, False)),
    ((5, 6, 1, 5, 3), (2, 0, 0, 0, False)),
    ((4, 3, 1, 5, 7), (1, 0, 0, 0, False)),
    ((5, 6, 3, 7, 9), (1, 1, 1, 0, True)),
    ((3, 4, 5, 9, 6), (1, 2, 0, 0, True)),
    ((3, 4, 3, 7, 6), (2, 1, 1, 0, True)),
    ((5, 6, 3, 4, 5), (1, 1, 1, 1, False)),
    ((5, 6, 3, 4, 5), (1, 1, 0, 1, False)),
    ((3, 4, 5, 4, 5), (1, 2, 2, 1, False)),
    ((5, 6, 3, 4, 5), (1, 1, 1, 2, False)),
    ((5, 6, 3, 1, 3), (1, 1, 0, 2, False)),
    ((3, 4, 3, 5, 4), (1, 1, 2, 2, True)),
    ((17, 33, 3, 2, 3), (1, 1, 1, 0, False)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("shape", "arguments"), CASES, ids=str)
def test_output_and_gradients(kernel, monkeypatch, shape, arguments):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    channels, out_channels, size, height, width = shape
    x, weight = normal(2, channels, height, width), normal(2, out_channels, channels, size, size, seed=2)
    compare(kernel, x, weight, normal(2, out_channels, seed=3), arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_precisions(kernel, monkeypatch, precision):
    monkeypatch.setattr(kernel, "precision_of_torch", lambda: precision)
    compare(kernel, normal(2, 17, 5, 6), normal(2, 19, 17, 3, 3, seed=2), None, (1, 1, 1, 0, False), precision)


@pytest.mark.interpreter
def test_bf16_rounds(kernel, monkeypatch):
    """What tells bf16 from float32: the third digit."""
    monkeypatch.setattr(kernel, "precision_of_torch", lambda: "bf16")
    x, weight = torch.tensor(1 + 2**-10).view(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    assert kernel.masked_conv2d(x.to(DEVICE), weight.to(DEVICE), None, 1, 0, 0, 0, False, 0).item() == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("arguments", [(1, 1, 1, 0, False), (2, 1, 0, 0, False), (1, 1, 2, 1, False)], ids=str)
def test_split_sums(short_splits, monkeypatch, arguments):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compare(short_splits, normal(2, 20, 3, 5), normal(2, 6, 20, 3, 3, seed=2), normal(2, 6, seed=3), arguments)


@pytest.mark.interpreter
def test_the_same_bits_beside_other_experiments(short_splits):
    x, weight, gradient = normal(3, 18, 5, 4), normal(3, 5, 18, 3, 3, seed=2), normal(3, 5, 5, 4, seed=3)
    x, weight, gradient = x.to(DEVICE), weight.to(DEVICE), gradient.to(DEVICE)
    arguments = (1, 1, 1, 0, False, 0)

    def results(rows):
        out = short_splits.masked_conv2d(x[rows], weight[rows], None, *arguments)
        return out, *short_splits.masked_conv2d_backward(gradient[rows], x[rows], weight[rows], *arguments, True, True)

    for alone, together in zip(results(slice(1, 2)), results(slice(None)), strict=True):
        assert torch.equal(alone, together[1:2])


@pytest.mark.interpreter
def test_only_the_gradients_that_are_needed(kernel):
    x, weight, gradient = normal(1, 2, 3, 3), normal(1, 2, 2, 1, 1), normal(1, 2, 3, 3)
    given = [t.to(DEVICE) for t in (gradient, x, weight)]
    grad_x, grad_weight = kernel.masked_conv2d_backward(*given, 1, 0, 0, 0, False, 0, True, False)
    assert grad_x.shape == x.shape
    assert grad_weight.numel() == 0
    grad_x, grad_weight = kernel.masked_conv2d_backward(*given, 1, 0, 0, 0, False, 0, False, True)
    assert grad_x.numel() == 0
    assert grad_weight.shape == weight.shape


# Convolution, BN, LeakyReLU, [up-sampling or pool,] convolution: the BN takes no pass over the image of its own.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("arguments", "splitting"),
    [
        ((1, 1, 0, 0, False), False),
        ((1, 1, 0, 0, False), True),
        ((1, 1, 1, 1, False), False),
        ((2, 1, 1, 2, False), False),
        ((1, 1, 2, 0, True), False),
    ],
    ids=str,
)
def test_batch_norm_between_two_convolutions(kernel, monkeypatch, arguments, splitting):
    if splitting:
        monkeypatch.setattr("sparse_gen.kernels.splits.MIN_ITERATIONS", 1)
    norm_act = pytest.importorskip("sparse_gen.kernels.norm_act")
    gradients = pytest.importorskip("sparse_gen.kernels.masked_conv2d_gradients")
    geometry = kernel.Geometry.of((3, 3), *arguments)
    before = kernel.Geometry.of((3, 3), 1, 1, 1, 0, False)
    tensors = [
        normal(2, 3, 11, 6), normal(2, 5, 3, 3, 3, seed=2), 4 + normal(2, 5, seed=3),
        normal(2, 5, seed=4), normal(2, 5, seed=5), normal(2, 4, 5, 3, 3, seed=6),
    ]  # fmt: skip
    x, first, bias, gamma, beta, second = (t.to(DEVICE) for t in tensors)
    middle, moments, span = kernel.convolve(x, first, bias, before, moments=True, precision="ieee")
    assert moments.shape[2] == 2  # 66 pixels: one full block and a shorter one
    load, mean, rstd = norm_act.load_of_moments(moments, 66, span, gamma, beta, 1e-5, 0.2)
    out, _, _ = kernel.convolve(middle, second, None, geometry, load=load, precision="ieee")

    x, first, bias, gamma64, beta64, second64 = leaves = [t.double().requires_grad_() for t in tensors]
    middle64 = dense(x, first, bias, 1, 1, 1, 0, False)
    middle64.retain_grad()
    activated = torch.cat([
        F.leaky_relu(F.batch_norm(middle64[e : e + 1], None, None, gamma64[e], beta64[e], training=True), 0.2)
        for e in range(2)
    ])  # fmt: skip
    want = dense(activated, second64, None, *arguments)
    assert_close(out, want)

    gradient = normal(*want.shape, seed=7)
    expected = torch.autograd.grad(want, [middle64, *leaves[3:]], gradient.double())
    gradient = gradient.to(DEVICE)
    grad_second = gradients.weight_gradient(gradient, middle, second, geometry, load=load, precision="ieee")
    grad_activated = gradients.input_gradient(gradient, middle, second, geometry, "ieee")
    behind = norm_act.norm_act_backward(grad_activated, middle, gamma, beta, mean, rstd, 0.2)
    for g, w in zip([*behind, grad_second], expected, strict=True):
        assert_close(g, w)


# Five numbers a channel, in front of padding and resampling, forward and in the weight's gradient.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "arguments",
    [(1, 1, 0, 0, False), (2, 1, 1, 0, False), (1, 1, 2, 1, False), (1, 1, 0, 2, False), (1, 1, 0, 0, True)],
)
def test_an_image_read_through_a_load(kernel, monkeypatch, arguments):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = normal(2, 5, 7, 6), normal(2, 4, 5, 3, 3, seed=2), normal(2, 4, seed=3)
    load = normal(2, 5, 5, seed=4)
    seen = apply_load_reference(tensors[0].double(), load.double()).requires_grad_()
    weight64 = tensors[1].double().requires_grad_()
    want = dense(seen, weight64, tensors[2].double(), *arguments)
    gradient = normal(*want.shape, seed=5)
    x, weight, bias, load, there = (t.to(DEVICE) for t in (*tensors, load, gradient))
    assert_close(kernel.masked_conv2d_loaded(x, weight, bias, *arguments, load), want)
    got = kernel.masked_conv2d_loaded_backward(there, x, weight, *arguments, load, True, True)
    for g, w in zip(got, torch.autograd.grad(want, [seen, weight64], gradient.double()), strict=True):
        assert_close(g, w)


def machine_code(splits, stem, name, constants, precision, geometry=None, depth=64, rows=4096, **types):
    """The machine code of the tile that such a product is given."""
    constants = dict(constants)
    if geometry:
        constants |= geometry.constants()
    if precision:
        blocks = splits.tile(rows, 64, depth, precision, geometry.gathers if geometry else 1)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        constants |= blocks | {"PRECISION": precision}
    else:
        options = {"num_warps": 4}
    (code,) = compile_for_sm_90(stem, [(name, types, constants, options)])
    return code


# (precision, upsample, pool)
RESAMPLING = [
    ("tf32", 0, False),
    ("tf32", 1, False),
    ("tf32", 2, False),
    ("tf32", 0, True),
    ("tf32", 2, True),
    ("bf16", 0, False),
    ("bf16", 2, True),
    ("ieee", 0, False),
    ("ieee", 2, True),
]
# Half of a multiprocessor's 227 KiB. Registers are limited to a little more than Triton 3.6 and 3.9 need: a program of
# 256 threads may have 255 a thread, and two of them run on a multiprocessor up to 128.
SHARED = 113 << 10


@pytest.mark.aot
@pytest.mark.parametrize(("precision", "upsample", "pool"), RESAMPLING)
def test_forward_compiles_for_sm_90(kernel, precision, upsample, pool):
    splits = pytest.importorskip("sparse_gen.kernels.splits")
    geometry = kernel.Geometry.of((3, 3), 1, 1, 1, upsample, pool)
    constants = {"LOAD": True, "BIAS": True, "MOMENTS": True}
    code = machine_code(splits, "masked_conv2d", "_forward_kernel", constants, precision, geometry)
    code.assert_within(shared=SHARED, registers=240)
    assert_tensor_cores(code, precision)


@pytest.mark.aot
@pytest.mark.parametrize(("precision", "upsample", "pool"), RESAMPLING)
def test_both_gradients_compile_for_sm_90(kernel, precision, upsample, pool):
    splits = pytest.importorskip("sparse_gen.kernels.splits")
    gradients = pytest.importorskip("sparse_gen.kernels.masked_conv2d_gradients")
    geometry = kernel.Geometry.of((3, 3), 1, 1, 1, upsample, pool)
    options = gradients.launch_options(
        gradients.plane_blocks(4096, 64, 64, precision, geometry),
        splits.tile(64, 64, 4096, precision, geometry.gathers),
    )
    constants = {
        "PLANE": True,
        "WEIGHT": True,
        "OFFSET": 0,
        "SUMMED": geometry.summed,
        "LOAD": True,
        "PRECISION": precision,
        **options,
    }
    launch = {"num_warps": constants.pop("num_warps")}
    configuration = "_gradients_kernel", {}, constants | geometry.constants(), launch
    (code,) = compile_for_sm_90("masked_conv2d_gradients", [configuration])
    code.assert_within(shared=SHARED, registers=255)
    assert_tensor_cores(code, precision)


@pytest.mark.aot
def test_passes_over_memory_compile_for_sm_90(kernel):
    splits = pytest.importorskip("sparse_gen.kernels.splits")
    tables = {f"p_{name}_{axis}": "*i32" for name in ("place", "count") for axis in "yx"}
    fold = {"BLOCK_H": 16, "BLOCK_W": 64}
    machine_code(splits, "fold", "_fold_kernel", fold, None, **tables).assert_within(shared=4096, registers=96)
    add = {"BIAS": True, "MOMENTS": True, "BLOCK": 1024}
    machine_code(splits, "splits", "_add_splits_kernel", add, None).assert_within(shared=64, registers=64)
