"""Normalisation in front of a bilinear up-sampling: against torch's batch_norm behind it, in float64."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.graph import Norm
from sparse_gen.engine.lower import lower
from sparse_gen.engine.steps import Loaded
from sparse_gen.engine.upsampled_norm import UpsampledNormStep, up_and_back
from sparse_gen.ops.convolution import upsampled

KINDS = ["bilinear", "bilinear_corners"]
SIZES = [(1, 1), (1, 5), (2, 3), (9, 23), (64, 64)]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_up_and_back_is_the_adjoint_behind_the_up_sampling(kind, size):
    x = torch.randn(1, 2, *size, dtype=torch.float64).requires_grad_()
    large = upsampled(x, kind)
    (expected,) = torch.autograd.grad(large, x, large)
    torch.testing.assert_close(up_and_back(x, kind), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
# A single pixel only in double: it is its own mean, and x · factor + shift with factor 1/√ε loses a float's digits.
@pytest.mark.parametrize(("size", "dtype"), [*product(SIZES, [torch.float64]), *product(SIZES[1:], [torch.float32])])
@pytest.mark.parametrize("leaves_load", [False, True])
def test_output_and_gradients(kind, size, dtype, leaves_load):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # A mean well above the spread, where a variance from E[x²] − m² would cancel.
    x, gamma, beta, gradient = 3 + normal(1, 3, *size), normal(3), normal(3), normal(1, 3, *size)
    step = UpsampledNormStep(Norm("gamma", "beta", 1e-5, 1.0, kind), leaves_load)
    y, kept = step.forward([x], [gamma[None], beta[None]], True)
    assert isinstance(y, Loaded) == leaves_load
    if leaves_load:
        y = torch.ops.sparse_gen.apply_load(*y[:2])
    grads, own = step.backward(gradient, kept, [gamma[None], beta[None]], [True])

    # The reference's small image is what up-samples to torch's normalised large one.
    leaves = [tensor.double().requires_grad_() for tensor in (x, gamma, beta)]
    large = upsampled(leaves[0], kind)
    variance, mean = torch.var_mean(large, dim=(0, 2, 3), correction=0, keepdim=True)
    small = (leaves[0] - mean) * (variance + 1e-5).rsqrt() * leaves[1][:, None, None] + leaves[2][:, None, None]
    want = F.batch_norm(large, None, None, leaves[1], leaves[2], training=True)
    torch.testing.assert_close(upsampled(small, kind), want, rtol=1e-10, atol=1e-10)
    expected = [small, *torch.autograd.grad(small, leaves, gradient.double())]
    # Where a gradient cancels, as that of a single pixel does, its error is measured against what is summed.
    scales = [small.norm(), (leaves[1].abs().max() / (variance.min() + 1e-5).sqrt()) * gradient.double().norm()]
    scales += [(gradient.double() * (small - leaves[2][:, None, None])).abs().sum() + gradient.double().abs().sum()] * 2
    for got, want, scale in zip([y, *grads, *(grad[0] for grad in own)], expected, scales, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * scale


class Behind(nn.Module):
    def __init__(self, corners, activation=None, twice=False):
        super().__init__()
        self.norm, self.conv, self.activation = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1), activation
        self.corners, self.twice = corners, twice

    def forward(self, z):
        x = self.norm(F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=self.corners))
        y = self.conv(self.activation(x) if self.activation else x)
        return y + x[:, :3] if self.twice else y


def kinds(net, z):
    return [node.op.upsample for node in lower(training_copy(net), z).nodes if isinstance(node.op, Norm)]


def test_only_what_convolutions_alone_read_is_normalised_in_front():
    z = torch.rand(1, 4, 9, 7)
    assert kinds(Behind(False), z) == ["bilinear"]
    assert kinds(Behind(True), z) == ["bilinear_corners"]
    assert kinds(Behind(True, nn.LeakyReLU(0.2)), z) == [None]
    assert kinds(Behind(True, twice=True), z) == [None]


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("behind", [{}, {"activation": nn.ReLU()}, {"twice": True}])
def test_networks_give_the_same_gradients(corners, behind):
    net, z = Behind(corners, **behind).double(), torch.rand(1, 4, 9, 7, dtype=torch.float64)
    nn.init.uniform_(net.norm.weight)
    nn.init.uniform_(net.norm.bias)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    fast = sg.compile(net, example_input=z)
    output, expected = fast(ours), net(theirs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    kept = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    torch.testing.assert_close(fast.values.grad[0], kept, rtol=1e-9, atol=1e-12)


def test_the_plan_of_a_bilinear_hourglass_shows_taps():
    net, generator = sg.generators.Hourglass(4, channels=(8, 8), upsample="bilinear"), torch.Generator().manual_seed(0)
    weights = {name: p for name, p in net.named_parameters() if p.ndim == 4}
    mask = sg.Mask({name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in weights.items()})
    fast = sg.compile(net, mask, torch.rand(1, 4, 32, 32), plan="rule")
    assert [stage.layout for stage in fast.plan.stages if stage.name.startswith("decoder")] == ["taps", "taps"]
