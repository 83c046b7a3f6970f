"""Masks that keep whole blocks of channels."""

import torch


def block_mask(shape, block, density, generator=None):
    """A mask (out, in, kernel height, kernel width) of whole blocks of output × input channels, the last ones cut.

    The generator draws it; by default one of its own, always the same.
    """
    generator = generator or torch.Generator().manual_seed(0)
    blocks = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:], generator=generator) < density
    mask = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return mask[: shape[0], : shape[1]].contiguous()
