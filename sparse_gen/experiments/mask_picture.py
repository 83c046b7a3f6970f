"""A picture of one mask: what it keeps of each layer, where in a layer, and how sure its search was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_gen.experiments.report import BAR_INCHES, draw_bars, layer_bars, tidy
from sparse_gen.files import atomic_write

if TYPE_CHECKING:
    from sparse_gen.masks import Mask

_DPI = 120
_KEPT, _PRUNED, _BETWEEN = 255, 0, 96
_MOST_PIXELS = 4096


def draw_mask(mask: Mask, path: str | os.PathLike[str], layer: str | None = None, experiment: int = 0) -> None:
    """Draw the density of the layers as bars, and write it as PNG.

    Args:
        mask: where its file holds logits, a histogram of p = sigmoid(logit) is added.
        path: of the PNG.
        layer: a masked parameter with kernel dimensions, whose kernel planes are added.
        experiment: which of several.

    Raises:
        ValueError: there is no such layer or experiment, or its planes would make too large a picture.
        OSError: the file cannot be written.
    """
    figure = build_mask_figure(mask, layer, experiment)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def build_mask_figure(mask: Mask, layer: str | None = None, experiment: int = 0) -> Figure:
    """The figure that `draw_mask` writes."""
    if not 0 <= experiment < mask.experiments:
        raise ValueError(f"expected an experiment from 0 to {mask.experiments - 1}, got {experiment}")
    picture = None if layer is None else plane_picture(_masked(mask, layer, experiment))
    bars = layer_bars(mask)
    widths = [5.5, *([5.5] if picture is not None else []), *([4.0] if mask.logits is not None else [])]
    height = max(3.2, BAR_INCHES * len(bars) + 0.9)
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    draw_bars(panels.pop(0), bars, mask)
    if picture is not None:
        axes, (outputs, inputs, *kernel) = panels.pop(0), _shape(mask, layer)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{layer}: white is kept", fontsize=9, parse_math=False)
        axes.set_xlabel(f"{inputs} input channels, each {kernel[0]}×{kernel[1]}", fontsize=8)
        axes.set_ylabel(f"{outputs} output channels", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    if mask.logits is not None:
        _draw_histogram(panels.pop(0), mask, experiment)
    return figure


def plane_picture(keep: torch.Tensor) -> np.ndarray:
    """A layer's kernel planes side by side, a line of grey between any two.

    Args:
        keep: (Cout, Cin, kh, kw) bool.

    Returns:
        (Cout·(kh + 1) - 1, Cin·(kw + 1) - 1) uint8: a row of planes is an output channel, a column an input channel.

    Raises:
        ValueError: it would have more than 4,096 pixels a side.
    """
    outputs, inputs, kh, kw = keep.shape
    size = outputs * (kh + 1), inputs * (kw + 1)
    if max(size) > _MOST_PIXELS:
        raise ValueError(f"expected a layer of at most {_MOST_PIXELS} pixels a side, got {size[0]}×{size[1]}")
    picture = np.full((outputs, kh + 1, inputs, kw + 1), _BETWEEN, np.uint8)
    picture[:, :kh, :, :kw] = np.where(keep.permute(0, 2, 1, 3).cpu().numpy(), _KEPT, _PRUNED)
    return picture.reshape(size)[:-1, :-1]


def _shape(mask: Mask, layer: str) -> tuple[int, ...]:
    return next(entry.shape for entry in mask.layers() if entry.name == layer)


def _masked(mask: Mask, layer: str, experiment: int) -> torch.Tensor:
    known = [entry.name for entry in mask.layers() if entry.name in mask.tensors and len(entry.shape) == 4]
    if layer not in known:
        listed = ", ".join(known[:30]) + (", …" if len(known) > 30 else "")
        raise ValueError(f"layer: expected one with masked kernels, out of {listed or 'none'}, got {layer!r}")
    keep = mask.tensors[layer]
    return keep[experiment] if mask.has_experiment_axis else keep


def _draw_histogram(axes, mask: Mask, experiment: int) -> None:
    rows = [v[experiment] if mask.has_experiment_axis else v for v in mask.logits.values()]
    p = torch.cat([values.flatten() for values in rows]).sigmoid().cpu().numpy()
    axes.hist(p, bins=100, range=(0, 1), log=True, color="#1f5fa8")
    axes.set_title("weights by their probability p of being kept", fontsize=9)
    tidy(axes, "p")
