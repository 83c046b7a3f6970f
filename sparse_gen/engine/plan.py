"""What a compiled network will do, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sparse_gen.engine.functional import run_experiments


@dataclass(frozen=True)
class Stage:
    """One convolution: where it is, what it takes and gives, what of it is kept, and who computes it."""

    name: str
    input_shape: tuple[int, int, int]  # C, H, W
    output_shape: tuple[int, int, int]
    kept: int
    total: int
    flops: int  # dense, forward, of one experiment
    kernel: str

    @property
    def density(self) -> float:
        return self.kept / self.total


@dataclass(frozen=True)
class Plan:
    """The stages of a compiled network in the order they run; `print` it for a table."""

    stages: tuple[Stage, ...]
    reason: str

    def __str__(self) -> str:
        def shape(chw):
            return "×".join(map(str, chw))

        header = ("stage", "input", "output", "kept", "density", "MFLOP", "kernel")
        rows = [
            (s.name, shape(s.input_shape), shape(s.output_shape), f"{s.kept:,}", f"{s.density:.1%}",
             f"{s.flops / 1e6:,.1f}", s.kernel)
            for s in self.stages
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        total = sum(stage.flops for stage in self.stages)
        return "\n".join([*(line.rstrip() for line in lines), f"{total / 1e9:.2f} GFLOP forward, dense; {self.reason}"])


def plan_stages(
    network: nn.Module,
    kept: dict[str, int],
    z: torch.Tensor,
    kernels: Mapping[str, str],
    reasons: Mapping[str, str],
    summary: str,
) -> Plan:
    """Run one experiment and note every convolution.

    Args:
        network: from `training_copy`.
        kept: parameter name → kept weights of one experiment; names that are absent are kept whole.
        z: (E, C, H, W); only the first experiment runs.
        kernels: weight's name → the operator that computes its convolution; PyTorch where it is absent.
        reasons: weight's name → why its convolution stays PyTorch's.
        summary: what the plan as a whole is.
    """
    stages, handles = [], []
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue

        def note(layer, inputs, output, name=name):
            weight = layer.weight
            flops = 2 * weight.numel() * output.shape[-2] * output.shape[-1]
            full_name = f"{name}.weight" if name else "weight"
            plain = f"PyTorch ({reasons[full_name]})" if full_name in reasons else "PyTorch"
            stages.append(
                Stage(
                    name, tuple(inputs[0].shape[1:]), tuple(output.shape[1:]),
                    kept.get(full_name, weight.numel()), weight.numel(), flops, kernels.get(full_name, plain),
                )
            )  # fmt: skip

        handles.append(layer.register_forward_hook(note))
    with torch.no_grad():
        run_experiments(network, {}, z[:1])
    for handle in handles:
        handle.remove()
    return Plan(tuple(stages), summary)
