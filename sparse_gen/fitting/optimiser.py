"""Adam on a generator's parameters, with the Langevin noise of SGLD if wanted, and its state for a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.ops.masked_adam import masked_adam_
from sparse_gen.ops.philox import Stream, normal


def step_fused(adam: torch.optim.Adam) -> None:
    """A step of a fused Adam, in a capture or outside of one."""
    group = adam.param_groups[0]
    if group["params"][0].is_cuda:
        # Its state is on the device either way, but torch asks for the flag in a capture and warns of it outside.
        group["capturable"] = torch.cuda.is_current_stream_capturing()
    adam.step()


class _KeptAdam:
    """Adam on the kept values of all experiments at once."""

    def __init__(self, parameter: nn.Parameter, lr: float):
        self._parameter, self._lr = parameter, lr
        self._values = parameter.detach()
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._count = torch.tensor(0, device=parameter.device)

    def step(self) -> None:
        gradient = self._parameter.grad.contiguous()
        masked_adam_(self._values, gradient, self._exp_avg, self._exp_avg_sq, self._count, lr=self._lr)
        self._count += 1

    def state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": self._count}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class _PlainAdam:
    """torch's fused Adam on the parameters of any module."""

    def __init__(self, tensors: list[nn.Parameter], lr: float):
        self._tensors = tensors
        self._adam = torch.optim.Adam(tensors, lr=lr, fused=True)

    def step(self) -> None:
        step_fused(self._adam)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}/{name}": value
            for i, tensor in enumerate(self._tensors)
            for name, value in self._adam.state[tensor].items()
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for i, tensor in enumerate(self._tensors):
            own = _only(state, f"{i}/")
            self._adam.state[tensor] = {name: value.to(tensor.device) for name, value in own.items()}


class Optimiser:
    """One step after another of Adam; then, with `langevin`, N(0, 1) · langevin · lr on every kernel weight."""

    def __init__(self, module: nn.Module, lr: float, langevin: float, seeds: torch.Tensor):
        self._module, self._noise, self._seeds = module, langevin * lr, seeds
        compiled = isinstance(module, CompiledGenerator)
        self._adam = _KeptAdam(module.values, lr) if compiled else _PlainAdam(list(module.parameters()), lr)
        self._kernel_entries = module.kernel_entries() if compiled and langevin else None

    def step(self, loss: torch.Tensor, step: torch.Tensor) -> None:
        """Take one step down the gradient of a scalar loss; its number is () int64 on the device."""
        self._module.zero_grad(set_to_none=True)
        loss.backward()
        self._adam.step()
        if self._noise:
            self._add_noise(step)

    @torch.no_grad()
    def _add_noise(self, step: torch.Tensor) -> None:
        if self._kernel_entries is not None:
            values = self._module.values
            numbers = normal(self._seeds, step, Stream.LANGEVIN, values.shape[1]).to(values.dtype)
            values += self._noise * numbers * self._kernel_entries
            return
        kernels = [parameter for parameter in self._module.parameters() if parameter.ndim == 4]
        numbers = normal(self._seeds, step, Stream.LANGEVIN, sum(k.numel() for k in kernels))[0]
        for kernel, piece in zip(kernels, numbers.split([k.numel() for k in kernels]), strict=True):
            kernel += self._noise * piece.view_as(kernel).to(kernel.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on."""
        state = {f"module/{name}": tensor for name, tensor in self._module.state_dict().items()}
        return state | {f"adam/{name}": tensor for name, tensor in self._adam.state().items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` gave.

        Raises:
            RuntimeError: it is the state of another module.
        """
        self._module.load_state_dict(_only(state, "module/"))
        self._adam.restore(_only(state, "adam/"))


def _only(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
