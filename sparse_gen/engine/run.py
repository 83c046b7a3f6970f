"""Programs of several experiments as one differentiable function of kept values and z."""

from __future__ import annotations

import weakref

import torch
from torch.autograd.function import once_differentiable

from sparse_gen.engine.branches import Branch, branching
from sparse_gen.engine.program import Program

Given = list[dict[int, torch.Tensor]]
# What runs one after the other: a program, its rows of the values, and what depends on its z alone.
Part = tuple[Program, torch.Tensor, dict[int, torch.Tensor]]


def in_one_pass(device: torch.device, masks: int) -> bool:
    """Whether several experiments of a network run in one pass over all of them, or one after the other.

    On a GPU one launch then serves all, and experiments whose masks differ run on the union of what they keep. On the
    CPU the union costs more than the calls that are saved (four masks of 5 %, 2 threads: 101 ms instead of 62 at 256²,
    19 instead of 14 at 64²), so that only those with one mask share a pass (52 instead of 81, 10 instead of 19; mask
    search 142 instead of 161, 24 instead of 32), with the bits that each has alone.

    Args:
        masks: how many there are, 1 for one of all experiments.
    """
    return masks == 1 or device.type == "cuda"


class NetworkRun:
    """Runs each experiment by its own program, or all by one.

    Args:
        programs: one an experiment, or one for all.
        size: (C, H, W) of the inputs that can run.
        one_pass: whether the one program takes all experiments in one pass.
    """

    def __init__(self, programs: list[Program], size: torch.Size, one_pass: bool = False):
        self.programs, self._size, self._one_pass = programs, size, one_pass
        self._prepared: tuple[weakref.ref, int, int, Given] | None = None

    def takes(self, z: torch.Tensor) -> bool:
        """Whether z has the size that was captured."""
        return z.shape[1:] == self._size

    def __call__(self, values: torch.Tensor, z: torch.Tensor, *, changes: bool = False) -> torch.Tensor:
        """(E, kept) and (E or 1, C, H, W) to (E, …); `changes` says that z is another one at every call."""
        with torch.no_grad():
            parts = self._parts(values, z, changes or z.requires_grad)
        if torch.is_grad_enabled() and (values.requires_grad or z.requires_grad):
            return _Run.apply(values, z, parts)
        with torch.no_grad():
            return _joined([program.forward(own, given, None) for program, own, given in parts])

    def _parts(self, values: torch.Tensor, z: torch.Tensor, changes: bool) -> list[Part]:
        given = self._given(z, len(values), changes)
        rows = [values.detach()] if len(given) == 1 else values.detach().split(1)
        programs = [self.program(e) for e in range(len(rows))]
        if changes:
            programs = [program.of_changing_z() for program in programs]
        return list(zip(programs, rows, given, strict=True))

    def program(self, experiment: int) -> Program:
        return self.programs[experiment if len(self.programs) > 1 else 0]

    def _given(self, z: torch.Tensor, experiments: int, changes: bool) -> Given:
        """What depends on z alone, kept as long as the same unchanged z comes again, unless it `changes` anyway."""
        if self._prepared is not None:
            known, version, number, given = self._prepared
            if known() is z and z._version == version and not changes and number == experiments:
                return given
        detached, alone = z.detach(), z.requires_grad
        if self._one_pass or experiments == 1:
            given = [self.programs[0].prepare(detached, experiments, alone=alone)]
        elif len(z) == 1 and len(self.programs) == 1:
            given = [self.programs[0].prepare(detached, 1, alone=alone)] * experiments
        else:
            each = detached.split(1) if len(z) > 1 else [detached] * experiments
            given = [self.program(e).prepare(own, 1, alone=alone) for e, own in enumerate(each)]
        self._prepared = None if changes else (weakref.ref(z), z._version, experiments, given)
        return given


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, z, parts: list[Part]):
        ctx.parts, ctx.streams = [(*part, []) for part in parts], branching()
        ctx.shared_z = len(z) == 1 and len(values) > 1
        return _joined([program.forward(own, g, tape) for program, own, g, tape in ctx.parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.parts is None:
            raise RuntimeError("expected one backward pass an output, got a second, run forward again")
        needs_values, needs_z = ctx.needs_input_grad[:2]
        parts, ctx.parts = ctx.parts, None
        gradients = [grad_output] if len(parts) == 1 else grad_output.split(1)
        grads, grads_z = [], []
        for (program, own, given, tape), gradient in zip(parts, gradients, strict=True):
            branch = None if ctx.streams is None else Branch(ctx.streams)
            grad, grad_z = program.backward(gradient, own, tape, given, needs_z, branch)
            grads.append(grad)
            grads_z.append(grad_z)
        grad_values = _joined(grads) if needs_values else None
        if not needs_z:
            return grad_values, None, None
        grad_z = _joined(grads_z)
        return grad_values, grad_z.sum(dim=0, keepdim=True) if ctx.shared_z else grad_z, None


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
