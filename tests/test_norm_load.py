"""`norm_load`: what a reader sees, and every gradient, against torch's batch_norm and leaky_relu in float64."""

import pytest
import torch
from torch.nn import functional as F

import sparse_gen.ops.norm_load  # noqa: F401  (registers the operators)

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
ops = torch.ops.sparse_gen


def dense(x, gamma, beta, gamma2, beta2, slope):
    rows = []
    for e in range(len(x)):
        y = F.leaky_relu(F.batch_norm(x[e : e + 1], None, None, gamma[e], beta[e], training=True), slope)
        if gamma2 is not None:
            y = F.batch_norm(y, None, None, gamma2[e], beta2[e], training=True, eps=1e-3)
        rows.append(y)
    return torch.cat(rows)


def problem(experiments, size, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        0.5 + normal(experiments, 3, *size),
        [normal(experiments, 3) for _ in range(4)],
        normal(experiments, 3, *size),
    )


@pytest.mark.parametrize("size", [(2, 7), (8, 8), (33, 31), (64, 130)])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_and_gradients(instruction_set, size, slope, second, dtype):
    x, norms, gradient = problem(2, size, dtype)
    gamma, beta, gamma2, beta2 = [*norms[:2], *(norms[2:] if second else (None, None))]
    load, moments = ops.norm_load(x, gamma, beta, 1e-5, slope, gamma2, beta2, 1e-3)
    grads = ops.norm_load_backward(gradient, x, gamma, beta, slope, gamma2, beta2, moments)
    leaves = [t.double().requires_grad_() for t in (x, gamma, beta, gamma2, beta2) if t is not None]
    expected = dense(*leaves, *([] if second else [None, None]), slope)
    wanted = torch.autograd.grad(expected, leaves, gradient.double())
    # In front of a second normalisation the exact gradients of the first γ and β nearly vanish (at slope 1 they are 0):
    # their rounding is that of the sums they are made of, of which γ₂'s gradient has the size.
    floor = wanted[3].norm() if second else 0
    for got, want in zip([ops.apply_load(x, load), *grads], [expected, *wanted], strict=False):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * max(want.norm(), floor)
    if not second:
        assert all((grad == 0).all() for grad in grads[3:])


def test_the_same_bits_beside_other_experiments(instruction_set):
    x, norms, gradient = problem(3, (37, 41), torch.float32)
    gamma, beta, gamma2, beta2 = norms

    def run(rows):
        own = [t[rows].contiguous() for t in (gamma, beta)], [t[rows].contiguous() for t in (gamma2, beta2)]
        load, moments = ops.norm_load(x[rows], *own[0], 1e-5, 0.2, *own[1], 1e-5)
        return load, *ops.norm_load_backward(gradient[rows], x[rows], *own[0], 0.2, *own[1], moments)

    for together, alone in zip(run(slice(0, 3)), run(slice(1, 2)), strict=True):
        assert torch.equal(together[1:2], alone)


def test_opcheck():
    x, (gamma, beta, gamma2, beta2), gradient = problem(2, (5, 6), torch.float64)
    for more in ((None, None), (gamma2, beta2)):
        torch.library.opcheck(ops.norm_load, (x, gamma, beta, 1e-5, 0.2, *more, 1e-5))
        _, moments = ops.norm_load(x, gamma, beta, 1e-5, 0.2, *more, 1e-5)
        torch.library.opcheck(ops.apply_load, (x, ops.norm_load(x, gamma, beta, 1e-5, 0.2, *more, 1e-5)[0]))
        torch.library.opcheck(ops.norm_load_backward, (gradient, x, gamma, beta, 0.2, *more, moments))
