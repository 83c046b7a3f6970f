"""Triton twin of `sparse_gen.ops.masked_adam`: one pass over the values; the experiments share the step."""

import math

import triton
import triton.language as tl

# Bound by memory: 1024 elements a program are 4 KiB of each array.
BLOCK = 1024


@triton.jit
def adam(
    b_value,
    b_exp_avg,
    b_exp_avg_sq,
    b_grad,
    step,  # int64 scalar, from 0
    lr,
    log_beta1,
    log_beta2,
    decay1,  # 1 - beta1
    decay2,  # 1 - beta2
    eps,
):
    """The values and both averages after one step."""
    b_exp_avg += (b_grad - b_exp_avg) * decay1
    b_exp_avg_sq += (b_grad * b_grad - b_exp_avg_sq) * decay2
    # 1 - beta^count in double: at the first step a float would keep four digits of 1 - 0.999.
    count = (step + 1).to(tl.float64)
    step_size = (lr / (1 - tl.exp(count * log_beta1))).to(tl.float32)
    inverse_root2 = (1 / tl.sqrt(1 - tl.exp(count * log_beta2))).to(tl.float32)
    return b_value - step_size * b_exp_avg / (tl.sqrt(b_exp_avg_sq) * inverse_root2 + eps), b_exp_avg, b_exp_avg_sq


@triton.jit
def _adam_block(p_values, p_exp_avg, p_exp_avg_sq, p_grad, coefficients, o_index, m_index):
    b_value, b_exp_avg, b_exp_avg_sq = adam(
        tl.load(p_values + o_index, mask=m_index),
        tl.load(p_exp_avg + o_index, mask=m_index),
        tl.load(p_exp_avg_sq + o_index, mask=m_index),
        tl.load(p_grad + o_index, mask=m_index),
        *coefficients,
    )
    tl.store(p_values + o_index, b_value, mask=m_index)
    tl.store(p_exp_avg + o_index, b_exp_avg, mask=m_index)
    tl.store(p_exp_avg_sq + o_index, b_exp_avg_sq, mask=m_index)


@triton.jit
def _masked_adam_kernel(
    p_values,  # pointer to values, shape (E * kept,), read and written
    p_exp_avg,  # pointer to the first average, shape (E * kept,), read and written
    p_exp_avg_sq,  # pointer to the second average, shape (E * kept,), read and written
    p_grad,  # pointer to gradients, shape (E * kept,)
    p_step,  # pointer to the step, int64, shape ()
    lr,
    log_beta1,
    log_beta2,
    decay1,  # 1 - beta1
    decay2,  # 1 - beta2
    eps,
    numel,  # E * kept
    BLOCK: tl.constexpr,
):
    o_index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    coefficients = (tl.load(p_step), lr, log_beta1, log_beta2, decay1, decay2, eps)
    # A mask, whose end may fall anywhere, keeps accesses at 4 bytes; only the last block needs one.
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCK <= numel:
        _adam_block(p_values, p_exp_avg, p_exp_avg_sq, p_grad, coefficients, o_index, None)
    else:
        _adam_block(p_values, p_exp_avg, p_exp_avg_sq, p_grad, coefficients, o_index, o_index < numel)


def log_beta(beta: float) -> float:
    """ln beta, with beta = 0 (no memory) allowed."""
    return math.log(beta) if beta else -math.inf


def masked_adam(values, exp_avg, exp_avg_sq, grad, step, lr, beta1, beta2, eps):
    if values.numel():
        _masked_adam_kernel[(triton.cdiv(values.numel(), BLOCK),)](
            values, exp_avg, exp_avg_sq, grad, step, lr, log_beta(beta1), log_beta(beta2), 1 - beta1, 1 - beta2, eps,
            values.numel(), BLOCK=BLOCK,
        )  # fmt: skip
