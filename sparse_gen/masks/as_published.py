"""The baselines as the OES repository has them, which is not as their papers do.

Its scripts take one number, `--sparse`, and treat it in two ways: random, magnitude and global GraSP remove that
fraction, all others keep it. Whoever asks all of them for 90 % sparsity gets networks that keep 90 % from SNIP, SynFlow
and local GraSP. Here the density d is asked for with `--sparse` 1 - d, and the rest follows. Everything is prunable,
biases and normalisation included, and thresholds are compared strictly, so that one weight fewer is kept or removed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import torch

from sparse_gen.masks.pruning import Found, Pruning
from sparse_gen.ops.philox import Stream, uniform

_EPS = 1e-10


def as_published(method: str, problem: Pruning, density: float) -> Found:
    """Find a mask with the published variant of a method.

    Args:
        method: "random", "magnitude", "snip", "grasp" or "synflow".
        problem: everything must be prunable.
        density: what is asked for; `settings["keeps"]` of the result says what the variant made of it.

    Raises:
        ValueError: there is no such variant.
    """
    sparse, local = 1 - density, problem.scope == "layer"
    if (method, problem.scope) == ("magnitude", "layer"):
        raise ValueError("expected scope='global' for the published magnitude pruning, got 'layer', which it has not")
    removes = method in ("random", "magnitude") or (method == "grasp" and not local)
    scores, select = _METHODS[method, local](problem)
    if local:
        pieces = scores.split([prod(shape) for shape in problem.layout.shapes.values()])
        nonzero = (problem.weight != 0).split([len(piece) for piece in pieces])
        keep = torch.cat([select(piece, sparse, own) for piece, own in zip(pieces, nonzero, strict=True)])
    else:
        keep = select(scores, sparse, problem.weight != 0)
    settings = {"sparse": sparse, "keeps": "1 - sparse" if removes else "sparse"}
    return Found(keep, scores, settings=settings)


def _random(problem: Pruning):
    return uniform(problem.seed, 0, Stream.MASK, len(problem.weight))[0], _remove_smallest


def _magnitude(problem: Pruning):
    return problem.weight.abs(), _remove_smallest


def _snip(problem: Pruning):
    return problem.gradient()[1].abs(), _keep_largest


def _synflow(problem: Pruning):
    """One pass on the weights as they are, signs included, and on z."""
    leaf = problem.weight.clone().requires_grad_()
    return torch.autograd.grad(problem.output(leaf).sum(), leaf)[0].abs(), _keep_largest


def _derivative_of_product(problem: Pruning) -> tuple[torch.Tensor, torch.Tensor]:
    """g, and g + H·w: the gradient of Σ g·w in which w was not held fixed."""
    leaf, gradient = problem.gradient(create_graph=True)
    (product,) = torch.autograd.grad((gradient * leaf).sum(), leaf)
    return gradient.detach(), product


def _grasp_global(problem: Pruning):
    return _derivative_of_product(problem)[1], _remove_largest


def _grasp_local(problem: Pruning):
    """The repository calls the divisor a Hessian-gradient product."""
    gradient, product = _derivative_of_product(problem)
    return gradient.abs() / (product.abs() + _EPS), _keep_largest


_METHODS: dict[tuple[str, bool], Callable] = {
    ("random", False): _random,
    ("random", True): _random,
    ("magnitude", False): _magnitude,
    ("snip", False): _snip,
    ("snip", True): _snip,
    ("synflow", False): _synflow,
    ("synflow", True): _synflow,
    ("grasp", False): _grasp_global,
    ("grasp", True): _grasp_local,
}


def _remove_smallest(scores: torch.Tensor, sparse: float, nonzero: torch.Tensor) -> torch.Tensor:
    """Weights that are 0, such as every β at the start, count as removed already and not in the fraction."""
    keep, candidates = nonzero.clone(), nonzero.nonzero()[:, 0]
    gone = ceil(len(candidates) * sparse)
    keep[candidates[scores[candidates].argsort(stable=True)[:gone]]] = False
    return keep


def _keep_largest(scores: torch.Tensor, sparse: float, _nonzero: torch.Tensor) -> torch.Tensor:
    return scores > _threshold(scores, int(len(scores) * sparse))


def _remove_largest(scores: torch.Tensor, sparse: float, _nonzero: torch.Tensor) -> torch.Tensor:
    scores = scores / (scores.sum().abs() + _EPS)
    return scores <= _threshold(scores, int(len(scores) * sparse))


def _threshold(scores: torch.Tensor, count: int) -> torch.Tensor:
    if count < 1:
        raise ValueError(
            f"expected layers large enough for the published variant, got one of {len(scores)} weights, of which it "
            "takes none and then fails, lower the density or use scope='global'"
        )
    return scores.topk(count).values[-1]
