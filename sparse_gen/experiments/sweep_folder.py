"""The folder of a sweep: its plan, its experiments, their results, and how far they are."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from sparse_gen.experiments.plan import FINDING, Experiment, Plan
from sparse_gen.experiments.shards import DONE, FAILED, read_rows, write_csv, write_parquet
from sparse_gen.files import claim_folder, write_json

_PLAN, _EXPERIMENTS, _LOCK = "plan.yaml", "experiments.json", "sweep.lock"
_CURVES = ("psnr_steps", "psnr_by_step")


@dataclass(frozen=True)
class Status:
    """How far a sweep is; equal experiments count as one.

    Attributes:
        total: experiments of the plan.
        done, failed: how many ended so.
        running: how many are being worked on.
        interrupted: how many are not, but have begun.
        left: how many have not ended, running and interrupted ones included.
        seconds_left: estimated from those that are done; None where there is none yet.
        workers: processes that work on it, or did last.
        reasons: each experiment that failed, and why.
    """

    total: int
    done: int
    failed: int
    running: int
    interrupted: int
    left: int
    seconds_left: float | None
    workers: int
    reasons: list[tuple[Experiment, str]]

    @classmethod
    def of(
        cls,
        experiments: Mapping[str, Experiment],
        rows: Mapping[str, Mapping[str, Any]],
        begun: Mapping[str, float],
        running: int,
        workers: int,
    ) -> Status:
        """From experiments and results by key, and what fraction of each experiment that has begun is done."""
        ended = Counter(row["status"] for row in rows.values())
        left = {key: experiment for key, experiment in experiments.items() if key not in rows}
        return cls(
            total=len(experiments),
            done=ended[DONE],
            failed=ended[FAILED],
            running=running,
            interrupted=len(begun) - running,
            left=len(left),
            seconds_left=_seconds_left(experiments, rows, left, begun, workers),
            workers=workers,
            reasons=[(experiments[k], str(row.get("reason"))) for k, row in rows.items() if row["status"] == FAILED],
        )


class SweepFolder:
    """A folder in which a sweep is, or begins."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SweepFolder:
        """That of a sweep which has begun.

        Raises:
            ValueError: it holds none.
        """
        folder = cls(path)
        if not folder.has_begun:
            raise ValueError(f"sweep: expected the folder of a sweep, got {folder.path} without one, name another")
        return folder

    @property
    def has_begun(self) -> bool:
        return (self.path / _EXPERIMENTS).is_file()

    @property
    def plan(self) -> Plan:
        """The plan, with its threads and the images' whole paths.

        Raises:
            OSError, ValueError: as `Plan.load`.
        """
        return Plan.load(self.path / _PLAN)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    def checkpoints(self, key: str) -> Path:
        """Where an experiment that has begun stores its state; the folder goes when it is done."""
        return self.path / "checkpoints" / key

    def claim(self) -> None:
        """Make the folder, unless the sweep is in it.

        Raises:
            FileExistsError: it holds something else.
            OSError: it cannot be made or written to.
        """
        claim_folder(self.path, overwrite=self.has_begun)

    def begin(self, plan: Plan, experiments: Iterable[Experiment]) -> None:
        """Store what is to be done. Results that are there stay, and count where they belong to it.

        Raises:
            OSError: the folder cannot be written to.
        """
        for folder in (self.logs, self.results, self.path / "checkpoints"):
            folder.mkdir(exist_ok=True)
        for log in self.logs.iterdir():
            if log.stat().st_size == 0:  # of a session that was killed
                log.unlink()
        plan.save(self.path / _PLAN)
        write_json(self.path / _EXPERIMENTS, {"experiments": [experiment.plain() for experiment in experiments]})

    def experiments(self) -> list[Experiment]:
        """What the plan unfolded to, in its order.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path / _EXPERIMENTS
        try:
            return [Experiment.from_plain(plain) for plain in json.loads(path.read_bytes())["experiments"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"sweep: expected a list of experiments, got {path}, which is damaged, run the sweep's plan again"
            ) from None

    def rows(self, experiments: Mapping[str, Experiment]) -> dict[str, dict[str, Any]]:
        """The results of experiments by key, see `read_rows`."""
        return {key: row for key, row in read_rows(self.results).items() if key in experiments}

    @contextmanager
    def locked(self, workers: int) -> Iterator[None]:
        """Keep other processes from working on the sweep; the lock goes with the process, however that ends.

        Raises:
            BlockingIOError: another one does.
        """
        import fcntl  # POSIX only; the rest of the package is not

        with open(self.path / _LOCK, "a") as file:
            try:
                _patiently(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise BlockingIOError(
                    f"sweep: expected a folder that no other process works on, got {self.path}, wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(str(workers))
            file.flush()
            yield

    def status(self) -> Status:
        """How far the sweep is, as its files tell.

        Raises:
            ValueError: its list of experiments is damaged.
        """
        experiments = {experiment.key: experiment for experiment in self.experiments()}
        rows = self.rows(experiments)
        begun = {
            key: _stored_fraction(self.checkpoints(key), experiment)
            for key, experiment in experiments.items()
            if key not in rows and self.checkpoints(key).is_dir()
        }
        workers, runs = self._workers()
        return Status.of(experiments, rows, begun, min(workers, len(begun)) if runs else 0, workers)

    def _workers(self) -> tuple[int, bool]:
        """How many processes the sweep was last run with, and whether it runs now."""
        import fcntl

        try:
            with open(self.path / _LOCK) as file:
                text = file.read(9)
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    runs = False
                except BlockingIOError:
                    runs = True
        except FileNotFoundError:
            return 1, False
        return int(text) if re.fullmatch(r"[1-9][0-9]*", text) else 1, runs

    def merge(self) -> tuple[list[Path], str | None]:
        """Write one table of all results, a row an experiment of the plan: CSV, and Parquet where pyarrow is there.

        The curves of PSNR by step are in the Parquet file only.

        Returns:
            The files, and what to do for the one that is missing.

        Raises:
            OSError: they cannot be written.
        """
        experiments = self.experiments()
        rows = self.rows({experiment.key: experiment for experiment in experiments})
        flat = [_flat(experiment, rows.get(experiment.key)) for experiment in experiments]
        table, whole = self.path / "results.csv", self.path / "results.parquet"
        write_csv(table, [{name: value for name, value in row.items() if name not in _CURVES} for row in flat])
        try:
            write_parquet(whole, flat)
        except ImportError:
            return [table], f"for {whole.name} install pyarrow: pip install 'sparse-gen[sweep]'"
        return [table, whole], None


def _patiently(attempt: Callable[[], None]) -> None:
    """A look of `status` at the lock may coincide with the attempt to take it."""
    for _ in range(5):
        try:
            return attempt()
        except BlockingIOError:
            time.sleep(0.05)
    return attempt()


def _flat(experiment: Experiment, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """An experiment and its results as one row: what was resolved on the way takes the place of what was left open."""
    plain = experiment.plain()
    config, finding = plain.pop("config"), plain.pop("finding")
    settings = {**config, "image_path": config["image"], "generator_class": config["generator"]}
    ended = {"status": None, "reason": None} if row is None else {"status": row["status"], "reason": row.get("reason")}
    plain |= {name: finding.get(name) for name in FINDING}
    return {"key": experiment.key, **ended, **settings, **plain, **(row or {}).get("results", {})}


def _stored_fraction(checkpoints: Path, experiment: Experiment) -> float:
    steps = [0]
    for path in checkpoints.glob("*.safetensors"):
        if found := re.fullmatch(r"(search|fit)-([0-9]{9})\.safetensors", path.name):
            steps.append(int(found[2]) + (experiment.search_steps if found[1] == "fit" else 0))
    return min(max(steps) / experiment.budget, 1.0)


def _seconds_left(
    experiments: Mapping[str, Experiment],
    rows: Mapping[str, Mapping[str, Any]],
    left: Mapping[str, Experiment],
    begun: Mapping[str, float],
    workers: int,
) -> float | None:
    """The work that is left, each experiment at the pace of those most like it that are done, over the workers."""
    paces: dict[tuple[str, ...], list[float]] = {}
    for key, row in rows.items():
        if row["status"] == DONE:
            for kinship in _kinships(experiments[key]):
                paces.setdefault(kinship, []).append(row["results"]["seconds"])
    if not paces:
        return None
    seconds = 0.0
    for key, experiment in left.items():
        pace = next(paces[kinship] for kinship in _kinships(experiment) if kinship in paces)
        seconds += mean(pace) * (1 - begun.get(key, 0.0))
    return seconds / workers


def _kinships(experiment: Experiment) -> Sequence[tuple[str, ...]]:
    """From close to distant; all experiments share the last."""
    image, generator, method = experiment.image, experiment.generator, experiment.method
    return [(image, generator, method), (generator, method), (method,), ()]
