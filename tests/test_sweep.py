"""Sweeps: everything is done once, whatever is killed, and the table says what was measured."""

import csv
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from pictures import stripes
from PIL import Image

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints
from sparse_gen.cli import main
from sparse_gen.experiments.environment import use_threads
from sparse_gen.experiments.images import read_image
from sparse_gen.experiments.plan import Plan
from sparse_gen.experiments.shards import Shard, read_rows
from sparse_gen.experiments.sweep import settle, sweep
from sparse_gen.experiments.sweep_folder import SweepFolder
from sparse_gen.experiments.table import group, markdown, table_rows
from sparse_gen.masks.random import random_mask

pytestmark = pytest.mark.usefixtures("eight_processors")

PLAN = """
images: [a.png, b.png]
sigmas: [0.1, 0.2]
seeds: [0, 1]
densities: [0.5]
generators: {small: {generator: hourglass, depth: 2, channels: [4, 6]}}
budget: 24
every: 4
device: cpu
threads: 1
methods:
  OES: {method: oes, search_steps: 8, lr: 1e-2}
  random: {lr: 1e-2}
  dense: {lr: 1e-2, stop: wmv, stop_window: 3, stop_patience: 6}
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    image = stripes()
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image[::-1, :, ::-1]).save(folder / "b.png")
    (folder / "plan.yaml").write_text(PLAN)
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def unkilled(plan_file, tmp_path_factory):
    """All 24 experiments by one worker that nothing disturbs."""
    out = tmp_path_factory.mktemp("unkilled") / "out"
    seen = []
    status = sweep(Plan.load(plan_file), out, workers=1, progress=seen.append)
    assert (status.total, status.done, status.failed, status.left) == (24, 24, 0, 0)
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    assert any(s.seconds_left for s in seen[:-1]) and seen[-1].seconds_left == 0
    return out


def results(folder):
    """Everything that was measured, without times, by experiment."""
    rows = read_rows(folder / "results")
    return {
        key: {name: v for name, v in row["results"].items() if not name.startswith("seconds")}
        for key, row in rows.items()
    }


def without_times(folder):
    with open(folder / "table.csv", newline="") as file:
        return [{name: v for name, v in row.items() if "seconds" not in name} for row in csv.DictReader(file)]


def count_rows(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("results/*.jsonl"))


def test_a_sweep_killed_twice_and_then_stopped_ends_as_an_unkilled_one(plan_file, unkilled, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparse_gen.cli", "sweep", "run", str(plan_file), "-o", str(out)]
    command += ["--workers", "2", "--checkpoint-seconds", "0"]
    moment = random.Random(1)
    for rows, number in [(3, signal.SIGKILL), (8, signal.SIGKILL), (12, signal.SIGTERM)]:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            while count_rows(out) < rows:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.1 * moment.random())
            os.killpg(process.pid, number)
            _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    done = count_rows(out)
    assert 12 <= done < 24
    assert error.splitlines()[-1] == (f"stopped with {done} of 24 done; go on with: sparse-gen sweep run -o {out}")
    # Two were at work; what they had done is stored, and other experiments are done or have not begun.
    begun = [path.parent.name for path in out.glob("checkpoints/*/*.safetensors")]
    assert 1 <= len(set(begun)) <= 4

    assert main(["sweep", "status", str(out)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["done"], shown["running"], shown["left"]) == (f"{done} of 24", "0", str(24 - done))
    assert int(shown["interrupted"]) >= len(set(begun))
    assert re.fullmatch(r"left +about \d+ s", shown["time"])

    for _ in range(2):  # the second finds nothing to do
        assert main(["sweep", "run", "-o", str(out), "--workers", "2"]) == 0
        assert capsys.readouterr().out.startswith("done         24 of 24\nrunning      0\nleft         0\n")
    assert results(out) == results(unkilled)
    assert count_rows(out) == 24
    assert list((out / "checkpoints").iterdir()) == []

    tables = []
    for folder in (out, unkilled):
        assert main(["sweep", "table", str(folder)]) == 0
        tables.append(without_times(folder))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 12 and {row["done"] for row in tables[0]} == {"2"}


@pytest.fixture
def one_thread():
    """The workers' thread count, on which bits depend."""
    with use_threads(1):
        yield


def test_what_is_measured_is_what_the_library_gives(plan_file, unkilled, one_thread):
    rows = read_rows(unkilled / "results")
    for e in SweepFolder.open(unkilled).experiments():
        if (e.image, e.config.sigma, e.config.seed) != ("b", 0.2, 1):
            continue
        clean = read_image(e.config.image).pixels
        y = sg.inverse.add_noise(clean, 0.2, seed=1)
        z = sg.noise_input(32, (24, 28), seed=1)
        net = sg.generators.Hourglass(channels=(4, 6), depth=2, seed=1)
        found = rows[e.key]["results"]
        steps, stop, module = 24, None, sg.compile(net, None, z, plan="rule")
        if e.method == "OES":
            mask = sg.search_mask(net, z, y, density=0.5, steps=8, seed=1, every=4, plan="rule").mask
            assert found["psnr_masked_untrained"] == sg.fitting.psnr(sg.masked_output(net, z, mask), clean).item()
            steps, module = 16, sg.compile(net, mask, z, plan="rule")
        elif e.method == "random":
            module = sg.compile(net, random_mask(net, 0.5, seed=1), z, plan="rule")
        run = sg.fit(module, z, y, steps=steps, lr=1e-2, clean=clean, stop=stop, every=4, seed=1)
        curve = [*run.history["psnr"][:, 0].tolist(), sg.fitting.psnr(run.image, clean).item()]
        assert found["psnr_noisy"] == sg.fitting.psnr(y, clean).item()
        assert found["psnr_last"] == curve[-1]
        assert found["psnr_oracle_peak"] == max(curve)
        assert found["psnr_oracle_peak_step"] == [*run.history.step, steps][curve.index(max(curve))]
        assert found["psnr_by_step"] == [round(value, 4) for value in curve]
        assert found["psnr_steps"] == [*run.history.step, steps]
        assert found["ssim_last"] == sg.fitting.ssim(run.image, clean).item()
        assert (found["steps_search"], found["steps_fit"]) == (24 - steps, steps)
        assert (found["threads"], found["device"], found["connected"]) == (1, "cpu", True)


def test_masks_of_other_methods_are_those_of_find(plan_file, tmp_path, one_thread):
    """One experiment each, in this process; a network that a mask cuts is an error."""
    from sparse_gen.experiments.denoise import DisconnectedError
    from sparse_gen.experiments.methods import run_experiment

    options = {
        "magnitude": {}, "snip": {"scope": "layer"}, "grasp": {"floor": 3}, "synflow": {"rounds": 4},
        "imp": {"search_steps": 9, "rounds": 2},
    }  # fmt: skip
    methods = {name: {"lr": 1e-2, **own} for name, own in options.items()}
    plan = Plan.load(plan_file).replace(
        methods=methods, sigmas=[0.1], seeds=[0], images=[str(plan_file.parent / "a.png")]
    )
    asked = {
        **options, "imp": {"steps": 4, "schedule": [0.5**0.5, 0.5], "lr": 1e-2, "every": 4, "plan": "rule"},
    }  # fmt: skip
    spent = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 4, "imp": 8}
    for e in plan.unfold():
        seen = []
        found = run_experiment(e, Checkpoints(tmp_path / e.method), lambda done, total, seen=seen: seen.append(done))
        clean = read_image(e.config.image).pixels
        y, z = sg.inverse.add_noise(clean, 0.1, seed=0), sg.noise_input(32, (24, 28), seed=0)
        net = sg.generators.Hourglass(channels=(4, 6), depth=2, seed=0)
        mask = sg.masks.find(e.method, net, z, y, density=0.5, **asked[e.method]).mask
        steps = 24 - spent[e.method]
        run = sg.fit(sg.compile(net, mask, z, plan="rule"), z, y, steps=steps, lr=1e-2)
        assert found["psnr_last"] == sg.fitting.psnr(run.image, clean).item()
        assert (found["steps_search"], found["steps_fit"]) == (24 - steps, steps)
        assert found["kept"] == mask.kept == found["total"] // 2
        assert seen == sorted(seen) and seen[-1] == 24

    sparse = plan.replace(densities=[0.15], methods={"magnitude": {"lr": 1e-2, "prunable": "all"}}).unfold()[0]
    with pytest.raises(DisconnectedError, match="expected one that lets a signal through"):
        run_experiment(sparse, Checkpoints(tmp_path / "sparse"))


def test_a_rule_selects_the_same_whether_it_ends_the_run_or_not(plan_file, tmp_path):
    from sparse_gen.experiments.methods import run_experiment

    option = {"method": "dense", "lr": 0.1, "stop": "emv", "stop_alpha": 0.5, "stop_patience": 4}
    methods = {"on": option, "obeyed": option | {"run_on": False}}
    plan = Plan.load(plan_file).replace(methods=methods, sigmas=[0.2], seeds=[0], budget=60)
    on, obeyed = (run_experiment(e, Checkpoints(tmp_path / e.key)) for e in plan.unfold() if e.image == "a")
    assert obeyed["stopped_at"] is not None and obeyed["steps_fit"] == obeyed["stopped_at"] < 60 == on["steps_fit"]
    for name in ("stopped_at", "stop_selected_step", "psnr_stopped", "ssim_stopped"):
        assert on[name] == obeyed[name], name
    assert on["psnr_last"] != obeyed["psnr_last"]


def test_a_watched_rule_resumes(plan_file, tmp_path):
    from sparse_gen.experiments.methods import run_experiment

    option = {"method": "oes", "search_steps": 6, "lr": 0.1, "stop": "wmv", "stop_window": 3, "stop_patience": 4}
    (experiment, *_) = Plan.load(plan_file).replace(methods={"OES": option}).unfold()

    class StopAt(Checkpoints):
        def store(self, name, identity, step, *args, **kwargs):
            if (name, step) == ("fit", 9):
                self.request_stop()
            super().store(name, identity, step, *args, **kwargs)

    steps = []
    expected = run_experiment(experiment, Checkpoints(tmp_path / "a"), lambda step, of: steps.append((step, of)))
    assert steps[0] == (1, 24) and steps[-1] == (24, 24) and steps == sorted(steps)
    with pytest.raises(sg.RunInterrupted):
        run_experiment(experiment, StopAt(tmp_path / "b"))
    resumed = run_experiment(experiment, Checkpoints(tmp_path / "b", resume=True))
    assert {k: v for k, v in resumed.items() if "seconds" not in k} == {
        k: v for k, v in expected.items() if "seconds" not in k
    }


# A worker that computes nothing, so that it starts at once, and does what a method's name says.
FAKE = """
import os, signal, sys, time, types
sys.path[:] = PATH
module = types.ModuleType("sparse_gen.checkpoint")
module.RunInterrupted = type("RunInterrupted", (Exception,), {})
sys.modules["sparse_gen.checkpoint"] = module
from pathlib import Path
from sparse_gen.experiments.worker import Worker, main

class Fake(Worker):
    def prepare(self):
        if Path("MARKS/unable").exists():
            raise ImportError("no torch")

    def results(self, key, plain):
        mark = Path("MARKS") / f"{key}-{time.time_ns()}"
        mark.write_text(plain[0]["method"])
        before = len(list(Path("MARKS").glob(f"{key}-*"))) - 1
        method = plain[0]["method"]
        if method == "one by one" and len(plain) > 1:
            raise FloatingPointError("one of them")
        if method == "full":
            raise OSError(28, "No space left on device", "the shard")
        if method == "hopeless":
            raise ValueError("density: expected more")
        if method == "killed" or (method == "killed once" and before == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if method == "exits":
            print("Fatal: something of C++")
            sys.stdout.flush()
            os._exit(7)
        if method == "raises" or (method == "raises once" and before == 0):
            raise KeyError("a bug")
        if method == "slow":
            for step in range(1000):
                self._say({"step": step + 1, "of": 1000})
                if self._stopping:
                    raise module.RunInterrupted
                time.sleep(0.01)
        return [{"seconds": 2.0, "psnr_last": 20.0 + one["config"]["seed"]} for one in plain]

main(sys.argv[1:], Fake)
"""


@pytest.fixture
def faked(plan_file, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    code = FAKE.replace("PATH", repr(sys.path)).replace("MARKS", str(marks))

    def run(*methods, seeds=(0,), out=tmp_path / "out", **options):
        entries = {name: {"method": "dense", "lr": 1e-3, "average": (i + 1) / 100} for i, name in enumerate(methods)}
        plan = Plan.load(plan_file).replace(
            methods=entries, seeds=seeds, sigmas=[0.1], images=[str(plan_file.parent / "a.png")]
        )
        return sweep(plan, out, command=[sys.executable, "-c", code], workers=options.pop("workers", 1), **options)

    run.marks, run.out = marks, tmp_path / "out"
    return run


def test_a_crash_is_tried_again_and_a_hopeless_case_recorded_without_holding_up_the_rest(faked):
    methods = ("killed", "exits", "raises", "killed once", "raises once", "hopeless", "fine")
    status = faked(*methods, retries=1)
    assert (status.total, status.done, status.failed, status.left) == (7, 3, 4, 0)
    reasons = {experiment.method: reason for experiment, reason in status.reasons}
    assert reasons == {
        "killed": "its process was ended by SIGKILL, as the system does when memory runs out (2 attempts)",
        "exits": "its process ended with exit code 7: Fatal: something of C++ (2 attempts)",
        "raises": "KeyError: 'a bug' (2 attempts)",
        "hopeless": "density: expected more",
    }
    attempts = [mark.read_text() for mark in faked.marks.iterdir()]
    assert {name: attempts.count(name) for name in methods} == {
        "killed": 2, "exits": 2, "raises": 2, "killed once": 2, "raises once": 2, "hopeless": 1, "fine": 1,
    }  # fmt: skip
    assert SweepFolder.open(faked.out).status().reasons == status.reasons

    # Recorded is recorded, and asked for is tried again.
    assert faked(*methods) == status
    assert len(list(faked.marks.iterdir())) == len(attempts)
    again = faked(*methods, retries=0, retry_failed=True)
    assert (again.done, again.failed) == (3, 4)
    assert {reason for _, reason in again.reasons} >= {"KeyError: 'a bug' (1 attempt)"}
    assert len(list(faked.marks.iterdir())) == len(attempts) + 4


def test_a_group_that_fails_is_tried_one_by_one(faked):
    status = faked("one by one", "fine", seeds=(0, 1, 2), together=2)
    assert (status.done, status.failed, status.left) == (6, 0, 0)
    # Groups of two and one of each method; those of two that failed, once more each.
    assert sorted(mark.read_text() for mark in faked.marks.iterdir()) == 2 * ["fine"] + 4 * ["one by one"]
    assert {row["status"] for row in read_rows(faked.out / "results").values()} == {"done"}


def test_more_seeds_or_methods_do_only_what_is_new(faked):
    faked("fine", seeds=[0, 1])
    status = faked("fine", "killed once", seeds=[1, 2])
    assert (status.total, status.done) == (4, 4)
    attempts = [mark.read_text() for mark in faked.marks.iterdir()]
    assert (attempts.count("fine"), attempts.count("killed once")) == (3, 4)
    rows = SweepFolder.open(faked.out).merge()[0][0].read_text().splitlines()
    assert len(rows) == 1 + 4  # that of seed 0 belongs to no experiment of the plan


def test_stopping_leaves_the_rest_and_nothing_running(faked):
    stop, seen = Event(), []

    def watch(status):
        seen.append(status)
        if status.running and status.done:
            stop.set()

    status = faked("fine", "slow", seeds=[0, 1, 2], workers=2, stop=stop, progress=watch)
    assert status.done >= 1 and status.left == 6 - status.done and status.interrupted >= 1
    assert status.running == 0
    began = SweepFolder.open(faked.out).status()
    assert (began.done, began.left, began.running) == (status.done, status.left, 0)


def test_a_full_disk_ends_the_sweep_in_one_line(faked):
    with pytest.raises(OSError, match=r"^No space left on device: the shard$"):
        faked("fine", "full", "slow")
    status = faked("fine", "full", "slow", retries=0, stop=_set())
    assert (status.done, status.failed, status.left) == (1, 0, 2)


def _set():
    event = Event()
    event.set()
    return event


def test_workers_that_do_not_start_are_one_line(faked):
    (faked.marks / "unable").touch()
    with pytest.raises(ChildProcessError, match=r"^workers: expected a process .* exit code 1: ImportError: no torch$"):
        faked("fine")


def test_two_processes_do_not_work_on_one_sweep(faked):
    faked("fine")
    folder = SweepFolder.open(faked.out)
    with folder.locked(3):
        with pytest.raises(BlockingIOError, match=r"^sweep: expected a folder that no other process works on, got"):
            faked("fine", "slow")
        folder.checkpoints(folder.experiments()[0].key).mkdir()
        assert folder._workers() == (3, True)
    assert folder._workers() == (3, False)


def test_the_time_left_goes_by_what_is_alike(faked):
    faked("fine", seeds=[0, 1])  # 2 s each
    plan = folder_plan = SweepFolder.open(faked.out).plan
    folder = SweepFolder(faked.out)
    folder.begin(plan.replace(seeds=[0, 1, 2, 3, 4]), folder_plan.replace(seeds=[0, 1, 2, 3, 4]).unfold())
    with folder.locked(2):
        pass
    assert folder.status().seconds_left == 3 * 2.0 / 2
    half = folder.checkpoints(folder.experiments()[2].key)
    half.mkdir()
    (half / "fit-000000012.safetensors").touch()
    assert folder.status().seconds_left == (2 + 2 + 1) / 2
    assert folder.status().interrupted == 1


def test_threads_fill_the_machine_and_stay(plan_file, tmp_path):
    free, folder = Plan.load(plan_file).replace(threads=None), SweepFolder(tmp_path / "out")

    def settled(plan, workers):
        plan, workers = settle(plan, folder, workers)
        return plan.threads, workers

    assert settled(free, None) == (1, 8)
    assert settled(free, 3) == (2, 3)
    with pytest.warns(RuntimeWarning, match=r"^20 workers of 1 thread on 8 processors hold each other up"):
        assert settled(free, 20) == (1, 20)
    assert settled(free.replace(threads=4), None) == (4, 2)
    assert settled(free.replace(threads=4), 1) == (4, 1)
    folder.path.mkdir()
    folder.begin(free.replace(threads=2), [])
    assert settled(free, None) == (2, 4)
    with pytest.warns(RuntimeWarning, match=r"^8 workers of 2 threads on 8 processors"):
        assert settled(free, 8) == (2, 8)


def test_torn_and_damaged_lines(tmp_path):
    row = {"key": "a" * 64, "status": "done", "time": "2026-01-01", "results": {"seconds": 1.0}}
    with Shard(tmp_path) as shard:
        shard.append(row)
        shard.append(row | {"key": "b"})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_rows(tmp_path)) == ["a" * 64, "b"][: whole[:cut].count(b"\n")]
    path.write_bytes(whole)
    for line in (b"{}", b"\xff", b"[" * 5000, b'{"key": 3, "status": "done", "time": ""}', b"null", b"", b"NaN"):
        (tmp_path / "other.jsonl").write_bytes(line + b"\n" + json.dumps(row | {"key": "c"}).encode() + b"\n")
        with pytest.warns(RuntimeWarning, match=r"got line 1 of .*other\.jsonl damaged, its experiment is done again"):
            assert set(read_rows(tmp_path)) == {"a" * 64, "b", "c"}


def test_done_counts_over_failed_and_newer_over_older(tmp_path):
    with Shard(tmp_path) as shard:
        for status, when in [("failed", "3"), ("done", "1"), ("failed", "2"), ("done", "0")]:
            shard.append({"key": "k", "status": status, "time": when})
    assert read_rows(tmp_path)["k"] == {"key": "k", "status": "done", "time": "1"}


def test_a_row_is_finite():
    with pytest.raises(ValueError, match="Out of range float values"):
        Shard(Path("nowhere")).append({"psnr": float("inf")})


def test_the_table_is_means_and_spreads_over_seeds(unkilled):
    folder = SweepFolder.open(unkilled)
    experiments = folder.experiments()
    rows = folder.rows({e.key: e for e in experiments})
    groups = group(experiments, rows)
    assert [g.seeds for g in groups] == [2] * 12
    for _, row in zip(groups, table_rows(groups), strict=True):
        same = [
            rows[e.key]["results"] for e in experiments
            if (e.image, e.method, e.config.sigma) == (row["image"], row["method"], row["sigma"])
        ]  # fmt: skip
        for name in ("psnr_last", "psnr_noisy", "psnr_oracle_peak", "seconds"):
            values = [result[name] for result in same]
            assert row[name] == statistics.mean(values)
            assert row[f"{name}_spread"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert (row["psnr_stopped"] is None) == (row["method"] != "dense")
        assert (row["psnr_masked_untrained"] is None) == (row["method"] == "dense")
        assert row["search_steps"] + row["training_steps"] == 24


def test_markdown_is_ready_for_a_paper(unkilled):
    folder = SweepFolder.open(unkilled)
    experiments = folder.experiments()
    groups = group(experiments, folder.rows({e.key: e for e in experiments}))
    *caption, head, rule, first = [line for line in markdown(groups).splitlines() if line][:9]
    assert caption == [
        "PSNR in dB, mean ± standard deviation over seeds.",
        "All methods get the same noisy image, z, initial weights and 24 steps, the search included (OES: 8 of them).",
        "Oracle peak: the largest of the values taken along the run, which takes the clean image to know.",
        "Stopped: what WMV selects without the clean image.",
        "In all rows: generator small.",
        "Time: of one experiment on 1 thread, the search included.",
    ]
    assert head == (
        "| image | σ | method | density | lr | noisy | masked, untrained | last | stopped | "
        "oracle peak, every 4 steps | SSIM last | SSIM stopped | time, s | seeds |"
    )
    assert rule == "|" + "---|" * 14
    cells = first.strip("| ").split(" | ")
    last = groups[0].values("psnr_last")
    assert cells[:5] == ["a", "0.1", "OES", "0.5", "0.01"]
    assert cells[7] == f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"
    assert cells[8] == "–" and cells[-1] == "2"


def test_markdown_tells_of_failed_and_missing_ones(unkilled):
    folder = SweepFolder.open(unkilled)
    experiments = folder.experiments()
    rows = folder.rows({e.key: e for e in experiments})
    dense = [e for e in experiments if e.method == "dense"]
    rows[dense[0].key] = {"status": "failed", "reason": "x"}
    del rows[dense[1].key]
    text = markdown(group(dense, rows))
    assert "| 1 of 2, 1 failed |" in text and "| 1 of 2 |" in text
    assert "–" in markdown(group(dense, {})) or "| 0 of 2 |" in markdown(group(dense, {}))


def test_all_results_in_one_file(unkilled):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    files, missing = SweepFolder.open(unkilled).merge()
    assert [path.name for path in files] == ["results.csv", "results.parquet"] and missing is None
    table = pyarrow.read_table(files[1]).to_pylist()
    with open(files[0], newline="") as file:
        plain = list(csv.DictReader(file))
    assert len(table) == len(plain) == 24
    rows = read_rows(unkilled / "results")
    for whole, text in zip(table, plain, strict=True):
        found = rows[whole["key"]]["results"]
        assert {name: whole[name] for name in found} == found
        assert float(text["psnr_last"]) == whole["psnr_last"] == found["psnr_last"]
        assert (text["status"], text["generator"], text["generator_class"]) == ("done", "small", "hourglass")
        assert "psnr_by_step" not in text


def test_without_pyarrow_there_is_csv_and_a_hint(unkilled, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (unkilled / "results.parquet").unlink(missing_ok=True)
    assert main(["sweep", "table", str(unkilled)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == [
        str(unkilled / "results.csv"),
        "for results.parquet install pyarrow: pip install 'sparse-gen[sweep]'",
    ]
    assert (unkilled / "results.csv").exists() and not (unkilled / "results.parquet").exists()


REFUSED = {
    "no folder": ("sweep run {p}", "output: expected a folder for the results, got none, add -o DIR"),
    "nothing to go on with": (
        "sweep run -o {new}",
        "sweep: expected the folder of a sweep, got {new} without one, name another",
    ),
    "other files": (
        "sweep run {p} -o {full}",
        "output: expected a new or empty folder, got {full} with files in it, name another or add --overwrite",
    ),
    "status of nothing": (
        "sweep status {full}",
        "sweep: expected the folder of a sweep, got {full} without one, name another",
    ),
    "table of nothing": (
        "sweep table {new}",
        "sweep: expected the folder of a sweep, got {new} without one, name another",
    ),
    "missing plan": (
        "sweep run {new}.yaml -o {new}",
        "plan: expected a YAML file, got {new}.yaml, which is not there, check the name",
    ),
    "workers": (
        "sweep run {p} -o {new} --workers 0",
        "workers: expected 1 or more, got 0, leave it out for one a processor",
    ),
    "retries": ("sweep run {p} -o {new} --retries -1", "retries: expected 0 or more, got -1, give 0 for none"),
    "seconds": (
        "sweep run {p} -o {new} --checkpoint-seconds -1",
        "checkpoint_seconds: expected 0 or more, got -1.0, give a positive number",
    ),
    "damaged": (
        "sweep status {damaged}",
        "sweep: expected a list of experiments, got {damaged}/experiments.json, which is damaged, "
        "run the sweep's plan again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(plan_file, tmp_path, capsys, name):
    arguments, message = REFUSED[name]
    places = {"p": plan_file, "new": tmp_path / "new", "full": tmp_path / "full", "damaged": tmp_path / "damaged"}
    for folder, file in {"full": "thesis.tex", "damaged": "experiments.json"}.items():
        places[folder].mkdir()
        (places[folder] / file).write_text('{"experiments": [{}]}')
    assert main(arguments.format(**places).split()) == 2
    assert capsys.readouterr().err == f"error: {message.format(**places)}\n"
    assert not places["new"].exists()
    assert [path.name for path in places["full"].iterdir()] == ["thesis.tex"]
