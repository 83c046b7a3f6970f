"""What is compared: ways to restore the image of a problem, all with the same steps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
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
    selected_step,
)
from sparse_gen.experiments.stages import StageProgress, last_output, psnr_curve, recipe_of, search, train
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
    """Run one experiment of a sweep.

    Args:
        experiment: what to do.
        checkpoints: where its state is stored, and resumed from if wanted.
        progress: called with the steps done and the total, searches included.

    Returns:
        What was measured, as plain data; None where there is no such value.

    Raises:
        ValueError: its image, device, depth or density does not do, or the checkpoint is of another run.
        MemoryError: it does not fit into the memory that is there now, which other processes share.
        DisconnectedError: its mask disconnects the network.
        FloatingPointError: a loss is not finite.
        RunInterrupted: after `checkpoints.request_stop()`.
    """
    config = experiment.config
    with use_threads(config.threads) as threads:
        device = resolve_device(config.device)
        photograph = read_image(config.image, lambda shape: _admit(experiment, shape, device))
        check_same_image(config, photograph)
        image = photograph.pixels.to(device)
        config = config.replace(depth=choose_depth(config, tuple(image.shape[-2:])))
        problem = pose(config, image)
        config = config.replace(**network_settings(problem.net))
        check_density(config, problem.net)
        total = sum(parameter.numel() for parameter in problem.net.parameters())
        note = _as_total(progress, experiment)

        clock = time.perf_counter()
        mask, connected = None, True
        if experiment.kind == "oes":
            found = search(problem, config, plan=_PLAN, checkpoints=checkpoints, progress=note)
            check_connected(found, config)
            mask, connected = found.mask, found.connected
        elif experiment.kind == "random":
            mask = random_mask(problem.net, config.density, prunable=config.prunable, seed=config.seed)
        elif experiment.kind != "dense":
            found = _find(problem, experiment, config, checkpoints, note)
            check_connected(found, config)
            mask, connected = found.mask, found.connected
        seconds_search = time.perf_counter() - clock + checkpoints.seconds_before("search")
        untrained = None if mask is None else sg.masked_output(problem.net, problem.z, mask)

        clock = time.perf_counter()
        rule = make_rule(config)
        asked = Watched(rule) if rule is not None and experiment.run_on else rule
        run = train(problem, mask, config, rule=asked, plan=_PLAN, checkpoints=checkpoints, progress=note)
        seconds_fit = time.perf_counter() - clock + checkpoints.seconds_before("fit")
        return {
            **_quality(problem, run, rule, untrained, config),
            "stopped_at": None if rule is None else rule.stopped_after(),
            "steps_search": experiment.search_steps,
            "steps_fit": run.stopped_at or config.steps,
            "kept": total if mask is None else mask.kept,
            "total": total,
            "connected": bool(connected),
            "depth": config.depth,
            "device": str(device),
            "precision": precision_in_use(device),
            "threads": threads,
            "seconds_search": round(seconds_search, 3),
            "seconds_fit": round(seconds_fit, 3),
            "seconds": round(seconds_search + seconds_fit, 3),
        }


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


def _admit(experiment: Experiment, shape: tuple[int, int, int], device: torch.device) -> None:
    try:
        check_memory(experiment.config, shape, device, search=experiment.kind in _SEARCHING)
    except ValueError as error:
        raise (MemoryError if str(error).startswith("memory:") else ValueError)(str(error)) from None


def _quality(problem: Problem, run: FitResult, rule, untrained, config: DenoiseConfig) -> dict[str, Any]:
    clean, last = problem.clean, last_output(run, problem.z)

    def decibels(image: torch.Tensor | None) -> float | None:
        return None if image is None else _finite(sg.fitting.psnr(image, clean).item())

    def similarity(image: torch.Tensor | None) -> float | None:
        return None if image is None else sg.fitting.ssim(image, clean).item()

    chosen = None if selected_step(rule) is None else rule.image
    steps, curve = psnr_curve(run, last, clean, config.steps)
    peak = max(range(len(curve)), key=curve.__getitem__)
    return {
        "psnr_noisy": decibels(problem.noisy),
        "psnr_masked_untrained": decibels(untrained),
        "psnr_last": decibels(last),
        "psnr_stopped": decibels(chosen),
        "stop_selected_step": selected_step(rule),
        "psnr_average": decibels(run.image) if config.average is not None and rule is None else None,
        "psnr_oracle_peak": _finite(curve[peak]),
        "psnr_oracle_peak_step": steps[peak],
        "psnr_oracle_peak_every": config.every,
        "ssim_last": similarity(last),
        "ssim_stopped": similarity(chosen),
        "psnr_steps": steps,
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
