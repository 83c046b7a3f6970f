"""What holds for every generator: images of any size, seeds, recipes, and use in search, compile, fit and files."""

import json
from copy import deepcopy

import pytest
import torch
from problems import problem, random_mask
from torch import nn
from torch.nn import functional as F

import sparse_gen as sg
from sparse_gen.generators.sizes import extend_by_reflection
from sparse_gen.masks.connectivity import probe_connectivity

HOURGLASS, SKIP, DECODER = sg.generators.Hourglass, sg.generators.Skip, sg.generators.DeepDecoder
VARIANTS = {
    "hourglass": (HOURGLASS, {}),
    "hourglass bilinear beside skips": (HOURGLASS, {"upsample": "bilinear", "skip_channels": 2}),
    "skip": (SKIP, {"skip_channels": 2}),
    "skip avg nearest zero": (SKIP, {"downsample": "avg", "upsample": "nearest", "padding": "zero"}),
    "skip max, some connections": (SKIP, {"downsample": "max", "skip_channels": (0, 3), "need_1x1_up": False}),
    "decoder": (DECODER, {}),
    "decoder nearest": (DECODER, {"upsample": "nearest"}),
    "decoder fixed 3×3": (DECODER, {"upsample": "fixed", "kernel": 3}),
    "decoder none": (DECODER, {"upsample": "none", "kernel": 3}),
}
every_generator = pytest.mark.parametrize("variant", VARIANTS)


def small(variant, **arguments):
    generator, own = VARIANTS[variant]
    return generator(**{"in_channels": 6, "channels": (6, 8, 10), **own, **arguments})


@every_generator
@pytest.mark.parametrize("size", [(24, 24), (17, 24), (21, 37), (64, 25), (33, 19)])
@pytest.mark.parametrize("out_channels", [1, 2, 3, 4])
def test_any_size_any_channels(variant, size, out_channels):
    net = small(variant, out_channels=out_channels)
    z = sg.noise_input(6, size, seed=3).requires_grad_()
    image = net(z)
    assert image.shape == (1, out_channels, *size)
    assert 0 < image.min() < image.max() < 1
    image.square().sum().backward()
    assert z.grad.abs().sum() > 0
    # the bias of a convolution in front of a normalisation has a gradient of zero; every weight has one
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("decoder")])
def test_an_odd_size_is_the_network_on_the_extended_input(variant):
    net, z = small(variant), torch.rand(1, 6, 21, 27)
    assert torch.equal(net(z), net(F.pad(z, (0, 5, 0, 3), mode="reflect"))[..., :21, :27])


def test_extension_is_a_reflection_repeated_where_the_image_is_small():
    row = torch.arange(5.0).view(1, 1, 1, 5)
    assert extend_by_reflection(row, 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]
    assert extend_by_reflection(torch.ones(1, 1, 1, 1), 2).shape == (1, 1, 4, 4)
    for size in (9, 12, 16):
        x = torch.rand(1, 1, size, size)
        pad = 16 - size
        assert torch.equal(extend_by_reflection(x, 4), F.pad(x, (0, pad, 0, pad), mode="reflect"))


def test_deepest_depth_of_nothing():
    with pytest.raises(ValueError, match="at least 5 pixels a side, got 4×100"):
        sg.generators.deepest_depth((4, 100))


KERNELS = [
    ("hourglass", {}, 3),
    ("hourglass", {"down_kernel": 9}, 5),
    ("hourglass", {"up_kernel": 13}, 4),
    ("skip", {}, 2),
    ("skip", {"down_kernel": 5}, 3),
    ("skip", {"up_kernel": 7}, 2),
    ("skip", {"up_kernel": 9}, 3),
    ("skip avg nearest zero", {"down_kernel": 7, "up_kernel": 7}, 2),
    ("decoder", {}, 2),
    ("decoder", {"kernel": 5}, 3),
]


@pytest.mark.parametrize(("variant", "kernels", "level"), KERNELS)
def test_the_smallest_image_fits_and_one_pixel_less_names_the_depth_that_does(variant, kernels, level):
    net = small(variant, **kernels)
    side = 8 * (level - 1) + 1
    assert net(torch.rand(1, 6, side, side)).shape == (1, 3, side, side)
    too_small = torch.rand(1, 6, side - 1, 70)
    with pytest.raises(
        ValueError,
        match=f"at least {level} pixels a side at the deepest level, got a {side - 1}×70 image at depth 3, use depth=2",
    ):
        net(too_small)
    assert small(variant, depth=2, **kernels)(too_small).shape[-2:] == (side - 1, 70)


@every_generator
def test_seed_decides_the_weights_and_nothing_else_does(variant):
    torch.manual_seed(0)
    first = list(small(variant, seed=1).parameters())
    torch.manual_seed(1)
    second, other = list(small(variant, seed=1).parameters()), list(small(variant, seed=2).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("generator", [HOURGLASS, SKIP, DECODER])
def test_initialisation_has_pytorchs_distribution(generator):
    layers = list(generator(seed=4).modules())
    large = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000]
    assert len(large) > 5
    for layer in large:
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert layer.bias is None or 0 < layer.bias.abs().max() <= bound
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


@every_generator
def test_recipe_builds_the_same_network(variant):
    net = small(variant, depth=4, out_channels=2, seed=9)
    recipe = json.loads(json.dumps(net.recipe()))  # as a mask file holds it
    again = sg.generators.build(recipe)
    assert again.recipe() == recipe
    assert net.in_channels == 6
    z = torch.rand(1, 6, 40, 51)
    assert torch.equal(net(z), again(z))


@pytest.mark.parametrize(
    "recipe",
    [
        {"class": "Unet"},
        {},
        {"class": "Hourglass", "arguments": {"widht": 3}},
        {"class": "Skip", "arguments": {"padding": "mirror"}},
        {"class": "DeepDecoder", "arguments": {"down_kernel": 3}},
    ],
)
def test_bad_recipe(recipe):
    with pytest.raises(ValueError, match="expected"):
        sg.generators.build(recipe)


# -- used everywhere


@every_generator
def test_search_save_load_compile_and_fit(variant, tmp_path):
    z, y, clean = problem()
    net = small(variant)
    search = sg.search_mask(net, z, y, density=0.7, steps=3)
    search.mask.save(tmp_path / "m.safetensors")
    mask = sg.Mask.load(tmp_path / "m.safetensors")
    rebuilt = sg.generators.build(mask.recipe["net"])
    fast = sg.compile(rebuilt, mask, z)
    assert fast.values.numel() == int(0.7 * sum(p.numel() for p in net.parameters()))
    # A single pass is not worth a measurement: `masked_output` goes by the rule.
    assert torch.equal(sg.compile(rebuilt, mask, z, plan="rule")(z), sg.masked_output(net, z, search.mask))
    run = sg.fit(fast, z, y, steps=40, clean=clean)
    assert run.history["loss"][-1] < 0.8 * run.history["loss"][0]
    dense = fast.to_dense()
    assert type(dense) is type(net)
    torch.testing.assert_close(dense(z), run.image)


@every_generator
def test_compiled_outputs_and_gradients_are_those_of_the_masked_network(variant):
    net = small(variant).double()
    mask = random_mask(net, 0.5)
    z = problem()[0].double()
    dense, keep = deepcopy(net), mask.dense(net)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.mul_(keep[name][0])
    fast = sg.compile(net, mask, z)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    output, expected = fast(ours), dense(theirs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    kept = torch.cat([p.grad[keep[name][0]] for name, p in dense.named_parameters()])
    # To rounding of the largest: a γ in front of another normalisation has a gradient of 0, PyTorch's is noise.
    torch.testing.assert_close(fast.values.grad[0], kept, rtol=1e-9, atol=1e-12 * kept.norm().item())


@every_generator
def test_experiments_are_separate_runs(variant):
    net, z = small(variant), sg.noise_input(6, (27, 34), seed=[0, 1])
    together = sg.compile(net, example_input=z)(z)
    for e in range(2):
        alone = z[e : e + 1]
        assert torch.equal(together[e : e + 1], sg.compile(net, example_input=alone)(alone))


@every_generator
def test_the_probe_finds_a_cut(variant):
    net, z = small(variant), problem()[0]
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    assert probe_connectivity(net, parameters, z).connected
    parameters["head.weight"] = torch.zeros_like(parameters["head.weight"])
    assert probe_connectivity(net, parameters, z).disconnected_at == "head"


# What `sg.compile` is to match (alias: a slice that takes all; add_: counters of the running statistics), and the
# extension of z.
STAGES = {"conv2d", "conv_transpose2d", "expand", "pad", "batch_norm", "leaky_relu", "relu", "sigmoid", "avg_pool2d"}
STAGES |= {"max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "cat", "slice", "alias", "add_"}
EXTENSION = {"index_select", "arange", "remainder", "rsub", "minimum"}


@every_generator
def test_the_captured_graph_has_no_other_operators(variant):
    graph = torch.export.export(small(variant), (problem()[0],)).graph
    operators = {str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"}
    assert {"conv2d", "batch_norm", "sigmoid"} <= operators
    assert operators <= STAGES | EXTENSION
