"""The progress bars of a run and of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

from sparse_gen.cli.times import format_seconds

if TYPE_CHECKING:
    from sparse_gen.experiments.sweep_folder import Status

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


class SweepBar:
    """One bar, on stderr, of a sweep's experiments, with the time left.

    A context manager; pass the instance itself as `progress`.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("experiments"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> SweepBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def __call__(self, status: Status) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=status.total, state="")
        left = "" if status.seconds_left is None else f", {format_seconds(status.seconds_left)} left"
        state = f"{status.running} running, {status.failed} failed{left if status.left else ''}"
        self._progress.update(self._task, completed=status.done + status.failed, state=state)


def _measured(metrics: dict[str, float]) -> str:
    shown = []
    if "loss" in metrics:
        shown.append(f"loss {metrics['loss']:.5f}")
    if "psnr" in metrics:
        shown.append(f"PSNR {metrics['psnr']:.2f} dB")
    return ", ".join(shown)
