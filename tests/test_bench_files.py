"""Benchmarks of quality: results that several processes add to, groups against step times, rounds of a lottery."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_gen as sg

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


@pytest.fixture(scope="module")
def bench():
    """A benchmark's module by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module


ADD = """
import sys
from pathlib import Path
import records

for i in range(20):
    record = {"worker": int(sys.argv[2]), "i": i}
    records.add(Path(sys.argv[1]), record, lambda record: (record["worker"], record["i"]))
"""


def test_no_record_of_two_writers_is_lost(tmp_path):
    """Without the lock, one that reads before and writes after another takes its records out again."""
    path = tmp_path / "results" / "r.json"
    workers = [subprocess.Popen([sys.executable, "-c", ADD, str(path), str(w)], cwd=BENCH) for w in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert json.loads(path.read_text()) == [{"worker": w, "i": i} for w in range(3) for i in range(20)]
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_record_takes_the_place_of_its_predecessor(bench, tmp_path):
    records = bench("records")
    for value in (1, 2):
        for name in "ba":
            records.add(tmp_path / "r.json", {"name": name, "value": value}, lambda record: (record["name"],))
    assert records.load(tmp_path / "r.json") == [{"name": "a", "value": 2}, {"name": "b", "value": 2}]
    assert records.load(tmp_path / "none.json") == []


@pytest.fixture(scope="module")
def groups(bench, tmp_path_factory):
    """Measured on one photograph of 24², at a density that leaves every network connected."""
    folder, module, pruning = tmp_path_factory.mktemp("groups"), bench("groups"), bench("pruning")
    preset = pruning.Preset("reduced", 24, 2, 6, 4, window=3, patience=3, seeds=(0,), photographs=("coffee",), every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSITY", 0.5)
        patch.setattr(module, "ROUNDS", 1)
        comparison = module.Comparison(preset, folder / "groups-cpu.json", folder / "masks")
        comparison.groups = ("dense", "weight", "8x1", "8x8+head")
        comparison.measure()
        comparison.time_steps(24)
    return module, comparison


def test_groups_are_kept_whole_and_trained_and_timed(bench, groups):
    _, comparison = groups
    found = bench("records").load(comparison.results)
    quality = {r["provider"]: r for r in found if "psnr_noisy" in r}
    assert list(quality) == ["dense", "weight", "8x1", "8x8+head"]
    assert comparison.jobs() == []
    for group, record in quality.items():
        assert record["steps_search"] + record["steps_fit"] == 10
        assert record["density"] == 1 if group == "dense" else 0.3 < record["density"] <= 0.5
    for keep in comparison.mask("coffee", "8x1", 0).tensors.values():
        blocks = keep.unflatten(0, (-1, 8)) if len(keep) % 8 == 0 else keep[None]
        assert torch.equal(blocks.any(dim=1), blocks.all(dim=1))
    assert "head.weight" in comparison.mask("coffee", "8x8+head", 0).whole
    times = {r["provider"]: r for r in found if "median_ms" in r}
    trained = [group for group, r in quality.items() if "psnr_last" in r]
    assert list(times) == trained and {"dense", "weight", "8x1"} <= set(trained)
    assert all(r["error"] <= 1e-9 and r["size"] == 24 and sum(r["kernels"].values()) == 7 for r in times.values())


def test_groups_show_what_is_lost_and_gained(groups, tmp_path):
    module, _ = groups
    base = {"case": "a", "preset": "reduced", "seed": 0, "psnr_noisy": 20.0, "density": 0.05}
    found = [
        {**base, "provider": "weight", "psnr_last": 26.0, "psnr_oracle_peak": 26.5},
        {**base, "provider": "8x1", "psnr_last": 25.25, "psnr_oracle_peak": 26.0},
        {**base, "provider": "filter", "disconnected_at": "head"},
        *(
            {
                "provider": name,
                "case": "t",
                "size": 256,
                "median_ms": ms,
                "kernels": {"blocks": 3, "blocks, pool folded": 2},
            }
            for name, ms in (("weight", 20.0), ("8x1", 10.0))
        ),
    ]
    rows = module.table(found).splitlines()
    assert "| 8 output channels | 5.00% | 25.25 | +0.75 | 26.00 | 10.0 | 2.00× | 5 blocks |" in rows
    assert "| filter | 5.00% | – (1 of 1 cut at head) | – | – | – | – | – |" in rows
    assert len({row.count("|") for row in rows if row.startswith("|")}) == 1
    module.draw(found, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ["denoise", "inpaint"])
def test_rounds_of_the_lottery_are_the_trainings_of_what_is_left(bench, tmp_path, task):
    lottery = bench("lottery")
    preset = lottery.Preset("reduced", 24, 4, 0.9, rounds=2, every=2, depth=2)
    found = lottery.run(preset, task, tmp_path)
    assert [r["round"] for r in found] == [0, 1, 2]
    assert [round(r["density_convolutions"], 2) for r in found] == [1, 0.8, 0.64]
    assert list(tmp_path.iterdir()) == []

    z, y, clean, weight = lottery.problem(preset, task)
    net = sg.generators.Skip(depth=2, seed=0)
    options = {"steps": 4, "lr": 1e-2, "input_jitter": 1 / 30, "pixel_weight": weight, "every": 2}
    mask = None
    for record in found:
        module = sg.compile(net, mask, z, plan="rule")
        run = sg.fit(module, z, y, clean=clean, average=0.9, **options)
        assert run.history["psnr"][-1].item() == record["psnr_last"]
        assert run.history["psnr_average"].max().item() == record["psnr_average_oracle_peak"]
        trained = module.to_dense()
        scores = torch.cat([p.abs().flatten() for p in trained.parameters() if p.ndim == 4])
        count = int(record["density_convolutions"] * len(scores) + 0.5)
        bar = scores.sort(descending=True).values[int(0.8 * count) - 1]
        kept = {n: p.detach().abs() >= bar for n, p in trained.named_parameters() if p.ndim == 4}
        mask = sg.Mask(kept, whole={n: tuple(p.shape) for n, p in trained.named_parameters() if n not in kept})
    shown = lottery.table(found)
    assert "| dense | 100.0% |" in shown and "(reduced)" in shown
    lottery.draw(found, tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_inpainting_measures_half_of_the_pixels(bench):
    lottery = bench("lottery")
    _, y, clean, weight = lottery.problem(lottery.REDUCED, "inpaint")
    assert 0.45 < weight.mean() < 0.55 and torch.equal(y, clean * weight)
