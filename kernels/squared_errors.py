"""Triton twin of `sparse_gen.ops.squared_errors`: blocks of an image are summed, and the sums of an experiment joined.

Where the blocks lie and in which order their sums are joined depends on the image's size alone, so that an experiment
has the same bits alone and beside others.
"""

import triton
import triton.language as tl

# 4096 floats are 16 registers a thread of eight warps, twice.
BLOCK = 4096
# Sums that the second kernel takes at a time.
JOINED = 1024


@triton.jit
def _block_kernel(
    p_output,  # pointer to outputs, shape (E, numel)
    p_target,  # pointer to targets, shape (E, numel), or (1, numel) with target_stride = 0
    p_sums,  # pointer to output, shape (E, blocks)
    numel,
    target_stride,  # numel or 0
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_experiment = tl.program_id(1).to(tl.int64)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_output = tl.load(p_output + i_experiment * numel + o_index, mask=m_index, other=0.0)
    b_error = b_output - tl.load(p_target + i_experiment * target_stride + o_index, mask=m_index, other=0.0)
    tl.store(p_sums + i_experiment * tl.num_programs(0) + i_block, tl.sum(b_error * b_error))


@triton.jit
def _join_kernel(
    p_sums,  # pointer to the blocks' sums, shape (E, blocks)
    p_errors,  # pointer to output, shape (E,)
    numel,
    blocks,
    JOINED: tl.constexpr,
):
    i_experiment = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([JOINED], tl.float32)
    for start in range(0, blocks, JOINED):
        o_block = start + tl.arange(0, JOINED)
        b_sum += tl.load(p_sums + i_experiment * blocks + o_block, mask=o_block < blocks, other=0.0)
    tl.store(p_errors + i_experiment, tl.sum(b_sum) / numel)


def squared_errors(output, target):
    experiments, numel = len(output), output[0].numel()
    blocks = triton.cdiv(numel, BLOCK)
    sums, errors = output.new_empty(experiments, blocks), output.new_empty(experiments)
    stride = numel if len(target) > 1 else 0
    _block_kernel[(blocks, experiments)](output, target, sums, numel, stride, BLOCK=BLOCK, num_warps=8)
    _join_kernel[(experiments,)](sums, errors, numel, blocks, JOINED=JOINED)
    return errors
