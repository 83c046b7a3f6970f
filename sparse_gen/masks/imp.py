"""Iterative magnitude pruning: train, remove the smallest weights, rewind, and again."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import ceil, floor

import torch
from torch import nn

from sparse_gen.engine.checks import check_count
from sparse_gen.engine.compile import CompiledGenerator, compile
from sparse_gen.fitting.fit import fit
from sparse_gen.history import History
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.pruning import Found, Pruning


def imp(
    problem: Pruning,
    *,
    steps: int = 2000,
    fraction: float = 0.2,
    schedule: Sequence[float] | None = None,
    rewind: int = 0,
    lr: float = 1e-2,
    input_jitter: float = 0.0,
    every: int = 10,
    multi_image: bool = False,
    published: bool = False,
) -> Found:
    """Find a lottery ticket: the weights that are largest after training what earlier rounds have kept.

    Args:
        problem: y may hold several images, see `multi_image`.
        steps: of every round's training.
        fraction: of the remaining prunable weights that a round removes, in (0, 1); the last removes fewer.
        schedule: instead of it, the density of all parameters after each round, falling, the last the one asked for.
        rewind: go back to the weights after so many steps of the dense training, 0 for the initialisation. Later rounds
            train the steps that are left, with a fresh optimiser.
        lr: Adam's.
        input_jitter: as in `fit`; the lottery image prior takes 1/30.
        every: record the history every so many steps.
        multi_image: one network and one mask for all images of y, the sum of their errors as the loss.
        published: as the OES repository does it: weights that start at 0 are removed before the first round, and every
            round removes the same fraction, rounded up, until at most the density is left.

    Returns:
        The mask with the weights that it is to be trained from.

    Σ ‖x - y_i‖² is n·‖x - ȳ‖² and a constant, so several images are fitted by their mean; Adam does not see the n.

    Frankle and Carbin, "The lottery ticket hypothesis" (ICLR 2019); Frankle et al., "Linear mode connectivity" (ICML
    2020) for rewinding; "Chasing better deep image priors" (TMLR 2023) for image priors and several images.
    """
    check_count(steps, "steps")
    check_count(every, "every")
    check_count(rewind, "rewind", 0)
    if rewind >= steps:
        raise ValueError(f"expected rewind below the {steps} steps of a round, got {rewind}")
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"expected fraction in (0, 1), got {fraction!r}")
    target = problem.y.mean(dim=0, keepdim=True) if multi_image else problem.y

    keep = problem.weight != 0 if published else torch.ones_like(problem.weight, dtype=torch.bool)
    if published:
        counts = _published_counts(problem, int(keep.sum()), fraction)
    else:
        counts = _counts(problem, fraction, schedule)
    total, done = rewind + steps + (len(counts) - 1) * (steps - rewind), 0
    history = History()

    def train(start: dict[str, torch.Tensor], keep: torch.Tensor, steps: int, note: bool = True):
        nonlocal done

        def progress(step: int, _steps: int, values: dict[str, float]) -> None:
            if problem.progress is not None:
                problem.progress(done + step, total, {"loss": values["loss"]})

        module = _module(problem, start, keep)
        run = fit(
            module, problem.z, target, steps=steps, lr=lr, input_jitter=input_jitter, seed=int(problem.seed[0]),
            every=every, progress=progress,
        )  # fmt: skip
        if note:
            for step, loss in zip(run.history.step, run.history["loss"], strict=True):
                history.record(done + step, loss=loss)
        done += steps
        dense = module.to_dense() if isinstance(module, CompiledGenerator) else module
        return {name: parameter.detach() for name, parameter in dense.named_parameters()}

    initial = {n: v[0] for n, v in (problem.layout.views(problem.weight[None]) | problem.whole).items()}
    start = train(initial, torch.ones_like(keep), rewind, note=False) if rewind else initial
    scores = problem.weight.abs()
    for number, count in enumerate(counts):
        first = number == 0
        trained = train(initial if first else start, keep, steps if first else steps - rewind)
        scores = problem.layout.flatten(trained).abs() * keep
        keep = problem.choose(scores, count, within=keep)
    settings = {
        "steps": steps, "rewind": rewind, "lr": lr, "input_jitter": input_jitter, "multi_image": multi_image,
        "images": len(problem.y), "rounds": len(counts),
        **({"fraction": fraction} if schedule is None else {"schedule": list(schedule)}),
    }  # fmt: skip
    whole = {name: start[name][None] for name in problem.whole}
    return Found(keep, scores, problem.layout.flatten(start), whole, history, settings)


def _module(problem: Pruning, start: dict[str, torch.Tensor], keep: torch.Tensor) -> nn.Module:
    """The network with these weights: itself while everything is kept, compiled afterwards."""
    network = deepcopy(problem.original).requires_grad_(True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(start[name])
    if keep.all():
        return network
    whole = {name: tuple(values.shape[1:]) for name, values in problem.whole.items()}
    return compile(network, Mask(problem.layout.views(keep), whole=whole), problem.z)


def _counts(problem: Pruning, fraction: float, schedule: Sequence[float] | None) -> list[int]:
    """How many prunable weights are kept after each round."""
    if schedule is not None:
        whole = sum(values.numel() for values in problem.whole.values())
        counts = [floor(density * (len(problem.weight) + whole)) - whole for density in schedule]
        falling = all(after < before for before, after in zip([len(problem.weight), *counts], counts, strict=False))
        if not counts or not falling or counts[-1] != problem.count:
            raise ValueError(
                f"expected a schedule of falling densities that ends with the one asked for, got {list(schedule)!r}"
            )
        return counts
    counts, left = [], len(problem.weight)
    while left > problem.count:
        left = max(problem.count, floor(left * (1 - fraction)))
        counts.append(left)
    return counts or [problem.count]


def _published_counts(problem: Pruning, left: int, fraction: float) -> list[int]:
    counts = []
    while left > problem.count:
        left -= ceil(left * fraction)
        counts.append(left)
    return counts or [left]
