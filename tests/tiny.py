"""A network so small that every weight can be tried, in double, and its problem."""

import torch
from torch import nn
from torch.func import functional_call

import sparse_gen as sg

DOUBLE = torch.float64


def tiny_net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(3, 2, 1),
        nn.Sigmoid(),
    ).double()
    with torch.no_grad():
        for layer in (net[0], net[3]):
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
        net[3].weight.mul_(3)  # or the smallest weights would all be the head's, which cuts the network
    return net


def tiny_problem(images=1):
    z = sg.noise_input(2, (5, 6), seed=1).double()
    generator = torch.Generator().manual_seed(3)
    return z, torch.rand(images, 2, 5, 6, generator=generator, dtype=DOUBLE)


def weights_of(net, all_parameters=False):
    """Names and flat values of what may be pruned."""
    names = [n for n, p in net.named_parameters() if all_parameters or p.ndim == 4]
    parameters = dict(net.named_parameters())
    return names, torch.cat([parameters[n].detach().flatten() for n in names])


def put(net, names, flat):
    """name → value, of all parameters, with a flat vector in place of those named."""
    values = {n: p.detach() for n, p in net.named_parameters()}
    pieces = flat.split([values[n].numel() for n in names])
    return values | {n: piece.view(values[n].shape) for n, piece in zip(names, pieces, strict=True)}


def loss(net, names, flat, z, y):
    return (functional_call(net, put(net, names, flat), (z,)) - y).square().mean(dim=(1, 2, 3)).sum()


def flat_mask(mask):
    return torch.cat([keep.flatten() for keep in mask.tensors.values()])


def flat_scores(result):
    return torch.cat([scores.flatten() for scores in result.scores.values()])


def largest(scores, count):
    """Keep the largest, where no two are equal."""
    assert len(scores.unique()) == len(scores)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True)[:count]] = True
    return keep
