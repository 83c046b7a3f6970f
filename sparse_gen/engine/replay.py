"""A plan that was stored, done again exactly or refused."""

from __future__ import annotations

from typing import Any

from sparse_gen.engine.layouts import ConvStage, candidates
from sparse_gen.engine.plan import Plan

# What of a stage follows from network, mask and size.
_FIXED = ("name", "weight_shape", "input_shape", "live_in", "live_out", "live_kept")


class Replay:
    """Chooses the layouts of a plan, as long as the stages are the plan's.

    Raises:
        ValueError: a stage is another one, or cannot run as the plan says.
    """

    def __init__(self, plan: Plan, program: int):
        if program >= len(plan.programs):
            raise _misfit(f"of {len(plan.programs)} masks instead of {program + 1} or more")
        self._stages = {stage.name: stage for stage in plan.programs[program]}

    def __call__(self, stage: ConvStage) -> str:
        planned = self._stages.get(stage.name)
        if planned is None:
            raise _misfit(f"without the stage {stage.name}")
        possible = candidates(stage)
        if planned.layout not in possible:
            raise ValueError(
                f"plan: expected {stage.name} as one of {', '.join(possible)}, got {planned.layout!r}, replace it"
            )
        return planned.layout


def check_replayed(plan: Plan, made: Plan, plain: str | None = None) -> None:
    """Raise ValueError unless a plan is for the network, masks and size that another one was made for.

    Args:
        plan: what was to be done again.
        made: what came of it.
        plain: why everything is plain PyTorch, if it is.
    """
    if plain is not None and any(not stage.layout.startswith("PyTorch") for stage in plan.stages):
        raise ValueError(f"plan: expected one of plain PyTorch, got one of operators that cannot run here: {plain}")
    for name, expected, found in [
        ("an input", made.input_shape, plan.input_shape),
        ("masks", len(made.programs), len(plan.programs)),
        ("numbers", made.dtype, plan.dtype),
    ]:
        if expected != found:
            raise _misfit(f"for {name} of {_shown(found)} instead of {_shown(expected)}")
    for theirs, ours in zip(plan.programs, made.programs, strict=True):
        if len(theirs) != len(ours):
            raise _misfit(f"of {len(theirs)} convolutions instead of {len(ours)}")
        for planned, stage in zip(theirs, ours, strict=True):
            for attribute in _FIXED:
                expected, found = getattr(stage, attribute), getattr(planned, attribute)
                if expected != found:
                    where = f"whose {planned.name} has {attribute} {_shown(found)} instead of {_shown(expected)}"
                    raise _misfit(where)
            if planned.kernel != stage.kernel:
                raise _misfit(f"that runs {planned.name} as {planned.kernel!r}, where only {stage.kernel!r} is there")


def _misfit(what: str) -> ValueError:
    return ValueError(f"plan: expected one of this network, mask and size, got one {what}, compile without it")


def _shown(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
