"""Triton's `norm_head`: output and every gradient, in place too, and the machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90
from test_norm_head import dense, loaded_problem, problem

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(poisoned, monkeypatch):
    """With blocks so small that a few pixels are several splits of several."""
    kernel = pytest.importorskip("sparse_gen.kernels.norm_head", reason="triton is not installed")
    monkeypatch.setattr(kernel, "BLOCK", 64)
    monkeypatch.setattr(kernel, "MAX_SPLITS", 4)
    monkeypatch.setattr(kernel.norm_act, "ROW", 64)
    monkeypatch.setattr(kernel.norm_act, "MAX_SPLITS", 5)
    return kernel


def results(kernel, leaves, gradient, slope):
    """Output and gradients by x, gamma, beta and weight."""
    x, gamma, beta, weight, bias = (None if t is None else t.detach().clone().to(DEVICE) for t in leaves)
    y, mean, rstd = kernel.norm_head(x, gamma, beta, weight, bias, 1e-5, slope)
    saved = (gradient.to(DEVICE), x, gamma, beta, weight, mean, rstd, slope)
    grads = kernel.norm_head_backward(*saved)
    in_place = kernel.norm_head_backward_(*saved)
    for apart, own in zip(grads, (x, *in_place), strict=True):
        assert torch.equal(apart, own)
    return [t.cpu() for t in (y, *grads)]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("size", "outputs", "slope", "biased"),
    [
        ((1, 7), 1, 0.2, True),
        ((1, 7), 3, 0.0, False),
        ((9, 33), 2, 0.2, True),
        ((9, 33), 3, 0.2, True),
        ((17, 31), 4, 0.0, False),
        ((17, 31), 1, 1.0, True),
    ],
)
def test_output_and_gradients(kernel, size, outputs, slope, biased):
    leaves, gradient = problem(2, 5, outputs, size, torch.float32)
    given = leaves if biased else [*leaves[:4], None]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves[:4]]
    expected = dense(*doubles, leaves[4].detach().double() if biased else None, 1e-5, slope)
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    for g, w in zip(results(kernel, given, gradient, slope), want, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= TOLERANCE * w.norm()


@pytest.mark.interpreter
def test_the_same_bits_beside_other_experiments(kernel):
    leaves, gradient = problem(3, 4, 3, (9, 33), torch.float32)
    together = results(kernel, leaves, gradient, 0.2)
    alone = results(kernel, [leaf[1:2] for leaf in leaves], gradient[1:2], 0.2)
    assert all(torch.equal(a, t[1:2]) for a, t in zip(alone, together, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("sigmoid", [False, True])
def test_with_a_load(kernel, sigmoid):
    forward, backward, wanted = loaded_problem(torch.float32, sigmoid, (17, 31))
    forward, backward = ([t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in g] for g in (forward, backward))
    y = kernel.loaded_head(*forward)
    grads = kernel.loaded_head_backward_(*backward)
    for g, want in zip([y, backward[2], *grads], wanted, strict=True):
        assert g.shape == want.shape
        assert (g.cpu().double() - want).norm() <= TOLERANCE * want.norm()


@pytest.mark.aot
def test_compiles_for_sm_90_without_spills():
    pytest.importorskip("sparse_gen.kernels.norm_head", reason="triton is not installed")
    shapes, options = {"OUT": 4, "BLOCK": 1024}, {"num_warps": 4}
    loaded = {"SIGMOID": True, "STEP": 4}
    compiled = compile_for_sm_90(
        "norm_head",
        [
            ("_head_kernel", {}, shapes | {"BIAS": True, "SIGMOID": True}, options),
            ("_sums_kernel", {"slope": "fp32"}, shapes | loaded | {"STEPS": 4}, {"num_warps": 8}),
            ("_gradient_kernel", {"slope": "fp32"}, shapes | loaded | {"SPLITS": 64}, {"num_warps": 8}),
        ],
    )
    # Sums over a block's pixels; 168 registers leave room for three programs of 128 threads, 128 for two of 256.
    for code, registers in zip(compiled, (168, 128, 128), strict=True):
        code.assert_within(shared=2048, registers=registers)
