"""Tiles of the matrix products, and how a long sum is split over programs and added up again without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The programs that keep an H100's or H200's 132 multiprocessors busy.
PROGRAMS = 132
# A shorter split would cost more in adding the parts than it gains (a choice, not yet a measurement).
MIN_ITERATIONS = 8


@triton.jit
def column_moments(b_value, m_value, count):
    """Mean and sum of squared deviations down the columns of a tile, whose first `count` rows are there."""
    b_mean = tl.sum(tl.where(m_value, b_value, 0.0), axis=0) / count
    b_deviation = tl.where(m_value, b_value - b_mean[None, :], 0.0)
    return b_mean, tl.sum(b_deviation * b_deviation, axis=0)


@triton.jit
def _add_splits_kernel(
    p_parts,  # pointer to the splits' parts, shape (splits, rows, numel)
    p_bias,  # pointer to a bias a row, shape (rows,); not read unless BIAS
    p_out,  # pointer to output, shape (rows, numel)
    p_moments,  # pointer to output, shape (rows, blocks, 2); not written unless MOMENTS
    rows,
    numel,
    splits,
    BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_out = tl.zeros([BLOCK], tl.float32)
    for i_split in range(splits):
        b_out += tl.load(p_parts + (i_split * rows + i_row) * numel + o_index, mask=m_index, other=0.0)
    if BIAS:
        b_out += tl.load(p_bias + i_row)
    if MOMENTS:
        mean = tl.sum(tl.where(m_index, b_out, 0.0)) / tl.minimum(numel - i_block * BLOCK, BLOCK)
        b_deviation = tl.where(m_index, b_out - mean, 0.0)
        p_pair = p_moments + 2 * (i_row * tl.num_programs(1) + i_block)
        tl.store(p_pair, mean)
        tl.store(p_pair + 1, tl.sum(b_deviation * b_deviation))
    tl.store(p_out + i_row * numel + o_index, b_out, mask=m_index)


def precision_of_torch() -> str:
    """What PyTorch's own convolutions would use: "tf32" unless it was turned off."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def tile(rows: int, columns: int, depth: int, precision: str, gathers: int = 1) -> dict[str, int]:
    """Block sizes and launch options of a product of rows × depth × columns, each element gathered so many times.

    Registers decide, as the compiler for sm_90 counts them: at these sizes nothing spills.
    """
    if precision == "ieee":
        # Without tensor cores both operands go through registers.
        options = {"num_warps": 4 if gathers <= 4 else 8, "num_stages": 2 if gathers == 1 else 1}
        return {"BLOCK_P": 64, "BLOCK_N": 32, "BLOCK_K": 16, **options}
    return {
        "BLOCK_P": 64 if rows <= 64 or gathers > 4 else 128,
        "BLOCK_N": min(max(triton.next_power_of_2(columns), 16), 64),
        "BLOCK_K": 16 if depth <= 16 or gathers > 1 else 32,
        "num_warps": 8,
        # Staged in shared memory, 4 or 16 gathers of one element would take as many tiles.
        "num_stages": 3 if gathers == 1 else 1,
    }


def split(programs: int, total: int) -> tuple[int, int]:
    """How many splits a loop of `total` iterations gets, and iterations a split.

    Shapes of one experiment alone decide, so that it has the same bits alone and beside others.
    """
    total = max(total, 1)
    # Rounded down: 128 programs in two splits each would take two rounds, and then have to be added.
    iterations = max(triton.cdiv(total, max(PROGRAMS // max(programs, 1), 1)), min(total, MIN_ITERATIONS))
    return triton.cdiv(total, iterations), iterations


def add_splits(parts, bias=None, moments=None, block=1024):
    """Sum over the first axis of (splits, E, rows, numel) parts, plus a bias a row."""
    splits, experiments, rows, numel = parts.shape
    out = parts.new_empty(experiments, rows, numel)
    _add_splits_kernel[experiments * rows, triton.cdiv(numel, block)](
        parts, parts if bias is None else bias, out, parts if moments is None else moments,
        experiments * rows, numel, splits, BIAS=bias is not None, MOMENTS=moments is not None, BLOCK=block,
    )  # fmt: skip
    return out
