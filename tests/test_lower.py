"""Lowering: the stages that are found, and that what runs is dense masked PyTorch, whoever wrote the network."""

import pytest
import torch
from equality import assert_equals_masked, scattered_mask
from torch import nn
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.graph import Call, Concat, Conv, Norm, Select
from sparse_gen.engine.lower import lower
from sparse_gen.engine.mutation import CannotLower
from sparse_gen.ops.extension import status

pytestmark = pytest.mark.skipif(not status().available, reason="no compiled library: nothing is lowered")

DENSITIES = (0.0, 0.05, 0.3, 1.0)
SIZE = (20, 27)


def stages(net, z):
    """What was found, a word a stage."""

    def word(op):
        if isinstance(op, Conv):
            parts = [op.upsample, f"conv{op.shape[2]}", op.padding_mode if op.padding else None]
            return " ".join(p for p in [*parts, f"/{op.stride}" if op.stride > 1 else None, "pool" * op.pool] if p)
        if isinstance(op, Norm):
            return "norm" if op.slope == 1 else f"norm {op.slope}"
        return {Concat: "cat", Select: "select"}.get(type(op)) or op.target.__name__.partition(".")[0]

    return [word(node.op) for node in lower(training_copy(net), z).nodes]


def plain_calls(net, z):
    return {node.op.target.__name__ for node in lower(training_copy(net), z).nodes if isinstance(node.op, Call)}


@pytest.mark.parametrize("size", [(24, 32), (27, 34)])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_hourglass(upsample, size):
    net = sg.generators.Hourglass(5, channels=(4, 6, 8), upsample=upsample)
    z = torch.rand(1, 5, *size)
    found = stages(net, z)
    down = ["conv5 reflect pool", "norm 0.2", "conv5 reflect", "norm 0.2"]
    up = {
        "nearest": ["norm", "nearest conv3 reflect", "norm 0.2"],
        "bilinear": ["norm", "bilinear conv3 reflect", "norm 0.2"],
    }[upsample]
    extended = size == (27, 34)
    around = (["index_select"] * 2, ["slice"] * 2) if extended else ([], [])
    assert found == [*around[0], *down * 3, *up * 3, "conv1", "sigmoid", *around[1]]
    for density in DENSITIES:
        assert_equals_masked(net, scattered_mask(net, density), z)


@pytest.mark.parametrize("downsample", ["stride", "avg", "max"])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize(("skips", "pointwise"), [((2, 0), True), ((1, 3), False), (0, True)])
def test_skip(downsample, upsample, padding, skips, pointwise):
    net = sg.generators.Skip(
        4, channels=(5, 6), skip_channels=skips, downsample=downsample, upsample=upsample, padding=padding,
        need_1x1_up=pointwise,
    )  # fmt: skip
    z = torch.rand(1, 4, 21, 26)
    mode = {"zero": "zeros"}.get(padding, padding)
    first = {"stride": [f"conv3 {mode} /2"], "avg": [f"conv3 {mode} pool"], "max": [f"conv3 {mode}", "max_pool2d"]}
    found = stages(net, z)
    assert "".join(first[downsample]) in "".join(found)
    # A normalisation goes in front of the up-sampling; a convolution of a concatenation has nothing to fold.
    folded = 0 in (skips if isinstance(skips, tuple) else (skips,))
    assert any(word.startswith(f"{upsample} conv") for word in found) == folded
    known = {"index_select", "slice", "sigmoid", f"upsample_{upsample}2d", *["max_pool2d"] * (downsample == "max")}
    assert {call.partition(".")[0] for call in plain_calls(net, z)} <= known
    for density in (0.1, 0.6):
        assert_equals_masked(net, scattered_mask(net, density), z)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "fixed", "none"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_deep_decoder(upsample, kernel):
    net = sg.generators.DeepDecoder(4, channels=(5, 6), upsample=upsample, kernel=kernel)
    z = torch.rand(1, 4, 21, 26)
    assert stages(net, z).count("norm") == 3
    for density in (0.1, 0.6):
        assert_equals_masked(net, scattered_mask(net, density), z)


class UNet(nn.Module):
    """What one writes in ten minutes."""

    def __init__(self, pool, corners):
        super().__init__()
        self.down = nn.ModuleList([self.block(4, 5), self.block(5, 6)])
        self.middle = self.block(6, 8)
        self.up = nn.ModuleList([self.block(8 + 6, 6), self.block(6 + 5, 5)])
        self.head = nn.Conv2d(5, 3, 1)
        self.pool, self.corners = pool, corners

    @staticmethod
    def block(inner, outer):
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.GELU(),
            nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.GELU(),
        )  # fmt: skip

    def forward(self, x):
        beside = []
        for down in self.down:
            x = down(x)
            beside.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up, skip in zip(self.up, reversed(beside), strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=self.corners)
            x = F.pad(x, [0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]])
            x = up(torch.cat([skip, x], dim=1))
        return torch.sigmoid(self.head(x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
@pytest.mark.parametrize("corners", [False, True])
def test_a_plain_u_net(pool, corners):
    net, z = UNet(pool, corners), torch.rand(1, 4, 21, 27)
    found = stages(net, z)
    assert (found.count("conv3 zeros"), found.count("norm"), found.count("cat"), found.count("gelu")) == (10, 10, 2, 10)
    for density in DENSITIES:
        assert_equals_masked(net, scattered_mask(net, density), z)


class Own(nn.Module):
    """A network given as a function of itself and z."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, z):
        return self.function(self, z)


def conv(inner, outer, kernel=3, **options):
    return nn.Conv2d(inner, outer, kernel, **options)


def head(inner):
    return conv(inner, 3, 1)


def with_pieces(net, z):
    one, _, three = net.a(z).split([1, 2, 3], dim=1)
    return net.h(torch.cat([three, one, one], dim=1))


def gated(net, z):
    value, gate = net.a(z).chunk(2, dim=1)
    return net.h(value * torch.sigmoid(gate))


def with_slices(net, z):
    x = net.a(z)
    return net.h(torch.cat([x[:, 2:4], x[:, ::2]], dim=1))


def two_readers_of_a_pool(net, z):
    x = F.avg_pool2d(net.a(z), 2)
    return net.h(torch.cat([x, F.relu(x)], dim=1))


def two_readers_in_front_of_a_pool(net, z):
    x = net.a(z)
    return net.h(F.avg_pool2d(x, 2)) + F.max_pool2d(net.h(x), 2)


def two_convolutions_of_one_padding(net, z):
    padded = F.pad(z, [1] * 4, mode="reflect")
    return net.h(torch.cat([net.a(padded), net.b(padded)], dim=1))


def read_before_overwritten(net, z):
    x = net.a(z)
    large = F.interpolate(x, scale_factor=2)
    F.relu_(x)
    return F.avg_pool2d(net.b(large), 2) + net.h(x)


def squeeze(net, z):
    x = net.a(z)
    return net.h(x * torch.sigmoid(net.b(F.adaptive_avg_pool2d(x, 1))))


def networks():
    shared = conv(4, 4, padding=1)
    one = {"a": conv(4, 6, padding=1), "h": head(6)}
    return {
        "slices": (Own(with_slices, a=conv(4, 6), h=head(5)), ["conv3", "select", "select", "cat", "conv1"]),
        "split": (Own(with_pieces, a=conv(4, 6), h=head(5)), ["conv3", "select", "select", "cat", "conv1"]),
        "chunk": (Own(gated, a=conv(4, 6), h=head(3)), ["conv3", "select", "select", "sigmoid", "mul", "conv1"]),
        "residual": (Own(lambda n, z: n.h(n.a(z).add_(n.b(z))), b=conv(4, 6, 1), **one),
                     ["conv3 zeros", "conv1", "add", "conv1"]),
        "ceil_mode": (Own(lambda n, z: n.h(F.avg_pool2d(n.a(z), 2, ceil_mode=True)), **one),
                      ["conv3 zeros", "avg_pool2d", "conv1"]),
        "ceil_mode max": (Own(lambda n, z: n.h(F.max_pool2d(n.a(z), 2, ceil_mode=True)), **one),
                          ["conv3 zeros", "max_pool2d", "conv1"]),
        "overlapping pool": (Own(lambda n, z: n.h(F.avg_pool2d(n.a(z), 3, 2, 1)), **one),
                             ["conv3 zeros", "avg_pool2d", "conv1"]),
        "stride": (Own(lambda n, z: n.h(F.relu(n.a(z))), a=conv(4, 6, 5, stride=2, padding=2), h=head(6)),
                   ["conv5 zeros /2", "relu", "conv1"]),
        "stride and pool": (Own(lambda n, z: n.h(F.avg_pool2d(n.a(z), 2)), a=conv(4, 6, stride=2), h=head(6)),
                            ["conv3 /2", "avg_pool2d", "conv1"]),
        "transposed": (Own(lambda n, z: n.h(n.a(z)), a=nn.ConvTranspose2d(4, 6, 2, stride=2), h=head(6)),
                       ["conv_transpose2d", "conv1"]),
        "grouped": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, groups=2), h=head(6)), ["conv2d", "conv1"]),
        "dilated": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, dilation=2), h=head(6)), ["conv2d", "conv1"]),
        "uneven stride": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, stride=(2, 1)), h=head(6)), ["conv2d", "conv1"]),
        "not square": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, (1, 4), padding=1), h=head(6)),
                       ["conv1 zeros", "conv1"]),
        "padding by axis": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, (3, 5), padding=(1, 2)), h=head(6)),
                            ["conv2d", "conv1"]),
        "padding by side": (Own(lambda n, z: n.h(F.pad(z, [1, 2, 0, 3])), h=conv(4, 3)), ["pad", "conv3"]),
        "cropping": (Own(lambda n, z: n.h(F.pad(n.a(z), [-1] * 4)), a=conv(4, 6), h=head(6)),
                     ["conv3", "pad", "conv1"]),
        "padding with ones": (Own(lambda n, z: n.h(F.pad(n.a(z), [1] * 4, value=1.0)), a=conv(4, 6), h=head(6)),
                              ["conv3", "pad", "conv1"]),
        "circular": (Own(lambda n, z: n.h(z), h=conv(4, 3, padding=1, padding_mode="circular")), ["pad", "conv3"]),
        "same": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, 5, padding="same"), h=conv(6, 3, 1, padding="valid")),
                 ["conv5 zeros", "conv1"]),
        "large kernels": (Own(lambda n, z: n.h(n.a(z)), a=conv(4, 6, 9, padding=4), h=conv(6, 3, 13, padding=6)),
                          ["conv9 zeros", "conv13 zeros"]),
        "PReLU": (Own(lambda n, z: n.h(n.p(n.a(z))), p=nn.PReLU(6), **one), ["conv3 zeros", "prelu", "conv1"]),
        "InstanceNorm": (Own(lambda n, z: n.h(F.relu(n.n(n.a(z)))), n=nn.InstanceNorm2d(6, affine=True), **one),
                         ["conv3 zeros", "norm 0.0", "conv1"]),
        "InstanceNorm without γ": (Own(lambda n, z: n.h(n.n(n.a(z))), n=nn.InstanceNorm2d(6), **one),
                                   ["conv3 zeros", "instance_norm", "conv1"]),
        "BatchNorm without γ": (Own(lambda n, z: n.h(n.n(n.a(z))), n=nn.BatchNorm2d(6, affine=False), **one),
                                ["conv3 zeros", "batch_norm", "conv1"]),
        "normalised up-sampling": (
            Own(lambda n, z: n.h(F.leaky_relu(n.n(F.interpolate(n.a(z), scale_factor=2)))), n=nn.BatchNorm2d(6), **one),
            ["conv3 zeros", "norm 0.01", "nearest conv1"]),
        "a weight used twice": (Own(lambda n, z: n.h(n.a(F.relu(n.a(z)))), a=shared, h=head(4)),
                                ["conv3 zeros", "relu", "conv3 zeros", "conv1"]),
        "one layer under two names": (
            Own(lambda n, z: n.h(n.b(n.n(n.a(z)))), a=shared, b=shared, n=nn.BatchNorm2d(4), h=head(4)),
            ["conv3 zeros", "norm", "conv3 zeros", "conv1"]),
        "a buffer added": (
            Own(lambda n, z: n.h(n.n(n.a(z) + n.x)), n=nn.BatchNorm2d(6), x=torch.rand(1, 6, *SIZE).double(), **one),
            ["conv3 zeros", "add", "norm", "conv1"]),
        "parameters of one's own": (
            Own(lambda n, z: F.conv2d(F.conv2d(z, n.w, n.b, padding=1), n.v) * n.s.view(1, -1, 1, 1),
                w=nn.Parameter(torch.randn(5, 4, 3, 3)), b=nn.Parameter(torch.randn(5)),
                v=nn.Parameter(torch.randn(3, 5, 1, 1)), s=nn.Parameter(torch.randn(3))),
            ["conv3 zeros", "conv1", "view", "mul"]),
        "two of one padding": (Own(two_convolutions_of_one_padding, a=conv(4, 5), b=conv(4, 2), h=head(7)),
                               ["conv3 reflect", "conv3 reflect", "cat", "conv1"]),
        "two of a pool": (Own(two_readers_of_a_pool, a=conv(4, 6), h=head(12)),
                          ["conv3 pool", "relu", "cat", "conv1"]),
        "two in front of a pool": (Own(two_readers_in_front_of_a_pool, **one),
                                   ["conv3 zeros", "avg_pool2d", "conv1", "conv1", "max_pool2d", "add"]),
        "overwritten later": (Own(read_before_overwritten, b=conv(6, 3, padding=1), **one),
                              ["conv3 zeros", "relu", "nearest conv3 zeros", "avg_pool2d", "conv1", "add"]),
        "detached": (Own(lambda n, z: n.h(n.a(z) + n.b(z).detach()), b=conv(4, 6, 1), **one),
                     ["conv3 zeros", "conv1", "detach", "add", "conv1"]),
        "squeeze and excite": (Own(squeeze, b=conv(6, 6, 1), **one),
                               ["conv3 zeros", "adaptive_avg_pool2d", "conv1", "sigmoid", "mul", "conv1"]),
        "cast": (Own(lambda n, z: n.h(n.a(z).double()), **one), ["conv3 zeros", "to", "conv1"]),
        "two heads": (Own(lambda n, z: (lambda x: n.h(x) + n.g(x))(n.n(n.a(z))), n=nn.BatchNorm2d(6), g=head(6), **one),
                      ["conv3 zeros", "norm", "conv1", "conv1", "add"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def own_networks():
    torch.manual_seed(0)
    return networks()


@pytest.mark.parametrize("name", networks())
def test_a_network_of_ones_own(own_networks, name):
    net, expected = own_networks[name]
    net, z = net.double(), torch.rand(1, 4, *SIZE, dtype=torch.float64)
    found = stages(net, z)
    assert sorted(found) == sorted(expected)
    for density in DENSITIES:
        fast = assert_equals_masked(net, scattered_mask(net, density), z)
        assert fast.runs_on_the_engine
        assert str(fast.plan)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, z: (lambda x: (F.relu_(x[:, :2]), net.h(x))[1])(net.a(z)), "overwritten in place, got aten.relu_"),
        (lambda net, z: net.h(net.a(z + net.count.add_(0))), "leaves z, buffers and parameters alone, got aten.add_"),
        (lambda net, z: net.h(net.a(z)[0])[None], "expected feature maps of one experiment all the way, got aten.sel"),
        (lambda net, z: F.conv2d(net.a(z), net.h.weight - net.h.weight.mean()), "feature maps of one experiment"),
    ],
)
def test_what_is_no_chain_of_feature_maps_runs_as_it_did(function, reason):
    net = Own(function, a=conv(4, 6), h=head(6), count=torch.zeros(1, dtype=torch.float64)).double()
    z = torch.rand(1, 4, *SIZE, dtype=torch.float64)
    fast = assert_equals_masked(net, scattered_mask(net, 0.5), z)
    assert reason in str(fast.plan)


def test_an_input_that_is_overwritten_is_not_captured():
    net = Own(lambda net, z: net.h(z.mul_(2.0)), h=conv(4, 3))
    with pytest.raises(CannotLower, match="leaves z, buffers and parameters alone"):
        lower(training_copy(net), torch.rand(1, 4, *SIZE))


@pytest.mark.parametrize("noise", [nn.Dropout(0.5), lambda x: x + torch.randn(1, 6, 18, 25)])
def test_random_numbers_are_drawn_anew_at_every_pass(noise):
    net = Own(lambda net, z: net.h(noise(net.a(z))), a=conv(4, 6), h=head(6))
    z = torch.rand(1, 4, *SIZE)
    fast = sg.compile(net, scattered_mask(net, 0.9), z)
    assert "draws random numbers" in str(fast.plan)
    assert not torch.equal(fast(z), fast(z))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (conv(4, 6, groups=2), "groups 2"),
        (conv(4, 6, dilation=2), "dilation 2"),
        (conv(4, 6, stride=3), "stride 3"),
        (conv(4, 6, stride=(1, 2)), "stride differs by axis"),
        (conv(4, 6, (3, 5), padding=(1, 2)), "padding differs by axis"),
    ],
)
def test_the_plan_says_why_a_convolution_stays_pytorchs(layer, reason):
    net = nn.Sequential(layer, head(6))
    stage = sg.compile(net, scattered_mask(net, 0.9), torch.rand(1, 4, *SIZE)).plan.stages[0]
    assert stage.kernel.startswith("PyTorch (") and reason in stage.kernel


def test_the_graph_says_why_other_parameters_stay_pytorchs():
    parts = {"a": nn.ConvTranspose2d(4, 6, 2), "p": nn.PReLU(), "w": nn.Parameter(torch.rand(6, 1, 3, 3))}
    net = Own(lambda net, z: net.h(F.conv2d(net.p(net.a(z)), net.w, groups=6)), h=head(6), **parts)
    reasons = lower(training_copy(net), torch.rand(1, 4, *SIZE)).reasons
    assert set(reasons) == {"a.weight", "a.bias", "p.weight", "w"}
    assert "conv_transpose2d" in reasons["a.weight"] and "groups 6" in reasons["w"]
