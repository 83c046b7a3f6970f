"""Gradients of `masked_conv2d`, as gathers.

That of the image is a product of matrices onto the plane that the kernel slides over, and, where that plane is not the
image itself, a second kernel that carries it back through 2×2 means, padding and up-sampling.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from sparse_gen.kernels.gather import Geometry, load_image, multiply
from sparse_gen.kernels.splits import add_splits, split, tile


@triton.jit
def _plane_gradient_kernel(
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h, out_w)
    p_weight,  # pointer to weights, shape (E, out_channels, channels, KERNEL_H, KERNEL_W)
    p_plane,  # pointer to output, shape (splits, E, channels, plane_h, plane_w)
    experiments,
    channels,
    plane_h,
    plane_w,
    out_channels,
    out_h,
    out_w,
    iterations,  # of the loop over blocks of output channels and taps that a split does
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,  # rows and columns of the padded plane before this one, which are not wanted
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # output channels
):
    i_pixel = tl.program_id(0)
    # Pixels of one phase of the stride see the same taps, one in stride².
    i_phase = tl.program_id(1) % (STRIDE * STRIDE)
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    first_y = i_phase // STRIDE
    first_x = i_phase % STRIDE
    columns = (plane_w - first_x + STRIDE - 1) // STRIDE
    pixels = (plane_h - first_y + STRIDE - 1) // STRIDE * columns
    o_pixel = i_pixel * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pixel = o_pixel < pixels
    o_row = o_pixel // tl.maximum(columns, 1)
    o_column = o_pixel % tl.maximum(columns, 1)
    tap_y = (first_y + OFFSET) % STRIDE
    tap_x = (first_x + OFFSET) % STRIDE
    taps_x = (KERNEL_W - tap_x + STRIDE - 1) // STRIDE
    taps = (KERNEL_H - tap_y + STRIDE - 1) // STRIDE * taps_x
    o_y = o_row + (first_y + OFFSET) // STRIDE
    o_x = o_column + (first_x + OFFSET) // STRIDE
    o_channel = tl.program_id(1) // (STRIDE * STRIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_channel = o_channel < channels
    p_grad_out += i_experiment * out_channels * out_h * out_w
    p_weight += i_experiment * out_channels * channels * (KERNEL_H * KERNEL_W)
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(out_channels, BLOCK_K) * taps)

    b_plane = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(i_split * iterations, last):
        i_y = i % taps // taps_x
        i_x = i % taps % taps_x
        o_out = i // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        m_out = o_out < out_channels
        m_seen = m_pixel & (o_y >= i_y) & (o_y - i_y < out_h) & (o_x >= i_x) & (o_x - i_x < out_w)
        b_grad = tl.load(
            p_grad_out + o_out[None, :] * (out_h * out_w) + ((o_y - i_y) * out_w + o_x - i_x)[:, None],
            mask=m_seen[:, None] & m_out[None, :],
            other=0.0,
        )
        i_tap = (tap_y + STRIDE * i_y) * KERNEL_W + tap_x + STRIDE * i_x
        b_weight = tl.load(
            p_weight + (o_out[:, None] * channels + o_channel[None, :]) * (KERNEL_H * KERNEL_W) + i_tap,
            mask=m_out[:, None] & m_channel[None, :],
            other=0.0,
        )
        b_plane = multiply(b_grad, b_weight, b_plane, PRECISION)

    o_place = (first_y + STRIDE * o_row) * plane_w + first_x + STRIDE * o_column
    p_plane += (i_split * experiments + i_experiment) * channels * plane_h * plane_w
    tl.store(
        p_plane + o_channel[None, :] * (plane_h * plane_w) + o_place[:, None],
        b_plane,
        mask=m_pixel[:, None] & m_channel[None, :],
    )


@triton.jit
def _fold_kernel(
    p_plane,  # pointer to the plane's gradient, shape (rows, plane_h, plane_w)
    p_grad_x,  # pointer to output, shape (rows, height, width)
    p_place_y,  # pointers to what `_readers` gives for the rows, shape (most readers, height)
    p_weight_y,
    p_count_y,  # shape (height,)
    p_place_x,  # and for the columns
    p_weight_x,
    p_count_x,
    height,
    width,
    plane_h,
    plane_w,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_y = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_x = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_y = o_y < height
    m_x = o_x < width
    # Away from the border few pixels read one; only programs at the border go on to the others.
    count_y = tl.max(tl.load(p_count_y + o_y, mask=m_y, other=0))
    count_x = tl.max(tl.load(p_count_x + o_x, mask=m_x, other=0))
    p_plane += i_row * plane_h * plane_w
    b_grad = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for i_y in range(count_y):
        o_place_y = tl.load(p_place_y + i_y * height + o_y, mask=m_y, other=0)
        b_weight_y = tl.load(p_weight_y + i_y * height + o_y, mask=m_y, other=0.0)
        for i_x in range(count_x):
            o_place_x = tl.load(p_place_x + i_x * width + o_x, mask=m_x, other=0)
            b_weight_x = tl.load(p_weight_x + i_x * width + o_x, mask=m_x, other=0.0)
            b_weight = b_weight_y[:, None] * b_weight_x[None, :]
            b_plane = tl.load(p_plane + o_place_y[:, None] * plane_w + o_place_x[None, :], mask=b_weight > 0, other=0.0)
            b_grad += b_weight * b_plane
    p_grad_x += i_row * height * width
    tl.store(p_grad_x + o_y[:, None] * width + o_x[None, :], b_grad, mask=m_y[:, None] & m_x[None, :])


@triton.jit
def _weight_gradient_kernel(
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h * out_w)
    p_x,  # pointer to x, shape (E, channels, height, width)
    p_load,  # pointer to loads, shape (E, channels, 5); not read unless LOAD
    p_grad_weight,  # pointer to output, shape (splits, E, out_channels, channels, KERNEL_H * KERNEL_W)
    experiments,
    channels,
    height,
    width,
    out_channels,
    out_h,
    out_w,
    iterations,  # of the loop over blocks of pixels that a split does
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BOX: tl.constexpr,
    LOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # channels: the rows of the product
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # pixels
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_tap = tl.program_id(0) % TAPS
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    o_channel = tl.program_id(0) // TAPS * BLOCK_P + tl.arange(0, BLOCK_P)
    m_channel = o_channel < channels
    o_out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out = o_out < out_channels
    pixels = out_h * out_w
    p_grad_out += i_experiment * out_channels * pixels
    p_x += i_experiment * channels * height * width
    p_load += 5 * i_experiment * channels
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(pixels, BLOCK_K))

    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(i_split * iterations, last):
        o_pixel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        m_pixel = o_pixel < pixels
        b_x = load_image(
            p_x + o_channel[:, None] * (height * width),
            m_channel[:, None] & m_pixel[None, :],
            (o_pixel // out_w * STRIDE - PADDING + i_tap // KERNEL_W)[None, :],
            (o_pixel % out_w * STRIDE - PADDING + i_tap % KERNEL_W)[None, :],
            p_load + 5 * o_channel[:, None],
            m_channel[:, None],
            height,
            width,
            MODE,
            UPSAMPLE,
            BOX,
            LOAD,
        )
        b_grad = tl.load(
            p_grad_out + o_out[None, :] * pixels + o_pixel[:, None], mask=m_pixel[:, None] & m_out[None, :], other=0.0
        )
        b_sum = multiply(b_x, b_grad, b_sum, PRECISION)

    p_grad_weight += (i_split * experiments + i_experiment) * out_channels * channels * TAPS
    tl.store(
        p_grad_weight + (o_out[None, :] * channels + o_channel[:, None]) * TAPS + i_tap,
        b_sum,
        mask=m_channel[:, None] & m_out[None, :],
    )


def input_gradient(grad_out, weight, geometry: Geometry, shape, precision="tf32"):
    """Gradient by the image that the convolution saw: behind BN and LeakyReLU, where those were applied on load.

    Args:
        grad_out: (E, out, H', W').
        weight: (E, out, channels, kernel_h, kernel_w).
        geometry: the forward's.
        shape: of x, (E, channels, H, W).
        precision: "ieee", "tf32" or "bf16".
    """
    experiments, channels = shape[:2]
    out_channels, stride = weight.shape[1], geometry.stride
    plane_h, plane_w, offset = plane_of(geometry, shape)
    phase = triton.cdiv(plane_h, stride) * triton.cdiv(plane_w, stride)
    blocks = tile(phase, channels, out_channels, precision)
    grid = triton.cdiv(phase, blocks["BLOCK_P"]), triton.cdiv(channels, blocks["BLOCK_N"]) * stride**2
    taps = triton.cdiv(geometry.kernel_h, stride) * triton.cdiv(geometry.kernel_w, stride)
    splits, iterations = split(grid[0] * grid[1], triton.cdiv(out_channels, blocks["BLOCK_K"]) * taps)
    parts = grad_out.new_empty(splits, experiments, channels, plane_h * plane_w)
    _plane_gradient_kernel[(*grid, experiments * splits)](
        grad_out, weight, parts, experiments, channels, plane_h, plane_w, out_channels, *grad_out.shape[2:],
        iterations, KERNEL_H=geometry.kernel_h, KERNEL_W=geometry.kernel_w, STRIDE=stride, OFFSET=offset,
        PRECISION=precision, **blocks,
    )  # fmt: skip
    return fold(parts[0] if splits == 1 else add_splits(parts), geometry, shape)


def plane_of(geometry: Geometry, shape) -> tuple[int, int, int]:
    """Height and width of the plane that is wanted, and rows and columns of the padding that are not.

    Of an image padded with zeros only the inside is wanted.
    """
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


def fold(plane, geometry: Geometry, shape):
    """Carry the gradient of `plane_of`'s plane back through 2×2 means, padding and up-sampling."""
    experiments, channels, height, width = shape
    plane_h, plane_w, offset = plane_of(geometry, shape)
    if not (geometry.upsample or geometry.mode or geometry.box):
        return plane.view(shape)
    block_w = min(triton.next_power_of_2(width), 64)
    block_h = min(triton.next_power_of_2(height), 1024 // block_w)
    steps = geometry.padding - offset, geometry.mode, geometry.upsample, geometry.box, plane.device
    grad_x = plane.new_empty(shape)
    _fold_kernel[experiments * channels, triton.cdiv(height, block_h), triton.cdiv(width, block_w)](
        plane, grad_x, *_readers(height, *steps), *_readers(width, *steps), height, width, plane_h, plane_w,
        BLOCK_H=block_h, BLOCK_W=block_w,
    )  # fmt: skip
    return grad_x


def weight_gradient(grad_out, x, geometry: Geometry, *, load=None, precision="tf32"):
    """Gradient by the weight; x and load are the forward's."""
    experiments, out_channels = grad_out.shape[:2]
    channels, (height, width) = x.shape[1], grad_out.shape[2:]
    taps = geometry.kernel_h * geometry.kernel_w
    # 64 rows at least: tensor cores of sm_90 take no fewer.
    blocks = tile(64, out_channels, height * width, precision, geometry.gathers)
    grid = triton.cdiv(channels, blocks["BLOCK_P"]) * taps, triton.cdiv(out_channels, blocks["BLOCK_N"])
    splits, iterations = split(grid[0] * grid[1], triton.cdiv(height * width, blocks["BLOCK_K"]))
    parts = x.new_empty(splits, experiments, out_channels, channels * taps)
    _weight_gradient_kernel[(*grid, experiments * splits)](
        grad_out, x, x if load is None else load, parts, experiments, channels, *x.shape[2:],
        out_channels, height, width, iterations, **geometry.constants(), LOAD=load is not None,
        PRECISION=precision, **blocks,
    )  # fmt: skip
    grad_weight = parts[0] if splits == 1 else add_splits(parts)
    return grad_weight.view(experiments, out_channels, channels, geometry.kernel_h, geometry.kernel_w)
