"""`norm_head`: output and every gradient against torch's batch_norm, leaky_relu and 1×1 conv2d in float64."""

import pytest
import torch
from torch.nn import functional as F

from sparse_gen.ops.norm_head import norm_head

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def dense(x, gamma, beta, weight, bias, eps, slope):
    rows = []
    for e in range(len(x)):
        z = F.batch_norm(x[e : e + 1], None, None, gamma[e], beta[e], training=True, eps=eps)
        rows.append(F.conv2d(F.leaky_relu(z, slope), weight[e][..., None, None], None if bias is None else bias[e]))
    return torch.cat(rows)


def problem(experiments, channels, outputs, size, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [
        0.5 + normal(experiments, channels, *size),
        normal(experiments, channels),
        normal(experiments, channels),
        normal(experiments, outputs, channels),
        normal(experiments, outputs),
    ]
    return [leaf.requires_grad_() for leaf in leaves], normal(experiments, outputs, *size)


# (65, 130) has more pixels than one tile of 4,096, and a last tile that is no whole number of vectors.
@pytest.mark.parametrize("size", [(1, 7), (3, 5), (33, 31), (65, 130)])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("experiments", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients(instruction_set, size, outputs, slope, experiments, dtype):
    leaves, gradient = problem(experiments, 5, outputs, size, dtype)
    out = norm_head(*leaves, slope=slope)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*doubles, 1e-5, slope)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    want = [expected, *torch.autograd.grad(expected, doubles, gradient.double())]
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= TOLERANCE[dtype] * w.norm()


def test_without_a_bias(instruction_set):
    (x, gamma, beta, weight, _), _ = problem(1, 3, 2, (5, 6), torch.float64)
    expected = dense(x, gamma, beta, weight, None, 1e-5, 0.2)
    torch.testing.assert_close(norm_head(x, gamma, beta, weight, slope=0.2), expected)


def test_the_same_bits_beside_other_experiments(instruction_set):
    leaves, gradient = problem(3, 4, 3, (70, 71), torch.float32)
    together = norm_head(*leaves, slope=0.2)
    grads = torch.autograd.grad(together, leaves, gradient)
    one = [t[1:2].detach().requires_grad_() for t in leaves]
    alone = norm_head(*one, slope=0.2)
    assert torch.equal(alone, together[1:2])
    for a, t in zip(torch.autograd.grad(alone, one, gradient[1:2]), grads, strict=True):
        assert torch.equal(a, t[1:2])


def test_gradcheck_and_opcheck():
    leaves, gradient = problem(2, 2, 3, (5, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: norm_head(*a, slope=0.2), leaves)
    torch.library.opcheck(torch.ops.sparse_gen.norm_head, (*leaves, 1e-5, 0.2))
    x, gamma, beta, weight, bias = (leaf.detach() for leaf in leaves)
    _, mean, rstd = torch.ops.sparse_gen.norm_head(x, gamma, beta, weight, bias, 1e-5, 0.2)
    arguments = (gradient, x, gamma, beta, weight, mean, rstd, 0.2)
    torch.library.opcheck(torch.ops.sparse_gen.norm_head_backward, arguments)
    torch.library.opcheck(torch.ops.sparse_gen.norm_head_backward_, arguments)


def test_in_place_x_becomes_its_gradient(instruction_set):
    leaves, gradient = problem(2, 5, 3, (65, 70), torch.float32)
    x, gamma, beta, weight, bias = (leaf.detach() for leaf in leaves)
    _, mean, rstd = torch.ops.sparse_gen.norm_head(x, gamma, beta, weight, bias, 1e-5, 0.2)
    arguments = (gamma, beta, weight, mean, rstd, 0.2)
    expected = torch.ops.sparse_gen.norm_head_backward(gradient, x, *arguments)
    grads = torch.ops.sparse_gen.norm_head_backward_(gradient, x, *arguments)
    assert all(torch.equal(got, want) for got, want in zip((x, *grads), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x of shape"),
        ({"gamma": torch.zeros(3)}, r"gamma of shape \(1, 3\), got \(3,\)"),
        ({"weight": torch.zeros(1, 5, 3)}, r"out from 1 to 4, got \(1, 5, 3\)"),
        ({"weight": torch.zeros(1, 2, 4)}, r"weight of shape \(1, 2, 3\), got \(1, 2, 4\)"),
        ({"bias": torch.zeros(1, 2, dtype=torch.float64)}, "bias of torch.float32 on cpu like x"),
        ({"slope": 1.5}, "slope from 0 to 1, got 1e-05 and 1.5"),
    ],
)
def test_bad_arguments(change, message):
    good = {"x": torch.zeros(1, 3, 4, 4), "gamma": torch.ones(1, 3), "beta": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=message):
        norm_head(**good | {"weight": torch.ones(1, 2, 3)} | change)


def loaded_problem(dtype, sigmoid, size=(7, 6)):
    """Arguments of `loaded_head` and `loaded_head_backward_`, and what they have to give."""
    leaves, gradient = problem(2, 5, 3, size, dtype)
    x, gamma, beta, weight, bias = (leaf.detach() for leaf in leaves)
    exact = [leaf.double().clone().requires_grad_() for leaf in (x, gamma, beta, weight, bias)]
    y = dense(*exact, 1e-5, 0.2)
    y = y.sigmoid() if sigmoid else y
    wanted = [y.detach(), *torch.autograd.grad(y, exact, gradient.double())]
    load, moments = (
        t.to(dtype) for t in torch.ops.sparse_gen.norm_load(*exact[:3], 1e-5, 0.2, None, None, 0.0)
    )  # fmt: skip
    output = y.detach().to(dtype) if sigmoid else None
    backward = (gradient, output, x.clone(), gamma, beta, weight, moments.detach(), 0.2)
    return (x, load.detach(), weight, bias, sigmoid), backward, wanted


@pytest.mark.parametrize("sigmoid", [False, True])
def test_with_a_load(sigmoid):
    forward, backward, wanted = loaded_problem(torch.float64, sigmoid)
    y = torch.ops.sparse_gen.loaded_head(*forward)
    grads = torch.ops.sparse_gen.loaded_head_backward_(*backward)
    for got, want in zip([y, backward[2], *grads], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.library.opcheck(torch.ops.sparse_gen.loaded_head, forward)
    torch.library.opcheck(torch.ops.sparse_gen.loaded_head_backward_, backward)
