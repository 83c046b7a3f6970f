"""Iterative magnitude pruning: train, remove the smallest weights, rewind, and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, floor

import torch

from sparse_gen.checkpoint import Checkpoints, fingerprint
from sparse_gen.engine.checks import check_count
from sparse_gen.masks.imp_rounds import Between, Training
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
    pixel_weight: torch.Tensor | None = None,
    clean: torch.Tensor | None = None,
    average: float | None = None,
    every: int = 10,
    multi_image: bool = False,
    checkpoints: Checkpoints | None = None,
    plan: str | None = None,
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
        input_jitter, pixel_weight: as in `fit`; the lottery image prior takes a jitter of 1/30.
        clean, average: for the history only, columns "psnr" and "psnr_average" as of `fit`.
        every: record the history every so many steps.
        multi_image: one network and one mask for all images of y, the sum of their errors as the loss.
        checkpoints: where every finished round is stored, and the state of the one that runs.
        plan: what runs the network, as for `sg.compile`: None (or "measure"), or "rule".
        published: as the OES repository does it: weights that start at 0 are removed before the first round, and every
            round removes the same fraction, rounded up, until at most the density is left.

    Returns:
        The mask with the weights that it is to be trained from. Its settings tell for every training (the one that is
        rewound to being the first) how each convolution ran, "layouts", and a forward pass's "flops".

    Raises:
        RunInterrupted: `checkpoints.request_stop()` was called.

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
    if plan not in (None, "measure", "rule"):
        raise ValueError(f"expected plan as None, 'measure' or 'rule', as every round has its own, got {plan!r}")
    keep = problem.weight != 0 if published else torch.ones_like(problem.weight, dtype=torch.bool)
    if published:
        counts = _published_counts(problem, int(keep.sum()), fraction)
    else:
        counts = _counts(problem, fraction, schedule)
    warm_up = 1 if rewind else 0
    lengths = [rewind] * warm_up + [steps] + [steps - rewind] * (len(counts) - 1)
    settings = {
        "steps": steps, "rewind": rewind, "lr": lr, "input_jitter": input_jitter, "multi_image": multi_image,
        "images": len(problem.y), "rounds": len(counts),
        **({"fraction": fraction} if schedule is None else {"schedule": list(schedule)}),
        **({} if pixel_weight is None else {"pixel_weight": fingerprint(pixel_weight)}),
    }  # fmt: skip
    options = {
        "lr": lr, "input_jitter": input_jitter, "pixel_weight": pixel_weight, "clean": clean, "average": average,
        "every": every,
    }  # fmt: skip
    target = problem.y.mean(dim=0, keepdim=True) if multi_image else problem.y
    training = Training(problem, target, lengths, options, plan, checkpoints)
    initial = {n: v[0] for n, v in (problem.layout.views(problem.weight[None]) | problem.whole).items()}
    everything = torch.ones_like(keep) if warm_up else keep
    between, done = Between(everything, problem.weight.abs(), initial), 0
    identity = {
        **settings, "average": average, "every": every, "plan": plan, "published": published, "counts": counts,
        "seed": int(problem.seed[0]), "scope": problem.scope, "floor": problem.floor,
        "inputs": fingerprint(problem.z, problem.y, *initial.values(), *([] if clean is None else [clean])),
    }  # fmt: skip
    if checkpoints is not None:
        restored = checkpoints.load("search", identity)
        if restored is not None:
            steps_done, tensors, history = restored
            done = list(accumulate(lengths)).index(steps_done) + 1
            between.restore(tensors, history)

    for number in range(done, len(lengths)):
        pruned = number - warm_up
        trained = training.run(number, initial if pruned <= 0 else between.start, between, note=pruned >= 0)
        if pruned < 0:
            between.start, between.keep = trained, keep
        else:
            between.scores = problem.layout.flatten(trained).abs() * between.keep
            between.keep = problem.choose(between.scores, counts[pruned], within=between.keep)
        if checkpoints is not None:
            steps_done, last = sum(lengths[: number + 1]), number == len(lengths) - 1
            checkpoints.store("search", identity, steps_done, between.tensors, between.history, last=last, due=True)
            checkpoints.part(f"round-{number}").clear()
    whole = {name: between.start[name][None] for name in problem.whole}
    settings |= {"layouts": between.layouts, "flops": between.flops}
    weight = problem.layout.flatten(between.start)
    return Found(between.keep, between.scores, weight, whole, between.history, settings)


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
