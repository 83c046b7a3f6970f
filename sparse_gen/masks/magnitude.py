"""Magnitude pruning at initialisation: keep the largest |w|."""

from __future__ import annotations

from sparse_gen.masks.pruning import Found, Pruning


def magnitude(problem: Pruning) -> Found:
    """Score every weight by |w|. Han et al., "Learning both weights and connections" (NeurIPS 2015), untrained."""
    scores = problem.weight.abs()
    return Found(problem.choose(scores, problem.count), scores)
