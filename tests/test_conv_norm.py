"""`conv_norm` and `norm_conv_backward`: references against torch's own layers in float64."""

import pytest
import torch
from test_masked_conv2d_triton import dense as convolution
from test_norm_load import dense as normalisation

import sparse_gen.ops.conv_norm  # noqa: F401  (registers the operators)
from sparse_gen.ops.norm_load import apply_load_reference

ops = torch.ops.sparse_gen
SLOPE, EPS, EPS2 = 0.2, 1e-5, 1e-3


def problem(experiments, arguments, second, size=(7, 6)):
    """x, weight, bias, load, the norms, and the convolution's and the norms' outputs in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, bias = normal(experiments, 5, *size), normal(experiments, 4, 5, 3, 3), normal(experiments, 4)
    norms = [normal(experiments, 4) for _ in range(4 if second else 2)] + [None] * (0 if second else 2)
    return x, weight, bias, normal(experiments, 5, 5), norms


def forward(operator, x, weight, bias, load, norms, arguments):
    gamma, beta, gamma2, beta2 = norms
    return operator(x, weight, bias, *arguments, load, gamma, beta, EPS, SLOPE, gamma2, beta2, EPS2)


def backward_problem(experiments, arguments, second, size=(7, 6)):
    """Arguments of `norm_conv_backward`, whose norm is that of x, and what it has to give."""
    x, weight, *_ = problem(experiments, arguments, second, size)
    generator = torch.Generator().manual_seed(1)
    norms = [torch.randn(experiments, 5, generator=generator) for _ in range(4 if second else 2)]
    leaves = [t.double().requires_grad_() for t in (x, *norms, weight)]
    seen = normalisation(*leaves[:-1], *([] if second else [None, None]), SLOPE)
    out = convolution(seen, leaves[-1], None, *arguments)
    gradient = torch.randn(out.shape, generator=generator)
    want = list(torch.autograd.grad(out, leaves, gradient.double()))
    if not second:
        want[3:3] = [torch.zeros_like(want[1])] * 2
    gamma, beta, gamma2, beta2 = [*norms, None, None][:4]
    load, moments = ops.norm_load(x.double(), *(None if n is None else n.double() for n in (gamma, beta)), EPS, SLOPE,
                                  *(None if n is None else n.double() for n in (gamma2, beta2)), EPS2)  # fmt: skip
    given = (gradient, x, weight, *arguments, load.float(), gamma, beta, SLOPE, gamma2, beta2, moments.float())
    return given, want


def doubles(given):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in given]


ARGUMENTS = [
    (1, 1, 0, 0, False), (2, 1, 1, 0, False), (1, 1, 2, 1, False), (1, 1, 1, 2, False), (1, 2, 1, 0, True),
    (2, 1, 1, 0, True),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_output_load_and_moments(arguments, second, loaded):
    x, weight, bias, load, norms = [
        [n if n is None else n.double() for n in t] if isinstance(t, list) else t.double()
        for t in problem(2, arguments, second)
    ]
    load = load if loaded else None
    y, found, moments = forward(ops.conv_norm, x, weight, bias, load, norms, arguments)
    seen = x if load is None else apply_load_reference(x, load)
    torch.testing.assert_close(y, convolution(seen, weight, bias, *arguments), rtol=1e-12, atol=1e-12)
    wanted = normalisation(y, *norms, SLOPE)
    torch.testing.assert_close(apply_load_reference(y, found), wanted, rtol=1e-10, atol=1e-10)
    mean, variance = y.mean(dim=(2, 3)), y.var(dim=(2, 3), unbiased=False)
    torch.testing.assert_close(moments[..., :2], torch.stack([mean, (variance + EPS).rsqrt()], dim=-1))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("second", [False, True])
def test_gradients(arguments, second):
    given, wanted = backward_problem(2, arguments, second)
    given = doubles(given)
    given[8] = ops.norm_load(given[1], *given[9:11], EPS, SLOPE, *given[12:14], EPS2)[0]
    given[-1] = ops.norm_load(given[1], *given[9:11], EPS, SLOPE, *given[12:14], EPS2)[1]
    for got, want in zip(ops.norm_conv_backward(*given), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_opcheck():
    arguments = (1, 1, 1, 0, False)
    x, weight, bias, load, (gamma, beta, gamma2, beta2) = problem(2, arguments, True)
    given = (x, weight, bias, *arguments, load, gamma, beta, EPS, SLOPE, gamma2, beta2, EPS2)
    torch.library.opcheck(ops.conv_norm, given, test_utils=("test_schema", "test_faketensor"))
    given, _ = backward_problem(2, arguments, True)
    torch.library.opcheck(ops.norm_conv_backward, given, test_utils=("test_schema", "test_faketensor"))
