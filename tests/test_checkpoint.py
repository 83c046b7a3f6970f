"""Checkpoints: a kill at any moment costs nothing but a few seconds, and a resumed run has the same bits."""

import os
import signal
import time

import pytest
import torch
from problems import SIZE, problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.checkpoint import KEPT, RunInterrupted
from sparse_gen.ops.extension import status

STEPS = 12


def search(folder=None, resume=False, steps=STEPS, **arguments):
    z, y, _ = problem()
    checkpoints = None if folder is None else sg.Checkpoints(folder, seconds=0, resume=resume)
    stop = sg.stop.Settled(4, 0.0)
    return sg.search_mask(
        small_net(), z, y, steps=steps, every=3, stop=stop, checkpoints=checkpoints, **{"density": 0.2, **arguments}
    )


def fit(folder=None, resume=False, steps=STEPS, **arguments):
    z, y, clean = problem()
    net = small_net()
    checkpoints = None if folder is None else sg.Checkpoints(folder, seconds=0, resume=resume)
    options = {"average": 0.9, "input_jitter": 0.03, "langevin": 0.5, "tv_weight": 0.01, "rings": 3} | arguments
    module = sg.compile(net, random_mask(net), z)
    rule = sg.stop.WMV(3, 100)
    return sg.fit(module, z, y, steps=steps, every=2, clean=clean, stop=rule, checkpoints=checkpoints, **options)


def same(a, b):
    tensors = lambda r: [r.image, *r.module.parameters()] if hasattr(r, "image") else list(r.logits.values())  # noqa: E731
    histories = all(torch.equal(a.history[c], b.history[c]) for c in b.history.columns)
    return histories and a.history.step == b.history.step and all(map(torch.equal, tensors(a), tensors(b)))


def test_a_search_of_several_densities_is_not_gone_on_with_by_others(tmp_path):
    first = search(tmp_path, density=[0.2, 0.5])
    assert same(search(tmp_path, resume=True, density=[0.2, 0.5]), first)
    with pytest.raises(ValueError, match="which has density = "):
        search(tmp_path, resume=True, density=[0.5, 0.2])


@pytest.mark.parametrize("run", [search, fit])
@pytest.mark.parametrize("done", [1, 5, 11])
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(tmp_path, run, done):
    class StopAt(sg.Checkpoints):
        def store(self, name, identity, step, *args, **kwargs):
            if step == done:
                self.request_stop()
            super().store(name, identity, step, *args, **kwargs)

    original, sg_class = sg.Checkpoints, StopAt
    folder = tmp_path / "run"
    try:
        sg.Checkpoints = sg_class
        with pytest.raises(RunInterrupted, match=f"stopped after step {done} of the {run.__name__}"):
            run(folder)
    finally:
        sg.Checkpoints = original
    assert same(run(folder, resume=True), run())


# pytest-xdist's own thread, which a child does without; Python 3.12 warns of any.
@pytest.mark.filterwarnings("ignore:.* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("run", [search, fit])
def test_twenty_kills_at_random_moments(tmp_path, run):
    """SIGKILL at any moment, twenty times over, and each time resumed: the end is that of an undisturbed run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no other threads
    try:
        expected = run(steps=40)
        generator = torch.Generator().manual_seed(0)
        kills = 0
        for attempt in range(200):
            child = os.fork()
            if child == 0:
                run(tmp_path, resume=attempt > 0, steps=40)
                os._exit(0)
            time.sleep(0.02 + 0.25 * torch.rand(1, generator=generator).item())
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            if kills == 20 or not os.WIFSIGNALED(status):
                # a child that came to its end: begin again, the kills are what counts
                assert same(run(tmp_path, resume=True, steps=40), expected)
                if kills == 20:
                    break
                for path in tmp_path.iterdir():
                    path.unlink()
        assert kills == 20
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("run", [search, fit])
def test_a_complete_run_resumes_at_its_end(tmp_path, run, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    assert same(run(tmp_path, resume=True), first)


def test_a_run_that_a_rule_stopped_stays_stopped(tmp_path):
    z, y, _ = problem()

    def run(resume):
        checkpoints = sg.Checkpoints(tmp_path, seconds=0, resume=resume)
        return sg.fit(small_net(), z, y, steps=60, stop=sg.stop.EMV(0.5, 5), checkpoints=checkpoints)

    first, again = run(False), run(True)
    assert first.stopped_at == again.stopped_at
    assert torch.equal(first.image, again.image)


def test_a_plain_module_resumes_too(tmp_path):
    z, y, _ = problem()

    def run(steps, **arguments):
        net = small_net()
        return sg.fit(net, z, y, steps=steps, checkpoints=sg.Checkpoints(tmp_path, seconds=0, **arguments)), net

    expected, _ = run(6)
    newest = sorted(tmp_path.iterdir())[-1]
    newest.unlink()
    resumed, _ = run(6, resume=True)
    assert torch.equal(resumed.image, expected.image)


def test_the_last_two_are_kept(tmp_path):
    fit(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"fit-{s:09d}.safetensors" for s in (STEPS - 1, STEPS)]
    assert KEPT == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
@pytest.mark.parametrize("run", [search, fit])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage, run):
    expected = run(tmp_path)
    newest = sorted(tmp_path.iterdir())[-1]
    content = bytearray(newest.read_bytes())
    content[-50] ^= 4
    newest.write_bytes({"cut": content[:-100], "flip": content, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match="the checkpoint before it is used"):
        resumed = run(tmp_path, resume=True)
    assert same(resumed, expected)


def test_without_resume_a_run_starts_afresh(tmp_path):
    fit(tmp_path)
    assert same(fit(tmp_path), fit())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.02}, "lr"), ({"steps": 13}, "steps"), ({"seed": 5}, "seed"), ({"rings": 4}, "rings")],
)
def test_another_runs_checkpoint_is_refused(tmp_path, change, named):
    fit(tmp_path)
    with pytest.raises(ValueError, match=f"expected to resume the run of .*, which has {named} = "):
        fit(tmp_path, resume=True, **change)


def test_other_threads_are_refused(tmp_path):
    fit(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=f"has threads = {threads}, got {threads + 1}, call"):
            fit(tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)


def test_another_plan_is_refused(tmp_path):
    z, y, _ = problem()
    net = small_net()
    mask = random_mask(net)
    arguments = {"steps": 2, "checkpoints": sg.Checkpoints(tmp_path, seconds=0, resume=True)}
    sg.fit(sg.compile(net, mask, z, engine="reference"), z, y, **arguments)
    sg.fit(sg.compile(net, mask, z, engine="reference"), z, y, **arguments)
    if status().available:
        with pytest.raises(ValueError, match="which has plan = "):
            sg.fit(sg.compile(net, mask, z), z, y, **arguments)


def test_another_image_is_refused(tmp_path):
    z, y, _ = problem()
    checkpoints = sg.Checkpoints(tmp_path, seconds=0)
    sg.fit(small_net(), z, y, steps=2, checkpoints=checkpoints)
    with pytest.raises(ValueError, match="which has inputs = "):
        sg.fit(small_net(), z, 1 - y, steps=2, checkpoints=sg.Checkpoints(tmp_path, resume=True))


def test_checkpoints_wait_for_their_time(tmp_path):
    z, y, _ = problem()
    sg.fit(small_net(), z, y, steps=5, checkpoints=sg.Checkpoints(tmp_path, seconds=3600))
    assert [p.name for p in tmp_path.iterdir()] == ["fit-000000005.safetensors"]  # the end is always stored


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(tmp_path):
    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = small_net(), 0

        def forward(self, z):
            self.calls += 1
            return self.net(z) * (float("nan") if self.calls > 7 else 1)

    z, y, _ = problem()
    with pytest.raises(FloatingPointError, match=r"none at step 7.*the state before it is in"):
        sg.fit(Breaks(), z, y, steps=30, every=4, checkpoints=sg.Checkpoints(tmp_path, seconds=0))
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "fit-000000007.safetensors"


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    fit(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_rules_without_a_state_are_refused_beside_checkpoints(tmp_path):
    class Own:
        image = None

        def update(self, step, image):
            return False

    z, y, _ = problem()
    with pytest.raises(ValueError, match=r"a rule of sparse_gen.stop beside checkpoints, got Own"):
        sg.fit(small_net(), z, y, steps=1, stop=Own(), checkpoints=sg.Checkpoints(tmp_path))


def test_negative_seconds():
    with pytest.raises(ValueError, match="seconds between checkpoints from 0 on, got -1"):
        sg.Checkpoints("x", seconds=-1)


def test_experiments_resume_together(tmp_path):
    net, (_, y, _) = small_net(), problem()
    z, mask = sg.noise_input(6, SIZE, seed=[0, 1]), random_mask(small_net(), experiments=2)

    def run(**arguments):
        checkpoints = sg.Checkpoints(tmp_path, seconds=0, **arguments)
        return sg.fit(sg.compile(net, mask, z), z, y, steps=4, input_jitter=0.1, seed=[3, 4], checkpoints=checkpoints)

    expected = run()
    sorted(tmp_path.iterdir())[-1].unlink()
    assert torch.equal(run(resume=True).image, expected.image)
