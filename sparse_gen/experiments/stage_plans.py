"""The plans of a run's two stages, as a file beside its settings: with both, a run is done again to the same bits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from sparse_gen.engine.measure import machine
from sparse_gen.engine.plan import Plan
from sparse_gen.files import write_json

STAGES = ("search", "fit")


def read_plans(path: str | os.PathLike[str], device: torch.device | None = None) -> dict[str, Plan]:
    """What `write_plans` wrote.

    Args:
        device: where the plans are to run; None only reads them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of an instruction set or a GPU that is not in use here.
    """
    content = Path(path).read_bytes()
    try:
        data = json.loads(content)
        plans = {stage: Plan.from_plain(data[stage]) for stage in STAGES if data[stage] is not None}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"plan: expected the plans of a run, got {path}, which is damaged, remove it to measure anew"
        ) from error
    if device is None:
        return plans
    here = machine(device)
    for plan in plans.values():
        for fact, without in (("gpu", "CPU"), ("instruction_set", "plain PyTorch")):
            expected, found = (str(facts.get(fact) or without) for facts in (here, plan.machine))
            if expected != found:
                raise ValueError(
                    f"plan: expected a run of this machine's {expected}, got {path} of one with {found}, remove it to "
                    "measure anew, with other bits"
                )
    return plans


def write_plans(path: str | os.PathLike[str], search: Plan | None, fit: Plan) -> None:
    """Write the plans of both stages; None where nothing was searched.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, {"search": None if search is None else search.plain(), "fit": fit.plain()})
