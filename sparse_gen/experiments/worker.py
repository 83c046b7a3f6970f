"""A process that runs experiments of a sweep, one after another.

A line of JSON on stdin is experiments that run at the same time, with their keys, or "stop". A line on stdout says what
became of them; the rows themselves go to a shard. Stdin's end ends the process at once: then its parent is gone, and
another sweep may already have begun where this one was.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_gen.experiments.shards import DONE, Shard, now

# What no other experiment would survive either.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Worker:
    """Runs what comes on stdin and tells on `say` what became of it."""

    def __init__(self, folder: Path, seconds: float, say: Callable[[dict[str, Any]], None]):
        self._folder, self._seconds, self._say = folder, seconds, say
        self._shard = Shard(folder / "results")
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._checkpoints = None
        self._stopping = False

    def listen(self) -> None:
        """Take lines from stdin until it ends."""
        for line in sys.stdin:
            message = json.loads(line)
            if message == "stop":
                self.stop()
            else:
                self._jobs.put(message)
        os._exit(0)

    def stop(self, *_: object) -> None:
        """Store where the experiment is, and end; safe in a signal handler and in another thread."""
        self._stopping = True
        if self._checkpoints is not None:
            self._checkpoints.request_stop()
        self._jobs.put(None)

    def prepare(self) -> None:
        """Load what experiments need; a failure here is not theirs."""
        import sparse_gen.experiments.methods  # noqa: F401

    def run(self) -> None:
        """Work until asked to stop, or until something went wrong that may have left this process unsound."""
        self.prepare()
        self._say({"ready": os.getpid()})
        while not self._stopping:
            job = self._jobs.get()
            if job is not None and not self._attempt(job["keys"], job["experiments"]):
                return

    def _attempt(self, keys: list[str], plain: list[dict[str, Any]]) -> bool:
        """Run experiments at the same time, and say whether this process can go on; they go by the first one's key."""
        from sparse_gen.checkpoint import RunInterrupted

        key = keys[0]
        try:
            results = self.results(key, plain)
            for one, experiment, result in zip(keys, plain, results, strict=True):
                self._shard.append({"key": one, "status": DONE, "time": now(), **experiment, "results": result})
            for one in keys:
                shutil.rmtree(self._folder / "checkpoints" / one, ignore_errors=True)
            self._say({"done": key, "seconds": results[0]["seconds"]})
            return True
        except RunInterrupted:
            self._say({"interrupted": key})
            return False
        except (ValueError, FloatingPointError) as error:  # the next attempt would end the same
            self._say({"failed": key, "reason": str(error), "again": False})
            return True
        except OSError as error:
            if error.errno in _NO_ROOM or not (self._folder / "results").is_dir():
                self._say({"fatal": f"{error.strerror or error}: {error.filename or self._folder}"})
            else:
                self._say({"failed": key, "reason": str(error), "again": True})
            return False
        except Exception as error:
            traceback.print_exc()
            self._say({"failed": key, "reason": f"{type(error).__name__}: {error}", "again": True})
            return False

    def results(self, key: str, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run experiments from where they are."""
        from sparse_gen.checkpoint import Checkpoints, OtherRunError
        from sparse_gen.experiments.methods import run_experiments
        from sparse_gen.experiments.plan import Experiment

        experiments = [Experiment.from_plain(one) for one in plain]
        for resume in (True, False):
            self._checkpoints = Checkpoints(self._folder / "checkpoints" / key, seconds=self._seconds, resume=resume)
            if self._stopping:
                self._checkpoints.request_stop()
            try:
                return run_experiments(experiments, self._checkpoints, self._progress)
            except OtherRunError:  # by another version of torch, say: begin again
                self._checkpoints.clear()
        raise AssertionError("a run that does not resume is never another one")

    def _progress(self, step: int, total: int) -> None:
        self._say({"step": step, "of": total})


def main(arguments: list[str], kind: type[Worker] = Worker) -> None:
    """Run a worker on the folder of a sweep, with so many seconds between checkpoints; it ends the process."""
    # Stdout belongs to the messages: whatever a library prints goes to the log with stderr.
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = kind(Path(arguments[0]), float(arguments[1]), lambda message: print(json.dumps(message), file=messages))
    # Ctrl-C goes to every process of a terminal: the parent alone decides. Whoever stops one worker means it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, worker.stop)
    threading.Thread(target=worker.listen, daemon=True).start()
    code = 1
    try:
        worker.run()
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # not by way of the interpreter's end, which trips over a thread that reads stdin
