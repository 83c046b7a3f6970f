"""A network as a short list of stages: what the engine reasons about, whoever wrote the module.

Every value is one experiment's feature map, (1, C, H, W); node i computes value i from earlier values. Three kinds of
node are ours (`Conv`, `Norm`, and the shuffling of channels by `Concat` and `Select`); everything else is the ATen call
that it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Value(NamedTuple):
    """Stands for value `index` among a call's arguments."""

    index: int


class Parameter(NamedTuple):
    """Stands for the network's parameter `name` among a call's arguments."""

    name: str


@dataclass(frozen=True)
class Conv:
    """[up-sample ×2] → pad → convolution [→ 2×2 average pool].

    Attributes:
        weight, bias: parameter names; bias may be None.
        shape: of the weight, (out, in, kernel height, kernel width).
        stride: 1 or 2; with a pool, 1 (which runs as 2 on the padded input's 2×2 means).
        padding: pixels on every side.
        padding_mode: "zeros", "reflect" or "replicate".
        upsample: None, "nearest", "bilinear" or "bilinear_corners" (align_corners).
        pool: whether the 2×2 average pool behind it is folded in.
    """

    weight: str
    bias: str | None
    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    padding_mode: str
    upsample: str | None = None
    pool: bool = False


@dataclass(frozen=True)
class Norm:
    """Batch normalisation by the image's own statistics, then LeakyReLU (slope 1: none, 0: ReLU).

    Attributes:
        gamma, beta: parameter names.
        upsample: None, or "bilinear" or "bilinear_corners": the statistics are those of the image so up-sampled ×2,
            though it is not; then without activation.
    """

    gamma: str
    beta: str
    eps: float
    slope: float
    upsample: str | None = None


@dataclass(frozen=True)
class Concat:
    """Channels of several values, one after the other."""


@dataclass(frozen=True)
class Select:
    """Some channels of a value, by their numbers."""

    channels: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """An ATen call that runs as it is.

    Attributes:
        target: what is called.
        arguments, keywords: with `Value` and `Parameter` in place of tensors.
        parameters: the names among them.
        channelwise: None where channels mix; otherwise every output channel depends on that input channel alone, and
            what becomes of one that is constant over the image: "linear" (it stays constant, and a constant added to
            the input is added to the output), "pointwise" (it stays constant), "border" (only zero does),
            "normalising" (it becomes zero).
        keeps_zero: whether a channel of zeros stays one.
    """

    target: Callable
    arguments: tuple
    keywords: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    channelwise: str | None = None
    keeps_zero: bool = False


@dataclass(frozen=True)
class Node:
    """One stage: what it computes from which values, and the shape (C, H, W) that gives."""

    name: str
    op: Conv | Norm | Concat | Select | Call
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Value 0 is z; value i > 0 is what node i - 1 computes; the last value is the output.

    Attributes:
        nodes: in the order of running.
        input_shape: of z, (C, H, W).
        reasons: weight's name → why its convolution stays an ATen call.
    """

    nodes: tuple[Node, ...]
    input_shape: tuple[int, int, int]
    reasons: dict[str, str] = field(default_factory=dict)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.input_shape if value == 0 else self.nodes[value - 1].shape

    def names(self) -> list[str]:
        """The nodes' names; the second of two that share a layer is called "name (2)"."""
        seen: Counter[str] = Counter()
        names = []
        for node in self.nodes:
            seen[node.name] += 1
            names.append(node.name if seen[node.name] == 1 else f"{node.name} ({seen[node.name]})")
        return names

    def consumers(self) -> list[list[int]]:
        """For each value the numbers of the nodes that read it."""
        readers: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for number, node in enumerate(self.nodes):
            for value in set(node.inputs):
                readers[value].append(number)
        return readers


def is_map(tensor: object) -> bool:
    """Whether something is a feature map of one experiment."""
    return isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and len(tensor) == 1
