"""From a module to a graph of stages.

Any module goes: it is captured with torch.export and matched by what it computes, not by its classes. What matches no
pattern stays the ATen call that it is.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from sparse_gen.engine.calls import channelwise
from sparse_gen.engine.graph import Call, Concat, Conv, Graph, Node, Norm, Parameter, Select, Value, is_map
from sparse_gen.engine.mutation import CannotLower, check_pure, functional
from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES

aten = torch.ops.aten
_LEAKY_RELU = (aten.leaky_relu.default, aten.leaky_relu_.default)
_RELU = (aten.relu.default, aten.relu_.default)
_MODES = dict(zip(TORCH_MODES, PADDING_MODES, strict=True))
_SPLITS = (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
_LARGEST_KERNEL = 11
_NO_MAP = "expected feature maps of one experiment all the way, got {} in between"


def lower(network: nn.Module, z: torch.Tensor) -> Graph:
    """Capture a network (from `training_copy`) on an example input of one experiment and match its stages.

    Args:
        network: called with z alone, gives one feature map.
        z: (1, C, H, W); the graph holds for this size.

    Raises:
        CannotLower: something on the way is no feature map, is overwritten in place, or random.
        Whatever torch.export raises for a module that it cannot capture.
    """
    exported = torch.export.export(network, (z,))
    check_pure(exported.graph)
    # A parameter that has several names is known by the first, as in named_parameters.
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    known: dict[fx.Node, Any] = {}  # parameters and what depends on neither z nor them
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    source = None
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.PARAMETER:
            known[node] = Parameter(names[id(network.get_parameter(spec.target))])
        elif spec.kind is InputKind.USER_INPUT:
            source = node
        elif spec.kind is InputKind.BUFFER:
            known[node] = network.get_buffer(spec.target)
        else:
            known[node] = exported.constants[spec.target]
    (output,) = next(node for node in exported.graph.nodes if node.op == "output").args[0]
    builder = _Builder(source, known, tuple(z.shape[1:]))
    for node in exported.graph.nodes:
        if node.op == "call_function":
            builder.add(node)
    if output not in builder.values:
        raise CannotLower("expected a network whose output is a feature map computed from z")
    return _prune(Graph(tuple(builder.nodes), tuple(z.shape[1:]), builder.reasons), builder.values[output])


class _Builder:
    """Adds one node after the other; what a later node folds in is left behind unread."""

    def __init__(self, source: fx.Node, known: dict[fx.Node, Any], input_shape: tuple[int, int, int]):
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, int] = {source: 0}
        self.reasons: dict[str, str] = {}
        self._known = known
        self._shapes = [input_shape]

    def add(self, node: fx.Node) -> None:
        if not node.users:
            return  # such as an assertion
        inputs = _nodes_in((node.args, node.kwargs))
        if all(i in self._known and not isinstance(self._known[i], Parameter) for i in inputs):
            # What index arithmetic captures, such as the indices of a reflection.
            arguments, keywords = fx.node.map_arg((node.args, node.kwargs), self._known.__getitem__)
            self._known[node] = node.target(*arguments, **keywords)
            return
        handler = {
            aten.conv2d.default: self._conv,
            aten.conv2d.padding: self._conv,
            aten.avg_pool2d.default: self._pool,
            aten.batch_norm.default: self._norm,
            aten.instance_norm.default: self._norm,  # of one image the same
            aten.cat.default: self._concat,
            aten.slice.Tensor: self._slice,
            aten.alias.default: self._same,
        }.get(node.target)
        if node.target in _LEAKY_RELU or node.target in _RELU:
            handler = self._activation
        if node.target is operator.getitem:
            handler = self._piece
        if node.target in _SPLITS and _axis(node, 2) == 1:
            return  # its pieces are selections
        if handler is None or not handler(node):
            self._call(node)

    def _append(self, node: fx.Node, op, inputs: tuple[int, ...], shape=None) -> bool:
        shape = tuple(node.meta["val"].shape[1:]) if shape is None else shape
        name = op.weight.removesuffix(".weight") if isinstance(op, Conv) else node.name
        self.nodes.append(Node(name, op, inputs, shape))
        self._shapes.append(shape)
        self.values[node] = len(self.nodes)
        return True

    def _made(self, node: fx.Node) -> Node | None:
        """The node that computes this value, if it is the value's only reader that asks."""
        value = self.values.get(node, 0)
        return self.nodes[value - 1] if value and len(node.users) == 1 else None

    def _parameter(self, node: fx.Node | None) -> str | None:
        known = self._known.get(node)
        return known.name if isinstance(known, Parameter) else None

    def _conv(self, node: fx.Node) -> bool:
        x, weight, bias, stride, padding, dilation, groups = _arguments(node, (None, None, None, 1, 0, 1, 1))
        name = self._parameter(weight)
        if name is None:
            return False
        if bias is not None and self._parameter(bias) is None:
            self.reasons[name] = "its bias is computed"
            return False
        shape = tuple(weight.meta["val"].shape)
        if isinstance(padding, str):
            padding = _named_padding(padding, shape, dilation)
        stride, padding, dilation = (_both(value) for value in (stride, padding, dilation))
        mode = "zeros"
        if padding == 0 and x.target is aten.pad.default and _is_plain_padding(x):
            x, (padding, *_), mode = x.args[0], x.args[1], _MODES[_arguments(x, (None, None, "constant", None))[2]]
        if x not in self.values:
            self.reasons[name] = "its input does not depend on z"
            return False
        if groups != 1 or dilation != 1 or stride not in (1, 2) or padding is None:
            given = {"groups": groups, "dilation": dilation, "stride": stride, "padding": padding}
            self.reasons[name] = ", ".join(f"{k} {'differs by axis' if v is None else v}" for k, v in given.items())
            return False
        upsample, value = None, self.values[x]
        if _keeps_size(shape, stride, padding):
            upsample, value = self._before_upsampling(value)
        conv = Conv(name, self._parameter(bias), shape, stride, padding, mode, upsample)
        return self._append(node, conv, (value,))

    def _before_upsampling(self, value: int) -> tuple[str | None, int]:
        """The kind of ×2 up-sampling that gave a value and the value in front of it; (None, value) if none did."""
        call = self.nodes[value - 1].op if value else None
        kind = _upsampling(call) if isinstance(call, Call) else None
        return (None, value) if kind is None else (kind, self.nodes[value - 1].inputs[0])

    def _pool(self, node: fx.Node) -> bool:
        x = node.args[0]
        made = self._made(x)
        if made is None or not isinstance(made.op, Conv) or made.op.stride != 1 or made.op.upsample is not None:
            return False
        _, size, step, *rest = _arguments(node, (None, None, (), 0, False, True, None))
        step = step or size  # an empty stride means the window's size
        # With ceil_mode the last window is cut off, and its mean is not that of four.
        if _both(size) != 2 or _both(step) != 2 or [_both(rest[0]), *rest[1:]] != [0, False, True, None]:
            return False
        return self._append(node, replace(made.op, pool=True), made.inputs)

    def _norm(self, node: fx.Node) -> bool:
        x, gamma, beta, running_mean, _, training, _, eps = _arguments(node, (None,) * 7 + (1e-5,))[:8]
        names = self._parameter(gamma), self._parameter(beta)
        if not training or running_mean is not None or None in names or x not in self.values:
            return False
        norm = Norm(*names, eps, 1.0)
        kind, small = self._before_upsampling(self.values[x])
        if kind == "nearest" and len(x.users) == 1:
            # Normalising commutes with repeating every pixel: a quarter of the work, and the same statistics.
            moved = norm
        elif kind is not None and kind != "nearest" and all(_is_convolution(user) for user in node.users):
            # Its map commutes with interpolation, which has weights of sum 1; its statistics do not.
            moved = replace(norm, upsample=kind)
        else:
            return self._append(node, norm, (self.values[x],))
        upsampling = self.nodes[self.values[x] - 1].op
        self._append(node, moved, (small,), self._shapes[small])
        return self._upsample_again(node, upsampling)

    def _upsample_again(self, node: fx.Node, call: Call) -> bool:
        """Put an up-sampling behind what was last added for a node."""
        value = self.values[node]
        arguments = (Value(value), *call.arguments[1:])
        return self._append(node, replace(call, arguments=arguments), (value,))

    def _activation(self, node: fx.Node) -> bool:
        slope = 0.0 if node.target in _RELU else _arguments(node, (None, 0.01))[1]
        made = self._made(node.args[0])
        if made is None or not 0 <= slope <= 1:
            return False
        if isinstance(made.op, Norm) and made.op.slope == 1.0:
            return self._append(node, replace(made.op, slope=slope), made.inputs)
        before = self.nodes[made.inputs[0] - 1] if made.inputs and made.inputs[0] else None
        if before is not None and isinstance(before.op, Norm) and before.op.slope == 1.0 and made.name == before.name:
            # The normalisation was moved in front of its up-sampling.
            self._append(node, replace(before.op, slope=slope), before.inputs, before.shape)
            return self._upsample_again(node, made.op)
        return False

    def _concat(self, node: fx.Node) -> bool:
        tensors, axis = _arguments(node, (None, 0))
        if axis not in (1, -3) or any(tensor not in self.values for tensor in tensors):
            return False
        return self._append(node, Concat(), tuple(self.values[tensor] for tensor in tensors))

    def _slice(self, node: fx.Node) -> bool:
        x, axis, start, end, step = _arguments(node, (None, 0, None, None, 1))
        if x not in self.values:
            return False
        if node.meta["val"].shape == x.meta["val"].shape and step == 1:
            return self._same(node)
        if axis not in (1, -3):
            return False
        channels = range(self._shapes[self.values[x]][0])[slice(start, end, step)]
        return self._append(node, Select(tuple(channels)), (self.values[x],))

    def _same(self, node: fx.Node) -> bool:
        if node.args[0] not in self.values:
            return False
        self.values[node] = self.values[node.args[0]]
        return True

    def _piece(self, node: fx.Node) -> bool:
        split, number = node.args
        if split.target not in _SPLITS or split.args[0] not in self.values:
            return False
        sizes = [piece.shape[1] for piece in split.meta["val"]]
        first = sum(sizes[:number])
        channels = tuple(range(first, first + sizes[number]))
        return self._append(node, Select(channels), (self.values[split.args[0]],))

    def _call(self, node: fx.Node) -> None:
        if not is_map(node.meta.get("val")):
            raise CannotLower(_NO_MAP.format(node.target))
        call = self._as_call(node)
        for name in call.parameters:
            self.reasons.setdefault(name, f"{call.target} is no stage of ours")
        values = [v.index for v in _values_in((call.arguments, call.keywords))]
        self._append(node, call, tuple(dict.fromkeys(values)))

    def _as_call(self, node: fx.Node) -> Call:
        parameters: list[str] = []

        def translate(argument: fx.Node):
            if argument in self.values:
                return Value(self.values[argument])
            if argument not in self._known:
                raise CannotLower(_NO_MAP.format(argument.target))
            known = self._known[argument]
            if isinstance(known, Parameter):
                parameters.append(known.name)
            return known

        arguments, keywords = (_plain(fx.node.map_arg(part, translate)) for part in (node.args, node.kwargs))
        target = functional(node.target)
        kind, keeps_zero = channelwise(target, node, self.values) if not parameters else (None, False)
        return Call(target, arguments, keywords, tuple(parameters), kind, keeps_zero)


def _prune(graph: Graph, output: int) -> Graph:
    """The graph without the nodes that the output does not need, which comes last."""
    needed, stack = set(), [output]
    while stack:
        value = stack.pop()
        if value and value not in needed:
            needed.add(value)
            stack.extend(graph.nodes[value - 1].inputs)
    number = {0: 0} | {value: i for i, value in enumerate(sorted(needed), start=1)}

    def renumber(item):
        return Value(number[item.index]) if isinstance(item, Value) else item

    nodes = []
    for value in sorted(needed):
        node = graph.nodes[value - 1]
        op = node.op
        if isinstance(op, Call):
            arguments, keywords = _map(op.arguments, renumber), _map(op.keywords, renumber)
            op = replace(op, arguments=arguments, keywords=keywords)
        nodes.append(Node(node.name, op, tuple(number[i] for i in node.inputs), node.shape))
    if not nodes:
        raise CannotLower("expected a network that computes something, got one that returns z")
    return Graph(tuple(nodes), graph.input_shape, graph.reasons)


def _upsampling(call: Call) -> str | None:
    """What kind of ×2 up-sampling a call is."""
    if call.target not in (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec):
        return None
    if list(call.arguments[-1] or ()) != [2.0, 2.0]:
        return None
    if call.target is aten.upsample_nearest2d.vec:
        return "nearest"
    return "bilinear_corners" if call.arguments[2] else "bilinear"


def _keeps_size(shape: tuple[int, ...], stride: int, padding: int) -> bool:
    kernel = shape[2]
    return stride == 1 and kernel == shape[3] <= _LARGEST_KERNEL and kernel % 2 == 1 and padding == kernel // 2


def _arguments(node: fx.Node, defaults: tuple) -> list:
    """A call's positional arguments, the ones left out filled with the schema's defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _axis(node: fx.Node, position: int) -> int:
    axis = _arguments(node, (None, None, 0))[position]
    return axis + 4 if axis < 0 else axis


def _both(value) -> int | None:
    """One number for both axes, None if they differ."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return values[0] if len(set(values)) == 1 else None


def _named_padding(name: str, shape: tuple[int, ...], dilation) -> list[int] | None:
    """What "valid" and "same" mean; None if "same" differs between the two sides of an axis."""
    extra = [dilated * (kernel - 1) for dilated, kernel in zip(_pair(dilation), shape[2:], strict=True)]
    if name == "valid":
        return [0, 0]
    return None if any(e % 2 for e in extra) else [e // 2 for e in extra]


def _pair(value) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def _is_convolution(node: fx.Node) -> bool:
    """Whether this is a convolution, or padding that only convolutions read."""
    if node.target is aten.pad.default:
        return all(user.target is aten.conv2d.default for user in node.users)
    return node.target in (aten.conv2d.default, aten.conv2d.padding)


def _is_plain_padding(node: fx.Node) -> bool:
    _, amounts, mode, value = _arguments(node, (None, None, "constant", None))
    even = len(amounts) == 4 and len(set(amounts)) == 1 and amounts[0] >= 0
    return even and mode in _MODES and value in (None, 0, 0.0)


def _nodes_in(item) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(item, lambda node: found.append(node) or node)
    return found


def _values_in(item) -> list[Value]:
    found: list[Value] = []
    _map(item, lambda leaf: found.append(leaf) if isinstance(leaf, Value) else None)
    return found


def _plain(item):
    """Nested arguments without fx's immutable containers."""
    if isinstance(item, dict):
        return {key: _plain(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_plain(value) for value in item]
    return tuple(_plain(value) for value in item) if type(item) is tuple else item


def _map(item, function):
    """Like `function` on every leaf of nested tuples, lists and dicts."""
    if isinstance(item, (Value, Parameter)):
        return function(item)
    if isinstance(item, dict):
        return {key: _map(value, function) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_map(value, function) for value in item)
    return function(item)
