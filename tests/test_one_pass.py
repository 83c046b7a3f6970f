"""Several experiments in one pass, as on a GPU, are each of them alone; here the CPU runs that pass."""

from importlib import import_module

import pytest
import torch
from equality import assert_equals_masked, scattered_mask
from problems import SIZE, problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.engine.run import in_one_pass
from sparse_gen.ops.extension import status

pytestmark = pytest.mark.skipif(not status().available, reason="no compiled library: nothing runs in stages")
SEEDS = [5, 6, 7]


@pytest.fixture
def one_pass(monkeypatch):
    monkeypatch.setattr(import_module("sparse_gen.engine.compile"), "in_one_pass", lambda *_: True)


def test_only_a_gpu_takes_several_masks_in_one_pass():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert in_one_pass(gpu, 1) and in_one_pass(gpu, 3) and in_one_pass(cpu, 1) and not in_one_pass(cpu, 3)


@pytest.mark.parametrize("density", [0.1, 0.8])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_mask_of_all_leaves_each_the_bits_it_has_alone(density, upsample, threads):
    nets = [small_net(seed=seed, upsample=upsample, skip_channels=2) for seed in range(3)]
    mask, z = scattered_mask(nets[0], density), sg.noise_input(6, (67, 90), seed=SEEDS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = sg.compile(sg.stack(nets), mask, z, weights="net", plan="rule")
        output = fast(z)
        output.square().sum().backward()
        for e, net in enumerate(nets):
            single = sg.compile(net, mask, z[e : e + 1], weights="net", plan="rule")
            own = single(z[e : e + 1])
            own.square().sum().backward()
            assert torch.equal(output[e], own[0])
            assert torch.equal(fast.values.grad[e], single.values.grad[0])
    finally:
        torch.set_num_threads(before)


def masks_of(densities, net):
    masks = [scattered_mask(net, density, seed) for seed, density in enumerate(densities)]
    tensors = {name: torch.stack([mask.tensors[name] for mask in masks]) for name in masks[0].tensors}
    return sg.Mask(tensors, experiments=len(masks)), masks


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("z_seeds", [SEEDS, 5])
def test_masks_of_several_densities_in_one_stack(request, together, upsample, z_seeds):
    """Down to one that keeps nothing of most layers."""
    if together:
        request.getfixturevalue("one_pass")
    net = small_net(upsample=upsample, skip_channels=2)
    mask, _ = masks_of([0.5, 0.02, 0.9], net)
    z = sg.noise_input(6, SIZE, seed=z_seeds)
    if len(z) == 3:
        fast = assert_equals_masked(net, mask, z, 3)
        assert len(fast._sparse_run.programs) == (1 if together else 3)
        return
    fast = sg.compile(net.double(), mask, z.double())  # the gradient of a shared z is the sum of all
    own, shared = z.double().expand(3, -1, -1, -1).clone().requires_grad_(), z.double().requires_grad_()
    torch.testing.assert_close(fast(shared), fast(own), rtol=1e-12, atol=1e-12)
    fast(shared).square().sum().backward()
    fast(own).square().sum().backward()
    torch.testing.assert_close(shared.grad, own.grad.sum(dim=0, keepdim=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared_mask", [True, False])
def test_a_fit_of_several_is_several_fits(one_pass, shared_mask):
    """One hundred steps in double, with all that goes on an experiment's own numbers."""
    nets = [small_net(seed=seed).double() for seed in range(3)]
    mask, masks = masks_of([0.4, 0.1, 0.7], nets[0])
    z = sg.noise_input(6, SIZE, seed=SEEDS).double()
    y = torch.cat([problem(seed)[1] for seed in range(3)]).double()
    y[1] = y[1].flip(1)
    options = {"steps": 100, "every": 9, "langevin": 0.5, "input_jitter": 0.03, "lr": 1e-3}
    fast = sg.compile(sg.stack(nets), masks[0] if shared_mask else mask, z, plan="rule")
    run = sg.fit(fast, z, y, seed=SEEDS, clean=y, **options)
    for e, net in enumerate(nets):
        own = slice(e, e + 1)
        single = sg.compile(net, masks[0 if shared_mask else e], z[own], plan="rule")
        alone = sg.fit(single, z[own], y[own], seed=SEEDS[e], clean=y[own], **options)
        torch.testing.assert_close(run.history["psnr"][:, e], alone.history["psnr"][:, 0], rtol=0, atol=1e-6)
        kept = single.values.shape[1]
        torch.testing.assert_close(fast.values[e, :kept], single.values[0], rtol=0, atol=1e-8)
        assert not fast.values[e, kept:].any()
        torch.testing.assert_close(fast.to_dense()[e](z[own]), single.to_dense()(z[own]), rtol=0, atol=1e-7)


def test_a_search_of_several_is_several_searches(one_pass):
    nets = [small_net(seed=seed).double() for seed in range(3)]
    z = sg.noise_input(6, SIZE, seed=SEEDS).double()
    y = problem()[1].double()
    densities, options = [0.2, 0.3, 0.2], {"steps": 30, "every": 1, "plan": "rule"}
    found = sg.search_mask(sg.stack(nets), z, y, seed=SEEDS, density=densities, **options)
    for e, net in enumerate(nets):
        alone = sg.search_mask(net, z[e : e + 1], y, seed=SEEDS[e], density=densities[e], **options)
        torch.testing.assert_close(found.history["loss"][:, e], alone.history["loss"][:, 0], rtol=1e-9, atol=0)
        for name, logits in alone.logits.items():
            torch.testing.assert_close(found.logits[name][e], logits, rtol=0, atol=1e-7)


def test_a_pass_of_several_masks_is_profiled_and_counted(one_pass):
    net = small_net()
    fast = sg.compile(net, masks_of([0.5, 0.1], net)[0], sg.noise_input(6, SIZE, seed=[0, 1]), plan="rule")
    assert all(stage.ms is not None for stage in fast.profile(rounds=1).stages if stage.live_kept)
    assert fast.count().kernels > 0


def test_a_pass_of_one_mask_is_profiled_with_the_experiments_that_it_is_planned_for(monkeypatch):
    net, z = small_net(), sg.noise_input(6, SIZE, seed=SEEDS)
    fast = sg.compile(net, random_mask(net, 0.5), z, plan="rule")
    (program,) = fast._sparse_run.programs
    seen = []

    def profile(plan, program, values, z, rounds):
        seen.append((len(values), len(z)))

    monkeypatch.setattr(import_module("sparse_gen.engine.compile"), "profile", profile)
    for together in (1, 3):
        monkeypatch.setattr(program, "together", together)
        fast.profile()
    assert seen == [(1, 1), (3, 3)]
