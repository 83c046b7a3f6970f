"""From a module to a graph of ATen calls in which what we have operators for is fused.

Any module goes: it is captured with torch.export and matched by what it computes, not by its classes. What matches no
pattern stays the ATen call that it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.nn import functional as F

from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES
from sparse_gen.ops.norm_act import norm_act
from sparse_gen.ops.sparse_conv2d import sparse_conv2d
from sparse_gen.ops.sparse_upsample_conv2d import sparse_upsample_conv2d

aten = torch.ops.aten
_LEAKY_RELU = (aten.leaky_relu.default, aten.leaky_relu_.default)
_RELU = (aten.relu.default, aten.relu_.default)
_MODES = dict(zip(TORCH_MODES, PADDING_MODES, strict=True))


@dataclass(frozen=True)
class Convolution:
    """A convolution that we have an operator for: its input, with the padding in front of it folded in.

    Attributes:
        node, weight: the call, and its weight's name.
        input, stride, padding, padding_mode: what it convolves and how.
        upsampled: the input is up-sampled ×2 (nearest), and `sparse_upsample_conv2d` takes it before that.
        pool: the 2×2 average pool behind it, if its other half can be folded in.
    """

    node: fx.Node
    weight: str
    input: fx.Node
    stride: int
    padding: int
    padding_mode: str
    upsampled: bool
    pool: fx.Node | None

    @property
    def pattern_stride(self) -> int:
        """The stride that the sparse operator runs with."""
        return 2 if self.pool is not None else self.stride


@dataclass
class Lowered:
    """A network as a graph whose placeholders are parameters, patterns, constants and z.

    Attributes:
        graph: `graph(*inputs)` runs it; `inputs` come in the order of `slots`.
        slots: what each placeholder stands for: ("parameter", name), ("pattern", weight's name), ("constant", tensor)
            or ("z", None).
        reasons: convolutions that cannot be fused, with why.
    """

    graph: fx.GraphModule
    slots: list[tuple[str, Any]]
    reasons: dict[str, str] = field(default_factory=dict)

    def __call__(self, parameters: dict[str, torch.Tensor], patterns: dict[str, Any], z: torch.Tensor) -> torch.Tensor:
        """Run one experiment; a weight with a pattern is given as its kept values, 1-D."""
        inputs = {"parameter": parameters.__getitem__, "pattern": patterns.__getitem__, "constant": lambda t: t}
        return self.graph(*[z if kind == "z" else inputs[kind](what) for kind, what in self.slots])[0]


def capture(network: nn.Module, z: torch.Tensor) -> Lowered:
    """Capture a network (from `training_copy`) on an example input of one experiment.

    Raises:
        Whatever torch.export raises for a module that it cannot capture.
    """
    exported = torch.export.export(network, (z,))
    slots: list[tuple[str, Any]] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER:
            slots.append(("parameter", spec.target))
        elif spec.kind is InputKind.USER_INPUT:
            slots.append(("z", None))
        elif spec.kind is InputKind.BUFFER:
            slots.append(("constant", network.get_buffer(spec.target)))
        else:
            slots.append(("constant", exported.constants[spec.target]))
    return Lowered(exported.graph_module, slots)


def convolutions(lowered: Lowered) -> dict[str, Convolution]:
    """The convolutions that `sparse_conv2d` can take over, by their weight's name; the others' reasons are noted."""
    names = _names_of(lowered)
    found = {}
    for node in lowered.graph.graph.nodes:
        if node.target is not aten.conv2d.default:
            continue
        x, weight, _, stride, padding, dilation, groups = _arguments(node, (None, None, None, 1, 0, 1, 1))
        name = names.get(weight)
        if name is None:
            continue
        stride, padding, dilation = (_both(value) for value in (stride, padding, dilation))
        mode = "zeros"
        if padding == 0 and x.target is aten.pad.default and _is_plain_padding(x):
            x, (padding, *_), mode = x.args[0], x.args[1], _MODES[_arguments(x, (None, None, "constant", None))[2]]
        if groups != 1 or dilation != 1 or stride not in (1, 2) or padding is None:
            lowered.reasons[name] = f"groups {groups}, dilation {dilation}, stride {stride}, padding {padding}"
            continue
        upsampled = _is_upsampled(x, weight.meta["val"].shape[2:], stride, padding)
        pool = None if upsampled else _foldable_pool(node, stride)
        found[name] = Convolution(node, name, x, stride, padding, mode, upsampled, pool)
    return found


def _foldable_pool(node: fx.Node, stride: int) -> fx.Node | None:
    user = next(iter(node.users))
    if len(node.users) != 1 or stride != 1 or user.target is not aten.avg_pool2d.default:
        return None
    _, size, step, *rest = _arguments(user, (None, None, (), 0, False, True, None))
    step = step or size  # an empty stride means the window's size
    # With ceil_mode the last window is cut off, and its mean is not that of four.
    return user if _both(size) == _both(step) == 2 and rest == [0, False, True, None] else None


def _is_upsampled(x: fx.Node, kernel: tuple[int, int], stride: int, padding: int) -> bool:
    """Whether the input is up-sampled ×2 for this convolution alone, which keeps its size."""
    if x.target is not aten.upsample_nearest2d.vec or list(x.args[-1] or ()) != [2.0, 2.0] or len(x.users) != 1:
        return False
    return stride == 1 and kernel[0] == kernel[1] <= 11 and kernel[0] % 2 == 1 and padding == kernel[0] // 2


def fuse_norms(lowered: Lowered) -> None:
    """Make every normalisation by the image's own statistics, with the activation behind it, one `norm_act`."""
    graph = lowered.graph.graph
    for node in list(graph.nodes):
        if node.target is aten.batch_norm.default:
            _fuse_norm(graph, node)
    _finish(lowered)


def fuse_convolutions(lowered: Lowered, found: dict[str, Convolution], sparse: Collection[str]) -> None:
    """Make the convolutions whose weights are in `sparse` calls of our operators, which take a pattern beside them."""
    graph = lowered.graph.graph
    first = next(iter(graph.nodes))
    for name in sparse:
        conv = found[name]
        with graph.inserting_before(first):
            pattern = graph.placeholder(f"pattern_{name.replace('.', '_')}")
        lowered.slots.insert(0, ("pattern", name))
        first = pattern
        _, weight, bias, *_ = _arguments(conv.node, (None, None, None, 1, 0, 1, 1))
        if conv.pool is not None:
            target = f"pooled_{name.replace('.', '_')}"
            lowered.graph.add_submodule(target, PooledConvolution(conv.padding, conv.padding_mode))
            with graph.inserting_before(conv.pool):
                new = graph.call_module(target, (conv.input, weight, bias, pattern))
            conv.pool.replace_all_uses_with(new)
            graph.erase_node(conv.pool)
        elif conv.upsampled:
            arguments = (conv.input.args[0], weight, bias, pattern, conv.padding, conv.padding_mode)
            _replace(graph, conv.node, _upsample_conv, arguments)
        else:
            arguments = (conv.input, weight, bias, pattern, conv.padding, conv.padding_mode)
            _replace(graph, conv.node, _sparse_conv, arguments)
    _finish(lowered)


def _finish(lowered: Lowered) -> None:
    lowered.graph.graph.eliminate_dead_code()
    lowered.graph.graph.lint()
    lowered.graph.recompile()


def _fuse_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, gamma, beta, running_mean, _, training, _, eps = _arguments(node, (None,) * 7 + (1e-5,))[:8]
    if not training or running_mean is not None or gamma is None or beta is None:
        return
    slope, last = 1.0, node
    users = list(node.users)
    if len(users) == 1 and users[0].target in _LEAKY_RELU:
        slope, last = _arguments(users[0], (None, 0.01))[1], users[0]
    elif len(users) == 1 and users[0].target in _RELU:
        slope, last = 0.0, users[0]
    # Normalising commutes with repeating every pixel: a quarter of the work, and the same statistics.
    if x.target is aten.upsample_nearest2d.vec and len(x.users) == 1 and 0 <= slope <= 1:
        small, *sizes = x.args
        with graph.inserting_before(last):
            normed = graph.call_function(_norm_act, (small, gamma, beta, eps, slope))
        _replace(graph, last, aten.upsample_nearest2d.vec, (normed, *sizes))
    elif 0 <= slope <= 1:
        _replace(graph, last, _norm_act, (x, gamma, beta, eps, slope))


def _norm_act(x, gamma, beta, eps, slope):
    return norm_act(x, gamma[None], beta[None], eps=eps, slope=slope)


def _sparse_conv(x, values, bias, pattern, padding, padding_mode):
    bias = None if bias is None else bias[None]
    return sparse_conv2d(x, values[None], pattern, bias, padding=padding, padding_mode=padding_mode)


def _upsample_conv(x, values, bias, pattern, padding, padding_mode):
    bias = None if bias is None else bias[None]
    return sparse_upsample_conv2d(x, values[None], pattern, bias, padding=padding, padding_mode=padding_mode)


class PooledConvolution(nn.Module):
    """avg_pool2d(conv(pad(x)), 2) as one convolution of stride 2 on the 2×2 means of pad(x): a quarter of the work.

    Those means are kept as long as the same unchanged x comes again and needs no gradient: the network's input z does.
    """

    def __init__(self, padding: int, padding_mode: str):
        super().__init__()
        self.padding, self.padding_mode = padding, padding_mode
        self._known: tuple[weakref.ref, int, torch.Tensor] | None = None

    def forward(self, x, values, bias, pattern):
        bias = None if bias is None else bias[None]
        return sparse_conv2d(self._means(x), values[None], pattern, bias)

    def _means(self, x: torch.Tensor) -> torch.Tensor:
        if self._known is not None:
            known, version, means = self._known
            if known() is x and x._version == version and not x.requires_grad:
                return means
        mode = TORCH_MODES[PADDING_MODES.index(self.padding_mode)]
        padded = F.pad(x, [self.padding] * 4, mode=mode) if self.padding else x
        rows = padded[..., 1:, :] + padded[..., :-1, :]
        means = 0.25 * (rows[..., 1:] + rows[..., :-1])
        self._known = None if x.requires_grad or x.grad_fn is not None else (weakref.ref(x), x._version, means)
        return means


def _replace(graph: fx.Graph, node: fx.Node, function: Callable, arguments: tuple) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, arguments)
    node.replace_all_uses_with(new)
    # Dead code elimination keeps in-place calls, which this one may be.
    graph.erase_node(node)


def _arguments(node: fx.Node, defaults: tuple) -> list:
    """A call's positional arguments, the ones left out filled with the schema's defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _both(value) -> int | None:
    """One number for both axes, None if they differ."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return values[0] if len(set(values)) == 1 else None


def _is_plain_padding(node: fx.Node) -> bool:
    _, amounts, mode, value = _arguments(node, (None, None, "constant", None))
    return len(amounts) == 4 and len(set(amounts)) == 1 and mode in _MODES and value in (None, 0, 0.0)


def _names_of(lowered: Lowered) -> dict[fx.Node, str]:
    placeholders = [node for node in lowered.graph.graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, lowered.slots, strict=True)
    return {node: what for node, (kind, what) in pairs if kind == "parameter"}
