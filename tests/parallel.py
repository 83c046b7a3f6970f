"""A stand-in for two CUDA streams on the CPU, which finds what would be read, written or given back too early."""

from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAIN, SIDE = "main", "side"


class Memory:
    """Of one storage: who allocated it, and who last wrote and read it when."""

    def __init__(self, storage, stream):
        self.alive, self.owner = StorageWeakRef(storage), stream
        self.written: tuple[str, int] | None = None
        self.read: dict[str, int] = {}


class Event(dict):
    """How far each stream was; whatever comes after the host has waited for it, on any stream, knows of that."""

    def __init__(self, known, streams):
        super().__init__(known)
        self._streams, self.synchronized = streams, False

    def synchronize(self):
        self.synchronized = True
        for known in self._streams.values():
            known.update({stream: max(done, known[stream]) for stream, done in self.items()})


class PretendedStreams(TorchDispatchMode):
    """Two streams whose work is done at once, as `Streams` of a `Branch`; while active, every call is on one of them.

    A stream knows how far each has come at least: the other as of the latest event that it has waited for. Whatever a
    call takes must be complete by that knowledge. Memory that is given back is taken by the next call of the stream
    that allocated it, as CUDA's caching allocator does it.

    Attributes:
        calls: the names of the calls on each stream.
    """

    def __init__(self):
        super().__init__()
        self._current = MAIN
        self._known = {stream: {MAIN: 0, SIDE: 0} for stream in (MAIN, SIDE)}
        self._memory: dict[int, Memory] = {}
        self.calls = {MAIN: [], SIDE: []}

    def record(self):
        return Event(self._known[self._current], self._known)

    def wait(self, event):
        known = self._known[self._current]
        for stream, done in event.items():
            known[stream] = max(known[stream], done)

    @contextmanager
    def beside(self):
        before, self._current = self._current, SIDE
        try:
            yield
        finally:
            self._current = before

    def _check(self, what, stream, done):
        by = self._current
        assert self._known[by][stream] >= done, f"{what} on the {stream} stream, for which the {by} stream did not wait"

    def _take_what_was_given_back(self):
        gone = [key for key, m in self._memory.items() if m.owner == self._current and m.alive.expired()]
        for memory in map(self._memory.pop, gone):
            for stream, done in [*memory.read.items(), *([memory.written] if memory.written else [])]:
                self._check("takes memory that is still used", stream, done)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._take_what_was_given_back()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = [self._of(tensor) for tensor in given]
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views:
            return out
        now = self._known[self._current][self._current] = self._known[self._current][self._current] + 1
        self.calls[self._current].append(func._schema.name)
        for memory in before:
            if memory.written is not None:
                self._check(f"{func} reads what was written", *memory.written)
            memory.read[self._current] = now
        changed = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        ]
        for tensor in changed:
            for stream, done in self._of(tensor).read.items():
                if stream != self._current:
                    self._check(f"{func} overwrites what was read", stream, done)
        for tensor in [*changed, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))]:
            self._of(tensor).written = (self._current, now)
        return out

    def _of(self, tensor):
        storage = tensor.untyped_storage()
        return self._memory.setdefault(storage._cdata, Memory(storage, self._current))
