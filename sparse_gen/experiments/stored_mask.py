"""A mask that was found before, in place of a search."""

from __future__ import annotations

import hashlib
from pathlib import Path

import sparse_gen as sg
from sparse_gen.engine.functional import training_copy
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.problem import Problem
from sparse_gen.experiments.stages import recipe_of
from sparse_gen.history import History
from sparse_gen.masks.connectivity import probe_connectivity


def stored_mask(problem: Problem, config: DenoiseConfig) -> sg.SearchResult:
    """The mask of a configuration's file as if it had just been found: with its own weights if it holds any.

    Args:
        problem: whose network it is to mask.
        config: its `mask`, which must be given, and `mask_sha256`.

    Returns:
        `SearchResult` with an empty history and no plan.

    Raises:
        ValueError: the file is no mask or another one than `mask_sha256` tells, or does not fit the network.
        OSError: it cannot be read.
    """
    path = Path(config.mask)
    if config.mask_sha256 not in (None, digest(path)):
        raise ValueError(
            f"mask: expected the file with SHA-256 {config.mask_sha256[:12]}…, got another in {path}, "
            "take that file or remove mask_sha256"
        )
    mask = sg.Mask.load(path)
    if mask.experiments > 1:
        raise ValueError(f"mask: expected one of one experiment, got {path} with {mask.experiments}, name another")
    net = problem.net
    shapes = {layer.name: layer.shape for layer in mask.layers()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}:
        raise ValueError(
            f"mask: expected one of the {config.generator} of depth {config.depth} with "
            f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters, got {path} of "
            f"{_network(mask)} with {mask.total:,}, set generator, depth and channels as it has them, or move it with "
            "sparse-gen mask transfer"
        )
    weights = "keep" if mask.weights is not None else "reinitialise"
    mask = sg.masks.transfer(mask, net, weights=weights, recipe=recipe_of(config))
    values = {name: tensor.to(problem.z) for name, tensor in mask.dense_weights(net).items()}
    found = probe_connectivity(training_copy(net), values, problem.z)
    return sg.SearchResult(mask, {}, History(), found.connected, found.disconnected_at)


def digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"mask: expected a file that sparse-gen mask find wrote, got {path}, which is not one")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _network(mask: sg.Mask) -> str:
    """What the file says about the network it was found for."""
    recipe = mask.recipe.get("net")
    try:
        return f"the {recipe['class'].lower()} of depth {recipe['arguments']['depth']}"
    except (TypeError, KeyError, AttributeError):
        return "another network"
