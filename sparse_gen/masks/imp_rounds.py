"""The rounds of iterative magnitude pruning: a training each, and what is known between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_gen.checkpoint import Checkpoints
from sparse_gen.engine.compile import CompiledGenerator, compile
from sparse_gen.engine.plan import Plan
from sparse_gen.fitting.fit import fit
from sparse_gen.history import History
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.pruning import Pruning


@dataclass
class Between:
    """What is known between two rounds.

    Attributes:
        keep: (N,) bool.
        scores: (N,), what the newest round chose by.
        start: name → values that the next round starts from.
        history: of all rounds so far, one after the other.
        layouts: for every training so far how each convolution ran, as `Plan.layouts` has it.
        flops: of its forward pass.
    """

    keep: torch.Tensor
    scores: torch.Tensor
    start: dict[str, torch.Tensor]
    history: History = field(default_factory=History)
    layouts: list[list[list[str]]] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a checkpoint, which has the history besides."""
        plain = json.dumps({"layouts": self.layouts, "flops": self.flops}).encode()
        return {
            "keep": self.keep, "scores": self.scores, "plain": torch.tensor(list(plain), dtype=torch.uint8),
            **{f"start/{name}": values for name, values in self.start.items()},
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, torch.Tensor], history: History) -> None:
        self.keep, self.scores = tensors["keep"].to(self.keep), tensors["scores"].to(self.scores)
        self.start = {name: tensors[f"start/{name}"].to(values) for name, values in self.start.items()}
        plain = json.loads(bytes(tensors["plain"].tolist()))
        self.layouts, self.flops, self.history = plain["layouts"], plain["flops"], history


@dataclass(frozen=True)
class Training:
    """What the trainings of all rounds have in common; `options` are those of `fit`."""

    problem: Pruning
    target: torch.Tensor
    lengths: list[int]
    options: dict[str, Any]
    plan: str | None
    checkpoints: Checkpoints | None

    def run(self, number: int, start: dict[str, torch.Tensor], between: Between, note: bool) -> dict[str, torch.Tensor]:
        """Train from `start` what is kept; with `note` the history goes on. Gives the trained weights by name."""
        problem, before = self.problem, sum(self.lengths[:number])

        def progress(step: int, _steps: int, values: dict[str, float]) -> None:
            if problem.progress is not None:
                problem.progress(before + step, sum(self.lengths), {"loss": values["loss"]})

        part = None if self.checkpoints is None else self.checkpoints.part(f"round-{number}")
        module = self._module(start, between.keep, part)
        run = fit(
            module, problem.z, self.target, steps=self.lengths[number], seed=int(problem.seed[0]), progress=progress,
            checkpoints=part, **self.options,
        )  # fmt: skip
        for i, step in enumerate(run.history.step if note else []):
            between.history.record(before + step, **{name: run.history[name][i] for name in run.history.columns})
        between.layouts.append(module.plan.layouts)
        between.flops.append(sum(stage.flops_after for stage in module.plan.stages))
        return {name: parameter.detach() for name, parameter in module.to_dense().named_parameters()}

    def _module(self, start: dict[str, torch.Tensor], keep: torch.Tensor, part: Checkpoints | None):
        problem, plan = self.problem, self.plan
        network = deepcopy(problem.original).requires_grad_(True)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(start[name])
        if part is not None and part.resume:
            plan = Plan.to_go_on_with(part.plan("fit"), plan)
        whole = {name: tuple(values.shape[1:]) for name, values in problem.whole.items()}
        module: CompiledGenerator = compile(
            network, Mask(problem.layout.views(keep), whole=whole), problem.z, plan=plan
        )
        if part is not None:
            part.folder.mkdir(parents=True, exist_ok=True)
            module.plan.save(part.plan("fit"))
        return module
