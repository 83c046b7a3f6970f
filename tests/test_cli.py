"""The command line: cheap help, one line for every mistake, and runs that can be repeated."""

import importlib
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_gen as sg
from sparse_gen.cli import main
from sparse_gen.cli.denoise import merge_settings
from sparse_gen.cli.mask import density_bar
from sparse_gen.cli.times import format_seconds

WIDTH, HEIGHT = 48, 40
HEAVY = ("torch", "numpy", "matplotlib", "PIL", "skimage", "scipy", "safetensors", "triton", "yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A photograph, and settings that make a run take a second."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = np.stack([4 * x, 5 * y, 255 * (x > WIDTH // 2)], axis=-1).astype(np.uint8)
    Image.fromarray(image).save(folder / "photo.png")
    (folder / "quick.yaml").write_text(
        "density: 0.6\ndepth: 3\nchannels: [4, 6]\nsearch_steps: 12\nsteps: 25\nevery: 5\nthreads: 1\n"
    )
    return folder


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A first run, from the command line."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main(["denoise", str(files / "photo.png"), "--sigma", "0.1", "--seed", "3", "-o", str(folder),
                 "--config", str(files / "quick.yaml")]) == 0  # fmt: skip
    return folder


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


COMMANDS = ["", "bench", "denoise", "info", "mask", "mask compare", "mask find", "mask import", "mask show"]
COMMANDS += ["mask transfer", "sweep", "sweep run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_shows_an_example(command):
    code = f"""
import sys
from sparse_gen.cli import main
assert main({[*command.split(), "--help"]!r}) == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Example: sparse-gen " in done.stdout


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    assert "Usage: sparse-gen" in capsys.readouterr().out


def test_help_names_every_option_that_the_issue_asks_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["denoise", "--help"])
    shown = capsys.readouterr().out
    for option in ("-o", "--sigma", "--density", "--search-steps", "--steps", "--seed", "--device", "--depth",
                   "--config", "--clip", "--no-clip", "--force", "--overwrite", "--threads", "--stop", "--generator",
                   "--resume", "--checkpoint-seconds"):  # fmt: skip
        assert f" {option} " in shown, option


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("mask show", "Missing"),
        ("denoise {f}/photo.png -o {o} --frob 1", "--frob"),
        ("denoise {f}/photo.png -o", "-o"),
        ("denoise {f}/photo.png {f}/photo.png -o {o}", "photo.png"),
        ("frob", "frob"),
    ],
)
def test_mistakes_that_libraries_word_are_one_line_too(files, tmp_path, capsys, arguments, part):
    places = {"f": files, "o": tmp_path / "out"}
    assert main(arguments.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert part.format(**places) in error


def test_the_exit_code_reaches_the_shell_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "sparse_gen.cli", "denoise", "none\nthere.png", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: image: expected a PNG, JPEG or TIFF file, got none there.png, which is not there, check the name\n"
    )


def test_a_bug_keeps_its_traceback(files, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(sg.experiments, "denoise", broken)
    with pytest.raises(KeyError, match="ours"):
        main(["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out")])


def test_a_loss_that_is_not_finite_is_one_line(files, tmp_path, monkeypatch, capsys):
    def diverged(*_, **__):
        raise FloatingPointError("the search's loss is nan at step 7, lower lr")

    monkeypatch.setattr(sg, "search_mask", diverged)
    assert main(["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: the search's loss is nan at step 7, lower lr\n"


def test_a_run_says_what_it_will_do_and_what_came_out(files, tmp_path, capsys):
    arguments = ["denoise", str(files / "photo.png"), "--sigma", "0.1", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--config", str(files / "quick.yaml")]) == 0
    captured = capsys.readouterr()
    values = metrics(tmp_path / "out")
    lines = captured.out.splitlines()
    assert lines[0] == "device     cpu, fp32 ieee, 1 thread"
    assert lines[1] == "image      48 × 40 pixels, 5,760 values"
    assert lines[2] == "depth      3"
    ratio = values["kept"] / 5760
    assert lines[3] == (f"parameters {values['kept']:,} kept of {values['total']:,}, {ratio:.2f} per measured value")
    assert lines[4].startswith("time       about ")
    assert lines[5].startswith(f"warning: {ratio:.2f} parameters per measured value, above 0.3: the network will fit")
    assert f"{values['psnr']:.2f} dB" in captured.out
    assert "oracle peak, every 5 steps" in captured.out
    for path in (tmp_path / "out").iterdir():
        assert str(path) in lines
    assert "12/12" in captured.err and "25/25" in captured.err and "PSNR" in captured.err


def test_few_enough_parameters_are_not_warned_of(files, tmp_path, capsys):
    arguments = ["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out"), "--density", "0.2"]
    assert main([*arguments, "--config", str(files / "quick.yaml"), "--force"]) == 0
    assert "will fit the noise" not in capsys.readouterr().out


def test_the_written_configuration_runs_to_the_same_bits(run, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["denoise", "--config", str(run / "config.yaml"), "-o", str(tmp_path / "again")]) == 0
    finally:
        torch.set_num_threads(before)
    for name in ("restored.png", "noisy.png", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name
    first, again = (sg.Mask.load(folder / "mask.safetensors") for folder in (run, tmp_path / "again"))
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    times = ("seconds_search", "seconds_fit")
    assert {k: v for k, v in metrics(run).items() if k not in times} == {
        k: v for k, v in metrics(tmp_path / "again").items() if k not in times
    }


def test_options_win_over_the_configuration(run, files, tmp_path):
    out = tmp_path / "out"
    options = ["--steps", "7", "--seed", "4", "--no-clip", "--clip", "--depth", "2"]
    assert main(["denoise", "--config", str(run / "config.yaml"), "-o", str(out), *options]) == 0
    values = metrics(out)
    assert (values["steps"], values["seed"], values["depth"]) == (7, 4, 2)
    assert values["search_steps"] == 12


def test_another_image_may_be_given_beside_a_configuration(run, files, tmp_path):
    with Image.open(files / "photo.png") as image:
        image.convert("L").save(tmp_path / "grey.png")
    config = str(run / "config.yaml")
    assert main(["denoise", str(tmp_path / "grey.png"), "--config", config, "-o", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "restored.png") as written:
        assert written.mode == "L"


def test_merging_keeps_what_is_not_given():
    file = {"image": "a.png", "image_sha256": "0" * 64, "seed": 3, "clip": True}
    assert merge_settings(file, {"image": None, "seed": None, "clip": False}) == {**file, "clip": False}
    assert merge_settings(file, {"image": "b.png"}) == {"image": "b.png", "seed": 3, "clip": True}


def test_alpha_is_kept(files, run, tmp_path):
    alpha = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    with Image.open(files / "photo.png") as image:
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "alpha.png")
    config = str(run / "config.yaml")
    assert main(["denoise", str(tmp_path / "alpha.png"), "--config", config, "-o", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "restored.png") as written, Image.open(run / "restored.png") as opaque:
        np.testing.assert_array_equal(np.asarray(written)[..., 3], alpha)
        np.testing.assert_array_equal(np.asarray(written)[..., :3], np.asarray(opaque))


def cut_density() -> str:
    """What keeps one convolution weight beside biases and norms."""
    parameters = list(sg.generators.Hourglass(channels=(4, 6), depth=3).parameters())
    whole = sum(p.numel() for p in parameters if p.ndim == 1)
    return str((whole + 1.5) / sum(p.numel() for p in parameters))


@pytest.mark.filterwarnings("default::sparse_gen.masks.DisconnectedMaskWarning")
def test_a_disconnected_network_stops_unless_forced(files, tmp_path, capsys):
    arguments = ["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out"), "--density", cut_density()]
    arguments += ["--config", str(files / "quick.yaml")]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mask: expected one that lets a signal through, got one that stops it at ")
    resume = f"--resume -o {tmp_path / 'out'} --force"
    assert error.endswith(f"train on with force (go on with: sparse-gen denoise {resume})")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]

    assert main(["denoise", *resume.split()]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "the mask disconnects the network at" in warning
    assert metrics(tmp_path / "out")["connected"] is False


def test_mask_show_lists_every_layer(run, capsys):
    mask = sg.Mask.load(run / "mask.safetensors")
    assert main(["mask", "show", str(run / "mask.safetensors")]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for name, shape, kept, total in mask.layers():
        if name not in mask.whole:
            (line,) = [line for line in lines if line.startswith(f"{name} ")]
            assert line.split()[1:3] == ["×".join(map(str, shape)), f"{round(kept):,}"]
            assert line.split()[-1] == f"{kept / total:.2%}"
    assert f"{len(mask.whole)} more, kept whole" in shown
    assert f"{mask.kept:,} of {mask.total:,}" in shown
    recipe = next(line for line in lines if line.startswith("recipe "))
    assert json.loads(recipe.removeprefix("recipe ")) == mask.recipe


def test_mask_show_says_what_is_left_to_compute(run, capsys):
    assert main(["mask", "show", str(run / "mask.safetensors"), "--size", "40"]) == 0
    out = capsys.readouterr().out
    assert "forward at 40²" in out
    assert re.search(r"head +\d+ of \d+ +3 of 3", out)
    assert main(["mask", "show", str(run / "mask.safetensors"), "--size", "2"]) == 2


@pytest.mark.parametrize(
    ("density", "bar"), [(0, "    "), (1e-6, "▏   "), (0.25, "█   "), (0.5, "██  "), (0.53125, "██▏ "), (1, "████")]
)
def test_density_bars(density, bar):
    assert density_bar(density, 4) == bar


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_info_tells_versions_and_backends(capsys):
    from sparse_gen.ops.dispatch import backends, operators

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["sparse_gen"] == [sg.__version__]
    assert rows["torch"] == [torch.__version__]
    assert rows["python"] == [sys.version.split()[0]]
    assert {"triton", "numpy", "extension", "GPU", "processor", "threads"} <= rows.keys()
    assert {"philox", "concrete_mask"} <= set(operators())
    for operator in operators():
        found = backends(operator)
        assert rows["operator"] == list(found)
        assert rows[operator] == ["yes" if reason is None else "no" for reason in found.values()]
        for backend, reason in found.items():
            assert reason is None or f"no {backend}: {reason}" in shown


def test_info_says_why_there_is_no_extension(capsys, monkeypatch):
    from sparse_gen.ops import dispatch, extension

    missing = extension.ExtensionStatus(False, "no C++ compiler was found", {})
    monkeypatch.setattr(extension, "status", lambda: missing)
    monkeypatch.setattr(dispatch, "status", lambda: missing)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "none: no C++ compiler was found" in shown
    assert "no cpu: no C++ compiler was found" in shown


def test_the_public_entry_is_a_function_whatever_was_imported_before():
    importlib.import_module("sparse_gen.experiments.denoise")
    assert inspect.isfunction(sg.experiments.denoise)
