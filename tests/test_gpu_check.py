"""`scripts/gpu_check.py`: what can be tried out without a GPU."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return script.main()


def test_all_parts_fit_into_nine_minutes(script):
    assert sum(script.PARTS.values()) <= 9 * 60
    assert all(callable(getattr(script, f"check_{part}")) for part in script.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check on")
def test_without_a_gpu_it_says_so(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "expected a CUDA device and a torch that can use it, got none\n"
    assert not (tmp_path / "out").exists()


def test_one_part_alone(monkeypatch, script, tmp_path):
    assert run(monkeypatch, script, tmp_path, "--device", "cpu", "machine") == 0
    records = json.loads((tmp_path / "machine-cpu.json").read_text())
    assert [record["case"] for record in records] == ["copy", "matmul 256, ieee"]
    assert all(record["median_ms"] > 0 for record in records)
    assert list(json.loads((tmp_path / "summary.json").read_text())["parts"]) == ["machine"]


def test_a_part_that_fails_or_takes_too_long_fails_the_check(monkeypatch, script, tmp_path):
    monkeypatch.setattr(script, "PARTS", {"tests": 1, "build": 60})
    monkeypatch.setattr(
        script,
        "check_tests",
        lambda *a, only: script._run([sys.executable, "-c", "import time; time.sleep(9)"], a[3], a[4]),
    )
    monkeypatch.setattr(
        script, "check_build", lambda *a: script._run([sys.executable, "-c", "raise SystemExit(3)"], a[3], a[4])
    )
    assert run(monkeypatch, script, tmp_path, "--device", "cpu") == 1
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert parts["tests"]["reason"].startswith("took more than 1 s")
    assert parts["build"]["reason"].startswith("exit status 3")


def test_a_picture_that_is_no_better_fails(monkeypatch, script, tmp_path):
    def denoise(command, _log, _seconds):
        folder = Path(command[command.index("-o") + 1])
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"psnr_noisy": 20.0, "psnr_last": 23.5}))

    monkeypatch.setattr(script, "_run", denoise)
    assert run(monkeypatch, script, tmp_path, "--device", "cpu", "restore") == 1
    reason = json.loads((tmp_path / "summary.json").read_text())["parts"]["restore"]["reason"]
    assert reason == "seed 0 ends 3.50 dB above the noisy picture, expected 4 dB or more"


def test_a_benchmark_that_takes_too_long_is_told_and_one_that_is_wrong_fails(monkeypatch, script, tmp_path):
    """What was measured in time counts; a wrong number does not wait for the rest."""
    called = []

    def suite(command, _log, _seconds):
        called.append(command)
        name = next(part for part in command if part.startswith("bench/"))
        return reasons.get(name.removeprefix("bench/bench_").removesuffix(".py"))

    monkeypatch.setattr(script, "_run", suite)
    reasons = {"end_to_end": "took more than 3 s, see log", "norm_act": "exit status 5, see log"}
    arguments = (tmp_path, "--device", "cpu", "bench", "--only", "256")
    assert run(monkeypatch, script, *arguments) == 0
    part = json.loads((tmp_path / "summary.json").read_text())["parts"]["bench"]
    assert part["passed"] and part["cut_off"] == "not finished in the time there was: end_to_end"
    assert len(called) == len(script.SUITES)
    assert all(command[-2:] == ["-k", "256"] for command in called)
    reasons["masked_adam"] = "exit status 1, see log"
    assert run(monkeypatch, script, *arguments) == 1
    part = json.loads((tmp_path / "summary.json").read_text())["parts"]["bench"]
    assert part["reason"] == "masked_adam: exit status 1, see log"


def test_every_suite_that_has_a_place_on_a_gpu_is_in_the_check(script):
    files = {path.stem.removeprefix("bench_") for path in (SCRIPT.parent.parent / "bench").glob("bench_*.py")}
    assert set(script.SUITES) == files - {"import"}


@pytest.fixture(params=["foreground", "background"])
def interrupts(request):
    """A shell's background processes ignore Ctrl-C."""
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN if request.param == "background" else signal.default_int_handler
    )
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_what_takes_too_long_may_write_what_it_has(script, tmp_path):
    """As pytest does upon Ctrl-C."""
    code = f"""
import time
try:
    print(1, flush=True), time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "kept")!r}, "w").write("figures")
"""
    with open(tmp_path / "log", "w") as log:
        assert script._run([sys.executable, "-c", code], log, 2).startswith("took more than 2 s")
    assert (tmp_path / "kept").read_text() == "figures"


def test_an_unknown_part(monkeypatch, script, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, script, tmp_path, "--device", "cpu", "engine")
    assert error.value.code == 2
    assert "expected parts out of build, tests, machine, bench, restore, got engine" in capsys.readouterr().err
