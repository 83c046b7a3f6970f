"""`compile`: the masked network's outputs and gradients from the kept weights alone."""

from copy import deepcopy

import pytest
import torch
from problems import SIZE, problem, random_mask, small_net
from torch import nn

import sparse_gen as sg
from sparse_gen.ops.extension import status


def assert_same_gradient(got, expected):
    """To rounding of the largest: a γ before another normalisation has a gradient of 0, which neither side hits."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12 * expected.norm().item())


def masked(net, mask, experiment=0):
    """Dense masked PyTorch: the network with its pruned weights set to zero."""
    net = deepcopy(net).double()
    keep = mask.dense(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(keep[name][experiment])
    return net, keep


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("skip_channels", [0, 2])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_outputs_and_gradients_are_those_of_the_masked_network(upsample, skip_channels, density, engine):
    net = small_net(upsample=upsample, skip_channels=skip_channels)
    mask = random_mask(net, density)
    z = problem()[0].double()
    dense, keep = masked(net, mask)
    fast = sg.compile(net.double(), mask, z, engine=engine)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    output, expected = fast(ours), dense(theirs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    kept = torch.cat([p.grad[keep[name][0]] for name, p in dense.named_parameters()])
    assert_same_gradient(fast.values.grad[0], kept)


def test_parameters_are_the_kept_values_only():
    net = small_net()
    mask = random_mask(net, 0.1)
    fast = sg.compile(net, mask, problem()[0])
    assert [p.shape for p in fast.parameters()] == [(1, mask.kept)]
    assert list(fast.state_dict()) == ["values"]


def test_without_a_mask_everything_is_kept():
    net, (z, _, _) = small_net(), problem()
    fast = sg.compile(net, example_input=z)
    assert fast.values.numel() == sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(fast(z), net(z))


def test_experiments_are_separate_runs():
    net = small_net().double()
    mask = random_mask(net, 0.3, experiments=3)
    z = sg.noise_input(6, SIZE, seed=[0, 1, 2]).double()
    fast = sg.compile(net, mask, z)
    output = fast(z)
    output.square().sum().backward()
    for e in range(3):
        dense, keep = masked(net, mask, e)
        expected = dense(z[e : e + 1])
        torch.testing.assert_close(output[e : e + 1], expected, rtol=1e-12, atol=1e-12)
        expected.square().sum().backward()
        kept = torch.cat([p.grad[keep[name][e]] for name, p in dense.named_parameters()])
        assert_same_gradient(fast.values.grad[e], kept)
    mixed = net(z)
    assert (mixed - output).norm() / output.norm() > 1e-3  # a plain batch mixes its statistics: not the reference


def test_one_mask_serves_several_inputs_and_one_input_several_masks():
    net = small_net()
    z = sg.noise_input(6, SIZE, seed=[0, 1])
    assert sg.compile(net, random_mask(net), z)(z).shape[0] == 2
    assert sg.compile(net, random_mask(net, experiments=2), z[:1])(z[:1]).shape[0] == 2


def test_to_dense_is_the_original_module_with_trained_weights_and_its_own_statistics():
    net, (z, y, _) = small_net(), problem()
    mask = random_mask(net, 0.3)
    fast = sg.compile(net, mask, z)
    sg.fit(fast, z, y, steps=3)
    dense = fast.to_dense()
    assert type(dense) is type(net)
    torch.testing.assert_close(dense(z), fast(z))
    for name, parameter in dense.named_parameters():
        if name in mask.tensors:
            assert (parameter[~mask.tensors[name]] == 0).all()
    torch.testing.assert_close(fast.to_dense().eval()(z), fast(z), rtol=0.02, atol=0.02)
    assert not torch.equal(net.head.weight, dense.head.weight)


def test_to_dense_of_several_experiments_is_a_list():
    net, z = small_net(), sg.noise_input(6, SIZE, seed=[0, 1])
    fast = sg.compile(net, random_mask(net, experiments=2), z)
    modules = fast.to_dense()
    assert len(modules) == 2
    torch.testing.assert_close(modules[1](z[1:]), fast(z)[1:])


def test_the_network_is_left_untouched():
    net, (z, y, _) = small_net(), problem()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = sg.compile(net, random_mask(net), z)
    sg.fit(fast, z, y, steps=2)
    fast.to_dense()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_two_initialisations_are_never_mixed_silently():
    z, y, _ = problem()
    net, other = small_net(seed=0), small_net(seed=1)
    mask = sg.search_mask(net, z, y, density=0.2, steps=1).mask
    with pytest.raises(ValueError, match="say weights='mask' or weights='net'"):
        sg.compile(other, mask, z)
    same = sg.compile(net, mask, z)
    assert torch.equal(sg.compile(other, mask, z, weights="mask")(z), same(z))
    assert not torch.equal(sg.compile(other, mask, z, weights="net")(z), same(z))
    with pytest.raises(ValueError, match="expected weights='mask' or 'net', got 'both'"):
        sg.compile(other, mask, z, weights="both")
    with pytest.raises(ValueError, match="got one without"):
        sg.compile(net, random_mask(net), z, weights="mask")


def test_a_stored_mask_restores_the_network_it_was_found_on(tmp_path):
    z, y, _ = problem()
    net = small_net(seed=5)
    mask = sg.search_mask(net, z, y, density=0.2, steps=2).mask
    mask.save(tmp_path / "m.safetensors")
    loaded = sg.Mask.load(tmp_path / "m.safetensors")
    rebuilt = sg.generators.build(loaded.recipe["net"])
    assert torch.equal(sg.compile(rebuilt, loaded, z)(z), sg.compile(net, mask, z)(z))


def test_the_plan_says_what_runs():
    net, (z, _, _) = small_net(), problem()
    mask = random_mask(net, 0.3)
    plan = sg.compile(net, mask, z, plan="rule").plan
    convolutions = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    assert [stage.name for stage in plan.stages] == convolutions
    first = plan.stages[0]
    assert first.flops == 2 * 6 * 6 * 25 * 32 * 40
    assert first.kept == int(mask.tensors["encoder.0.conv1.1.weight"].sum())
    assert "30.0%" in str(plan)
    reference = sg.compile(net, mask, z, engine="reference").plan
    assert {stage.kernel for stage in reference.stages} == {"PyTorch"}
    assert reference.stages[0].output_shape == (6, 32, 40)
    assert "plain PyTorch on masked weights: as asked" in str(reference)
    if not status().available:
        return
    kernels = {stage.name: stage.kernel for stage in plan.stages}
    assert first.output_shape == (6, 16, 20)
    assert kernels["encoder.0.conv1.1"] == "sparse, pool folded"
    assert kernels["encoder.0.conv2.1"] == "sparse"
    assert kernels["decoder.0.conv.1"] == "taps"


def test_a_layer_that_is_nearly_dense_runs_densely():
    net, (z, _, _) = small_net(), problem()
    mask = random_mask(net, 0.2)
    mask.tensors["decoder.1.conv.1.weight"][:] = True
    plan = sg.compile(net, mask, z, plan="rule").plan
    if status().available:
        kernels = {stage.name: stage.kernel for stage in plan.stages}
        assert kernels["decoder.1.conv.1"] == "dense taps"
        assert kernels["decoder.2.conv.1"] == "taps"
        assert kernels["head"] == "with its normalisation"


def test_what_cannot_be_captured_runs_as_it_did():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, z):
            return self.net(z) if z.sum() > 0 else self.net(-z)

    net, (z, _, _) = Branches(), problem()
    mask = random_mask(net)
    fast = sg.compile(net, mask, z)
    if status().available:
        assert "cannot be captured" in str(fast.plan)
    dense, _ = masked(net, mask)
    torch.testing.assert_close(fast(z).double(), dense(z.double()), rtol=1e-4, atol=1e-5)


def test_another_size_than_the_examples_runs_too():
    net = small_net().double()
    mask = random_mask(net)
    fast = sg.compile(net, mask, problem()[0].double())
    dense, _ = masked(net, mask)
    other = sg.noise_input(6, (40, 25), seed=1).double()
    torch.testing.assert_close(fast(other), dense(other), rtol=1e-12, atol=1e-12)


def test_a_changed_input_is_not_mistaken_for_the_old_one():
    net = small_net().double()
    mask = random_mask(net)
    z = problem()[0].double()
    fast = sg.compile(net, mask, z)
    dense, _ = masked(net, mask)
    fast(z)
    z.mul_(1.5)
    torch.testing.assert_close(fast(z), dense(z), rtol=1e-12, atol=1e-12)
    other = z.flip(-1)
    torch.testing.assert_close(fast(other), dense(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("pool", [torch.nn.AvgPool2d(2), torch.nn.AvgPool2d(2, ceil_mode=True), torch.nn.MaxPool2d(2)])
@pytest.mark.parametrize("scale", [2, 3])
def test_a_network_of_ones_own(mode, pool, scale):
    """Paddings, pools and strides that do or do not fold, odd sizes, a concatenation, an activation we do not know."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(6, 5, 3, padding=1, padding_mode=mode)
            self.norm = torch.nn.BatchNorm2d(5)
            self.strided = torch.nn.Conv2d(5, 4, 5, stride=2, padding=2, padding_mode=mode, bias=False)
            self.up = torch.nn.Upsample(scale_factor=scale)
            self.after = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
            self.grouped = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.last = torch.nn.Conv2d(8, 3, 1)

        def forward(self, z):
            x = torch.nn.functional.gelu(self.norm(pool(self.first(z))))
            x = self.after(self.up(torch.relu(self.strided(x))))
            return torch.sigmoid(self.last(torch.cat([x, self.grouped(x)], dim=1)))

    torch.manual_seed(0)
    net = Own().double()
    mask, z = random_mask(net, 0.3), problem()[0].double()
    dense, keep = masked(net, mask)
    fast = sg.compile(net, mask, z)
    output, expected = fast(z), dense(z)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    kept = torch.cat([p.grad[keep[name][0]] for name, p in dense.named_parameters()])
    assert_same_gradient(fast.values.grad[0], kept)


def test_trajectories_in_double_are_the_references():
    """A hundred steps, at most 1e-6 dB apart."""
    z, y, clean = (t.double() for t in problem())
    net = small_net().double()
    mask = random_mask(net, 0.3)
    runs = [
        sg.fit(sg.compile(net, mask, z, engine=engine), z, y, steps=100, clean=clean, every=1)
        for engine in ("auto", "reference")
    ]
    assert (runs[0].history["psnr"] - runs[1].history["psnr"]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected an example_input"),
        ({"example_input": torch.zeros(6, 27, 34)}, "example_input of shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.compile(small_net(), **arguments)


def test_more_bad_arguments():
    net, (z, _, _) = small_net(), problem()
    with pytest.raises(ValueError, match="evaluation mode"):
        sg.compile(small_net().eval(), random_mask(net), z)
    with pytest.raises(ValueError, match="mask of this network"):
        sg.compile(small_net(in_channels=7), random_mask(net), z)
    with pytest.raises(ValueError, match="z with 1 experiments"):
        sg.compile(net, random_mask(net), z)(torch.cat([z, z]))
    with pytest.raises(ValueError, match="mask for 3 experiments"):
        sg.compile(net, random_mask(net, experiments=2), sg.noise_input(6, SIZE, seed=[0, 1, 2]))
    with pytest.raises(ValueError, match="engine='auto' or 'reference', got 'fast'"):
        sg.compile(net, random_mask(net), z, engine="fast")


def test_any_module_of_ones_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 1), nn.Sigmoid())
    z, y, _ = problem()
    mask = sg.search_mask(net, z, y, density=0.6, steps=2).mask
    run = sg.fit(sg.compile(net, mask, z), z, y, steps=2)
    assert run.image.shape == y.shape
