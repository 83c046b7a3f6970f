"""A masked network that holds, trains and stores only the weights its mask keeps."""

from __future__ import annotations

import dataclasses
import os
from copy import deepcopy
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence

from sparse_gen.engine.checks import check_input
from sparse_gen.engine.count import Count, count_step
from sparse_gen.engine.functional import run_experiments, training_copy
from sparse_gen.engine.graph import Graph
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.layouts import candidates, on_gpu
from sparse_gen.engine.lower import lower
from sparse_gen.engine.measure import known_time, machine, measured_layout, memory_here
from sparse_gen.engine.plan import Plan, Stage, engine_stages, others_of, reference_stages
from sparse_gen.engine.profile import profile
from sparse_gen.engine.program import Choose, Program
from sparse_gen.engine.replay import Replay, check_replayed
from sparse_gen.engine.run import NetworkRun, in_one_pass
from sparse_gen.engine.stack import Stack, initial_weights, template
from sparse_gen.ops.extension import status

DEVICES = ("cpu", "cuda")


class CompiledGenerator(nn.Module):
    """What `compile` returns: the outputs and gradients of the masked network, kept weights as parameters.

    Attributes:
        values: the kept weights, (E, kept), the only parameter; where experiments keep different numbers, those behind
            an experiment's last one are 0, play no part and stay 0.
        plan: what runs how.
    """

    plan: Plan

    def __init__(self, original, network, layout: ParameterLayout, index, values, z, sparse_run, plan: Plan):
        super().__init__()
        self._sparse_run: NetworkRun | None = sparse_run
        # In a tuple, so that their parameters are not registered as this module's.
        self._modules_outside = (original, network)
        self._layout = layout
        self.plan = plan
        self.values = nn.Parameter(values)
        self.register_buffer("_index", index, persistent=False)
        self.register_buffer("_example_input", z.detach(), persistent=False)

    @property
    def experiments(self) -> int:
        return len(self.values)

    @property
    def runs_on_the_engine(self) -> bool:
        """Whether it runs in stages; everything is plain PyTorch otherwise, for the reason that the plan gives."""
        return self._sparse_run is not None

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of z that runs without being reordered at every step: ours is row by row, oneDNN's by pixel."""
        return torch.channels_last if self._sparse_run is None else torch.contiguous_format

    def kernel_entries(self) -> torch.Tensor:
        """Which of `values` belong to a weight with kernel dimensions: bool, broadcastable to (E, kept)."""
        sizes = [prod(shape) for shape in self._layout.shapes.values()]
        kernels = torch.tensor([len(shape) == 4 for shape in self._layout.shapes.values()])
        entries = kernels.repeat_interleave(torch.tensor(sizes)).to(self._index.device)
        return torch.cat([entries, entries.new_zeros(1)])[self._index]

    def profile(self, z: torch.Tensor | None = None, rounds: int = 5) -> Plan:
        """The plan with the milliseconds of every stage, forward and backward, measured in whole steps.

        Args:
            z: (E, C, H, W) of the example input's size, which serves by default; one experiment runs, or all that
                share a pass on a GPU or differ in their masks.
            rounds: steps, of which the median counts.

        Raises:
            ValueError: it runs as plain PyTorch, where there are no stages to measure, or z has another size.
        """
        z = self._example_input if z is None else z
        if self._sparse_run is None:
            raise ValueError(f"expected a network that runs in stages to profile, got one of which {self.plan.reason}")
        if not self._sparse_run.takes(z):
            raise ValueError(f"expected z of the size it was compiled for, got {tuple(z.shape)}")
        program = self._sparse_run.programs[0]
        count = max(program.fewest, program.together)
        return profile(self.plan, program, self.values.detach()[:count], z[:count], rounds)

    def count(self) -> Count:
        """The kernels that a step of one experiment starts on a GPU, forward and backward, and the bytes they move.

        Raises:
            ValueError: it runs as plain PyTorch.
        """
        if self._sparse_run is None:
            raise ValueError(f"expected a network that runs in stages to count, got one of which {self.plan.reason}")
        program = self._sparse_run.programs[0]
        return count_step(program, self.values[: program.fewest], self._example_input[: program.fewest])

    def _dense(self) -> dict[str, torch.Tensor]:
        # One more, for what fills up the rows of experiments that keep fewer.
        zeros = self.values.new_zeros(self.experiments, self._layout.numel + 1)
        dense = zeros.scatter(1, self._index.expand(self.experiments, -1), self.values)
        return self._layout.views(dense[:, :-1])

    def forward(self, z: torch.Tensor, *, changes: bool = False) -> torch.Tensor:
        """(E or 1, C, H, W) to (E, …); each experiment is normalised by its own statistics.

        The sparse operators were prepared for the example input's size; another size runs as plain PyTorch. What
        depends on z alone is kept for the next call, unless z needs a gradient or `changes` says that it will be
        another one.
        """
        if z.ndim != 4 or len(z) not in (1, self.experiments):
            raise ValueError(f"expected z with {self.experiments} experiments (or 1 for all), got {tuple(z.shape)}")
        if self._sparse_run is not None and self._sparse_run.takes(z):
            return self._sparse_run(self.values, z, changes=changes)
        return run_experiments(self._modules_outside[1], self._dense(), z)

    @torch.no_grad()
    def to_dense(self) -> nn.Module | list[nn.Module]:
        """The original network with the trained weights in place and zeros where they are pruned.

        Running statistics, which the training leaves alone, are set once from the example input.

        Returns:
            One module, or a list of one an experiment where there are several.
        """
        dense = self._dense()
        modules = []
        for e in range(self.experiments):
            original = self._modules_outside[0]
            module = deepcopy(original.networks[e] if isinstance(original, Stack) else original).to(self.values.device)
            for name, parameter in module.named_parameters():
                parameter.copy_(dense[name][e])
            z = self._example_input
            _set_running_statistics(module, z[e : e + 1] if len(z) > 1 else z)
            modules.append(module)
        return modules[0] if self.experiments == 1 else modules


def _set_running_statistics(module: nn.Module, z: torch.Tensor) -> None:
    momenta = {}
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats:
            momenta[layer], layer.momentum = layer.momentum, 1.0
    if momenta:
        module(z)
    for layer, momentum in momenta.items():
        layer.momentum = momentum


def compile(
    network: nn.Module,
    mask=None,
    example_input=None,
    *,
    weights: str | None = None,
    engine: str = "auto",
    plan: Plan | str | os.PathLike[str] | None = None,
) -> CompiledGenerator:
    """Turn a network and a mask into a module with the same outputs that trains only the kept weights.

    Args:
        network: any module, or a `stack` of several initialisations; it is left untouched.
        mask: an `sg.Mask`, or None to keep everything. With a leading E there is one mask an experiment.
        example_input: z of shape (E, C, H, W), which fixes shapes, device and the number of experiments.
        weights: where the kept weights start: "mask" (those stored in it), "net" (the network's). Needed only
            where the two differ.
        engine: "auto" runs the network in stages on our operators, on the CPU or an NVIDIA GPU, "reference" everything
            as plain PyTorch.
        plan: how each convolution runs. "measure" (or None): the fastest of a short measurement, which the machine
            remembers; "rule": by density alone, the same on every machine; a `Plan`, or the path of one that was
            saved: exactly that.

    Returns:
        `CompiledGenerator`, whose `parameters()` are the kept values, (E, kept); experiments that keep fewer than the
        most have zeros behind theirs.

    Raises:
        ValueError: the mask belongs to another network (both shapes are listed), it holds an initialisation other
            than the network's and `weights` does not say which to take, or a normalisation layer is in evaluation
            mode; or the plan is of another network, mask or size.
        OSError: the plan's file cannot be read.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), section 3.2: (mask, θ_in) is trained, not the mask alone.
    """
    if example_input is None:
        raise ValueError("expected an example_input of shape (E, C, H, W), got none")
    check_input(example_input, "example_input")
    one = template(network)
    layout = ParameterLayout.of(one)
    reference = training_copy(one)
    initial = initial_weights(network, layout)
    experiments = max(len(example_input), len(initial), 1 if mask is None else mask.experiments)
    for name, count in {"example_input": len(example_input), "a stack": len(initial)}.items():
        if count not in (1, experiments):
            raise ValueError(f"expected {name} of {experiments} experiments (or 1), got {count}")
    if mask is None:
        keep = torch.ones(1, layout.numel, dtype=torch.bool, device=initial.device)
    else:
        mask.check_fits(one)
        if mask.experiments not in (1, experiments):
            raise ValueError(f"expected a mask for {experiments} experiments (or 1), got {mask.experiments}")
        keep = layout.flatten(mask.dense(one), mask.experiments).to(initial.device)
        initial = _choose_weights(mask, one, layout, initial, keep, weights)
    rows = [row.nonzero()[:, 0] for row in keep]
    index = pad_sequence(rows, batch_first=True, padding_value=layout.numel)
    extended = F.pad(initial.expand(experiments, -1), (0, 1))
    values = extended.gather(1, index.expand(experiments, -1))
    run, plan = build_run(engine, reference, layout, keep, example_input, plan, experiments)
    return CompiledGenerator(network, reference, layout, index, values, example_input, run, plan)


def build_run(
    engine: str,
    network: nn.Module,
    layout: ParameterLayout,
    keep: torch.Tensor,
    z: torch.Tensor,
    plan: Plan | str | os.PathLike[str] | None = None,
    experiments: int = 1,
) -> tuple[NetworkRun | None, Plan]:
    """A network on our operators, or None where it is to stay plain PyTorch, and its plan.

    Args:
        engine, plan: as for `compile`.
        network: from `training_copy`.
        layout: of the network's parameters, in any order.
        keep: (1, N) bool, or (E, N) of several masks.
        z: (E, C, H, W), the example.
        experiments: E, which z and keep may have in common.

    Raises:
        ValueError, OSError: as `compile`.
    """
    if engine not in ("auto", "reference"):
        raise ValueError(f"expected engine='auto' or 'reference', got {engine!r}")
    if isinstance(plan, (str, os.PathLike)) and plan not in ("measure", "rule"):
        plan = Plan.load(plan)
    graph, reason = _captured(engine, network, z)
    views = [layout.views(row.cpu()) for row in keep]
    facts = {
        "input_shape": tuple(z.shape[1:]),
        "dtype": str(z.dtype).removeprefix("torch."),
        "machine": machine(z.device),
    }
    if graph is None:
        stages = tuple(reference_stages(network, kept, z) for kept in views)
        made = Plan(stages, f"every stage runs as plain PyTorch on masked weights: {reason}", **facts)
        if isinstance(plan, Plan):
            check_replayed(plan, made, plain=reason)
        return None, made
    one_pass = in_one_pass(z.device, len(keep))
    # In one pass experiments run what any of them keeps; their plan is one of a mask that keeps all of that.
    rows = [keep] if one_pass else list(keep)
    if one_pass and len(keep) > 1:
        views = [layout.views(keep.any(dim=0).cpu())]
    kept = int(keep.sum(dim=1).max())
    # On the CPU E of them take E times as long in any layout; chosen as for one, each has the bits it has alone.
    together = experiments if one_pass and on_gpu(z.device) else 1
    programs = [Program(graph, layout, row, _chooser(plan, e, z.dtype), kept, together) for e, row in enumerate(rows)]
    stages = tuple(engine_stages(graph, program, kept) for program, kept in zip(programs, views, strict=True))
    others, calls = others_of(graph, programs[0])
    reason = "dead channels left out, resampling folded in"
    if one_pass and len(keep) > 1:
        reason += f", {len(keep)} masks in one pass over what any of them keeps"
    made = Plan(stages, reason, **facts, others=others, calls=calls)
    if isinstance(plan, Plan):
        check_replayed(plan, made)
        stages = plan.programs  # with the times of the machine that measured them
    memory_here(z.device).save()
    timed = tuple(_with_times(s, program, z.dtype) for s, program in zip(stages, programs, strict=True))
    return NetworkRun(programs, z.shape[1:], one_pass), dataclasses.replace(made, programs=timed)


def _captured(engine: str, network: nn.Module, z: torch.Tensor) -> tuple[Graph | None, str]:
    """The network as a graph, or None and why there is none."""
    if engine == "reference":
        return None, "as asked"
    if z.device.type not in DEVICES:
        return None, f"the operators run on {' and '.join(DEVICES)}, not on {z.device.type}"
    if z.device.type == "cpu" and not status().available:
        return None, f"there is no compiled library: {status().reason}"
    try:
        return lower(network, z[:1]), ""
    except Exception as error:  # whatever torch.export cannot capture; it then runs as it did
        return None, f"it cannot be captured ({type(error).__name__}: {str(error).strip().splitlines()[0]})"


def _chooser(plan: Plan | str | None, program: int, dtype: torch.dtype) -> Choose:
    if isinstance(plan, Plan):
        return Replay(plan, program)
    if plan == "rule":
        return lambda stage: candidates(stage)[0]
    return lambda stage: measured_layout(stage, dtype)


def _with_times(stages: tuple[Stage, ...], program: Program, dtype: torch.dtype) -> tuple[Stage, ...]:
    known = {stage.name: known_time(stage, layout, dtype) for stage, layout in program.convolutions.values()}
    return tuple(s if s.ms is not None else dataclasses.replace(s, ms=known.get(s.name)) for s in stages)


def _choose_weights(mask, network, layout, initial, keep, weights):
    if weights not in (None, "mask", "net"):
        raise ValueError(f"expected weights='mask' or 'net', got {weights!r}")
    if mask.weights is None:
        if weights == "mask":
            raise ValueError("expected a mask that holds its weights, got one without, use weights='net'")
        return initial
    stored = layout.flatten(mask.dense_weights(network), mask.experiments).to(initial)
    if weights is None and not torch.equal(stored, torch.where(keep, initial, 0)):
        raise ValueError(
            "expected the network that the mask was found on, got other initial weights than the mask holds, "
            "say weights='mask' or weights='net'"
        )
    return initial if weights == "net" else stored
