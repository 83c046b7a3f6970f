"""How many kernels a step of a program starts on a GPU, and how many bytes they move: counted, nothing is computed.

The step runs once on tensors without numbers, of the "meta" device. A call of PyTorch that computes is a kernel; an
operator of ours goes through its launcher, whose launches count one by one. Each kernel reads and writes what it is
given once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from importlib import util
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparse_gen.engine.program import Program
from sparse_gen.ops.dispatch import has_gpu_kernel, route_on_cuda

# Operators whose launcher is C++, or needs the numbers of a pattern: kernels at most.
_LAUNCHES = {
    "sparse_conv2d": 1,
    "sparse_conv2d_backward": 3,
    "sparse_upsample_conv2d": 1,
    "sparse_upsample_conv2d_backward": 2,
    "block_sparse_conv2d": 3,
    "block_sparse_conv2d_backward": 6,
}
_FILLED = ("zeros", "ones", "full")
_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_local_scalar_dense", "detach", "lift_fresh")


@dataclass
class Count:
    """What a step starts and moves.

    Attributes:
        forward, backward: kernels.
        bytes: read and written by all of them, each of its tensors once.
        names: kernels and calls by name.
    """

    forward: int = 0
    backward: int = 0
    bytes: int = 0
    names: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> int:
        return self.forward + self.backward


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.kernels, self.bytes, self.names = 0, 0, Counter()

    def add(self, name: str, tensors: Iterable, kernels: int = 1) -> None:
        known = {id(leaf): leaf for leaf in tree_leaves(list(tensors)) if isinstance(leaf, torch.Tensor)}
        self.kernels += kernels
        self.names[name] += kernels
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in known.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if func.namespace == "sparse_gen" and name not in _LAUNCHES and has_gpu_kernel(name):
            with self:
                return route_on_cuda(name)(*args)
        elsewhere = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        if elsewhere:  # indices and patterns have numbers, which play no part
            args, kwargs = tree_map(_without_numbers, (args, kwargs))
        result = func(*args, **kwargs)
        if not elsewhere and not (name in _FILLED and result.is_meta):
            return result
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in _NO_KERNEL:
            return result
        given = [args, kwargs, result]
        if name == "convolution_backward":  # its two gradients are kernels of their own
            grad, x, weight, grad_x, grad_weight = *args[:3], *result[:2]
            pairs = (("convolution, input", [grad, weight, grad_x]), ("convolution, weight", [grad, x, grad_weight]))
            for (of, tensors), wanted in zip(pairs, args[-1], strict=False):
                if wanted:
                    self.add(of, tensors)
        else:
            self.add(name, given, _LAUNCHES.get(name, 1))
        return result


def count_step(program: Program, values: torch.Tensor, z: torch.Tensor) -> Count:
    """Of a forward and a backward pass; what depends on z alone is made before.

    Args:
        values: (E, kept), of which the shape counts.
        z: (E or 1, C, H, W), likewise.
    """
    program, _ = program.with_steps(_unprepared)
    counting, found = _Counting(), Count()
    values, z = (torch.empty_like(tensor, device="meta") for tensor in (values, z))
    with torch.no_grad(), _counted_launches(counting), counting:
        given = program.prepare(z, len(values))
        for _ in range(2):  # the second counts: what the first makes for good is there
            counting.forget()
            tape: list = []
            output = program.forward(values, given, tape)
            found.forward = counting.kernels
            program.backward(torch.empty_like(output), values, tape, given, False)
    found.backward = counting.kernels - found.forward
    found.bytes, found.names = counting.bytes, counting.names
    return found


def _without_numbers(item):
    return item.to("meta") if isinstance(item, torch.Tensor) else item


def _unprepared(step):
    """What is kept of a constant input has numbers, and is made at another time."""
    step = copy(step)
    step.constant_input = False
    return step


@contextmanager
def _counted_launches(counting: _Counting):
    """Triton's launches as counts."""
    if util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launcher(kernel, _grid):
        name = getattr(kernel, "fn", kernel).__name__.strip("_")
        return lambda *args, **_: counting.add(name, args)

    with ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "__getitem__", launcher))
        yield
