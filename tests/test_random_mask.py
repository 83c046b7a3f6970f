"""A random mask keeps exactly as many weights as a search does, anywhere with equal chance."""

import pytest
import torch
from problems import small_net

from sparse_gen.masks.random import random_mask


@pytest.mark.parametrize("prunable", ["conv_weights", "all"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_the_density_is_met_to_a_weight(prunable, density):
    net = small_net()
    total = sum(p.numel() for p in net.parameters())
    mask = random_mask(net, density, prunable=prunable, seed=1)
    assert (mask.kept, mask.total) == (int(density * total), total)
    assert (mask.whole == {}) == (prunable == "all")
    mask.check_fits(net)


def test_every_weight_has_the_same_chance():
    net = small_net(channels=(3, 4))
    masks = [random_mask(net, 0.5, prunable="all", seed=seed) for seed in range(400)]
    share = torch.stack([torch.cat([t.flatten() for t in m.tensors.values()]) for m in masks]).double().mean(0)
    # Binomial with 400 draws of 1/2: a deviation of 0.025, and 5.5 of them are exceeded once in 2.6e7 weights.
    assert (share - 0.5).abs().max() < 5.5 * 0.025


def test_a_seed_is_a_mask_and_a_sparser_one_is_part_of_a_denser():
    net = small_net()
    sparse, dense = random_mask(net, 0.2, seed=3), random_mask(net, 0.4, seed=3)
    assert all(torch.equal(sparse.tensors[n], t) for n, t in random_mask(net, 0.2, seed=3).tensors.items())
    assert any(not torch.equal(sparse.tensors[n], t) for n, t in random_mask(net, 0.2, seed=4).tensors.items())
    assert all((sparse.tensors[name] <= dense.tensors[name]).all() for name in dense.tensors)


def test_too_small_a_density_is_refused():
    with pytest.raises(ValueError, match="expected a density above"):
        random_mask(small_net(), 1e-4)
