"""Where the time of a step goes: every stage of a program, measured in whole steps."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from statistics import median

import torch

from sparse_gen.engine.plan import Other, Plan, kind_of, plain_weight
from sparse_gen.engine.program import Program
from sparse_gen.engine.steps import Step

REST = "parameters, gradients and bookkeeping"


class _Timed(Step):
    """A step that notes how long it takes."""

    def __init__(self, step: Step):
        self._step, self.seconds = step, 0.0

    def forward(self, *arguments):
        start = time.perf_counter()
        result = self._step.forward(*arguments)
        self.seconds += time.perf_counter() - start
        return result

    def backward(self, *arguments):
        start = time.perf_counter()
        result = self._step.backward(*arguments)
        self.seconds += time.perf_counter() - start
        return result


@torch.no_grad()
def profile(plan: Plan, program: Program, values: torch.Tensor, z: torch.Tensor, rounds: int) -> Plan:
    """`plan` with the milliseconds of the first experiment's stages, and of what lies between them.

    Args:
        plan: the program's.
        values: (kept,).
        z: (1, C, H, W).
        rounds: steps, of which the median counts.
    """
    program, timed = program.with_steps(_Timed)
    given = program.prepare(z)
    samples: dict[int | None, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        for step in timed.values():
            step.seconds = 0.0
        start = time.perf_counter()
        tape: list = []
        output = program.forward(values, given, tape)
        program.backward(torch.ones_like(output), values, tape, given, False)
        total = time.perf_counter() - start
        for value, step in timed.items():
            samples[value].append(step.seconds)
        samples[None].append(total - sum(step.seconds for step in timed.values()))
    ms = {value: 1e3 * median(seconds[1:]) for value, seconds in samples.items()}
    by_name = {stage.name: ms[value] for value, (stage, _) in program.convolutions.items()}
    kinds: dict[str, float] = defaultdict(float)
    for value, milliseconds in ms.items():
        if value is None or value in program.convolutions:
            continue
        node = program.graph.nodes[value - 1]
        if weight := plain_weight(node, program.graph):
            by_name[weight.removesuffix(".weight")] = milliseconds
        else:
            kinds[kind_of(node, program.graph)] += milliseconds
    stages = tuple(dataclasses.replace(stage, ms=by_name.get(stage.name)) for stage in plan.stages)
    others = [dataclasses.replace(other, ms=kinds.get(other.kind, 0.0)) for other in plan.others]
    others.append(Other(REST, 1, ms[None]))
    return dataclasses.replace(plan, programs=(stages, *plan.programs[1:]), others=tuple(others))
