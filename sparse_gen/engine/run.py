"""Programs of several experiments as one differentiable function of kept values and z."""

from __future__ import annotations

import weakref

import torch
from torch.autograd.function import once_differentiable

from sparse_gen.engine.program import Program


class NetworkRun:
    """Runs each experiment by its own program.

    Args:
        programs: one an experiment, or one for all.
        size: (C, H, W) of the inputs that can run.
    """

    def __init__(self, programs: list[Program], size: torch.Size):
        self.programs, self._size = programs, size
        self._prepared: tuple[weakref.ref, int, list[dict[int, torch.Tensor]]] | None = None

    def takes(self, z: torch.Tensor) -> bool:
        """Whether z has the size that was captured."""
        return z.shape[1:] == self._size

    def __call__(self, values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(E, kept) and (E or 1, C, H, W) to (E, …)."""
        if torch.is_grad_enabled() and (values.requires_grad or z.requires_grad):
            return _Run.apply(values, z, self, self._given(z, len(values)))
        with torch.no_grad():
            given = self._given(z, len(values))
            return _joined([self.program(e).forward(values[e], given[e], None) for e in range(len(values))])

    def program(self, experiment: int) -> Program:
        return self.programs[experiment if len(self.programs) > 1 else 0]

    def _given(self, z: torch.Tensor, experiments: int) -> list[dict[int, torch.Tensor]]:
        """What depends on z alone, kept as long as the same unchanged z comes again and needs no gradient."""
        if self._prepared is not None:
            known, version, given = self._prepared
            if known() is z and z._version == version and not z.requires_grad and len(given) == experiments:
                return given
        detached = z.detach()
        given = []
        for e in range(experiments):
            shared = e > 0 and len(z) == 1 and len(self.programs) == 1
            own = detached[e : e + 1] if len(z) > 1 else detached
            given.append(given[0] if shared else self.program(e).prepare(own, alone=z.requires_grad))
        self._prepared = None if z.requires_grad else (weakref.ref(z), z._version, given)
        return given


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, z, run: NetworkRun, given):
        tapes: list[list] = [[] for _ in given]
        values = values.detach()
        outputs = [run.program(e).forward(values[e], given[e], tapes[e]) for e in range(len(values))]
        ctx.run, ctx.given, ctx.tapes, ctx.values, ctx.shared_z = run, given, tapes, values, len(z) == 1
        return _joined(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.tapes is None:
            raise RuntimeError("expected one backward pass an output, got a second, run forward again")
        needs_values, needs_z = ctx.needs_input_grad[:2]
        tapes, ctx.tapes = ctx.tapes, None
        grads, grads_z = [], []
        for e, tape in enumerate(tapes):
            program = ctx.run.program(e)
            gradient = grad_output[e : e + 1]
            grad, grad_z = program.backward(gradient, ctx.values[e], tape, ctx.given[e], needs_z)
            grads.append(grad)
            grads_z.append(grad_z)
        grad_values = _stacked(grads) if needs_values else None
        if not needs_z:
            return grad_values, None, None, None
        return grad_values, sum(grads_z) if ctx.shared_z else torch.cat(grads_z), None, None


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
