"""The hourglass: its size, its order of parameters, the function that it computes."""

import pytest
import torch
from torch.nn import functional as F

import sparse_gen as sg


def small(**arguments):
    return sg.generators.Hourglass(**{"in_channels": 5, "channels": (4, 6, 8), **arguments})


def test_default_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in sg.generators.Hourglass().parameters()) == 3_008_867


def test_parameters_are_listed_as_in_the_published_masks():
    shapes = [tuple(p.shape) for p in small().parameters()]
    down = [[(4, 5), (4, 4)], [(6, 4), (6, 6)], [(8, 6), (8, 8)]]
    up = [(8, 8), (6, 8), (4, 6)]
    expected = [s for scale in down for c in scale for s in [(*c, 5, 5), c[:1], c[:1], c[:1]]]
    expected += [s for o, i in up for s in [(i,), (i,), (o, i, 3, 3), (o,), (o,), (o,)]]
    assert shapes == [*expected, (3, 4, 1, 1), (3,)]


def test_it_computes_the_papers_network():
    """The same function written with torch.nn.functional, straight from the description."""
    net = small(depth=2).double()
    z = torch.rand(1, 5, 24, 36, dtype=torch.float64)
    parameters = iter(net.parameters())

    def conv(x):
        weight, bias = next(parameters), next(parameters)
        pad = weight.shape[-1] // 2
        return F.conv2d(F.pad(x, [pad] * 4, mode="reflect") if pad else x, weight, bias)

    def norm(x):
        return F.batch_norm(x, None, None, next(parameters), next(parameters), training=True)

    x = z
    for _ in range(2):
        x = F.leaky_relu(norm(F.avg_pool2d(conv(x), 2)), 0.2)
        x = F.leaky_relu(norm(conv(x)), 0.2)
    for _ in range(2):
        x = F.leaky_relu(norm(conv(norm(F.interpolate(x, scale_factor=2, mode="nearest")))), 0.2)
    torch.testing.assert_close(net(z), torch.sigmoid(conv(x)), rtol=1e-12, atol=1e-12)


def test_too_small_an_image_names_the_depth_that_fits():
    with pytest.raises(ValueError, match=r"got a 16×40 image at depth 3, use depth=2"):
        small()(torch.rand(1, 5, 16, 40))
    assert small(depth=2)(torch.rand(1, 5, 16, 40)).shape == (1, 3, 16, 40)


def test_a_larger_kernel_needs_a_larger_deepest_level():
    net = small(down_kernel=9)
    with pytest.raises(ValueError, match="at least 5 pixels a side at the deepest level"):
        net(torch.rand(1, 5, 32, 32))
    assert net(torch.rand(1, 5, 33, 33)).shape[-1] == 33


@pytest.mark.parametrize(
    ("size", "depth"), [(192, 6), (129, 6), (128, 5), (65, 5), (24, 3), (17, 3), (5, 1), (1000, 6)]
)
def test_deepest_depth_fits_and_one_more_does_not(size, depth):
    assert sg.generators.deepest_depth((size, 2 * size)) == depth
    net = small(channels=(2,), depth=depth, down_kernel=5)
    assert net(torch.rand(1, 5, size, size)).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 5}, "out_channels from 1 to 4, got 5"),
        ({"in_channels": 0}, "in_channels of at least 1"),
        ({"channels": ()}, "one or more positive widths"),
        ({"depth": 0}, "depth of at least 1"),
        ({"down_kernel": 4}, "odd down_kernel, got 4"),
        ({"up_kernel": 0}, "odd up_kernel"),
        ({"upsample": "bicubic"}, "'nearest' or 'bilinear', got 'bicubic'"),
        ({"skip_channels": -1}, "skip_channels of at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_noise_input():
    z = sg.noise_input(3, (7, 9), seed=[0, 1, 2])
    assert z.shape == (3, 3, 7, 9)
    assert 0 < z.min() < z.max() < 0.1
    assert torch.equal(z[1:2], sg.noise_input(3, (7, 9), seed=1))
    assert not torch.equal(z[0], z[1])
    assert sg.noise_input(3, (50, 50), scale=1.0).max() > 0.9
    with pytest.raises(ValueError, match="scale above 0"):
        sg.noise_input(3, (7, 9), scale=0)
    with pytest.raises(ValueError, match="at least one channel and pixel"):
        sg.noise_input(3, (0, 9))


def test_add_noise():
    image = torch.full((1, 3, 64, 64), 0.5)
    noisy = sg.inverse.add_noise(image, 0.1, seed=5)
    assert (noisy - image).std().item() == pytest.approx(0.1, rel=0.03)
    assert torch.equal(noisy, sg.inverse.add_noise(image, 0.1, seed=5))
    assert sg.inverse.add_noise(image, 0.5).max() == 1
    assert sg.inverse.add_noise(image, 0.5, clip=False).max() > 1
    assert sg.inverse.add_noise(image, 0.1, seed=[0, 5]).shape == (2, 3, 64, 64)
    assert torch.equal(sg.inverse.add_noise(image, 0.1, seed=[0, 5])[1:], noisy)
    with pytest.raises(ValueError, match="did you mean 25/255"):
        sg.inverse.add_noise(image, 25)
