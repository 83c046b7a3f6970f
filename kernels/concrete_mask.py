"""Triton twin of `sparse_gen.ops.concrete_mask`: sampling, its backward, and the fused search update."""

import math

import torch
import triton
import triton.language as tl

from sparse_gen.kernels.masked_adam import adam, log_beta
from sparse_gen.kernels.philox import uniform_block

# Element-wise and bound by memory: 1024 elements a program are 4 KiB of each array.
BLOCK = 1024


@triton.jit
def _soft_mask(b_logit, b_uniform, inverse_temperature):
    """The soft mask and its complement, which 1 - mask would round away where the mask is nearly 1."""
    b_u = b_uniform.to(b_logit.dtype)
    b_exponent = (tl.log((1 - b_u) / b_u) - b_logit) * inverse_temperature
    # Beyond 88 the exponential of a float is infinite, and infinity times the mask's zero is no number.
    b_odds = tl.exp(tl.minimum(b_exponent, 88.0))
    b_mask = 1 / (1 + b_odds)
    return b_mask, b_odds * b_mask


@triton.jit
def _kl_gradient(b_logit, log_prior_odds):
    """Derivative by the logit of KL(Ber(sigmoid(logit)) ‖ Ber(prior)) with the paper's offset of 1e-6."""
    b_odds = tl.exp(tl.minimum(-b_logit, 88.0))
    b_p = 1 / (1 + b_odds)
    b_q = b_odds * b_p
    b_pe, b_qe = b_p + 1e-6, b_q + 1e-6
    b_inverse = 1 / (b_pe * b_qe)
    return b_p * b_q * (tl.log(b_pe * b_pe * b_inverse) - log_prior_odds + 1e-6 * (b_p - b_q) * b_inverse)


@triton.jit
def _sample_kernel(
    p_logits,  # pointer to logits, shape (E, N)
    p_weight,  # pointer to weights, shape (E, N), or (N,) with weight_stride = 0
    p_soft_mask,  # pointer to output, shape (E, N)
    p_masked_weight,  # pointer to output, shape (E, N)
    p_seed,  # pointer to seeds, int64, shape (E,)
    p_step,  # pointer to the step, int64, shape ()
    stream,
    inverse_temperature,
    numel,  # N
    weight_stride,  # N or 0
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_experiment = tl.program_id(1).to(tl.int64)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    o_row = i_experiment * numel + o_index
    b_uniform = uniform_block(tl.load(p_seed + i_experiment), tl.load(p_step), stream, i_block, BLOCK)
    b_mask, _ = _soft_mask(tl.load(p_logits + o_row, mask=m_index, other=0.0), b_uniform, inverse_temperature)
    b_weight = tl.load(p_weight + i_experiment * weight_stride + o_index, mask=m_index, other=0.0)
    tl.store(p_soft_mask + o_row, b_mask, mask=m_index)
    tl.store(p_masked_weight + o_row, b_mask * b_weight, mask=m_index)


@triton.jit
def _backward_kernel(
    p_grad_soft_mask,  # pointer to gradients, shape (E, N)
    p_grad_masked_weight,  # pointer to gradients, shape (E, N)
    p_weight,  # pointer to weights, shape (E, N), or (N,) with weight_stride = 0
    p_soft_mask,  # pointer to the forward's soft mask, shape (E, N)
    p_grad_logits,  # pointer to output, shape (E, N)
    p_grad_weight,  # pointer to output, shape (E, N)
    inverse_temperature,
    numel,  # N
    weight_stride,  # N or 0
    BLOCK: tl.constexpr,
):
    i_experiment = tl.program_id(1).to(tl.int64)
    o_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    o_row = i_experiment * numel + o_index
    b_grad_masked = tl.load(p_grad_masked_weight + o_row, mask=m_index, other=0.0)
    b_weight = tl.load(p_weight + i_experiment * weight_stride + o_index, mask=m_index, other=0.0)
    b_mask = tl.load(p_soft_mask + o_row, mask=m_index, other=0.0)
    b_grad_mask = tl.load(p_grad_soft_mask + o_row, mask=m_index, other=0.0) + b_grad_masked * b_weight
    tl.store(p_grad_logits + o_row, b_grad_mask * b_mask * (1 - b_mask) * inverse_temperature, mask=m_index)
    tl.store(p_grad_weight + o_row, b_grad_masked * b_mask, mask=m_index)


@triton.jit
def _update_kernel(
    p_logits,  # pointer to logits, shape (E, N), read and written
    p_exp_avg,  # pointer to Adam's first average, shape (E, N), read and written
    p_exp_avg_sq,  # pointer to Adam's second average, shape (E, N), read and written
    p_masked_weight,  # pointer to output, the sample of step + 1, shape (E, N)
    p_weight,  # pointer to weights, shape (E, N), or (N,) with weight_stride = 0
    p_grad,  # pointer to the gradient of the sample of step, shape (E, N)
    p_seed,  # pointer to seeds, int64, shape (E,)
    p_step,  # pointer to the step, int64, shape ()
    stream,
    inverse_temperature,
    kl_weight,
    log_prior_odds,
    lr,
    log_beta1,
    log_beta2,
    decay1,  # 1 - beta1
    decay2,  # 1 - beta2
    eps,
    numel,  # N
    weight_stride,  # N or 0
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_experiment = tl.program_id(1).to(tl.int64)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    o_row = i_experiment * numel + o_index
    seed = tl.load(p_seed + i_experiment)
    step = tl.load(p_step)

    b_logit = tl.load(p_logits + o_row, mask=m_index, other=0.0)
    b_weight = tl.load(p_weight + i_experiment * weight_stride + o_index, mask=m_index, other=0.0)
    b_grad = tl.load(p_grad + o_row, mask=m_index, other=0.0)
    b_mask, b_complement = _soft_mask(b_logit, uniform_block(seed, step, stream, i_block, BLOCK), inverse_temperature)
    b_grad = b_grad * b_weight * b_mask * b_complement * inverse_temperature
    b_grad += kl_weight * _kl_gradient(b_logit, log_prior_odds)

    b_exp_avg = tl.load(p_exp_avg + o_row, mask=m_index, other=0.0)
    b_exp_avg_sq = tl.load(p_exp_avg_sq + o_row, mask=m_index, other=0.0)
    b_logit, b_exp_avg, b_exp_avg_sq = adam(
        b_logit, b_exp_avg, b_exp_avg_sq, b_grad, step, lr, log_beta1, log_beta2, decay1, decay2, eps
    )

    b_next_mask, _ = _soft_mask(b_logit, uniform_block(seed, step + 1, stream, i_block, BLOCK), inverse_temperature)
    tl.store(p_logits + o_row, b_logit, mask=m_index)
    tl.store(p_exp_avg + o_row, b_exp_avg, mask=m_index)
    tl.store(p_exp_avg_sq + o_row, b_exp_avg_sq, mask=m_index)
    tl.store(p_masked_weight + o_row, b_next_mask * b_weight, mask=m_index)


def _grid(logits: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(logits.shape[1], BLOCK), logits.shape[0]


def _weight_stride(weight: torch.Tensor) -> int:
    return weight.shape[1] if weight.ndim == 2 else 0


def concrete_mask(logits, weight, seed, step, stream, temperature):
    soft_mask, masked_weight = torch.empty_like(logits), torch.empty_like(logits)
    if logits.numel():
        _sample_kernel[_grid(logits)](
            logits, weight, soft_mask, masked_weight, seed, step, stream, 1 / temperature,
            logits.shape[1], _weight_stride(weight), BLOCK=BLOCK,
        )  # fmt: skip
    return soft_mask, masked_weight


def concrete_mask_backward(grad_soft_mask, grad_masked_weight, weight, soft_mask, temperature):
    grad_logits, grad_weight = torch.empty_like(soft_mask), torch.empty_like(soft_mask)
    if soft_mask.numel():
        _backward_kernel[_grid(soft_mask)](
            grad_soft_mask, grad_masked_weight, weight, soft_mask, grad_logits, grad_weight, 1 / temperature,
            soft_mask.shape[1], _weight_stride(weight), BLOCK=BLOCK,
        )  # fmt: skip
    return grad_logits, grad_weight


def concrete_mask_update(
    logits, exp_avg, exp_avg_sq, masked_weight, weight, grad_masked_weight,
    seed, step, stream, temperature, kl_weight, prior, lr, beta1, beta2, eps,
):  # fmt: skip
    if logits.numel():
        _update_kernel[_grid(logits)](
            logits, exp_avg, exp_avg_sq, masked_weight, weight, grad_masked_weight, seed, step, stream,
            1 / temperature, kl_weight, math.log(prior / (1 - prior)), lr, log_beta(beta1), log_beta(beta2),
            1 - beta1, 1 - beta2, eps, logits.shape[1], _weight_stride(weight), BLOCK=BLOCK,
        )  # fmt: skip
