"""The ways to compute `masked_conv2d`, each with its backward pass; every one gives the same result."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from sparse_gen.ops import convolution
from sparse_gen.ops.convolution import TORCH_MODES
from sparse_gen.ops.extension import status

UPSAMPLE = convolution.UPSAMPLE[:3]  # bilinear with its corners aligned is left to PyTorch
LAYOUTS = ("auto", "direct", "taps", "phase", "gemm", "tiles", "split", "split taps")

aten = torch.ops.aten


def why_not(layout: str, weight_shape, stride: int, padding: int, mode: int, upsample: int, pool: bool) -> str | None:
    """What a layout is for, if this is not that; None if it can do it. Shape with E, mode and upsample as places."""
    *_, kernel_h, kernel_w = weight_shape
    same_size = upsample and not pool and stride == 1 and kernel_h == kernel_w == 2 * padding + 1
    if layout in ("taps", "split taps") and not (same_size and kernel_h <= 11):
        return "up-sampling and a square odd kernel up to 11 with half its size as padding"
    if layout == "phase" and not (same_size and upsample == 1 and kernel_h == 3):
        return "nearest up-sampling and a 3×3 kernel with padding 1"
    if layout in ("tiles", "split") and (upsample or (pool and stride == 2) or kernel_h * kernel_w > 121):
        return "a kernel of up to 121 weights without up-sampling, a pool with stride 1 only"
    if layout.startswith("split") and status().instruction_set != "amx":
        return "processors with AMX tiles of bfloat16"
    return None


def layout_for(x, weight, stride, padding, mode, upsample, pool, layout) -> SimpleNamespace:
    """The forward and backward of a layout; for "auto", of the one that measured fastest for such shapes."""
    name = LAYOUTS[layout]
    if name == "auto":
        name = fastest_layout(x.shape[2:], weight.shape, stride, padding, mode, upsample, pool)
    return _RUN[name]


# Measured on the hourglass's layers at 256² and 512² (two cores with AVX-512), forward and backward together: "taps"
# is 1.9 to 13 times faster than oneDNN on the up-sampled image; "tiles" wins with a stride of 2 (up to 2×) and on large
# images, oneDNN where many channels meet a small image, "gemm" for 1×1 and for a few pixels. With AMX, "split" is up to
# twice as fast as the best of them, "split taps" by a fifth on large images.
def fastest_layout(size, shape, stride: int, padding: int, mode: int, upsample: int, pool: bool) -> str:
    """What "auto" is for an input of this height and width and a weight of this shape, E in front."""

    def can(layout):
        return why_not(layout, shape, stride, padding, mode, upsample, pool) is None

    if can("taps"):
        return "split taps" if size[0] * size[1] >= 64 * 64 and can("split taps") else "taps"
    pixels = size[0] * size[1] // (4 if pool or stride == 2 else 1)
    if upsample or (pool and stride == 2):
        return "direct"
    if shape[3:] == (1, 1) or pixels <= 16:
        return "gemm"
    if can("split"):
        return "split"
    large = pixels >= 128 * 128 or ((pool or stride == 2) and shape[1] <= 64)
    return "tiles" if large and can("tiles") else "direct"


def pad(x: torch.Tensor, padding: int, mode: int) -> torch.Tensor:
    return F.pad(x, [padding] * 4, mode=TORCH_MODES[mode]) if padding else x


def pooled_means(x: torch.Tensor, padding: int, mode: int) -> torch.Tensor:
    """The 2×2 means of padded x at every position: a convolution of stride 2 on them is the convolution of x, pooled.

    Args:
        x: (E, C, H, W).
        padding: pixels on every side.
        mode: place in PADDING_MODES.

    Returns:
        (E, C, H + 2 · padding − 1, W + 2 · padding − 1). For an x that stays, they can be kept.
    """
    return torch.ops.sparse_gen.pooled_means(x.contiguous(), None, padding, mode)


def _pad_backward(grad, x, padding, mode):
    if padding == 0:
        return grad
    if mode == 0:
        return grad[..., padding:-padding, padding:-padding]
    backward = aten.reflection_pad2d_backward if mode == 1 else aten.replication_pad2d_backward
    return backward(grad.contiguous(), x, [padding] * 4)


def _upsample_backward(grad, x, upsample):
    size = [2 * n for n in x.shape[2:]]
    if upsample == 1:
        return aten.upsample_nearest2d_backward(grad.contiguous(), size, list(x.shape), 2.0, 2.0)
    return aten.upsample_bilinear2d_backward(grad.contiguous(), size, list(x.shape), False, 2.0, 2.0)


# Folded, a pool leaves a convolution of stride 2 without padding. Returns what is convolved, its stride and padding.
def _prepare(x, stride, padding, mode, upsample, pool):
    large = F.interpolate(x, scale_factor=2, mode=UPSAMPLE[upsample]) if upsample else x
    if pool and stride == 1:
        return large, pooled_means(large, padding, mode), 2, 0
    if mode == 0:
        return large, large, stride, padding
    return large, pad(large, padding, mode), stride, 0


# The same as shapes: that is all of x on which its gradient depends.
def _unfilled(x, stride, padding, mode, upsample, pool):
    pooled, padded = pool and stride == 1, mode != 0
    scale, margin = 2 if upsample else 1, 2 * padding - pooled if pooled or padded else 0
    large, prepared = (x.new_empty(*x.shape[:2], *(scale * n + m for n in x.shape[2:])) for m in (0, margin))
    return large, prepared, 2 if pooled else stride, 0 if pooled or padded else padding


def _unprepare(grad, large, x, stride, padding, mode, upsample, pool):
    if pool and stride == 1:
        grad = torch.ops.sparse_gen.pooled_means_backward(grad.contiguous(), padding, mode)
    elif mode != 0:
        grad = _pad_backward(grad, large, padding, mode)
    return _upsample_backward(grad, x, upsample) if upsample else grad


# A pool behind a convolution of stride 2 cannot be folded.
def _unpool(grad_out, convolved_size):
    like = grad_out.new_empty(*grad_out.shape[:2], *convolved_size)
    return aten.avg_pool2d_backward(grad_out, like, [2, 2], [2, 2], [0, 0], False, True, None)


def _convolved_size(prepared, weight, stride, padding):
    sizes = zip(prepared.shape[2:], weight.shape[3:], strict=True)
    return [(n + 2 * padding - k) // stride + 1 for n, k in sizes]


def _convolution_layout(convolve, convolve_backward) -> SimpleNamespace:
    """A layout that convolves the prepared images of all experiments."""

    def forward(x, weight, bias, stride, padding, mode, upsample, pool):
        _, prepared, step, left = _prepare(x, stride, padding, mode, upsample, pool)
        out = convolve(prepared, weight, bias, step, left)
        return F.avg_pool2d(out, 2) if pool and stride == 2 else out

    def backward(grad_out, x, weight, stride, padding, mode, upsample, pool, needs_x, needs_weight):
        prepare = _prepare if needs_weight else _unfilled
        large, prepared, step, left = prepare(x, stride, padding, mode, upsample, pool)
        if pool and stride == 2:
            grad_out = _unpool(grad_out, _convolved_size(prepared, weight, step, left))
        grad_x, grad_weight = convolve_backward(grad_out, prepared, weight, step, left, needs_x, needs_weight)
        empty = x.new_empty(0)
        if needs_x:
            grad_x = _unprepare(grad_x, large, x, stride, padding, mode, upsample, pool).contiguous()
        return grad_x if needs_x else empty, grad_weight if needs_weight else empty

    return SimpleNamespace(forward=forward, backward=backward)


def _one_by_one(convolve):
    """A convolution (E, …) from that of one experiment."""

    def run(x, weight, bias, stride, padding):
        biases = [None] * len(x) if bias is None else bias
        parts = [convolve(x[e : e + 1], weight[e], biases[e], stride, padding) for e in range(len(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return run


def _one_by_one_backward(convolve_backward):
    """The gradients by x and weight, None where not needed, from those of one experiment."""

    def run(grad_out, x, weight, stride, padding, needs_x, needs_weight):
        grads = [
            convolve_backward(grad_out[e : e + 1], x[e : e + 1], weight[e], stride, padding, needs_x, needs_weight)
            for e in range(len(x))
        ]
        grads_x, grads_weight = zip(*grads, strict=True)
        grad_x = None
        if needs_x:
            grad_x = grads_x[0] if len(x) == 1 else torch.cat(grads_x)
        return grad_x, _stacked(grads_weight) if needs_weight else None

    return run


def _stacked(rows):
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _plain(x, weight, bias, stride, padding):
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _plain_backward(grad_out, x, weight, stride, padding, needs_x, needs_weight, groups=1):
    needs = [needs_x, needs_weight, False]
    return aten.convolution_backward(
        grad_out, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, needs
    )[:2]


def grouped(x, weight, bias, stride, padding):
    """The experiments as the groups of one convolution: one launch for all of them.

    Args:
        x, weight, bias: (E, in, H, W), (E, out, in, kh, kw), and (E, out) or None.
        stride, padding: zeros on every side.

    Returns:
        (E, out, H', W').
    """
    experiments = len(x)
    own_bias = None if bias is None else bias.flatten()
    y = F.conv2d(_side_by_side(x), weight.flatten(0, 1), own_bias, stride=stride, padding=padding, groups=experiments)
    return y.view(experiments, -1, *y.shape[2:])


def grouped_backward(grad_out, x, weight, stride, padding, needs_x, needs_weight):
    """The gradients of `grouped` by x and weight, None where not needed."""
    tensors = (_side_by_side(grad_out), _side_by_side(x), weight.flatten(0, 1))
    grad_x, grad_weight = _plain_backward(*tensors, stride, padding, needs_x, needs_weight, groups=len(x))
    return grad_x.view(x.shape) if needs_x else None, grad_weight.view(weight.shape) if needs_weight else None


def _side_by_side(images):
    return images.reshape(1, -1, *images.shape[2:])


def _on_gpu_together(together, one_by_one):
    """Takes the experiments together on a GPU, where a launch each costs more than the work of a small layer."""

    def run(x, *arguments):
        return (one_by_one if x.device.type == "cpu" or len(x) == 1 else together)(x, *arguments)

    return run


_direct = _on_gpu_together(grouped, _one_by_one(_plain))
_direct_backward = _on_gpu_together(grouped_backward, _one_by_one_backward(_plain_backward))


# One multiplication of matrices with the weight as it lies: where the image is small and the weight large, oneDNN
# spends its time on bringing the weight into its own order.
def _columns(x, weight, stride, padding):
    if weight.shape[2:] == (1, 1) and stride == 1 and padding == 0:
        return x[0].reshape(x.shape[1], -1)
    return F.unfold(x, weight.shape[2:], padding=padding, stride=stride)[0]


def _gemm(x, weight, bias, stride, padding):
    columns, rows = _columns(x, weight, stride, padding), weight.reshape(len(weight), -1)
    out = rows @ columns if bias is None else torch.addmm(bias[:, None], rows, columns)
    height, width = _convolved_size(x, weight[None], stride, padding)
    return out.view(1, len(weight), height, width)


def _gemm_backward(grad_out, x, weight, stride, padding, needs_x, needs_weight):
    rows, grad = weight.reshape(len(weight), -1), grad_out[0].reshape(len(weight), -1)
    grad_x = grad_weight = None
    if needs_weight:
        grad_weight = (grad @ _columns(x, weight, stride, padding).T).view(weight.shape)
    if needs_x:
        grad_x = rows.T @ grad
        if weight.shape[2:] == (1, 1) and stride == 1 and padding == 0:
            grad_x = grad_x.view(x.shape)
        else:
            grad_x = F.fold(grad_x[None], x.shape[2:], weight.shape[2:], padding=padding, stride=stride)
    return grad_x, grad_weight


# Row (column) phase 0 of the output sees taps 0 and 1 + 2 on two small rows, phase 1 taps 0 + 1 and 2: summing[phase].
_SUMS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)


# Kept: while a CUDA graph is captured nothing may be copied from the host.
@cache
def _sums(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _SUMS.to(device, dtype)


def _phase_weight(weight):
    sums = _sums(weight.dtype, weight.device)
    summed = torch.einsum("eoiyx,ary,bcx->eaboirc", weight, sums, sums)
    return summed.reshape(len(weight), -1, weight.shape[2], 2, 2)


def _phase_forward(x, weight, bias, _stride, _padding, mode, _upsample, _pool):
    experiments, out_channels = weight.shape[:2]
    height, width = x.shape[2:]
    small, summed = _replicated(x, mode), _phase_weight(weight)
    out = x.new_empty(experiments, out_channels, height, 2, width, 2)
    phases = _direct(small, summed, None, 1, 0).view(experiments, 2, 2, out_channels, height + 1, width + 1)
    for a in range(2):
        for b in range(2):
            out[:, :, :, a, :, b] = phases[:, a, b, :, a : a + height, b : b + width]
    out = out.view(experiments, out_channels, 2 * height, 2 * width)
    return out if bias is None else out.add_(bias[:, :, None, None])


def _phase_backward(grad_out, x, weight, _stride, _padding, mode, _upsample, _pool, needs_x, needs_weight):
    experiments, out_channels, in_channels = weight.shape[:3]
    height, width = x.shape[2:]
    small, summed = _replicated(x, mode), _phase_weight(weight)
    grad = grad_out.view(experiments, out_channels, height, 2, width, 2)
    phases = x.new_zeros(experiments, 2, 2, out_channels, height + 1, width + 1)
    for a in range(2):
        for b in range(2):
            phases[:, a, b, :, a : a + height, b : b + width] = grad[:, :, :, a, :, b]
    phases = phases.view(experiments, 4 * out_channels, height + 1, width + 1)
    grad_x, grad_weight = _direct_backward(phases, small, summed, 1, 0, needs_x, needs_weight)
    if needs_x:
        grad_x = _pad_backward(grad_x, x, 1, 0 if mode == 0 else 2).contiguous()
    if needs_weight:
        sums = _sums(weight.dtype, weight.device)
        parts = grad_weight.view(experiments, 2, 2, out_channels, in_channels, 2, 2)
        grad_weight = torch.einsum("eaboirc,ary,bcx->eoiyx", parts, sums, sums).contiguous()
    empty = x.new_empty(0)
    return grad_x if needs_x else empty, grad_weight if needs_weight else empty


# Reflecting the up-sampled image by one pixel repeats the small image's border.
def _replicated(x, mode):
    return pad(x, 1, 0 if mode == 0 else 2)


# A compiled operator, and what takes its place for numbers other than float32. Those on AMX tiles, which multiply
# bfloat16, cut a float32 into three of them, and the error is that of float32 sums; what is not finite gives NaN, and
# products below 1e-30 may be lost.
def _operator(name: str, otherwise: str, x: torch.Tensor):
    return getattr(torch.ops.sparse_gen, name if x.dtype == torch.float32 else otherwise)


def _taps_layout(name: str) -> SimpleNamespace:
    def forward(x, weight, bias, _stride, padding, mode, upsample, _pool):
        return _operator(name, "masked_conv2d_taps", x)(x, weight, bias, padding, mode, upsample == 2)

    def backward(grad_out, x, weight, _stride, padding, mode, upsample, _pool, needs_x, needs_weight):
        operator = _operator(f"{name}_backward", "masked_conv2d_taps_backward", x)
        return operator(grad_out, x, weight, padding, mode, upsample == 2, needs_x, needs_weight)

    return SimpleNamespace(forward=forward, backward=backward)


def _tiles_layout(name: str) -> SimpleNamespace:
    def forward(x, weight, bias, stride, padding, mode, _upsample, pool):
        return _operator(name, "masked_conv2d_tiles", x)(x, weight, bias, stride, padding, mode, pool)

    def backward(grad_out, x, weight, stride, padding, mode, _upsample, pool, needs_x, needs_weight):
        operator = _operator(f"{name}_backward", "masked_conv2d_tiles_backward", x)
        return operator(grad_out, x, weight, stride, padding, mode, pool, needs_x, needs_weight)

    return SimpleNamespace(forward=forward, backward=backward)


_RUN = {
    "direct": _convolution_layout(_direct, _direct_backward),
    "gemm": _convolution_layout(_one_by_one(_gemm), _one_by_one_backward(_gemm_backward)),
    "phase": SimpleNamespace(forward=_phase_forward, backward=_phase_backward),
    "tiles": _tiles_layout("masked_conv2d_tiles"),
    "split": _tiles_layout("masked_conv2d_split"),
    "taps": _taps_layout("masked_conv2d_taps"),
    "split taps": _taps_layout("masked_conv2d_split_taps"),
}
