"""`norm_act`: output and every gradient against torch's batch_norm and leaky_relu in float64, image by image."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90
from torch.nn import functional as F

from sparse_gen.ops.norm_act import norm_act

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def dense(x, gamma, beta, eps, slope):
    rows = []
    for e in range(len(x)):
        z = F.batch_norm(x[e : e + 1], None, None, gamma[e], beta[e], training=True, eps=eps)
        rows.append(F.leaky_relu(z, slope))
    return torch.cat(rows)


def problem(experiments, channels, size, dtype, offset=0.5):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [
        offset + normal(experiments, channels, *size),
        normal(experiments, channels),
        normal(experiments, channels),
    ]
    return [leaf.requires_grad_() for leaf in leaves], normal(experiments, channels, *size)


@pytest.mark.parametrize("size", [(1, 7), (3, 5), (8, 8), (33, 31), (64, 130)])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("experiments", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients(instruction_set, size, slope, experiments, dtype):
    leaves, gradient = problem(experiments, 3, size, dtype)
    out = norm_act(*leaves, slope=slope)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*doubles, 1e-5, slope)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= TOLERANCE[dtype] * w.norm()


def test_a_large_mean_does_not_cost_the_variance(instruction_set):
    (x, gamma, beta), _ = problem(1, 2, (100, 90), torch.float32, offset=100.0)
    out = norm_act(x, gamma, beta)
    expected = dense(x.double(), gamma.double(), beta.double(), 1e-5, 1.0)
    # A float of 100 has digits down to 8e-6; what the sums add must stay below that.
    assert (out.double() - expected).norm() <= 2e-5 * expected.norm()


def test_a_constant_channel_becomes_beta(instruction_set):
    x = torch.full((1, 2, 40, 41), 0.3)
    out = norm_act(x, torch.ones(1, 2), torch.tensor([[0.5, -0.5]]), slope=0.2)
    torch.testing.assert_close(out[0, 0], torch.full((40, 41), 0.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(out[0, 1], torch.full((40, 41), -0.1), rtol=0, atol=1e-4)


def test_the_same_bits_beside_other_experiments(instruction_set):
    (x, gamma, beta), gradient = problem(3, 4, (37, 41), torch.float32)
    together = norm_act(x, gamma, beta, slope=0.2)
    grads = torch.autograd.grad(together, [x, gamma, beta], gradient)
    one = [t[1:2].detach().requires_grad_() for t in (x, gamma, beta)]
    alone = norm_act(*one, slope=0.2)
    assert torch.equal(alone, together[1:2])
    for a, t in zip(torch.autograd.grad(alone, one, gradient[1:2]), grads, strict=True):
        assert torch.equal(a, t[1:2])


def test_gradcheck_and_opcheck():
    leaves, _ = problem(2, 2, (5, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: norm_act(*a, slope=0.2), leaves)
    torch.library.opcheck(torch.ops.sparse_gen.norm_act, (*leaves, 1e-5, 0.2))
    x, gamma, beta = (leaf.detach() for leaf in leaves)
    _, mean, rstd = torch.ops.sparse_gen.norm_act(x, gamma, beta, 1e-5, 0.2)
    torch.library.opcheck(torch.ops.sparse_gen.norm_act_backward, (x, x, gamma, beta, mean, rstd, 0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x of shape"),
        ({"gamma": torch.zeros(3)}, r"gamma of shape \(1, 3\), got \(3,\)"),
        ({"beta": torch.zeros(1, 3, dtype=torch.float64)}, "beta of torch.float32 on cpu like x"),
        ({"slope": 1.5}, "slope from 0 to 1, got 1e-05 and 1.5"),
        ({"eps": -1.0}, "eps from 0 on"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        norm_act(**{"x": torch.zeros(1, 3, 4, 4), "gamma": torch.ones(1, 3), "beta": torch.ones(1, 3)} | change)


# A block of 64 makes small images as split as large ones are: one row, one block a split, and two of them.
@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 33), (17, 31)])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_triton(small_blocks, size, slope):
    (x, gamma, beta), gradient = problem(2, 3, size, torch.float32)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, gamma, beta)]
    if size == (1, 1):  # torch refuses to normalise a single value, of which only beta is left
        expected = F.leaky_relu(leaves[2][..., None, None] + 0 * leaves[0] + 0 * leaves[1][..., None, None], slope)
    else:
        expected = dense(*leaves, 1e-5, slope)
    got = triton_results(small_blocks, x, gamma, beta, gradient, slope)
    for g, w in zip(got, [expected, *torch.autograd.grad(expected, leaves, gradient.double())], strict=True):
        assert (g.double() - w).norm() <= TOLERANCE[torch.float32] * w.norm()


@pytest.mark.interpreter
def test_triton_has_the_same_bits_beside_other_experiments(small_blocks):
    (x, gamma, beta), gradient = problem(3, 2, (9, 33), torch.float32)
    together = triton_results(small_blocks, x, gamma, beta, gradient, 0.2)
    alone = triton_results(small_blocks, *(t[1:2] for t in (x, gamma, beta, gradient)), 0.2)
    assert all(torch.equal(a, t[1:2]) for a, t in zip(alone, together, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(8, 8), (17, 31)])
def test_triton_keeps_the_variance_beside_a_large_mean(small_blocks, size):
    (x, gamma, beta), gradient = problem(1, 2, size, torch.float32, offset=100.0)
    y, *_ = triton_results(small_blocks, x, gamma, beta, gradient, 1.0)
    expected = dense(x.double(), gamma.double(), beta.double(), 1e-5, 1.0)
    # As for the CPU: a float of 100 has digits down to 8e-6.
    assert (y.double() - expected).norm() <= 2e-5 * expected.norm()


@pytest.fixture
def small_blocks(monkeypatch, poisoned):
    kernel = pytest.importorskip("sparse_gen.kernels.norm_act", reason="triton is not installed")
    monkeypatch.setattr(kernel, "ROW", 64)
    monkeypatch.setattr(kernel, "MAX_SPLITS", 5)
    return kernel


def triton_results(kernel, *tensors_and_slope):
    """Output and gradients by x, gamma and beta."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *tensors, slope = tensors_and_slope
    x, gamma, beta, gradient = (t.detach().contiguous().to(device) for t in tensors)
    y, mean, rstd = kernel.norm_act(x, gamma, beta, 1e-5, slope)
    gradients = kernel.norm_act_backward(gradient, x, gamma, beta, mean, rstd, slope)
    return [t.cpu() for t in (y, *gradients)]


@pytest.mark.aot
def test_triton_compiles_for_sm_90_without_spills():
    kernel = pytest.importorskip("sparse_gen.kernels.norm_act", reason="triton is not installed")
    scalars, options = {"eps": "fp32", "slope": "fp32"}, {"num_warps": 8}
    split = {"BLOCK": kernel.ROW, "SPLITS": kernel.MAX_SPLITS}
    steps = {"BLOCK": kernel.ROW, "STEPS": 4}
    compiled = compile_for_sm_90(
        "norm_act",
        [
            ("_row_kernel", scalars, {"BLOCK": kernel.ROW}, options),
            ("_moments_kernel", scalars, steps, options),
            ("_apply_kernel", scalars, split | {"SPAN": kernel.ROW}, options),
            ("_gradient_sums_kernel", scalars, steps, options),
            ("_gradient_kernel", scalars, split | {"WHOLE": False}, options),
            ("_gradient_kernel", scalars, split | {"WHOLE": True}, options),
        ],
    )
    for code in compiled:
        # Shared memory joins eight warps' sums; 96 registers leave room for two programs of 256 threads.
        code.assert_within(shared=256, registers=96)
