"""What the CUDA kernels' threads do, run on the host under the address sanitizer, against the references.

No GPU is needed: blocks and threads become loops in cuda_on_host.cpp. That shows the index arithmetic and the numbers;
what only a GPU shows, races and speed, it does not.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import block_mask

from sparse_gen.ops.block_halo import forward_lists, input_gradient_lists, weight_gradient_rounds
from sparse_gen.ops.block_sparse_conv2d import BlockPattern, block_sparse_conv2d_reference
from sparse_gen.ops.concrete_mask import (
    concrete_mask_backward_reference,
    concrete_mask_reference,
    concrete_mask_update_reference,
)
from sparse_gen.ops.norm_load import apply_load_reference
from sparse_gen.ops.philox import Stream
from sparse_gen.ops.sparse_conv2d import SparsePattern, sparse_conv2d_reference
from sparse_gen.ops.sparse_upsample_conv2d import UPSAMPLE, TapPattern, sparse_upsample_conv2d_reference

ROOT = Path(__file__).resolve().parent.parent
# DESIGN's bound for fp32, relative to the norm; double is rounding's.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
TF32 = 2e-3
MODES = ["zeros", "reflect", "replicate"]


def compiled(source, folder):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    path = folder / source
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    command = f"{compiler} -std=c++20 -O1 -g1 -Wall -Wextra -Werror {sanitize} -I{ROOT / 'csrc'}"
    run = subprocess.run(
        [*shlex.split(command), str(ROOT / f"tests/{source}.cpp"), "-o", str(path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return path


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return compiled("cuda_on_host", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def block_program(tmp_path_factory):
    return compiled("block_on_host", tmp_path_factory.mktemp("cuda"))


def run(program, name, dtype, numbers, arrays, shapes):
    """The arrays that the program writes, of these shapes."""
    sent = b"".join(array.detach().contiguous().numpy().tobytes() for array in arrays)
    kind = "double" if dtype == torch.float64 else "float"
    done = subprocess.run([program, name, kind, *map(str, numbers)], input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    flat = torch.from_numpy(np.frombuffer(done.stdout, "f8" if dtype == torch.float64 else "f4").copy())
    return [
        piece.view(shape) for piece, shape in zip(flat.split([int(np.prod(s)) for s in shapes]), shapes, strict=True)
    ]


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-300


def assert_convolution(
    program, name, shape, size, *, stride, padding, mode, dtype, density=0.4, experiments=2, apart=0
):
    generator = torch.Generator().manual_seed(0)
    pattern = SparsePattern.of(torch.rand(shape, generator=generator) < density, stride)
    kept, mode = len(pattern.index), MODES.index(mode)

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype)

    x, values, bias = normal(experiments, shape[1], *size), normal(experiments, kept), normal(experiments, shape[0])
    load = normal(experiments, shape[1], 5)
    seen = apply_load_reference(x.double(), load.double()) if name.endswith("loaded") else x.double()
    leaves = [t.requires_grad_() for t in (seen, values.double(), bias.double())]
    parts = (pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order)
    expected = sparse_conv2d_reference(*leaves, *parts, shape[0], *shape[2:], stride, padding, mode)
    gradient = normal(*expected.shape)
    grad_x, grad_values = torch.autograd.grad(expected, leaves[:2], gradient.double())
    want = [expected.detach(), grad_x, grad_values]
    numbers = (experiments, shape[1], *size, shape[0], *shape[2:], stride, padding, mode, kept, apart)
    # Nothing is to be read between the rows and planes that lie apart.
    image = torch.full((experiments, shape[1], size[0] * (size[1] + apart) + apart), torch.nan, dtype=dtype)
    rows = image[..., : size[0] * (size[1] + apart)].unflatten(-1, (size[0], -1))
    rows[..., : size[1]] = x
    got = run(program, name, dtype, numbers, [image, load, values, bias, gradient, *parts], [w.shape for w in want])
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, TOLERANCE[dtype])


@pytest.mark.parametrize("pixels", ["few_pixels", "many_pixels"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
def test_sparse_conv2d(program, pixels, mode, stride, kernel):
    # 9 × 23 pixels are no multiple of a warp, 33 × 50 more than one block or chunk.
    for size, dtype in (((9, 23), torch.float64), ((33, 50), torch.float32)):
        assert_convolution(
            program, pixels, (3, 4, *kernel), size, stride=stride, padding=kernel[0] // 2, mode=mode, dtype=dtype
        )


@pytest.mark.parametrize("pixels", ["few_pixels_loaded", "many_pixels_loaded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_sparse_conv2d_through_a_load_and_of_rows_that_lie_apart(program, pixels, mode, stride):
    for size, dtype in (((9, 23), torch.float64), ((33, 50), torch.float32)):
        assert_convolution(
            program, pixels, (3, 4, 3, 3), size, stride=stride, padding=1, mode=mode, dtype=dtype, apart=3
        )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "padding", "mode"),
    [
        ((1, 1), 2, "replicate"),  # one pixel stands at 25 positions
        ((1, 6), 2, "replicate"),
        ((1, 1), 1, "zeros"),  # with stride 2 three phases have no pixel
        ((4, 5), 3, "reflect"),  # inner pixels are reflected at both ends
        ((2, 2), 1, "reflect"),
        ((5, 7), 0, "reflect"),
        ((6, 6), 4, "zeros"),  # windows that lie wholly outside
    ],
)
def test_sparse_conv2d_where_padding_is_large(program, size, padding, mode, stride):
    kernel = min(3, size[0] + 2 * padding)
    assert_convolution(
        program, "few_pixels", (2, 3, kernel, kernel), size, stride=stride, padding=padding, mode=mode,
        dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_sparse_conv2d_at_any_density(program, density):
    # 20 · 9 weights of one channel are staged in two steps.
    assert_convolution(
        program, "many_pixels", (2, 20, 3, 3), (12, 11), stride=1, padding=1, mode="reflect", dtype=torch.float32,
        density=density, experiments=3,
    )  # fmt: skip


def assert_upsampling(
    program, upsample, shape, size, *, mode, dtype=torch.float64, density=0.4, experiments=2, loaded=False, warps=8
):
    generator = torch.Generator().manual_seed(0)
    taps = TapPattern.of(torch.rand(shape, generator=generator) < density)
    pattern = taps.pattern
    kept, mode = len(pattern.index), MODES.index(mode)

    def normal(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype)

    x, values, bias = normal(experiments, shape[1], *size), normal(experiments, kept), normal(experiments, shape[0])
    load = normal(experiments, shape[1], 5)
    seen = apply_load_reference(x.double(), load.double()) if loaded else x.double()
    leaves = [t.requires_grad_() for t in (seen, values.double(), bias.double())]
    parts = (pattern.taps, taps.by_tap, taps.tap_order, pattern.by_input, pattern.input_order)
    kind, padding = UPSAMPLE.index(upsample), shape[-1] // 2
    expected = sparse_upsample_conv2d_reference(*leaves, *parts, shape[0], *shape[2:], padding, mode, kind)
    gradient = normal(*expected.shape)
    grads = torch.autograd.grad(expected, leaves[:2], gradient.double())
    want = [expected.detach(), *grads, *grads]  # with one and with several input channels a warp
    numbers = (
        experiments, shape[1], *size, shape[0], shape[-1], padding, mode, kind, kept, int(loaded), warps
    )  # fmt: skip
    arrays = [x, load, values, bias, gradient, *parts]
    got = run(program, upsample.removesuffix("_corners"), dtype, numbers, arrays, [w.shape for w in want])
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, TOLERANCE[dtype])


@pytest.mark.parametrize("upsample", UPSAMPLE[1:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sparse_upsample_conv2d(program, upsample, mode, kernel):
    # 9 rows break off in a strip of 4; 23 columns share a warp with the next strip, 33 and 64 need several windows.
    for size, dtype in (((9, 23), torch.float64), ((6, 33), torch.float32), ((4, 64), torch.float64)):
        assert_upsampling(program, upsample, (3, 5, kernel, kernel), size, mode=mode, dtype=dtype, warps=2)


@pytest.mark.parametrize("upsample", UPSAMPLE[1:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [3, 5, 11])
def test_sparse_upsample_conv2d_of_a_few_pixels(program, upsample, mode, kernel):
    sizes = ((1, 1), (1, 40), (5, 1), (2, 3), (3, 2), (7, 6), (8, 8))
    for size in sizes:
        if mode != "reflect" or kernel // 2 < 2 * min(size):
            assert_upsampling(program, upsample, (2, 2, kernel, kernel), size, mode=mode, experiments=1, warps=2)


@pytest.mark.parametrize("upsample", UPSAMPLE[1:])
@pytest.mark.parametrize("mode", MODES)
def test_sparse_upsample_conv2d_through_a_load_and_in_several_steps(program, upsample, mode):
    """Of 70 channels not all fit into shared memory at once, nor do 9 · 70 weights, nor the planes of 20 · 9 taps."""
    for shape, density in (((2, 70, 3, 3), 0.9), ((20, 3, 3, 3), 0.5), ((2, 70, 5, 5), 0.05)):
        assert_upsampling(
            program, upsample, shape, (6, 9), mode=mode, loaded=True, density=density, experiments=1, warps=4
        )


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_sparse_upsample_conv2d_at_any_density(program, density):
    assert_upsampling(
        program, "nearest", (9, 10, 3, 3), (5, 7), mode="reflect", dtype=torch.float32, density=density, experiments=3
    )


def assert_blocks(
    program, shape, block, size, *, stride=1, padding=1, mode="reflect", tf32, density=0.4, experiments=2
):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pattern = BlockPattern.of(block_mask(shape, block, density, generator), block, stride)
    index, kept, mode = pattern.index, len(pattern.index), MODES.index(mode)

    def normal(*s):
        return torch.randn(*s, generator=generator)

    x, values, bias = normal(experiments, shape[1], *size), normal(experiments, kept), normal(experiments, shape[0])
    leaves = [t.double().requires_grad_() for t in (x, values, bias)]
    expected = block_sparse_conv2d_reference(
        *leaves, index, None, None, None, None, shape[0], *shape[2:], stride, padding, mode
    )
    gradient = normal(*expected.shape)
    want = [expected.detach(), *torch.autograd.grad(expected, leaves[:2], gradient.double())]

    given = shape, block[0], stride, size, tf32
    lists = [forward_lists(index, *given), input_gradient_lists(index, shape, block[1], *given[2:])]
    rounds = weight_gradient_rounds(index, *given)
    numbers = [experiments, shape[1], *size, shape[0], *shape[2:], stride, padding, mode, kept]
    for each in lists:
        numbers += [len(each.codes), len(each.starts), each.chunk, each.slots.shape[1], each.block]
    numbers += [len(rounds.codes), len(rounds.pieces), rounds.rounds.shape[1], rounds.chunk, rounds.slab, rounds.most]
    numbers += [rounds.slots.shape[1], rounds.block]
    arrays = [x, values, bias, gradient, *(t for each in lists for t in (each.codes, each.slots, each.starts))]
    arrays += [rounds.codes, rounds.slots, rounds.pieces, rounds.rounds]
    name = "tf32" if tf32 else "ieee"
    for g, w in zip(run(program, name, torch.float32, numbers, arrays, [w.shape for w in want]), want, strict=True):
        assert_near(g, w, TF32 if tf32 else TOLERANCE[torch.float32])


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_block_sparse_conv2d(block_program, stride, mode, tf32):
    # Tiles of 8, 16 and 32 columns that break off at either end; windows that are even, and higher than wide.
    for kernel, size in (((3, 3), (9, 7)), ((4, 2), (5, 15)), ((1, 1), (9, 37)), ((5, 5), (11, 21))):
        assert_blocks(
            block_program, (10, 12, *kernel), (4, 4), size, stride=stride, padding=kernel[0] // 2, mode=mode, tf32=tf32,
        )  # fmt: skip


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((40, 70), (8, 8)),
        ((33, 37), (16, 16)),
        ((66, 40), (64, 32)),
        ((20, 17), (20, 3)),  # three eights of four groups' channels
        ((17, 9), (16, 1)),
        ((7, 11), (1, 1)),
        ((150, 6), (8, 2)),  # more output channels than a block of threads holds, and than are staged at once
        ((6, 150), (2, 8)),
    ],
    ids=str,
)
def test_block_sparse_conv2d_of_any_blocks(block_program, shape, block, tf32):
    assert_blocks(block_program, (*shape, 3, 3), block, (9, 10), tf32=tf32, density=0.2, experiments=1)


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_block_sparse_conv2d_at_any_density(block_program, density, tf32):
    # Dense, the weights' gradient takes several rounds; of 33 × 34 pixels no sum is split.
    for channels, size, experiments in ((24, (4, 5), 3), (16, (33, 34), 1)):
        assert_blocks(
            block_program, (channels, 24, 3, 3), (8, 8), size, mode="zeros", tf32=tf32, density=density,
            experiments=experiments,
        )  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "padding", "mode"),
    [
        ((1, 1), 2, "replicate"),
        ((1, 6), 2, "replicate"),
        ((1, 1), 1, "zeros"),
        ((4, 5), 3, "reflect"),
        ((5, 7), 0, "reflect"),
        ((6, 6), 4, "zeros"),
    ],
)
def test_block_sparse_conv2d_where_padding_is_large(block_program, size, padding, mode, stride):
    kernel = min(3, size[0] + 2 * padding)
    assert_blocks(
        block_program, (5, 6, kernel, kernel), (2, 3), size, stride=stride, padding=padding, mode=mode, tf32=False
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("numel", [1, 7, 64])
@pytest.mark.parametrize("step", [0, 1000])
def test_concrete_mask(program, dtype, shared, numel, step):
    experiments, temperature = 3, 0.2
    generator = torch.Generator().manual_seed(numel)

    def normal(*s, scale=1.0):
        return (scale * torch.randn(*s, generator=generator, dtype=torch.float64)).to(dtype)

    logits, exp_avg = normal(experiments, numel, scale=3.0), normal(experiments, numel)
    exp_avg_sq = normal(experiments, numel).square()
    weight = normal(numel) if shared else normal(experiments, numel)
    gradient, grad_soft = normal(experiments, numel), normal(experiments, numel)
    seed, at = torch.tensor([0, -1, 2**40 + 3]), torch.tensor(step)
    learning = {"kl_weight": 1e-2, "prior": 0.05, "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    numbers = torch.tensor([temperature, *learning.values()], dtype=torch.float64)
    arrays = [logits, exp_avg, exp_avg_sq, weight, gradient, grad_soft, seed, at, numbers]
    got = run(
        program, "mask", dtype, (experiments, numel, int(shared), int(Stream.MASK)), arrays,
        [(experiments, numel)] * 8,
    )  # fmt: skip

    doubles = [t.double() for t in arrays[:6]]
    draw = (seed, at, int(Stream.MASK), temperature)
    soft_mask, masked = concrete_mask_reference(doubles[0], doubles[3], *draw)
    # The backward knows no more than the rounded mask.
    grads = concrete_mask_backward_reference(doubles[5], doubles[4], doubles[3], got[0].double(), temperature)
    state, next_masked = doubles[:3], torch.empty(experiments, numel, dtype=torch.float64)
    concrete_mask_update_reference(*state, next_masked, doubles[3], doubles[4], *draw, *learning.values())
    for g, w in zip(got, [soft_mask, masked, *grads, *state, next_masked], strict=True):
        assert_near(g, w, TOLERANCE[dtype])


def test_concrete_mask_at_extreme_logits(program):
    logits = torch.tensor([[-200.0, 200.0, -90.0, 90.0, 0.0]])
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    numbers = torch.tensor([0.2, 1e-2, 0.05, 0.1, 0.9, 0.999, 1e-8], dtype=torch.float64)
    arrays = [logits, zeros, zeros, ones, ones, ones, torch.tensor([1]), torch.tensor(0), numbers]
    soft_mask, *others = run(program, "mask", torch.float32, (1, 5, 0, int(Stream.MASK)), arrays, [(1, 5)] * 8)
    torch.testing.assert_close(soft_mask[0, :4], torch.tensor([0.0, 1, 0, 1]))
    assert all(other.isfinite().all() for other in others)
