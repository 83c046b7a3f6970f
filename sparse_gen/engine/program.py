"""A masked network as steps that run one after the other, forward and back, without autograd in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import torch

from sparse_gen.engine.branches import Branch
from sparse_gen.engine.compact import Compaction, compact, united
from sparse_gen.engine.fused_step import ConvHeadStep, ConvNormStep, FusedConvStep
from sparse_gen.engine.graph import Call, Concat, Conv, Graph, Norm, Select
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.layouts import ConvStage, make_step
from sparse_gen.engine.slots import Slots
from sparse_gen.engine.steps import CallStep, ConcatStep, NormHeadStep, NormLoadStep, NormStep, SigmoidStep, Step
from sparse_gen.engine.upsampled_norm import UpsampledNormStep
from sparse_gen.ops.norm_head import MOST_CHANNELS

# Chooses the layout of a convolution.
Choose = Callable[[ConvStage], str]


@dataclass(frozen=True)
class _Stage:
    """A step with its place: the values it reads, the channels it takes of each (None: all), its parameters."""

    step: Step
    inputs: tuple[int, ...]
    selections: tuple[torch.Tensor | None, ...]
    slots: tuple[int, ...]
    value: int
    norm: Norm | None = None


class Program:
    """A network reduced to its live channels, for one experiment or for several in one pass.

    Args:
        graph: from `lower`.
        layout: of the network's parameters.
        keep: (N,) bool, what every experiment keeps; or (E, N), what each of E keeps.
        choose: the layout of each convolution.
        kept: how long an experiment's values are; by default as many as the most that one keeps.
        together: the experiments that one launch will serve, by which layouts are chosen.

    Attributes:
        compaction: what is left of every value; of masks that differ, in any of the experiments.
        graph: the whole network.
        convolutions: value → the convolution that computes it, with its layout.
        runs_in: values of convolutions that run together with a normalisation → that one's value.
        fewest: how many experiments run at least: those that have a mask each.
        together: as given.
    """

    def __init__(
        self,
        graph: Graph,
        layout: ParameterLayout,
        keep: torch.Tensor,
        choose: Choose,
        kept: int | None = None,
        together: int = 1,
    ):
        self._device, self.together = keep.device, together
        keep = keep.cpu().view(-1, keep.shape[-1])
        self.fewest = len(keep)
        self._own = [compact(graph, layout.views(row)) for row in keep]
        self.compaction: Compaction = united(self._own)
        self.convolutions: dict[int, tuple[ConvStage, str]] = {}
        self.graph = graph
        self._slots = Slots(int(keep.sum(dim=1).max()) if kept is None else kept)
        self._stages: list[_Stage] = []
        place = torch.where(keep, keep.cumsum(1) - 1, -1)
        self._build(graph, layout.views(place), choose)
        del self._own
        self._slots.finish(self._device)
        self._stages, self.runs_in = _join_norms(_leave_norms_to_readers(self._stages))
        self._static = self._static_values(graph)
        for stage in self._stages:
            stage.step.constant_input = self._static.issuperset(stage.inputs)
            stage.step.owns_input = self._alone(stage)
            stage.step.alone = self._selections_of(stage.value) == [None]
        self._last_reader = self._last_readers()
        self._of_changing: Program | None = None
        self._of_z = self._selection(torch.arange(graph.input_shape[0]), self.compaction.channels[0])
        self._live_of_z = self.compaction.channels[0].to(self._device)

    def _build(self, graph: Graph, places: dict[str, torch.Tensor], choose: Choose) -> None:
        channels = self.compaction.channels
        heads = _heads(graph, self.compaction)
        for number, node in enumerate(graph.nodes):
            value, live = number + 1, channels[number + 1]
            if not len(live) or value in heads.values():
                continue
            first = self._slots.count
            inputs, wanted = node.inputs, [live] * len(node.inputs)
            if value in heads:
                norm = graph.nodes[heads[value] - 1]
                into = channels[heads[value]]
                for name in (norm.op.gamma, norm.op.beta):
                    self._slots.add(places[name][:, into])
                self._add_weight(node.op, value, into, live, places, None)
                self.convolutions[value] = self._conv_stage(graph, number, into, live), "with its normalisation"
                step, inputs, wanted = NormHeadStep(norm.op), norm.inputs, [into]
            elif isinstance(node.op, Conv):
                stage = self._conv_stage(graph, number, channels[inputs[0]], live)
                layout = choose(stage)
                self.convolutions[value] = stage, layout
                step, sparse = make_step(layout, node.op, stage.mask, self._device)
                self._add_weight(node.op, value, channels[inputs[0]], live, places, stage.mask if sparse else None)
                wanted = [channels[inputs[0]]]
            elif isinstance(node.op, Norm):
                step = NormStep(node.op) if node.op.upsample is None else UpsampledNormStep(node.op, leaves_load=False)
                for name in (node.op.gamma, node.op.beta):
                    self._slots.add(places[name][:, live])
            elif isinstance(node.op, Select):
                step, wanted = None, [torch.tensor(node.op.channels)[live]]
            elif isinstance(node.op, Concat):
                step = ConcatStep()
                parts = torch.zeros(node.shape[0], dtype=torch.bool).index_fill(0, live, True)
                parts = parts.split([graph.shape(x)[0] for x in inputs])
                inputs, wanted = zip(
                    *[(x, part.nonzero()[:, 0]) for x, part in zip(inputs, parts, strict=True) if part.any()],
                    strict=True,
                )
            else:
                sigmoid = node.op.target is torch.ops.aten.sigmoid.default
                step = SigmoidStep() if sigmoid else CallStep(node.op, inputs)
                for name in node.op.parameters:
                    self._slots.add(places[name])
                if node.op.channelwise is None:
                    wanted = [channels[x] for x in inputs]
            selections = tuple(self._selection(channels[x], w) for x, w in zip(inputs, wanted, strict=True))
            slots = tuple(range(first, self._slots.count))
            norm = node.op if isinstance(node.op, Norm) else None
            self._stages.append(_Stage(step or _Identity(), tuple(inputs), selections, slots, value, norm))

    def _conv_stage(self, graph: Graph, number: int, into: torch.Tensor, out: torch.Tensor) -> ConvStage:
        conv, (x,) = graph.nodes[number].op, graph.nodes[number].inputs
        mask = self.compaction.weights[number + 1][out][:, into]
        biased = conv.bias is not None and bool(self.compaction.biases[number + 1][out].any())
        changes = x not in self._static_values(graph)
        where = (self._device, self.together)
        return ConvStage(graph.names()[number], conv, mask, graph.shape(x)[1:], changes, biased, *where)

    def _selection(self, there: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
        """Where the wanted channels stand among those that are there; None for all, in order."""
        return None if torch.equal(there, wanted) else torch.searchsorted(there, wanted).to(self._device)

    def _add_weight(self, conv: Conv, value: int, into, out, places, sparse: torch.Tensor | None):
        """The weight, whole or (with a mask) its kept values alone, and the bias where it matters."""
        kept = self._kept_by_each("weights", value)[:, out][:, :, into]
        place = torch.where(kept, places[conv.weight][:, out][:, :, into], -1)
        self._slots.add(place if sparse is None else place[:, sparse])
        if conv.bias is not None and (kept := self._kept_by_each("biases", value)[:, out]).any():
            self._slots.add(torch.where(kept, places[conv.bias][:, out], -1))

    def _kept_by_each(self, kind: str, value: int) -> torch.Tensor:
        """What reaches the output by an experiment's own mask; the others have zeros there, of which nothing learns."""
        none = torch.zeros_like(getattr(self.compaction, kind)[value])
        return torch.stack([getattr(own, kind).get(value, none) for own in self._own])

    def of_changing_z(self) -> Program:
        """The same for a z that is another at every call, of which nothing that is made needs to be kept."""
        if self._of_changing is None:
            self._of_changing, steps = self.with_steps(copy)
            for step in steps.values():
                step.constant_input = False
        return self._of_changing

    def with_steps(self, wrap: Callable[[Step], Step]) -> tuple[Program, dict[int, Step]]:
        """The same program with every step replaced by `wrap(step)`, and these by value."""
        other = copy(self)
        other._stages = [replace(stage, step=wrap(stage.step)) for stage in self._stages]
        return other, {stage.value: stage.step for stage in other._stages}

    def _alone(self, stage: _Stage) -> bool:
        """Whether a stage alone reads what a convolution made for it."""
        (x, *more) = stage.inputs or (0,)
        readers = sum(other.inputs.count(x) for other in self._stages)
        return not more and readers == 1 and stage.selections == (None,) and x in self.convolutions

    def _selections_of(self, value: int) -> list[torch.Tensor | None]:
        """What its readers take of a value."""
        pairs = [pair for stage in self._stages for pair in zip(stage.inputs, stage.selections, strict=True)]
        return [selection for x, selection in pairs if x == value]

    def _static_values(self, graph: Graph) -> set[int]:
        """Values that depend on z alone: no parameter is on the way."""
        static = {0}
        for stage in self._stages:
            op = graph.nodes[stage.value - 1].op
            if isinstance(op, (Call, Concat, Select)) and not len(stage.slots) and static.issuperset(stage.inputs):
                static.add(stage.value)
        return static

    def _last_readers(self) -> dict[int, int]:
        return {value: number for number, stage in enumerate(self._stages) for value in stage.inputs}

    @torch.no_grad()
    def prepare(self, z: torch.Tensor, experiments: int, *, alone: bool = False) -> dict[int, torch.Tensor]:
        """z (E or 1, C, H, W) as value 0 and, unless `alone`, what depends on nothing else, for `forward`."""
        values = {0: _taken(z, self._of_z)}
        for stage in [] if alone else self._stages:
            if stage.value in self._static:
                inputs = [_taken(values[x], s) for x, s in zip(stage.inputs, stage.selections, strict=True)]
                values[stage.value], _ = stage.step.forward(inputs, [], False)
        if len(z) == experiments:
            return values
        return {value: x.expand(experiments, *x.shape[1:]).contiguous() for value, x in values.items()}

    def forward(self, values: torch.Tensor, given: dict[int, torch.Tensor], tape: list | None) -> torch.Tensor:
        """The output (E, …) from the kept values (E, kept); what the backward needs is appended to `tape`.

        `given` holds z as value 0, and may hold others of `prepare`.
        """
        parameters = self._slots.of(len(values)).read(values)
        known = dict(given)
        for number, stage in enumerate(self._stages):
            if stage.value in given:
                continue
            inputs = [_taken(known[x], s) for x, s in zip(stage.inputs, stage.selections, strict=True)]
            own = [parameters[slot] for slot in stage.slots]
            known[stage.value], kept = stage.step.forward(inputs, own, tape is not None)
            if tape is not None:
                tape.append((stage, kept, own))
            for x in set(stage.inputs):
                if self._last_reader[x] == number and x not in given:
                    del known[x]
        return known[self._stages[-1].value]

    def backward(
        self,
        gradient: torch.Tensor,
        values: torch.Tensor,
        tape: list,
        given: dict[int, torch.Tensor],
        needs_z: bool,
        branch: Branch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of the kept values and, if asked for, of z; empties the tape.

        The gradients of weights are computed on `branch`, if there is one, beside those that others wait for.
        """
        gradients: dict[int, torch.Tensor] = {self._stages[-1].value: gradient}
        parameter_gradients: list[torch.Tensor | None] = [None] * self._slots.count
        while tape:
            stage, kept, own = tape.pop()
            if stage.value not in gradients:
                continue
            needs = [needs_z or x not in self._static for x in stage.inputs]
            grad_inputs, grad_own = _gradients(stage.step, gradients.pop(stage.value), kept, own, needs, branch)
            del kept
            for slot, grad in zip(stage.slots, grad_own, strict=True):
                parameter_gradients[slot] = grad
            for x, selection, grad, need in zip(stage.inputs, stage.selections, grad_inputs, needs, strict=True):
                if not need or grad is None:
                    continue
                if selection is not None:
                    whole = grad.new_zeros(len(grad), self.compaction.live(x), *grad.shape[2:])
                    grad = whole.index_copy_(1, selection, grad)
                gradients[x] = gradients[x] + grad if x in gradients else grad
        if branch is not None:
            branch.join()
        grad_z = None
        if needs_z:
            grad_z = values.new_zeros(len(values), *self.graph.input_shape)
            if 0 in gradients:
                grad_z.index_copy_(1, self._live_of_z, gradients[0])
        return self._slots.of(len(values)).write(parameter_gradients, values), grad_z


def _gradients(step: Step, gradient: torch.Tensor, kept, own, needs: list[bool], branch: Branch | None):
    """`Step.backward`, where it can be on both sides of a fork."""
    if branch is None or not step.splits or not needs[0]:
        return step.backward(gradient, kept, own, needs)
    gradient = gradient.contiguous()
    grad_own = branch.run(lambda: step.backward(gradient, kept, own, [False])[1], (gradient, kept, own))
    return [step.input_gradient(gradient, kept, own)], grad_own


def _leave_norms_to_readers(stages: list[_Stage]) -> list[_Stage]:
    """The same stages with normalisations, and pairs of them, that only readers of loads read turned into loads."""
    readers: dict[int, list[_Stage]] = {}
    for stage in stages:
        for x, selection in zip(stage.inputs, stage.selections, strict=True):
            readers.setdefault(x, []).append(stage if selection is None else None)

    def can_be_left(stage: _Stage) -> bool:
        reading = readers.get(stage.value, [])
        return bool(reading) and all(reader is not None and reader.step.reads_loads for reader in reading)

    made: dict[int, _Stage | None] = {}
    by_value = {stage.value: stage for stage in stages}
    for stage in stages:
        if stage.norm is None or not can_be_left(stage):
            continue
        if stage.norm.upsample is not None:
            made[stage.value] = replace(stage, step=UpsampledNormStep(stage.norm, leaves_load=True))
            continue
        before = by_value.get(stage.inputs[0])
        pair = before is not None and before.norm is not None and readers[before.value] == [stage]
        if pair and stage.norm.slope == 1.0 and stage.selections == (None,):
            step = NormLoadStep(before.norm, stage.norm)
            made[before.value] = None
            made[stage.value] = replace(
                stage, step=step, inputs=before.inputs, selections=before.selections, slots=before.slots + stage.slots
            )
        else:
            made[stage.value] = replace(stage, step=NormLoadStep(stage.norm))
    return [left for stage in stages if (left := made.get(stage.value, stage)) is not None]


def _join_norms(stages: list[_Stage]) -> tuple[list[_Stage], dict[int, int]]:
    """The same stages with convolutions joined to the normalisations that alone read them, and which were."""
    readers = Counter(x for stage in stages for x in stage.inputs)
    by_value = {stage.value: stage for stage in stages}
    made: dict[int, _Stage] = {}
    runs_in: dict[int, int] = {}
    for stage in stages:
        conv = by_value.get(stage.inputs[0]) if stage.inputs else None
        joined = {NormLoadStep: ConvNormStep, NormHeadStep: ConvHeadStep}.get(type(stage.step))
        able = joined is not None and conv is not None and isinstance(conv.step, FusedConvStep)
        if able and readers[conv.value] == 1 and stage.selections == (None,):
            step, slots = joined(conv.step, stage.step, len(conv.slots)), conv.slots + stage.slots
            made[stage.value] = replace(
                stage, step=step, inputs=conv.inputs, selections=conv.selections, slots=slots, norm=None
            )
            runs_in[conv.value] = stage.value
        head = made.get(stage.inputs[0]) if isinstance(stage.step, SigmoidStep) else None
        alone = head is not None and readers[head.value] == 1 and stage.selections == (None,)
        if alone and isinstance(head.step, ConvHeadStep):
            made[stage.value] = replace(head, step=head.step.with_sigmoid(), value=stage.value)
            runs_in |= dict.fromkeys(
                [*(v for v, where in runs_in.items() if where == head.value), head.value], stage.value
            )
    return [made.get(stage.value, stage) for stage in stages if stage.value not in runs_in], runs_in


def _heads(graph: Graph, compaction: Compaction) -> dict[int, int]:
    """Values of 1×1 convolutions to a few channels → the normalisation's value that they alone read."""
    readers = graph.consumers()
    found = {}
    for value, node in enumerate(graph.nodes, start=1):
        op = node.op
        if not isinstance(op, Conv) or op.shape[2:] != (1, 1) or op.upsample is not None or op.pool:
            continue
        (x,) = node.inputs
        plain = op.stride == 1 and op.padding == 0 and 0 < compaction.live(value) <= MOST_CHANNELS
        if plain and x and isinstance(graph.nodes[x - 1].op, Norm) and len(readers[x]) == 1:
            found[value] = x
    return found


class _Identity(Step):
    """For a selection of channels, which happens on the way in."""

    def forward(self, inputs, parameters, trains):
        return inputs[0], None

    def backward(self, gradient, kept, parameters, needs):
        return [gradient], []


def _taken(x: torch.Tensor, selection: torch.Tensor | None) -> torch.Tensor:
    return x if selection is None else x.index_select(1, selection)
