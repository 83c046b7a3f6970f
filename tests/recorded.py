"""A stand-in for CUDA graphs on the CPU, and a guard against what a captured step must not do."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Calls whose result, or the shape of it, has to come to the host.
READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select,
    aten.unique_consecutive, aten._unique2, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
HOST_METHODS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
# Copies from the host's memory; under a capture they are refused, or repeat what was there then.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.scalar_tensor}
FACTORIES = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.eye, torch.linspace}


class OnDeviceOnly(TorchFunctionMode):
    """Refuses, in Python, what would wait for a GPU or make a tensor that is not on it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in HOST_METHODS or func in FROM_HOST:
            raise AssertionError(f"{func} in a step")
        if func in FACTORIES and kwargs.get("device") is None:
            raise AssertionError(f"{func} without a device in a step")
        if func is torch.Tensor.to and any(str(argument) == "cpu" for argument in (*args[1:], *kwargs.values())):
            raise AssertionError("a copy to the CPU in a step")
        return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Runs and notes every call to an operator, autograd's and our kernels' included, with its very tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        picks = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in picks)
        if func.overloadpacket in READS or by_mask:
            raise AssertionError(f"{func} in a step")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        """The same calls on the same tensors, results into the tensors that they gave; no Python of the body runs."""
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if any(returned.alias_info is not None for returned in func._schema.returns):
                continue  # a view, or what was changed in place
            for old, result in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(result)


class RecordedSteps:
    """A `Capturer`: records one step under the guard, and replays it."""

    def __init__(self):
        self.bodies = self.replays = 0

    def warm_up(self, body):
        self.bodies += 1
        body()

    def capture(self, body):
        self.bodies += 1
        recorder = Recorder()
        with OnDeviceOnly(), recorder:
            body()
        done = True  # a CUDA graph computes nothing while it is captured; this one has taken the step

        def replay():
            nonlocal done
            self.replays += 1
            if not done:
                recorder.replay()
            done = False

        return replay
