"""The progress bars of a run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_NAMES = {"search": "search mask", "fit": "train"}


class StageBars:
    """One bar a stage, on stderr, with loss, PSNR where it is known, and the time left.

    A context manager; pass the instance itself as `progress`.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()

    def __call__(self, stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
        # Not before there is a bar: without one, an error would come below an empty line.
        self._progress.start()
        if stage not in self._tasks:
            name = _NAMES.get(stage, stage)
            self._tasks[stage] = self._progress.add_task(name, total=total, measured="")
        self._progress.update(self._tasks[stage], completed=step, measured=_measured(metrics))


def _measured(metrics: dict[str, float]) -> str:
    shown = []
    if "loss" in metrics:
        shown.append(f"loss {metrics['loss']:.5f}")
    if "psnr" in metrics:
        shown.append(f"PSNR {metrics['psnr']:.2f} dB")
    return ", ".join(shown)
