"""One way to ask for a mask, whatever the method."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparse_gen.engine.checks import check_input, check_measurement, check_output
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.stack import initial_weights, template
from sparse_gen.history import History
from sparse_gen.masks.as_published import as_published
from sparse_gen.masks.connectivity import DisconnectedMaskWarning, probe_connectivity
from sparse_gen.masks.grasp import grasp
from sparse_gen.masks.groups import group_name
from sparse_gen.masks.imp import imp
from sparse_gen.masks.magnitude import magnitude
from sparse_gen.masks.pruning import SCOPES, Found, Progress, Pruning, floors
from sparse_gen.masks.random import random_scores
from sparse_gen.masks.search import SearchResult, make_mask, network_recipe, search_mask
from sparse_gen.masks.selection import densities_of, kept_count, prunable_layout
from sparse_gen.masks.snip import snip
from sparse_gen.masks.synflow import synflow
from sparse_gen.ops.philox import seed_tensor

_METHODS: dict[str, Callable[..., Found]] = {
    "imp": imp,
    "magnitude": magnitude,
    "random": random_scores,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}
METHODS = ("oes", *_METHODS)
VARIANTS = (None, "as_published")


def find(
    method: str,
    net: nn.Module,
    z: torch.Tensor,
    y: torch.Tensor,
    *,
    density: float | Sequence[float] = 0.05,
    scope: str = "global",
    prunable: str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
    seed: int | Sequence[int] = 0,
    floor: int | float | None = None,
    variant: str | None = None,
    recipe: dict | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SearchResult:
    """Find the weights to keep, by any of the methods that are compared.

    Args:
        method: "oes" (`search_mask`), "imp", "magnitude", "random", "snip", "grasp" or "synflow"; each is described in
            its file in `sparse_gen/masks`.
        net: the network at its initialisation, in training mode, or a `stack` of several; it is left untouched.
        z: its input, (E, C, H, W) or (1, C, H, W).
        y: the measurement, (E, C, H, W) in [0, 1]; (n, C, H, W) for `imp` with `multi_image=True`. "magnitude",
            "random" and "synflow" do not look at it.
        density: kept fraction of all parameters, those that are always kept included; for "oes" also a list of one an
            experiment.
        scope: "global" ranks all prunable weights together, "layer" keeps the same fraction of every prunable
            parameter.
        prunable: "conv_weights", "all", parameter names, or a function of name and parameter; by default
            "conv_weights" ("all" where `variant` or the preset says so).
        seed: of draws and ties, or one an experiment.
        floor: keep at least so many weights (an integer) or this share (a float below 1) of every prunable parameter.
        variant: None for the method of its paper; "as_published" for what the OES repository runs under its name.
            That does not keep ⌊density·N⌋: see `sparse_gen/masks/as_published.py`.
        recipe: plain data stored with the mask, such as {"z": …, "noise": …, "target": "noisy"}.
        progress: called with (step, steps, latest values) by methods that take many.
        options: the method's own, such as `steps` for "oes" and "imp", or `rounds` for "synflow".

    Returns:
        `SearchResult`. Its mask keeps exactly ⌊density·N⌋ of all N parameters (with the option `group` of "oes" what
        whole groups allow of it, see `search_mask`), ties broken by the seed, and holds the weights to train from;
        `connected` says whether anything of z reaches the output.

    Raises:
        ValueError: an argument is out of range, an option is not the method's, shapes do not fit, or density or floor
            do not allow each other.
        FloatingPointError: a loss or score is not finite.

    Warns:
        DisconnectedMaskWarning: the mask cuts the network.
    """
    _check(method, scope, variant, options)
    if method == "oes":
        return _oes(net, z, y, density, scope, prunable, seed, floor, recipe, progress, options)
    check_input(z)
    check_measurement(y[:1] if isinstance(y, torch.Tensor) else y, z[:1])
    published = variant is not None
    network = training_copy(template(net))
    layout = prunable_layout(network, prunable or ("all" if published else "conv_weights"))
    whole = ParameterLayout.of(network, [n for n, _ in network.named_parameters() if n not in layout.shapes])
    if published and whole.shapes:
        raise ValueError(f"expected prunable='all' for variant='as_published', got {prunable!r}, leave it out")
    count = kept_count(density, layout.numel + whole.numel, whole.numel)
    floors([1], floor)  # its range; whether it fits is seen where the layers are known

    seeds = seed_tensor(seed, z.device)
    weight, kept_whole = (initial_weights(net, part).to(z) for part in (layout, whole))
    together = method == "imp" and options.get("multi_image", False)
    counts = {"z": len(z), "y": 1 if together else len(y), "seed": len(seeds), "net": len(weight)}
    experiments = max(counts.values())
    for name, number in counts.items():
        if number not in (1, experiments):
            raise ValueError(f"expected {experiments} experiments (or 1) in {name}, got {number}")

    found, checkpoints = [], options.get("checkpoints")
    for e in range(experiments):
        problem = Pruning(
            original=net.networks[e] if template(net) is not net and len(weight) > 1 else template(net),
            network=network,
            layout=layout,
            weight=_row(weight, e)[0],
            whole=whole.views(_row(kept_whole, e)),
            z=_row(z, e),
            y=y if together else _row(y, e),
            count=count,
            scope=scope,
            floor=floor,
            seed=_row(seeds, e),
            progress=_part_of(progress, e, experiments),
        )
        if e == 0:
            with torch.no_grad():
                check_output(problem.output(problem.weight), y)
        if experiments > 1 and options.get("checkpoints") is not None:
            options = {**options, "checkpoints": checkpoints.part(f"experiment-{e}")}
        if published and method == "imp":
            found.append(imp(problem, **options, published=True))
        elif published:
            found.append(as_published(method, problem, density))
        else:
            found.append(_METHODS[method](problem, **options))

    settings = {
        "density": density, "scope": scope, "prunable": _plain(prunable, layout, published), "floor": floor,
        "variant": variant, "seed": seeds.tolist() if experiments > 1 else int(seeds[0]), **found[0].settings,
    }  # fmt: skip
    keep = torch.stack([one.keep for one in found])
    if any(one.weight is not None for one in found):  # trained for a while: no longer the network's own
        weight = torch.stack([one.weight for one in found])
        kept_whole = torch.stack([whole.flatten({n: v[0] for n, v in one.whole.items()}) for one in found])
    scores = torch.stack([one.scores for one in found])
    recipe = {**network_recipe(net), "search": {"method": method, **settings}, **(recipe or {})}
    result = _assemble(network, layout, whole, keep, weight, kept_whole, z, recipe)
    return replace(
        result,
        settings=settings,
        history=_together([one.history for one in found]),
        scores=layout.views(scores if experiments > 1 else scores[0]),
    )


def _check(method: str, scope: str, variant: str | None, options: dict[str, Any]) -> None:
    if method not in METHODS:
        raise ValueError(f"expected method as one of {', '.join(METHODS)}, got {method!r}")
    if scope not in SCOPES:
        raise ValueError(f"expected scope as one of {', '.join(SCOPES)}, got {scope!r}")
    if variant not in VARIANTS:
        raise ValueError(f"expected variant as None or 'as_published', got {variant!r}")
    if variant is not None and method == "oes":
        raise ValueError("expected variant=None for method 'oes', got 'as_published', use preset='paper'")
    known = search_mask if method == "oes" else _METHODS[method]
    names = [n for n, p in inspect.signature(known).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "published"]
    if variant is not None and method != "imp":
        names = []
    for name in options:
        if name not in names:
            raise ValueError(f"expected options of {method!r} out of {', '.join(names) or 'none'}, got {name!r}")


def _oes(net, z, y, density, scope, prunable, seed, floor, recipe, progress, options) -> SearchResult:
    floors([1], floor)
    given = {"density": density, "prunable": prunable, "seed": seed, "recipe": recipe, "progress": progress, **options}
    if scope == "global" and floor is None:
        return search_mask(net, z, y, **given)
    if group_name(options.get("group")) != "weight":
        raise ValueError(
            f"expected scope='global' and no floor for groups, got {scope!r} and {floor!r}, leave scope and floor out"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisconnectedMaskWarning)
        result = search_mask(net, z, y, **given)
    network = training_copy(template(net))
    layout = ParameterLayout.of(network, result.logits)
    whole = ParameterLayout.of(network, result.mask.whole)
    weight, kept_whole = (initial_weights(net, part).to(z) for part in (layout, whole))
    several = result.mask.has_experiment_axis
    logits = layout.flatten(result.logits, result.mask.experiments if several else None).view(-1, layout.numel)
    seeds = seed_tensor(seed, z.device).expand(len(logits))
    counts = [kept_count(each, layout.numel + whole.numel, whole.numel) for each in densities_of(density, len(logits))]
    problem = [
        Pruning(net, network, layout, weight[0], {}, z, y, count, scope, floor, seeds[e : e + 1])
        for e, count in enumerate(counts)
    ]
    keep = torch.stack([one.choose(row, one.count) for one, row in zip(problem, logits, strict=True)])
    settings = {**result.settings, "scope": scope, "floor": floor}
    recipe = {**result.mask.recipe, "search": {**result.mask.recipe["search"], "scope": scope, "floor": floor}}
    again = _assemble(network, layout, whole, keep, weight, kept_whole, z, recipe)
    return replace(
        result,
        mask=again.mask,
        connected=again.connected,
        disconnected_at=again.disconnected_at,
        settings=settings,
    )


def _assemble(network, layout, whole, keep, weight, kept_whole, z, recipe) -> SearchResult:
    kept = whole.views(kept_whole)
    shown = weight[0] if len(weight) == 1 else weight
    mask = make_mask(layout, whole, keep, shown, kept, recipe)
    connectivity = probe_connectivity(network, layout.views(weight * keep) | kept, z)
    if not connectivity.connected:
        warnings.warn(
            f"the mask disconnects the network at {connectivity.disconnected_at}: its output is constant and cannot be "
            "trained; raise the density, give a floor or leave more parameters out of `prunable`",
            DisconnectedMaskWarning,
            stacklevel=3,
        )
    return SearchResult(mask, {}, History(), connectivity.connected, connectivity.disconnected_at)


def _row(tensor: torch.Tensor, e: int) -> torch.Tensor:
    return tensor[e : e + 1] if len(tensor) > 1 else tensor


def _part_of(progress: Progress | None, e: int, experiments: int) -> Progress | None:
    if progress is None:
        return None
    return lambda step, steps, values: progress(e * steps + step, experiments * steps, values)


def _plain(prunable, layout: ParameterLayout, published: bool) -> str | list[str]:
    if prunable is None:
        return "all" if published else "conv_weights"
    return prunable if isinstance(prunable, str) else list(layout.shapes)


def _together(histories: list[History]) -> History:
    """One history of E experiments, which recorded the same steps."""
    first = histories[0]
    columns = {name: torch.cat([history[name] for history in histories], dim=1) for name in first.columns}
    return History.restored(first.step, columns)
