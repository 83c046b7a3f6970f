"""Where the time of a step goes: every stage of a program, measured in whole steps."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from statistics import median

import torch

from sparse_gen.engine.clock import Clock, clock
from sparse_gen.engine.plan import Other, Plan, kind_of, plain_weight
from sparse_gen.engine.program import Program
from sparse_gen.engine.steps import Step

REST = "parameters, gradients and bookkeeping"


class _Timed(Step):
    """A step that notes when it begins and ends."""

    def __init__(self, step: Step, clock: Clock):
        self._step, self._clock, self._marks = step, clock, []

    def forward(self, *arguments):
        return self._timed(self._step.forward, arguments)

    def backward(self, *arguments):
        return self._timed(self._step.backward, arguments)

    def _timed(self, call, arguments):
        start = self._clock.mark()
        result = call(*arguments)
        self._marks.append((start, self._clock.mark()))
        return result

    def take_seconds(self) -> float:
        """Since the last call."""
        marks, self._marks = self._marks, []
        return sum(self._clock.seconds(*pair) for pair in marks)


@torch.no_grad()
def profile(plan: Plan, program: Program, values: torch.Tensor, z: torch.Tensor, rounds: int) -> Plan:
    """`plan` with the milliseconds of the first experiment's stages, and of what lies between them.

    Args:
        plan: the program's.
        values: (E, kept).
        z: (E or 1, C, H, W).
        rounds: steps, of which the median counts.
    """
    ticks = clock(z.device)
    program, timed = program.with_steps(lambda step: _Timed(step, ticks))
    given = program.prepare(z, len(values))
    for step in timed.values():
        step.take_seconds()
    samples: dict[int | None, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        ticks.start()
        start = ticks.mark()
        tape: list = []
        output = program.forward(values, given, tape)
        program.backward(torch.ones_like(output), values, tape, given, False)
        total = ticks.seconds(start, ticks.mark())
        taken = {value: step.take_seconds() for value, step in timed.items()}
        for value, seconds in taken.items():
            samples[value].append(seconds)
        samples[None].append(total - sum(taken.values()))
    ms = {value: 1e3 * median(seconds[1:]) for value, seconds in samples.items()}
    runs_in = {value: program.runs_in.get(value, value) for value in program.convolutions}
    by_name: dict[str, float] = {}
    counted: set[int] = set()
    for value, (stage, _) in program.convolutions.items():  # of two that run together, the first
        by_name[stage.name] = 0.0 if runs_in[value] in counted else ms[runs_in[value]]
        counted.add(runs_in[value])
    kinds: dict[str, float] = defaultdict(float)
    for value, milliseconds in ms.items():
        if value is None or value in counted:
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
