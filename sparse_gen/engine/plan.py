"""What a compiled network does, stage by stage: to read, to store, and to have it done again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_gen.engine.functional import run_experiments
from sparse_gen.engine.graph import Call, Conv, Graph, Node, Norm
from sparse_gen.engine.layouts import multiplications
from sparse_gen.engine.program import Program
from sparse_gen.files import write_json

VERSION = 1
LEFT_OUT = "left out"


@dataclass(frozen=True)
class Stage:
    """One convolution: where it is, what it takes and gives, what of it is kept, and how it runs.

    Attributes:
        name: its weight's name without ".weight".
        weight_shape: (out, in, kernel height, kernel width).
        input_shape, output_shape: (C, H, W), before the up-sampling and after the pool that are folded in.
        live_in, live_out: channels that are computed.
        kept: weights that the mask keeps.
        live_kept: of these, the ones that reach the output.
        flops, flops_after: forward, of the whole convolution and of what runs; two a multiplication.
        layout: how it runs; "left out" where nothing of it reaches the output.
        folds: what is folded in, such as "pool folded".
        ms: forward and backward, where they were measured; on a GPU of all experiments that share a pass.
    """

    name: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    live_in: int
    live_out: int
    kept: int
    live_kept: int
    flops: int
    flops_after: int
    layout: str
    folds: str = ""
    ms: float | None = None

    @property
    def total(self) -> int:
        return prod(self.weight_shape)

    @property
    def density(self) -> float:
        """Kept of all weights."""
        return self.kept / self.total

    @property
    def live_density(self) -> float:
        """Kept weights inside the live channels."""
        inside = self.live_in * self.live_out * prod(self.weight_shape[2:])
        return self.live_kept / inside if inside else 0.0

    @property
    def kernel(self) -> str:
        return f"{self.layout}, {self.folds}" if self.folds else self.layout


@dataclass(frozen=True)
class Other:
    """What is not a convolution: its kind, how many there are, and their milliseconds where they were measured."""

    kind: str
    count: int
    ms: float | None = None


@dataclass(frozen=True)
class Plan:
    """The stages of a compiled network; `print` it for a table.

    Attributes:
        programs: the convolutions in the order they run, of each experiment that has a mask of its own.
        reason: what the plan as a whole is.
        input_shape: of z, (C, H, W).
        dtype: of z.
        machine: processor, instruction set, threads and versions it was made for.
        others: normalisations and what else there is.
        calls: plain PyTorch, and why.
    """

    programs: tuple[tuple[Stage, ...], ...]
    reason: str
    input_shape: tuple[int, ...]
    dtype: str
    machine: dict[str, Any] = field(default_factory=dict)
    others: tuple[Other, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of the first experiment."""
        return self.programs[0]

    @property
    def layouts(self) -> list[list[str]]:
        """Of every stage of every program: what the bits of a run depend on."""
        return [[stage.kernel for stage in stages] for stages in self.programs]

    def replace(self, layouts: Mapping[str, str]) -> Plan:
        """The plan with other layouts for some stages, for `sg.compile(..., plan=…)`.

        Raises:
            ValueError: a name is not that of a stage.
        """
        names = [stage.name for stage in self.stages]
        for name in layouts:
            if name not in names:
                nearest = difflib.get_close_matches(str(name), names, n=1)
                advice = f"did you mean {nearest[0]}?" if nearest else f"use {', '.join(names)}"
                raise ValueError(f"plan: expected the name of a stage, got {name!r}, {advice}")

        def changed(stage: Stage) -> Stage:
            layout = layouts.get(stage.name, stage.layout)
            return stage if layout == stage.layout else dataclasses.replace(stage, layout=layout, ms=None)

        programs = tuple(tuple(map(changed, stages)) for stages in self.programs)
        return dataclasses.replace(self, programs=programs)

    def plain(self) -> dict[str, Any]:
        """As plain data, which `from_plain` takes and JSON holds."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_plain(cls, data: Any) -> Plan:
        """
        Raises:
            ValueError: it is no plan, or one of another version.
        """
        try:
            if data["version"] != VERSION:
                raise ValueError(f"plan: expected version {VERSION}, got {data['version']!r}, compile without it")
            programs = tuple(
                tuple(Stage(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}) for s in stages)
                for stages in data["programs"]
            )
            others = tuple(Other(**other) for other in data["others"])
            return cls(
                programs, str(data["reason"]), tuple(data["input_shape"]), str(data["dtype"]), dict(data["machine"]),
                others, tuple(data["calls"]),
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError):
            raise ValueError("plan: expected what Plan.save wrote, got something else, compile without it") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, self.plain())

    @classmethod
    def to_go_on_with(cls, stored: Path, wanted: Plan | str | None) -> Plan | str | None:
        """What an interrupted run went by, where it is stored and nothing else is asked for.

        Raises:
            OSError, ValueError: as `load`.
        """
        return cls.load(stored) if wanted in (None, "measure") and stored.is_file() else wanted

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no plan.
        """
        with open(path, "rb") as file:
            content = file.read()
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(f"plan: expected JSON that Plan.save wrote, got {path}, which is not, remove it") from None
        return cls.from_plain(data)

    def __str__(self) -> str:
        from sparse_gen.engine.table import table

        return table(self)


def engine_stages(graph: Graph, program: Program, keep: Mapping[str, torch.Tensor]) -> tuple[Stage, ...]:
    """The convolutions of a program, those that are left out included.

    Args:
        graph: what the program runs.
        program: one experiment's.
        keep: parameter's name → bool of its shape.
    """
    stages = []
    for value, node in enumerate(graph.nodes, start=1):
        if isinstance(node.op, Conv):
            stages.append(_conv_stage(graph, program, value, keep))
        elif weight := plain_weight(node, graph):
            stages.append(_plain_stage(graph, program, value, weight, keep))
    return tuple(stages)


def _conv_stage(graph: Graph, program: Program, value: int, keep: Mapping[str, torch.Tensor]) -> Stage:
    node, name = graph.nodes[value - 1], graph.names()[value - 1]
    conv = node.op
    (x,) = node.inputs
    positions = node.shape[1] * node.shape[2]  # where it runs, the pool folded in
    whole = 2 * prod(conv.shape) * _dense_positions(conv, graph.shape(x))
    shapes = (conv.shape, graph.shape(x), node.shape)
    kept = int(keep[conv.weight].sum())
    if value not in program.convolutions:
        return Stage(name, *shapes, 0, 0, kept, 0, whole, 0, LEFT_OUT)
    stage, layout = program.convolutions[value]
    out, into = stage.mask.shape[:2]
    after = 2 * multiplications(layout, conv, stage.mask, positions)
    folds = "pool folded" if conv.pool else ""
    live = (into, out, kept, int(stage.mask.sum()))
    return Stage(name, *shapes, *live, whole, after, layout, folds)


def _plain_stage(graph: Graph, program: Program, value: int, weight: str, keep: Mapping[str, torch.Tensor]) -> Stage:
    """A convolution that stays an ATen call."""
    node = graph.nodes[value - 1]
    shape, kept = tuple(keep[weight].shape), int(keep[weight].sum())
    (x, *_) = node.inputs
    flops = 2 * prod(shape) * prod(node.shape[1:])
    live = (program.compaction.live(x), program.compaction.live(value), kept, kept)
    name = weight.removesuffix(".weight")
    shapes = (shape, graph.shape(x), node.shape)
    return Stage(name, *shapes, *live, flops, flops, f"PyTorch ({graph.reasons[weight]})")


def _dense_positions(conv: Conv, input_shape: tuple[int, ...]) -> int:
    """Pixels that the convolution as it was written has to compute."""
    sizes = [size * (2 if conv.upsample else 1) for size in input_shape[1:]]
    rows, columns = (
        (size + 2 * conv.padding - kernel) // conv.stride + 1
        for size, kernel in zip(sizes, conv.shape[2:], strict=True)
    )
    return rows * columns


def others_of(graph: Graph, program: Program) -> tuple[tuple[Other, ...], tuple[str, ...]]:
    """`Plan.others` and `Plan.calls` of a program."""
    live = [node for value, node in enumerate(graph.nodes, start=1) if program.compaction.live(value)]
    kinds = Counter(kind_of(node, graph) for node in live)
    unexplained = [
        node.op
        for node in graph.nodes
        if isinstance(node.op, Call) and graph.reasons.keys().isdisjoint(node.op.parameters)
    ]
    calls = Counter(map(_call_name, unexplained))
    plain = [f"{name} ×{count}" if count > 1 else name for name, count in calls.items()]
    lines = [f"{', '.join(plain)}: no operator of ours"] if plain else []
    return (
        tuple(Other(kind, count) for kind, count in kinds.items() if kind != CONVOLUTION),
        (*lines, *(f"{name}: {reason}" for name, reason in graph.reasons.items())),
    )


CONVOLUTION = "convolution"


def plain_weight(node: Node, graph: Graph) -> str | None:
    """The weight of a convolution that stays an ATen call; None of anything else."""
    if not isinstance(node.op, Call) or _call_name(node.op) != "conv2d" or not node.inputs:
        return None
    return next((name for name in node.op.parameters if name in graph.reasons), None)


def kind_of(node: Node, graph: Graph) -> str:
    """What a node counts as in a plan."""
    if isinstance(node.op, Conv) or plain_weight(node, graph):
        return CONVOLUTION
    if isinstance(node.op, Norm):
        return "normalisation and activation"
    return "plain PyTorch" if isinstance(node.op, Call) else "concatenation and selection"


def _call_name(call: Call) -> str:
    return str(call.target).removeprefix("aten.").partition(".")[0]


def reference_stages(network: nn.Module, keep: Mapping[str, torch.Tensor], z: torch.Tensor) -> tuple[Stage, ...]:
    """The convolutions of a network that runs as plain PyTorch.

    Args:
        network: from `training_copy`.
        keep: parameter's name → bool of its shape.
        z: (E, C, H, W); only the first experiment runs.
    """
    stages, handles = [], []
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue

        def note(layer, inputs, output, name=name):
            shapes = tuple(layer.weight.shape), tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            flops = 2 * layer.weight.numel() * output.shape[-2] * output.shape[-1]
            kept = int(keep[f"{name}.weight" if name else "weight"].sum())
            live = (layer.in_channels, layer.out_channels, kept, kept)
            stages.append(Stage(name, *shapes, *live, flops, flops, "PyTorch"))

        handles.append(layer.register_forward_hook(note))
    with torch.no_grad():
        run_experiments(network, {}, z[:1])
    for handle in handles:
        handle.remove()
    return tuple(stages)
