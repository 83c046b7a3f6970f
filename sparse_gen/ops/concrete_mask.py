"""Soft masks: a concrete (relaxed Bernoulli) sample per weight, and the fused pass that learns its logits.

With one uniform number u per weight the soft mask and the masked weight are

    s = sigmoid((l + ln u - ln(1 - u)) / temperature),    w = weight · s,

which is the two-class Gumbel-softmax of Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), eq. 4, whose two
Gumbel numbers only ever enter through their difference, a logistic number. The fused pass takes the gradient
of w and does everything that a search step does besides the network: gradient and KL gradient of the logits,
Adam on them, and the next sample.
"""

from __future__ import annotations

import torch

from sparse_gen.ops.dispatch import LIBRARY, register_operator
from sparse_gen.ops.philox import Stream, philox_reference, uniform_from_words

# The offset inside the paper's logarithms (its code's value), which keeps the KL finite at p = 0 and 1.
KL_OFFSET = 1e-6


def soft_mask_reference(logits, seed, step, stream, temperature):
    u = uniform_from_words(philox_reference(seed, step, stream, logits.shape[1])).to(logits.dtype)
    return torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / temperature)


def concrete_mask_reference(logits, weight, seed, step, stream, temperature):
    soft_mask = soft_mask_reference(logits, seed, step, stream, temperature)
    return soft_mask, soft_mask * weight


def concrete_mask_backward_reference(grad_soft_mask, grad_masked_weight, weight, soft_mask, temperature):
    grad_mask = grad_soft_mask + grad_masked_weight * weight
    return grad_mask * soft_mask * (1 - soft_mask) / temperature, grad_masked_weight * soft_mask


def kl_divergence(logits: torch.Tensor, prior: float, sizes: torch.Tensor | None = None) -> torch.Tensor:
    """KL(Ber(p) ‖ Ber(prior)) summed over the weights of each experiment, p = sigmoid(logits).

    Args:
        logits: (E, N).
        prior: a probability strictly between 0 and 1.
        sizes: (N,), how many weights each logit stands for; one by default.

    Returns:
        (E,), in nats; differentiable.
    """
    p = torch.sigmoid(logits)
    kept = p * torch.log((p + KL_OFFSET) / prior)
    pruned = (1 - p) * torch.log((1 - p + KL_OFFSET) / (1 - prior))
    each = kept + pruned
    return (each if sizes is None else each * sizes).sum(dim=1)


def concrete_mask_update_reference(
    logits, exp_avg, exp_avg_sq, masked_weight, weight, grad_masked_weight,
    seed, step, stream, temperature, kl_weight, prior, lr, beta1, beta2, eps,
):  # fmt: skip
    soft_mask = soft_mask_reference(logits, seed, step, stream, temperature)
    data_gradient = grad_masked_weight * weight * soft_mask * (1 - soft_mask) / temperature
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (kl_gradient,) = torch.autograd.grad(kl_divergence(leaf, prior).sum(), leaf)
    gradient = data_gradient + kl_weight * kl_gradient

    count = step.double() + 1
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    step_size = (lr / (1 - beta1**count)).to(logits.dtype)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**count).sqrt().to(logits.dtype) + eps
    logits.sub_(step_size * exp_avg / denominator)
    masked_weight.copy_(weight * soft_mask_reference(logits, seed, step + 1, stream, temperature))


register_operator(
    "concrete_mask(Tensor logits, Tensor weight, Tensor seed, Tensor step, int stream, float temperature)"
    " -> (Tensor, Tensor)",
    reference=concrete_mask_reference,
    fake=lambda logits, *_: (torch.empty_like(logits), torch.empty_like(logits)),
)
register_operator(
    "concrete_mask_backward(Tensor grad_soft_mask, Tensor grad_masked_weight, Tensor weight, Tensor soft_mask,"
    " float temperature) -> (Tensor, Tensor)",
    reference=concrete_mask_backward_reference,
    fake=lambda grad_soft_mask, *_: (torch.empty_like(grad_soft_mask), torch.empty_like(grad_soft_mask)),
)
register_operator(
    "concrete_mask_update(Tensor(a!) logits, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) masked_weight,"
    " Tensor weight, Tensor grad_masked_weight, Tensor seed, Tensor step, int stream, float temperature,"
    " float kl_weight, float prior, float lr, float beta1, float beta2, float eps) -> ()",
    reference=concrete_mask_update_reference,
    fake=lambda *_: None,
)


def _setup_context(ctx, inputs, output):
    _, weight, *_, ctx.temperature = inputs
    ctx.save_for_backward(weight, output[0])


def _autograd_backward(ctx, grad_soft_mask, grad_masked_weight):
    weight, soft_mask = ctx.saved_tensors
    zeros = torch.zeros_like(soft_mask) if grad_soft_mask is None or grad_masked_weight is None else None
    grad_logits, grad_weight = torch.ops.sparse_gen.concrete_mask_backward(
        zeros if grad_soft_mask is None else grad_soft_mask.contiguous(),
        zeros if grad_masked_weight is None else grad_masked_weight.contiguous(),
        weight,
        soft_mask,
        ctx.temperature,
    )
    return grad_logits, grad_weight if weight.ndim == 2 else grad_weight.sum(dim=0), None, None, None, None


torch.library.register_autograd(
    "sparse_gen::concrete_mask", _autograd_backward, setup_context=_setup_context, lib=LIBRARY
)


def _check(logits, weight, seed, temperature, **others):
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected logits of shape (E, N), float32 or float64, got {tuple(logits.shape)} of {logits.dtype}"
        )
    if weight.shape not in (logits.shape, logits.shape[1:]):
        raise ValueError(
            f"expected weight of shape {tuple(logits.shape)} or {tuple(logits.shape[1:])}, got {tuple(weight.shape)}"
        )
    if seed.shape != logits.shape[:1]:
        raise ValueError(f"expected one seed an experiment, ({logits.shape[0]},), got {tuple(seed.shape)}")
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    for name, tensor in {"weight": weight, **others}.items():
        if name != "weight" and tensor.shape != logits.shape:
            raise ValueError(f"expected {name} of shape {tuple(logits.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != logits.dtype or tensor.device != logits.device:
            raise ValueError(
                f"expected {name} of {logits.dtype} on {logits.device} like the logits, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"expected a contiguous {name}, got strides {tensor.stride()}, call .contiguous()")


def _step_tensor(step, device):
    return step if isinstance(step, torch.Tensor) else torch.tensor(step, device=device)


def concrete_mask(
    logits: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor,
    step: int | torch.Tensor,
    *,
    temperature: float = 0.2,
    stream: Stream = Stream.MASK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the soft mask of one step and mask the weights with it.

    Args:
        logits: (E, N), float32 or float64, contiguous.
        weight: (E, N), or (N,) shared by all experiments.
        seed: (E,) int64.
        step: the number of the sample, an integer or a () int64 tensor on the same device.
        temperature: above 0; the lower, the closer s comes to 0 or 1.
        stream: the random stream.

    Returns:
        The soft mask s and the masked weight weight · s, both (E, N); differentiable in logits and weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the temperature is not above 0.

    Ghosh et al., ICML 2024, eq. 4; the backward needs no more than s.
    """
    logits = logits.contiguous()
    _check(logits, weight, seed, temperature)
    step = _step_tensor(step, logits.device)
    return torch.ops.sparse_gen.concrete_mask(logits, weight, seed, step, int(stream), temperature)


@torch.no_grad()
def concrete_mask_update(
    logits: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    masked_weight: torch.Tensor,
    weight: torch.Tensor,
    grad_masked_weight: torch.Tensor,
    seed: torch.Tensor,
    step: int | torch.Tensor,
    *,
    temperature: float = 0.2,
    kl_weight: float = 1e-9,
    prior: float = 0.05,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    stream: Stream = Stream.MASK,
) -> None:
    """Learn the logits from the gradient of one sample and draw the next, in one pass over memory.

    In place: logits, exp_avg and exp_avg_sq take one step of Adam on loss + kl_weight · KL, and masked_weight
    becomes the sample of step + 1. The soft mask is never stored; it is drawn again from its index.

    Args:
        logits, exp_avg, exp_avg_sq: (E, N), the logits and Adam's two averages (zero before step 0).
        masked_weight: (E, N), overwritten.
        weight: (E, N), or (N,) shared by all experiments.
        grad_masked_weight: (E, N), gradient of the loss by the masked weight of `step`.
        seed: (E,) int64.
        step: number of the sample that gave the gradient, from 0, an integer or a () int64 tensor.
        temperature: the sample's.
        kl_weight: λ of the KL term.
        prior: p0, strictly between 0 and 1.
        lr, betas, eps: Adam's, as torch.optim.Adam means them.
        stream: the random stream.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a number is out of its range.

    Ghosh et al., ICML 2024, eq. 3 and 4; Kingma & Ba, "Adam", ICLR 2015, algorithm 1.
    """
    _check(
        logits, weight, seed, temperature, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, masked_weight=masked_weight,
        grad_masked_weight=grad_masked_weight,
    )  # fmt: skip
    if not 0 < prior < 1:
        raise ValueError(f"expected a prior strictly between 0 and 1, got {prior}")
    step = _step_tensor(step, logits.device)
    torch.ops.sparse_gen.concrete_mask_update(
        logits, exp_avg, exp_avg_sq, masked_weight, weight, grad_masked_weight,
        seed, step, int(stream), temperature, kl_weight, prior, lr, *betas, eps,
    )  # fmt: skip
