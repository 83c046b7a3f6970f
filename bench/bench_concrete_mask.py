"""`concrete_mask_update` against the published and the plain way: everything a search step does but the network."""

import pytest
import torch

import sparse_gen as sg
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.experiments.baselines import TEMPERATURE, PlainSearch, PublishedSearch
from sparse_gen.ops.concrete_mask import concrete_mask_update, concrete_mask_update_reference
from sparse_gen.ops.philox import Stream

SETTINGS = {"lr": 1e-2, "kl_weight": 1e-9, "prior": 0.05}


def assert_equal_to_reference(weight, gradient, seed) -> float:
    """One update of the real size against the float64 reference; returns the largest norm-wise error."""
    experiments, device = len(seed), weight.device
    logits = torch.linspace(-4, 4, weight.numel(), device=device).repeat(experiments, 1)
    step = torch.tensor(3, device=device)
    averages = [1e-3 * torch.ones_like(logits), 1e-5 * torch.ones_like(logits)]
    state = [logits.clone(), *averages, torch.full_like(logits, torch.nan)]
    expected = [tensor.double().clone() for tensor in state]
    concrete_mask_update_reference(
        *expected, weight.double(), gradient.double(), seed, step, int(Stream.MASK), TEMPERATURE,
        SETTINGS["kl_weight"], SETTINGS["prior"], SETTINGS["lr"], 0.9, 0.999, 1e-8,
    )  # fmt: skip
    concrete_mask_update(*state, weight, gradient, seed, step, temperature=TEMPERATURE, **SETTINGS)
    error = max(((a - e).norm() / e.norm()).item() for a, e in zip(state, expected, strict=True))
    assert error <= 5e-6
    return error


@pytest.mark.parametrize("experiments", [1, 4])
def bench_concrete_mask(compare, device, experiments):
    net = sg.generators.Hourglass().to(device)
    z, y = sg.noise_input(32, (192, 192), device=device), torch.rand(1, 3, 192, 192, device=device)
    layout = ParameterLayout.of(net)
    weight = layout.flatten(dict(net.named_parameters()))
    seed = torch.arange(experiments, device=device)
    gradient = 1e-3 * torch.randn(experiments, layout.numel, device=device)
    error = assert_equal_to_reference(weight, gradient, seed)

    published = [PublishedSearch(net, z, y, **SETTINGS) for _ in range(experiments)]
    plain = [PlainSearch(net, z, y, **SETTINGS) for _ in range(experiments)]
    pieces = [list(layout.views(g).values()) for g in gradient]
    state = [torch.zeros_like(gradient) for _ in range(4)]
    step = torch.tensor(0, device=device)
    compare(
        "concrete_mask",
        f"{layout.numel:,} logits, E = {experiments}",
        {
            "published": lambda: [p.mask_step(g) for p, g in zip(published, pieces, strict=True)],
            "plain": lambda: [p.mask_step(g) for p, g in zip(plain, gradient, strict=True)],
            "ours": lambda: concrete_mask_update(*state, weight, gradient, seed, step, **SETTINGS),
        },
        error=error,
    )
