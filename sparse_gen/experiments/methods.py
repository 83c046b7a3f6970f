"""What is compared: ways to restore the image of a problem, all with the same steps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.denoise import check_connected
from sparse_gen.experiments.environment import precision_in_use, resolve_device, use_threads
from sparse_gen.experiments.images import read_image
from sparse_gen.experiments.memory import check_memory
from sparse_gen.experiments.plan import Experiment
from sparse_gen.experiments.problem import (
    Problem,
    check_density,
    check_same_image,
    choose_depth,
    make_rule,
    network_settings,
    pose,
    pose_together,
    selected_step,
)
from sparse_gen.experiments.stages import StageProgress, last_output, psnr_curve, recipe_of, search, train
from sparse_gen.experiments.together import stacked_masks
from sparse_gen.fitting import FitResult
from sparse_gen.masks.random import random_mask

# Not measured: an experiment of a sweep has the same bits alone, in any order, beside other processes that disturb a
# measurement, and after a kill. A stored plan could not give that, as every experiment has stages of its own.
_PLAN = "rule"
# What takes a gradient of all weights at once.
_SEARCHING = ("oes", "snip", "grasp", "synflow")


class Watched:
    """A stopping rule that is asked and noted, but not obeyed: one run then shows what it selects and the last."""

    over = False

    def __init__(self, rule):
        self.rule = rule
        plain = {name: value for name, value in vars(rule).items() if isinstance(value, (int, float))}
        self.watches = f"{type(rule).__name__} {plain}"  # a checkpoint compares the plain attributes of a rule

    def update(self, step: int, image: torch.Tensor) -> bool:
        self.rule.update(step, image)
        return False

    def advance(self, step: torch.Tensor, image: torch.Tensor) -> None:
        self.rule.advance(step, image)

    @property
    def image(self) -> torch.Tensor:
        return self.rule.image

    def state(self) -> dict[str, torch.Tensor]:
        return self.rule.state()

    def restore(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        self.rule.restore(state, device)


def run_experiment(
    experiment: Experiment, checkpoints: Checkpoints, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run one experiment of a sweep: `run_experiments` of one."""
    return run_experiments([experiment], checkpoints, progress)[0]


def run_experiments(
    experiments: Sequence[Experiment], checkpoints: Checkpoints, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Run experiments of a sweep at the same time, each with the result that it has alone.

    Args:
        experiments: what to do; they differ in image, noise and seed only, see `sparse_gen.experiments.together`.
        checkpoints: where their state is stored, and resumed from if wanted.
        progress: called with the steps done and the total, searches included.

    Returns:
        What was measured of each, as plain data; None where there is no such value. Seconds are those of all, divided
        by their number.

    Raises:
        ValueError: an image, device, depth or density does not do, or the checkpoint is of another run.
        MemoryError: they do not fit into the memory that is there now, which other processes share.
        DisconnectedError: a mask disconnects the network.
        FloatingPointError: a loss is not finite.
        RunInterrupted: after `checkpoints.request_stop()`.
    """
    first, number = experiments[0], len(experiments)
    with use_threads(first.config.threads) as threads:
        device = resolve_device(first.config.device)
        problems = [_pose(experiment, device, number) for experiment in experiments]
        problem = pose_together(problems)
        network = problems[0].net
        config = first.config.replace(
            depth=choose_depth(first.config, tuple(problem.noisy.shape[-2:])), **network_settings(network)
        )
        check_density(config, network)
        total = sum(parameter.numel() for parameter in network.parameters())
        seeds = [experiment.config.seed for experiment in experiments] if number > 1 else None
        note = _as_total(progress, first)

        clock = time.perf_counter()
        mask, connected = None, True
        if first.kind == "oes":
            found = search(problem, config, seeds=seeds, plan=_PLAN, checkpoints=checkpoints, progress=note)
            # Which of several it is shows when they run alone.
            check_connected(found, config if number == 1 else config.replace(force=False))
            mask, connected = found.mask, found.connected
        elif first.kind == "random":
            masks = [
                random_mask(own.net, config.density, prunable=config.prunable, seed=experiment.config.seed)
                for own, experiment in zip(problems, experiments, strict=True)
            ]
            mask = masks[0] if number == 1 else stacked_masks(masks)
        elif first.kind != "dense":
            found = _find(problem, first, config, checkpoints, note)
            check_connected(found, config)
            mask, connected = found.mask, found.connected
        seconds_search = time.perf_counter() - clock + checkpoints.seconds_before("search")
        untrained = None if mask is None else sg.masked_output(problem.net, problem.z, mask)

        clock = time.perf_counter()
        rule = make_rule(config)
        asked = Watched(rule) if rule is not None and first.run_on else rule
        run = train(problem, mask, config, rule=asked, seeds=seeds, plan=_PLAN, checkpoints=checkpoints, progress=note)
        seconds_fit = time.perf_counter() - clock + checkpoints.seconds_before("fit")
        common = {
            "steps_search": first.search_steps,
            "kept": total if mask is None else mask.kept,
            "total": total,
            "connected": bool(connected),
            "depth": config.depth,
            "device": str(device),
            "precision": precision_in_use(device),
            "threads": threads,
            "seconds_search": round(seconds_search / number, 3),
            "seconds_fit": round(seconds_fit / number, 3),
            "seconds": round((seconds_search + seconds_fit) / number, 3),
        }
        last, stopped = last_output(run, problem.z), None if rule is None else rule.stopped_after()
        return [
            {
                **_quality(_Outcome.of(e, own, run, last, rule, untrained, config), config),
                "stopped_at": stopped[e] if number > 1 and stopped is not None else stopped,
                "steps_fit": run.stopped_at or config.steps,
                **common,
            }
            for e, own in enumerate(problems)
        ]


def _find(
    problem: Problem,
    experiment: Experiment,
    config: DenoiseConfig,
    checkpoints: Checkpoints,
    note: StageProgress | None,
) -> sg.SearchResult:
    """The mask of a method other than OES, by `masks.find`."""
    options = {name: value for name, value in experiment.finding.items() if name != "rounds"}
    rounds = experiment.rounds
    if experiment.kind == "synflow":
        options["rounds"] = rounds
    elif experiment.kind == "imp":
        # Falling by one factor, as a fixed fraction would, to arrive in the last round at the density.
        options["schedule"] = [config.density ** (k / rounds) for k in range(1, rounds)] + [config.density]
        options |= {
            "steps": experiment.search_steps // rounds, "lr": config.lr, "input_jitter": config.input_jitter,
            "every": config.every, "checkpoints": checkpoints, "plan": _PLAN,
        }  # fmt: skip
    with warnings.catch_warnings():
        if not config.force:  # it becomes an error, which says the same
            warnings.simplefilter("ignore", sg.DisconnectedMaskWarning)
        return sg.masks.find(
            experiment.kind,
            problem.net,
            problem.z,
            problem.noisy,
            density=config.density,
            prunable=config.prunable,
            seed=config.seed,
            recipe=recipe_of(config),
            progress=None if note is None else lambda step, total, metrics: note("search", step, total, metrics),
            **options,
        )


def _pose(experiment: Experiment, device: torch.device, number: int) -> Problem:
    config = experiment.config
    photograph = read_image(config.image, lambda shape: _admit(experiment, shape, device, number))
    check_same_image(config, photograph)
    image = photograph.pixels.to(device)
    return pose(config.replace(depth=choose_depth(config, tuple(image.shape[-2:]))), image)


def _admit(experiment: Experiment, shape: tuple[int, int, int], device: torch.device, number: int) -> None:
    try:
        check_memory(experiment.config, shape, device, search=experiment.kind in _SEARCHING, experiments=number)
    except ValueError as error:
        raise (MemoryError if str(error).startswith("memory:") else ValueError)(str(error)) from None


@dataclass(frozen=True)
class _Outcome:
    """What a run gave of one of its experiments; images are (1, C, H, W)."""

    clean: torch.Tensor
    noisy: torch.Tensor
    untrained: torch.Tensor | None
    last: torch.Tensor
    chosen: torch.Tensor | None
    chosen_step: int | None
    average: torch.Tensor | None
    steps: list[int]
    psnr: list[float]

    @classmethod
    def of(cls, e: int, problem: Problem, run: FitResult, last, rule, untrained, config: DenoiseConfig) -> _Outcome:
        """The e-th experiment's; `last` and `untrained` are of all."""
        own = slice(e, e + 1)
        chosen_step = selected_step(rule, e)
        steps, psnr = psnr_curve(run, last[own], problem.clean, config.steps, e)
        return cls(
            problem.clean,
            problem.noisy,
            None if untrained is None else untrained[own],
            last[own],
            None if chosen_step is None else rule.image[own],
            chosen_step,
            run.image[own] if config.average is not None and rule is None else None,
            steps,
            psnr,
        )


def _quality(outcome: _Outcome, config: DenoiseConfig) -> dict[str, Any]:
    def decibels(image: torch.Tensor | None) -> float | None:
        return None if image is None else _finite(sg.fitting.psnr(image, outcome.clean).item())

    def similarity(image: torch.Tensor | None) -> float | None:
        return None if image is None else sg.fitting.ssim(image, outcome.clean).item()

    curve = outcome.psnr
    peak = max(range(len(curve)), key=curve.__getitem__)
    return {
        "psnr_noisy": decibels(outcome.noisy),
        "psnr_masked_untrained": decibels(outcome.untrained),
        "psnr_last": decibels(outcome.last),
        "psnr_stopped": decibels(outcome.chosen),
        "stop_selected_step": outcome.chosen_step,
        "psnr_average": decibels(outcome.average),
        "psnr_oracle_peak": _finite(curve[peak]),
        "psnr_oracle_peak_step": outcome.steps[peak],
        "psnr_oracle_peak_every": config.every,
        "ssim_last": similarity(outcome.last),
        "ssim_stopped": similarity(outcome.chosen),
        "psnr_steps": outcome.steps,
        "psnr_by_step": [_finite(round(value, 4)) for value in curve],
    }


def _finite(value: float) -> float | None:
    """JSON has no word for the PSNR of two equal images."""
    return value if math.isfinite(value) else None


def _as_total(progress: Callable[[int, int], None] | None, experiment: Experiment) -> StageProgress | None:
    if progress is None:
        return None
    before = {"search": 0, "fit": experiment.search_steps}
    return lambda stage, step, _total, _metrics: progress(before[stage] + step, experiment.budget)
