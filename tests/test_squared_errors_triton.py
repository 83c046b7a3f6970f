"""Triton's `squared_errors`: against float64, an experiment alone and beside others, and the machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(poisoned):
    return pytest.importorskip("sparse_gen.kernels.squared_errors", reason="triton is not installed")


@pytest.mark.interpreter
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize(
    ("size", "block", "joined"), [((3, 5, 7), 4096, 1024), ((3, 41, 37), 4096, 1024), ((3, 41, 37), 64, 16)]
)
def test_errors_alone_and_beside_others(kernel, monkeypatch, targets, size, block, joined):
    monkeypatch.setattr(kernel, "BLOCK", block)
    monkeypatch.setattr(kernel, "JOINED", joined)
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.rand(count, *size, generator=generator) for count in (3, targets))
    errors = kernel.squared_errors(output.to(DEVICE), target.to(DEVICE)).cpu()
    want = (output.double() - target.double()).square().mean(dim=(1, 2, 3))
    assert (errors.double() - want).norm() <= TOLERANCE * want.norm()
    for e in range(3):
        own = target[e if targets > 1 else 0][None]
        assert torch.equal(kernel.squared_errors(output[e : e + 1].to(DEVICE), own.to(DEVICE)).cpu()[0], errors[e])


@pytest.mark.aot
def test_compiles_for_sm_90_without_spills(kernel):
    launches = [
        ("_block_kernel", {}, {"BLOCK": kernel.BLOCK}, {"num_warps": 8}),
        ("_join_kernel", {}, {"JOINED": kernel.JOINED}, {"num_warps": 4}),
    ]
    for code in compile_for_sm_90("squared_errors", launches):
        code.assert_within(shared=1024, registers=64)
