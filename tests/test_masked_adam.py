"""`masked_adam_`: against torch.optim.Adam, and the same bits wherever a value stands."""

import pytest
import torch

import sparse_gen as sg
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.ops.masked_adam import masked_adam_, masked_adam_reference
from sparse_gen.ops.philox import seed_tensor

# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}


def problem(experiments, kept, dtype=torch.float32, seed=0):
    """Values, gradient and Adam's two averages."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(experiments, kept, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(), normal(), 1e-2 * normal(), 1e-4 * normal().square()]


@pytest.mark.parametrize(("experiments", "kept"), [(1, 1), (1, 15), (2, 33), (3, 1000), (2, 16385), (1, 40001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0, 7, 5000])
def test_one_step(instruction_set, experiments, kept, dtype, step):
    state = problem(experiments, kept, dtype)
    values, grad, exp_avg, exp_avg_sq = (t.double() for t in state)
    expected = [values.clone(), grad.clone(), exp_avg.clone(), exp_avg_sq.clone()]
    constants = (SETTINGS["lr"], *SETTINGS["betas"], SETTINGS["eps"])
    masked_adam_reference(expected[0], expected[2], expected[3], grad, torch.tensor(step), *constants)
    masked_adam_(*state, step, **SETTINGS)
    for got, want in zip(state, expected, strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    # The step itself, not lost beside the values: rounding of the values is 6e-8 of them.
    moved, should = state[0].double() - values, expected[0] - values
    assert (moved - should).abs().max() <= (3e-7 if dtype == torch.float32 else 1e-14) * values.abs().max()


def test_a_trajectory_in_double_is_torch_adams(instruction_set):
    target = torch.linspace(-1, 1, 501, dtype=torch.float64)
    leaf = torch.zeros(1, 501, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([leaf], **SETTINGS)
    values, _, exp_avg, exp_avg_sq = (torch.zeros(1, 501, dtype=torch.float64) for _ in range(4))
    step = torch.tensor(0)
    for _ in range(200):
        adam.zero_grad()
        (leaf - target).pow(4).sum().backward()
        adam.step()
        masked_adam_(values, 4 * (values - target).pow(3), exp_avg, exp_avg_sq, step, **SETTINGS)
        step += 1
    torch.testing.assert_close(values, leaf.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exp_avg_sq, adam.state[leaf]["exp_avg_sq"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_at_every_place_and_length(instruction_set, dtype):
    whole = problem(1, 70_003, dtype)
    pieces = [t.clone() for t in whole]
    masked_adam_(*whole, 3, **SETTINGS)
    for begin, end in [(0, 1), (1, 2), (5, 18), (18, 49), (49, 50_000), (50_000, 70_003)]:
        part = [t[:, begin:end].clone() for t in pieces]
        masked_adam_(*part, 3, **SETTINGS)
        assert all(torch.equal(p, w[:, begin:end]) for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("kept", [1, 37, 1003])
def test_two_experiments_are_two_runs(instruction_set, kept):
    together = problem(2, kept)
    alone = [[t[e : e + 1].clone() for t in together] for e in range(2)]
    masked_adam_(*together, 0, **SETTINGS)
    for e in range(2):
        masked_adam_(*alone[e], 0, **SETTINGS)
        assert all(torch.equal(a, t[e : e + 1]) for a, t in zip(alone[e], together, strict=True))


def test_the_same_bits_at_any_thread_count(instruction_set):
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        state = problem(1, 50_001)
        masked_adam_(*state, 2, **SETTINGS)
        results.append(state)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nothing_beyond_the_arrays_is_written_and_the_gradient_is_only_read(instruction_set):
    padded = [torch.full((64,), 7.0) for _ in range(4)]
    views = [p[:37].view(1, 37) for p in padded]
    for view, value in zip(views, problem(1, 37), strict=True):
        view.copy_(value)
    gradient = views[1].clone()
    masked_adam_(*views, 0, **SETTINGS)
    assert all((p[37:] == 7).all() for p in padded)
    assert torch.equal(views[1], gradient)


def test_a_zero_gradient_moves_nothing(instruction_set):
    values = torch.ones(1, 21)
    masked_adam_(values, *(torch.zeros(1, 21) for _ in range(3)), 0)
    assert (values == 1).all()


def test_opcheck():
    values, grad, exp_avg, exp_avg_sq = problem(2, 37)
    torch.library.opcheck(
        torch.ops.sparse_gen.masked_adam,
        (values, exp_avg, exp_avg_sq, grad, torch.tensor(3), 1e-2, 0.9, 0.999, 1e-8),
    )


def test_a_compiled_generator_is_optimised_like_by_torch_adam():
    net = sg.generators.Hourglass(4, 1, channels=[4, 4], seed=0).double()
    z, y = sg.noise_input(4, (16, 16), seed=0).double(), torch.rand(1, 1, 16, 16, dtype=torch.float64)
    ours = sg.compile(net, example_input=z, engine="reference")
    optimiser = Optimiser(ours, 1e-2, 0.0, seed_tensor(0, z.device))
    # Fed with our gradients: a bias that a normalisation follows has none, and Adam makes full steps of its rounding.
    theirs = ours.values.detach().clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=1e-2)
    before = ours.values.detach().clone()
    for step in range(10):
        optimiser.step((ours(z) - y).square().mean(), step)
        theirs.grad = ours.values.grad
        adam.step()
    assert (ours.values - before).abs().max() > 0.05
    torch.testing.assert_close(ours.values.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, "contiguous values of shape"),
        ({"values": torch.zeros(1, 3, dtype=torch.float16)}, "float32 or float64"),
        ({"grad": torch.zeros(3)}, r"grad of shape \(1, 3\), got \(3,\)"),
        ({"exp_avg": torch.zeros(1, 3, dtype=torch.float64)}, "exp_avg of torch.float32 on cpu like the values"),
        ({"exp_avg_sq": torch.zeros(1, 6)[:, ::2]}, "contiguous exp_avg_sq"),
        ({"step": torch.tensor(1.0)}, r"step as a \(\) int64 tensor"),
        ({"lr": -1.0}, "lr and eps from 0 on"),
        ({"betas": (0.9, 1.0)}, "betas from 0 to below 1"),
    ],
)
def test_bad_arguments(change, message):
    zeros = {name: torch.zeros(1, 3) for name in ("values", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=message):
        masked_adam_(**{**zeros, "step": 0} | change)
