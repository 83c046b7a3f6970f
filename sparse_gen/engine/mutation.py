"""Captured calls that are no functions of their arguments: they overwrite one of them, or draw random numbers.

The engine keeps values and folds calls into later ones, so that nothing may change a value after it was made. A call in
place runs as its twin out of place, which is the same unless an older name of the memory is read afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

aten = torch.ops.aten


class CannotLower(ValueError):
    """The captured graph has something that is no chain of feature maps."""


def check_pure(graph: fx.Graph) -> None:
    """Raise CannotLower unless every call in place can run out of place and no call draws random numbers."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # whose memory a node's value lies in
    for node in graph.nodes:
        memory[node] = node
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            memory[node] = memory[node.args[0]]
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _is_switched_off(node):
            raise CannotLower(f"expected the same output for the same z, got {node.target}, which draws random numbers")
        for argument, described in zip(node.args, schema.arguments, strict=False):
            if not isinstance(argument, fx.Node) or described.alias_info is None:
                continue
            memory[node] = memory[argument]
            if described.alias_info.is_write:
                _check_overwriting(node, memory[argument], memory, order)


def _is_switched_off(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and not (node.args[1] and node.args[2])


def _check_overwriting(node: fx.Node, owner: fx.Node, memory: dict, order: dict) -> None:
    functional(node.target)
    if owner.op != "call_function":
        raise CannotLower(f"expected a network that leaves z, buffers and parameters alone, got {node.target} on one")
    older = [other for other, its in memory.items() if its is owner and other is not node]
    if any(order[user] > order[node] for other in older for user in other.users):
        raise CannotLower(f"expected nothing to read what was overwritten in place, got {node.target} on a part of it")


def functional(target: Callable) -> Callable:
    """The call out of place for one in place; any other call itself."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target
    name = schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    twin = getattr(packet, schema.overload_name or "default", None)
    if twin is None or twin._schema.is_mutable:
        raise CannotLower(f"expected calls that can run out of place, got {target}")
    return twin
