"""The comparison of pruning methods: fair by construction, and resumable."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import sparse_gen as sg

pytestmark = pytest.mark.filterwarnings("ignore::sparse_gen.DisconnectedMaskWarning")


@pytest.fixture(scope="module")
def pruning():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench")
        yield importlib.import_module("pruning")


@pytest.fixture(scope="module")
def comparison(pruning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruning")
    preset = pruning.Preset("reduced", 24, 2, 10, 8, window=4, patience=5, seeds=(3,), densities=(0.6,), every=2)
    comparison = pruning.Comparison(preset, folder / "pruning-cpu.json", folder / "masks")
    comparison.measure()
    return comparison


def test_every_method_has_the_same_steps_and_its_density(pruning, comparison):
    records = comparison.records()
    assert [(r["case"].split()[0], r["provider"]) for r in records] == [
        (name, method) for name in ("astronaut", "coffee") for method in pruning.METHODS
    ]
    total = records[0]["parameters"]
    assert total == sum(p.numel() for p in sg.generators.Hourglass(depth=2).parameters())
    for r in records:
        assert r["steps_search"] + r["steps_fit"] == 18
        noisy = next(other["psnr_noisy"] for other in records if other["case"] == r["case"])
        assert r["psnr_noisy"] == noisy
        if r["provider"] in pruning.WHOLE:
            assert r["density"] == 1 and r["density_asked"] is None
        elif r["provider"] == "oes_8x1":
            assert 0.6 - 9 / total < r["density"] <= 0.6
        else:
            assert round(r["density"] * total) == int(0.6 * total)
        assert r["tflop"] > 0
    found = {r["provider"]: r["steps_search"] for r in records}
    assert found == {
        "dense": 0, "decoder": 0, "random": 0, "magnitude": 0, "snip": 1, "snip_all": 1, "grasp": 2, "synflow": 10,
        "imp": 10, "oes": 10, "oes_8x1": 10, "oes_moved": 10, "oes_reinitialised": 10,
    }  # fmt: skip


def test_a_record_is_the_fit_that_it_says(comparison):
    """The moved mask, done again by hand: found on the other photograph, trained from its own weights."""
    record = next(r for r in comparison.records() if r["provider"] == "oes_moved" and "coffee" in r["case"])
    (z, y, clean, net), (_, other, _, _) = (comparison.problem(name, 3) for name in ("coffee", "astronaut"))
    mask = sg.search_mask(net, z, other, density=0.6, steps=10, seed=3, plan="rule").mask
    fit = sg.fit(sg.compile(net, mask, z, plan="rule"), z, y, steps=8, lr=1e-2, clean=clean, seed=3, every=2)
    assert record["psnr_last"] == pytest.approx(sg.fitting.psnr(fit.module(z), clean).item(), abs=1e-3)
    # Every second step, the last before the end, and the end.
    curve = [*fit.history["psnr"][:, 0].tolist(), record["psnr_last"]]
    assert record["psnr_steps"] == [0, 2, 4, 6, 7, 8]
    assert record["psnr_by_step"] == pytest.approx(curve, abs=1e-3)
    assert record["psnr_oracle_peak"] == pytest.approx(max(record["psnr_by_step"]), abs=1e-3)
    assert record["layer_density"]["head.weight"] == mask.tensors["head.weight"].double().mean().item()


def test_finished_runs_are_not_done_again(pruning, comparison, monkeypatch):
    assert comparison.todo() == []
    records = comparison.records()
    gone = records.pop(7)
    comparison.results.write_text(json.dumps(records))
    assert [job[1] for job in comparison.todo()] == [gone["provider"]]
    comparison.measure()
    again = comparison.records()[7]
    for column in ("provider", "density", "psnr_last", "psnr_by_step", "wmv_selected_step", "tflop"):
        assert again[column] == gone[column]


def test_a_cut_network_is_a_result_and_is_not_trained(pruning, comparison):
    mask = sg.masks.find("random", sg.generators.Hourglass(depth=2), *comparison.problem("coffee", 3)[:2], density=0.6)
    mask.mask.tensors["head.weight"] = torch.zeros_like(mask.mask.tensors["head.weight"])
    mask.mask.weights["head.weight"] = torch.zeros(0)

    class Cut(pruning.Comparison):
        def find(self, *_):
            return mask.mask, 1

    record = Cut(comparison.preset).run("coffee", "snip", 0.6, 3)
    assert record["disconnected_at"] == "head"
    assert "psnr_last" not in record
    shown = pruning.pruning_report.table([record])
    assert "(1 of 1 cut at head)" in shown and "| 1 + 0 |" in shown


def test_table_and_picture(pruning, comparison, tmp_path):
    records = comparison.records()
    shown = pruning.pruning_report.table(records)
    rows = [row for row in shown.splitlines() if row.startswith("|")]
    assert len(rows) == 2 * 2 + len(records)
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    oes = next(r for r in records if r["provider"] == "oes")
    row = next(row for row in rows if "| OES |" in row)
    assert f"| {oes['psnr_last']:.2f} |" in row
    assert shown.count("(reduced)") == 2
    pruning.pruning_report.draw(records, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
