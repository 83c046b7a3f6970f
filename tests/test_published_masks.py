"""The masks that the OES authors published, on the hourglass they belong to."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled import SAVE
from torch import nn

import sparse_gen as sg

# Kept per cent of each layer as PAPERS lists them: encoder outermost first, decoder deepest first, head, BN γ.
LAYERS = {
    "baboon": (
        "7.0 2.3 1.6 1.1 0.9 0.8 0.6 0.5 0.8 1.3 2.8 6.3",
        "16.9 18.5 18.6 16.8 20.1 35.0",
        64.6,
        61.5,
    ),
    "barbara": (
        "7.8 2.8 1.7 1.3 1.0 1.0 0.7 0.6 0.9 2.1 3.2 5.6",
        "18.6 19.3 15.6 14.4 14.7 23.8",
        54.2,
        62.5,
    ),
}


@pytest.fixture(scope="module", params=sorted(LAYERS))
def published(request):
    path = Path(__file__).parents[2] / "shared" / "data" / f"oes_mask_{request.param}.npz"
    if not path.exists():
        pytest.skip(f"the published masks are not part of the project, and {path.name} is not beside it")
    return request.param, sg.generators.Hourglass(), sg.masks.import_mask(path)


def test_bits_and_shapes_are_those_of_the_file(published):
    name, net, mask = published
    data = np.load(Path(__file__).parents[2] / "shared" / "data" / f"oes_mask_{name}.npz")
    assert [list(p.shape) for p in net.parameters()] == json.loads(str(data["shapes"]))
    flat = torch.cat([keep.flatten() for keep in mask.tensors.values()])
    np.testing.assert_array_equal(np.unpackbits(data["bits"])[: int(data["numel"])], flat)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("form", SAVE)
def test_the_authors_own_files_give_the_same_mask(published, tmp_path, form, flat):
    _, _, mask = published
    tensors = [keep.float() for keep in mask.tensors.values()]
    SAVE[form](torch.cat([t.flatten() for t in tensors]) if flat else tensors, tmp_path / "mask.pkl")
    again = sg.masks.import_mask(tmp_path / "mask.pkl")
    assert list(again.tensors) == list(mask.tensors)
    assert all(torch.equal(keep, mask.tensors[name]) for name, keep in again.tensors.items())


def test_they_fit_the_default_hourglass(published):
    _, net, mask = published
    mask.check_fits(net)
    assert (mask.kept, mask.total) == (150_443, 3_008_867)


def test_their_layer_densities_are_the_published_ones(published):
    name, net, mask = published
    density = {layer.name: 100 * layer.kept / prod(layer.shape) for layer in mask.layers()}
    encoder, decoder, head, gamma = LAYERS[name]
    for prefix, expected in {"encoder": encoder, "decoder": decoder}.items():
        convolutions = [n for n, p in net.named_parameters() if n.startswith(prefix) and p.ndim == 4]
        assert " ".join(f"{density[n]:.1f}" for n in convolutions) == expected
    assert round(density["head.weight"], 1) == head
    norms = [f"{n}.weight" for n, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    kept = torch.cat([mask.tensors[n] for n in norms])
    assert round(100 * kept.double().mean().item(), 1) == gamma


def test_compiled_they_give_the_masked_networks_output(published):
    _, net, mask = published
    z = sg.noise_input(32, (192, 200), seed=0)
    fast = sg.compile(net, mask, z)
    output = fast(z)
    assert fast.values.shape == (1, 150_443)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(mask.tensors[name])
    error = (output - net(z)).norm() / output.norm()
    assert error < 1e-5
