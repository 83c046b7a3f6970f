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

    A layer is dead if no channel of its output varies over the image. The network is disconnected if its last
    layer is dead; it is then cut where the unbroken row of dead layers that ends there begins. A dead layer
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
    dead: list[tuple[str, bool]] = []

    def note(name):
        def hook(_layer, _inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                deviation = output.std(dim=(-2, -1), correction=0)
                # Relative to the channel's size: what float32, in which the network trains, could still tell.
                dead.append((name, bool((deviation <= 1e-7 * output.abs().amax(dim=(-2, -1))).all())))

        return hook

    handles = [
        layer.register_forward_hook(note(name)) for name, layer in probe.named_modules() if not list(layer.children())
    ]
    run_experiments(probe, parameters, z)
    for handle in handles:
        handle.remove()
    tail = None
    for name, is_dead in reversed(dead):
        if not is_dead:
            break
        tail = name
    return tail
