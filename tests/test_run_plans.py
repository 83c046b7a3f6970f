"""A run's folder holds the plans of its two stages, and a resume or a re-run goes by them or refuses."""

import json

import pytest
import torch
from pictures import stripes
from PIL import Image

from sparse_gen.checkpoint import Checkpoints, RunInterrupted
from sparse_gen.cli import main
from sparse_gen.engine import measure
from sparse_gen.experiments import DenoiseConfig, denoise
from sparse_gen.experiments.stage_plans import read_plans
from sparse_gen.ops.extension import status

pytestmark = pytest.mark.skipif(not status().available, reason="no compiled library, so that nothing is chosen")
SETTINGS = {"density": 0.6, "depth": 2, "channels": [4, 6], "search_steps": 6, "steps": 12, "every": 1, "threads": 1}


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Another machine at every call: a cache of its own, and a clock on which one layout wins."""

    def other(fastest):
        monkeypatch.setattr(measure, "_memories", {})
        monkeypatch.setenv("SPARSE_GEN_CACHE", str(tmp_path / f"cache of {fastest}"))
        monkeypatch.setattr(
            measure,
            "layout_times",
            lambda stage, layouts, dtype: {layout: 1.0 if layout == fastest else 9.0 for layout in layouts},
        )

    return other


@pytest.fixture
def settings(tmp_path):
    Image.fromarray(stripes()).save(tmp_path / "photo.png")
    return DenoiseConfig(image=str(tmp_path / "photo.png"), sigma=0.1, **SETTINGS)


def kernels(out):
    return {stage: plan.layouts for stage, plan in read_plans(out / "plan.json").items()}


def test_a_rerun_goes_by_the_plans_beside_its_settings(tmp_path, settings, clock, capsys):
    clock("dense")
    denoise(settings, tmp_path / "first")
    clock("taps")
    for name, options in {"again": [], "other": ["--seed", "1"]}.items():
        config = str(tmp_path / "first" / "config.yaml")
        assert main(["denoise", "--config", config, "-o", str(tmp_path / name), *options]) == 0
    assert kernels(tmp_path / "again") == kernels(tmp_path / "first") != kernels(tmp_path / "other")
    for name in ("restored.png", "plan.json", "mask.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert "dense" in str(kernels(tmp_path / "first")) and "taps" in str(kernels(tmp_path / "other"))


@pytest.mark.parametrize("stage", ["search", "fit"])
def test_a_resume_goes_by_the_plans_it_began_with(tmp_path, settings, clock, stage):
    clock("dense")
    denoise(settings, tmp_path / "undisturbed")
    out = tmp_path / "out"
    checkpoints = Checkpoints(out / "checkpoints", seconds=0)

    def stop(name, step, total, metrics):
        if (name, step) == (stage, 4):
            checkpoints.request_stop()

    with pytest.raises(RunInterrupted):
        denoise(settings, out, checkpoints=checkpoints, progress=stop)
    clock("taps")
    denoise(settings, out, checkpoints=Checkpoints(out / "checkpoints", seconds=0, resume=True))
    found, expected = kernels(out), kernels(tmp_path / "undisturbed")
    assert found["search"] == expected["search"]
    assert (found["fit"] == expected["fit"]) == (stage == "fit")  # a training that had not begun has no plan yet
    assert (out / "mask.safetensors").read_bytes() == (tmp_path / "undisturbed" / "mask.safetensors").read_bytes()
    if stage == "fit":
        assert (out / "restored.png").read_bytes() == (tmp_path / "undisturbed" / "restored.png").read_bytes()
    assert not (out / "checkpoints").exists()


def test_plans_of_another_instruction_set_are_refused(tmp_path, settings, clock, capsys, monkeypatch):
    denoise(settings, tmp_path / "first")
    capsys.readouterr()
    if status().instruction_set == "baseline":
        pytest.skip("there is no lower instruction set")
    used = status().instruction_set
    monkeypatch.setenv("SPARSE_GEN_ISA", "baseline")
    command = ["denoise", "--config", str(tmp_path / "first" / "config.yaml"), "-o", str(tmp_path / "again")]
    assert main(command) == 2
    plans = tmp_path / "first" / "plan.json"
    assert capsys.readouterr().err.splitlines() == [
        f"error: plan: expected a run of this machine's baseline, got {plans} of one with {used}, remove it to "
        "measure anew, with other bits"
    ]
    assert not (tmp_path / "again").exists()
    plans.write_text("{")
    assert main(command) == 2
    assert "which is damaged, remove it" in capsys.readouterr().err
    plans.unlink()
    assert main(command) == 0


def test_plain_pytorch_on_request(tmp_path, settings, capsys):
    command = ["denoise", settings.image, "--sigma", "0.1", "--config", str(tmp_path / "s.yaml")]
    settings.replace(steps=3, search_steps=3).save(tmp_path / "s.yaml")
    assert main([*command, "--engine", "reference", "-o", str(tmp_path / "plain")]) == 0
    plans = read_plans(tmp_path / "plain" / "plan.json")
    assert {kernel for plan in plans.values() for kernel in plan.layouts[0]} == {"PyTorch"}
    assert DenoiseConfig.load(tmp_path / "plain" / "config.yaml").engine == "reference"
    assert main([*command, "--engine", "fast", "-o", str(tmp_path / "no")]) == 2
    assert "engine: expected auto or reference, got 'fast', use one of them" in capsys.readouterr().err


def test_threads_and_machine_are_stored(tmp_path, settings):
    denoise(settings, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "plan.json").read_text())
    for stage in ("search", "fit"):
        machine = stored[stage]["machine"]
        assert (machine["threads"], machine["torch"]) == (1, torch.__version__)
        assert machine["instruction_set"] == status().instruction_set


def test_plans_of_another_gpu_are_refused(tmp_path, settings, monkeypatch):
    """Whatever its instruction set: another card has other fastest layouts, and other bits."""
    denoise(settings, tmp_path / "first")
    path = tmp_path / "first" / "plan.json"
    stored = json.loads(path.read_text())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card A")
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")

    def names(name):
        for stage in ("search", "fit"):
            stored[stage]["machine"]["gpu"] = name
        path.write_text(json.dumps(stored))

    with pytest.raises(ValueError, match=r"plan: expected a run of this machine's Card A, got .* of one with CPU, rem"):
        read_plans(path, gpu)
    names("Card B")
    with pytest.raises(ValueError, match=r"machine's Card A, got .* of one with Card B, remove it to measure anew"):
        read_plans(path, gpu)
    with pytest.raises(ValueError, match=r"machine's CPU, got .* of one with Card B"):
        read_plans(path, cpu)
    names("Card A")
    assert read_plans(path, gpu).keys() == read_plans(path).keys() == {"search", "fit"}
