"""A small restoration problem that tests share."""

import torch

import sparse_gen as sg

SIZE = (27, 34)  # neither is a multiple of the network's 8


def small_net(seed=0, **arguments):
    return sg.generators.Hourglass(**{"in_channels": 6, "channels": (6, 8, 10), "seed": seed, **arguments})


def smooth_image(size=SIZE, channels=3):
    rows, columns = torch.linspace(0, 1, size[0])[:, None], torch.linspace(0, 1, size[1])
    waves = [0.5 + 0.4 * torch.sin(4 * rows + (c + 2) * columns) for c in range(channels)]
    return torch.stack(waves)[None]


def problem(seed=0, size=SIZE):
    """z, noisy y and clean image."""
    clean = smooth_image(size)
    return sg.noise_input(6, size, seed=seed), sg.inverse.add_noise(clean, 0.1, seed=0), clean


def random_mask(net, density=0.3, seed=0, experiments=None):
    """A mask over all convolution weights."""
    generator = torch.Generator().manual_seed(seed)
    leading = () if experiments is None else (experiments,)
    tensors = {}
    for name, parameter in net.named_parameters():
        if parameter.ndim == 4:
            count = max(1, round(density * parameter.numel()))
            order = torch.rand(*leading, parameter.numel(), generator=generator).argsort(dim=-1)
            tensors[name] = (order < count).view(*leading, *parameter.shape)
    whole = {n: tuple(p.shape) for n, p in net.named_parameters() if n not in tensors}
    return sg.Mask(tensors, experiments=experiments, whole=whole)
