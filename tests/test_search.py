"""`search_mask`: what it learns, keeps, finds disconnected and refuses."""

from copy import deepcopy
from math import floor

import pytest
import torch
from problems import SIZE, problem, small_net

import sparse_gen as sg
from sparse_gen.masks.connectivity import probe_connectivity
from sparse_gen.ops.extension import status


def search(net=None, seed=0, **arguments):
    z, y, _ = problem()
    return sg.search_mask(net or small_net(), z, y, seed=seed, **{"density": 0.2, "steps": 4, **arguments})


# A few steps that may prune normalisation often cut the network; what is tested is something else.
may_disconnect = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


def same_masks(a, b):
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_it_learns():
    z, _, clean = problem()
    net = small_net()
    result = search(net, steps=150)
    loss = result.history["loss"]
    assert loss[-3:].mean() < 0.8 * loss[:3].mean()
    masked = sg.fitting.psnr(sg.masked_output(net, z, result.mask), clean)
    unmasked = sg.fitting.psnr(net(z).detach(), clean)
    assert masked > unmasked + 1


@may_disconnect
@pytest.mark.parametrize("density", [0.11, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("prunable", ["conv_weights", "all"])
def test_it_keeps_exactly_the_density_over_all_parameters(density, prunable):
    net = small_net()
    mask = search(net, density=density, prunable=prunable, steps=2).mask
    total = sum(p.numel() for p in net.parameters())
    assert mask.total == total
    assert mask.kept == floor(density * total)


def test_it_leaves_the_network_untouched():
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    search(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_the_seed_decides():
    assert same_masks(search(seed=1).mask, search(seed=1).mask)
    assert not same_masks(search(seed=1).mask, search(seed=2).mask)


def test_several_experiments_are_several_runs():
    net, (_, y, _) = small_net(), problem()
    z = sg.noise_input(6, SIZE, seed=[3, 4])
    together = sg.search_mask(net, z, y, density=0.2, steps=4, seed=[5, 6])
    assert together.mask.experiments == 2
    for e in range(2):
        alone = sg.search_mask(net, z[e : e + 1], y, density=0.2, steps=4, seed=5 + e)
        for name, keep in alone.mask.tensors.items():
            assert torch.equal(together.mask.tensors[name][e], keep)
            assert torch.equal(together.logits[name][e], alone.logits[name])
        assert torch.equal(together.history["loss"][:, e], alone.history["loss"][:, 0])


@pytest.mark.parametrize("group", [None, "4x1"])
@pytest.mark.parametrize("stop", [None, sg.stop.Settled(3, 0.2)])
@may_disconnect
def test_each_experiment_may_have_a_density_of_its_own(group, stop):
    """Also two that follow each other with the same one, and one at which there is nothing to choose."""
    densities = [0.2, 0.5, 0.5, 0.2, 1.0]
    (z, y, _), options = problem(), {"steps": 12, "every": 1, "group": group, "kl_weight": 1e-3, "lr": 0.1}
    together = sg.search_mask(small_net(), z, y, density=densities, seed=range(5), stop=deepcopy(stop), **options)
    assert together.settings["density"] == together.mask.recipe["search"]["density"] == densities
    assert together.settings["prior"] == [*densities[:4], 1 - 1e-6]
    for e, density in enumerate(densities):
        alone = sg.search_mask(small_net(), z, y, density=density, seed=e, stop=deepcopy(stop), **options)
        for name, keep in alone.mask.tensors.items():
            assert torch.equal(together.mask.tensors[name][e], keep)
            assert torch.equal(together.logits[name][e], alone.logits[name])
        for column in alone.history.columns:
            known = len(alone.history[column])  # together they go on until the last has settled
            torch.testing.assert_close(
                together.history[column][:known, e], alone.history[column][:, 0], rtol=1e-6 * (column == "kl"), atol=0
            )
        if stop is not None:
            assert together.settled_at[e] == alone.settled_at
    if stop is not None:
        assert len(set(together.settled_at)) > 1


def test_masks_of_several_densities_are_stored_with_their_weights_and_trained():
    net, (z, y, _) = small_net(), problem()
    mask = sg.search_mask(net, z, y, density=[0.2, 0.5], steps=2).mask
    for e, density in enumerate([0.2, 0.5]):
        kept = sum(int(keep[e].sum()) for keep in mask.dense(net).values())
        assert kept == floor(density * mask.total)
    both = sg.compile(net, mask, sg.noise_input(6, SIZE, seed=[0, 0]), plan="rule")
    for e, density in enumerate([0.2, 0.5]):
        alone = sg.compile(net, sg.search_mask(net, z, y, density=density, steps=2).mask, z, plan="rule")
        assert torch.equal(both.values[e, : alone.values.shape[1]], alone.values[0])


def test_equal_densities_are_one():
    one, two = (search(density=density, seed=[0, 1]) for density in (0.2, [0.2, 0.2]))
    assert one.settings == two.settings
    assert same_masks(one.mask, two.mask)


@pytest.mark.parametrize("prunable", ["conv_weights", "all", ["head.weight", "decoder.0.conv.1.weight"]])
@may_disconnect
@pytest.mark.parametrize("arguments", [{}, {"skip_channels": 2, "upsample": "bilinear"}])
def test_the_engine_searches_as_plain_pytorch_does(prunable, arguments):
    z, y, _ = (tensor.double() for tensor in problem())
    net = small_net(**arguments).double()
    density = 0.95 if isinstance(prunable, list) else 0.2
    ours, reference = (
        sg.search_mask(net, z, y, density=density, steps=10, every=1, prunable=prunable, lr=0.05, engine=engine)
        for engine in ("auto", "reference")
    )
    # Of a convolution's bias in front of a normalisation the gradient is rounding, of which Adam makes whole steps.
    no_bias = [name for name in ours.logits if not name.endswith("bias") or name == "head.bias"]
    for name in no_bias:
        torch.testing.assert_close(ours.logits[name], reference.logits[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.history["loss"], reference.history["loss"], rtol=1e-12, atol=0)
    assert {stage.kernel for stage in reference.plan.stages} == {"PyTorch"}
    if status().available:
        assert "PyTorch" not in {stage.kernel for stage in ours.plan.stages}


@pytest.mark.skipif(not status().available, reason="no compiled library, so that there is one plan only")
def test_a_search_takes_a_plan_and_gives_it_back(tmp_path):
    chosen = search(plan="rule").plan.replace({"decoder.0.conv.1": "taps"})
    chosen.save(tmp_path / "plan.json")
    first, again = search(plan=chosen), search(plan=tmp_path / "plan.json")
    assert first.plan.layouts == again.plan.layouts == chosen.layouts
    assert torch.equal(first.history["loss"], again.history["loss"])
    with pytest.raises(ValueError, match="expected one of this network, mask and size"):
        search(small_net(channels=(4, 6)), plan=chosen)
    with pytest.raises(ValueError, match="which has plan = "):
        for plan in ("rule", chosen):
            search(plan=plan, checkpoints=sg.Checkpoints(tmp_path, resume=True))


def test_prunable_names_and_functions():
    head = search(prunable=["head.weight"], density=0.9995).mask
    assert list(head.tensors) == ["head.weight"]
    encoder = search(prunable=lambda name, p: name.startswith("encoder") and p.ndim == 4, density=0.6).mask
    assert all(name.startswith("encoder") for name in encoder.tensors)
    assert "decoder.0.norm1.weight" in encoder.whole


@may_disconnect
def test_paper_preset_has_the_papers_constants():
    settings = search(preset="paper", steps=1).settings
    assert settings["lr"] == 1e-2
    assert settings["kl_weight"] == 1e-9
    assert settings["prunable"] == "all"
    assert settings["prior"] == 0.2
    assert settings["temperature"] == 0.2
    assert sg.masks.search.PRESETS["paper"]["steps"] == 60_000


@may_disconnect
def test_lean_preset_prunes_normalisation_in_2000_steps():
    found = search(preset="lean", steps=3)
    same = search(lr=0.1, kl_weight=6e-9, prunable="all", steps=3)
    assert found.logits.keys() == same.logits.keys()
    assert all(torch.equal(found.logits[name], same.logits[name]) for name in found.logits)
    assert "encoder.0.norm1.weight" in found.mask.tensors
    assert sg.masks.search.PRESETS["lean"]["steps"] == 2000


def test_a_strong_kl_pulls_every_probability_to_the_prior():
    logits = search(kl_weight=10.0, lr=0.2, steps=150, prior=0.1).logits
    p = torch.cat([logit.flatten() for logit in logits.values()]).sigmoid()
    assert p.mean().item() == pytest.approx(0.1, abs=0.01)


def test_sampled_masks_follow_the_probabilities():
    result = search(kl_weight=10.0, lr=0.2, steps=150, prior=0.1)
    masks = result.sample_masks(20, seed=3)
    pruned = torch.stack([torch.cat([k.flatten().float() for k in m.tensors.values()]) for m in masks])
    assert pruned.mean().item() == pytest.approx(0.1, abs=0.01)
    assert same_masks(masks[4], result.sample_masks(5, seed=3)[4])
    assert not same_masks(masks[0], masks[1])


def test_masked_output_averages_over_masks():
    net, (z, _, _) = small_net(), problem()
    masks = search(net).sample_masks(3)
    average = sg.masked_output(net, z, masks)
    single = torch.stack([sg.masked_output(net, z, mask) for mask in masks])
    torch.testing.assert_close(average, single.mean(dim=0))
    assert not torch.equal(single[0], single[1])


def test_progress_is_called_every_so_often_and_at_the_last_step():
    calls = []
    search(steps=8, every=3, progress=lambda step, total, values: calls.append((step, total, sorted(values))))
    assert calls == [(s, 8, ["kl", "loss"]) for s in (1, 4, 7, 8)]


# -- disconnection


def disconnected_network():
    net = small_net()
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    return net, parameters


@pytest.mark.parametrize(
    ("pruned", "layer"),
    [
        ("decoder.2.norm2.weight", "decoder.2.norm2"),
        ("decoder.0.conv.1.weight", "decoder.0.conv.1"),
        ("encoder.1.norm1.weight", "encoder.1.norm1"),
        ("head.weight", "head"),
    ],
)
def test_the_probe_names_the_layer_that_cuts(pruned, layer):
    net, parameters = disconnected_network()
    z = problem()[0]
    assert probe_connectivity(net, parameters, z).connected
    parameters[pruned] = torch.zeros_like(parameters[pruned])
    assert probe_connectivity(net, parameters, z).disconnected_at == layer


def test_a_weak_signal_is_not_a_cut():
    net, parameters = disconnected_network()
    parameters["encoder.1.conv1.1.weight"] = parameters["encoder.1.conv1.1.weight"] * 1e-4
    assert probe_connectivity(net, parameters, problem()[0]).connected


def test_a_living_skip_connection_keeps_the_network_connected():
    net = small_net(skip_channels=2)
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    parameters["encoder.2.norm2.weight"] = torch.zeros_like(parameters["encoder.2.norm2.weight"])
    assert probe_connectivity(net, parameters, problem()[0]).connected


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_the_rounding_of_a_constant_is_no_signal(upsample):
    net = small_net(upsample=upsample)
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    parameters["encoder.0.conv1.1.weight"] = torch.zeros_like(parameters["encoder.0.conv1.1.weight"])
    assert probe_connectivity(net, parameters, problem()[0]).disconnected_at == "encoder.0.conv1.1"


def test_a_border_made_by_zero_padding_is_no_signal():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(6, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 3, 3, padding=1)
    )
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    assert probe_connectivity(net, parameters, problem()[0]).connected
    parameters["1.weight"], parameters["1.bias"] = torch.zeros(1, 4), torch.ones(1, 4)
    assert probe_connectivity(net, parameters, problem()[0]).disconnected_at == "1"


def test_the_probe_looks_at_every_experiment():
    net, parameters = disconnected_network()
    both = {name: p.expand(2, *p.shape[1:]).clone() for name, p in parameters.items()}
    both["head.weight"][1] = 0
    assert probe_connectivity(net, both, problem()[0]).disconnected_at == "head"


def test_a_search_that_disconnects_warns_and_says_where():
    with pytest.warns(sg.DisconnectedMaskWarning, match="disconnects the network at "):
        result = search(prunable="all", density=0.003, steps=2)
    assert not result.connected
    assert result.disconnected_at in dict(small_net().named_modules())


# -- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.01}, "parameters are always kept"),
        ({"density": 2}, "density above 0 and at most 1"),
        ({"density": [0.2, 2]}, "density above 0 and at most 1, got 2"),
        ({"density": [0.2, 0.01]}, "parameters are always kept, got 0.01"),
        ({"density": []}, "got 0 densities for 1 experiments, give one$"),
        (
            {"density": [0.2, 0.3, 0.4], "seed": [1, 2]},
            "one an experiment, got 3 densities for 2 experiments, give one or 2",
        ),
        (
            {"density": [0.99, 0.9219], "prunable": ["encoder.0.conv1.1.weight"], "group": "filter"},
            "got one that allows 6 weights",
        ),
        ({"steps": 0}, "steps as an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps as an integer"),
        ({"every": 0}, "every as an integer"),
        ({"lr": -1.0}, "lr above 0"),
        ({"lr": float("nan")}, "lr above 0"),
        ({"temperature": 0}, "temperature above 0"),
        ({"prior": 1.5}, "prior strictly between 0 and 1"),
        ({"preset": "fast"}, "preset as one of quick, lean, paper, got 'fast'"),
        ({"prunable": "weights"}, "expected prunable as"),
        ({"prunable": ["head.wight"]}, "got 'head.wight'"),
        ({"prunable": []}, "at least one prunable"),
        ({"seed": [1, 2, 3]}, None),
        ({"seed": 0.5}, "expected a seed"),
    ],
)
def test_bad_arguments(change, message):
    if message is None:  # three seeds make three experiments of one z and y
        assert search(**change).mask.experiments == 3
        return
    with pytest.raises(ValueError, match=message):
        search(**change)


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.zeros(6, 27, 34), None, r"z of shape \(E, C, H, W\), got \(6, 27, 34\)"),
        (torch.zeros(1, 6, 27, 34, dtype=torch.int64), None, "z of float32"),
        (torch.full((1, 6, 27, 34), torch.nan), None, "finite numbers in z"),
        ("z", None, "z as a tensor, got str"),
        (None, torch.zeros(1, 5, 27, 34), "y with 1 to 4 channels, got 5"),
        (None, torch.zeros(1, 1, 27, 34), "network's output shape"),
        (None, torch.zeros(1, 3, 27, 33), "y and z of one size, got 27×33 and 27×34"),
        (None, torch.full((1, 3, 27, 34), 255.0), r"y in \[0, 1\], got values from 255 to 255"),
        (None, torch.full((1, 3, 27, 34), torch.inf), "finite numbers in y"),
        (None, torch.zeros(1, 3, 27, 34, dtype=torch.float64), "y of torch.float32 on cpu like z"),
        (torch.zeros(2, 6, 27, 34), torch.zeros(3, 3, 27, 34), "as many experiments in y as in z"),
    ],
)
def test_bad_tensors(z, y, message):
    good_z, good_y, _ = problem()
    with pytest.raises(ValueError, match=message):
        sg.search_mask(small_net(), good_z if z is None else z, good_y if y is None else y, density=0.2, steps=1)


def test_a_network_in_evaluation_mode_is_refused():
    with pytest.raises(ValueError, match=r"encoder.0.norm1 in evaluation mode, call .train\(\)"):
        search(small_net().eval())


def test_a_loss_that_is_not_finite_stops_with_the_step_named():
    net = small_net()
    with torch.no_grad():
        net.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at step 0"):
        search(net)
