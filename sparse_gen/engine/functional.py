"""A network as a function of its parameters, for several experiments at once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


def training_copy(network: nn.Module) -> nn.Module:
    """A copy whose normalisation uses the image's own statistics and keeps no running ones.

    Raises:
        ValueError: a normalisation layer is in evaluation mode.
    """
    copy = deepcopy(network).requires_grad_(False)
    for name, layer in copy.named_modules():
        if isinstance(layer, _BatchNorm):
            if not layer.training:
                raise ValueError(
                    f"expected a network in training mode, got {name or 'the network'} in evaluation mode, call "
                    ".train(): a prior fitted to one image normalises by that image's own statistics"
                )
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return copy


def run_experiments(network: nn.Module, parameters: Mapping[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """Run every experiment on its own, which is what E > 1 means by definition.

    Args:
        network: from `training_copy`; its own parameters serve where `parameters` has none.
        parameters: name → (E, *shape), or (1, *shape) shared by all experiments.
        z: (E, C, H, W), or (1, C, H, W) shared by all experiments.

    Returns:
        The outputs, (E, …).
    """
    experiments = max([len(z), *(len(p) for p in parameters.values())])
    outputs = []
    for e in range(experiments):
        own = {name: p[e if len(p) > 1 else 0] for name, p in parameters.items()}
        outputs.append(functional_call(network, own, (z[e : e + 1] if len(z) > 1 else z,)))
    return outputs[0] if experiments == 1 else torch.cat(outputs)
