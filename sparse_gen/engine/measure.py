"""The fastest layout of a convolution on this machine: a short measurement on its real shape, and its memory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparse_gen
from sparse_gen.engine.clock import clock
from sparse_gen.engine.layouts import KEPT_ALONE, ConvStage, candidates, has_kernel, make_step, on_gpu
from sparse_gen.files import atomic_write
from sparse_gen.ops.extension import library, status

VERSION = 2
CPU = torch.device("cpu")
# A layout replaces the rule's where it is faster by more than what two measurements of one layout differ by.
_GAIN = 0.95
# Layouts beyond this multiple of the fastest after their first runs are not run again.
_HOPELESS = 2.0
_ROUNDS, _SECONDS = 5, 0.03  # of a layout at most; a slow one is run once more at least
# Sparse kernels do a third of the dense ones' multiplications a second: outside of these densities there is nothing
# to measure. (On the image before its up-sampling they save as much again.)
_LEAST, _MOST = 0.05, 0.75


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the fastest layout depends on beside the stage: plain data."""
    if device.type == "cuda":
        return _gpu(device)
    return {
        "processor": _processor(),
        "instruction_set": status().instruction_set,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparse_gen": sparse_gen.__version__,
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    versions = {}
    with suppress(metadata.PackageNotFoundError):
        versions["triton"] = metadata.version("triton")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "precision": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        "cuda": torch.version.cuda,
        "instruction_set": status().instruction_set,
        "torch": torch.__version__,
        "sparse_gen": sparse_gen.__version__,
        **versions,
    }


def measured_layout(stage: ConvStage, dtype: torch.dtype) -> str:
    """The layout that runs forward and backward the fastest."""
    layouts = contenders(stage, dtype)
    if len(layouts) == 1:
        return layouts[0]
    memory, key = memory_here(stage.device), stage_key(stage, dtype)
    times = memory.get(key)
    if times is None or not set(layouts) <= set(times):
        times = layout_times(stage, layouts, dtype)
        memory.put(key, times)
    fastest = min(layouts, key=times.__getitem__)
    return fastest if times[fastest] < _GAIN * times[layouts[0]] else layouts[0]


def known_time(stage: ConvStage, layout: str, dtype: torch.dtype) -> float | None:
    """Milliseconds, forward and backward, that were measured on this machine; None where they were not."""
    times = memory_here(stage.device).get(stage_key(stage, dtype)) or {}
    return times.get(layout)


def contenders(stage: ConvStage, dtype: torch.dtype) -> list[str]:
    """The candidates that can be the fastest, the rule's choice first."""
    layouts = candidates(stage)
    if on_gpu(stage.device):
        return [layout for layout in layouts if layout == layouts[0] or has_kernel(layout, dtype)]
    density = float(stage.mask.double().mean()) if stage.mask.numel() else 0.0
    if density < _LEAST:
        return [layout for layout in layouts if layout in KEPT_ALONE] or layouts
    if density > _MOST:
        return [layout for layout in layouts if layout not in ("sparse", "upsampled sparse")] or layouts
    return layouts


def stage_key(stage: ConvStage, dtype: torch.dtype) -> str:
    """Everything of a stage that its time depends on, as text."""
    conv = stage.conv
    out, into, kernel_h, kernel_w = stage.mask.shape
    words = [f"{into}x{stage.size[0]}x{stage.size[1]} to {out}", f"{kernel_h}x{kernel_w}"]
    words += [f"stride {conv.stride}", f"{conv.padding_mode} {conv.padding}", f"upsample {conv.upsample}"]
    words += ["pool"] * conv.pool + ["bias"] * stage.biased + ["input gradient"] * stage.needs_gradient
    words += [f"kept {int(stage.mask.sum())}", str(dtype).removeprefix("torch.")]
    words += [f"{stage.experiments} experiments"] * (stage.experiments > 1)
    return ", ".join(words)


def layout_times(stage: ConvStage, layouts: list[str], dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a forward and backward pass by layout, in turns so that a drift reaches all alike."""
    runs = {layout: _Run(layout, stage, dtype) for layout in layouts}
    first = {layout: run.time() for layout, run in runs.items()}
    for layout, run in runs.items():
        # The first run also allocates, lets oneDNN compile, and makes what is kept of a constant input.
        if first[layout] < _SECONDS / 2 or not stage.needs_gradient:
            first[layout] = min(first[layout], run.time())
    best = min(first.values())
    samples = {layout: [seconds] for layout, seconds in first.items()}
    racing = [layout for layout in layouts if first[layout] <= _HOPELESS * best]
    for _ in range(_ROUNDS if len(racing) > 1 else 1):
        for layout in racing:
            samples[layout].append(runs[layout].time())
        if max(sum(samples[layout]) for layout in racing) > _SECONDS:
            break
    # Of a layout that raced, the first run is the one that was disturbed.
    return {layout: 1e3 * median(times[1:] or times) for layout, times in samples.items()}


class _Run:
    """A stage on numbers of its own, in one layout."""

    def __init__(self, layout: str, stage: ConvStage, dtype: torch.dtype):
        self._step, sparse = make_step(layout, stage.conv, stage.mask, stage.device)
        self._clock = clock(stage.device)
        self._step.constant_input = not stage.needs_gradient
        generator = torch.Generator().manual_seed(0)
        (out, into), experiments = stage.mask.shape[:2], stage.experiments
        weight = torch.randn(experiments, *stage.mask.shape, generator=generator, dtype=dtype) * stage.mask
        self._parameters = [(weight[:, stage.mask] if sparse else weight).to(stage.device)]
        # A weight that is given whole is first put together from its kept values, and its gradient taken apart.
        self._place = None
        if not sparse and not stage.mask.all():
            kept = int(stage.mask.sum()) * experiments
            masks = stage.mask.expand_as(weight)
            self._place = torch.full(masks.shape, kept).masked_scatter(masks, torch.arange(kept)).flatten()
            self._place = self._place.to(stage.device)
            self._kept = masks.flatten().nonzero()[:, 0].to(stage.device)
        bias = torch.randn(experiments, out, generator=generator, dtype=dtype)
        self._parameters += [bias.to(stage.device)] * stage.biased
        self._x = torch.randn(experiments, into, *stage.size, generator=generator, dtype=dtype).to(stage.device)
        self._changes = stage.needs_gradient
        self._gradient: torch.Tensor | None = None

    @torch.no_grad()
    def time(self) -> float:
        # Only an input that never changes, like z, is the same tensor in every step.
        x = self._x.view_as(self._x) if self._changes else self._x
        values = x.new_zeros(len(self._kept) + 1) if self._place is not None else None
        self._clock.start()
        start = self._clock.mark()
        if values is not None:
            values.index_select(0, self._place)
        y, kept = self._step.forward([x], self._parameters, True)
        middle = self._clock.mark()
        if self._gradient is None:
            self._gradient = torch.randn_like(y)
        again = self._clock.mark()
        _, grads = self._step.backward(self._gradient, kept, self._parameters, [self._changes])
        if values is not None:
            grads[0].flatten().index_select(0, self._kept)
        end = self._clock.mark()
        return self._clock.seconds(start, middle) + self._clock.seconds(again, end)


class Memory:
    """Layout times of one machine: stage → layout → milliseconds, in this process and, where it can be, in a file.

    Several processes may share the file: it is replaced as a whole, what another one has put there stays, and one that
    cannot be read counts as empty.
    """

    def __init__(self, path: Path, described: dict[str, Any]):
        self._path, self._machine = path, described
        self._stages: dict[str, dict[str, float]] = self._read()
        self._changed = False

    def get(self, key: str) -> dict[str, float] | None:
        return self._stages.get(key)

    def put(self, key: str, times: dict[str, float]) -> None:
        self._stages[key] = {layout: round(milliseconds, 5) for layout, milliseconds in times.items()}
        self._changed = True

    def save(self) -> None:
        """Write what is new; a folder that cannot be written is no error, the process remembers."""
        if not self._changed:
            return
        stages = self._stages | self._read()  # what another process may already have gone by
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path, "w") as file:
                json.dump({"version": VERSION, "machine": self._machine, "stages": stages}, file, indent=1)
        self._changed = False

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            stages = json.loads(self._path.read_bytes())["stages"]
            sound = {
                str(key): {str(layout): float(milliseconds) for layout, milliseconds in times.items()}
                for key, times in stages.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}
        return sound


_memories: dict[tuple[str, str], Memory] = {}


def memory_here(device: torch.device = CPU) -> Memory:
    """That of this machine and device, with the threads and instruction set in use now."""
    # A library that was compiled anew may have other kernels.
    described = machine(device) | {"library": _library_version()}
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    key = str(folder), name
    if key not in _memories:
        _memories[key] = Memory(folder / f"layouts-{name}.json", described)
    return _memories[key]


def cache_folder() -> Path:
    """`SPARSE_GEN_CACHE`, or the user's cache folder."""
    if given := os.environ.get("SPARSE_GEN_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "sparse-gen"
    with suppress(RuntimeError):  # there need be no home
        return Path.home() / ".cache" / "sparse-gen"
    return Path(os.devnull) / "sparse-gen"


@cache
def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _library_version() -> str | None:
    path = library()
    if path is None:
        return None
    found = path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"
