"""Peak memory of a step, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Case(Protocol):
    """What is measured; it is pickled."""

    device: str

    def smaller(self) -> Case: ...
    def inputs(self) -> Any: ...
    def step(self, provider: str, inputs: Any) -> Callable[[], object]: ...


def peak_mb(case: Case, provider: str, steps: int = 3) -> float | None:
    """Peak memory, in MB of 2^20 bytes, of what a provider holds and of its steps, above that of its inputs.

    On a CPU this is resident memory, since an allocator's own count (torch's profiler) sees neither oneDNN's nor our
    kernels' buffers, nor what fragmentation costs. The process is fresh, and has run the same provider on a small
    image: libraries, threads and code are then there. Counted is all that comes after the inputs (network, mask, z and
    y): the provider's own weights and patterns, Adam's state, activations. Building it may take more for a moment,
    and is left out. On a GPU it is the peak of torch's allocator. None where the system does not tell: on a CPU, only
    Linux lets a process forget its peak.
    """
    if not case.device.startswith("cuda") and not _CLEAR.exists():
        return None
    context = get_context("spawn")  # a fork would inherit memory that was freed, but not given back
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case, provider, steps, torch.get_num_threads()).result()


def _measure(case: Case, provider: str, steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    small = case.smaller()
    small.step(provider, small.inputs())()
    inputs = case.inputs()
    _give_back()
    before = _resident(case.device)
    step = case.step(provider, inputs)
    _give_back()
    _reset_peak(case.device)
    for _ in range(steps):
        step()
    return (_peak(case.device) - before) / 2**20


def _give_back() -> None:
    """Return freed memory to the system, which C's allocator may keep."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _resident(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR.write_text("5")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")
