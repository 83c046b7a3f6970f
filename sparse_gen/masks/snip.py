"""SNIP: keep the weights whose removal changes the loss most."""

from __future__ import annotations

from sparse_gen.masks.pruning import Found, Pruning


def snip(problem: Pruning) -> Found:
    """Score every weight by |g·w|, the loss's derivative with respect to its entry of the mask.

    Lee et al., "SNIP: single-shot network pruning based on connection sensitivity" (ICLR 2019), eq. 4 and 5; dividing
    by the sum, as there, changes no order.

    With prunable="all" this cuts an hourglass: the γ of a normalisation that only an activation and up-sampling part
    from the next has a gradient of 0, and all of them go (256², density 0.05: 128 of 128 in encoder.5.norm2).
    """
    _, gradient = problem.gradient()
    scores = (gradient * problem.weight).abs()
    return Found(problem.choose(scores, problem.count), scores)
