"""Kernels and bytes of a step on a GPU, beside DESIGN's arithmetic for a 512² training step."""

import pytest
import torch
from problems import problem, random_mask, small_net
from torch import nn

import sparse_gen as sg
from sparse_gen.engine.count import count_step
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.layouts import candidates
from sparse_gen.engine.lower import lower
from sparse_gen.engine.program import Program

# Kept per cent of the published Baboon mask: encoder outermost first, decoder deepest first; see PAPERS.
ENCODER = (7.0, 2.3, 1.6, 1.1, 0.9, 0.8, 0.6, 0.5, 0.8, 1.3, 2.8, 6.3)
DECODER = (16.9, 18.5, 18.6, 16.8, 20.1, 35.0)
HEAD, GAMMA = 64.6, 61.5


def published_like(net):
    """A mask with the published densities of every convolution and of all γ; biases and β are kept."""
    generator = torch.Generator().manual_seed(0)
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    densities = dict(zip(layers, [*ENCODER, *DECODER, HEAD], strict=True))
    tensors, whole = {}, {}
    for name, parameter in net.named_parameters():
        if name.endswith(".bias"):
            whole[name] = tuple(parameter.shape)
            continue
        density = densities.get(name.removesuffix(".weight"), GAMMA) / 100
        tensors[name] = torch.rand(parameter.shape, generator=generator) < density
    return sg.Mask(tensors, whole=whole)


def step(net, mask, size, *preferred):
    """The count of a network whose convolutions take the first of these layouts that they can."""
    layout = ParameterLayout.of(net)
    keep = layout.flatten(mask.dense(net), 1)[0]
    z = torch.empty(1, 32, *size)

    def choose(stage):
        able = candidates(stage._replace(device=torch.device("cuda")))
        return next(name for name in preferred if name in able)

    program = Program(lower(training_copy(net), z), layout, keep, choose)
    return count_step(program, torch.empty(1, int(keep.sum())), z)


@pytest.fixture(scope="module")
def hourglass():
    pytest.importorskip("triton", reason="triton is not installed")
    net = sg.generators.Hourglass(seed=0)
    return net, published_like(net)


# DESIGN expects 80 to 90 kernels and 400 to 500 MB, which our convolution's stages have: with the published Baboon mask
# 41 + 48 and 475 MB. A convolution takes one launch forward and one for both gradients; what is between two takes one
# more each way where an image's channel fits a program (up to 64²), and one or two where it does not.
@pytest.mark.parametrize(
    ("layouts", "kernels", "megabytes"),
    [
        (("dense fused",), (80, 90), (400, 500)),
        (("dense",), (170, 225), (800, 1300)),  # padding and up-sampling go through memory
        (("taps", "dense fused"), (90, 120), (400, 520)),
    ],
)
def test_a_training_step_at_512(hourglass, layouts, kernels, megabytes):
    found = step(*hourglass, (512, 512), *layouts)
    assert kernels[0] <= found.kernels <= kernels[1], found
    assert megabytes[0] <= found.bytes / 1e6 <= megabytes[1], found
    assert found.backward > found.forward


def test_a_search_step_at_512(hourglass):
    """Every weight is there, so that none has to be gathered; twice the channels in the outer layers, in bytes."""
    net, _ = hourglass
    whole = sg.Mask({name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters()})
    found = step(net, whole, (512, 512), "dense fused")
    assert 80 <= found.kernels <= 90, found
    assert 600 <= found.bytes / 1e6 <= 800, found


def test_kernels_are_those_of_the_stages(hourglass):
    """18 convolutions with their gradients, of which z's is not asked for; the head is one with its normalisation."""
    names = step(*hourglass, (192, 192), "dense fused").names
    assert names["forward_kernel"] == names["gradients_kernel"] == 18
    # One a normalisation or a pair of them, the head's among them.
    assert names["row_load_kernel"] + names["join_load_kernel"] == names["gradient_kernel"] == 18
    assert names["moments_kernel"] == names["fold_kernel"] == 0  # the convolutions leave them, or do it on the way
    assert names["add_splits_kernel"] <= 1  # of the first weight's gradient, which no other pass follows


def test_an_up_sampling_layer_on_its_taps_is_three_kernels(hourglass):
    """No plane, padded or resampled image goes through memory: sums over windows are added up, and that is all."""
    names = step(*hourglass, (192, 192), "taps", "dense fused").names
    assert names["sparse_upsample_conv2d"] == 6
    assert names["sparse_upsample_conv2d_backward"] == 2 * 6
    assert names["forward_kernel"] == 18 - 6


def test_bytes_grow_with_the_image(hourglass):
    small, large = (step(*hourglass, (size, size), "dense").bytes for size in (192, 384))
    assert 2 < large / small < 4.2  # what is as large as the image, and the weights


def test_a_compiled_network_counts():
    net, (z, _, _) = small_net(), problem()
    fast = sg.compile(net, random_mask(net, 0.3), z, plan="rule")
    before = fast(z)
    found = fast.count()
    assert 0 < found.forward < found.backward
    assert sum(found.names.values()) == found.kernels
    torch.testing.assert_close(fast(z), before, rtol=0, atol=0)  # nothing without numbers stays behind
    with pytest.raises(ValueError, match="runs in stages to count"):
        sg.compile(net, random_mask(net, 0.3), z, engine="reference").count()
