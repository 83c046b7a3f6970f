"""Plans: layouts chosen by measurement, remembered by machine, stored and done again."""

import json
import subprocess
import sys

import pytest
import torch
from problems import problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.engine import measure
from sparse_gen.engine.layouts import candidates
from sparse_gen.engine.plan import Plan
from sparse_gen.ops.extension import status

needs_library = pytest.mark.skipif(not status().available, reason="no compiled library, so that nothing is chosen")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder that holds nothing yet, and a process that knows nothing yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPARSE_GEN_CACHE", str(folder))
    monkeypatch.setattr(measure, "_memories", {})
    return folder


@pytest.fixture
def timed(monkeypatch):
    """Replaces the clock: layout → milliseconds; counts the stages that were measured."""
    stages = []

    def arrange(**milliseconds):
        def layout_times(stage, layouts, dtype):
            stages.append(stage)
            return {layout: milliseconds.get(layout.replace(" ", "_"), 9.0) for layout in layouts}

        monkeypatch.setattr(measure, "layout_times", layout_times)
        return stages

    return arrange


def compiled(plan=None, density=0.3, dtype=torch.float32, **arguments):
    net, (z, _, _) = small_net(**arguments), problem()
    return sg.compile(net.to(dtype), random_mask(net, density), z.to(dtype), plan=plan)


def forget(monkeypatch):
    monkeypatch.setattr(measure, "_memories", {})


def layouts(module):
    return {stage.name: stage.layout for stage in module.plan.stages}


@needs_library
def test_the_fastest_layout_is_taken(cache, timed):
    timed(dense=1.0, sparse=3.0, taps=2.0)
    found = layouts(compiled())
    assert found.pop("head") == "with its normalisation"
    assert set(found.values()) == {"dense"}
    plan = compiled().plan
    assert {stage.ms for stage in plan.stages} == {1.0, None}


@needs_library
def test_a_hair_faster_is_not_enough(cache, timed):
    timed(dense=0.97, sparse=1.0, taps=1.0)
    assert layouts(compiled()) == layouts(compiled("rule"))


@needs_library
def test_a_stage_is_measured_once_a_machine(cache, timed, monkeypatch):
    measured = timed(dense=1.0)
    first = layouts(compiled())
    count = len(measured)
    assert count > 0
    assert layouts(compiled()) == first
    forget(monkeypatch)
    assert layouts(compiled()) == first  # from the file
    assert len(measured) == count
    compiled(dtype=torch.float64)
    assert len(measured) == 2 * count
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        compiled()
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 3 * count


@needs_library
def test_equal_stages_run_alike_whatever_the_clock_says(cache):
    """Twice the same convolution, and an experiment alone and beside another one."""
    assert compiled().plan.layouts == compiled().plan.layouts


@needs_library
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"stages": 3}', b'{"stages": {"a": {"dense": "x"}}}', b"\xff\0", b"[" * 10**5]
)
def test_a_corrupt_file_is_replaced(cache, timed, monkeypatch, content):
    measured = timed(dense=1.0)
    compiled()
    (path,) = cache.glob("layouts-*.json")
    path.write_bytes(content)
    forget(monkeypatch)
    count = len(measured)
    compiled()
    assert len(measured) == 2 * count
    stored = json.loads(path.read_text())
    assert len(stored["stages"]) == len({measure.stage_key(stage, torch.float32) for stage in measured})
    assert stored["machine"]["threads"] == torch.get_num_threads()


@needs_library
def test_what_another_process_stored_stays(cache, timed, monkeypatch):
    timed(dense=1.0)
    mine, theirs = compiled, compiled
    mine()
    ours = measure._memories.copy()
    forget(monkeypatch)
    theirs(seed=0, channels=(5, 7, 9))
    (path,) = cache.glob("layouts-*.json")
    both = set(json.loads(path.read_text())["stages"])
    monkeypatch.setattr(measure, "_memories", ours)
    mine(density=0.4)
    stored = set(json.loads(path.read_text())["stages"])
    assert both < stored


@needs_library
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, timed, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_GEN_CACHE", str(tmp_path / "file" / "cache"))
    forget(monkeypatch)
    measured = timed(dense=1.0)
    compiled()
    count = len(measured)
    compiled()
    assert len(measured) == count  # the process remembers


def test_processes_may_share_the_folder(cache):
    code = """
import sys
from pathlib import Path
from sparse_gen.engine.measure import Memory
for i in range(30):
    memory = Memory(Path(sys.argv[1]), {})
    assert i == 0 or memory.get(f"{sys.argv[2]} 0") or memory.get(f"{3 - int(sys.argv[2])} 0")
    memory.put(f"{sys.argv[2]} {i}", {"dense": 1.0})
    memory.save()
"""
    path = cache / "layouts-0.json"
    processes = [subprocess.Popen([sys.executable, "-c", code, path, str(number)]) for number in (1, 2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [file.name for file in cache.iterdir()] == ["layouts-0.json"]
    stored = json.loads(path.read_text())["stages"]
    # Of two that write at the same moment one may have to measure again, and the last ones stay.
    assert {"1 29", "2 29"} & set(stored)


@needs_library
def test_all_candidates_of_a_stage_are_timed(cache, monkeypatch):
    seen = []
    original = measure.layout_times
    monkeypatch.setattr(measure, "layout_times", lambda *a: seen.append((a[0], original(*a))) or seen[-1][1])
    compiled()
    assert seen
    for stage, times in seen:
        assert list(times) == candidates(stage)
        assert min(times.values()) > 0
    assert [stage.needs_gradient for stage, _ in seen] == [False] + [True] * (len(seen) - 1)  # z needs none


def test_nothing_is_measured_where_the_answer_is_known(cache, timed):
    measured = timed()
    compiled(density=0.02)
    assert {stage.name for stage in measured} <= {"decoder.0.conv.1", "decoder.1.conv.1", "decoder.2.conv.1"}
    compiled("rule")
    assert len(measured) <= 3


def test_the_users_cache_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSE_GEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure.cache_folder() == tmp_path / "sparse-gen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measure.cache_folder() == tmp_path / ".cache" / "sparse-gen"


# -- stored plans


@needs_library
def test_a_stored_plan_gives_the_same_bits(cache, timed, tmp_path):
    timed(dense=1.0)
    first = compiled()
    first.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first.plan
    timed(dense=99.0)
    z = problem()[0]
    for plan in (first.plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = compiled(plan)
        assert again.plan.layouts == first.plan.layouts
        assert torch.equal(again(z), first(z))
    assert compiled("rule").plan.layouts != first.plan.layouts


@needs_library
def test_a_stage_can_be_overridden(cache):
    rule = compiled("rule")
    plan = rule.plan.replace({"decoder.2.conv.1": "dense", "encoder.0.conv1.1": "dense"})
    found = compiled(plan)
    different = {name for name, layout in layouts(found).items() if layout != layouts(rule)[name]}
    assert different == {"decoder.2.conv.1", "encoder.0.conv1.1"}
    z = problem()[0]
    torch.testing.assert_close(found(z), rule(z), rtol=1e-4, atol=1e-5)


@needs_library
def test_plans_of_several_masks(cache, tmp_path):
    net = small_net().double()
    z = sg.noise_input(6, (27, 34), seed=[0, 1]).double()
    mask = random_mask(net, 0.3, experiments=2)
    fast = sg.compile(net, mask, z)
    assert len(fast.plan.programs) == 2
    fast.plan.save(tmp_path / "p.json")
    again = sg.compile(net, mask, z, plan=tmp_path / "p.json")
    assert torch.equal(fast(z), again(z))
    with pytest.raises(ValueError, match="expected one of this network, mask and size, got one for masks of 2"):
        compiled(fast.plan, dtype=torch.float64)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.2}, "whose encoder.0.conv1.1 has live_kept"),
        ({"channels": (6, 8, 11)}, "whose encoder.2.conv1.1 has weight_shape 10×8×5×5 instead of 11×8×5×5"),
        ({"channels": (6, 8)}, "of 10 convolutions instead of 7"),
        ({"dtype": torch.float64}, "for numbers of float32 instead of float64"),
    ],
)
def test_a_plan_of_something_else_is_refused(cache, change, message):
    plan = compiled("rule").plan
    with pytest.raises(ValueError) as caught:
        compiled(plan, **change)
    assert message in str(caught.value) and str(caught.value).endswith(", compile without it")


@needs_library
def test_a_plan_of_another_size_or_engine_is_refused(cache):
    net, (z, _, _) = small_net(), problem()
    mask = random_mask(net)
    plan = sg.compile(net, mask, z).plan
    with pytest.raises(ValueError, match="got one for an input of 6×27×34 instead of 6×40×48, compile without it"):
        sg.compile(net, mask, sg.noise_input(6, (40, 48)), plan=plan)
    with pytest.raises(ValueError, match="of operators that cannot run here: as asked"):
        sg.compile(net, mask, z, plan=plan, engine="reference")


@needs_library
def test_a_layout_that_cannot_run_is_refused(cache):
    plan = compiled("rule").plan.replace({"encoder.1.conv2.1": "taps"})
    with pytest.raises(ValueError, match=r"expected encoder.1.conv2.1 as one of sparse, dense.*, got 'taps'"):
        compiled(plan)
    with pytest.raises(ValueError, match=r"got 'decoder.2.conv', did you mean decoder.2.conv.1?"):
        plan.replace({"decoder.2.conv": "dense"})


@pytest.mark.parametrize("content", ["", "[]", "3", '{"version": 1}', '{"version": 1, "programs": [[{"a": 1}]]}', "{"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan: expected .*(compile without it|remove it)"):
        compiled(tmp_path / "p.json")
    with pytest.raises(OSError):
        compiled(tmp_path / "missing.json")
    (tmp_path / "p.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="expected version 1, got 99"):
        compiled(str(tmp_path / "p.json"))


# -- reading them


@needs_library
def test_the_table_says_what_runs_and_what_it_takes(cache):
    fast = compiled()
    lines = str(fast.plan).splitlines()
    assert lines[0].split() == [
        "stage", "input", "output", "live", "in", "live", "out", "density", "layout", "MFLOP", "after", "ms", "share"
    ]  # fmt: skip
    row = next(line for line in lines if line.startswith("decoder.2.conv.1"))
    assert "8×16×20" in row and "6×32×40" in row and "8 of 8" in row and row.endswith("%")
    assert any(line.startswith("normalisation and activation ×12") for line in lines)
    assert any(line.startswith("plain PyTorch: ") and "sigmoid" in line for line in lines)
    assert lines[-1].endswith(f"torch {torch.__version__}, sparse_gen {sg.__version__}")
    assert status().instruction_set in lines[-1]


@needs_library
def test_a_profile_has_every_stage(cache):
    fast = compiled()
    before = fast.values.detach().clone()
    plan = fast.profile(rounds=2)
    assert all(item.ms is not None and item.ms >= 0 for item in (*plan.stages, *plan.others))
    assert all(stage.ms > 0 for stage in plan.stages)
    assert plan.layouts == fast.plan.layouts
    assert "–" not in str(plan)
    assert torch.equal(fast.values, before) and fast.values.grad is None
    with pytest.raises(ValueError, match=r"z of the size it was compiled for, got \(1, 6, 30, 34\)"):
        fast.profile(sg.noise_input(6, (30, 34)))


def test_plain_pytorch_has_nothing_to_profile():
    net, (z, _, _) = small_net(), problem()
    with pytest.raises(ValueError, match="expected a network that runs in stages to profile"):
        sg.compile(net, random_mask(net), z, engine="reference").profile()


@needs_library
def test_dead_channels_and_kept_weights_are_counted(cache):
    net, (z, _, _) = small_net(), problem()
    mask = random_mask(net, 0.4)
    mask.tensors["encoder.0.conv2.1.weight"][2] = False  # a channel that nothing keeps
    stages = {stage.name: stage for stage in sg.compile(net, mask, z, plan="rule").plan.stages}
    made, read = stages["encoder.0.conv2.1"], stages["encoder.1.conv1.1"]
    assert (made.live_out, read.live_in) == (5, 5)
    assert read.live_kept == mask.tensors["encoder.1.conv1.1.weight"].sum(dim=(0, 2, 3))[[0, 1, 3, 4, 5]].sum()
    assert read.kept == mask.tensors["encoder.1.conv1.1.weight"].sum()
    assert read.live_density == read.live_kept / (5 * 8 * 25)
    rows, columns = read.output_shape[1:]
    assert read.flops == 2 * 6 * 8 * 25 * 4 * rows * columns
    assert read.flops_after == 2 * read.live_kept * rows * columns
