"""`pooled_means`: output and gradient against pad and avg_pool2d with stride 1 in float64."""

import pytest
import torch
from torch.nn import functional as F

from sparse_gen.ops.norm_load import apply_load_reference
from sparse_gen.ops.pooled_means import pooled_means

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}


def dense(x, padding, mode):
    padded = F.pad(x, [padding] * 4, mode={"zeros": "constant"}.get(mode, mode)) if padding else x
    return F.avg_pool2d(padded, 2, stride=1)


@pytest.mark.parametrize("size", [(2, 2), (3, 7), (4, 4), (5, 33), (18, 16), (33, 70)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradient(instruction_set, size, padding, mode, dtype):
    if mode == "reflect" and padding >= min(size):
        with pytest.raises(ValueError, match=f"more than {padding} pixels"):
            pooled_means(torch.zeros(1, 1, *size), padding=padding, padding_mode=mode)
        return
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    out = pooled_means(x, padding=padding, padding_mode=mode)
    double = x.detach().double().requires_grad_()
    expected = dense(double, padding, mode)
    gradient = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, gradient)
    (want,) = torch.autograd.grad(expected, double, gradient.double())
    for a, b in ((out, expected), (got, want)):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("size", [(4, 4), (5, 33), (18, 16)])
def test_an_image_read_through_a_load(instruction_set, mode, size):
    torch.manual_seed(0)
    x, load = torch.randn(2, 3, *size), torch.randn(2, 3, 5)
    means = torch.ops.sparse_gen.pooled_means
    expected = means(apply_load_reference(x, load), None, 3, mode)
    torch.testing.assert_close(means(x, load, 3, mode), expected, rtol=1e-5, atol=1e-5)


def test_a_single_pixel_is_padded_first():
    out = pooled_means(torch.ones(1, 1, 1, 1), padding=1, padding_mode="replicate")
    assert torch.equal(out, torch.ones(1, 1, 2, 2))


def test_gradcheck_and_opcheck():
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pooled_means(x, padding=2, padding_mode="reflect"), x)
    torch.library.opcheck(torch.ops.sparse_gen.pooled_means, (x, None, 2, 1))
    torch.library.opcheck(torch.ops.sparse_gen.pooled_means_backward, (torch.randn(1, 2, 8, 9), 2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x of shape"),
        ({"padding": -1}, "padding from 0 on, got -1"),
        ({"padding_mode": "circular"}, "padding_mode out of zeros, reflect, replicate, got 'circular'"),
        ({"x": torch.zeros(1, 1, 1, 5)}, "padded image of at least 2×2, got 1×5"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        pooled_means(**{"x": torch.zeros(1, 3, 4, 4)} | change)
