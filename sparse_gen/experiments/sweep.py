"""Many experiments, each done once, by a pool of processes, whatever is killed on the way."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

from sparse_gen.experiments.plan import Experiment, Plan
from sparse_gen.experiments.pool import Pool, worker_command
from sparse_gen.experiments.shards import DONE, FAILED, Shard, now
from sparse_gen.experiments.sweep_folder import Status, SweepFolder
from sparse_gen.experiments.together import grouped

_REPORT_SECONDS = 0.2


def sweep(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    together: int = 1,
    retries: int = 2,
    retry_failed: bool = False,
    checkpoint_seconds: float = 60.0,
    stop: Event | None = None,
    progress: Callable[[Status], None] | None = None,
    command: Sequence[str] | None = None,
) -> Status:
    """Do every experiment of a plan that is not done yet.

    Args:
        plan: what to do. Where it does not say `threads`, workers get so many that all together fill the machine, and
            keep this number when the sweep goes on: bits depend on it.
        output: a new or empty folder, or a sweep's: what is done there stays and is not done again.
        workers: processes; by default as many as there are processors for.
        together: up to so many experiments of one architecture, image size, method and density run at the same time in
            one process, which fills a GPU that one of them does not; should they fail, each is tried alone.
        retries: how often an experiment is tried again whose process has crashed, before it is recorded as failed.
        retry_failed: try those again that are recorded as failed.
        checkpoint_seconds: between two checkpoints of an experiment.
        stop: when it is set, experiments are stored where they are and the sweep returns.
        progress: called now and then, and at the end.
        command: starts a worker; the folder and the seconds are added to it.

    Returns:
        How far the sweep is.

    Raises:
        ValueError: a number is out of range, or the device is not there.
        OSError: an image, the folder or the disk does not do, or another process works on the folder.
        ChildProcessError: workers do not start.
    """
    _check(workers, together, retries, checkpoint_seconds)
    folder = SweepFolder(output)
    folder.claim()
    plan, workers = settle(plan, folder, workers)
    unfolded = plan.unfold()
    experiments = {experiment.key: experiment for experiment in unfolded}
    with folder.locked(workers):
        folder.begin(plan, unfolded)
        rows = folder.rows(experiments)
        if retry_failed:
            rows = {key: row for key, row in rows.items() if row["status"] == DONE}
        for key, row in rows.items():
            if row["status"] == DONE:  # a kill right after the row has left them
                shutil.rmtree(folder.checkpoints(key), ignore_errors=True)
        arguments = [*(command or worker_command()), str(folder.path.resolve()), str(checkpoint_seconds)]
        stop = stop or Event()
        with Shard(folder.results) as shard, Pool(arguments, workers, plan.threads, folder.logs, stop) as pool:
            left = {key: experiment for key, experiment in experiments.items() if key not in rows}
            groups = grouped(left, together)
            session = _Session(folder, experiments, rows, groups, workers, retries, shard, progress)
            session.work(pool, stop)
    return session.status()


def settle(plan: Plan, folder: SweepFolder, workers: int | None) -> tuple[Plan, int]:
    """The plan with its threads and the number of workers, neither left open."""
    processors, threads = available_processors(), plan.threads
    if threads is None and folder.has_begun:
        threads = folder.plan.threads
    if threads is None:
        threads = max(1, processors // workers) if workers else 1
    workers = workers or max(1, processors // threads)
    if workers * threads > max(processors, threads):
        warnings.warn(
            f"{_counted(workers, 'worker')} of {_counted(threads, 'thread')} on {_counted(processors, 'processor')} "
            "hold each other up, and their times say little, take fewer workers",
            RuntimeWarning,
            stacklevel=2,
        )
    return plan.replace(threads=threads), workers


def available_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _check(workers: int | None, together: int, retries: int, checkpoint_seconds: float) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected 1 or more, got {workers}, leave it out for one a processor")
    if together < 1:
        raise ValueError(f"together: expected 1 or more, got {together}, leave it out for one at a time")
    if retries < 0:
        raise ValueError(f"retries: expected 0 or more, got {retries}, give 0 for none")
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected 0 or more, got {checkpoint_seconds}, give a positive number")


class _Session:
    """What is known of the experiments while one process works on the sweep."""

    def __init__(
        self,
        folder: SweepFolder,
        experiments: Mapping[str, Experiment],
        rows: dict[str, dict[str, Any]],
        groups: list[tuple[str, ...]],
        workers: int,
        retries: int,
        shard: Shard,
        progress: Callable[[Status], None] | None,
    ):
        self._folder, self._experiments, self._rows = folder, experiments, rows
        self._workers, self._retries, self._shard, self._progress = workers, retries, shard, progress
        self._waiting = deque(groups)
        self._begun = {key: 0.0 for group in groups for key in group if folder.checkpoints(key).is_dir()}
        self._running: dict[str, tuple[str, ...]] = {}  # groups by their first
        self._failures: Counter[str] = Counter()
        self._told = float("-inf")

    def status(self) -> Status:
        running = sum(map(len, self._running.values()))
        return Status.of(self._experiments, self._rows, self._begun, running, self._workers)

    def work(self, pool: Pool, stop: Event) -> None:
        """Hand experiments to the pool until all have ended, or those that run have stopped."""
        while (self._waiting and not stop.is_set()) or pool.busy:
            if stop.is_set():
                pool.stop()
            while self._waiting and pool.has_room and not stop.is_set():
                self._begin(self._waiting.popleft(), pool)
            for key, event in pool.events(_REPORT_SECONDS):
                self._note(key, event)
            self._report()
        self._report(last=True)

    def _begin(self, group: tuple[str, ...], pool: Pool) -> None:
        for key in group:
            self._folder.checkpoints(key).mkdir(parents=True, exist_ok=True)
            self._begun.setdefault(key, 0.0)
        self._running[group[0]] = group
        pool.submit(group[0], {"keys": group, "experiments": [self._experiments[key].plain() for key in group]})

    def _note(self, key: str, event: Mapping[str, Any]) -> None:
        if "step" in event:
            self._begun |= dict.fromkeys(self._running[key], event["step"] / event["of"])
            return
        group = self._running.pop(key)
        if "fatal" in event:
            raise OSError(event["fatal"])
        if "done" in event:
            for one in group:
                self._end(one, {"key": one, "status": DONE, "results": {"seconds": event["seconds"]}})
        elif "failed" in event and len(group) > 1:
            self._waiting.extend((one,) for one in group)  # one of them is to blame, or they do not fit
        elif "failed" in event:
            self._failures[key] += 1
            if event["again"] and self._failures[key] <= self._retries:
                self._waiting.append(group)  # behind the others, which it does not hold up
            else:
                attempts = f" ({_counted(self._failures[key], 'attempt')})" if event["again"] else ""
                row = {"key": key, "status": FAILED, "time": now(), "reason": f"{event['reason']}{attempts}"}
                self._shard.append(row | self._experiments[key].plain())
                self._end(key, row)
        else:  # it was interrupted, by us or by somebody who ended its process
            self._waiting.append(group)

    def _end(self, key: str, row: dict[str, Any]) -> None:
        self._rows[key] = row
        self._begun.pop(key, None)

    def _report(self, last: bool = False) -> None:
        if self._progress is not None and (last or time.monotonic() - self._told >= _REPORT_SECONDS):
            self._progress(self.status())
            self._told = time.monotonic()
