"""How a plan is made on a GPU: which layouts are measured there, by which clock, and where that is remembered."""

from importlib import import_module

import pytest
import torch
from equality import scattered_mask
from pretended_gpu import PretendedGpu, compile_there

import sparse_gen as sg
from sparse_gen.engine import layouts, measure
from sparse_gen.engine.clock import Clock, CudaClock, clock
from sparse_gen.engine.graph import Conv
from sparse_gen.engine.layouts import ConvStage, candidates

CUDA = torch.device("cuda", 0)


def stage(upsample=None, density=0.3, device=CUDA, pool=False, blocks=False, experiments=1):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 4, 3, 3, generator=generator) < density
    mask = mask[:1].expand(8, 4, 3, 3) if blocks else mask
    conv = Conv("w", None, (8, 4, 3, 3), 1, 1, "reflect", upsample, pool)
    return ConvStage("w", conv, mask, (8, 8), True, False, device, experiments)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Names the GPU; kernels of ours are there for all operators."""
    monkeypatch.setenv("SPARSE_GEN_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "_memories", {})
    monkeypatch.setattr(layouts, "has_gpu_kernel", lambda operator: True)

    def named(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    named("A")
    return named


@pytest.fixture
def timed(monkeypatch):
    """Replaces the measurement; the stages and layouts that were measured."""
    seen = []

    def arrange(**milliseconds):
        def layout_times(stage, layouts, dtype):
            seen.append((stage, layouts))
            return {layout: milliseconds.get(layout.replace(" ", "_"), 9.0) for layout in layouts}

        monkeypatch.setattr(measure, "layout_times", layout_times)
        return seen

    return arrange


def test_candidates():
    assert candidates(stage()) == ["dense", "dense fused", "sparse"]
    assert candidates(stage(blocks=True)) == ["dense", "dense fused", "blocks", "sparse"]
    assert candidates(stage("nearest")) == ["dense", "dense phases", "dense fused", "taps", "upsampled sparse"]
    assert candidates(stage("bilinear")) == ["dense", "dense fused", "taps", "upsampled sparse"]
    assert candidates(stage("bilinear_corners"))[0] == "dense"
    assert "dense fused" not in candidates(stage(device=torch.device("cpu")))


@pytest.mark.parametrize("fastest", ["dense", "dense fused", "sparse"])
def test_the_fastest_is_taken(gpu, timed, fastest):
    timed(**{fastest.replace(" ", "_"): 1.0})
    assert measure.measured_layout(stage(), torch.float32) == fastest


def test_times_are_remembered_by_gpu_and_shape(gpu, timed, monkeypatch):
    seen = timed(sparse=1.0)
    measure.measured_layout(stage(), torch.float32)
    measure.measured_layout(stage(), torch.float32)
    assert len(seen) == 1
    measure.measured_layout(stage(pool=True), torch.float32)
    assert len(seen) == 2
    measure.memory_here(CUDA).save()
    gpu("B")
    measure.measured_layout(stage(), torch.float32)
    assert len(seen) == 3
    gpu("A")
    monkeypatch.setattr(measure, "_memories", {})  # another process
    assert measure.measured_layout(stage(), torch.float32) == "sparse"
    assert measure.known_time(stage(), "sparse", torch.float32) == 1.0
    assert len(seen) == 3
    # The precision of PyTorch's convolutions is not that of another measurement.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    measure.measured_layout(stage(), torch.float32)
    assert len(seen) == 4


def test_times_of_one_and_of_several_experiments_are_apart(gpu, timed):
    # Stored caches hold times under this key.
    kept = int(stage().mask.sum())
    key = f"4x8x8 to 8, 3x3, stride 1, reflect 1, upsample None, input gradient, kept {kept}, float32"
    assert measure.stage_key(stage(), torch.float32) == key
    assert measure.stage_key(stage(experiments=3), torch.float32) == f"{key}, 3 experiments"
    timed(sparse=1.0)
    assert measure.measured_layout(stage(), torch.float32) == "sparse"
    timed(dense_fused=1.0)
    assert measure.measured_layout(stage(experiments=3), torch.float32) == "dense fused"
    assert measure.measured_layout(stage(), torch.float32) == "sparse"


def watched(run):
    """The tensors that a measured step is given and gives, in turn."""
    seen, step = [], run._step
    forward, backward = step.forward, step.backward

    def watched_forward(inputs, parameters, trains):
        y, kept = forward(inputs, parameters, trains)
        seen.extend([*inputs, *parameters, y])
        return y, kept

    def watched_backward(gradient, kept, parameters, needs):
        grads, own = backward(gradient, kept, parameters, needs)
        seen.extend([gradient, *grads, *own])
        return grads, own

    step.forward, step.backward = watched_forward, watched_backward
    return seen


@pytest.mark.parametrize("upsample", [None, "nearest"])
def test_a_measurement_runs_all_experiments_in_every_tensor(upsample):
    one = stage(upsample, device=torch.device("cpu"), experiments=3)
    for layout in candidates(one):
        run = measure._Run(layout, one, torch.float64)
        seen = watched(run)
        assert run.time() > 0
        assert len(seen) == 6 and all(len(tensor) == 3 for tensor in seen)
        if run._place is not None:  # of values (E, kept) and a zero behind them, each weight's
            weight = seen[1]
            kept = weight[:, one.mask].flatten()
            assert torch.equal(torch.cat([kept, kept.new_zeros(1)])[run._place].view_as(weight), weight)
            assert torch.equal(weight.flatten()[run._kept], kept)


def measured_for(monkeypatch, masks, experiments):
    """The numbers of experiments that the stages of a network were measured for."""
    seen = set()
    layout_times = lambda stage, layouts, dtype: seen.add(stage.experiments) or dict.fromkeys(layouts, 1.0)  # noqa: E731
    monkeypatch.setattr(measure, "layout_times", layout_times)
    net = sg.generators.Hourglass(in_channels=4, channels=(4, 6), seed=0)
    z = sg.noise_input(4, (12, 12), seed=list(range(experiments)))
    mask = scattered_mask(net, 0.6, experiments=masks)
    return seen, net, mask, z


@pytest.mark.parametrize("masks", [None, 3])
def test_a_pass_of_several_experiments_is_measured_as_that(gpu, monkeypatch, masks):
    seen, net, mask, z = measured_for(monkeypatch, masks, 3)
    with PretendedGpu():
        compile_there(monkeypatch, net, mask, z, plan="measure")
    assert seen == {3}


@pytest.mark.parametrize("masks", [None, 3])
def test_on_the_cpu_an_experiment_has_the_layouts_that_it_has_alone(gpu, monkeypatch, masks):
    seen, net, mask, z = measured_for(monkeypatch, masks, 3)
    sg.compile(net, mask, z)
    assert seen == {1}


def test_a_search_of_several_experiments_is_measured_as_that(gpu, monkeypatch):
    seen, net, _, z = measured_for(monkeypatch, None, 1)
    # The search's own tensors stay on the CPU; that it shares a pass of a GPU is all that is asked.
    monkeypatch.setattr(import_module("sparse_gen.engine.compile"), "on_gpu", lambda device: True)
    y = torch.full((1, 3, 12, 12), 0.5)
    sg.search_mask(net, z, y, density=0.9, prunable="all", steps=1, seed=[0, 1])
    assert seen == {2}


def test_references_are_not_measured(gpu, monkeypatch):
    monkeypatch.setattr(layouts, "has_gpu_kernel", lambda operator: operator == "masked_conv2d_loaded")
    assert measure.contenders(stage(), torch.float32) == ["dense", "dense fused"]
    assert measure.contenders(stage("nearest"), torch.float32) == ["dense", "dense phases", "dense fused"]
    # Kernels compute in float32; in double everything but PyTorch's convolution is a reference.
    assert measure.contenders(stage(), torch.float64) == ["dense"]


def test_the_tap_fold_is_measured_where_its_kernel_was_compiled(gpu, timed, monkeypatch):
    monkeypatch.setattr(layouts, "has_gpu_kernel", lambda operator: operator == "sparse_upsample_conv2d")
    for upsample in ("nearest", "bilinear", "bilinear_corners"):
        assert measure.contenders(stage(upsample), torch.float32)[-1] == "taps"
    seen = timed(taps=1.0)
    assert measure.measured_layout(stage("nearest"), torch.float32) == "taps"
    assert [layouts for _, layouts in seen] == [["dense", "dense phases", "taps"]]


def test_a_measured_plan_of_a_network(gpu, monkeypatch):
    """By a clock on which a layout's turn decides: what is measured runs where the network runs."""
    steps = {"dense": 5.0, "dense phases": 4.0, "dense fused": 1.0}

    class Turns(Clock):
        def __init__(self, layout):
            self._step, self._now = steps.get(layout, 7.0), 0.0

        def mark(self):
            self._now += self._step
            return self._now

    made = measure._Run.__init__

    def with_turns(self, layout, *arguments):
        made(self, layout, *arguments)
        self._clock = Turns(layout)

    monkeypatch.setattr(measure._Run, "__init__", with_turns)
    net = sg.generators.Hourglass(in_channels=4, channels=(4, 6), seed=0).double()
    z = sg.noise_input(4, (12, 12), seed=0).double()
    monkeypatch.setattr(measure, "has_kernel", lambda layout, dtype: True)  # in double too
    with PretendedGpu():
        fast = compile_there(monkeypatch, net, scattered_mask(net, 0.6), z, plan="measure")
    assert {s.layout for s in fast.plan.stages} == {"dense fused", "with its normalisation"}
    assert {s.ms for s in fast.plan.stages} == {2000.0, None}


def test_the_clock_of_a_gpu_waits_for_the_later_event(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            done.append(self)

        def elapsed_time(self, later):
            assert done[-1] is later
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ticks = clock(CUDA)
    assert isinstance(ticks, CudaClock)
    assert ticks.seconds(ticks.mark(), ticks.mark()) == 0.25
    assert len(done) == 1
    assert not isinstance(clock(torch.device("cpu")), CudaClock)
