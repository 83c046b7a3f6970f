"""A pool of processes, any of which may crash without taking the others along."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

_PATIENCE = 5.0


def worker_command() -> list[str]:
    """Starts a worker that imports what this process imports, wherever it was started."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from sparse_gen.experiments.worker import main; main(sys.argv[1:])"
    return [sys.executable, "-c", code]


class _Worker:
    """A process, the job it has, and what it has said so far."""

    def __init__(self, command: Sequence[str], threads: int, logs: Path):
        self.log = logs / f"{os.getpid()}-{secrets.token_hex(4)}.log"
        with open(self.log, "xb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self.ready, self.job, self.ends = False, None, False
        self._said = b""

    def tell(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # it has ended, which is seen when its stdout is read
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def hear(self) -> list[dict[str, Any]] | None:
        """Complete messages that have come, None after the last."""
        content = os.read(self.process.stdout.fileno(), 2**16)
        *lines, self._said = (self._said + content).split(b"\n")
        return [json.loads(line) for line in lines] if content else None

    def end(self) -> str:
        """Make sure that it ends, and say how it did."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            code = self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        last = self._last_line()
        if not last:
            self.log.unlink(missing_ok=True)
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"its process {how}" + (f": {last}" if last else "")

    def _last_line(self) -> str:
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


class Pool:
    """So many workers, started when there is work and started again when they have crashed.

    Args:
        command: starts one; see `sparse_gen.experiments.worker` for what is said.
        workers: at most so many at a time.
        threads: of each.
        logs: folder for what they print; empty logs are removed.
        stop: set when workers may end before they are done.
    """

    def __init__(self, command: Sequence[str], workers: int, threads: int, logs: Path, stop: Event):
        self._command, self._most, self._threads, self._logs, self._stop = command, workers, threads, logs, stop
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._told_to_stop = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            with suppress(BrokenPipeError):
                worker.process.stdin.close()  # to all first, so that they end at the same time
        for worker in self._workers:
            worker.end()
        self._selector.close()

    @property
    def busy(self) -> bool:
        return any(worker.job is not None for worker in self._workers)

    @property
    def has_room(self) -> bool:
        return len(self._workers) < self._most or self._idle() is not None

    def submit(self, key: str, message: Any) -> None:
        """Give a job to a worker without one."""
        worker = self._idle()
        if worker is None:
            worker = _Worker(self._command, self._threads, self._logs)
            self._workers.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        worker.job = key
        worker.tell(message)

    def _idle(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.job is None and not worker.ends), None)

    def stop(self) -> None:
        """Ask all workers, once, to store where they are and to end."""
        if not self._told_to_stop:
            self._told_to_stop = True
            for worker in self._workers:
                worker.tell("stop")

    def events(self, timeout: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """What became of jobs: their key and the worker's message, or one like it for a worker that crashed.

        Raises:
            ChildProcessError: a worker did not even start.
        """
        for selected, _ in self._selector.select(timeout):
            worker: _Worker = selected.data
            messages = worker.hear()
            for message in messages or []:
                key = worker.job
                if "ready" in message:
                    worker.ready = True
                    continue
                if "step" not in message:
                    worker.job = None
                    worker.ends = "done" not in message and message.get("again") is not False
                if key is not None:
                    yield key, message
            if messages is None:
                yield from self._buried(worker)

    def _buried(self, worker: _Worker) -> Iterator[tuple[str, dict[str, Any]]]:
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        how, job = worker.end(), worker.job
        if self._stop.is_set() or worker.process.returncode == 0:
            if job is not None:
                yield job, {"interrupted": job}
        elif not worker.ready and worker.process.returncode >= 0:
            raise ChildProcessError(f"workers: expected a process that takes experiments, got one of which {how}")
        elif job is not None:
            yield job, {"failed": job, "reason": how, "again": True}
