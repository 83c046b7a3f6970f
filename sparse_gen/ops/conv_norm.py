"""A convolution beside a normalisation, for kernels that do both in fewer passes over the image.

`conv_norm` convolves and gives what the readers of the normalised image apply, as `norm_load` does after
`masked_conv2d_loaded`. `norm_conv_backward` goes back through a convolution and the normalisation *in front* of it, as
`norm_load_backward` does after `masked_conv2d_loaded_backward`: forward a normalisation shares its passes with the
convolution that its image comes from, backward with the one that reads it.
"""

from __future__ import annotations

import torch

from sparse_gen.ops.dispatch import register_operator
from sparse_gen.ops.masked_conv2d import masked_conv2d_backward, masked_conv2d_reference, output_size
from sparse_gen.ops.masked_conv2d_layouts import LAYOUTS
from sparse_gen.ops.norm_load import LOAD, apply_load_reference, norm_load_backward_reference, norm_load_reference

_CONVOLUTION = "int stride, int padding, int mode, int upsample, bool pool, Tensor? load"


def conv_norm_reference(x, weight, bias, stride, padding, mode, upsample, pool, load, *norms):
    seen = x if load is None else apply_load_reference(x, load)
    y = masked_conv2d_reference(seen, weight, bias, stride, padding, mode, upsample, pool, 0)
    return y, *norm_load_reference(y, *norms)


def norm_conv_backward_reference(
    grad_out, x, weight, stride, padding, mode, upsample, pool, load, gamma, beta, slope, gamma2, beta2, moments
):
    geometry = (stride, padding, mode, upsample, pool, LAYOUTS.index("direct"))
    grad_seen, grad_weight = masked_conv2d_backward(
        grad_out, apply_load_reference(x, load), weight, *geometry, True, True
    )
    grads = norm_load_backward_reference(grad_seen, x, gamma, beta, slope, gamma2, beta2, moments)
    return *grads, grad_weight


def _fake(x, weight, _bias, stride, padding, _mode, upsample, pool, _load, gamma, *_):
    size = [
        output_size(length, kernel, stride, padding, upsample, pool)
        for length, kernel in zip(x.shape[2:], weight.shape[3:], strict=True)
    ]
    y = x.new_empty(*weight.shape[:2], *size)
    return y, gamma.new_empty(*gamma.shape, LOAD), gamma.new_empty(*gamma.shape, 4)


register_operator(
    f"conv_norm(Tensor x, Tensor weight, Tensor? bias, {_CONVOLUTION}, Tensor gamma, Tensor beta, float eps,"
    " float slope, Tensor? gamma2, Tensor? beta2, float eps2) -> (Tensor, Tensor, Tensor)",
    reference=conv_norm_reference,
    fake=_fake,
)
register_operator(
    f"norm_conv_backward(Tensor grad_out, Tensor x, Tensor weight, {_CONVOLUTION.replace('?', '')}, Tensor gamma,"
    " Tensor beta, float slope, Tensor? gamma2, Tensor? beta2, Tensor moments)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_conv_backward_reference,
    fake=lambda grad_out, x, weight, *rest: (
        torch.empty_like(x),
        *(rest[-1].new_empty(rest[-1].shape[:2]) for _ in range(4)),
        torch.empty_like(weight),
    ),
)
