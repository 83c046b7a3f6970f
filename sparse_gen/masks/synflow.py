"""SynFlow: keep what carries the most flow through the network of absolute weights, found in many rounds."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_gen.engine.checks import check_count
from sparse_gen.engine.functional import run_experiments
from sparse_gen.masks.pruning import Found, Pruning


class _Flow(TorchFunctionMode):
    """The network as a product of its weights: normalisation as it is in evaluation mode, no sigmoid at the end.

    Running statistics are those of a network that has seen nothing, mean 0 and variance 1. A sigmoid would pass no
    gradient of flows as large as these; it is no part of the product.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _affine(*args, **kwargs)
        if function in (torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid):
            return args[0]
        return function(*args, **kwargs)


def _affine(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> torch.Tensor:
    output = input * (1 + eps) ** -0.5
    output = output if weight is None else output * weight[:, None, None]
    return output if bias is None else output + bias[:, None, None]


def flow(network: nn.Module, parameters: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """R, the sum of the output for an input of ones.

    Args:
        network: a `training_copy` in double.
        parameters: name → (1, *shape), double, not negative.
        z: (1, C, H, W), of which only the shape counts.
    """
    with _Flow():
        return run_experiments(network, parameters, torch.ones_like(z, dtype=torch.float64)).sum()


def synflow(problem: Pruning, *, rounds: int = 100) -> Found:
    """Score every weight by |w|·∂R/∂|w| of what earlier rounds have kept, and keep ρ^(k/rounds) of all in round k.

    Args:
        problem: its y is not looked at.
        rounds: how many; the density falls by the same factor in each.

    R = 1ᵀ ∏ |W| 1. Where biases and normalisation are not prunable they stand in it with their absolute values.

    Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow" (NeurIPS 2020),
    algorithm 1; normalisation in evaluation mode as in its appendix.
    """
    check_count(rounds, "rounds")
    absolute = problem.weight.double().abs()
    keep, scores = torch.ones_like(absolute, dtype=torch.bool), absolute
    network = deepcopy(problem.network).double()
    whole = {name: values.double().abs() for name, values in problem.whole.items()}
    total, density = len(absolute), problem.count / len(absolute)
    for k in range(1, rounds + 1):
        leaf = (absolute * keep).requires_grad_()
        (gradient,) = torch.autograd.grad(flow(network, problem.layout.views(leaf[None]) | whole, problem.z), leaf)
        scores = gradient * leaf.detach()
        count = problem.count if k == rounds else round(total * density ** (k / rounds))
        keep = problem.choose(scores, max(count, problem.count), within=keep)
        if problem.progress is not None:
            problem.progress(k, rounds, {})
    return Found(keep, scores, settings={"rounds": rounds})
