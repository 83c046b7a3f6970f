"""The two stages of a restoration, with the settings of a configuration: search a mask, train what it keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints
from sparse_gen.engine import Plan
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.problem import Problem
from sparse_gen.fitting import FitResult

StageProgress = Callable[[str, int, int, dict[str, float]], None]


def search(
    problem: Problem,
    config: DenoiseConfig,
    *,
    seeds: Sequence[int] | None = None,
    plan: Plan | str | None = None,
    checkpoints: Checkpoints | None = None,
    progress: StageProgress | None = None,
) -> sg.SearchResult:
    """Search the mask of a configuration, with a plan as for `sg.compile`; `seeds` of several experiments.

    Raises:
        As `search_mask`.

    Warns:
        DisconnectedMaskWarning: with `config.force`; without it, the caller is to raise an error.
    """
    with warnings.catch_warnings():
        if not config.force:  # it becomes an error, which says the same
            warnings.simplefilter("ignore", sg.DisconnectedMaskWarning)
        return sg.search_mask(
            problem.net,
            problem.z,
            problem.noisy,
            density=config.density,
            steps=config.search_steps,
            lr=config.search_lr,
            kl_weight=config.kl_weight,
            temperature=config.temperature,
            prior=config.prior,
            prunable=config.prunable,
            seed=config.seed if seeds is None else seeds,
            every=config.every,
            recipe=recipe_of(config),
            checkpoints=checkpoints,
            progress=_as_stage("search", progress),
            engine=config.engine,
            plan=plan,
        )


def train(
    problem: Problem,
    mask: sg.Mask | None,
    config: DenoiseConfig,
    *,
    rule=None,
    seeds: Sequence[int] | None = None,
    plan: Plan | str | None = None,
    checkpoints: Checkpoints | None = None,
    progress: StageProgress | None = None,
) -> FitResult:
    """Train what a mask keeps (None: everything) with a configuration's steps and options.

    `plan` as for `compile`; `seeds` of several experiments, whose problem has a stack.
    """
    net, z = problem.net, problem.z
    if checkpoints is not None and checkpoints.resume:
        plan = Plan.to_go_on_with(checkpoints.plan("fit"), plan)
    module = sg.compile(net, mask=mask, example_input=z, engine=config.engine, plan=plan)
    if checkpoints is not None:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        module.plan.save(checkpoints.plan("fit"))
    if mask is None and seeds is None and not module.runs_on_the_engine:
        module = net  # the same without a vector of parameters in between
    return sg.fit(
        module,
        z,
        problem.noisy,
        steps=config.steps,
        lr=config.lr,
        clean=problem.clean,
        stop=rule,
        average=config.average,
        input_jitter=config.input_jitter,
        rings=config.rings,
        seed=config.seed if seeds is None else seeds,
        every=config.every,
        checkpoints=checkpoints,
        progress=_as_stage("fit", progress),
    )


def last_output(run: FitResult, z: torch.Tensor) -> torch.Tensor:
    """The output after the last update, which a rule or an average need not have selected."""
    memory_format = getattr(run.module, "memory_format", torch.channels_last)  # as in `fit`, for the same bits
    with torch.no_grad():
        return run.module(z.contiguous(memory_format=memory_format))


def psnr_curve(
    run: FitResult, last: torch.Tensor, clean: torch.Tensor, steps: int, experiment: int = 0
) -> tuple[list[int], list[float]]:
    """Updates done and PSNR in dB: the history's rows, and the output after the last of at most `steps` updates."""
    final = sg.fitting.psnr(last, clean).item()
    return [*run.history.step, run.stopped_at or steps], [*run.history["psnr"][:, experiment].tolist(), final]


def recipe_of(config: DenoiseConfig) -> dict[str, Any]:
    """How to make z and the noise again; the network's recipe is added by the search."""
    return {
        "z": {
            "channels": config.input_channels,
            "scale": config.input_scale,
            "seed": config.seed,
        },
        "noise": {"sigma": config.sigma, "clip": config.clip, "seed": config.seed},
        "image_sha256": config.image_sha256,
    }


def _as_stage(stage: str, progress: StageProgress | None):
    if progress is None:
        return None
    return lambda step, total, metrics: progress(stage, step, total, metrics)
