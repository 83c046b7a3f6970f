"""How the convolutions read an image: padding, ×2 up-sampling and 2×2 means by index, and loads on the way in.

Nothing that an index can express is ever written to memory. The codes are those of the operators' schemas: MODE 0
zeros, 1 reflect, 2 replicate; UPSAMPLE 0 none, 1 nearest, 2 bilinear (corners not aligned).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as the integers that it keeps them in; products of rounded floats are the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Geometry:
    """What happens around the multiplications: [2×2 mean ·] pad · [up-sample] · x, read with stride and kernel size."""

    kernel_h: int
    kernel_w: int
    stride: int
    padding: int
    mode: int
    upsample: int
    box: bool

    @classmethod
    def of(cls, kernel: tuple[int, int], stride, padding, mode, upsample, pool) -> Geometry:
        """With the pool folded, a stride of 2 over the 2×2 means; a pool behind a stride of 2 cannot be folded."""
        box = pool and stride == 1
        return cls(*kernel, 2 if box else stride, padding, mode if padding else 0, upsample, box)

    @property
    def scale(self) -> int:
        return 2 if self.upsample else 1

    @property
    def gathers(self) -> int:
        """How many pixels one element is made of."""
        return (4 if self.box else 1) * (4 if self.upsample == 2 else 1)

    @property
    def summed(self) -> bool:
        """Whether the input's gradient can be had on the small image: the 2×2 pixels of each then share 16 taps.

        Padding of one up-sampled pixel repeats the small image's border, reflected as well as replicated.
        """
        return self.upsample == 1 and self.stride == self.padding == 1 and self.kernel_h == self.kernel_w == 3

    def plane(self, length: int) -> int:
        """Side of what the kernel slides over."""
        return length * self.scale + 2 * self.padding - self.box

    def output(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width of the convolution of x."""
        sizes = zip(x.shape[2:], (self.kernel_h, self.kernel_w), strict=True)
        return tuple((self.plane(length) - kernel) // self.stride + 1 for length, kernel in sizes)

    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {
            "KERNEL_H": self.kernel_h,
            "KERNEL_W": self.kernel_w,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "MODE": self.mode,
            "UPSAMPLE": self.upsample,
            "BOX": self.box,
        }


@triton.jit
def _inside(o_index, length, MODE: tl.constexpr):
    """Where the padding takes its value from, and whether it has one: always, but for zeros."""
    m_index = o_index == o_index
    if MODE == 0:
        m_index = (o_index >= 0) & (o_index < length)
    elif MODE == 1:
        o_index = tl.abs(o_index)
        o_index = tl.minimum(o_index, 2 * (length - 1) - o_index)
    # Pixels beyond the output, which are never stored, may point anywhere.
    return tl.minimum(tl.maximum(o_index, 0), length - 1), m_index


@triton.jit
def _load_seen(p_image, m_load, o_pixel, b_load, LOAD: tl.constexpr):
    """Values as a reader sees them, 0 where the padding is."""
    b_value = tl.load(p_image + o_pixel, mask=m_load, other=0.0)
    if LOAD:
        b_factor, b_shift, b_slope, b_factor2, b_shift2 = b_load
        b_value = b_value * b_factor + b_shift
        # Padding with zeros comes behind the load.
        b_value = tl.where(m_load, tl.where(b_value > 0, b_value, b_slope * b_value) * b_factor2 + b_shift2, 0.0)
    return b_value


@triton.jit
def _load_large(
    p_image, m_image, o_y, o_x, b_load, height, width,
    MODE: tl.constexpr, UPSAMPLE: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """One value of the padded, up-sampled image."""
    SCALE: tl.constexpr = 2 if UPSAMPLE else 1
    o_y, m_y = _inside(o_y, SCALE * height, MODE)
    o_x, m_x = _inside(o_x, SCALE * width, MODE)
    m_load = m_image & m_y & m_x
    if UPSAMPLE == 2:
        # Between two small pixels, a quarter of the way from the nearer one; the image's border repeats.
        o_top = tl.maximum((o_y + 1) // 2 - 1, 0) * width
        o_bottom = tl.minimum((o_y + 1) // 2, height - 1) * width
        o_left = tl.maximum((o_x + 1) // 2 - 1, 0)
        o_right = tl.minimum((o_x + 1) // 2, width - 1)
        b_down = 0.75 - 0.5 * (o_y % 2).to(tl.float32)
        b_right = 0.75 - 0.5 * (o_x % 2).to(tl.float32)
        b_0 = _load_seen(p_image, m_load, o_top + o_left, b_load, LOAD)
        b_1 = _load_seen(p_image, m_load, o_top + o_right, b_load, LOAD)
        b_2 = _load_seen(p_image, m_load, o_bottom + o_left, b_load, LOAD)
        b_3 = _load_seen(p_image, m_load, o_bottom + o_right, b_load, LOAD)
        b_upper = b_0 + (b_1 - b_0) * b_right
        b_value = b_upper + (b_2 + (b_3 - b_2) * b_right - b_upper) * b_down
    else:
        o_pixel = (o_y // SCALE) * width + o_x // SCALE
        b_value = _load_seen(p_image, m_load, o_pixel, b_load, LOAD)
    return b_value


@triton.jit
def load_image(
    p_image,  # pointers to channels' images, which broadcast against the positions
    m_image,  # which of them and of the positions are there
    o_y,  # rows and columns of the padded image, less the padding
    o_x,
    p_load,  # pointers to the channels' loads, five numbers each, or anything where not LOAD
    m_channel,  # which of these are there
    height,
    width,
    MODE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BOX: tl.constexpr,
    LOAD: tl.constexpr,
):
    """Values of [2×2 mean ·] pad · [up-sample ·] [load ·] x; of loads see `sparse_gen.ops.norm_load`."""
    b_load = (1.0, 0.0, 1.0, 1.0, 0.0)
    if LOAD:
        b_load = (
            tl.load(p_load, mask=m_channel, other=0.0),
            tl.load(p_load + 1, mask=m_channel, other=0.0),
            tl.load(p_load + 2, mask=m_channel, other=0.0),
            tl.load(p_load + 3, mask=m_channel, other=0.0),
            tl.load(p_load + 4, mask=m_channel, other=0.0),
        )
    b_value = _load_large(p_image, m_image, o_y, o_x, b_load, height, width, MODE, UPSAMPLE, LOAD)
    if BOX:
        b_value += _load_large(p_image, m_image, o_y, o_x + 1, b_load, height, width, MODE, UPSAMPLE, LOAD)
        b_value += _load_large(p_image, m_image, o_y + 1, o_x, b_load, height, width, MODE, UPSAMPLE, LOAD)
        b_value += _load_large(p_image, m_image, o_y + 1, o_x + 1, b_load, height, width, MODE, UPSAMPLE, LOAD)
        b_value *= 0.25
    return b_value


@triton.jit
def multiply(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a · b_b in "ieee", "tf32" or "bf16"; the sum is float32."""
    if PRECISION == "bf16" and INTERPRETED:
        b_sum = tl.dot(b_a.to(tl.bfloat16).to(tl.float32), b_b.to(tl.bfloat16).to(tl.float32), b_sum)
    elif PRECISION == "bf16":
        b_sum = tl.dot(b_a.to(tl.bfloat16), b_b.to(tl.bfloat16), b_sum)
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    return b_sum
