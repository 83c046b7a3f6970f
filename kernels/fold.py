"""The gradient of what a convolution slides over, carried back to the image: 2×2 means, padding, up-sampling.

As gathers: every pixel adds up those of the plane that read it, and the parts into which their sum was split.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from sparse_gen.kernels.gather import Geometry
from sparse_gen.kernels.splits import add_splits


@triton.jit
def fold_tile(
    p_plane,  # pointer to the first part of a row's gradient, shape (plane_h, plane_w)
    part,  # numbers from a part to the next
    p_place_y,  # pointers to what `_readers` gives for the rows, shape (most readers, height)
    p_weight_y,
    p_count_y,  # shape (height,)
    p_place_x,  # and for the columns
    p_weight_x,
    p_count_x,
    o_y,  # rows and columns of the image
    o_x,
    height,
    width,
    plane_w,
    parts,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The gradient of a tile of a row's image."""
    m_y = o_y < height
    m_x = o_x < width
    # Away from the border few pixels read one; only programs at the border go on to the others.
    count_y = tl.max(tl.load(p_count_y + o_y, mask=m_y, other=0))
    count_x = tl.max(tl.load(p_count_x + o_x, mask=m_x, other=0))
    b_grad = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for i_y in range(count_y):
        o_place_y = tl.load(p_place_y + i_y * height + o_y, mask=m_y, other=0)
        b_weight_y = tl.load(p_weight_y + i_y * height + o_y, mask=m_y, other=0.0)
        for i_x in range(count_x):
            o_place_x = tl.load(p_place_x + i_x * width + o_x, mask=m_x, other=0)
            b_weight_x = tl.load(p_weight_x + i_x * width + o_x, mask=m_x, other=0.0)
            b_weight = b_weight_y[:, None] * b_weight_x[None, :]
            p_place = p_plane + o_place_y[:, None] * plane_w + o_place_x[None, :]
            for i_part in range(parts):
                b_grad += b_weight * tl.load(p_place + i_part * part, mask=b_weight > 0, other=0.0)
    return b_grad


@triton.jit
def read_folded(
    p_plane, part, tables, o_index, m_index, height, width, plane_w, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """What `fold_tile` gives, for pixels in a row of memory."""
    p_place_y, p_weight_y, p_count_y, p_place_x, p_weight_x, p_count_x = tables
    o_y = o_index // width
    o_x = o_index % width
    count_y = tl.max(tl.load(p_count_y + o_y, mask=m_index, other=0))
    count_x = tl.max(tl.load(p_count_x + o_x, mask=m_index, other=0))
    b_grad = tl.zeros([BLOCK], tl.float32)
    for i_y in range(count_y):
        o_place_y = tl.load(p_place_y + i_y * height + o_y, mask=m_index, other=0) * plane_w
        b_weight_y = tl.load(p_weight_y + i_y * height + o_y, mask=m_index, other=0.0)
        for i_x in range(count_x):
            o_place = o_place_y + tl.load(p_place_x + i_x * width + o_x, mask=m_index, other=0)
            b_weight = b_weight_y * tl.load(p_weight_x + i_x * width + o_x, mask=m_index, other=0.0)
            for i_part in range(parts):
                b_grad += b_weight * tl.load(p_plane + i_part * part + o_place, mask=b_weight > 0, other=0.0)
    return b_grad


@triton.jit
def _fold_kernel(
    p_plane,  # pointer to the parts of the plane's gradient, shape (parts, rows, plane_h, plane_w)
    p_grad_x,  # pointer to output, shape (rows, height, width)
    p_place_y,  # see `fold_tile`
    p_weight_y,
    p_count_y,
    p_place_x,
    p_weight_x,
    p_count_x,
    height,
    width,
    plane_h,
    plane_w,
    parts,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_y = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_x = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    b_grad = fold_tile(
        p_plane + i_row * plane_h * plane_w, tl.num_programs(0) * plane_h * plane_w,
        p_place_y, p_weight_y, p_count_y, p_place_x, p_weight_x, p_count_x,
        o_y, o_x, height, width, plane_w, parts, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    p_grad_x += i_row * height * width
    m_pixel = (o_y < height)[:, None] & (o_x < width)[None, :]
    tl.store(p_grad_x + o_y[:, None] * width + o_x[None, :], b_grad, mask=m_pixel)


def plane_of(geometry: Geometry, shape) -> tuple[int, int, int]:
    """Height and width of the plane that is wanted, and rows and columns of the padding that are not.

    Of an image padded with zeros only the inside is wanted. Where `summed`, it is the small image's, with rows and
    columns around it that are not in the image: a negative number.
    """
    if geometry.summed:
        border = 1 if geometry.mode else 0
        return shape[2] + 2 * border, shape[3] + 2 * border, -border
    offset = 0 if geometry.mode or geometry.box else geometry.padding
    return *(geometry.plane(length) - 2 * offset for length in shape[2:]), offset


@lru_cache(maxsize=256)
def _readers(length: int, padding: int, mode: int, upsample: int, box: bool, device: torch.device):
    """Along one axis, who reads each pixel: places in the plane, weights, and how many; both axes do alike.

    Returns:
        Places, (most, length) int32, and weights, (most, length), 0 beyond the count, and counts, (length,) int32.
    """
    large = torch.arange(length * (2 if upsample else 1), dtype=torch.float64)
    pad = {"mode": "constant", "value": -1} if mode == 0 else {"mode": ("reflect", "replicate")[mode - 1]}
    source = F.pad(large[None, None], [padding] * 2, **pad)[0, 0].long() if padding else large.long()
    place = torch.arange(len(source))
    if box:
        source, place = torch.cat([source[:-1], source[1:]]), place[:-1].repeat(2)
    place, source = place[source >= 0], source[source >= 0]
    weight = torch.full(source.shape, 0.5 if box else 1.0)
    if upsample == 1:
        source = source // 2
    elif upsample == 2:
        above = torch.cat([(source + 1) // 2 - 1, (source + 1) // 2]).clamp(0, length - 1)
        below = 0.75 - 0.5 * (source % 2)
        source, place, weight = above, place.repeat(2), weight.repeat(2) * torch.cat([1 - below, below])
    pairs = torch.sparse_coo_tensor(torch.stack([source, place]), weight, check_invariants=True).coalesce()
    source, place = pairs.indices()
    counts = torch.bincount(source, minlength=length)
    rank = torch.arange(len(source)) - (counts.cumsum(0) - counts)[source]
    places = torch.zeros(int(counts.max()), length, dtype=torch.int32)
    weights = torch.zeros(places.shape)
    places[rank, source], weights[rank, source] = place.int(), pairs.values().float()
    return places.to(device), weights.to(device), counts.int().to(device)


def reader_tables(geometry: Geometry, shape, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`_readers` of the rows and of the columns of an image of this shape."""
    offset = plane_of(geometry, shape)[2]
    if geometry.summed:
        steps = -offset, 2 if geometry.mode else 0, 0, False, device
    else:
        steps = geometry.padding - offset, geometry.mode, geometry.upsample, geometry.box, device
    return *_readers(shape[2], *steps), *_readers(shape[3], *steps)


def fold(parts, geometry: Geometry, shape):
    """Carry the gradient of `plane_of`'s plane back through 2×2 means, padding and up-sampling.

    Args:
        parts: of the plane's gradient, (splits, E, channels, plane_h · plane_w).
        geometry: the forward's.
        shape: of the image, (E, channels, H, W).
    """
    experiments, channels, height, width = shape
    plane_h, plane_w, _ = plane_of(geometry, shape)
    if (plane_h, plane_w) == (height, width):
        return (parts[0] if len(parts) == 1 else add_splits(parts)).view(shape)
    block_w = min(triton.next_power_of_2(width), 64)
    block_h = min(triton.next_power_of_2(height), 1024 // block_w)
    grad_x = parts.new_empty(shape)
    _fold_kernel[experiments * channels, triton.cdiv(height, block_h), triton.cdiv(width, block_w)](
        parts, grad_x, *reader_tables(geometry, shape, parts.device), height, width, plane_h, plane_w, len(parts),
        BLOCK_H=block_h, BLOCK_W=block_w,
    )  # fmt: skip
    return grad_x
