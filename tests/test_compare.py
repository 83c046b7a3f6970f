"""How alike masks are: counts by hand, and chance by drawing."""

import math

import pytest
import torch
from problems import random_mask, small_net

import sparse_gen as sg


def mask(bits):
    return sg.Mask({"a": torch.as_tensor(bits, dtype=torch.bool)})


def test_counts_by_hand():
    found = sg.masks.compare(mask([1, 1, 1, 0, 0, 0, 0, 0]), mask([1, 0, 1, 1, 1, 0, 0, 0]))
    (layer,) = found.layers
    assert (layer.name, layer.total, layer.first, layer.second, layer.both) == ("a", 8, 3, 4, 2)
    assert layer.overlap == 2 / 3
    assert layer.jaccard == 2 / 5
    assert layer.chance == 3 * 4 / 8
    assert layer.chance_jaccard == 1.5 / (7 - 1.5)
    assert (found.total.both, found.anywhere, found.whole) == (2, 1.5, [])


def test_chance_is_what_drawing_gives():
    """Mean and deviation of the overlap of 20,000 pairs of random masks of 12 and 9 of 30."""
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    ranks = torch.rand(2, draws, 30, generator=generator).argsort(dim=2)
    both = ((ranks[0] < 12) & (ranks[1] < 9)).sum(dim=1).double()
    layer = sg.masks.compare(mask(ranks[0, 0] < 12), mask(ranks[1, 0] < 9)).layers[0]
    # Five standard errors: one run in 2 million would miss.
    assert both.mean().item() == pytest.approx(layer.chance, abs=5 * layer.deviation / math.sqrt(draws))
    assert both.std().item() == pytest.approx(layer.deviation, rel=5 / math.sqrt(2 * draws))


def test_what_leaves_no_choice_has_no_sigmas():
    found = sg.masks.compare(mask([1, 1]), mask([1, 0]))
    assert math.isnan(found.layers[0].sigmas)
    nothing = sg.masks.compare(mask([0, 0]), mask([0, 0])).layers[0]
    assert math.isnan(nothing.jaccard) and math.isnan(nothing.overlap)


def test_two_chances_differ_where_layer_densities_agree():
    bits = torch.tensor([True] * 9 + [False])
    dense, sparse = bits, ~bits
    first, second = (sg.Mask({"a": a, "b": b}) for a, b in [(dense, sparse), (dense.flip(0), sparse.flip(0))])
    found = sg.masks.compare(first, second)
    assert found.total.chance == pytest.approx(8.1 + 0.1)
    assert found.anywhere == pytest.approx(10 * 10 / 20)
    assert found.total.both == 8


def test_whole_parameters_are_left_out_only_if_both_keep_them_whole():
    net = small_net()
    found = sg.masks.compare(random_mask(net, 0.3, seed=0), random_mask(net, 0.3, seed=1))
    assert len(found.layers) + len(found.whole) == len(list(net.parameters()))
    assert abs(found.total.sigmas) < 5
    pruned = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    pruned["head.bias"][0] = False
    everything = sg.masks.compare(random_mask(net, 0.3), sg.Mask(pruned))
    assert everything.whole == []
    bias = next(layer for layer in everything.layers if layer.name == "head.bias")
    assert (bias.first, bias.second, bias.both) == (3, 2, 2)


def test_experiments_are_added_up():
    net = small_net()
    several, one = random_mask(net, 0.3, experiments=2), random_mask(net, 0.3, seed=4)
    found = sg.masks.compare(several, one)
    for layer in found.layers:
        alone = [
            sg.masks.compare(sg.Mask({layer.name: several.tensors[layer.name][e]}),
                             sg.Mask({layer.name: one.tensors[layer.name]})).layers[0]
            for e in range(2)
        ]  # fmt: skip
        assert layer.both == sum(a.both for a in alone)
        assert layer.chance == pytest.approx(sum(a.chance for a in alone))
        assert layer.deviation == pytest.approx(math.sqrt(sum(a.deviation**2 for a in alone)))


def test_other_networks_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"encoder.0.conv1.1.weight of \(6, 6, 5, 5\) in one and \(6, 5, 5, 5\)"):
        sg.masks.compare(random_mask(small_net()), random_mask(small_net(in_channels=5)))
    with pytest.raises(ValueError, match=r"as many experiments in both masks \(or 1\), got 2 and 3"):
        sg.masks.compare(random_mask(small_net(), experiments=2), random_mask(small_net(), experiments=3))
