"""The command line's runs survive signals, kills and full disks, and go on to the bits of an undisturbed run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from pictures import stripes
from PIL import Image

import sparse_gen as sg
from sparse_gen.cli import main
from sparse_gen.cli.progress import StageBars
from sparse_gen.cli.signals import Interrupted, stop_on_signal
from sparse_gen.experiments.config import DenoiseConfig

SETTINGS = {"density": 0.6, "depth": 2, "channels": [4, 6], "search_steps": 12, "steps": 25, "every": 1, "threads": 1}
RESULTS = {"restored.png", "noisy.png", "report.png", "metrics.json", "mask.safetensors", "config.yaml", "plan.json"}
TIMES = ("seconds_search", "seconds_fit")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    image = stripes()
    Image.fromarray(image).save(folder / "photo.png")
    Image.fromarray(image[::-1]).save(folder / "other.png")
    (folder / "quick.yaml").write_text("\n".join(f"{name}: {value}" for name, value in SETTINGS.items()))
    return folder


def begin(files, out, *options):
    settings = ["--sigma", "0.1", "--stop", "wmv", "--config", str(files / "quick.yaml")]
    return ["denoise", str(files / "photo.png"), *settings, "-o", str(out), "--checkpoint-seconds", "0", *options]


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(begin(files, out)) == 0
    return out


def same_results(a, b):
    for name in RESULTS - {"metrics.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    return {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in second.items() if k not in TIMES}


@pytest.fixture
def at_step(monkeypatch):
    """Do something in the middle of a run, right after a step of a stage."""

    def arrange(stage, step, action):
        original = StageBars.__call__

        def call(self, name, done, total, metrics):
            original(self, name, done, total, metrics)
            if (name, done) == (stage, step):
                action()

        monkeypatch.setattr(StageBars, "__call__", call)

    return arrange


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "stage", "word", "step"),
    [(signal.SIGINT, 130, "search", "search", 5), (signal.SIGTERM, 143, "fit", "fit", 17)],
)
def test_a_signal_stores_the_run_which_goes_on_to_the_same_files(
    files, undisturbed, tmp_path, capsys, at_step, monkeypatch, number, code, stage, word, step
):
    out = tmp_path / "the results"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at_step(stage, step, send(number))
    assert main(begin(files, out)) == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped after step {step} of the {word}, which is stored in {out / 'checkpoints'}; "
        f"go on with: sparse-gen denoise --resume -o '{out}'"
    )
    assert [path.name for path in out.iterdir()] == ["checkpoints"]
    monkeypatch.undo()

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # not those of the run, which are taken from its settings
    try:
        assert main(["denoise", "--resume", "-o", str(out)]) == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().out
    assert re.search(
        f"^resumed +after step {step} of the {'mask search' if stage == 'search' else 'training'}$", shown, re.M
    )
    assert {path.name for path in out.iterdir()} == RESULTS
    assert same_results(out, undisturbed)


def test_a_killed_process_goes_on(files, undisturbed, tmp_path, capsys):
    """As a process of its own: SIGKILL in the search, then SIGINT, then to the end, with the first sessions' time."""
    out = tmp_path / "out"
    long = ["--search-steps", "12", "--steps", "100000"]
    command = [sys.executable, "-m", "sparse_gen.cli", *begin(files, out, *long)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:  # fmt: skip
        while not list(out.glob("checkpoints/fit-*")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"stopped after step \d+ of the fit, which is stored in .*; go on with: sparse-gen denoise "
                        rf"--resume -o {out}", error.splitlines()[-1])  # fmt: skip
    assert "Traceback" not in error

    # The same folder as a SIGKILL leaves it: half of a file beside whole ones.
    (out / "checkpoints" / ".fit-000000099.safetensors.0123abcd.part").write_bytes(b"half")
    for path in out.glob("checkpoints/fit-*"):
        path.unlink()
    settings = out / "checkpoints" / "config.yaml"
    settings.write_text(settings.read_text().replace("steps: 100000", "steps: 25"))
    assert main(["denoise", "--resume", "-o", str(out)]) == 0
    capsys.readouterr()
    assert {path.name for path in out.iterdir()} == RESULTS
    assert same_results(out, undisturbed)


def test_seconds_of_earlier_sessions_count(files, tmp_path, at_step, monkeypatch):
    out = tmp_path / "out"
    seconds = []
    at_step("fit", 20, send(signal.SIGTERM))
    assert main(begin(files, out)) == 143
    monkeypatch.undo()
    for stage in ("search", "fit"):
        checkpoints = sg.Checkpoints(out / "checkpoints", resume=True)
        monkeypatch.setattr("sparse_gen.checkpoint._check_same", lambda *_: None)
        checkpoints.load(stage, {})
        seconds.append(checkpoints.seconds_before(stage))
    assert main(["denoise", "--resume", "-o", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert min(seconds) > 0
    assert [metrics[name] >= round(value, 3) for name, value in zip(TIMES, seconds, strict=True)] == [True, True]


def test_a_second_signal_ends_at_once(files, tmp_path, capsys, at_step, monkeypatch):
    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    at_step("search", 3, twice)
    assert main(begin(files, tmp_path / "out")) == 143
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"interrupted; go on with: sparse-gen denoise --resume -o {tmp_path / 'out'}"
    monkeypatch.undo()
    assert main(["denoise", "--resume", "-o", str(tmp_path / "out")]) == 0


def test_handlers_are_put_back_and_left_alone_in_other_threads():
    before = signal.getsignal(signal.SIGTERM)
    asked = []
    with pytest.raises(Interrupted), stop_on_signal(lambda: asked.append(1)) as received:
        assert signal.getsignal(signal.SIGTERM) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        assert (asked, received.code) == ([1], 143)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

    seen = []

    def elsewhere():
        with stop_on_signal(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture(scope="module")
def unfinished(files, tmp_path_factory):
    """A run that was stopped after 5 steps of its search."""
    out = tmp_path_factory.mktemp("unfinished") / "out"

    class StopAt(sg.Checkpoints):
        def store(self, name, identity, step, *args, **kwargs):
            if step == 5:
                self.request_stop()
            super().store(name, identity, step, *args, **kwargs)

    config = DenoiseConfig(image=str(files / "photo.png"), sigma=0.1, stop="wmv", **SETTINGS)
    with pytest.raises(sg.RunInterrupted):
        sg.experiments.denoise(config, out, checkpoints=StopAt(out / "checkpoints", seconds=0))
    return out


REFUSED = {
    "nothing there": (
        "denoise --resume -o {new}",
        "resume: expected a folder with an unfinished run, got {new} with none, name another or leave --resume out",
    ),
    "finished": (
        "denoise --resume -o {done}",
        "resume: expected a folder with an unfinished run, got {done} with a finished one, "
        "name another or leave --resume out",
    ),
    "no folder named": (
        "denoise --resume",
        "output: expected a folder for the results, got none, add -o DIR",
    ),
    "both": (
        "denoise --resume --overwrite -o {run}",
        "resume: expected --resume or --overwrite, got both, leave one out",
    ),
    "settings": (
        "denoise --resume -o {run} --density 0.5 --seed 4 --steps 25",
        "resume: expected the settings of the run in {run}, got density = 0.5 instead of 0.6, seed = 4 instead of 0, "
        "leave them out or name another folder",
    ),
    "threads": (
        "denoise --resume -o {run} --threads 2",
        "resume: expected the settings of the run in {run}, got threads = 2 instead of 1, "
        "leave them out or name another folder",
    ),
    "not resumed": (
        "denoise {f}/photo.png -o {run}",
        "output: expected a new or empty folder, got {run} with an unfinished run in it, "
        "add --resume to go on with it or --overwrite to begin anew",
    ),
    "seconds": (
        "denoise {f}/photo.png -o {new} --checkpoint-seconds -1",
        "expected the seconds between checkpoints from 0 on, got -1.0",
    ),
    "stop": (
        "denoise {f}/photo.png -o {new} --stop early",
        "stop: expected none, wmv or emv, got 'early', use one of them",
    ),
    "generator": (
        "denoise {f}/photo.png -o {new} --generator unet",
        "generator: expected hourglass, skip or decoder, got 'unet', use one of them",
    ),
    "depth of another generator": (
        "denoise {f}/photo.png -o {new} --generator decoder --depth 9",
        "depth: expected at most 4 for an image of 28 × 24 pixels, got 9, lower it or leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(files, undisturbed, unfinished, tmp_path, capsys, name):
    arguments, message = REFUSED[name]
    places = {"f": files, "new": tmp_path / "new", "done": undisturbed, "run": unfinished}
    before = sorted((path, path.read_bytes()) for path in unfinished.rglob("*") if path.is_file())
    assert main(arguments.format(**places).split()) == 2
    assert capsys.readouterr().err == f"error: {message.format(**places)}\n"
    assert sorted((path, path.read_bytes()) for path in unfinished.rglob("*") if path.is_file()) == before
    assert not (tmp_path / "new").exists()


def test_another_image_is_refused(files, unfinished, capsys):
    assert main(["denoise", str(files / "other.png"), "--resume", "-o", str(unfinished)]) == 2
    error = capsys.readouterr().err
    assert f"the run in {unfinished}, got image = " in error and "image_sha256 = " in error


def test_damaged_settings_are_one_line(unfinished, tmp_path, capsys):
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes((unfinished / "checkpoints" / "config.yaml").read_bytes()[:-300] + b": [")
    assert main(["denoise", "--resume", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config: expected lines like") and error.count("\n") == 1


def test_a_full_disk_is_one_line_and_loses_nothing(files, undisturbed, tmp_path, capsys, monkeypatch):
    """Full in the search, then full when the results are written; then there is room again."""
    out, write, room = tmp_path / "out", os.replace, {"search-000000005.safetensors": False}
    resume = f"go on with: sparse-gen denoise --resume -o {out}"

    def replace(source, target):
        name = os.path.basename(target)
        if not room.get(name, True):
            raise OSError(28, "No space left on device", str(target))
        return write(source, target)

    monkeypatch.setattr("os.replace", replace)
    assert main(begin(files, out)) == 2
    full = out / "checkpoints" / "search-000000005.safetensors"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: No space left on device: {full}; {resume}"
    assert (out / "checkpoints" / "search-000000004.safetensors").exists()

    room.clear()
    room["report.png"] = False
    assert main(["denoise", "--resume", "-o", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: No space left on device: {out / 'report.png'}; {resume}"
    assert not list(out.glob("*.part"))

    room.clear()
    assert main(["denoise", "--resume", "-o", str(out)]) == 0
    assert same_results(out, undisturbed)


def test_a_folder_that_is_gone_is_one_line(files, tmp_path, capsys, at_step):
    out, gone = tmp_path / "out", tmp_path / "gone"
    at_step("search", 3, lambda: out.rename(gone))
    assert main(begin(files, out)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: expected the folder {out / 'checkpoints'} to store the run in, which is gone"
    )
    assert not out.exists() and (gone / "checkpoints" / "search-000000002.safetensors").exists()


def test_overwriting_keeps_the_earlier_results_until_the_new_ones_are_there(
    files, undisturbed, tmp_path, at_step, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    earlier = {name: (undisturbed / name).read_bytes() for name in RESULTS}
    for name, content in earlier.items():
        (out / name).write_bytes(content)
    at_step("fit", 3, send(signal.SIGTERM))
    assert main(begin(files, out, "--overwrite", "--seed", "9")) == 143
    assert {name: (out / name).read_bytes() for name in RESULTS} == earlier
    # Begun anew, it does not take up what the interrupted run stored.
    assert main(begin(files, out, "--overwrite", "--seed", "8")) == 143
    monkeypatch.undo()
    assert main(["denoise", "--resume", "-o", str(out)]) == 0
    assert DenoiseConfig.load(out / "config.yaml").seed == 8
    assert (out / "restored.png").read_bytes() != earlier["restored.png"]


@pytest.mark.parametrize("generator", ["skip", "decoder"])
def test_other_generators_and_options(files, tmp_path, capsys, generator):
    options = ["--generator", generator, "--stop", "emv"]
    (tmp_path / "more.yaml").write_text(
        "search_steps: 4\nsteps: 12\ndensity: 0.5\nchannels: [8]\naverage: 0.9\ninput_jitter: 0.03\nrings: null\n"
        "stop_alpha: 0.5\nstop_patience: 3\nthreads: 1\nprunable: all\nforce: true\n"
    )
    arguments = [
        "denoise",
        str(files / "photo.png"),
        "--sigma",
        "0.1",
        "--config",
        str(tmp_path / "more.yaml"),
        *options,
    ]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    net = sg.generators.build(sg.Mask.load(tmp_path / "out" / "mask.safetensors").recipe["net"])
    assert type(net).__name__ == {"skip": "Skip", "decoder": "DeepDecoder"}[generator]
    saved = DenoiseConfig.load(tmp_path / "out" / "config.yaml")
    assert (saved.channels, saved.input_channels, saved.depth) == ((8,), net.in_channels, net.depth)
    assert metrics["stop"] == "emv" and 0 <= metrics["stop_selected_step"] < 12
    assert metrics["psnr_stopped"] == metrics["psnr"] != metrics["psnr_last"]
    assert f"PSNR restored (EMV, step {metrics['stop_selected_step']})" in shown
    assert f"{metrics['psnr_last']:.2f} dB" in shown
