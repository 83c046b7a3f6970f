"""What a run's numbers depend on besides its settings: device, precision, threads, versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

import sparse_gen


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine.

    Raises:
        ValueError: if a GPU is asked for that is not there; the message says why.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.version.cuda is None:
            reason = f"PyTorch {torch.__version__} is built without CUDA"
        elif count == 0:
            reason = "PyTorch finds no GPU"
        elif (device.index or 0) >= count:
            reason = f"there are {count} GPUs, counted from 0"
        else:
            return device
        raise ValueError(f"device: expected one that is there, got {name}, but {reason}, use --device cpu")
    return device


def precision_in_use(device: torch.device) -> str:
    """How float32 convolutions are multiplied on a device now: "ieee", "tf32" or "bf16"."""
    backend = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    setting = backend.conv.fp32_precision
    return "ieee" if setting == "none" else setting


@contextmanager
def use_threads(count: int | None) -> Iterator[int]:
    """Let PyTorch use `count` CPU threads inside the block (None: as many as it does already)."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str | None]:
    """Of sparse_gen, Python and the libraries that results depend on; None where one is missing."""
    return {
        "sparse_gen": sparse_gen.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
