"""`Mask`: what it counts, what it refuses, and its file."""

import json
from math import floor

import pytest
import torch
from problems import problem, random_mask, small_net
from safetensors.torch import load_file, save_file

import sparse_gen as sg


@pytest.fixture(scope="module")
def found():
    z, y, _ = problem()
    return sg.search_mask(small_net(), z, y, density=0.2, steps=5, recipe={"z": {"seed": 0}}).mask


def test_density_counts_what_is_kept_whole():
    mask = sg.Mask({"a": torch.tensor([True, False, False, False])}, whole={"b": (6,)})
    assert (mask.kept, mask.total, mask.density) == (7, 10, 0.7)
    assert [tuple(layer) for layer in mask.layers()] == [("a", (4,), 1, 4), ("b", (6,), 6, 6)]
    assert "7 of 10 weights kept, 70.00%" in str(mask)


def test_experiment_axis_is_no_part_of_the_shape():
    mask = sg.Mask({"a": torch.tensor([[True, False], [True, True]])}, experiments=2)
    assert mask.experiments == 2
    assert mask.total == 2
    assert mask.layers()[0].kept == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one parameter"),
        (({"a": torch.ones(3)},), "bool tensor for a, got torch.float32"),
        (({"a": [True]},), "bool tensor for a, got list"),
    ],
)
def test_bad_masks(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.Mask(*arguments)


def test_more_bad_masks():
    keep = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="leading axis of 2 experiments"):
        sg.Mask({"a": keep}, experiments=2)
    with pytest.raises(ValueError, match="got both for a"):
        sg.Mask({"a": keep}, whole={"a": (3,)})
    with pytest.raises(ValueError, match="each kept entry of a, 3, got 2"):
        sg.Mask({"a": keep}, weights={"a": torch.zeros(2)})


@pytest.mark.parametrize("experiments", [None, 2])
def test_file_gives_back_everything(tmp_path, experiments):
    net = small_net()
    mask = random_mask(net, experiments=experiments)
    mask.recipe = {"net": net.recipe(), "noise": {"sigma": 0.1}}
    mask.save(tmp_path / "m.safetensors")
    again = sg.Mask.load(tmp_path / "m.safetensors")
    assert again.recipe == mask.recipe
    assert again.whole == mask.whole
    assert again.experiments == mask.experiments
    assert again.has_experiment_axis == mask.has_experiment_axis
    assert again.weights is None
    assert list(again.tensors) == list(mask.tensors)
    assert all(torch.equal(again.tensors[name], keep) for name, keep in mask.tensors.items())


def test_file_holds_the_kept_initial_weights(tmp_path, found):
    net = small_net()
    found.save(tmp_path / "m.safetensors")
    again = sg.Mask.load(tmp_path / "m.safetensors")
    assert again.recipe["net"] == net.recipe()
    assert again.recipe["z"] == {"seed": 0}
    assert again.recipe["search"]["steps"] == 5
    for name, parameter in net.named_parameters():
        kept = parameter[again.tensors[name]] if name in again.tensors else parameter.flatten()
        assert torch.equal(again.weights[name], kept.detach())


def test_masks_are_packed_eight_to_a_byte(tmp_path, found):
    found.save(tmp_path / "m.safetensors")
    bits = sum(keep.numel() for keep in found.tensors.values()) / 8
    weights = 4 * sum(values.numel() for values in found.weights.values())
    assert (tmp_path / "m.safetensors").stat().st_size < 1.1 * (bits + weights) + 12_000


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "tail"])
def test_a_damaged_file_is_refused(tmp_path, found, damage):
    path = tmp_path / "m.safetensors"
    found.save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[-100] ^= 1
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"not a mask at all, only a few words"
    else:
        content += b"0" * 9
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a sparse-gen mask file, got"):
        sg.Mask.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="safetensors file of something else"):
        sg.Mask.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("missing", ["shapes", "sha256", "recipe", "version", "whole", "weights"])
def test_a_file_with_an_incomplete_header_is_refused(tmp_path, found, missing):
    path = tmp_path / "m.safetensors"
    found.save(path)
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    header = json.loads(metadata["header"])
    del header[missing]
    save_file(load_file(path), path, {**metadata, "header": json.dumps(header)})
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        sg.Mask.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, found, monkeypatch):
    path = tmp_path / "m.safetensors"
    found.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        random_mask(small_net()).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        sg.Mask.load(tmp_path / "none.safetensors")


def test_another_networks_mask_is_refused_with_both_shapes():
    mask = random_mask(small_net())
    with pytest.raises(ValueError, match=r"encoder.0.conv1.1.weight is \(6, 5, 5, 5\), got \(6, 6, 5, 5\)"):
        mask.check_fits(small_net(in_channels=5))
    with pytest.raises(ValueError, match=r"which the network lacks"):
        mask.check_fits(small_net(channels=(6, 8)))


def test_kept_count_is_the_floor_over_all_parameters():
    from sparse_gen.masks.selection import kept_count

    assert kept_count(0.05, 3_008_867, 0) == floor(0.05 * 3_008_867) == 150_443
    assert kept_count(0.05, 1000, 30) == 20
    with pytest.raises(
        ValueError, match=r"expected a density above 0\.0310, since 30 of 1,000 parameters are always kept"
    ):
        kept_count(0.03, 1000, 30)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf"), "0.05"])
def test_density_out_of_range(density):
    from sparse_gen.masks.selection import kept_count

    with pytest.raises(ValueError, match="expected a density above 0 and at most 1"):
        kept_count(density, 1000, 0)


def test_top_k_keeps_the_largest_and_breaks_ties_by_seed():
    from sparse_gen.masks.selection import top_k

    scores = torch.tensor([[0.0, 3, 0, 2, 0, 0, 0, 1]] * 2)
    keep = top_k(scores, 5, torch.tensor([0, 1]))
    assert keep.sum(dim=1).tolist() == [5, 5]
    assert keep[:, [1, 3, 7]].all()
    assert torch.equal(keep, top_k(scores, 5, torch.tensor([0, 1])))
    picks = {tuple(top_k(scores[:1], 5, torch.tensor([s]))[0].tolist()) for s in range(40)}
    assert len(picks) == 10  # all ways to choose two of five ties
