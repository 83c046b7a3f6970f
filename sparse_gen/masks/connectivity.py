"""Whether anything of the input still reaches the output of a masked network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparse_gen.engine.functional import run_experiments, training_copy


class DisconnectedMaskWarning(UserWarning):
    """A mask cuts the network: its output is a constant image, and training cannot change that."""


@dataclass(frozen=True)
class Connectivity:
    """`disconnected_at`: the layer from which on every output is constant, None if the network is connected."""

    disconnected_at: str | None

    @property
    def connected(self) -> bool:
        return self.disconnected_at is None


@torch.no_grad()
def probe_connectivity(network: nn.Module, parameters: dict[str, torch.Tensor], z: torch.Tensor) -> Connectivity:
    """Run the masked network once and look where its signal ends.

    A layer is dead if no channel of its output varies over the image, or if another input gives the same output
    (with zero padding, the border varies although nothing of the input arrives). The network is disconnected if its
    last layer is dead; it is then cut where the unbroken row of dead layers that ends there begins. A dead layer
    beside a living skip connection does not cut it.

    Args:
        network: any module.
        parameters: masked parameters, name → (E, *shape).
        z: (E or 1, C, H, W).

    Returns:
        `Connectivity` of the first experiment that is disconnected, or of all.
    """
    # In double, a constant channel varies by 1e-16 of its value and a weak signal can be told from none.
    probe = training_copy(network).double()
    experiments = max([len(z), *(len(p) for p in parameters.values())])
    for e in range(experiments):
        own = {name: (p[e if len(p) > 1 else 0])[None].double() for name, p in parameters.items()}
        cut = _first_of_dead_tail(probe, own, z[e if len(z) > 1 else 0][None].double())
        if cut is not None:
            return Connectivity(cut)
    return Connectivity(None)


def _first_of_dead_tail(probe: nn.Module, parameters: dict[str, torch.Tensor], z: torch.Tensor) -> str | None:
    first, second = _layer_outputs(probe, parameters, z), _layer_outputs(probe, parameters, z.flip(-1, -2))
    tail = None
    for name in reversed(first):
        (varies, samples, size), (_, other_samples, _) = first[name], second[name]
        if varies and ((samples - other_samples).abs() > _negligible(size)).any():
            break
        tail = name
    return tail


def _negligible(size: torch.Tensor) -> torch.Tensor:
    """What float32, in which the network trains, could not tell from nothing, for values of this size.

    The floor is for the rounding of a constant in double, which normalisation by a vanishing deviation enlarges.
    """
    return 1e-7 * size + 1e-12


def _layer_outputs(probe: nn.Module, parameters: dict[str, torch.Tensor], z: torch.Tensor) -> dict[str, tuple]:
    """For each layer in the order of running: whether it varies over the image, some of its values, their size."""
    outputs: dict[str, tuple] = {}

    def note(name):
        def hook(_layer, _inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                size = output.abs().amax(dim=(-2, -1), keepdim=True)
                varies = (output.std(dim=(-2, -1), correction=0, keepdim=True) > _negligible(size)).any()
                stride = [max(1, length // 8) for length in output.shape[-2:]]
                outputs[name] = (bool(varies), output[..., :: stride[0], :: stride[1]].clone(), size)

        return hook

    handles = [
        layer.register_forward_hook(note(name)) for name, layer in probe.named_modules() if not list(layer.children())
    ]
    run_experiments(probe, parameters, z)
    for handle in handles:
        handle.remove()
    return outputs
