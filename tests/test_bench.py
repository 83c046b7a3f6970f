"""What benchmarks measure with: providers that agree, records, peak memory, `sparse-gen bench`."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

import sparse_gen as sg
from sparse_gen.cli import main
from sparse_gen.experiments import bench
from sparse_gen.experiments.bench import SEARCH, OurSearch, OurTraining, StepCase, check
from sparse_gen.experiments.peak import peak_mb
from sparse_gen.experiments.timing import make_records, merge_records, read_records
from sparse_gen.masks.layered import layered_mask

SIZE = (24, 24)


def problem(experiments=1):
    net = sg.generators.Hourglass(depth=2)
    z = sg.noise_input(32, SIZE, seed=list(range(experiments)))
    return net, z, torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_our_search_is_the_loop_of_search_mask():
    net, z, y = problem(2)
    ours = OurSearch(net, z, y, [0, 1])
    for _ in range(3):
        ours.step()
    found = sg.search_mask(net, z, y, steps=3, density=0.5, prunable="all", seed=[0, 1], **SEARCH)
    assert torch.equal(ours.logits, torch.cat([part.flatten(1) for part in found.logits.values()], dim=1))


def test_our_training_is_the_loop_of_fit():
    net, z, y = problem()
    mask = layered_mask(net, 0.2)
    ours = OurTraining(net, mask, z, y, lr=1e-2)
    for _ in range(3):
        ours.step()
    run = sg.fit(sg.compile(net, mask, z), z, y, steps=3, lr=1e-2)
    assert torch.equal(ours.module.values, run.module.values)


@pytest.mark.parametrize("kind", ["search", "training", "dense"])
@pytest.mark.parametrize("experiments", [1, 2])
def test_all_providers_agree(kind, experiments):
    assert check(StepCase(kind, 24, 0.2, experiments=experiments, depth=2)) < 1e-9


@pytest.mark.parametrize("kind", ["search", "training"])
def test_a_provider_that_does_something_else_is_found(monkeypatch, kind):
    name = "PlainSearch" if kind == "search" else "PlainTraining"
    table = "_SEARCHES" if kind == "search" else "_TRAININGS"

    class Wrong(getattr(bench, name)):
        def step(self, *arguments):
            super().step(*arguments)
            self.adam.param_groups[0]["lr"] *= 0.999

    monkeypatch.setitem(getattr(bench, table), "plain", Wrong)
    with pytest.raises(RuntimeError, match="expected the same result from all providers"):
        check(StepCase(kind, 24, 0.2, depth=2))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 1.0])
def test_a_layered_mask_has_its_density_and_a_searched_masks_proportions(density):
    net = sg.generators.Hourglass()
    mask = layered_mask(net, density)
    # Four standard deviations of as many independent draws.
    assert mask.kept == pytest.approx(density * mask.total, abs=4 * (density * mask.total) ** 0.5)
    kept = [(layer.name, layer.kept / layer.total) for layer in mask.layers() if layer.name in mask.tensors]
    encoder, decoder = ([d for name, d in kept if name.startswith(part)] for part in ("encoder", "decoder"))
    assert mask.density < 1 or min(encoder + decoder) == 1
    assert density > 0.2 or max(encoder) < min(decoder)  # above, the densest layers are full
    assert mask.tensors.keys() == layered_mask(net, density, seed=1).tensors.keys()
    with pytest.raises(ValueError, match=r"expected a density above 0\.0019, which biases"):
        layered_mask(net, 0.001)
    with pytest.raises(ValueError, match=r"expected density above 0 and up to 1, got 1\.5"):
        layered_mask(net, 1.5)


def test_records_hold_medians_ratios_and_memory():
    times = {"plain": [3.0, 4.0, 5.0], "ours": [1.0, 2.0, 9.0]}
    plain, ours = make_records(
        "suite", "case", times, device="cpu", error=1e-9, peak_mb={"ours": 12.34}, facts={"size": 7}
    )
    assert (ours["median_ms"], ours["ratio_plain"], ours["ratio_published"], ours["size"]) == (2, 2, None, 7)
    assert (ours["peak_mb"], plain["peak_mb"], plain["ratio_plain"]) == (12.3, None, 1)
    assert ours["p20_ms"] < 2 < ours["p80_ms"]


def test_measured_cases_replace_their_records_and_leave_the_others(tmp_path):
    path = tmp_path / "records.json"
    merge_records(path, [{"case": "a", "provider": "x", "n": 1}, {"case": "b", "provider": "x", "n": 1}])
    merge_records(path, [{"case": "a", "provider": "y", "n": 2}])
    assert [(r["case"], r["n"]) for r in read_records(path)] == [("b", 1), ("a", 2)]


@dataclasses.dataclass(frozen=True)
class Hog:
    """Holds `held` MB, and `more` besides during a step."""

    held: int
    more: int
    device: str = "cpu"

    def smaller(self):
        return Hog(0, 0)

    def inputs(self):
        return torch.ones(50 * 2**18)  # 50 MB that do not count

    def step(self, provider, inputs):
        held = torch.ones(self.held * 2**18)

        def step():
            return torch.ones(self.more * 2**18).sum() + held.sum()

        return step


def test_peak_memory_is_what_is_held_and_what_a_step_takes():
    found = peak_mb(Hog(40, 60), "ours")
    if found is None:
        pytest.skip("this system does not let a process forget its peak")
    assert found == pytest.approx(100, abs=5)


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("targets")


def step_records(targets, ours, **facts):
    """Of a published loop and a plain PyTorch that take 100 ms and MB, and ours."""
    case = StepCase(**facts)
    times = {"published": [100.0], "plain": [100.0], "ours": [ours]}
    peaks = {"plain": 100.0, "ours": 25.0}
    return make_records("end_to_end", case.name, times, device="cpu", error=0.0, peak_mb=peaks, facts=case.facts)


def test_targets_are_met_missed_or_not_measured(targets):
    kept = {"kind": "training", "mask": "x", "mask_name": "published baboon mask"}
    records = [
        *step_records(targets, 12.0, size=256, **kept),
        *step_records(targets, 40.0, size=512, **kept | {"mask_name": "published barbara mask"}),
        *step_records(targets, 10.0, size=512, **kept),
        *step_records(targets, 40.0, kind="dense", size=512),
    ]
    table = targets.table({"end_to_end": records})
    assert "| training step, 256² | published loop | ≥ 8× | 8.3× baboon mask | met |" in table
    assert "| training step, 512² | plain PyTorch | ≥ 7.5× | 10.0× baboon mask, 2.5× barbara mask | missed (1 of 2 met) |" in table  # fmt: skip # noqa: E501
    assert "| dense DIP step, 512² | plain PyTorch | ≥ 2× | 2.5× | met |" in table
    assert "| mask-search step, 256² | plain PyTorch | ≥ 3.5× | – | not measured |" in table
    assert "≤ 0.3× | 0.25× baboon mask, 0.25× barbara mask | met |" in table


def test_targets_of_cost_follow_sizes_and_densities(targets):
    records = [
        record
        for size, density, ours in [(256, 0.05, 10.0), (512, 0.05, 44.0), (256, 0.5, 30.0), (256, 1.0, 30.0)]
        for record in step_records(targets, ours, kind="training", size=size, density=density)
    ]
    assert targets.sizes(records, "training", "ours") == {256: 10, 512: 44}
    assert targets.densities(records, "ours") == {1.0: 30, 0.5: 30, 0.05: 10}
    table = targets.table({"end_to_end": records})
    assert "that of 256² | ≤ 1× | 1.10× 512² | missed |" in table
    assert "next denser mask | ≤ 1× | 1.00× 50 %, 0.33× 5 % | met |" in table


def test_bench_prints_a_table_and_stores_records(capsys, tmp_path):
    path = tmp_path / "speed.json"
    arguments = ["bench", "--size", "24", "--density", "0.2", "--rounds", "2", "-o", str(path)]
    before = torch.get_num_threads()
    assert main([*arguments, "--threads", "1"]) == 0
    assert torch.get_num_threads() == before
    shown = capsys.readouterr()
    assert "masked training step, 24², 20 %" in shown.out
    assert "mask-search step, 24²" in shown.out
    assert "4/4" in shown.err
    records = json.loads(path.read_text())
    assert [record["provider"] for record in records] == ["published", "plain", "ours"] * 2
    for record in records:
        assert record["rounds"] == 2
        assert record["threads"] == 1
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["error"] < 1e-6
    assert main(["bench", "--size", "32", "--rounds", "1", "-o", str(path)]) == 0
    assert len(json.loads(path.read_text())) == 12


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--size", "0"], "size: expected a whole number from 1 on, got 0"),
        (["--size", "3"], "an image of at least 5 pixels a side, got 3×3"),
        (["--size", "1000000"], "size: expected steps that fit into"),
        (["--size", "1.5"], "--size"),
        (["--density", "0"], "density: expected a fraction above 0 and up to 1, got 0"),
        (["--density", "nan"], "density: expected a fraction above 0 and up to 1, got nan"),
        (["--density", "x"], "--density"),
        (["--density", "0.0001", "--size", "24"], "expected a density above"),
        (["--rounds", "-1"], "rounds: expected a whole number from 1 on, got -1"),
        (["--threads", "0"], "threads: expected a whole number from 1 on, got 0"),
        (["--device", "toaster"], "device: expected auto, cpu, cuda or cuda:N, got 'toaster'"),
        (["-o", "no/such/folder/x.json"], "output: expected a file in a folder that exists"),
        (["-o", "."], "output: expected a file"),
        (["-o", __file__], "output: expected a file of benchmark records"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, part):
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert part in shown.err
    assert shown.err.count("\n") == 1
