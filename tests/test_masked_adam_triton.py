"""Triton's `masked_adam` against torch's Adam in float64, and its machine code."""

import pytest
import torch
from ahead_of_time import compile_for_sm_90

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = 5e-6


@pytest.fixture
def kernel():
    return pytest.importorskip("sparse_gen.kernels.masked_adam", reason="triton is not installed")


def problem(experiments, kept, device):
    generator = torch.Generator().manual_seed(0)
    values, grad, exp_avg, spread = torch.randn(4, experiments, kept, generator=generator).to(device)
    return values, 1e-2 * exp_avg, 1e-4 * spread.square(), grad


@pytest.mark.interpreter
@pytest.mark.parametrize(("experiments", "kept"), [(1, 1), (2, 31), (3, 683), (2, 2049)])
@pytest.mark.parametrize("step", [0, 1, 5000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_one_step(kernel, experiments, kept, step, betas):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *state, grad = problem(experiments, kept, device)
    leaf = state[0].double().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-2, betas=betas, eps=1e-6)
    adam.state[leaf] = {
        "step": torch.tensor(float(step)),
        "exp_avg": state[1].double(),
        "exp_avg_sq": state[2].double(),
    }
    leaf.grad = grad.double()
    before = leaf.detach().clone()
    adam.step()
    state = [state[0].clone(), *state[1:]]
    kernel.masked_adam(*state, grad, torch.tensor(step, device=device), 1e-2, *betas, 1e-6)
    want = [leaf.detach(), adam.state[leaf]["exp_avg"], adam.state[leaf]["exp_avg_sq"]]
    for g, w in zip(state, want, strict=True):
        assert (g.double() - w).norm() <= TOLERANCE * w.norm()
    # The step is small beside the values: it is right in itself only to the values' own rounding, 2⁻²⁴ of each.
    rounding = 2**-24 * before.norm()
    assert (state[0] - before - (leaf.detach() - before)).norm() <= TOLERANCE * (leaf - before).norm() + 2 * rounding


@pytest.mark.interpreter
def test_nothing_beyond_the_values_is_written(kernel):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *state, grad = problem(1, 37, device)
    padded = [torch.full((1, 64), 7.0, device=device) for _ in state]
    views = [p[:, :37] for p in padded]
    for view, value in zip(views, state, strict=True):
        view.copy_(value)
    kernel.masked_adam(*views, grad, torch.tensor(0, device=device), 1e-2, 0.9, 0.999, 1e-8)
    assert all((p[:, 37:] == 7).all() for p in padded)
    assert not torch.equal(views[0], state[0])


@pytest.mark.aot
def test_compiles_for_sm_90_without_spills(kernel):
    scalars = dict.fromkeys(["lr", "log_beta1", "log_beta2", "decay1", "decay2", "eps"], "fp32")
    (code,) = compile_for_sm_90(
        "masked_adam",
        [("_masked_adam_kernel", {"p_step": "*i64", **scalars}, {"BLOCK": kernel.BLOCK}, {"num_warps": 4})],
    )
    # Element by element: no exchange between threads; 72 registers let an SM run seven programs of 128 threads.
    code.assert_within(shared=0, registers=72)
    # The pass is bound by memory: away from the end, eight values a thread in accesses of 16 bytes.
    assert code.ptx.count("ld.global.v4.b32") == 2 * 4
    assert code.ptx.count("st.global.v4.b32") == 2 * 3
