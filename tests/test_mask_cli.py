"""`sparse-gen mask find`, `show`, `compare` and `transfer`."""

import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints
from sparse_gen.cli import main

WIDTH, HEIGHT = 48, 40
METHODS = {
    "oes": [], "imp": [], "magnitude": [], "random": [], "snip": [], "grasp": [], "synflow": ["--rounds", "4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two photographs of one size, one of another, and settings that make a run take a second."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = np.stack([4 * x, 5 * y, 255 * (x > WIDTH // 2)], axis=-1).astype(np.uint8)
    Image.fromarray(image).save(folder / "photo.png")
    Image.fromarray(image[::-1].copy()).save(folder / "other.png")
    Image.fromarray(image[:-4]).save(folder / "smaller.png")
    (folder / "quick.yaml").write_text(
        "density: 0.4\ndepth: 3\nchannels: [4, 6]\nsearch_steps: 4\nsteps: 4\nevery: 2\nthreads: 1\n"
    )
    return folder


def find(files, out, *options, image="photo.png"):
    return main(["mask", "find", str(files / image), "--config", str(files / "quick.yaml"), "-o", str(out), *options])


@pytest.mark.parametrize("method", METHODS)
def test_find_writes_what_the_library_finds(files, tmp_path, capsys, method):
    out = tmp_path / "m.safetensors"
    assert find(files, out, "--method", method, "--sigma", "0.1", "--seed", "3", *METHODS[method]) == 0
    mask = sg.Mask.load(out)
    captured = capsys.readouterr()
    assert captured.out == f"{out}: {mask.kept:,} of {mask.total:,} weights kept, {mask.density:.2%}\n"
    assert mask.kept == int(0.4 * mask.total)

    net = sg.generators.build(mask.recipe["net"])
    z = sg.noise_input(32, (HEIGHT, WIDTH), seed=3)
    clean = torch.from_numpy(np.array(Image.open(files / "photo.png"))).permute(2, 0, 1)[None] / 255
    y = sg.inverse.add_noise(clean, 0.1, seed=3)
    options = {"oes": {"steps": 4, "every": 2}, "imp": {"steps": 4}, "synflow": {"rounds": 4}}.get(method, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = sg.masks.find(method, net, z, y, density=0.4, seed=3, **options).mask
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(keep, mask.tensors[name]) for name, keep in again.tensors.items())
    assert mask.recipe["search"]["method"] == method
    assert mask.recipe["target"] == "noisy"
    assert mask.recipe["noise"] == {"sigma": 0.1, "clip": True, "seed": 3}
    assert mask.recipe["image_sha256"] == hashlib.sha256((files / "photo.png").read_bytes()).hexdigest()
    if method in ("oes", "imp", "synflow"):
        assert "4/4" in captured.err or "20/20" in captured.err


def test_find_on_the_clean_image_says_so(files, tmp_path):
    options = ["--method", "snip", "--sigma", "0.2"]
    for target in ("clean", "noisy"):
        assert find(files, tmp_path / target, *options, "--target", target) == 0
    clean, noisy = (sg.Mask.load(tmp_path / target) for target in ("clean", "noisy"))
    assert (clean.recipe["target"], noisy.recipe["target"]) == ("clean", "noisy")
    assert any(not torch.equal(keep, noisy.tensors[name]) for name, keep in clean.tensors.items())


def test_find_keeps_groups(files, tmp_path, capsys):
    assert find(files, tmp_path / "m", "--sigma", "0.1", "--group", "kernel") == 0
    mask = sg.Mask.load(tmp_path / "m")
    assert f"{mask.kept:,} of {mask.total:,} weights kept, {mask.density:.2%}" in capsys.readouterr().out
    assert mask.recipe["search"]["group"] == "kernel"
    assert 0.2 * mask.total < mask.kept <= 0.4 * mask.total
    for keep in mask.tensors.values():
        assert torch.equal(keep.flatten(2).any(dim=2), keep.flatten(2).all(dim=2))


def test_find_ends_when_the_kept_weights_have_settled(files, tmp_path, capsys):
    given = ["--sigma", "0.1", "--steps", "300", "--overwrite"]
    assert find(files, tmp_path / "m", *given, "--settle", "0.9") == 0
    settled = sg.Mask.load(tmp_path / "m")
    search = settled.recipe["search"]
    assert search["stop"] == {"window": 100, "tolerance": 0.9}
    assert search["settled_at"] == 200  # the first step that has a window before it
    assert "settled after 200 of 300 steps\n" in capsys.readouterr().out
    assert find(files, tmp_path / "m", *given, "--settle", "0") == 0
    search = sg.Mask.load(tmp_path / "m").recipe["search"]
    assert search["settled_at"] is None
    shown = re.search(r"not settled in 300 steps: the last 100 exchanged (.+)% of the kept", capsys.readouterr().out)
    assert 0 < float(shown[1]) < 90
    assert find(files, tmp_path / "n", "--sigma", "0.1", "--steps", "200") == 0
    again = sg.Mask.load(tmp_path / "n")
    assert all(torch.equal(keep, settled.tensors[name]) for name, keep in again.tensors.items())


def test_find_whose_steps_are_not_given_ends_by_itself(files, tmp_path, capsys):
    settings = (files / "quick.yaml").read_text().replace("search_steps: 4\n", "")
    (tmp_path / "own.yaml").write_text(settings)
    given = [str(files / "photo.png"), "--config", str(tmp_path / "own.yaml"), "--sigma", "0.1"]
    assert main(["mask", "find", *given, "-o", str(tmp_path / "m")]) == 0
    search = sg.Mask.load(tmp_path / "m").recipe["search"]
    assert (search["steps"], search["stop"]) == (1000, {"window": 100, "tolerance": 0.1})
    assert f"settled after {search['settled_at']:,} of 1,000 steps\n" in capsys.readouterr().out
    assert main(["mask", "find", *given, "-o", str(tmp_path / "n"), "--method", "snip"]) == 0
    assert "settled" not in capsys.readouterr().out


def test_find_shares_a_mask_between_images(files, tmp_path):
    other = str(files / "other.png")
    assert find(files, tmp_path / "m", other, "--method", "imp", "--sigma", "0.1", "--rewind", "2") == 0
    recipe = sg.Mask.load(tmp_path / "m").recipe
    assert [recipe["search"][name] for name in ("images", "rewind", "multi_image")] == [2, 2, True]
    assert recipe["noise"]["seed"] == [0, 1]
    assert len(set(recipe["image_sha256"])) == 2


@pytest.mark.parametrize("method", ["oes", "imp"])
def test_a_search_that_was_interrupted_goes_on(files, tmp_path, capsys, monkeypatch, method):
    """A signal after a while, as a stop that is asked for; then the same file as without it, and nothing beside it."""
    steps = ["--method", method, "--sigma", "0.1", "--steps", "8"]
    assert find(files, tmp_path / "whole", *steps) == 0
    store = Checkpoints.store

    def stopping(self, name, identity, step, *args, **kwargs):
        if step == 6:
            self.request_stop()
        store(self, name, identity, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "store", stopping)
        assert find(files, tmp_path / "cut", *steps) == 130
    assert "stopped after step 6" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("go on with the same command and --resume")
    assert not (tmp_path / "cut").exists()
    assert find(files, tmp_path / "cut", *steps, "--resume") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]
    whole, cut = (sg.Mask.load(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(keep, cut.tensors[name]) for name, keep in whole.tensors.items())


@pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")
def test_find_as_published_and_by_layer_with_a_floor(files, tmp_path):
    assert find(files, tmp_path / "a", "--method", "snip", "--variant", "as_published") == 0
    published = sg.Mask.load(tmp_path / "a")
    assert published.kept == int(0.6 * published.total) - 1
    assert find(files, tmp_path / "b", "--method", "snip", "--scope", "layer", "--floor", "3", "--prunable", "all") == 0
    assert all(keep.sum() >= min(3, keep.numel()) for keep in sg.Mask.load(tmp_path / "b").tensors.values())
    assert find(files, tmp_path / "c", "--method", "snip", "--floor", "0.2") == 0
    assert all(keep.double().mean() >= 0.2 for keep in sg.Mask.load(tmp_path / "c").tensors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "snap"],
         "expected method as one of oes, imp, magnitude, random, snip, grasp, synflow, got 'snap'"),
        (["--method", "snip", "--steps", "3"], "expected options of 'snip' out of none, got 'steps'"),
        (["--scope", "local"], "expected scope as one of global, layer, got 'local'"),
        (["--target", "dirty", "--sigma", "0.1"], "target: expected noisy or clean, got 'dirty', use one of them"),
        (["--target", "clean"],
         "target: expected noisy where no sigma is given, got clean, give a sigma or leave it out"),
        (["--density", "5"], "density: expected a number in (0, 1], got 5, did you mean 5 % = 0.05?"),
        (["--resume"], "resume: expected an interrupted search in {o}.unfinished, got none, leave --resume out"),
        (["--group", "8"], "expected group as 'weight', 'kernel', 'filter', or a block of output × input channels such "
         "as '8x1' or (8, 1), got '8'"),
        (["--settle", "5"], "settle: expected a share from 0 to below 1, got 5, 0.05 is 5 %"),
        (["--settle", "0.1", "--method", "snip"],
         "settle: expected method oes, whose search can settle, got snip, leave one out"),
        (["--floor", "x"], "expected floor as a count of weights or a share of a layer in (0, 1), got 'x'"),
        (["{f}/other.png"], "image: expected one for oes, got 2, use method imp"),
        (["{f}/smaller.png", "--method", "imp"], "image: expected images of one size and kind, got {f}/photo.png of "
         "48 × 40, {f}/smaller.png of 48 × 36, crop them"),
    ],
)  # fmt: skip
def test_find_refuses_in_one_line(files, tmp_path, capsys, options, message):
    given = [option.replace("{f}", str(files)) for option in options]
    assert find(files, tmp_path / "m", *given) == 2
    message = message.replace("{f}", str(files)).replace("{o}", str(tmp_path / "m"))
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_find_does_not_replace_a_file_unasked(files, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    assert find(files, out, "--method", "magnitude") == 2
    assert "expected a new file" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert find(files, out, "--method", "magnitude", "--overwrite") == 0
    assert sg.Mask.load(out).kept > 0


def test_show_draws_planes_and_probabilities(files, tmp_path, capsys):
    out, png = tmp_path / "m.safetensors", tmp_path / "m.png"
    assert find(files, out, "--store-logits") == 0
    assert sg.Mask.load(out).logits is not None
    assert main(["mask", "show", str(out), "--plot", str(png), "--layer", "head.weight"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(png)
    with Image.open(png) as image:
        assert image.width > 1000  # three panels
    assert main(["mask", "show", str(out), "--plot", str(png)]) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert main(["mask", "show", str(out), "--plot", str(png), "--overwrite"]) == 0
    assert main(["mask", "show", str(out), "--layer", "head.weight"]) == 2
    assert "error: layer: expected --plot FILE beside it" in capsys.readouterr().err
    assert find(files, tmp_path / "n", "--method", "snip", "--store-logits") == 2
    assert "store_logits: expected method oes, which has logits, got snip" in capsys.readouterr().err


def test_compare_prints_every_layer_and_chance(files, tmp_path, capsys):
    for seed in ("0", "1"):
        assert find(files, tmp_path / seed, "--method", "random", "--seed", seed) == 0
    capsys.readouterr()
    assert main(["mask", "compare", str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    shown = capsys.readouterr().out
    found = sg.masks.compare(*(sg.Mask.load(tmp_path / seed) for seed in ("0", "1")))
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    for layer in [*found.layers, found.total]:
        values = [f"{layer.first:,}", f"{layer.second:,}", f"{layer.both:,}", f"{layer.chance:,.1f}"]
        assert rows[layer.name][:5] == [*values, f"{layer.overlap:.2%}"]
        assert rows[layer.name][5:7] == [f"{layer.jaccard:.2%}", f"{layer.chance_jaccard:.2%}"]
        assert rows[layer.name][7] == f"{layer.sigmas:+.1f}"
    assert f"chance gives {found.total.chance:,.0f}" in shown
    assert f"{len(found.whole)} parameters that both keep whole are not counted" in shown
    assert main(["mask", "compare", str(tmp_path / "0"), str(tmp_path / "none")]) == 2
    assert "which is not there" in capsys.readouterr().err


@pytest.fixture
def snip(files, tmp_path):
    out = tmp_path / "snip.safetensors"
    assert find(files, out, "--method", "snip", "--sigma", "0.1", "--seed", "3") == 0
    return out


def test_transfer_to_another_photograph_and_size(files, snip, tmp_path, capsys):
    out = tmp_path / "moved.safetensors"
    command = ["mask", "transfer", str(snip), "-o", str(out), "--image", str(files / "smaller.png"), "--sigma", "0.2"]
    assert main([*command, "--weights", "keep"]) == 0
    assert "training starts from the mask's own weights" in capsys.readouterr().out
    before, moved = sg.Mask.load(snip), sg.Mask.load(out)
    assert all(torch.equal(values, before.weights[name]) for name, values in moved.weights.items())
    assert moved.recipe["image_sha256"] == hashlib.sha256((files / "smaller.png").read_bytes()).hexdigest()
    assert moved.recipe["noise"] == {"sigma": 0.2, "clip": True, "seed": 3}
    assert moved.recipe["z"] == before.recipe["z"]
    assert moved.recipe["transfer"]["weights"] == "keep"
    assert moved.recipe["transfer"]["from"]["image_sha256"] == before.recipe["image_sha256"]


def test_transfer_to_fresh_weights_and_another_width(snip, tmp_path, capsys):
    fresh, wide = tmp_path / "fresh", tmp_path / "wide"
    assert main(["mask", "transfer", str(snip), "-o", str(fresh), "--weights", "reinitialise", "--seed", "9"]) == 0
    assert "training starts from fresh weights" in capsys.readouterr().out
    moved = sg.Mask.load(fresh)
    assert [moved.recipe[part]["seed"] for part in ("z", "noise")] == [9, 9]
    net = sg.generators.build(moved.recipe["net"])
    assert moved.recipe["net"]["arguments"]["seed"] == 9
    assert torch.equal(moved.weights["head.weight"], net.head.weight[moved.tensors["head.weight"]].detach())
    assert main(["mask", "transfer", str(snip), "-o", str(wide), "--weights", "reinitialise", "--width", "tile",
                 "--channels", "8,12"]) == 0  # fmt: skip
    assert sg.Mask.load(wide).recipe["net"]["arguments"]["channels"] == [8, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '--weights'"),
        (["--weights", "both"], "expected weights as one of keep, reinitialise, got 'both'"),
        (["--weights", "keep", "--sigma", "25"], "sigma: expected a number in [0, 1], got 25, did you mean 25/255"),
        (["--weights", "keep", "--channels", "8,x"], "channels: expected widths such as 16,32,64, got '8,x'"),
        (["--weights", "reinitialise", "--channels", "8,12"], "use width='tile'"),
        (["--weights", "keep", "--image", "{f}/none.png"], "{f}/none.png"),
    ],
)
def test_transfer_refuses_in_one_line(files, snip, tmp_path, capsys, options, message):
    capsys.readouterr()
    out = tmp_path / "moved.safetensors"
    given = [option.replace("{f}", str(files)) for option in options]
    assert main(["mask", "transfer", str(snip), "-o", str(out), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.replace("{f}", str(files)) in line
    assert not out.exists()


def test_transfer_of_a_mask_that_does_not_know_its_network(tmp_path, capsys):
    sg.Mask({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "m")
    assert main(["mask", "transfer", str(tmp_path / "m"), "-o", str(tmp_path / "n"), "--weights", "reinitialise"]) == 2
    assert "mask: expected one whose recipe tells its network" in capsys.readouterr().err
