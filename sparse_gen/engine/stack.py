"""Several initialisations of one architecture as the experiments of one run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparse_gen.engine.layout import ParameterLayout


class Stack(nn.Module):
    """What `stack` returns: network e is experiment e.

    Shapes:
        (E or 1, C, H, W) to (E, …), each experiment by its own network and its own statistics.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if len(z) not in (1, len(self.networks)):
            raise ValueError(f"expected z with {len(self.networks)} experiments (or 1 for all), got {len(z)}")
        return torch.cat([net(z[e : e + 1] if len(z) > 1 else z) for e, net in enumerate(self.networks)])


def stack(networks: Sequence[nn.Module]) -> Stack:
    """Make networks of one architecture the experiments of one search, compilation or fit.

    Args:
        networks: at least one; they differ in their weights only, and are not copied.

    Returns:
        A module that `search_mask` and `compile` take like any network.

    Raises:
        ValueError: there is none, or their parameters differ in name or shape.
    """
    networks = list(networks)
    if not networks:
        raise ValueError("expected at least one network, got none")
    first = ParameterLayout.of(networks[0]).shapes
    for e, network in enumerate(networks[1:], start=1):
        shapes = ParameterLayout.of(network).shapes
        if shapes != first:
            name = next(n for n in [*first, *shapes] if first.get(n) != shapes.get(n))
            got, expected = (tuple(s[name]) if name in s else "no such parameter" for s in (shapes, first))
            raise ValueError(
                f"expected networks of one architecture, got {name} of {got} in network {e} for {expected}"
            )
    return Stack(networks)


def template(network: nn.Module) -> nn.Module:
    """The one network whose architecture all experiments share."""
    return network.networks[0] if isinstance(network, Stack) else network


def initial_weights(network: nn.Module, layout: ParameterLayout) -> torch.Tensor:
    """The laid-out parameters, (E, N) of a stack, (1, N) of a single network."""
    networks = network.networks if isinstance(network, Stack) else [network]
    return torch.stack([layout.flatten(dict(net.named_parameters())) for net in networks])
