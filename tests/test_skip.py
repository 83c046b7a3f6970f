"""The skip network: its size, its order of parameters, the function that it computes."""

import pytest
import torch
from problems import problem
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.masks.connectivity import probe_connectivity


def small(**arguments):
    return sg.generators.Skip(**{"in_channels": 5, "channels": (4, 6, 8), "skip_channels": 2, **arguments})


def convolution(inner, outer, kernel):
    return inner * outer * kernel**2 + outer


def norm(channels):
    return 2 * channels


def test_default_has_the_number_of_parameters_of_the_authors_network():
    """2,217,831, by hand:

    skip connections  (32·4 + 4) + 8 at the first scale, (128·4 + 4) + 8 at the other four      2,236
    encoder           (32·128·9 + 128) + 256 + (128·128·9 + 128) + 256 at the first           185,088
                      2 · ((128·128·9 + 128) + 256) at each of the other four               1,182,720
    decoder           264 + (132·128·9 + 128) + 256 + (128·128 + 128) + 256 at each of five   847,400
    head              128·3 + 3                                                                   387
    """
    skips = convolution(32, 4, 1) + norm(4) + 4 * (convolution(128, 4, 1) + norm(4))
    second = convolution(128, 128, 3) + norm(128)
    encoder = convolution(32, 128, 3) + norm(128) + second + 4 * 2 * second
    up = norm(132) + convolution(132, 128, 3) + norm(128) + convolution(128, 128, 1) + norm(128)
    total = skips + encoder + 5 * up + convolution(128, 3, 1)
    assert (skips, encoder, 5 * up, total) == (2_236, 185_088 + 1_182_720, 847_400, 2_217_831)
    assert sum(p.numel() for p in sg.generators.Skip().parameters()) == total


def test_defaults_are_the_lottery_image_priors():
    assert sg.generators.Skip().recipe()["arguments"] == {
        "in_channels": 32, "out_channels": 3, "channels": [128] * 5, "depth": 5, "skip_channels": 4,
        "down_kernel": 3, "up_kernel": 3, "downsample": "stride", "upsample": "bilinear", "padding": "reflect",
        "need_1x1_up": True, "seed": 0,
    }  # fmt: skip


def reference(net, z, *, depth, skips, downsample, upsample, padding, need_1x1_up):
    """The authors' nested description, written with torch.nn.functional; it takes the parameters in its own order."""
    parameters = iter(net.parameters())

    def conv(x, stride=1):
        weight, bias = next(parameters), next(parameters)
        margin = [weight.shape[-1] // 2] * 4
        if margin[0]:
            x = F.pad(x, margin, mode="reflect") if padding == "reflect" else F.pad(x, margin)
        return F.conv2d(x, weight, bias, stride=stride)

    def norm(x):
        return F.batch_norm(x, None, None, next(parameters), next(parameters), training=True)

    def down(x):
        if downsample == "stride":
            return conv(x, stride=2)
        return F.avg_pool2d(conv(x), 2) if downsample == "avg" else F.max_pool2d(conv(x), 2)

    def scale(x, i):
        beside = [F.leaky_relu(norm(conv(x)), 0.2)] if skips[i] else []
        x = F.leaky_relu(norm(down(x)), 0.2)
        x = F.leaky_relu(norm(conv(x)), 0.2)
        if i + 1 < depth:
            x = scale(x, i + 1)
        x = norm(torch.cat([*beside, F.interpolate(x, scale_factor=2, mode=upsample)], dim=1))
        x = F.leaky_relu(norm(conv(x)), 0.2)
        return F.leaky_relu(norm(conv(x)), 0.2) if need_1x1_up else x

    image = torch.sigmoid(conv(scale(z, 0)))
    assert next(parameters, None) is None
    return image


@pytest.mark.parametrize("downsample", ["stride", "avg", "max"])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize(("skips", "need_1x1_up"), [((2, 2, 2), True), ((0, 3, 1), False), ((0, 0, 0), True)])
def test_it_computes_the_papers_network(downsample, upsample, padding, skips, need_1x1_up):
    settings = {"downsample": downsample, "upsample": upsample, "padding": padding, "need_1x1_up": need_1x1_up}
    net = small(skip_channels=skips, **settings).double()
    z = torch.rand(1, 5, 24, 40, dtype=torch.float64)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    image, expected = net(ours), reference(net, theirs, depth=3, skips=skips, **settings)
    torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(image.square().sum(), [ours, *net.parameters()])
    others = torch.autograd.grad(expected.square().sum(), [theirs, *net.parameters()])
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_parameters_are_listed_as_in_the_authors_network():
    net = small(channels=(4, 6), skip_channels=(2, 3))
    shapes = [tuple(p.shape) for p in net.parameters()]

    def block(outer, inner, kernel):
        return [(outer, inner, kernel, kernel), *[(outer,)] * 3]

    first = [*block(2, 5, 1), *block(4, 5, 3), *block(4, 4, 3)]
    second = [*block(3, 4, 1), *block(6, 4, 3), *block(6, 6, 3)]
    up_second = [(9,), (9,), *block(6, 9, 3), *block(6, 6, 1)]
    up_first = [(8,), (8,), *block(4, 8, 3), *block(4, 4, 1)]
    assert shapes == [*first, *second, *up_second, *up_first, (3, 4, 1, 1), (3,)]


def test_a_larger_depth_repeats_the_last_width_and_skip():
    repeated = small(channels=(4, 6), skip_channels=(2, 1), depth=4)
    written = small(channels=(4, 6, 6, 6), skip_channels=(2, 1, 1, 1))
    z = torch.rand(1, 5, 40, 33)
    assert torch.equal(repeated(z), written(z))
    assert len(small(depth=2).encoder) == 2


@pytest.mark.parametrize("arguments", [{}, {"down_kernel": 5}, {"up_kernel": 9}, {"padding": "zero"}])
def test_the_deepest_level_asks_for_no_more_than_pytorch_does(arguments):
    net = small(**arguments)
    side = 8 * (net.deepest_level - 1)
    net.deepest_level -= 1
    with pytest.raises((RuntimeError, ValueError), match=r"Padding size|more than 1 value per channel"):
        net(torch.rand(1, 5, side, side))


def test_one_living_skip_connection_keeps_the_network_connected():
    net, z = small(in_channels=6), problem()[0]
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    parameters["encoder.0.down.norm1.weight"] = torch.zeros(1, 4)
    assert probe_connectivity(net, parameters, z).connected
    parameters["encoder.0.skip.norm.weight"] = torch.zeros(1, 2)
    assert not probe_connectivity(net, parameters, z).connected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 0}, "out_channels from 1 to 4, got 0"),
        ({"in_channels": 0}, "in_channels of at least 1"),
        ({"channels": (4, 0)}, "one or more positive widths"),
        ({"depth": 0}, "depth of at least 1"),
        ({"down_kernel": 2}, "odd down_kernel, got 2"),
        ({"up_kernel": -1}, "odd up_kernel"),
        ({"downsample": "lanczos"}, "downsample 'stride', 'avg' or 'max', got 'lanczos'"),
        ({"upsample": "bicubic"}, "upsample 'nearest' or 'bilinear', got 'bicubic'"),
        ({"padding": "replicate"}, "padding 'reflect' or 'zero', got 'replicate'"),
        ({"skip_channels": -1}, "skip_channels of at least 0, one number or one a scale, got -1"),
        ({"skip_channels": (4, -1)}, "skip_channels of at least 0"),
        ({"skip_channels": ()}, "skip_channels of at least 0"),
        ({"seed": 0.5}, "expected a seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
