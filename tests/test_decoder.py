"""The deep decoder: its size, what it takes of z, the function that it computes."""

from itertools import pairwise

import pytest
import torch
from problems import problem
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.generators.decoder import FixedUpsample
from sparse_gen.masks.connectivity import probe_connectivity


def small(**arguments):
    return sg.generators.DeepDecoder(**{"in_channels": 5, "channels": (4, 6, 8), **arguments})


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "blocks", "width", "out_channels", "published"),
    [
        ({}, 6, 128, 3, 100_224),
        # 256×5 of the compressive sensing paper: five blocks take its 16×16 input to 256×256
        ({"channels": (256,), "depth": 4, "out_channels": 1}, 5, 256, 1, 330_496),
    ],
)
def test_the_published_numbers_of_parameters(arguments, blocks, width, out_channels, published):
    """Each block a 1×1 convolution without bias and a BN with γ and β; the head has no bias either."""
    block = width * width + 2 * width
    assert blocks * block + width * out_channels == published
    net = sg.generators.DeepDecoder(**arguments)
    assert count(net) == published
    assert net.in_channels == width


def reference(net, z, *, upsample, kernel):
    """Straight from the description, written with torch.nn.functional."""
    parameters = iter(net.parameters())

    def conv(x):
        weight = next(parameters)
        margin = [weight.shape[-1] // 2] * 4
        return F.conv2d(F.pad(x, margin, mode="reflect") if margin[0] else x, weight)

    def norm(x):
        return F.batch_norm(x, None, None, next(parameters), next(parameters), training=True)

    def up(x):
        if upsample == "none":
            return x
        if upsample == "fixed":  # each output pixel sees two a side, 3/4 and 1/4, and zeros beyond the edge
            return F.interpolate(F.pad(x, [1] * 4), scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]
        return F.interpolate(x, scale_factor=2, mode=upsample)

    x = z if upsample == "none" else z[..., ::8, ::8]
    for _ in range(3):
        x = norm(F.relu(up(conv(x))))
    x = norm(F.relu(conv(x)))
    assert kernel == next(net.parameters()).shape[-1]
    image = torch.sigmoid(conv(x))[..., : z.shape[-2], : z.shape[-1]]
    assert next(parameters, None) is None
    return image


@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "fixed", "none"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(24, 40), (19, 33)])
def test_it_computes_the_papers_network(upsample, kernel, size):
    net = small(upsample=upsample, kernel=kernel).double()
    z = torch.rand(1, 5, *size, dtype=torch.float64)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    image, expected = net(ours), reference(net, theirs, upsample=upsample, kernel=kernel)
    torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(image.square().sum(), [ours, *net.parameters()])
    others = torch.autograd.grad(expected.square().sum(), [theirs, *net.parameters()])
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_parameters_are_listed_from_the_deepest_block_out():
    shapes = [tuple(p.shape) for p in small().parameters()]
    widths = [5, 8, 6, 4, 4]
    blocks = [s for i, o in pairwise(widths) for s in [(o, i, 1, 1), (o,), (o,)]]
    assert shapes == [*blocks, (3, 4, 1, 1)]


def test_it_takes_every_2_to_the_depth_th_row_and_column_of_z():
    net = small()
    z = torch.rand(1, 5, 27, 34).requires_grad_()
    image = net(z)
    image.square().sum().backward()
    reaches = z.grad.abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros(27, 34, dtype=torch.bool)
    expected[::8, ::8] = True
    assert torch.equal(reaches, expected)
    other = torch.rand(1, 5, 27, 34)
    other[..., ::8, ::8] = z.detach()[..., ::8, ::8]
    assert torch.equal(net(other), image)


def test_images_that_differ_in_the_crop_only_are_crops_of_one():
    net, z = small(), torch.rand(1, 5, 32, 40)
    assert torch.equal(net(z[..., :27, :34]), net(z)[..., :27, :34])


def test_the_fixed_kernel_is_bilinear_inside_and_no_parameter():
    fixed = FixedUpsample()
    assert fixed.kernel.tolist() == [[a * b / 16 for b in (1, 3, 3, 1)] for a in (1, 3, 3, 1)]
    x = torch.rand(2, 3, 7, 9)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(fixed(x)[inside], F.interpolate(x, scale_factor=2, mode="bilinear")[inside])
    assert fixed(x).shape == (2, 3, 14, 18)
    assert small(upsample="fixed").state_dict().keys() == small().state_dict().keys()
    assert count(small(upsample="fixed")) == count(small(upsample="none")) == count(small())


def test_one_pixel_at_the_deepest_level_would_be_a_constant_image():
    net = small()
    net.deepest_level = 1
    assert net(torch.rand(1, 5, 8, 8)).std(dim=(-2, -1)).max() < 1e-6


def test_without_upsampling_the_image_may_be_tiny():
    assert small(upsample="none", kernel=3)(torch.rand(1, 5, 2, 9)).shape == (1, 3, 2, 9)
    with pytest.raises(ValueError, match="an image of at least 2 pixels a side, got 1×9"):
        small(upsample="none", kernel=3)(torch.rand(1, 5, 1, 9))


def test_a_cut_in_the_middle_is_found():
    net, z = small(in_channels=6), problem()[0]
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    parameters["blocks.1.conv.0.weight"] = torch.zeros(1, 6, 8, 1, 1)
    assert probe_connectivity(net, parameters, z).disconnected_at == "blocks.1.conv.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 5}, "out_channels from 1 to 4, got 5"),
        ({"in_channels": 0}, "in_channels of at least 1, got 0"),
        ({"channels": ()}, "one or more positive widths"),
        ({"depth": 0}, "depth of at least 1"),
        ({"kernel": 4}, "odd kernel, got 4"),
        ({"upsample": "bicubic"}, "upsample 'bilinear', 'nearest', 'fixed' or 'none', got 'bicubic'"),
        ({"seed": "a"}, "expected a seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
