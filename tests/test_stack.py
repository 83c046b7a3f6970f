"""`stack`: several initialisations in one run are several runs."""

import pytest
import torch
from problems import SIZE, problem, small_net

import sparse_gen as sg


def test_search_compile_and_fit_equal_separate_runs():
    nets = [small_net(seed=3), small_net(seed=4)]
    _, y, clean = problem()
    z = sg.noise_input(6, SIZE, seed=[5, 6])
    search = {"density": 0.2, "steps": 4, "every": 1}
    fit = {"steps": 12, "every": 1, "clean": clean, "input_jitter": 0.03, "langevin": 0.5}
    together = sg.search_mask(sg.stack(nets), z, y, seed=[7, 8], **search)
    fast = sg.compile(sg.stack(nets), together.mask, z)
    run = sg.fit(fast, z, y, seed=[9, 10], **fit)
    dense = fast.to_dense()
    for e in range(2):
        own = z[e : e + 1]
        alone = sg.search_mask(nets[e], own, y, seed=7 + e, **search)
        single = sg.compile(nets[e], alone.mask, own)
        assert torch.equal(together.history["loss"][:, e],
                           alone.history["loss"][:, 0])  # fmt: skip
        for name, keep in alone.mask.tensors.items():
            assert torch.equal(together.mask.tensors[name][e], keep)
        own_run = sg.fit(single, own, y, seed=9 + e, **fit)
        assert torch.equal(run.image[e : e + 1], own_run.image)
        assert torch.equal(run.history["psnr"][:, e], own_run.history["psnr"][:, 0])
        torch.testing.assert_close(dense[e](own), own_run.module.to_dense()(own))


def test_masked_output_of_a_stack():
    nets, (z, y, _) = [small_net(seed=0), small_net(seed=1)], problem()
    found = sg.search_mask(sg.stack(nets), z, y, density=0.2, steps=2)
    image = sg.masked_output(sg.stack(nets), z, found.mask)
    assert image.shape[0] == 2
    assert not torch.equal(image[0], image[1])


def test_a_stored_mask_of_a_stack_knows_its_networks(tmp_path):
    nets, (z, y, _) = [small_net(seed=0), small_net(seed=1)], problem()
    found = sg.search_mask(sg.stack(nets), z, y, density=0.2, steps=2)
    found.mask.save(tmp_path / "m.safetensors")
    mask = sg.Mask.load(tmp_path / "m.safetensors")
    rebuilt = sg.stack([sg.generators.build(recipe) for recipe in mask.recipe["net"]])
    assert torch.equal(sg.compile(rebuilt, mask, z)(z), sg.compile(sg.stack(nets), found.mask, z)(z))


def test_a_stack_is_its_networks():
    nets, z = [small_net(seed=0), small_net(seed=1)], sg.noise_input(6, SIZE, seed=[0, 1])
    output = sg.stack(nets)(z)
    for e in range(2):
        assert torch.equal(output[e : e + 1], nets[e](z[e : e + 1]))
    assert torch.equal(sg.stack(nets)(z[:1])[1:], nets[1](z[:1]))


def test_refusals():
    z, y, _ = problem()
    with pytest.raises(ValueError, match="at least one network, got none"):
        sg.stack([])
    with pytest.raises(
        ValueError, match=r"got encoder.0.conv1.1.weight of \(6, 5, 5, 5\) in network 1 for \(6, 6, 5, 5\)"
    ):
        sg.stack([small_net(), small_net(in_channels=5)])
    with pytest.raises(ValueError, match="expected networks of one architecture"):
        sg.stack([small_net(), small_net(channels=(6, 8, 10, 12))])
    nets = [small_net(seed=s) for s in range(2)]
    with pytest.raises(ValueError, match=r"expected 3 experiments \(or 1\) in net, got 2"):
        sg.search_mask(sg.stack(nets), sg.noise_input(6, SIZE, seed=[0, 1, 2]), y, density=0.2, steps=1)
    with pytest.raises(ValueError, match="a stack of 3 experiments"):
        sg.compile(sg.stack(nets), None, sg.noise_input(6, SIZE, seed=[0, 1, 2]))
    with pytest.raises(ValueError, match="z with 2 experiments"):
        sg.stack(nets)(torch.cat([z] * 3))
