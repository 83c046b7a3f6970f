"""`masked_adam_` against torch's fused Adam."""

import pytest
import torch

from sparse_gen.fitting.optimiser import step_fused
from sparse_gen.ops.masked_adam import masked_adam_


def assert_equal_to_torch(values, grad) -> float:
    """Ten steps against torch.optim.Adam in float64; returns the largest norm-wise error of values and averages."""
    leaf = values.double().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-2)
    state = [values.clone(), grad, torch.zeros_like(values), torch.zeros_like(values)]
    for step in range(10):
        leaf.grad = grad.double()
        adam.step()
        masked_adam_(*state, step, lr=1e-2)
    got = [state[0], *state[2:]]
    want = [leaf.detach(), adam.state[leaf]["exp_avg"], adam.state[leaf]["exp_avg_sq"]]
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert error <= 5e-6
    return error


@pytest.mark.parametrize("kept", [150_443, 3_008_867])
def bench_masked_adam(compare, device, kept):
    torch.manual_seed(0)
    values, grad = (torch.randn(1, kept, device=device) for _ in range(2))
    error = assert_equal_to_torch(values, grad)
    leaf = values.clone().requires_grad_()
    leaf.grad = grad
    adam = torch.optim.Adam([leaf], lr=1e-2, fused=True)
    exp_avg, exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
    step = torch.tensor(0, device=device)

    def ours():
        masked_adam_(values, grad, exp_avg, exp_avg_sq, step, lr=1e-2)
        step.add_(1)

    compare(
        "masked_adam", f"{kept:,} values", {"plain": lambda: step_fused(adam), "ours": ours}, error=error, rounds=101
    )
