"""How an operator gets its backends: schema, reference and fake here, kernels under the same name elsewhere.

Schemas live in Python and not in C++, so that an installation without a compiler has the same operators,
served by the plain-PyTorch references. A kernel in C++ or CUDA registers itself when the compiled library loads; a
Triton kernel is a function of the operator's name in `sparse_gen.kernels`, in the file of the operator's stem. Where
there are both, CUDA's is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module, util

import torch

from sparse_gen.ops.extension import status, warn_without_extension

LIBRARY = torch.library.Library("sparse_gen", "DEF")
LIBRARY.define("instruction_set() -> int")
status()  # first, so that what the compiled library brings is known below

_stems: dict[str, str] = {}
_in_python_on_cuda: set[str] = set()
_route_on_cuda: dict[str, Callable] = {}
_served_by: dict[str, tuple[str, Callable]] = {}


@cache
def _triton_missing(stem: str, name: str) -> str | None:
    if util.find_spec("triton") is None:
        return "triton is not installed (it exists for Linux on x86-64)"
    if util.find_spec("sparse_gen.kernels") is None:
        return "sparse_gen.kernels is missing: sparse_gen was imported from its source folder, not installed"
    if util.find_spec(f"sparse_gen.kernels.{stem}") is None:
        return "it has no Triton kernel yet"
    # A stem may have operators for the CPU alone beside its own.
    return None if hasattr(import_module(f"sparse_gen.kernels.{stem}"), name) else "it has no Triton kernel"


def _has_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_gen::{name}", "CUDA")


def _compiled_route(name: str) -> Callable | None:
    operator, call = _served_by.get(name, (None, None))
    return call if operator is not None and _has_cuda_kernel(operator) else None


def _cuda_missing(name: str) -> str | None:
    if name not in _in_python_on_cuda or _compiled_route(name) is not None:
        return None
    if not status().available:
        return status().reason
    if not status().build.get("cuda"):
        return status().build.get("cuda_reason") or "the CUDA kernels were not compiled"
    return "it has no kernel in CUDA C++ yet"


def register_operator(schema: str, *, reference: Callable, fake: Callable, stem: str | None = None) -> None:
    """Define `sparse_gen::<schema>` with its reference on every device and, on CUDA, the compiled or the Triton kernel.

    The Triton kernel is `sparse_gen.kernels.<stem>.<name>`; without a stem, that of the reference's file.
    """
    name = schema.split("(")[0]
    stem = stem or reference.__module__.rpartition(".")[2]
    _stems[name] = stem
    LIBRARY.define(schema)

    def run_reference(*args):
        warn_without_extension()
        return reference(*args)

    def run_on_cuda(*args):
        compiled = _compiled_route(name)
        if compiled is not None and (result := compiled(*args)) is not NotImplemented:
            return result
        return run_triton(*args)

    def run_triton(*args):
        # On a GPU float64 is for checking numbers, which is what the reference is for.
        in_double = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args)
        if in_double or _triton_missing(stem, name):
            return reference(*args)
        return getattr(import_module(f"sparse_gen.kernels.{stem}"), name)(*args)

    _route_on_cuda[name] = run_on_cuda
    LIBRARY.impl(name, run_reference, "CompositeExplicitAutograd")
    if not _has_cuda_kernel(name):
        LIBRARY.impl(name, run_on_cuda, "CUDA")
        _in_python_on_cuda.add(name)
    torch.library.register_fake(f"sparse_gen::{name}", fake, lib=LIBRARY)


def serve_on_cuda(name: str, operator: str, call: Callable) -> None:
    """Have an operator run on CUDA as `call` wherever another one, which `call` uses, has a compiled kernel.

    `call` takes the operator's arguments, and may give NotImplemented for some: then Triton's kernel runs.
    """
    _served_by[name] = operator, call


def route_on_cuda(operator: str) -> Callable:
    """What an operator runs on CUDA where that is Python: its Triton kernel, or its reference on the GPU."""
    return _route_on_cuda[operator]


def has_gpu_kernel(operator: str) -> bool:
    """Whether an operator runs on CUDA in a kernel of ours, compiled or Triton's, and not as its reference."""
    if operator not in _in_python_on_cuda or _compiled_route(operator) is not None:
        return True
    return _triton_missing(_stems[operator], operator) is None


def operators() -> list[str]:
    """The names of all operators."""
    return sorted(_stems)


def backends(operator: str) -> dict[str, str | None]:
    """For each backend None where it can run, or why it cannot.

    Raises:
        ValueError: there is no such operator.
    """
    if operator not in _stems:
        raise ValueError(f"expected an operator out of {', '.join(operators())}, got {operator!r}")
    no_device = None if torch.cuda.is_available() else "no CUDA device"
    return {
        "reference": None,
        "cpu": status().reason,
        "triton": _triton_missing(_stems[operator], operator) or no_device,
        "cuda": _cuda_missing(operator) or no_device,
    }
