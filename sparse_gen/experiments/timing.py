"""Providers of one result timed in turn, and the records of that: what benchmarks and `sparse-gen bench` share."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparse_gen
from sparse_gen.engine.capture import WARM_UP
from sparse_gen.experiments.environment import versions
from sparse_gen.files import atomic_write

BASELINES = ("published", "plain", "compile")
Step = Callable[[], object]
Times = dict[str, list[float]]


def timed_round(providers: Mapping[str, Step], times: Times, device: str, in_a_row: int = 1) -> None:
    """Run every provider, one after the other, and note its milliseconds.

    In turn, so that a drift of the machine reaches all alike; a step of a loop several times `in_a_row`, of which the
    mean counts: alone it would find the caches as another provider left them.
    """
    for name, function in providers.items():
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            function()
        _synchronise(device)
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start) / in_a_row)


def warm_up_rounds(device: str) -> int:
    """Rounds that do not count: on a GPU until steps are captured, and the first that is replayed."""
    return WARM_UP + 2 if device.startswith("cuda") else 2


@contextmanager
def fastest_plain(device: str) -> Iterator[None]:
    """On a GPU, let PyTorch multiply in TF32 and cuDNN try its ways, as its baselines are to."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    if device.startswith("cuda"):
        cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def make_records(
    suite: str,
    case: str,
    times: Times,
    *,
    device: str,
    error: float | None,
    peak_mb: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One record a provider, with the ratios over the baselines that were timed beside it.

    Args:
        suite, case: what was measured.
        times: provider → milliseconds of every round that counts.
        device: where.
        error: what the check before the timing found.
        peak_mb: provider → peak memory in MB (2^20 bytes), of those whose memory was measured.
        facts: of the case, such as its size, for those who draw it.
    """
    medians = {name: float(np.median(measured)) for name, measured in times.items()}
    records = []
    for name, measured in times.items():
        p20, p80 = np.percentile(measured, [20, 80])
        records.append(
            {
                "suite": suite,
                "case": case,
                "provider": name,
                "device": machine(device),
                "median_ms": round(medians[name], 4),
                "p20_ms": round(float(p20), 4),
                "p80_ms": round(float(p80), 4),
                "rounds": len(measured),
                "error": error,
                **{
                    f"ratio_{other}": round(medians[other] / medians[name], 3) if other in medians else None
                    for other in BASELINES
                },
                "peak_mb": round(peak_mb[name], 1) if peak_mb and name in peak_mb else None,
                **(facts or {}),
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "triton": versions()["triton"],
                "commit": _commit(),
                "date": datetime.date.today().isoformat(),
            }
        )
    return records


def machine(device: str) -> str:
    """ "cpu", or a GPU's short name in lower case, such as "h200"."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]
    return "cpu"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file yet.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise IsADirectoryError(
            f"output: expected a file of benchmark records, got the folder {path}, name a file in it"
        )
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        fits = all("case" in record and "provider" in record for record in records)
    except (ValueError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"output: expected a file of benchmark records, got {path} with something else, name another")
    return records


def merge_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace the records of the measured cases in a file, and keep the others."""
    measured = {record["case"] for record in records}
    kept = [record for record in read_records(path) if record["case"] not in measured]
    with atomic_write(path, "w") as file:
        json.dump([*kept, *records], file, indent=1)
        file.write("\n")


def _commit() -> str | None:
    """Of the source tree that is in use; an installed package has none."""
    root = Path(sparse_gen.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(root), "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None
