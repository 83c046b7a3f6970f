"""`analyse`: what a mask leaves of a network, by hand and on the published masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from problems import SIZE, random_mask, small_net
from torch import nn

import sparse_gen as sg
from sparse_gen.engine import analyse


def test_by_hand():
    """8 × 10 pixels: a pooled convolution, an up-sampled one and a head; channel 1 of the first is not read."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4),
        nn.Conv2d(4, 1, 1),
    )  # fmt: skip
    keep = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    keep["5.weight"][:, 1] = False
    keep["0.weight"][0, 0] = False
    first, second, head = analyse(net, sg.Mask(keep), torch.rand(1, 2, 8, 10))
    assert (first.name, first.live_inputs, first.inputs, first.live_outputs, first.outputs) == ("0", 2, 2, 2, 3)
    assert (first.reaching, first.kept, first.weights) == (9 + 18, 9 + 36, 54)
    assert first.dense_flops == 2 * 54 * 80
    assert (first.compact_flops, first.sparse_flops) == (2 * 2 * 2 * 9 * 20, 2 * 27 * 20)
    assert (second.live_inputs, second.live_outputs) == (2, 4)
    assert second.dense_flops == 2 * 4 * 3 * 9 * 80
    assert second.compact_flops == second.sparse_flops == 2 * 4 * 2 * 9 * 20
    assert (head.reaching, head.dense_flops, head.sparse_flops) == (4, 2 * 4 * 80, 2 * 4 * 80)


def test_a_network_that_is_cut_computes_nothing_of_its_first_layers():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    keep = {"2.weight": torch.zeros(2, 3, 3, 3, dtype=torch.bool)}
    whole = {name: tuple(p.shape) for name, p in net.named_parameters() if name not in keep}
    stages = analyse(net, sg.Mask(keep, whole=whole), torch.rand(1, 2, 8, 10))
    assert [stage.reaching for stage in stages] == [0, 0]


def test_bad_arguments():
    net, z = small_net(), sg.noise_input(6, SIZE, seed=0)
    with pytest.raises(ValueError, match="expected a mask of one experiment, got 2"):
        analyse(net, random_mask(net, experiments=2), z)
    with pytest.raises(ValueError, match="mask of this network"):
        analyse(small_net(in_channels=7), random_mask(net), z)
    with pytest.raises(ValueError, match="evaluation mode"):
        analyse(small_net().eval(), random_mask(net), z)


# Live output channels of every convolution, and GFLOP at 512²: as written and, of the live channels, without folds.
PUBLISHED = {
    "baboon": ([9, 6, 12, 8, 18, 19, 49, 59, 69, 86, 93, 88, 83, 93, 90, 38, 25, 16, 3], 25.27, 10.04),
    "barbara": ([11, 6, 11, 13, 20, 24, 50, 69, 74, 101, 100, 85, 96, 84, 77, 37, 18, 15, 3], 25.27, 10.00),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_masks(name):
    """Dense 25.3 GFLOP, 7.4–10.0 after deletion, 2.0–2.6 of kept weights alone."""
    path = Path(__file__).parents[2] / "shared" / "data" / f"oes_mask_{name}.npz"
    if not path.exists():
        pytest.skip(f"the published masks are not part of the project, and {path.name} is not beside it")
    data = np.load(path)
    flat = torch.from_numpy(np.unpackbits(data["bits"])[: int(data["numel"])].astype(bool))
    net = sg.generators.Hourglass()
    pieces = flat.split([p.numel() for p in net.parameters()])
    mask = sg.Mask({n: k.view(p.shape) for (n, p), k in zip(net.named_parameters(), pieces, strict=True)})
    stages = analyse(net, mask, sg.noise_input(32, (512, 512), seed=0))
    live, dense, left = PUBLISHED[name]
    assert [stage.live_outputs for stage in stages] == live
    share = [s.live_inputs * s.live_outputs / (s.inputs * s.outputs) for s in stages]
    assert sum(s.dense_flops for s in stages) / 1e9 == pytest.approx(dense, abs=0.005)
    assert sum(s.dense_flops * f for s, f in zip(stages, share, strict=True)) / 1e9 == pytest.approx(left, abs=0.005)
    reaching = sum(s.reaching * s.dense_flops / s.weights for s in stages) / 1e9
    assert 2.0 <= reaching <= 2.65
