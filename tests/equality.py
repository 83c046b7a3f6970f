"""What a compiled network has to equal: the same network in plain PyTorch with its pruned weights set to zero."""

from copy import deepcopy

import torch

import sparse_gen as sg


def scattered_mask(net, density, seed=0, experiments=None):
    """A mask over every parameter, biases, γ and β included: ⌊density · N⌋ of the N are kept, wherever they fall."""
    generator = torch.Generator().manual_seed(seed)
    leading = () if experiments is None else (experiments,)
    parameters = dict(net.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    keep = torch.rand(*leading, total, generator=generator).argsort(dim=-1) < int(density * total)
    pieces = keep.split([p.numel() for p in parameters.values()], dim=-1)
    tensors = {n: k.view(*leading, *p.shape) for (n, p), k in zip(parameters.items(), pieces, strict=True)}
    return sg.Mask(tensors, experiments=experiments)


def off_the_kink(net):
    """A copy in double without zeros among its biases and β.

    A constant channel with β = 0 would lie exactly on the kink of its LeakyReLU, where PyTorch's slope is rounding's.
    """
    generator = torch.Generator().manual_seed(1)
    net = deepcopy(net).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_(parameter + torch.empty_like(parameter).uniform_(0.1, 0.5, generator=generator))
    return net


def assert_equals_masked(net, mask, z, experiments=1):
    """Output, gradients of the kept values and of z, of every experiment, in double; returns the compiled network."""
    net, z = off_the_kink(net), z.double()
    fast = sg.compile(net, mask, z)
    ours = z.clone().requires_grad_()
    output = fast(ours)
    weights = torch.rand(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (output.square() + weights * output).sum().backward()
    keep = mask.dense(net)
    for e in range(experiments):
        dense = deepcopy(net)
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.mul_(keep[name][e if len(keep[name]) > 1 else 0])
        theirs = z[e if len(z) > 1 else 0][None].clone().requires_grad_()
        expected = dense(theirs)
        torch.testing.assert_close(output[e : e + 1], expected, rtol=1e-12, atol=1e-12)
        parameters = dict(dense.named_parameters())
        loss = (expected.square() + weights[e : e + 1] * expected).sum()
        grad_z, *grads = torch.autograd.grad(loss, [theirs, *parameters.values()], materialize_grads=True)
        kept = [g[keep[n][e if len(keep[n]) > 1 else 0]] for n, g in zip(parameters, grads, strict=True)]
        # To rounding of the largest: a gradient that is 0 in exact arithmetic is noise in PyTorch.
        largest = torch.cat([grad_z.flatten(), *(g.flatten() for g in grads)]).norm().item()
        torch.testing.assert_close(ours.grad[e : e + 1], grad_z, rtol=1e-9, atol=1e-12 * largest)
        own, behind = fast.values.grad[e].tensor_split([sum(map(len, kept))])
        torch.testing.assert_close(own, torch.cat(kept), rtol=1e-9, atol=1e-12 * largest)
        assert not behind.any()  # of experiments that keep fewer weights
    # Without gradients the same.
    with torch.no_grad():
        torch.testing.assert_close(fast(z), output, rtol=1e-12, atol=1e-12)
    return fast
