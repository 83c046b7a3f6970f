"""Triton's `norm_load` and `apply_load`: what a reader sees, and every gradient, and the machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90
from test_norm_load import dense, problem

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(poisoned):
    return pytest.importorskip("sparse_gen.kernels.norm_load", reason="triton is not installed")


@pytest.fixture
def small_blocks(kernel, monkeypatch):
    monkeypatch.setattr(kernel.norm_act, "ROW", 64)
    monkeypatch.setattr(kernel.norm_act, "MAX_SPLITS", 5)
    return kernel


def results(kernel, x, norms, gradient, slope):
    """What a reader sees, and the gradients by x and the parameters."""
    x, gradient, *norms = (None if t is None else t.to(DEVICE) for t in (x, gradient, *norms))
    load, moments = kernel.norm_load(x, *norms[:2], 1e-5, slope, *norms[2:], 1e-3)
    grads = kernel.norm_load_backward(gradient, x, *norms[:2], slope, *norms[2:], moments)
    return [t.cpu() for t in (kernel.apply_load(x, load), *grads)]


# One block, whole or not; several splits of one and of more blocks.
@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(1, 7), (8, 8), (9, 33), (33, 31)])
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("second", [False, True])
def test_load_and_gradients(small_blocks, size, slope, second):
    x, norms, gradient = problem(2, size, torch.float32)
    norms = [*norms[:2], *(norms[2:] if second else (None, None))]
    got = results(small_blocks, x, norms, gradient, slope)
    leaves = [t.double().requires_grad_() for t in (x, *norms) if t is not None]
    expected = dense(*leaves, *([] if second else [None, None]), slope)
    wanted = torch.autograd.grad(expected, leaves, gradient.double())
    # As for the CPU: in front of a second normalisation the first γ's and β's gradients nearly vanish.
    floor = wanted[3].norm() if second else 0
    for g, want in zip(got, [expected, *wanted], strict=False):
        assert (g.double() - want).norm() <= TOLERANCE * max(want.norm(), floor)
    if not second:
        assert all((g == 0).all() for g in got[4:])


@pytest.mark.interpreter
def test_the_same_bits_beside_other_experiments(small_blocks):
    x, norms, gradient = problem(3, (9, 33), torch.float32)
    together = results(small_blocks, x, norms, gradient, 0.2)
    alone = results(small_blocks, x[1:2], [n[1:2] for n in norms], gradient[1:2], 0.2)
    assert all(torch.equal(a, t[1:2]) for a, t in zip(alone, together, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(8, 8), (17, 31)])
def test_the_moments_beside_a_large_mean(small_blocks, size):
    x, norms, gradient = problem(1, size, torch.float32)
    got, *_ = results(small_blocks, x + 100, norms, gradient, 0.2)
    expected = dense((x + 100).double(), *(n.double() for n in norms), 0.2)
    # A float of 100 has digits down to 8e-6, and a load subtracts its mean only behind the multiplication.
    assert (got.double() - expected).norm() <= 5e-5 * expected.norm()


@pytest.mark.aot
def test_compiles_for_sm_90_without_spills(kernel):
    row, most = kernel.norm_act.ROW, kernel.norm_act.MAX_SPLITS
    scalars, options = {"eps": "fp32", "slope": "fp32", "eps2": "fp32"}, {"num_warps": 8}
    steps = {"BLOCK": row, "STEPS": 4}
    of_first = {"FIRST_SPAN": 128, "FIRST_SPLITS": 2048}  # as a convolution leaves them at 512²
    second = {"SECOND": True}
    forward = [
        ("_row_load_kernel", scalars, second | {"ADD": False, "BIAS": False, "BLOCK": row}, options),
        ("_activated_moments_kernel", scalars, steps | of_first, options),
        ("_join_load_kernel", scalars, second | of_first | {"SPAN": 4 * row, "SPLITS": most}, {"num_warps": 4}),
        ("_apply_load_kernel", {}, {"BLOCK": row}, options),
    ]
    tables = {f"p_{name}_{axis}": "*i32" for name in ("place", "count") for axis in "yx"}
    given = scalars | tables
    whole = {"FOLD": False, "ADD": False, "SPLITS2": most, "SPLITS": most, "BLOCK": row, "ADD_BLOCK": 1024}
    steps |= {"SPLITS2": most}
    backward = [
        ("_sums_kernel", scalars, steps | second | {"OF_SECOND": True}, options),
        ("_sums_kernel", scalars, steps | second | {"OF_SECOND": False}, options),
        ("_gradient_kernel", given, whole | second | {"WHOLE": False}, options),
        ("_gradient_kernel", given, whole | second | {"WHOLE": True}, options),
        ("_gradient_kernel", given, whole | {"SECOND": False, "WHOLE": True}, options),
    ]
    compiled = compile_for_sm_90("norm_load", forward) + compile_for_sm_90("norm_load_gradient", backward)
    for code in compiled:
        # Shared memory joins eight warps' sums; 128 registers leave room for two programs of 256 threads.
        code.assert_within(shared=512, registers=128)
