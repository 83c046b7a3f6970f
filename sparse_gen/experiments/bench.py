"""A step of the mask search and of the training, ours beside the published loop and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

import sparse_gen as sg
from sparse_gen.engine.capture import WARM_UP as WARM_UP_STEPS
from sparse_gen.engine.capture import StepRunner, capturer
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.experiments.baselines import (
    TEMPERATURE,
    CompiledSearch,
    CompiledTraining,
    PlainSearch,
    PlainTraining,
    PublishedSearch,
    PublishedTraining,
)
from sparse_gen.experiments.config import check_device
from sparse_gen.experiments.environment import resolve_device, use_threads
from sparse_gen.experiments.memory import available_memory, estimate_memory
from sparse_gen.experiments.timing import Times, fastest_plain, make_records, timed_round, warm_up_rounds
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.generators.sizes import deepest_depth
from sparse_gen.masks.layered import layered_mask
from sparse_gen.masks.sampled import SampledNetwork
from sparse_gen.ops.concrete_mask import concrete_mask, concrete_mask_update
from sparse_gen.ops.philox import Stream, seed_tensor, uniform
from sparse_gen.ops.squared_errors import squared_errors

# The paper's constants, and all parameters prunable: the published loop knows nothing else.
SEARCH = {"lr": 1e-2, "kl_weight": 1e-9, "prior": 0.05}
PROVIDERS = ("published", "plain", "ours")
NAMES = {"search": "mask-search step", "training": "masked training step", "dense": "dense DIP step"}
SMALL = 192  # the smallest image that six scales take


class OurSearch:
    """The loop body of `sg.search_mask`."""

    def __init__(self, net, z, y, seeds=0):
        network = training_copy(net)
        self.layout, self.y = ParameterLayout.of(network), y
        self.weight = self.layout.flatten(dict(network.named_parameters()))
        self.seed, self.count = seed_tensor(seeds, z.device), torch.tensor(0, device=z.device)
        nothing = ParameterLayout({}), z.new_zeros(1, 0)
        self.network = SampledNetwork(network, self.layout, *nothing, z, len(self.seed), "auto", None)
        self.logits, self.exp_avg, self.exp_avg_sq = (
            self.weight.new_zeros(len(self.seed), self.layout.numel) for _ in range(3)
        )
        _, masked = concrete_mask(self.logits, self.weight, self.seed, 0, temperature=TEMPERATURE)
        self.network.masked_weight.copy_(masked)
        self.step = StepRunner(self._step, capturer(z.device))

    def _step(self):
        _, gradient = self.network.loss(self.y)
        concrete_mask_update(
            self.logits, self.exp_avg, self.exp_avg_sq, self.network.masked_weight, self.weight, gradient, self.seed,
            self.count, temperature=TEMPERATURE, **SEARCH,
        )  # fmt: skip
        self.count += 1


class OurTraining:
    """The loop body of `sg.fit`."""

    def __init__(self, net, mask, z, y, *, lr):
        self.module, self.y, self.count = sg.compile(net, mask, z), y, torch.tensor(0, device=z.device)
        self.z = z.contiguous(memory_format=self.module.memory_format)
        self.optimiser = Optimiser(self.module, lr, 0.0, seed_tensor(0, z.device))
        self.step = StepRunner(self._step, capturer(z.device))

    def output(self):
        return self.module(self.z).detach()

    def _step(self):
        loss = squared_errors(self.module(self.z), self.y)
        self.optimiser.step(loss.sum(), self.count)
        self.count += 1


class Inputs(NamedTuple):
    """What a step starts from: network, mask (None keeps everything), z (E, …) and y."""

    net: nn.Module
    mask: sg.Mask | None
    z: torch.Tensor
    y: torch.Tensor


_TRAININGS = {"published": PublishedTraining, "plain": PlainTraining, "compile": CompiledTraining}
_SEARCHES = {"published": PublishedSearch, "plain": PlainSearch, "compile": CompiledSearch}


@dataclass(frozen=True)
class StepCase:
    """A step that is measured.

    Attributes:
        kind: "search", "training" (of what a mask keeps) or "dense" (training without a mask).
        size: side of the square image in pixels.
        density: of a `layered_mask`, for "training".
        mask: a mask file to take instead.
        experiments: E; a baseline takes one after the other.
        depth: scales of the hourglass.
        device: where.
    """

    kind: str
    size: int
    density: float = 0.05
    mask: str | None = None
    mask_name: str = ""
    experiments: int = 1
    depth: int = 6
    device: str = "cpu"

    @property
    def name(self) -> str:
        parts = [NAMES[self.kind], f"{self.size}²"]
        if self.kind == "training":
            parts.append(self.mask_name or f"{100 * self.density:g} %")
        if self.experiments > 1:
            parts.append(f"E = {self.experiments}")
        return ", ".join(parts)

    @property
    def facts(self) -> dict[str, Any]:
        """For whoever draws the records."""
        mask = None if self.kind != "training" else self.mask_name or "layered"
        density = 1.0 if self.kind == "dense" else None if self.kind == "search" else self.density
        return {
            "kind": self.kind, "size": self.size, "experiments": self.experiments, "mask": mask, "density": density
        }  # fmt: skip

    def smaller(self) -> StepCase:
        """The same on the smallest image that the depth takes."""
        return replace(self, size=min(self.size, SMALL))

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        net = sg.generators.Hourglass(depth=self.depth)
        mask = None
        if self.kind == "training":
            mask = layered_mask(net, self.density) if self.mask is None else sg.Mask.load(self.mask)
        size = (self.size, self.size)
        z = sg.noise_input(net.in_channels, size, seed=list(range(self.experiments)), device=self.device)
        generator = torch.Generator().manual_seed(0)
        y = torch.rand(1, 3, *size, generator=generator, dtype=dtype).to(self.device)
        return Inputs(net.to(self.device, dtype), mask, z.to(dtype), y)

    def baselines(self, provider: str, inputs: Inputs) -> list[Any]:
        """One an experiment."""
        net, mask, z, y = inputs
        rows = [z[e : e + 1] for e in range(self.experiments)]
        if self.kind == "search":
            return [_SEARCHES[provider](net, row, y, **SEARCH) for row in rows]
        return [_TRAININGS[provider](net, mask, row, y, lr=1e-2) for row in rows]

    def ours(self, inputs: Inputs) -> OurSearch | OurTraining:
        net, mask, z, y = inputs
        if self.kind == "search":
            return OurSearch(net, z, y, list(range(self.experiments)))
        return OurTraining(net, mask, z, y, lr=1e-2)

    def step(self, provider: str, inputs: Inputs) -> Callable[[], None]:
        """A provider's step, all experiments in it."""
        if provider == "ours":
            return self.ours(inputs).step
        everyone = self.baselines(provider, inputs)

        def step() -> None:
            for one in everyone:
                one.step()

        return StepRunner(step, capturer(torch.device(self.device)) if provider == "plain" else None)


def check(case: StepCase) -> float:
    """Take three steps in float64 on a small image by all providers, on a GPU five of which two are replayed; compare.

    Returns:
        The largest difference: of a logit, or of an output relative to its norm.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    # With a given mask all scales are needed; four are enough to see a difference, and much faster.
    small = case.smaller() if case.mask else replace(case, size=min(case.size, 80), depth=min(case.depth, 4))
    error = _search_error(small) if case.kind == "search" else _training_error(small)
    # A γ whose gradient is 0 takes Adam's full step in the direction of its rounding.
    tolerance = 1e-9 if case.kind == "search" else 1e-6
    if not error <= tolerance:
        raise RuntimeError(f"expected the same result from all providers of {case.name}, got a difference of {error}")
    return error


def _checked_steps(case: StepCase) -> int:
    return 3 if case.device == "cpu" else WARM_UP_STEPS + 2


def _search_error(case: StepCase) -> float:
    inputs = case.inputs(torch.float64)
    ours = case.ours(inputs)
    published, plain = (case.baselines(name, inputs) for name in ("published", "plain"))
    for step in range(_checked_steps(case)):
        logistic = uniform(ours.seed, step, Stream.MASK, ours.layout.numel).double().logit()
        for e, row in enumerate(logistic):
            published[e].step(list(ours.layout.views(row).values()))
            plain[e].step(row)
        ours.step()
    return max(
        (other.flat_logits() - ours.logits[e]).abs().max().item()
        for others in (published, plain)
        for e, other in enumerate(others)
    )


def _training_error(case: StepCase) -> float:
    inputs = case.inputs(torch.float64)
    ours = case.ours(inputs)
    others = [case.baselines(name, inputs) for name in ("published", "plain")]
    for _ in range(_checked_steps(case)):
        for training in [ours, *others[0], *others[1]]:
            training.step()
    output = ours.output()
    errors = [
        (one.output()[0] - output[e]).norm() / output[e].norm() for other in others for e, one in enumerate(other)
    ]
    return max(error.item() for error in errors)


def _check_memory(size: int, depth: int, device: torch.device) -> None:
    available = available_memory(device)
    needed = estimate_memory(sg.generators.Hourglass(depth=depth), (size, size), device=device.type).search
    if available is not None and needed > available:
        raise ValueError(
            f"size: expected steps that fit into the {available / 1e9:.1f} GB available on {device}, got {size}, whose "
            f"take about {needed / 1e9:.1f} GB, give a smaller one"
        )


def bench(
    size: int = 256,
    density: float = 0.05,
    *,
    rounds: int = 10,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure a step of the masked training and of the mask search of the hourglass on this machine.

    Args:
        size: side of the square image in pixels.
        density: fraction of the parameters that the training keeps.
        rounds: steps of each provider that count, in turn.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; None takes PyTorch's number.
        progress: called with (name of the step, round, rounds).

    Returns:
        A record a step and provider, as `timing.make_records` makes them.

    Raises:
        ValueError: an argument is out of range.
    """
    counts = {"size": size, "rounds": rounds} | ({} if threads is None else {"threads": threads})
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}, give another")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a fraction above 0 and up to 1, got {density}, give another")
    where = resolve_device(check_device("device", device))
    depth = deepest_depth((size, size))
    _check_memory(size, depth, where)
    where = str(where)
    records = []
    with use_threads(threads), fastest_plain(where):
        for kind in ("training", "search"):
            case = StepCase(kind, size, density, depth=depth, device=where)
            error = check(case)
            inputs = case.inputs()
            providers = {name: case.step(name, inputs) for name in PROVIDERS}
            times: Times = {}
            warm_up = warm_up_rounds(where)
            for done in range(warm_up + rounds):
                if progress is not None:
                    progress(case.name, done, warm_up + rounds)
                timed_round(providers, times, where)
            if progress is not None:
                progress(case.name, warm_up + rounds, warm_up + rounds)
            counted = {name: measured[warm_up:] for name, measured in times.items()}
            records += make_records("bench", case.name, counted, device=where, error=error, facts=case.facts)
    return records
