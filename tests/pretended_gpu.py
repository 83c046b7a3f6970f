"""A GPU that is none: tensors that say they are elsewhere, hold their numbers on the CPU, and run what a GPU would.

The device is called "meta", for which autograd needs no driver. An operator of ours goes the way that it goes on CUDA:
its Triton kernel in the interpreter, its reference where there is none. As on a real GPU it is an error to mix tensors
of two devices, and calls that would copy or wait, which a captured CUDA graph may not, can be forbidden.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib import import_module

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from sparse_gen.engine.graph import Call, Parameter, Value
from sparse_gen.engine.lower import lower
from sparse_gen.ops import dispatch

GPU = torch.device("meta")
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item")


class OnGpu(torch.Tensor):
    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=GPU, requires_grad=False,
        )  # fmt: skip
        tensor.numbers = numbers
        return tensor

    def __deepcopy__(self, memo):
        copy = to_gpu(self.detach().numbers)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def __repr__(self):
        return f"OnGpu({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """While it is active, "meta" is a device with numbers.

    Attributes:
        capturing: whether waiting for the device and copying from the host are errors.
        calls: the names of our operators that ran there.
    """

    current: PretendedGpu | None = None

    def __init__(self):
        super().__init__()
        self.capturing = False
        self.calls: list[str] = []

    def __enter__(self):
        PretendedGpu.current = self
        return super().__enter__()

    def __exit__(self, *error):
        PretendedGpu.current = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @contextmanager
    def capture(self):
        self.capturing = True
        yield
        self.capturing = False


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return OnGpu(tensor.detach().clone())


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor on the pretended GPU holds."""
    assert isinstance(tensor, OnGpu)
    return tensor.detach().numbers


def _autograd():
    """Below the dispatcher it is out of reach, but a reference may ask it for its gradients."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _run(func, args, kwargs):
    mode, name = PretendedGpu.current, func._schema.name
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    ours, theirs = ([t for t in tensors if isinstance(t, OnGpu) is there] for there in (True, False))
    moves = name in ("aten::_to_copy", "aten::copy_")
    assert moves or not ours or all(t.ndim == 0 for t in theirs), f"{name} mixes tensors of the CPU and of the GPU"
    to = kwargs.get("device")
    there = torch.device(to) == GPU if to is not None else bool(ours)
    if mode.capturing:
        assert name not in _WAITS, f"{name} waits for the GPU"
        assert not (there and theirs), f"{name} copies from the host"
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda t: t.numbers if isinstance(t, OnGpu) else t, (args, kwargs))
    call = func
    if there and func.namespace == "sparse_gen":
        mode.calls.append(func._schema.name.removeprefix("sparse_gen::"))
        call = dispatch.route_on_cuda(mode.calls[-1])
    with _autograd() if call is not func else nullcontext():
        result = call(*plain_args, **plain_kwargs)
    if not there:
        return result
    known = {id(t.numbers): t for t in ours}  # what an operator writes to comes back as itself

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else OnGpu(leaf)

    return tree_map(wrapped, result)


def compile_there(monkeypatch, net, mask, z, plan="rule"):
    """`sg.compile` of a network on the pretended GPU; call while that is active."""
    module = import_module("sparse_gen.engine.compile")
    reference = module.training_copy(net)
    captured = lower(reference, z[:1])  # torch.export makes its own pretended tensors, of the CPU's ones alone
    nodes = [replace(node, op=_op_there(node.op)) for node in captured.nodes]
    monkeypatch.setattr(module, "DEVICES", ("cpu", GPU.type))
    monkeypatch.setattr(module, "in_one_pass", lambda device, masks: masks == 1 or device.type == GPU.type)
    monkeypatch.setattr(module, "lower", lambda *_: replace(captured, nodes=tuple(nodes)))
    return module.compile(deepcopy(net).to(GPU), mask, to_gpu(z), plan=plan)


def _op_there(op):
    def moved(item):
        if isinstance(item, torch.Tensor):
            return to_gpu(item)
        if isinstance(item, (list, tuple)) and not isinstance(item, (Value, Parameter)):
            return type(item)(map(moved, item))
        return item

    return replace(op, arguments=moved(op.arguments)) if isinstance(op, Call) else op
