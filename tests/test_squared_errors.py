"""The loss of searches and fits: each experiment's mean squared error, on the CPU and on the way that a GPU takes."""

import pytest
import torch
from pretended_gpu import PretendedGpu, numbers, to_gpu
from torch.nn import functional as F

from sparse_gen.ops.squared_errors import squared_errors

SIZE = (3, 13, 11)


def pictures(targets, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, *SIZE, generator=generator, dtype=dtype), torch.rand(
        targets, *SIZE, generator=generator, dtype=dtype
    )


def gradient(output, target):
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=output.dtype)
    difference = output - target
    return 2 * weights[:, None, None, None] * difference / difference[0].numel()


@pytest.mark.parametrize("targets", [1, 4])
def test_errors_and_gradient(targets):
    output, target = pictures(targets)
    leaf = output.clone().requires_grad_()
    errors = squared_errors(leaf, target)
    torch.testing.assert_close(errors, (output - target).square().mean(dim=(1, 2, 3)), rtol=1e-13, atol=0)
    (errors * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    torch.testing.assert_close(leaf.grad, gradient(output, target), rtol=1e-13, atol=1e-18)


def test_on_the_cpu_an_experiment_has_the_bits_of_torch():
    output, target = pictures(1, torch.float32)
    assert torch.equal(squared_errors(output, target), torch.stack([F.mse_loss(own, target[0]) for own in output]))


@pytest.mark.parametrize("targets", [1, 4])
def test_on_a_gpu_one_call_serves_all(targets):
    output, target = pictures(targets)
    with PretendedGpu() as gpu:
        leaf, there = to_gpu(output).requires_grad_(), to_gpu(target)
        errors = squared_errors(leaf, there)
        weights = to_gpu(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
        with gpu.capture():
            (errors * weights).sum().backward()
        got, grad = numbers(errors), numbers(leaf.grad)
    assert gpu.calls == ["squared_errors"]
    torch.testing.assert_close(got, squared_errors(output, target), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, gradient(output, target), rtol=1e-13, atol=1e-18)


def test_the_operator_is_a_sound_one():
    output, target = pictures(4)
    torch.library.opcheck(torch.ops.sparse_gen.squared_errors, (output.requires_grad_(), target))
