"""A whole step of the mask search and of the masked training."""

import pytest
import torch
from baselines import (
    TEMPERATURE,
    CompiledSearch,
    CompiledTraining,
    PlainSearch,
    PlainTraining,
    PublishedSearch,
    PublishedTraining,
)
from masks import layered_mask

import sparse_gen as sg
from sparse_gen.engine.functional import run_experiments, training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.ops.concrete_mask import concrete_mask, concrete_mask_update
from sparse_gen.ops.philox import Stream, seed_tensor, uniform

# The paper's constants, and all parameters prunable: the published loop knows nothing else.
SETTINGS = {"lr": 1e-2, "kl_weight": 1e-9, "prior": 0.05}


class OurSearch:
    """The loop body of `sg.search_mask`."""

    def __init__(self, net, z, y):
        self.network = training_copy(net)
        self.layout = ParameterLayout.of(self.network)
        self.z, self.y = z.contiguous(memory_format=torch.channels_last), y
        self.weight = self.layout.flatten(dict(self.network.named_parameters()))
        self.logits, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.weight)[None] for _ in range(3))
        self.seed, self.count = seed_tensor(0, z.device), 0
        _, self.masked = concrete_mask(self.logits, self.weight, self.seed, 0, temperature=TEMPERATURE)

    def step(self):
        leaf = self.masked.requires_grad_()
        output = run_experiments(self.network, self.layout.views(leaf), self.z)
        (gradient,) = torch.autograd.grad((output - self.y).square().mean(), leaf)
        self.masked = leaf.detach()
        concrete_mask_update(
            self.logits, self.exp_avg, self.exp_avg_sq, self.masked, self.weight, gradient, self.seed, self.count,
            temperature=TEMPERATURE, **SETTINGS,
        )  # fmt: skip
        self.count += 1


def assert_searches_agree(device) -> float:
    """Three float64 steps of all three searches with the same random numbers; returns the largest difference."""
    net = sg.generators.Hourglass(depth=4).double().to(device)
    z = sg.noise_input(32, (96, 80), device=device).double()
    y = torch.rand(1, 3, 96, 80, device=device, dtype=torch.float64)
    ours = OurSearch(net, z, y)
    others = [PublishedSearch(net, z, y, **SETTINGS), PlainSearch(net, z, y, **SETTINGS)]
    for step in range(3):
        logistic = uniform(ours.seed, step, Stream.MASK, ours.layout.numel)[0].double().logit()
        others[0].step(list(ours.layout.views(logistic).values()))
        others[1].step(logistic)
        ours.step()
    error = max((other.flat_logits() - ours.logits[0]).abs().max().item() for other in others)
    assert error <= 1e-9
    return error


@pytest.mark.parametrize("size", [256, 512])
def bench_search_step(compare, device, with_compile, size):
    error = assert_searches_agree(device)
    net = sg.generators.Hourglass().to(device)
    z, y = sg.noise_input(32, (size, size), device=device), torch.rand(1, 3, size, size, device=device)
    providers = {
        "published": PublishedSearch(net, z, y, **SETTINGS).step,
        "plain": PlainSearch(net, z, y, **SETTINGS).step,
        "ours": OurSearch(net, z, y).step,
    }
    if with_compile:
        providers["compile"] = CompiledSearch(net, z, y, **SETTINGS).step
    compare("end_to_end", f"mask-search step, {size}²", providers, error=error, rounds=10 if size == 256 else 6)


class OurTraining:
    """The loop body of `sg.fit`."""

    def __init__(self, net, mask, z, y, *, lr):
        self.module, self.z, self.y, self.count = sg.compile(net, mask, z), z, y, 0
        self.optimiser = Optimiser(self.module, lr, 0.0, seed_tensor(0, z.device))

    def output(self):
        return self.module(self.z).detach()

    def step(self):
        self.optimiser.step((self.module(self.z) - self.y).square().mean(), self.count)
        self.count += 1


def assert_trainings_agree(device) -> float:
    """Three float64 steps of all three trainings; returns the outputs' largest relative difference."""
    net = sg.generators.Hourglass(depth=4).double().to(device)
    z = sg.noise_input(32, (96, 80), device=device).double()
    y = torch.rand(1, 3, 96, 80, device=device, dtype=torch.float64)
    trainings = [
        training(net, layered_mask(net), z, y, lr=1e-2) for training in (OurTraining, PublishedTraining, PlainTraining)
    ]
    for training in trainings:
        for _ in range(3):
            training.step()
    ours, *others = (training.output() for training in trainings)
    error = max(((other - ours).norm() / ours.norm()).item() for other in others)
    assert error <= 1e-6  # a γ whose gradient is 0 takes Adam's full step in the direction of its rounding
    return error


@pytest.mark.parametrize("size", [256, 512])
def bench_training_step(compare, device, with_compile, size):
    error = assert_trainings_agree(device)
    net = sg.generators.Hourglass().to(device)
    z, y = sg.noise_input(32, (size, size), device=device), torch.rand(1, 3, size, size, device=device)
    mask = layered_mask(net)
    providers = {
        "published": PublishedTraining(net, mask, z, y, lr=1e-2).step,
        "plain": PlainTraining(net, mask, z, y, lr=1e-2).step,
        "ours": OurTraining(net, mask, z, y, lr=1e-2).step,
    }
    if with_compile:
        providers["compile"] = CompiledTraining(net, mask, z, y, lr=1e-2).step
    case = f"masked training step, {size}², 5 %"
    compare("end_to_end", case, providers, error=error, rounds=12 if size == 256 else 6)
