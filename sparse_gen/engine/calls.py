"""What is known of ATen calls: which treat every channel by itself, and what they make of a constant one."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import fx

aten = torch.ops.aten

# Activations by whether they map zero to zero.
_POINTWISE = {
    aten.relu.default: True, aten.leaky_relu.default: True, aten.gelu.default: True, aten.silu.default: True,
    aten.tanh.default: True, aten.elu.default: True, aten.relu6.default: True, aten.hardtanh.default: False,
    aten.hardswish.default: True, aten.mish.default: True, aten.sin.default: True, aten.abs.default: True,
    aten.square.default: True, aten.sigmoid.default: False, aten.softplus.default: False, aten.cos.default: False,
    aten.exp.default: False, aten.hardsigmoid.default: False,
}  # fmt: skip
_SAME = (aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
_UPSAMPLING = (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec)


def channelwise(target: Callable, node: fx.Node, maps: Container[fx.Node]) -> tuple[str | None, bool]:
    """How a call treats a constant channel: `Call.channelwise` and `Call.keeps_zero`; (None, False) if unknown.

    Args:
        target: what is called: the node's target, out of place.
        node: with the arguments.
        maps: the feature maps computed from z. Other tensors keep all of their channels.
    """
    if target in _POINTWISE:
        return "pointwise", _POINTWISE[target]
    if target in _SAME or target in _UPSAMPLING:
        return "linear", True
    if target is aten.pad.default:
        return _padding(node)
    if target is aten.slice.Tensor:
        return ("linear", True) if _dimension(node, 1) in (2, 3) else (None, False)
    if target is aten.index_select.default:
        return ("linear", True) if _dimension(node, 1) in (2, 3) else (None, False)
    if target is aten.avg_pool2d.default:
        # A window over the border counts zeros, or fewer pixels with ceil_mode.
        plain = len(node.args) < 4 or (not any(node.args[3]) and not any(node.args[4:5]))
        return ("linear", True) if plain else ("border", True)
    if target is aten.max_pool2d.default:
        return "linear", True
    if target is aten.add.Tensor and not node.kwargs and _same_shapes(node) and all(a in maps for a in node.args[:2]):
        return "linear", True
    if target in (aten.batch_norm.default, aten.instance_norm.default):
        return ("normalising", True) if _normalises(node) else (None, False)
    return None, False


def _normalises(node: fx.Node) -> bool:
    """Whether a normalisation uses the image's own statistics and has neither γ nor β."""
    _, gamma, beta, running_mean, running_var, own = node.args[:6]
    return own and gamma is None and beta is None and running_mean is None and running_var is None


def _padding(node: fx.Node) -> tuple[str | None, bool]:
    amounts, mode, value = [*node.args[1:], *("constant", None)[len(node.args) - 2 :]]
    if len(amounts) > 4:
        return None, False
    if mode in ("reflect", "replicate", "circular"):
        return "linear", True
    return ("border", True) if value in (None, 0, 0.0) else ("border", False)


def _dimension(node: fx.Node, position: int) -> int:
    dimension = node.args[position] if len(node.args) > position else 0
    return dimension + 4 if dimension < 0 else dimension


def _same_shapes(node: fx.Node) -> bool:
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args[:2]]
    return all(v is not None for v in values) and values[0].shape == values[1].shape
