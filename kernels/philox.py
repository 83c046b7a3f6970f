"""Triton twin of `sparse_gen.ops.philox`: the same bits, four words to a call of the generator."""

import torch
import triton
import triton.language as tl


@triton.jit
def philox_block(
    seed,  # int64 scalar
    step,  # int64 scalar
    stream,  # int scalar
    i_block,  # which block of BLOCK consecutive indices
    BLOCK: tl.constexpr,  # a multiple of 4
):
    """The words of indices i_block * BLOCK … + BLOCK - 1, as uint32."""
    o_counter = (i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    b_zero = tl.zeros_like(o_counter)
    b_step = b_zero + step.to(tl.uint32)
    b_stream = b_zero + stream
    w0, w1, w2, w3 = tl.philox(seed, o_counter, b_step, b_stream, b_zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform_block(seed, step, stream, i_block, BLOCK: tl.constexpr):
    """The same as float32 strictly inside (0, 1); `tl.rand` can return 0, whose logarithm is no number."""
    b_word = philox_block(seed, step, stream, i_block, BLOCK)
    return ((b_word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _philox_kernel(
    p_words,  # pointer to output, int32, shape (E, count)
    p_seed,  # pointer to seeds, int64, shape (E,)
    p_step,  # pointer to the step, int64, shape ()
    stream,
    count,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_experiment = tl.program_id(1)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    b_word = philox_block(tl.load(p_seed + i_experiment), tl.load(p_step), stream, i_block, BLOCK)
    p_row = p_words + i_experiment.to(tl.int64) * count
    tl.store(p_row + o_index, b_word.to(tl.int32, bitcast=True), mask=o_index < count)


def philox(seed: torch.Tensor, step: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    words = torch.empty((len(seed), count), dtype=torch.int32, device=seed.device)
    if words.numel():
        block = 1024
        _philox_kernel[(triton.cdiv(count, block), len(seed))](words, seed, step, stream, count, BLOCK=block)
    return words
