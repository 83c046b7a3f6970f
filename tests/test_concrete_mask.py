"""`concrete_mask`: every backend against the float64 reference, and the reference against the paper."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from scipy.stats import ks_2samp

from sparse_gen.ops import concrete_mask as ops
from sparse_gen.ops.concrete_mask import concrete_mask, concrete_mask_update, kl_divergence
from sparse_gen.ops.philox import Stream

TEMPERATURE = 0.2
# DESIGN's "ieee": a float32 operator's norm-wise error against float64.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
UPDATE = {"kl_weight": 1e-3, "prior": 0.05, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def problem(experiments, numel, dtype=torch.float64, shared=False, device="cpu"):
    """Logits that reach both saturated ends, weights, gradients, Adam's averages, seeds."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    logits = 4 * normal(experiments, numel)
    weight = normal(numel) if shared else normal(experiments, numel)
    averages = 1e-2 * normal(experiments, numel), 1e-4 * normal(experiments, numel).square()
    seed = torch.arange(experiments, device=device) * 12345 - 5
    return logits, weight, normal(experiments, numel), averages, seed, torch.tensor(3, device=device)


def relative_error(got, expected):
    return ((got.double().cpu() - expected.cpu()).norm() / expected.norm().cpu().clamp_min(1e-300)).item()


def assert_close(got, expected, dtype=torch.float32):
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= TOLERANCE[dtype]


def sample_in_double(logits, weight, seed, step):
    return ops.concrete_mask_reference(logits.double(), weight.double(), seed, step, Stream.MASK, TEMPERATURE)


def update_in_double(logits, averages, weight, gradient, seed, step, **constants):
    state = [t.double().clone() for t in (logits, *averages, logits)]
    ops.concrete_mask_update_reference(
        *state, weight.double(), gradient.double(), seed, step, Stream.MASK, TEMPERATURE, **constants
    )
    return state


# From 3 on: the gradient at a single saturated mask is all cancellation, in any float32.
SIZES = [(1, 3), (1, 31), (2, 33), (3, 1000), (2, 16385), (1, 40001)]


@pytest.mark.parametrize(("experiments", "numel"), SIZES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_sample_and_gradients(instruction_set, experiments, numel, shared, dtype):
    logits, weight, gradient, _, seed, step = problem(experiments, numel, dtype, shared)
    leaves = [logits.clone().requires_grad_(), weight.clone().requires_grad_()]
    soft_mask, masked_weight = concrete_mask(*leaves, seed, step, temperature=TEMPERATURE)
    got = torch.autograd.grad((soft_mask * gradient.flip(-1)).sum() + (masked_weight * gradient).sum(), leaves)

    doubles = [logits.double().requires_grad_(), weight.double().requires_grad_()]
    expected_mask, expected_weight = sample_in_double(*doubles, seed, step)
    objective = (expected_mask * gradient.double().flip(-1)).sum() + (expected_weight * gradient.double()).sum()
    assert_close(soft_mask, expected_mask.detach(), dtype)
    assert_close(masked_weight, expected_weight.detach(), dtype)
    for g, e in zip(got, torch.autograd.grad(objective, doubles), strict=True):
        assert_close(g, e, dtype)


@pytest.mark.parametrize(("experiments", "numel"), SIZES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_update(instruction_set, experiments, numel, shared, dtype):
    logits, weight, gradient, averages, seed, step = problem(experiments, numel, dtype, shared)
    expected = update_in_double(logits, averages, weight, gradient, seed, step, **UPDATE)
    # Poisoned: an element that is never written stays NaN and fails the comparison.
    state = [logits.clone(), *(a.clone() for a in averages), torch.full_like(logits, torch.nan)]
    torch.ops.sparse_gen.concrete_mask_update(
        *state, weight, gradient, seed, step, int(Stream.MASK), TEMPERATURE, *UPDATE.values()
    )
    for got, want in zip(state, expected, strict=True):
        assert_close(got, want, dtype)


def test_nothing_beyond_the_arrays_is_written(instruction_set):
    logits, weight, gradient, averages, seed, step = problem(1, 37, torch.float32)
    padded = [torch.full((1, 64), 7.0) for _ in range(4)]
    views = [p.flatten()[:37].view(1, 37) for p in padded]
    for view, value in zip(views, [logits, *averages, logits], strict=True):
        view.copy_(value)
    concrete_mask_update(*views, weight, gradient, seed, step)
    assert all((p[:, 37:] == 7).all() for p in padded)


@pytest.mark.parametrize("reach", [5.9, 12.0])
def test_kl_gradient_of_every_logit(instruction_set, reach):
    """Groups of small logits leave out a logarithm: to either side, each element is right, not only their norm."""
    logits = torch.linspace(-reach, reach, 1001)[None]
    zeros, constants = torch.zeros_like(logits), UPDATE | {"kl_weight": 1.0, "beta1": 0.0}
    averages, seed, step = [zeros, zeros], torch.tensor([7]), torch.tensor(0)
    expected = update_in_double(logits, averages, zeros, zeros, seed, step, **constants)[1]
    state = [logits.clone(), *(a.clone() for a in averages), torch.full_like(logits, torch.nan)]
    torch.ops.sparse_gen.concrete_mask_update(
        *state, zeros, zeros, seed, step, int(Stream.MASK), TEMPERATURE, *constants.values()
    )
    slope = logits.double().sigmoid() * torch.sigmoid(-logits.double())
    torch.testing.assert_close(state[1].double() / slope, expected / slope, rtol=2e-6, atol=2e-6)


def test_update_equals_torch_adam_on_the_papers_loss():
    logits, weight, _, _, seed, _ = problem(2, 501)
    target = torch.linspace(-1, 1, 501, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-2)
    state = [logits.clone(), torch.zeros_like(logits), torch.zeros_like(logits)]
    _, masked_weight = concrete_mask(logits, weight, seed, 0, temperature=TEMPERATURE)
    for step in range(20):
        _, w = concrete_mask(leaf, weight, seed, step, temperature=TEMPERATURE)
        adam.zero_grad()
        ((w - target).square().sum() + 1e-3 * kl_divergence(leaf, 0.05).sum()).backward()
        adam.step()
        gradient = 2 * (masked_weight - target)
        concrete_mask_update(*state, masked_weight, weight, gradient, seed, step, kl_weight=1e-3, prior=0.05)
    # Twenty steps of Adam multiply the rounding of one.
    torch.testing.assert_close(state[0], leaf.detach(), rtol=1e-11, atol=1e-11)


def test_experiments_do_not_touch_each_other(instruction_set):
    logits, weight, gradient, averages, seed, step = problem(3, 777, torch.float32)
    together = [logits.clone(), *(a.clone() for a in averages), torch.empty_like(logits)]
    concrete_mask_update(*together, weight, gradient, seed, step)
    for e in range(3):
        row = slice(e, e + 1)
        alone = [logits[row].clone(), *(a[row].clone() for a in averages), torch.empty(1, 777)]
        concrete_mask_update(*alone, weight[row].contiguous(), gradient[row].contiguous(), seed[row], step)
        assert all(torch.equal(a, t[row]) for a, t in zip(alone, together, strict=True))


def test_the_same_bits_at_any_thread_count(instruction_set):
    logits, weight, _, _, seed, step = problem(2, 50_000, torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(concrete_mask(logits, weight, seed, step)[1])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("logit", [-200.0, -50.0, 50.0, 200.0])
def test_saturated_logits_stay_finite(instruction_set, logit):
    logits, weight = torch.full((1, 64), logit), torch.ones(64)
    state = [logits.clone(), torch.zeros_like(logits), torch.zeros_like(logits), torch.empty_like(logits)]
    concrete_mask_update(*state, weight, torch.ones_like(logits), torch.tensor([0]), 0, kl_weight=1.0)
    assert all(tensor.isfinite().all() for tensor in state)
    expected = 1.0 if logit > 0 else 0.0
    torch.testing.assert_close(state[3], torch.full_like(logits, expected), rtol=0, atol=1e-9)


def test_gradcheck():
    logits, weight, _, _, seed, step = problem(2, 13)

    def function(logits, weight):
        return concrete_mask(logits, weight, seed, step, temperature=TEMPERATURE)

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(), weight.requires_grad_()))


def test_opcheck():
    logits, weight, gradient, averages, seed, step = problem(2, 37, torch.float32)
    ops = torch.ops.sparse_gen
    torch.library.opcheck(
        ops.concrete_mask, (logits.requires_grad_(), weight.requires_grad_(), seed, step, 3, TEMPERATURE)
    )
    logits, weight = logits.detach(), weight.detach()
    torch.library.opcheck(ops.concrete_mask_backward, (gradient, gradient, weight, logits.sigmoid(), TEMPERATURE))
    torch.library.opcheck(
        ops.concrete_mask_update,
        (
            logits,
            *averages,
            torch.empty_like(logits),
            weight,
            gradient,
            seed,
            step,
            3,
            TEMPERATURE,
            *UPDATE.values(),
        ),
    )


def test_it_is_the_papers_two_class_gumbel_softmax():
    """Kolmogorov–Smirnov: our soft mask and `gumbel_softmax` over [ln p, ln(1 - p)] have one distribution."""
    count = 200_000
    torch.manual_seed(0)
    for logit in (-2.0, 0.0, 1.0):
        logits = torch.full((1, count), logit)
        ours, _ = concrete_mask(logits, torch.ones(count), torch.tensor([1]), 0, temperature=TEMPERATURE)
        classes = torch.stack(
            [torch.nn.functional.logsigmoid(logits[0]), torch.nn.functional.logsigmoid(-logits[0])], -1
        )
        papers = torch.nn.functional.gumbel_softmax(classes, tau=TEMPERATURE)[:, 0]
        assert ks_2samp(ours[0].numpy(), papers.numpy()).pvalue > 1e-3
        assert (ours[0] > 0.5).double().mean().item() == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=5e-3)


def test_kl_is_zero_at_the_prior_and_grows_away_from_it():
    at = torch.tensor([[0.05, 0.5, 0.01]]).logit()
    kl = [kl_divergence(at[:, i : i + 1], 0.05).item() for i in range(3)]
    assert kl[0] == pytest.approx(0, abs=1e-4)  # the paper's offset of 1e-6 shifts it by 2e-6
    assert kl[1] == pytest.approx(0.5 * math.log(0.5 / 0.05) + 0.5 * math.log(0.5 / 0.95), rel=1e-4)
    assert kl[2] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, "expected logits of shape"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, "float32 or float64"),
        ({"weight": torch.zeros(4)}, "expected weight of shape"),
        ({"weight": torch.zeros(3, dtype=torch.float64)}, "expected weight of torch.float32"),
        ({"weight": torch.zeros(3, 2).T}, "expected a contiguous weight"),
        ({"seed": torch.tensor([0])}, "expected one seed an experiment"),
        ({"temperature": 0.0}, "expected a temperature above 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "logits": torch.zeros(2, 3),
        "weight": torch.zeros(3),
        "seed": torch.tensor([0, 1]),
        "step": 0,
    }
    with pytest.raises(ValueError, match=message):
        concrete_mask(**arguments | change)


@pytest.mark.parametrize("prior", [0.0, 1.0, -1.0, float("nan")])
def test_bad_prior(prior):
    zeros = [torch.zeros(1, 3) for _ in range(4)]
    with pytest.raises(ValueError, match="prior strictly between"):
        concrete_mask_update(*zeros, torch.ones(3), torch.ones(1, 3), torch.tensor([0]), 0, prior=prior)


@pytest.mark.interpreter
@pytest.mark.parametrize(("experiments", "numel"), [(1, 1), (2, 1023), (3, 1500)])
@pytest.mark.parametrize("shared", [False, True])
def test_triton(experiments, numel, shared):
    kernel = pytest.importorskip("sparse_gen.kernels.concrete_mask", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, weight, gradient, averages, seed, step = problem(experiments, numel, torch.float32, shared, device)

    expected = sample_in_double(logits, weight, seed, step)
    got = kernel.concrete_mask(logits, weight, seed, step, int(Stream.MASK), TEMPERATURE)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)

    backward = (gradient.flip(-1), gradient, weight, got[0])
    expected = ops.concrete_mask_backward_reference(*(t.double() for t in backward), TEMPERATURE)
    for g, e in zip(kernel.concrete_mask_backward(*backward, TEMPERATURE), expected, strict=True):
        assert_close(g, e)

    expected = update_in_double(logits, averages, weight, gradient, seed, step, **UPDATE)
    state = [logits.clone(), *(a.clone() for a in averages), torch.full_like(logits, torch.nan)]
    kernel.concrete_mask_update(*state, weight, gradient, seed, step, int(Stream.MASK), TEMPERATURE, *UPDATE.values())
    for g, e in zip(state, expected, strict=True):
        assert_close(g, e)


_COMPILE_AHEAD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_gen.kernels import concrete_mask as kernels

out = {}
for name in ("_sample_kernel", "_backward_kernel", "_update_kernel"):
    kernel = getattr(kernels, name)
    integers = {"p_seed": "*i64", "p_step": "*i64", "stream": "i32", "numel": "i32", "weight_stride": "i32"}
    types = {a: integers.get(a, "*fp32" if a.startswith("p_") else "fp32") for a in kernel.arg_names if a != "BLOCK"}
    types["BLOCK"] = "constexpr"
    source = ASTSource(kernel, types, constexprs={"BLOCK": kernels.BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    out[name] = {"shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}
print(json.dumps(out))
"""


@pytest.mark.aot
def test_triton_compiles_for_sm_90_without_spills():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", _COMPILE_AHEAD], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for name, kernel in json.loads(run.stdout).items():
        assert ".target sm_90" in kernel["ptx"], name
        assert "ld.local" not in kernel["ptx"], f"{name} spills"
        # One exchange through shared memory, from four words a thread to the order of the loads.
        assert kernel["shared"] <= 4096, name
