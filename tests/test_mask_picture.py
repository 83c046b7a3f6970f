"""The picture of a mask: every panel shows the mask's own numbers."""

import numpy as np
import pytest
import torch
from PIL import Image
from problems import problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.experiments.mask_picture import build_mask_figure, draw_mask, plane_picture

LAYER = "encoder.1.conv2.1.weight"


def test_kernel_planes_lie_side_by_side():
    keep = torch.rand(3, 4, 5, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    picture = plane_picture(keep)
    assert picture.shape == (3 * 6 - 1, 4 * 3 - 1)
    for o in range(3):
        for i in range(4):
            plane = picture[6 * o : 6 * o + 5, 3 * i : 3 * i + 2]
            np.testing.assert_array_equal(plane, np.where(keep[o, i].numpy(), 255, 0))
    assert (picture[5::6] == 96).all() and (picture[:, 2::3] == 96).all()


def test_bars_are_the_layers_densities():
    mask = random_mask(small_net(), 0.3)
    (axes,) = build_mask_figure(mask).axes
    convolutions = [layer for layer in mask.layers() if len(layer.shape) == 4]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * c.kept / c.total for c in convolutions])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [c.name.removesuffix(".weight") for c in convolutions]


def test_a_layer_and_the_probabilities_of_an_experiment():
    net, (_, y, _) = small_net(), problem()
    search = sg.search_mask(net, sg.noise_input(6, y.shape[-2:], seed=[0, 1]), y, density=0.3, steps=3, seed=[0, 1])
    mask = search.mask
    mask.logits = search.logits
    _, planes, histogram = build_mask_figure(mask, LAYER, experiment=1).axes
    np.testing.assert_array_equal(planes.images[0].get_array(), plane_picture(mask.tensors[LAYER][1]))
    p = torch.cat([logits[1].flatten() for logits in mask.logits.values()]).sigmoid().numpy()
    counts, _ = np.histogram(p, bins=100, range=(0, 1))
    assert [bar.get_height() for bar in histogram.patches] == counts.tolist()


def test_it_is_written_as_png(tmp_path):
    draw_mask(random_mask(small_net()), tmp_path / "m.png", LAYER)
    with Image.open(tmp_path / "m.png") as image:
        assert image.format == "PNG" and image.width > 600


@pytest.mark.parametrize(
    ("layer", "experiment", "message"),
    [
        ("encoder.9", 0, "layer: expected one with masked kernels, out of encoder.0.conv1.1.weight, .*got 'encoder.9'"),
        ("head.bias", 0, "layer: expected one with masked kernels"),
        (None, 1, "expected an experiment from 0 to 0, got 1"),
    ],
)
def test_what_is_not_there(layer, experiment, message):
    with pytest.raises(ValueError, match=message):
        build_mask_figure(random_mask(small_net()), layer, experiment)


def test_a_layer_too_large_for_a_picture():
    with pytest.raises(ValueError, match="at most 4096 pixels a side, got 6000×12"):
        plane_picture(torch.ones(1000, 2, 5, 5, dtype=torch.bool))
