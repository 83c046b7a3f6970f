"""Adam on a generator's parameters, with the Langevin noise of SGLD if wanted, and its state for a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.ops.philox import Stream, normal


class Optimiser:
    """One step after another of fused Adam; then, with `langevin`, N(0, 1) · langevin · lr on every kernel weight."""

    def __init__(self, module: nn.Module, lr: float, langevin: float, seeds: torch.Tensor):
        self._module, self._noise, self._seeds = module, langevin * lr, seeds
        if isinstance(module, CompiledGenerator):
            # Row by row: fused Adam rounds the tail of a vector differently from its body, and an experiment must
            # have the same bits alone and beside others.
            self._tensors = list(module.values.detach())
        else:
            self._tensors = list(module.parameters())
        self._adam = torch.optim.Adam(self._tensors, lr=lr, fused=True)

    def step(self, loss: torch.Tensor, step: int) -> None:
        """Take one step down the gradient of a scalar loss."""
        self._module.zero_grad(set_to_none=True)
        loss.backward()
        if isinstance(self._module, CompiledGenerator):
            for row, gradient in zip(self._tensors, self._module.values.grad, strict=True):
                row.grad = gradient
        self._adam.step()
        if self._noise:
            self._add_noise(step)

    @torch.no_grad()
    def _add_noise(self, step: int) -> None:
        if isinstance(self._module, CompiledGenerator):
            values = self._module.values
            numbers = normal(self._seeds, step, Stream.LANGEVIN, values.shape[1]).to(values.dtype)
            values += self._noise * numbers * self._module.kernel_entries()
            return
        kernels = [parameter for parameter in self._tensors if parameter.ndim == 4]
        numbers = normal(self._seeds, step, Stream.LANGEVIN, sum(k.numel() for k in kernels))[0]
        for kernel, piece in zip(kernels, numbers.split([k.numel() for k in kernels]), strict=True):
            kernel += self._noise * piece.view_as(kernel).to(kernel.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on."""
        state = {f"module/{name}": tensor for name, tensor in self._module.state_dict().items()}
        for i, tensor in enumerate(self._tensors):
            state |= {f"adam/{i}/{name}": value for name, value in self._adam.state[tensor].items()}
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` gave.

        Raises:
            RuntimeError: it is the state of another module.
        """
        weights = {n.removeprefix("module/"): t for n, t in state.items() if n.startswith("module/")}
        self._module.load_state_dict(weights)
        for i, tensor in enumerate(self._tensors):
            prefix = f"adam/{i}/"
            self._adam.state[tensor] = {
                name.removeprefix(prefix): value.to(tensor.device)
                for name, value in state.items()
                if name.startswith(prefix)
            }
