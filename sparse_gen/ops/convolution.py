"""What the sparse convolutions have in common: registration with the backward pass, and checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_gen.ops.dispatch import LIBRARY, register_operator
from sparse_gen.ops.norm_load import apply_load_reference

PADDING_MODES = ("zeros", "reflect", "replicate")
TORCH_MODES = ("constant", "reflect", "replicate")
UPSAMPLE = (None, "nearest", "bilinear", "bilinear_corners")


def upsampled(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The image x (E, C, h, w) up-sampled ×2; kind out of UPSAMPLE, "bilinear_corners" with its corners aligned."""
    if kind == "nearest":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=kind == "bilinear_corners")


def needed_gradients(convolve: Callable, grad_out, x, values, needs_grad_x: bool, needs_grad_values: bool):
    """The gradients of convolve(x, values) by both, by autograd; an empty tensor for one that is not needed."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(), values.detach().requires_grad_()]
        grad_x, grad_values = torch.autograd.grad(convolve(*leaves), leaves, grad_out)
    return grad_x if needs_grad_x else x.new_empty(0), grad_values if needs_grad_values else x.new_empty(0)


def backward_fake(grad_out, x, values, *rest):
    """What `needed_gradients` gives, for shapes only; the last two arguments say what is needed."""
    *_, needs_grad_x, needs_grad_values = rest
    grad_x = torch.empty_like(x) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(values) if needs_grad_values else x.new_empty(0)


def register_sparse_convolution(
    pattern: str, *, reference: Callable, fake: Callable, loads: bool = False, name: str | None = None
) -> Callable:
    """Define the operator of a reference, its backward operator, and its autograd; returns what calls it soonest.

    The operator is <name>(x, values, bias, <pattern>) -> out; <name>_backward takes the output's gradient in front
    and, at the end, which of the two gradients it gives are needed. The bias's gradient is a sum.

    Args:
        pattern: the schema of the arguments that say which weights these are.
        reference: takes (x, values, bias, *pattern); its module's name is the stem.
        fake: the same for shapes only.
        loads: whether the operators end with a load (E, in, 5), or None, that is applied to x; the gradient they give
            is then that of the loaded image.
        name: of the operator, by default the stem.
    """
    stem = reference.__module__.rpartition(".")[2]
    name = name or stem
    load_schema = ", Tensor? load" if loads else ""

    def loaded(x, given):
        if not loads:
            return x, given
        *given, load = given
        return x if load is None else apply_load_reference(x, load), given

    def run_reference(x, values, bias, *given):
        x, given = loaded(x, given)
        return reference(x, values, bias, *given)

    def run_fake(x, values, bias, *given):
        return fake(x, values, bias, *(given[:-1] if loads else given))

    def backward_reference(grad_out, x, values, *rest):
        *given, needs_grad_x, needs_grad_values = rest
        x, given = loaded(x, given)
        return needed_gradients(
            lambda *leaves: reference(*leaves, None, *given), grad_out, x, values, needs_grad_x, needs_grad_values
        )

    register_operator(
        f"{name}(Tensor x, Tensor values, Tensor? bias, {pattern}{load_schema}) -> Tensor",
        reference=run_reference,
        fake=run_fake,
        stem=stem,
    )
    register_operator(
        f"{name}_backward(Tensor grad_out, Tensor x, Tensor values, {pattern}{load_schema},"
        " bool needs_grad_x, bool needs_grad_values) -> (Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        stem=stem,
    )

    def setup_context(ctx, inputs, output):
        x, values, _, *ctx.pattern = inputs
        ctx.save_for_backward(x, values)

    @once_differentiable
    def differentiate(ctx, grad_out):
        x, values = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        grad_x, grad_values = getattr(torch.ops.sparse_gen, f"{name}_backward")(
            grad_out.contiguous(), x, values, *ctx.pattern, needs_x, needs_values
        )
        grad_bias = grad_out.sum(dim=(2, 3)) if needs_bias else None
        nothing = [None] * len(ctx.pattern)
        return grad_x if needs_x else None, grad_values if needs_values else None, grad_bias, *nothing

    torch.library.register_autograd(f"sparse_gen::{name}", differentiate, setup_context=setup_context, lib=LIBRARY)

    class Convolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            setup_context(ctx, inputs, None)
            return getattr(torch.ops.sparse_gen, name)(*inputs)

        backward = staticmethod(differentiate)

    # What register_autograd adds costs 65 µs a forward and backward pass, as much as a small convolution.
    def run(*inputs):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return Convolution.apply(*inputs)
        return getattr(torch.ops.sparse_gen, name)(*inputs)

    return run


def check_convolution(x, values, bias, shape: tuple[int, int, int, int], kept: int, padding_mode: str) -> None:
    """Raise ValueError unless x, values and bias fit a pattern of this weight's shape and number of kept weights."""
    out_channels, in_channels, _, _ = shape
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64) or 0 in x.shape:
        raise ValueError(f"expected x of shape (E, in, H, W), float32 or float64, got {tuple(x.shape)} of {x.dtype}")
    if x.shape[1] != in_channels:
        raise ValueError(f"expected x with the pattern's {in_channels} channels, got {x.shape[1]}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"expected padding_mode out of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    expected = {"values": (len(x), kept), "bias": (len(x), out_channels)}
    for name, tensor in {"values": values, "bias": bias}.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"expected {name} of shape {expected[name]}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"expected {name} of {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )


def check_padding(x: torch.Tensor, shape: tuple[int, int, int, int], padding: int, padding_mode: str) -> None:
    """Raise ValueError unless x can be padded so and is then at least as large as the kernel."""
    kernel_h, kernel_w = shape[2:]
    if padding < 0:
        raise ValueError(f"expected a padding from 0 on, got {padding}")
    if padding_mode == "reflect" and padding >= min(x.shape[2:]):
        raise ValueError(f"expected more than {padding} pixels a side to reflect, got {x.shape[2]}×{x.shape[3]}")
    if x.shape[2] + 2 * padding < kernel_h or x.shape[3] + 2 * padding < kernel_w:
        raise ValueError(
            f"expected a padded image of at least the kernel's {kernel_h}×{kernel_w}, got "
            f"{x.shape[2] + 2 * padding}×{x.shape[3] + 2 * padding}"
        )
