"""Captured steps: on the CPU, calls to operators recorded once and replayed stand in for a CUDA graph."""

import warnings
from importlib import import_module

import pytest
import torch
from parallel import MAIN, SIDE, PretendedStreams
from problems import SIZE, problem, random_mask, small_net
from recorded import OnDeviceOnly, RecordedSteps, Recorder

import sparse_gen as sg
from sparse_gen.engine.capture import WARM_UP, CudaGraphs, StepRunner, capturer
from sparse_gen.engine.readback import Readback

LOOPS = [import_module(f"sparse_gen.{name}") for name in ("fitting.fit", "masks.search")]


@pytest.fixture
def captured(monkeypatch):
    """Lets fits and searches replay recorded steps; returns their capturers."""
    made = []

    def make(_device):
        made.append(RecordedSteps())
        return made[-1]

    for module in LOOPS:
        monkeypatch.setattr(module, "capturer", make)
    return made


def compiled(engine="auto", experiments=1, density=0.5):
    net = small_net()
    z = sg.noise_input(6, SIZE, seed=list(range(experiments)))
    mask = random_mask(net, density, experiments=experiments if experiments > 1 else None)
    return sg.compile(net, mask, z, engine=engine, plan="rule"), z


def fit(engine="auto", experiments=1, **arguments):
    module, z = compiled(engine, experiments)
    _, y, clean = problem()
    run = sg.fit(module, z, y, **{"steps": 24, "every": 5, "clean": clean, **arguments})
    return run, module.values.detach().clone()


def same_fits(ours, theirs):
    (run, values), (other, other_values) = ours, theirs
    assert torch.equal(run.image, other.image)
    assert torch.equal(values, other_values)
    assert run.stopped_at == other.stopped_at
    assert run.history.step == other.history.step
    assert run.history.columns == other.history.columns
    for column in run.history.columns:
        assert torch.equal(run.history[column], other.history[column])


OPTIONS = {
    "plain": {},
    "average": {"average": 0.9},
    "variation": {"tv_weight": 0.01},
    "langevin": {"langevin": 0.5},
    "rings": {"rings": 4},
    "float64 rules": {"stop": lambda: sg.stop.EMV(0.2, 100)},
    "window": {"stop": lambda: sg.stop.WMV(4, 100)},
}


def made(options):
    return {name: value() if callable(value) else value for name, value in options.items()}


JITTER = {"input_jitter": 0.03, "seed": 5}


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param(e, o, id=f"{name}-{e}")
        for name, o in {**OPTIONS, "jitter": JITTER}.items()
        for e in ("auto", "reference")
    ],
)
def test_a_replayed_fit_has_the_bits_of_the_loop(request, engine, options):
    expected = fit(engine, **made(options))
    recorders = request.getfixturevalue("captured")
    same_fits(fit(engine, **made(options)), expected)
    (recorder,) = recorders
    assert recorder.bodies == WARM_UP + 1
    assert recorder.replays == 24 - WARM_UP


@pytest.mark.parametrize("experiments", [1, 3])
def test_a_replayed_step_that_also_learns_z_has_the_bits_of_the_loop(experiments):
    """As one of somebody's own; what could only be kept of a constant z is not made at every step."""

    def run(capturer):
        module, z = compiled(experiments=experiments)
        _, y, _ = problem()
        z.requires_grad_()

        def body():
            z.grad = module.values.grad = None
            (module(z) - y).square().sum().backward()
            with torch.no_grad():
                z.sub_(z.grad, alpha=1e-3)
                module.values.sub_(module.values.grad, alpha=1e-3)

        step = StepRunner(body, capturer)
        for _ in range(12):
            step()
        return z.detach(), module.values.detach()

    recorder = RecordedSteps()
    for ours, theirs in zip(run(recorder), run(None), strict=True):
        assert torch.equal(ours, theirs)
    assert recorder.replays == 12 - WARM_UP


def test_a_replayed_fit_of_several_experiments_has_the_bits_of_the_loop(request):
    arguments = {"experiments": 3, "seed": [3, 1, 2], "langevin": 0.5}
    expected = fit(**arguments, stop=sg.stop.WMV(4, 100))
    request.getfixturevalue("captured")
    same_fits(fit(**arguments, stop=sg.stop.WMV(4, 100)), expected)


def test_a_replayed_fit_of_a_plain_module_has_the_bits_of_the_loop(request):
    z, y, clean = problem()

    def run():
        net = small_net()
        return sg.fit(net, z, y, steps=12, every=4, clean=clean), torch.cat(
            [p.detach().flatten() for p in net.parameters()]
        )

    expected = run()
    recorders = request.getfixturevalue("captured")
    same_fits(run(), expected)
    assert recorders[0].replays == 12 - WARM_UP


@pytest.mark.parametrize(
    ("rule", "first", "patience"),
    [(sg.stop.EMV, 0.5, 3), (sg.stop.WMV, 3, 4), (sg.stop.WMV, 2, 1), (sg.stop.EMV, 0.9, 1)],
)
@pytest.mark.parametrize("experiments", [1, 2])
def test_a_rule_that_ends_a_fit_is_heard_late_and_obeyed_exactly(request, rule, first, patience, experiments):
    """The parameters, the image and the history are those of the step at which it stopped."""
    arguments = {"experiments": experiments, "lr": 0.2, "steps": 300, "every": 7}
    expected = fit(**arguments, stop=rule(first, patience))
    stopped = expected[0].stopped_at if experiments > 1 else [expected[0].stopped_at]
    assert None not in stopped
    request.getfixturevalue("captured")
    same_fits(fit(**arguments, stop=rule(first, patience)), expected)


def test_a_rule_of_somebody_else_is_asked_between_the_steps(request):
    class After:
        def __init__(self):
            self.seen = []

        def update(self, step, image):
            self.image = image
            self.seen.append(image)
            return step == 9

    expected = fit(stop=After())
    request.getfixturevalue("captured")
    rule = After()
    same_fits(fit(stop=rule), expected)
    assert expected[0].stopped_at == 10
    assert len({image.sum().item() for image in rule.seen}) == 10


def test_a_resumed_replayed_fit_has_the_bits_of_the_loop(request, tmp_path):
    arguments = {"average": 0.9, "langevin": 0.5, "steps": 30}
    expected = fit(**arguments, stop=sg.stop.WMV(4, 100))
    request.getfixturevalue("captured")
    checkpoints = sg.Checkpoints(tmp_path, seconds=1e9)

    def progress(step, _steps, _values):
        if step > 10:
            checkpoints.request_stop()

    with pytest.raises(sg.RunInterrupted):
        fit(**arguments, stop=sg.stop.WMV(4, 100), checkpoints=checkpoints, progress=progress)
    same_fits(fit(**arguments, stop=sg.stop.WMV(4, 100), checkpoints=sg.Checkpoints(tmp_path, resume=True)), expected)


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_a_checkpoint_of_a_fit_that_ended_is_that_of_the_loop(request, tmp_path, seconds):
    arguments = {"lr": 0.2, "steps": 300}
    expected = fit(**arguments, stop=sg.stop.EMV(0.5, 3))
    request.getfixturevalue("captured")
    run = fit(**arguments, stop=sg.stop.EMV(0.5, 3), checkpoints=sg.Checkpoints(tmp_path, seconds=seconds))
    same_fits(run, expected)
    assert sg.Checkpoints(tmp_path).newest() == ("fit", expected[0].stopped_at)
    again = fit(**arguments, stop=sg.stop.EMV(0.5, 3), checkpoints=sg.Checkpoints(tmp_path, resume=True))
    same_fits(again, expected)


def search(engine="auto", experiments=1, **arguments):
    z, y, _ = problem()
    z = sg.noise_input(6, SIZE, seed=list(range(experiments)))
    seed = {"seed": list(range(experiments))} if experiments > 1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sg.DisconnectedMaskWarning)
        return sg.search_mask(
            small_net(),
            z,
            y,
            **{"steps": 12, "every": 5, "density": 0.2, "engine": engine, "plan": "rule", **seed, **arguments},
        )


def same_searches(result, other):
    assert result.settled_at == other.settled_at
    assert result.history.step == other.history.step
    for column in ("loss", "kl"):
        assert torch.equal(result.history[column], other.history[column])
    for name, logits in other.logits.items():
        assert torch.equal(result.logits[name], logits)
    for name, kept in other.mask.tensors.items():
        assert torch.equal(result.mask.tensors[name], kept)


SEARCHES = {
    "weights": {},
    "kernels": {"group": "kernel"},
    "blocks": {"group": "4x1"},
    "all": {"prunable": "all"},
    "settled": {"stop": lambda: sg.stop.Settled(4, 0.9), "steps": 40},
    "experiments": {"experiments": 3},
    "plain PyTorch": {"engine": "reference"},
    "plain PyTorch, experiments": {"engine": "reference", "experiments": 2},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_replayed_search_has_the_bits_of_the_loop(request, options):
    expected = search(**made(options))
    recorders = request.getfixturevalue("captured")
    same_searches(search(**made(options)), expected)
    (recorder,) = recorders
    assert recorder.bodies == WARM_UP + 1
    assert recorder.replays > 0


def test_a_resumed_replayed_search_has_the_bits_of_the_loop(request, tmp_path):
    expected = search(steps=30)
    request.getfixturevalue("captured")
    checkpoints = sg.Checkpoints(tmp_path, seconds=1e9)
    with pytest.raises(sg.RunInterrupted):
        search(
            steps=30,
            checkpoints=checkpoints,
            progress=lambda step, *_: checkpoints.request_stop() if step > 5 else None,
        )
    same_searches(search(steps=30, checkpoints=sg.Checkpoints(tmp_path, resume=True)), expected)


def test_progress_comes_a_row_later_and_completely(captured):
    told = []
    z, y, clean = problem()
    run = sg.fit(
        small_net(),
        z,
        y,
        steps=12,
        every=4,
        clean=clean,
        progress=lambda step, steps, values: told.append((step, steps, values)),
    )
    assert [step for step, _, _ in told] == [1, 5, 9, 12]
    for (_, _, values), *row in zip(told, run.history["loss"], run.history["psnr"], strict=True):
        assert list(values.values()) == [value.mean().item() for value in row]


@pytest.mark.parametrize(("run", "losses"), [(fit, "fitting.step"), (search, "masks.sampled")])
def test_a_loss_that_is_not_finite_is_told_with_its_step(captured, monkeypatch, run, losses):
    """Even though the host hears of it when the device is some steps further."""
    module, calls = import_module(f"sparse_gen.{losses}"), torch.zeros((), dtype=torch.int64)
    squared_errors = module.squared_errors

    def infinite_from_step_8(output, y):
        factor = torch.where(calls >= 8, torch.inf, 1.0)
        calls.add_(1)
        return squared_errors(output, y) * factor

    monkeypatch.setattr(module, "squared_errors", infinite_from_step_8)
    with pytest.raises(FloatingPointError, match="none at step 8,"):
        run(steps=24)


class Counter:
    """A body that adds one, and cannot be captured if told so."""

    def __init__(self, reads=False):
        self.count, self.reads, self.calls = torch.zeros(()), reads, 0

    def __call__(self):
        self.calls += 1
        self.count += 1
        if self.reads:
            self.count.item()


class Failing(RecordedSteps):
    def warm_up(self, body):
        body()

    def capture(self, body):
        raise RuntimeError("operation not permitted when stream is capturing.\nSearch for `cudaErrorStreamCapture…`")


def test_a_step_that_cannot_be_captured_runs_call_by_call_with_one_sentence():
    body = Counter()
    run = StepRunner(body, Failing())
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(10):
            run()
    assert body.count == body.calls == 10
    assert [str(warning.message) for warning in told] == [
        "steps run call by call, as this one cannot be captured into a CUDA graph (RuntimeError: operation not "
        "permitted when stream is capturing)"
    ]


def test_a_step_is_captured_after_the_warm_up_and_not_called_again():
    body = Counter()
    run = StepRunner(body, RecordedSteps())
    for _ in range(10):
        run()
    assert body.count == 10
    assert body.calls == WARM_UP + 1


def test_the_guard_sees_reads():
    with pytest.raises(AssertionError, match="in a step"):
        RecordedSteps().capture(Counter(reads=True))
    x = torch.arange(4.0)
    for read in (
        lambda: bool(x[0] > 1),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor(3),
        lambda: x.cpu(),
    ):
        with pytest.raises(AssertionError, match="in a step"), OnDeviceOnly(), Recorder():
            read()


def test_only_cuda_captures(monkeypatch):
    assert capturer(torch.device("cpu")) is None
    monkeypatch.setattr(CudaGraphs, "__init__", lambda self, device: None)
    assert isinstance(capturer(torch.device("cuda")), CudaGraphs)
    monkeypatch.setenv("SPARSE_GEN_CAPTURE", "0")
    assert capturer(torch.device("cuda")) is None


def test_late_values_are_those_of_their_time():
    seen, value = [], torch.zeros(2)
    late = Readback(late=True)
    for step in range(3):
        value += 1
        late.push({"value": value}, lambda values, step=step: seen.append((step, values["value"].tolist())))
        assert len(seen) == step
    late.flush()
    late.flush()
    assert seen == [(0, [1, 1]), (1, [2, 2]), (2, [3, 3])]


def test_late_values_keep_shape_type_and_bits():
    given = {
        "": torch.tensor(-1),
        "loss": torch.tensor([0.1, float("nan"), -0.0]),
        "psnr": torch.rand(3, 2, dtype=torch.float64).T,
        "ended": torch.tensor([True, False]),
        "scalar": torch.tensor(0.5),
    }
    seen, late = [], Readback(late=True)
    late.push(given, seen.append)
    late.flush()
    assert list(seen[0]) == list(given)
    for name, value in given.items():
        assert seen[0][name].dtype == value.dtype
        torch.testing.assert_close(seen[0][name], value, rtol=0, atol=0, equal_nan=True)


def test_no_step_waits_for_late_values():
    """They are copied beside the steps, from memory of their own, and the host waits for the copy alone."""
    recorded, waits = [], []

    class Streams(PretendedStreams):
        def record(self):
            recorded.append((self._current, super().record()))
            return recorded[-1][1]

        def wait(self, event):
            waits.append(self._current)
            super().wait(event)

    streams, value, seen = Streams(), torch.zeros(2), []
    late = Readback(late=True, streams=streams)
    with streams:
        for _ in range(4):
            value += 1
            late.push({"value": value, "": torch.zeros((), dtype=torch.int64)}, lambda v: seen.append(v["value"][0]))
        late.flush()
    assert [int(first) for first in seen] == [1, 2, 3, 4]
    assert streams.calls[SIDE] == ["aten::copy_"] * 4
    assert streams.calls[MAIN].count("aten::cat") == 4
    assert waits == [SIDE] * 4
    assert [event.synchronized for stream, event in recorded if stream == SIDE] == [True] * 4
    assert not any(event.synchronized for stream, event in recorded if stream == MAIN)
