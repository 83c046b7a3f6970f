"""`sparse-gen denoise --mask`: a mask found before in place of a search."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_gen as sg
from sparse_gen.cli import main

WIDTH, HEIGHT = 48, 40


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A photograph, settings that make a run take a second, and a mask of SNIP for both."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = np.stack([4 * x, 5 * y, 255 * (x > WIDTH // 2)], axis=-1).astype(np.uint8)
    Image.fromarray(image).save(folder / "photo.png")
    (folder / "quick.yaml").write_text("depth: 3\nchannels: [4, 6]\nsteps: 6\nevery: 2\nthreads: 1\nsigma: 0.1\n")
    find = ["mask", "find", str(folder / "photo.png"), "--config", str(folder / "quick.yaml"), "--density", "0.4"]
    assert main([*find, "--method", "snip", "-o", str(folder / "snip")]) == 0
    return folder


def denoise(files, out, *options, mask="snip"):
    given = ["--config", str(files / "quick.yaml"), "--mask", str(files / mask), "-o", str(out), *options]
    return main(["denoise", str(files / "photo.png"), *given])


def test_the_mask_and_its_weights_are_trained_and_nothing_is_searched(files, tmp_path, capsys):
    assert denoise(files, tmp_path / "out") == 0
    mask, written = (sg.Mask.load(path) for path in (files / "snip", tmp_path / "out" / "mask.safetensors"))
    assert all(torch.equal(keep, written.tensors[name]) for name, keep in mask.tensors.items())
    assert all(torch.equal(values, written.weights[name]) for name, values in mask.weights.items())
    assert written.recipe["search"]["method"] == "snip" and written.recipe["transfer"]["weights"] == "keep"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["search_steps"], metrics["kept"], metrics["total"]) == (0, mask.kept, mask.total)
    assert metrics["mask"] == str((files / "snip").resolve())
    assert "mask search" not in capsys.readouterr().err

    clean = torch.from_numpy(np.array(Image.open(files / "photo.png"))).permute(2, 0, 1)[None] / 255
    y, z = sg.inverse.add_noise(clean, 0.1, seed=0), sg.noise_input(32, (HEIGHT, WIDTH), seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fast = sg.compile(sg.generators.build(mask.recipe["net"]), mask, z, plan="rule")
        image = sg.fit(fast, z, y, steps=6, lr=1e-2).image
    finally:
        torch.set_num_threads(threads)
    # The run's plan is measured, and adds up in another order for six steps of Adam.
    assert metrics["psnr"] == pytest.approx(sg.fitting.psnr(image, clean).item(), abs=0.05)


def test_its_settings_do_it_again_and_refuse_another_mask(files, tmp_path, capsys):
    mask = tmp_path / "mask"
    mask.write_bytes((files / "snip").read_bytes())
    assert denoise(files, tmp_path / "a", mask=mask) == 0
    again = ["denoise", "--config", str(tmp_path / "a" / "config.yaml"), "-o"]
    assert main([*again, str(tmp_path / "b")]) == 0
    restored = [(tmp_path / name / "restored.png").read_bytes() for name in "ab"]
    assert restored[0] == restored[1]
    found = sg.Mask.load(mask)
    sg.Mask(found.tensors, whole=found.whole, recipe=found.recipe).save(mask)
    capsys.readouterr()
    assert main([*again, str(tmp_path / "c")]) == 2
    assert "mask: expected the file with SHA-256" in capsys.readouterr().err
    # Asked for by name it is taken, and, as it holds no weights, with those of the seed.
    assert main([*again, str(tmp_path / "c"), "--mask", str(mask)]) == 0
    written = sg.Mask.load(tmp_path / "c" / "mask.safetensors")
    assert written.recipe["transfer"]["weights"] == "reinitialise"
    assert (tmp_path / "c" / "restored.png").read_bytes() == restored[0]  # of the same seed


def test_an_interrupted_training_goes_on(files, tmp_path, capsys, monkeypatch):
    assert denoise(files, tmp_path / "whole") == 0
    store = sg.checkpoint.Checkpoints.store

    def stopping(self, name, identity, step, *args, **kwargs):
        if step == 4:
            self.request_stop()
        store(self, name, identity, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sg.checkpoint.Checkpoints, "store", stopping)
        assert denoise(files, tmp_path / "cut") == 130
    assert main(["denoise", "--resume", "-o", str(tmp_path / "cut")]) == 0
    assert "after step 4 of the training" in capsys.readouterr().out
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut")]
    assert metrics[0]["psnr"] == pytest.approx(metrics[1]["psnr"], abs=0.05)  # each measures a plan of its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0.1"], "mask: expected nothing about a search beside a mask, got --density, leave one out"),
        (["--density", "0.1", "--search-steps", "3"],
         "mask: expected nothing about a search beside a mask, got --density and --search-steps, leave one out"),
        (["--depth", "2"],
         "mask: expected one of the hourglass of depth 2 with 5,769 parameters, got {f}/snip of the hourglass of depth "
         "3 with 7,959, set generator, depth and channels as it has them, or move it with sparse-gen mask transfer"),
        (["--mask", "{f}/none"],
         "mask: expected a file that sparse-gen mask find wrote, got {f}/none, which is not one"),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line(files, tmp_path, capsys, options, message):
    given = [option.replace("{f}", str(files)) for option in options]
    assert denoise(files, tmp_path / "out", *given) == 2
    assert capsys.readouterr().err == f"error: {message.replace('{f}', str(files))}\n"
    assert not (tmp_path / "out").exists()


def test_it_refuses_a_file_that_is_no_mask(files, tmp_path, capsys):
    assert denoise(files, tmp_path / "out", mask="photo.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "photo.png" in line


@pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")
def test_a_mask_that_cuts_the_network_is_said(files, tmp_path, capsys):
    mask = sg.Mask.load(files / "snip")
    mask.tensors["head.weight"] = torch.zeros_like(mask.tensors["head.weight"])
    mask.weights["head.weight"] = torch.zeros(0)
    mask.save(tmp_path / "cut")
    assert denoise(files, tmp_path / "out", mask=tmp_path / "cut") == 2
    assert "lets a signal through, got one that stops it at head, name another, or train on" in capsys.readouterr().err
