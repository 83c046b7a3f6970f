"""A mask with the layer densities of a published one, for whoever does not have the published files."""

from __future__ import annotations

import torch
from torch import nn

import sparse_gen as sg

# Kept fraction of the encoder's 5×5 convolutions, outermost first, and the decoder's 3×3 convolutions, deepest first,
# in the OES authors' 5 % mask for the Baboon image.
ENCODER = [0.070, 0.023, 0.016, 0.011, 0.009, 0.008, 0.006, 0.005, 0.008, 0.013, 0.028, 0.063]
DECODER = [0.169, 0.185, 0.186, 0.168, 0.201, 0.350]
HEAD = 0.646


def layered_mask(net: nn.Module, seed: int = 0) -> sg.Mask:
    """Random positions at the published densities; biases and normalisation are kept whole.

    A network of fewer scales takes the outermost ones' densities.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = [n for n, p in net.named_parameters() if n.startswith("encoder") and p.ndim == 4]
    decoder = [n for n, p in net.named_parameters() if n.startswith("decoder") and p.ndim == 4]
    density = dict(zip(encoder, ENCODER, strict=False))
    density |= dict(zip(reversed(decoder), reversed(DECODER), strict=False)) | {"head.weight": HEAD}
    tensors, whole = {}, {}
    for name, parameter in net.named_parameters():
        if name in density:
            tensors[name] = torch.rand(parameter.shape, generator=generator) < density[name]
        else:
            whole[name] = tuple(parameter.shape)
    return sg.Mask(tensors, whole=whole)
