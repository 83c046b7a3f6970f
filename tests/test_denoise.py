"""The denoising flow: what it writes, what it says, and that it can be repeated."""

import json
import math
import os
import platform

import numpy as np
import pytest
import torch
import yaml
from pictures import png_file, tiff
from PIL import Image

import sparse_gen as sg
from sparse_gen.experiments import DenoiseConfig, DisconnectedError, denoise, memory
from sparse_gen.experiments.images import read_image

WIDTH, HEIGHT = 48, 40
SMALL = {"density": 0.6, "depth": 3, "channels": (4, 6), "search_steps": 12, "steps": 25, "every": 5, "threads": 1}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A photograph that a few steps can do something for: smooth, with an edge."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = np.stack([4 * x, 5 * y, 255 * (x > WIDTH // 2)], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("clean") / "clean.png"
    Image.fromarray(image).save(path)
    return path


class Listener:
    def __init__(self):
        self.starts, self.calls = [], []

    def __call__(self, stage, step, total, metrics):
        self.calls.append((stage, step, total, metrics))


@pytest.fixture(scope="module")
def run(clean, tmp_path_factory):
    """One run with noise added, as most tests here only look at it."""
    folder, listener = tmp_path_factory.mktemp("run") / "out", Listener()
    config = DenoiseConfig(image=os.path.relpath(clean), sigma=0.1, **SMALL)
    result = denoise(config, folder, on_start=listener.starts.append, progress=listener)
    return folder, result, listener


def test_every_file_is_there_and_nothing_else(run):
    folder, result, _ = run
    names = {"restored.png", "noisy.png", "report.png", "metrics.json", "mask.safetensors", "config.yaml", "plan.json"}
    assert set(os.listdir(folder)) == names
    assert set(result.files) == {folder / name for name in names}


def test_metrics_are_those_of_the_images(run, clean):
    folder, result, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.metrics
    truth = read_image(clean).pixels
    noisy = sg.inverse.add_noise(truth, 0.1, seed=0)
    mask = sg.Mask.load(folder / "mask.safetensors")
    net = sg.generators.build(mask.recipe["net"])
    z = sg.noise_input(32, (HEIGHT, WIDTH), seed=0)
    assert metrics["psnr_noisy"] == sg.fitting.psnr(noisy, truth).item()
    assert metrics["psnr_masked_untrained"] == sg.fitting.psnr(sg.masked_output(net, z, mask), truth).item()
    assert metrics["psnr"] == sg.fitting.psnr(result.image, truth).item()
    assert metrics["ssim"] == sg.fitting.ssim(result.image, truth).item()
    assert metrics["psnr_oracle_peak"] >= metrics["psnr"]
    assert metrics["psnr_oracle_peak_step"] in {0, 5, 10, 15, 20, 24, 25}
    assert metrics["psnr_oracle_peak_every"] == 5
    assert metrics["psnr"] > metrics["psnr_masked_untrained"] + 1  # it has learnt something


def test_metrics_say_how_they_came_about(run, clean):
    metrics = run[1].metrics
    network = sg.generators.Hourglass(channels=(4, 6), depth=3)
    assert metrics["total"] == sum(p.numel() for p in network.parameters())
    assert metrics["kept"] == math.floor(0.6 * metrics["total"])
    assert metrics["connected"] is True
    assert (metrics["search_steps"], metrics["steps"], metrics["seed"], metrics["depth"]) == (12, 25, 0, 3)
    assert (metrics["device"], metrics["precision"], metrics["threads"]) == ("cpu", "ieee", 1)
    assert (metrics["image_width"], metrics["image_height"]) == (WIDTH, HEIGHT)
    assert metrics["image_sha256"] == read_image(clean).sha256
    assert metrics["seconds_search"] > 0 and metrics["seconds_fit"] > 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["versions"]["numpy"] == np.__version__
    assert metrics["versions"]["python"] == platform.python_version()
    assert metrics["versions"]["sparse_gen"] == sg.__version__


def test_the_pictures_are_the_images(run, clean):
    folder, result, _ = run
    restored = read_image(folder / "restored.png").pixels
    assert (restored - result.image).abs().max() <= 0.5 / 255 + 1e-6
    noisy = sg.inverse.add_noise(read_image(clean).pixels, 0.1, seed=0)
    assert (read_image(folder / "noisy.png").pixels - noisy).abs().max() <= 0.5 / 255 + 1e-6
    with Image.open(folder / "report.png") as report:
        assert report.width > 1000


def test_the_start_says_what_is_coming(run):
    (start,) = run[2].starts
    assert (start.size, start.measured, start.precision) == ((HEIGHT, WIDTH), 3 * HEIGHT * WIDTH, "ieee")
    assert (start.kept, start.total) == (run[1].metrics["kept"], run[1].metrics["total"])
    assert 0 < start.seconds < 600


def test_progress_goes_through_search_and_fit_to_their_ends(run):
    calls = run[2].calls
    assert list(dict.fromkeys(stage for stage, *_ in calls)) == ["search", "fit"]
    for stage, total in {"search": 12, "fit": 25}.items():
        steps = [step for name, step, of, _ in calls if name == stage and of == total]
        assert steps == sorted(steps)
        assert steps[-1] == total
    assert "psnr" in calls[-1][3] and "loss" in calls[0][3]


def test_the_configuration_leaves_nothing_open(run, clean):
    saved = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert saved["image"] == str(clean.resolve())
    assert saved["image_sha256"] == read_image(clean).sha256
    assert (saved["device"], saved["threads"], saved["depth"]) == ("cpu", 1, 3)


def test_the_mask_file_tells_how_to_make_everything_again(run):
    recipe = sg.Mask.load(run[0] / "mask.safetensors").recipe
    assert recipe["net"]["class"] == "Hourglass"
    assert recipe["z"] == {"channels": 32, "scale": 0.1, "seed": 0}
    assert recipe["noise"] == {"sigma": 0.1, "clip": True, "seed": 0}


def test_the_saved_configuration_gives_the_same_bits_with_another_default_of_threads(run, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = denoise(DenoiseConfig.load(run[0] / "config.yaml"), tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again.image, run[1].image)
    for name in ("restored.png", "noisy.png", "config.yaml", "mask.safetensors", "report.png"):
        assert (tmp_path / "out" / name).read_bytes() == (run[0] / name).read_bytes(), name


def test_any_file_name_will_do(run, clean, tmp_path):
    image = tmp_path / "σ 日本 \n: #$x_$ \udcff.png"  # the last is what Python makes of a byte that is no UTF-8
    image.write_bytes(clean.read_bytes())
    config = DenoiseConfig.load(run[0] / "config.yaml").replace(image=str(image))
    denoise(config, tmp_path / "first")
    assert json.loads((tmp_path / "first" / "metrics.json").read_text())["image"] == str(image)
    again = denoise(DenoiseConfig.load(tmp_path / "first" / "config.yaml"), tmp_path / "again")
    assert torch.equal(again.image, run[1].image)


def test_another_seed_gives_another_image(run, tmp_path):
    config = DenoiseConfig.load(run[0] / "config.yaml").replace(seed=1)
    assert not torch.equal(denoise(config, tmp_path / "out").image, run[1].image)


def test_without_sigma_the_image_is_the_measurement(clean, tmp_path):
    result = denoise(DenoiseConfig(image=str(clean), **SMALL), tmp_path / "out")
    unknown = ("psnr_noisy", "psnr_masked_untrained", "psnr", "psnr_oracle_peak", "psnr_oracle_peak_step", "ssim")
    assert [result.metrics[name] for name in unknown] == [None] * 6
    assert not (tmp_path / "out" / "noisy.png").exists()
    assert len(result.files) == len(os.listdir(tmp_path / "out")) == 6


def test_no_noise_at_all_has_no_finite_psnr(clean, tmp_path):
    result = denoise(DenoiseConfig(image=str(clean), sigma=0, **SMALL), tmp_path / "out")
    assert result.metrics["psnr_noisy"] is None
    assert result.metrics["psnr"] is not None


def test_unclipped_noise_is_fitted_as_it_is(clean, tmp_path):
    config = DenoiseConfig(image=str(clean), sigma=0.3, clip=False, **SMALL)
    metrics = denoise(config, tmp_path / "out").metrics
    truth = read_image(clean).pixels
    assert metrics["psnr_noisy"] == sg.fitting.psnr(sg.inverse.add_noise(truth, 0.3, clip=False), truth).item()


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_alpha_come_back(clean, tmp_path, mode):
    with Image.open(clean) as image:
        image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)))
    image.save(tmp_path / "in.png")
    result = denoise(DenoiseConfig(image=str(tmp_path / "in.png"), sigma=0.1, **SMALL), tmp_path / "out")
    assert result.image.shape == (1, 1 if mode == "L" else 3, HEIGHT, WIDTH)
    for name in ("restored.png", "noisy.png"):
        with Image.open(tmp_path / "out" / name) as written:
            assert written.mode == mode
            if mode == "RGBA":
                np.testing.assert_array_equal(np.asarray(written)[..., 3], np.asarray(image)[..., 3])


KINDS = {
    "16-bit grey PNG": (".png", 1, np.uint16, ".png", np.uint16),
    "16-bit RGBA PNG": (".png", 4, np.uint16, ".png", np.uint16),
    "16-bit RGB TIFF": (".tif", 3, np.uint16, ".png", np.uint16),
    "float TIFF": (".tif", 3, np.float32, ".tif", np.float32),
    "float grey and alpha": (".tif", 2, np.float64, ".tif", np.float32),
    "palette": (".png", "P", np.uint8, ".png", np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_of_the_photographs_kind_and_depth(tmp_path, kind):
    suffix, channels, dtype, suffix_out, dtype_out = KINDS[kind]
    y, x = np.mgrid[0:21, 0:26]
    values = np.stack([x / 25, y / 20, (x + y) / 45, x * y / 500], axis=-1)
    path = tmp_path / f"in{suffix}"
    if channels == "P":
        Image.fromarray((255 * values[..., :3]).astype(np.uint8)).quantize(9).save(path)
        channels = 3
    else:
        values = values[..., :channels] * (np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1)
        path.write_bytes((png_file if suffix == ".png" else tiff)(values.astype(dtype), *[16] * (suffix == ".png")))
    config = DenoiseConfig(image=str(path), sigma=0.1, **SMALL | {"depth": 2})
    result = denoise(config, tmp_path / "out")
    photograph = read_image(path)
    for name, image in {
        "restored": result.image,
        "noisy": sg.inverse.add_noise(photograph.pixels, 0.1, seed=0),
    }.items():
        written = read_image(tmp_path / "out" / f"{name}{suffix_out}")
        assert (written.dtype, written.mode) == (np.dtype(dtype_out).name, photograph.mode)
        step = {np.uint8: 0.5 / 255, np.uint16: 0.5 / 65535, np.float32: 0}[dtype_out]
        assert (written.pixels - image).abs().max() <= step * 1.001 + (1e-7 if step else 0)
        if photograph.alpha is not None:
            np.testing.assert_array_equal(written.alpha, photograph.alpha)
    assert len(os.listdir(tmp_path / "out")) == 7


@pytest.mark.parametrize("size", [(5, 5), (5, 130), (97, 6), (31, 17)])
def test_tiny_and_odd_sizes(tmp_path, size):
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    config = DenoiseConfig(image=str(tmp_path / "in.png"), sigma=0.1, **SMALL | {"depth": None})
    result = denoise(config, tmp_path / "out")
    assert result.image.shape == (1, 3, *size)
    assert read_image(tmp_path / "out" / "restored.png").pixels.shape == (1, 3, *size)


def test_what_an_earlier_run_wrote_in_another_format_goes(clean, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("restored.tif", "noisy.tif"):
        (folder / name).write_bytes(b"old")
    denoise(DenoiseConfig(image=str(clean), **SMALL), folder, overwrite=True)
    assert not (folder / "restored.tif").exists() and not (folder / "noisy.tif").exists()
    assert (folder / "restored.png").exists()


def test_a_run_that_does_not_fit_into_memory_is_refused_before_it_starts(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda _: 10**6)
    with pytest.raises(
        ValueError, match=r"memory: expected a run that fits into the 1 MB available on cpu, got one of"
    ):
        denoise(DenoiseConfig(image=str(clean), device="cpu", **SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_deepest_depth_that_fits_is_taken(clean, tmp_path):
    starts = []
    config = DenoiseConfig(image=str(clean), **{**SMALL, "depth": None})
    denoise(config, tmp_path / "out", on_start=starts.append)
    assert starts[0].config.depth == sg.generators.deepest_depth((HEIGHT, WIDTH)) == 4


def cut_settings():
    """A density that leaves one convolution weight beside biases and norms, which are kept whole."""
    parameters = list(sg.generators.Hourglass(channels=(4, 6), depth=3).parameters())
    whole = sum(p.numel() for p in parameters if p.ndim == 1)
    return {**SMALL, "density": (whole + 1.5) / sum(p.numel() for p in parameters), "search_steps": 1}


def test_a_mask_that_disconnects_stops_before_the_training(clean, tmp_path):
    listener = Listener()
    with pytest.raises(DisconnectedError, match=r"got one that stops it at \w+.*, raise search_steps or density, or"):
        denoise(DenoiseConfig(image=str(clean), **cut_settings()), tmp_path / "out", progress=listener)
    assert {stage for stage, *_ in listener.calls} == {"search"}
    assert os.listdir(tmp_path / "out") == []


def test_force_trains_a_disconnected_mask_and_says_so(clean, tmp_path):
    with pytest.warns(sg.DisconnectedMaskWarning):
        result = denoise(DenoiseConfig(image=str(clean), force=True, **cut_settings()), tmp_path / "out")
    assert result.metrics["connected"] is False
    assert DenoiseConfig.load(tmp_path / "out" / "config.yaml").force is True


def test_overwriting_leaves_no_file_of_the_run_before(clean, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "noisy.png").write_bytes(b"old")
    (folder / "restored.png").write_bytes(b"old")
    (folder / "mine.txt").write_bytes(b"mine")
    config = DenoiseConfig(image=str(clean), **SMALL)
    with pytest.raises(FileExistsError, match="name another or add --overwrite"):
        denoise(config, folder)
    assert (folder / "restored.png").read_bytes() == b"old"
    denoise(config, folder, overwrite=True)
    assert not (folder / "noisy.png").exists()
    assert read_image(folder / "restored.png").pixels.shape == (1, 3, HEIGHT, WIDTH)
    assert (folder / "mine.txt").read_bytes() == b"mine"


def test_an_image_is_never_replaced_by_its_own_result(clean, tmp_path):
    image = tmp_path / "noisy.png"
    image.write_bytes(clean.read_bytes())
    with pytest.raises(ValueError, match=r"output: expected a folder whose results leave .*noisy\.png alone"):
        denoise(DenoiseConfig(image=str(image), **SMALL), tmp_path, overwrite=True)
    assert image.read_bytes() == clean.read_bytes()


def test_a_changed_image_is_noticed(clean, tmp_path):
    config = DenoiseConfig(image=str(clean), image_sha256="0" * 64, **SMALL)
    with pytest.raises(ValueError, match="image: expected the file with SHA-256 000000000000…, got"):
        denoise(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_makes_no_folder(clean, tmp_path):
    for name, value in {"image": "none.png", "depth": 9}.items():
        config = DenoiseConfig(**{"image": str(clean), **SMALL, name: value})
        with pytest.raises((ValueError, OSError)):
            denoise(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
def test_a_gpu_that_is_not_there_is_said(clean, tmp_path):
    with pytest.raises(ValueError, match=r"device: expected one that is there, got cuda, but PyTorch .*, use --device"):
        denoise(DenoiseConfig(image=str(clean), device="cuda", **SMALL), tmp_path / "out")
