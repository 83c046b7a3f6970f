"""`Mask`: what it counts, what it refuses, and its file."""

from math import floor

import pytest
import torch
from problems import problem, random_mask, small_net
from safetensors.torch import load_file, save_file

import sparse_gen as sg
from sparse_gen.tensorfile import read_tensors, write_tensors


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
        (({"a": torch.ones(0, 3, dtype=torch.bool)},), r"at least one entry in a, got a mask of shape \(0, 3\)"),
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


def test_file_holds_the_logits_if_wanted(tmp_path):
    z, y, _ = problem()
    search = sg.search_mask(small_net(), z, y, density=0.2, steps=3)
    assert search.mask.logits is None
    search.mask.logits = search.logits
    search.mask.save(tmp_path / "m.safetensors")
    again = sg.Mask.load(tmp_path / "m.safetensors")
    assert again.logits.keys() == search.logits.keys()
    assert all(torch.equal(values, search.logits[name]) for name, values in again.logits.items())


def test_a_file_that_does_not_mention_logits_is_read(tmp_path, found):
    path = tmp_path / "m.safetensors"
    found.save(path)
    rewrite(path, lambda header, _: header.pop("logits"))
    assert sg.Mask.load(path).logits is None


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ({}, "expected logits of every masked parameter and of no other, got a difference in a"),
        ({"a": torch.zeros(2)}, r"the logits of a as floats of shape \(3,\), got torch.float32 of shape \(2,\)"),
        ({"a": torch.ones(3, dtype=torch.int32)}, "as floats of shape"),
        ({"a": torch.full((3,), torch.nan)}, "expected finite logits, got NaN or infinity in a"),
    ],
)
def test_bad_logits(logits, message):
    with pytest.raises(ValueError, match=message):
        sg.Mask({"a": torch.ones(3, dtype=torch.bool)}, logits=logits)


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


def rewrite(path, change):
    """Change the header of a file and stamp it again, as another program might write it."""
    header, tensors = read_tensors(path, kind="mask", version=1)
    change(header, tensors)
    version = header.pop("version")
    write_tensors(path, tensors, kind="mask", version=version, header=header)


UNFIT = {
    "no shapes": (lambda h, t: h.pop("shapes"), "'shapes' is missing"),
    "no recipe": (lambda h, t: h.pop("recipe"), "'recipe' is missing"),
    "no whole": (lambda h, t: h.pop("whole"), "'whole' is missing"),
    "no weights": (lambda h, t: h.pop("weights"), "'weights' is missing"),
    "no bits": (lambda h, t: t.pop("mask/head.weight"), "'mask/head.weight' is missing"),
    "no weight": (lambda h, t: t.pop("weight/head.bias"), "'weight/head.bias' is missing"),
    "a recipe of text": (lambda h, t: h.update(recipe="net"), "the recipe is no mapping"),
    "half an experiment": (lambda h, t: h.update(experiments=1.5), "1.5 is no number of experiments"),
    "true experiments": (lambda h, t: h.update(experiments=True), "True is no number of experiments"),
    "experiments": (
        lambda h, t: h.update(experiments=5),
        "expected encoder.0.conv1.1.weight with a leading axis of 5 experiments, got (6, 6, 5, 5)",
    ),
    "a negative length": (lambda h, t: h["shapes"].update({"head.weight": [-3, 6, 1, 1]}),
                          "(-3, 6, 1, 1) is no shape of head.weight"),
    "no length": (lambda h, t: h["shapes"].update({"head.weight": [0, 2**62]}),
                  f"(0, {2**62}) is no shape of head.weight"),
    "a shape of text": (lambda h, t: h["shapes"].update({"head.weight": "316"}),
                        "('3', '1', '6') is no shape of head.weight"),
    "a huge shape": (lambda h, t: h["shapes"].update({"head.weight": [10**12, 10**12]}),
                     f"3 bytes of bits make no mask of shape ({10**12}, {10**12})"),
    "a huge whole": (lambda h, t: h["whole"].update({"head.bias": [10**30]}),
                     f"expected one stored weight for each kept entry of head.bias, {10**30}, got 3"),
    "shapes as a list": (lambda h, t: h.update(shapes=[1, 2]), "'list' object has no attribute 'items'"),
    "weights of bytes": (
        lambda h, t: t.update({"weight/head.bias": torch.zeros(3, dtype=torch.uint8)}),
        "expected the stored weights of head.bias as a vector of floats, got torch.uint8 of shape (3,)",
    ),
    "weights in a matrix": (
        lambda h, t: t.update({"weight/head.bias": torch.zeros(3, 1)}),
        "expected the stored weights of head.bias as a vector of floats, got torch.float32 of shape (3, 1)",
    ),
    "a NaN": (lambda h, t: t["weight/head.bias"].fill_(float("nan")),
              "expected finite stored weights, got NaN or infinity in head.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_whose_content_does_not_fit_is_refused(tmp_path, found, name):
    path = tmp_path / "m.safetensors"
    found.save(path)
    change, reason = UNFIT[name]
    rewrite(path, change)
    with pytest.raises(ValueError) as caught:
        sg.Mask.load(path)
    assert str(caught.value) == f"expected a sparse-gen mask file, got {path}, whose content does not fit: {reason}"


DAMAGED = "which is cut off or damaged, fetch it again"
METADATA = {
    "nothing": ("sparse-gen mask", "", DAMAGED),
    "header of text": ("sparse-gen mask", "0 density", DAMAGED),
    "header of a number": ("sparse-gen mask", "0 1", DAMAGED),
    "header without end": ("sparse-gen mask", "0 " + "[" * 100_000, DAMAGED),
    "header of digits": ("sparse-gen mask", "0 " + "1" * 10_000, DAMAGED),
    "wrong checksum": ("sparse-gen mask", '0 {"version": 1}',
                       "whose checksum is wrong: the file is damaged, fetch it again"),
    "a checkpoint": ("sparse-gen checkpoint", "", "a safetensors file of something else, name another"),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_a_file_with_other_metadata_is_refused(tmp_path, found, name):
    path = tmp_path / "m.safetensors"
    found.save(path)
    key, value, reason = METADATA[name]
    save_file(load_file(path), path, {key: value})
    with pytest.raises(ValueError) as caught:
        sg.Mask.load(path)
    assert str(caught.value) == f"expected a sparse-gen mask file, got {path}, {reason}"


@pytest.mark.parametrize(
    ("version", "shown"), [(2, "2"), (None, "None"), ("x" * 10_000 + "\n", "'xxxxxxxxxxxx...xxxxxxxxxxx\\n'")]
)
def test_a_file_of_another_version_is_refused(tmp_path, found, version, shown):
    path = tmp_path / "m.safetensors"
    found.save(path)
    rewrite(path, lambda header, _: header.update(version=version))
    with pytest.raises(ValueError) as caught:
        sg.Mask.load(path)
    assert str(caught.value) == (
        f"expected a sparse-gen mask file, got {path} of version {shown}, install the release that wrote it: this one "
        "reads 1"
    )


def test_equal_masks_are_equal_files(tmp_path, found):
    for name in "abcdefgh":
        found.save(tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1


def test_a_changed_recipe_is_found(tmp_path, found):
    """A seed that a flipped bit turned into another would make another network without a word."""
    path = tmp_path / "m.safetensors"
    found.save(path)
    content = path.read_bytes()
    assert content.count(b'\\"seed\\": 0') >= 1
    path.write_bytes(content.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    with pytest.raises(ValueError, match="whose checksum is wrong"):
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
    each = top_k(scores, torch.tensor([5, 0]), torch.tensor([0, 1]))
    assert torch.equal(each[0], keep[0]) and not each[1].any()
    picks = {tuple(top_k(scores[:1], 5, torch.tensor([s]))[0].tolist()) for s in range(40)}
    assert len(picks) == 10  # all ways to choose two of five ties
