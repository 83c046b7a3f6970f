"""Triton's `pooled_means`: output and gradient against pad and avg_pool2d in float64, and the machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90
from test_pooled_means import dense

from sparse_gen.ops.norm_load import apply_load_reference

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("zeros", "reflect", "replicate")


@pytest.fixture
def kernel(poisoned):
    return pytest.importorskip("sparse_gen.kernels.pooled_means", reason="triton is not installed")


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(4, 4), (5, 33)])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loaded", [False, True])
def test_output_and_gradient(kernel, size, padding, mode, loaded):
    generator = torch.Generator().manual_seed(0)
    x, load = torch.randn(2, 3, *size, generator=generator), torch.randn(2, 3, 5, generator=generator)
    seen = apply_load_reference(x.double(), load.double()) if loaded else x.double()
    seen.requires_grad_()
    want = dense(seen, padding, mode)
    gradient = torch.randn(want.shape, generator=generator)
    got = kernel.pooled_means(x.to(DEVICE), load.to(DEVICE) if loaded else None, padding, MODES.index(mode))
    grad = kernel.pooled_means_backward(gradient.to(DEVICE), padding, MODES.index(mode))
    (expected,) = torch.autograd.grad(want, seen, gradient.double())
    for g, w in ((got, want), (grad, expected)):
        assert g.shape == w.shape
        assert (g.cpu().double() - w).norm() <= TOLERANCE * w.norm()


@pytest.mark.aot
@pytest.mark.parametrize("loaded", [False, True])
def test_compiles_for_sm_90_without_spills(kernel, loaded):
    constants = {"PADDING": 1, "MODE": 1, "LOAD": loaded, "BLOCK": 1024}
    (code,) = compile_for_sm_90("pooled_means", [("_means_kernel", {}, constants, {"num_warps": 4})])
    code.assert_within(shared=0, registers=96)
