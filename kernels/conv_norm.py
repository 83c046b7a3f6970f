"""Triton twin of `sparse_gen.ops.conv_norm`: what is between two convolutions takes one launch, forward and back.

Forward, the convolution leaves the moments of its tiles, or, where its sum is split, parts that the normalisation's
one pass over a small image adds up. Back, one launch has the convolution's two gradients, and the next adds up their
parts, carries the image's back through padding and resampling, and goes on through the normalisation.
"""

from __future__ import annotations

from sparse_gen.kernels import norm_act
from sparse_gen.kernels.gather import Geometry
from sparse_gen.kernels.masked_conv2d import convolve, convolved_parts, masked_conv2d_loaded, unpooled
from sparse_gen.kernels.masked_conv2d_gradients import gradients
from sparse_gen.kernels.norm_load import load_of_moments, load_of_parts, norm_load
from sparse_gen.kernels.norm_load_gradient import folded_gradient
from sparse_gen.kernels.splits import precision_of_torch


def conv_norm(
    x, weight, bias, stride, padding, mode, upsample, pool, load, gamma, beta, eps, slope, gamma2, beta2, eps2
):
    norms = (gamma, beta, eps, slope, gamma2, beta2, eps2)
    geometry, precision = Geometry.of(weight.shape[3:], stride, padding, mode, upsample, pool), precision_of_torch()
    if pool and not geometry.box:
        y = masked_conv2d_loaded(x, weight, bias, stride, padding, mode, upsample, pool, load)
        return y, *norm_load(y, *norms)
    height, width = geometry.output(x)
    if height * width > norm_act.ROW:
        y, moments, span = convolve(x, weight, bias, geometry, load=load, moments=True, precision=precision)
        return y, *load_of_moments(y, moments, span, *norms)
    parts, _, _ = convolved_parts(x, weight, bias, geometry, load=load, precision=precision)
    left = bias if len(parts) > 1 else None
    return load_of_parts(parts.view(*parts.shape[:3], height, width), left, *norms)


def norm_conv_backward(
    grad_out, x, weight, stride, padding, mode, upsample, pool, load, gamma, beta, slope, gamma2, beta2, moments
):
    geometry = Geometry.of(weight.shape[3:], stride, padding, mode, upsample, pool)
    grad_out = unpooled(grad_out, x, geometry, pool)
    plane, parts = gradients(grad_out, x, weight, geometry, load=load, precision=precision_of_torch())
    grads, grad_weight = folded_gradient(plane, geometry, x, gamma, beta, slope, gamma2, moments, parts)
    return *grads, grad_weight.view(weight.shape)
