"""Compaction: only what cannot change the output or a gradient is deleted, and all of that."""

from importlib import import_module

import pytest
import torch
from equality import assert_equals_masked, scattered_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.engine.compact import compact
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.graph import Conv
from sparse_gen.engine.lower import lower
from sparse_gen.ops.extension import status

compiled = pytest.mark.skipif(not status().available, reason="no compiled library: nothing is compacted")


class Block(nn.Module):
    """[×2 up-sampling,] convolution[, pool][, normalisation], activation."""

    def __init__(self, inner, outer, spec):
        super().__init__()
        kernel, mode, self.change, norm, self.activation, bias = spec
        margin = kernel // 2
        stride = 2 if self.change == "stride" else 1
        self.conv = nn.Conv2d(inner, outer, kernel, stride, padding=margin, padding_mode=mode, bias=bias)
        self.norm = nn.BatchNorm2d(outer) if norm else None

    def forward(self, x):
        if self.change in ("nearest", "bilinear"):
            x = F.interpolate(x, scale_factor=2, mode=self.change)
        x = self.conv(x)
        if self.change in ("avg", "max"):
            x = (F.avg_pool2d if self.change == "avg" else F.max_pool2d)(x, 2)
        x = x if self.norm is None else self.norm(x)
        return {"none": lambda x: x, "leaky": lambda x: F.leaky_relu(x, 0.2), "gelu": F.gelu}[self.activation](x)


class Network(nn.Module):
    """Blocks one after the other; some concatenate z or an earlier value of their size, or add it."""

    def __init__(self, widths, specs, joins, normed_head, head_padding):
        super().__init__()
        self.blocks, self.joins = nn.ModuleList(), joins
        known = [(3, 0)]  # width and how often halved
        width, level = known[0]
        for outer, spec, join in zip(widths, specs, joins, strict=True):
            self.blocks.append(Block(width, outer, spec))
            width = outer
            level += {"nearest": -1, "bilinear": -1, "stride": 1, "avg": 1, "max": 1}.get(spec[2], 0)
            partner = self.partner(known, join, width, level)
            if partner is not None and join[0] == "cat":
                width += known[partner][0]
            known.append((width, level))
        self.known = known
        self.norm = nn.BatchNorm2d(width) if normed_head else None
        self.head = nn.Conv2d(width, 2, 3 if head_padding else 1, padding=1 if head_padding else 0)

    @staticmethod
    def partner(known, join, width, level):
        """The number of the earlier value that a block's output is joined with, if one fits."""
        how, which = join
        fitting = [n for n, (w, at) in enumerate(known) if at == level and (how == "cat" or w == width)]
        return fitting[which % len(fitting)] if how != "no" and fitting else None

    def forward(self, z):
        values = [z]
        for block, join in zip(self.blocks, self.joins, strict=True):
            x = block(values[-1])
            width, level = x.shape[1], self.known[len(values)][1]
            partner = self.partner(self.known[: len(values)], join, width, level)
            if partner is not None:
                x = torch.cat([x, values[partner]], dim=1) if join[0] == "cat" else x + values[partner]
            values.append(x)
        x = values[-1] if self.norm is None else self.norm(values[-1])
        return torch.sigmoid(self.head(x))


@st.composite
def masked_networks(draw):
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 5), min_size=depth, max_size=depth))
    specs, level = [], 0
    for _ in range(depth):
        # At most two halvings of 16 × 20 pixels, at most one doubling.
        changes = ["no", *(["stride", "avg", "max"] if level < 2 else []), *(["nearest", "bilinear"] * (level > -1))]
        change = draw(st.sampled_from(changes))
        level += {"nearest": -1, "bilinear": -1, "no": 0}.get(change, 1)
        specs.append(
            (draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from(["zeros", "reflect", "replicate"])), change,
             draw(st.booleans()), draw(st.sampled_from(["none", "leaky", "gelu"])), draw(st.booleans()))
        )  # fmt: skip
    joins = [draw(st.tuples(st.sampled_from(["no", "cat", "add"]), st.integers(0, 3))) for _ in range(depth)]
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    net = Network(widths, specs, joins, draw(st.booleans()), draw(st.booleans()))
    experiments = draw(st.integers(1, 3))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0]))
    mask = scattered_mask(net, density, seed, experiments)
    # Whole filters, whole layers and γ go, of all experiments or of the first.
    names = sorted(mask.tensors)
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        mask.tensors[name][: draw(st.integers(1, 3))] = draw(st.booleans())
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        mask.tensors[name][: draw(st.integers(1, 3)), 0] = False
    for name in draw(st.lists(st.sampled_from([n for n in names if "norm" in n] or names), max_size=2)):
        mask.tensors[name][:] = name.endswith("bias")  # masked γ, kept β
    return net, sg.Mask(mask.tensors, experiments=experiments), experiments, seed


@compiled
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(masked_networks())
def test_any_network_and_mask(case):
    net, mask, experiments, seed = case
    z = torch.rand(experiments, 3, 16, 20, generator=torch.Generator().manual_seed(seed))
    assert_equals_masked(net, mask, z, experiments)
    with pytest.MonkeyPatch.context() as patch:  # what any of them keeps, as on a GPU
        patch.setattr(import_module("sparse_gen.engine.compile"), "in_one_pass", lambda *_: True)
        assert_equals_masked(net, mask, z, experiments)


class Chain(nn.Module):
    """Convolution, BN, LeakyReLU, three times, and a 1×1 head with or without a BN in front."""

    def __init__(self, mode, norm=True):
        super().__init__()
        options = {"padding": 1, "padding_mode": mode}
        self.convs = nn.ModuleList(nn.Conv2d(inner, 4, 3, **options) for inner in (3, 4, 4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)


def compacted(net, *masked):
    """The live channels behind every convolution, and the compaction, where the entries of (name, index) are masked."""
    keep = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    for name, index in masked:
        keep[name][index] = False
    z = torch.rand(1, 3, 12, 14)
    if status().available:
        assert_equals_masked(net, sg.Mask(keep), z)
    graph = lower(training_copy(net), z)
    left = compact(graph, keep)
    by_name = {node.name: value for value, node in enumerate(graph.nodes, start=1) if isinstance(node.op, Conv)}
    return {name: left.channels[value].tolist() for name, value in by_name.items()}, left, by_name


ALL = [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_a_dead_chain_goes_to_its_end(mode):
    """What only an unread channel reads is unread itself; what only a constant makes is constant itself."""
    live, left, values = compacted(
        Chain(mode),
        ("convs.2.weight", (slice(None), 1)),  # nothing reads channel 1 of the second, so
        ("convs.1.weight", ([0, 2, 3], 2)),  # channel 2 of the first is read in vain
        ("convs.0.weight", 3),  # channel 3 is constant by its empty filter, and so is
        ("convs.1.weight", (0, slice(0, 3))),  # channel 0 of the second that reads nothing else
    )
    assert live == {"convs.0": [0, 1], "convs.1": [2, 3], "convs.2": ALL, "head": [0, 1]}
    weights = left.weights[values["convs.2"]]
    assert weights.sum() == 4 * 2 * 9 and not weights[:, [0, 1]].any()


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "zeros"])
def test_a_masked_gamma_makes_a_constant(mode, beta):
    """With β ≠ 0 zero padding makes a border of it, which the next normalisation does not remove."""
    masked = [("norms.0.weight", 1), *([] if beta else [("norms.0.bias", 1)])]
    live, left, values = compacted(Chain(mode), *masked)
    stays = beta and mode == "zeros"
    assert live["convs.0"] == (ALL if stays else [0, 2, 3])
    assert left.weights[values["convs.1"]][:, 1].any() == stays


def test_an_empty_filter_in_front_of_zero_padding_keeps_what_makes_a_border():
    empty = ("convs.0.weight", 2)
    assert compacted(Chain("zeros"), empty)[0]["convs.0"] == ALL
    assert compacted(Chain("zeros"), empty, ("norms.0.bias", 2))[0]["convs.0"] == [0, 1, 3]
    assert compacted(Chain("reflect"), empty)[0]["convs.0"] == [0, 1, 3]
    # Without a normalisation it is the bias that makes the border.
    assert compacted(Chain("zeros", norm=False), empty)[0]["convs.0"] == ALL
    assert compacted(Chain("zeros", norm=False), empty, ("convs.0.bias", 2))[0]["convs.0"] == [0, 1, 3]


@pytest.mark.parametrize("beta", [True, False])
def test_a_constant_in_front_of_a_head_without_a_normalisation_counts(beta):
    masked = [("norms.2.weight", 0), *([] if beta else [("norms.2.bias", 0)])]
    _, left, values = compacted(Chain("reflect"), *masked)
    assert left.weights[values["head"]][:, 0].all() == beta


def test_a_bias_in_front_of_a_normalisation_has_no_effect():
    _, left, values = compacted(Chain("reflect"))
    assert [int(left.biases[values[name]].sum()) for name in ("convs.0", "convs.1", "convs.2", "head")] == [0, 0, 0, 2]
    _, left, values = compacted(Chain("reflect", norm=False))
    assert [int(left.biases[values[name]].sum()) for name in ("convs.0", "convs.1", "convs.2", "head")] == [4, 4, 4, 2]


def test_a_whole_layer_of_zeros_cuts_the_network():
    live, left, values = compacted(Chain("reflect"), ("convs.1.weight", slice(None)))
    kept = {name: int(left.weights[value].sum()) for name, value in values.items() if value in left.weights}
    # What follows is constants of β alone; one empty channel says the size.
    assert kept == {"convs.0": 0, "convs.1": 0, "convs.2": 0, "head": 8}
    assert live == {"convs.0": [0], "convs.1": [0], "convs.2": ALL, "head": [0, 1]}


def test_masks_that_differ_are_compacted_one_by_one():
    net = Chain("reflect")
    assert_equals_masked(net, scattered_mask(net, 0.2, experiments=3), torch.rand(3, 3, 12, 14), 3)
