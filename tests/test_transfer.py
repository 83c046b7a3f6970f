"""A mask moved to other weights, sizes and widths."""

import pytest
import torch
from problems import problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.masks.transfer import tiled


@pytest.fixture(scope="module")
def found():
    z, y, _ = problem()
    recipe = {"z": {"channels": 6, "scale": 0.1, "seed": 0}, "noise": {"sigma": 0.1, "seed": 0}, "image_sha256": "a"}
    return sg.masks.find("snip", small_net(), z, y, density=0.3, recipe=recipe).mask


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kept_weights_are_those_of_the_mask_whatever_the_network(found):
    moved = sg.masks.transfer(found, small_net(seed=7), weights="keep", recipe={"image_sha256": "b"})
    assert same_tensors(moved.tensors, found.tensors)
    assert same_tensors(moved.weights, found.weights)
    assert moved.recipe["net"]["arguments"]["seed"] == 0
    assert moved.recipe["image_sha256"] == "b"
    source = {name: found.recipe[name] for name in ("net", "z", "noise", "image_sha256")}
    assert moved.recipe["transfer"] == {"weights": "keep", "width": "same", "from": source}
    assert moved.recipe["search"] == found.recipe["search"]


def test_fresh_weights_are_those_of_the_network(found):
    net, (z, y, _) = small_net(seed=7), problem()
    moved = sg.masks.transfer(found, net, weights="reinitialise")
    assert same_tensors(moved.tensors, found.tensors)
    for name, parameter in net.named_parameters():
        kept = parameter[moved.tensors[name]] if name in moved.tensors else parameter.flatten()
        assert torch.equal(moved.weights[name], kept.detach())
    assert moved.recipe["net"]["arguments"]["seed"] == 7
    assert moved.recipe["transfer"]["from"]["net"]["arguments"]["seed"] == 0
    sg.fit(sg.compile(net, moved, z), z, y, steps=1)  # the engine takes it without being told whose weights


def test_moved_again_it_remembers_every_place(found, tmp_path):
    once = sg.masks.transfer(found, small_net(7), weights="reinitialise", recipe={"image_sha256": "b"})
    twice = sg.masks.transfer(once, small_net(8), weights="reinitialise", recipe={"image_sha256": "c"})
    twice.save(tmp_path / "m")
    source = sg.Mask.load(tmp_path / "m").recipe["transfer"]["from"]
    assert (source["image_sha256"], source["transfer"]["from"]["image_sha256"]) == ("b", "a")


def test_another_size_needs_nothing(found):
    net, z = small_net(), sg.noise_input(6, (41, 24), seed=3)
    moved = sg.masks.transfer(found, net, weights="keep", z=z)
    assert sg.compile(net, moved, z)(z).shape == (1, 3, 41, 24)


def test_tiling_repeats_and_cuts_channels():
    keep = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    wider = tiled(keep, (7, 3, 5, 5))
    for o in range(7):
        for i in range(3):
            assert torch.equal(wider[o, i], keep[o % 3, i % 2])
    assert torch.equal(tiled(keep, (2, 1, 5, 5)), keep[:2, :1])
    assert torch.equal(tiled(keep[None], (7, 3, 5, 5), True)[0], wider)


@pytest.mark.parametrize("channels", [(12, 16, 20), (9, 8, 11), (4, 5, 6)])
def test_another_width(found, channels):
    net, z = small_net(seed=2, channels=channels), problem()[0]
    moved = sg.masks.transfer(found, net, weights="reinitialise", width="tile", z=z)
    moved.check_fits(net)
    assert moved.total == sum(p.numel() for p in net.parameters())
    assert moved.recipe["transfer"]["width"] == "tile"
    if channels == (12, 16, 20):  # twice the channels: every layer has the density it had
        before = {layer.name: layer.kept / layer.total for layer in found.layers()}
        for layer in moved.layers():
            if layer.name != "encoder.0.conv1.1.weight" and layer.name != "head.weight":
                assert layer.kept / layer.total == before[layer.name]
    sg.compile(net, moved, z)


def test_experiments_and_stacks_move_too():
    nets, z = [small_net(3), small_net(4)], problem()[0]
    mask = random_mask(small_net(), experiments=2)
    moved = sg.masks.transfer(mask, sg.stack(nets), weights="reinitialise", z=z)
    fast = sg.compile(sg.stack(nets), moved, z)
    for e, net in enumerate(nets):
        alone = sg.Mask({name: keep[e] for name, keep in mask.tensors.items()}, whole=mask.whole)
        torch.testing.assert_close(fast(z)[e : e + 1], sg.compile(net, alone, z)(z), rtol=1e-5, atol=1e-6)
    one = sg.masks.transfer(mask, nets[0], weights="reinitialise")
    assert one.weights["head.bias"].tolist() == 2 * nets[0].head.bias.tolist()


def test_a_moved_mask_that_cuts_the_network_is_told(found):
    cut = sg.Mask({**found.tensors, "head.weight": torch.zeros(3, 6, 1, 1, dtype=torch.bool)}, whole=found.whole)
    with pytest.warns(sg.DisconnectedMaskWarning, match="the moved mask disconnects the network at head"):
        sg.masks.transfer(cut, small_net(), weights="reinitialise", z=problem()[0])


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        ({}, {"weights": "both"}, "expected weights as one of keep, reinitialise, got 'both'"),
        ({}, {"weights": "keep", "width": "any"}, "expected width as one of same, tile, got 'any'"),
        ({"channels": (6, 8, 12)}, {"weights": "reinitialise"},
         r"encoder.2.conv1.1.weight is \(12, 8, 5, 5\), got \(10, 8, 5, 5\), use width='tile'"),
        ({"channels": (6, 8, 12)}, {"weights": "keep", "width": "tile"}, "the initialisation depends on the width"),
        ({"channels": (6, 8)}, {"weights": "reinitialise", "width": "tile"},
         r"got encoder.2.conv1.1.weight \(10, 8, 5, 5\), which the network lacks"),
        ({"channels": (6, 8, 10, 10)}, {"weights": "reinitialise"}, "which the mask lacks"),
        ({"down_kernel": 3}, {"weights": "reinitialise", "width": "tile"}, "expected a mask of the same kernels"),
    ],
)  # fmt: skip
def test_what_does_not_move(found, net, arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.masks.transfer(found, small_net(**net), **arguments)


def test_a_mask_without_weights_cannot_keep_them():
    with pytest.raises(ValueError, match="expected a mask that holds its weights"):
        sg.masks.transfer(random_mask(small_net()), small_net(), weights="keep")
    with pytest.raises(TypeError, match="weights"):
        sg.masks.transfer(random_mask(small_net()), small_net())
