"""Mask search at initialisation: learn which weights to keep while the weights themselves stay as drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_gen.checkpoint import Checkpoints, fingerprint
from sparse_gen.engine.capture import StepRunner, capturer
from sparse_gen.engine.checks import check_count, check_input, check_measurement, check_positive
from sparse_gen.engine.compile import compile
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.measure import machine
from sparse_gen.engine.plan import Plan
from sparse_gen.engine.readback import Readback, reporter
from sparse_gen.engine.stack import Stack, initial_weights, template
from sparse_gen.history import History
from sparse_gen.masks.connectivity import DisconnectedMaskWarning, probe_connectivity
from sparse_gen.masks.groups import Group, Groups, group_name
from sparse_gen.masks.logits import Logits
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.sampled import SampledNetwork
from sparse_gen.masks.search_step import SearchStep
from sparse_gen.masks.selection import densities_of, kept_count, one_or_all, prunable_layout
from sparse_gen.ops.philox import Stream, seed_tensor, uniform

if TYPE_CHECKING:
    from sparse_gen.fitting.stop import Settled

PRESETS: dict[str, dict[str, Any]] = {
    # A larger step and a stronger prior settle in 1,000 steps; normalisation and biases are few and always kept.
    "quick": {"steps": 1000, "lr": 5e-2, "kl_weight": 1e-7, "prunable": "conv_weights"},
    # The KL draws twice as far as in "paper" (λ · lr · steps). Few channels keep their normalisation, so that most of
    # what is kept reaches no pixel, and the end overfits less: docs/masks.md. In fewer steps hardly anything does.
    "lean": {"steps": 2000, "lr": 0.1, "kl_weight": 6e-9, "prunable": "all"},
    "paper": {"steps": 60_000, "lr": 1e-2, "kl_weight": 1e-9, "prunable": "all"},
}

# What a window of 100 steps may still exchange of the kept weights when the quick preset ends by itself. Its constants
# come to 10 % in about 1,000 steps and hardly below; at 27 % (300 steps) training ended 1.1 dB lower on one photograph.
SETTLED = 0.1

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        mask: the kept weights with their initial values; an experiment axis where there are several.
        logits: parameter name → logits of its shape (a leading E where there are several experiments); empty for
            methods that learn none.
        history: columns "loss" (mean squared error of the sampled network), "kl" (nats, unweighted) and, with a rule
            that ends the search, "exchanged": the share of the kept weights that its last window exchanged.
        connected: False if the masked network's output is constant.
        disconnected_at: the layer from which on it is constant.
        settings: every constant of the search.
        plan: how the network ran.
        settled_at: after how many steps the kept weights had settled, which ended the search; None if they had not; a
            list where there are several experiments.
        scores: parameter name → what other methods chose by, the largest being kept; shapes as of the logits.
        groups: which weights share a logit; None where each has its own.
    """

    mask: Mask
    logits: dict[str, torch.Tensor]
    history: History
    connected: bool
    disconnected_at: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    settled_at: int | list[int | None] | None = None
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    groups: Groups | None = None

    def sample_masks(self, count: int, seed: int = 0) -> list[Mask]:
        """Draw masks m ~ Ber(sigmoid(logits)) instead of keeping the largest; their density varies.

        Args:
            count: how many.
            seed: of the draws.

        Returns:
            Masks with the same whole parameters and recipe, without stored weights.

        Raises:
            ValueError: there are no logits.
        """
        check_count(count, "count")
        if not self.logits:
            raise ValueError("expected a result with logits, got one of a method that learns none, use method='oes'")
        masks = []
        for i in range(count):
            tensors, index, draws = {}, 0, self._draws(seed, i)
            for name, logits in self.logits.items():
                u = draws[index : index + logits.numel()].view_as(logits).to(logits.device)
                tensors[name] = u < torch.sigmoid(logits)
                index += logits.numel()
            experiments = self.mask.experiments if self.mask.has_experiment_axis else None
            recipe = {**self.mask.recipe, "sample": {"index": i, "seed": seed}}
            masks.append(Mask(tensors, experiments=experiments, whole=self.mask.whole, recipe=recipe))
        return masks

    def _draws(self, seed: int, number: int) -> torch.Tensor:
        """A uniform number for every logit in turn, parameter by parameter; the same one throughout a group."""
        if self.groups is None:
            total = sum(logits.numel() for logits in self.logits.values())
            return uniform(seed_tensor(seed), number, Stream.MASK, total)[0]
        experiments = self.mask.experiments
        draws = uniform(seed_tensor(seed), number, Stream.MASK, experiments * len(self.groups))
        views = self.groups.layout.views(self.groups.expand(draws.view(experiments, -1)))
        return torch.cat([view.flatten() for view in views.values()])


def search_mask(
    net: nn.Module,
    z: torch.Tensor,
    y: torch.Tensor,
    *,
    density: float | Sequence[float] = 0.05,
    preset: str = "quick",
    steps: int | None = None,
    lr: float | None = None,
    kl_weight: float | None = None,
    prunable: str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
    temperature: float = 0.2,
    prior: float | None = None,
    group: Group | None = None,
    initial_logit: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int | Sequence[int] = 0,
    every: int = 10,
    stop: Settled | str | None = "auto",
    recipe: dict | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    engine: str = "auto",
    plan: Plan | str | PathLike[str] | None = None,
) -> SearchResult:
    """Find the weights to keep by learning, for each, the probability that it should be.

    Minimises E_m ‖G(θ ∘ m, z) − y‖² / size + kl_weight · KL(Ber(p) ‖ Ber(prior)) over p = sigmoid(logits) with one
    concrete sample a step; θ stays as it is. The mask keeps the largest p, over all prunable parameters together.

    Args:
        net: the network at its initialisation, in training mode, or a `stack` of several; it is left untouched.
        z: its input, (E, C, H, W) or (1, C, H, W).
        y: the measurement, (E, C, H, W) in [0, 1].
        density: kept fraction of all parameters, those that are always kept included; or a list of one an experiment.
        preset: "quick", "lean" (lr 0.1, kl_weight 6e-9, everything prunable, 2,000 steps: for training that goes on to
            its end) or "paper" (lr 1e-2, kl_weight 1e-9, everything prunable, 60,000 steps); whatever is given beside
            it takes precedence.
        steps: how many; with a rule that ends the search, how many at most.
        lr: Adam's learning rate on the logits.
        kl_weight: λ of the KL term, which sums over weights.
        prunable: "conv_weights", "all", parameter names, or a function of name and parameter.
        temperature: of the concrete sample.
        prior: p0; by default the density, each experiment's own.
        group: which weights share a logit and are kept or pruned together: None (or "weight"), "kernel" (the plane of
            one output and one input channel), "filter" (an output channel), or (bo, bi), also written "8x1", so many
            output × input channels at one tap. Where channels do not divide, the last groups are cut; parameters that
            are no convolution's weight keep a logit an entry. The mask keeps the best groups up to ⌊density·N⌋
            weights: the first that would exceed it and all behind it go, so that up to a group's size is missing.
        initial_logit: where all logits start.
        betas, eps: Adam's.
        seed: of samples and ties, or one an experiment.
        every: record the history (and report progress) every so many steps.
        stop: a rule that ends the search before `steps`, such as `sg.stop.Settled(window=100, tolerance=0.1)`, or
            None. "auto" is this rule where the preset "quick" decides the steps, and None where steps are given.
        recipe: plain data stored with the mask beside the network's, such as {"z": …, "noise": …}.
        checkpoints: where to store the search's state and whether to resume from it.
        progress: called with (step, steps, latest values).
        engine, plan: what runs the network, as for `sg.compile`.

    Returns:
        `SearchResult`.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, there are not as many densities as experiments, or
            one is too small to keep what is always kept, or a single group; or the checkpoint is of another run.
        FloatingPointError: the loss is not finite; the message names the step. Checkpoints stay at finite ones.
        RunInterrupted: `checkpoints.request_stop()` was called.

    Warns:
        DisconnectedMaskWarning: the mask cuts the network.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), eq. 3 to 5.
    """
    stop = _rule(stop, preset, steps)
    settings = _settings(preset, steps=steps, lr=lr, kl_weight=kl_weight, prunable=prunable)
    steps, lr, kl_weight = settings["steps"], settings["lr"], settings["kl_weight"]
    group = group_name(group)
    check_input(z)
    check_measurement(y, z)
    check_count(steps, "steps")
    check_count(every, "every")
    check_positive(lr, "lr")
    network = training_copy(template(net))
    layout = prunable_layout(network, settings["prunable"])
    whole = ParameterLayout.of(network, [n for n, _ in network.named_parameters() if n not in layout.shapes])
    seeds = seed_tensor(seed, z.device)
    kept_whole = initial_weights(net, whole).to(z.dtype)
    counts = {"z": len(z), "y": len(y), "seed": len(seeds), "net": len(kept_whole)}
    experiments = max(counts.values())
    for name, number in counts.items():
        if number not in (1, experiments):
            raise ValueError(f"expected {experiments} experiments (or 1) in {name}, got {number}")
    densities = densities_of(density, experiments)
    experiments = len(densities)
    count = one_or_all([kept_count(each, layout.numel + whole.numel, whole.numel) for each in densities])
    count = torch.tensor(count, device=z.device) if isinstance(count, list) else count
    # At density 1 there is nothing to choose, and no prior of 1: the logarithm of its complement is infinite.
    priors = [each if prior is None else prior for each in densities]
    priors = [min(own, 1 - 1e-6) if each == 1 else own for own, each in zip(priors, densities, strict=True)]
    seeds = seeds.expand(experiments).contiguous()

    weight = initial_weights(net, layout).to(z.dtype)
    if checkpoints is not None and checkpoints.resume:
        plan = Plan.to_go_on_with(checkpoints.plan("search"), plan)
    sampled = SampledNetwork(network, layout, whole, kept_whole, z, experiments, engine, plan)
    kept_whole = whole.views(kept_whole)
    weight = weight[0] if len(weight) == 1 else weight
    logits = Logits(
        layout, group, weight, seeds, initial=initial_logit, temperature=temperature, prior=priors,
        kl_weight=kl_weight, lr=lr, betas=betas, eps=eps,
    )  # fmt: skip
    logits.sample(sampled.masked_weight)
    history = History()

    settings.update(
        density=one_or_all(densities),
        temperature=temperature,
        prior=one_or_all(priors),
        initial_logit=initial_logit,
        betas=list(betas),
        eps=eps,
        seed=seeds.tolist() if experiments > 1 else int(seeds[0]),
        preset=preset,
    )
    if logits.groups is not None:
        settings["group"] = group
    if stop is not None:
        settings["stop"] = {"window": stop.window, "tolerance": stop.tolerance}
    if not isinstance(settings["prunable"], str):
        settings["prunable"] = list(layout.shapes)
    start = 0
    if checkpoints is not None:
        identity = {"stop": None, **settings, "every": every, "inputs": fingerprint(z, y, *net.parameters())}
        identity |= {"plan": sampled.plan.layouts, "gpu": machine(z.device).get("gpu")}
        restored = checkpoints.load("search", identity)
        if restored is not None:
            start, state, history = restored
            logits.restore(state)
            sampled.masked_weight.copy_(state.pop("masked_weight"))
            if stop is not None:
                stop.restore({name.removeprefix("stop/"): tensor for name, tensor in state.items()}, z.device)

        sampled.plan.save(checkpoints.plan("search"))

    def state() -> dict[str, torch.Tensor]:
        tensors = {**logits.state(), "masked_weight": sampled.masked_weight}
        rule = {} if stop is None else stop.state()
        return tensors | {f"stop/{name}": tensor for name, tensor in rule.items()}

    capture, body = capturer(z.device), SearchStep(sampled, logits, y, start)
    run_step, rows = StepRunner(body, capture), Readback(late=capture is not None)
    over = stop is not None and stop.over
    for step in range(start, start if over else steps):
        last = step == steps - 1
        recorded = last or step % every == 0
        may_end = stop is not None and (step + 1) % stop.window == 0
        # Of the logits that the step begins with, like its loss; outside of it, since few steps need it.
        kl = logits.kl() if recorded or may_end else None
        run_step()
        row = {"loss": body.loss.clone(), "kl": kl} if recorded or may_end else {}
        if stop is not None:
            over = stop.update(step, logits.values, count, logits.sizes)
            row["exchanged"] = stop.exchanged.to(body.loss)
        if recorded or over:
            history.record(step, **row)
            rows.push({"": body.first_bad, **row}, reporter(step, steps, lr, progress))
        last = over or last
        # A look at the device would stall it, so it comes last.
        if checkpoints is not None and (capture is None or checkpoints.due(last=last)) and body.first_bad < 0:
            checkpoints.store("search", identity, step + 1, state, history, last=last)
        if over:
            break
    rows.flush()
    final = logits.values if stop is None else stop.selected(logits.values)

    settled_at = None if stop is None else stop.stopped_after()
    if stop is not None:
        settings["settled_at"] = settled_at

    keep = logits.keep(final, count)
    recipe = {**network_recipe(net), "search": {"method": "oes", **settings}, **(recipe or {})}
    mask = make_mask(layout, whole, keep, weight, kept_whole, recipe)
    connectivity = probe_connectivity(network, layout.views(weight * keep) | kept_whole, z)
    if not connectivity.connected:
        warnings.warn(
            f"the mask disconnects the network at {connectivity.disconnected_at}: its output is constant and cannot be "
            "trained; search longer, raise the density or leave more parameters out of `prunable`",
            DisconnectedMaskWarning,
            stacklevel=2,
        )
    final = logits.of_weights(final)
    logit_views = layout.views(final if experiments > 1 else final[0])
    return SearchResult(
        mask, logit_views, history, connectivity.connected, connectivity.disconnected_at, settings, settled_at,
        plan=sampled.plan, groups=logits.groups,
    )  # fmt: skip


def masked_output(net: nn.Module, z: torch.Tensor, masks: Mask | Sequence[Mask]) -> torch.Tensor:
    """The untrained masked network's output, averaged over masks.

    Args:
        net: the network at its initialisation, whose weights are taken.
        z: (E, C, H, W).
        masks: one mask or several, such as `SearchResult.sample_masks` draws.

    Returns:
        (E, C, H, W).

    Raises:
        ValueError: there is no mask, or one does not fit the network.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), section 3.1: masking alone shows the image.
    """
    masks = [masks] if isinstance(masks, Mask) else list(masks)
    if not masks:
        raise ValueError("expected at least one mask, got none")
    with torch.no_grad():
        # One pass each: nothing that a measurement could repay.
        outputs = [compile(net, mask, z, weights="net", plan="rule")(z) for mask in masks]
        return torch.stack(outputs).mean(dim=0)


def _settings(preset: str, **given) -> dict[str, Any]:
    if preset not in PRESETS:
        raise ValueError(f"expected preset as one of {', '.join(PRESETS)}, got {preset!r}")
    return {**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}


def _rule(stop: Settled | str | None, preset: str, steps: int | None) -> Settled | None:
    if not isinstance(stop, str):
        return stop
    if stop != "auto":
        raise ValueError(f"expected stop as a rule such as sg.stop.Settled(), None or 'auto', got {stop!r}")
    from sparse_gen.fitting.stop import Settled

    return Settled(tolerance=SETTLED) if preset == "quick" and steps is None else None


def network_recipe(net: nn.Module) -> dict:
    """{"net": how to build it again}, a list of them for a stack; empty where it cannot tell."""
    if isinstance(net, Stack):
        recipes = [network_recipe(network) for network in net.networks]
        return {"net": [recipe["net"] for recipe in recipes]} if all(recipes) else {}
    return {"net": net.recipe()} if hasattr(net, "recipe") else {}


def make_mask(layout: ParameterLayout, whole: ParameterLayout, keep, weight, kept_whole, recipe) -> Mask:
    """The mask of `keep` (E, N) with its initial weights: `weight` (N,) or (E, N), `kept_whole` name → (1 or E, …)."""
    experiments = len(keep) if len(keep) > 1 else None
    tensors = {name: k.cpu() for name, k in layout.views(keep if experiments else keep[0]).items()}
    shown = layout.views(weight.expand_as(keep) if experiments else weight)
    weights = {name: shown[name].cpu()[k] for name, k in tensors.items()}
    for name, values in kept_whole.items():
        weights[name] = values.cpu().expand(len(keep), *values.shape[1:]).reshape(-1).clone()
    return Mask(tensors, experiments=experiments, whole=whole.shapes, weights=weights, recipe=recipe)
