"""One figure of a run: its images, its curves, and where the mask keeps weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparse_gen.analysis import ring_energies
from sparse_gen.files import atomic_write
from sparse_gen.fitting import psnr

if TYPE_CHECKING:
    from sparse_gen.history import History
    from sparse_gen.masks import Mask

_PANEL_INCHES = 3.3
BAR_INCHES = 0.17
_DPI = 120
_MOST_BANDS_NAMED = 8
_SEARCH, _FIT, _PEAK, _STOPPED, _NOISY = "#7f7f7f", "#1f5fa8", "#d1601f", "#2c8a4b", "#5a5a5a"


@dataclass(frozen=True)
class Report:
    """What the figure shows.

    Attributes:
        title: one line.
        noisy, untrained, restored: images (1, C, H, W) in [0, 1], C 1 or 3.
        clean: the same, or None where it is not known.
        search, fit: histories with a column "loss"; the fit's may have "ring_energy" and "ring_error".
        psnr: training steps and the PSNR after them, or None without `clean`.
        every: steps between two of these, said beside the oracle peak.
        mask: kept density by layer.
        stopped: what the stopping rule selected, as the rule's name, training step and PSNR, or None.
    """

    title: str
    noisy: torch.Tensor
    untrained: torch.Tensor
    restored: torch.Tensor
    clean: torch.Tensor | None
    search: History
    fit: History
    psnr: tuple[Sequence[int], Sequence[float]] | None
    every: int
    mask: Mask
    stopped: tuple[str, int, float] | None = None


def draw_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the figure and write it as PNG.

    Raises:
        OSError: if it cannot be written.
    """
    figure = build_figure(report)
    with atomic_write(path) as file, warnings.catch_warnings():
        # A file's name may be in a script that the font lacks; it is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=_DPI)


def build_figure(report: Report) -> Figure:
    """Images above; below them losses, the PSNR where it is known, the density of layers, and frequency bands."""
    images = _images(report)
    bars = layer_bars(report.mask)
    height, width = report.noisy.shape[-2:]
    image_inches = _PANEL_INCHES * min(max(height / width, 0.2), 2.0) + 0.6
    curve_inches = max(3.2, BAR_INCHES * len(bars) + 0.7)
    bands = _bands(report)
    band_inches = 3.2 if bands else 0
    # Not pyplot: it keeps every figure alive and may want a display.
    figure = Figure(
        figsize=(_PANEL_INCHES * len(images), image_inches + curve_inches + band_inches),
        layout=ConstrainedLayoutEngine(h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    # Parts, laid out each by itself: long layer names would push the images apart.
    heights = [image_inches, curve_inches, *([band_inches] if bands else [])]
    upper, lower, *lowest = figure.subfigures(len(heights), 1, height_ratios=heights)
    # A character is about 0.58 of the font's size wide: the title stays one line inside the figure.
    fitting = 72 * figure.get_figwidth() / (0.58 * max(len(report.title), 1))
    upper.suptitle(report.title, fontsize=min(10, fitting), parse_math=False)
    for axes, (name, image) in zip(upper.subplots(1, len(images)), images, strict=True):
        _draw_image(axes, name, image, report.clean)

    for part in lowest:
        for axes, (title, energies) in zip(part.subplots(1, len(bands), squeeze=False)[0], bands, strict=True):
            _draw_bands(axes, report.fit, title, energies)

    panels = lower.subplots(1, len(images))
    if report.search.step:
        _draw_loss(panels[0], report.search, "loss of the mask search", "search step", _SEARCH)
    else:
        panels[0].set_title("mask as given, no search", fontsize=9)
        panels[0].set_axis_off()
    _draw_loss(panels[1], report.fit, "loss of the training", "training step", _FIT)
    if report.psnr is not None:
        _draw_psnr(panels[2], report)
    draw_bars(panels[-1], bars, report.mask)
    return figure


def _images(report: Report) -> list[tuple[str, torch.Tensor]]:
    images = [
        ("noisy", report.noisy),
        ("masked, untrained", report.untrained),
        ("restored", report.restored),
    ]
    return images if report.clean is None else [*images, ("clean", report.clean)]


def _draw_image(axes, name: str, image: torch.Tensor, clean: torch.Tensor | None) -> None:
    if clean is not None and name != "clean":
        name += f", {psnr(image, clean.to(image.device)).item():.2f} dB"
    pixels = image[0].detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[:, :, 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels)
    axes.set_title(name, fontsize=10)
    axes.set_axis_off()


def _draw_loss(axes, history: History, title: str, label: str, colour: str) -> None:
    loss = history["loss"][:, 0]
    axes.plot(history.step, loss, color=colour, linewidth=1, marker=_marker(history))
    axes.set_title(f"{title}, {loss[-1]:.3g} at the end", fontsize=9)
    _scale_by_range(axes, loss)
    tidy(axes, label)


def _bands(report: Report) -> list[tuple[str, torch.Tensor]]:
    """Titles and (T, rings): the energy of the output by band over the noisy image's, of its error over the clean's."""
    bands = []
    if "ring_energy" in report.fit:
        energy = report.fit["ring_energy"][:, 0]
        bands.append(("energy of the output / of the noisy image, by frequency", energy / _rings(report.noisy, energy)))
    if "ring_error" in report.fit and report.clean is not None:
        error = report.fit["ring_error"][:, 0]
        bands.append(("energy of the error / of the clean image, by frequency", error / _rings(report.clean, error)))
    return bands


def _rings(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return ring_energies(image.detach().cpu(), like.shape[1]).clamp_min(torch.finfo(like.dtype).tiny)


def _draw_bands(axes, history: History, title: str, energies: torch.Tensor) -> None:
    rings = energies.shape[1]
    colours = colormaps["viridis"]([0.9 * ring / max(rings - 1, 1) for ring in range(rings)])
    named = {round(i * (rings - 1) / (_MOST_BANDS_NAMED - 1)) for i in range(_MOST_BANDS_NAMED)}
    for ring, colour in enumerate(colours):
        # The last ring goes on to the corners of the spectrum.
        upper = f" to {(ring + 1) / rings:.2g}" if ring < rings - 1 else " and above"
        name = f"{ring / rings:.2g}{upper}" if rings <= _MOST_BANDS_NAMED or ring in named else None
        axes.plot(history.step, energies[:, ring], color=colour, linewidth=1, marker=_marker(history), label=name)
    axes.set_title(title, fontsize=9)
    _scale_by_range(axes, energies)
    tidy(axes, "training step")
    # Beside the curves, which may be anywhere.
    axes.legend(title="of Nyquist", title_fontsize=7, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _scale_by_range(axes, values: torch.Tensor) -> None:
    """A logarithmic axis, unless the values lie within a few octaves: it would have no round numbers to label."""
    if values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        decades = (values.max() / values.min()).log10()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_psnr(axes, report: Report) -> None:
    step, curve = report.psnr
    peak = curve.index(max(curve))
    noisy = psnr(report.noisy, report.clean.to(report.noisy.device)).item()
    axes.plot(step, curve, color=_FIT, linewidth=1)
    axes.plot(step[-1], curve[-1], "o", color=_FIT, markersize=7, label=f"last: {curve[-1]:.2f} dB")
    axes.plot(
        step[peak],
        curve[peak],
        "^",
        color=_PEAK,
        markersize=5,
        label=f"oracle peak, every {report.every} steps: {curve[peak]:.2f} dB",
    )
    if report.stopped is not None:
        rule, at, value = report.stopped
        axes.plot(at, value, "s", color=_STOPPED, markersize=5, label=f"selected by {rule}: {value:.2f} dB")
    if noisy < float("inf"):
        axes.axhline(noisy, color=_NOISY, linewidth=1, linestyle=":", label=f"noisy: {noisy:.2f} dB")
    axes.set_title("PSNR, dB", fontsize=9)
    tidy(axes, "training step")
    axes.legend(fontsize=7, loc="lower right", framealpha=0.9)


def draw_bars(axes, bars: list[tuple[str, float]], mask: Mask) -> None:
    """Draw what `layer_bars` gave, in per cent."""
    names = [name for name, _ in bars]
    percent = [100 * density for _, density in bars]
    rows = range(len(bars))
    drawn = axes.barh(rows, percent, color=_FIT, height=0.75)
    axes.bar_label(drawn, [f"{value:.3g}" for value in percent], fontsize=6, padding=2)
    axes.set_yticks(rows, names, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max([*percent, 1e-9]))
    axes.set_title(f"kept weights: {100 * mask.density:.3g} % of all", fontsize=9)
    tidy(axes, "% of a layer")
    axes.tick_params(axis="y", labelsize=6, length=0)
    axes.grid(axis="y", visible=False)


def layer_bars(mask: Mask) -> list[tuple[str, float]]:
    """Density of each convolution, and of biases and normalisation together unless kept whole.

    One by one they would be most of the bars, and one at 100 % would flatten the others.
    """
    convolutions, rest_kept, rest_total = [], 0, 0
    for name, shape, kept, total in mask.layers():
        if len(shape) > 1:
            convolutions.append((name.removesuffix(".weight"), kept / total))
        else:
            rest_kept, rest_total = rest_kept + kept, rest_total + total
    if rest_kept == rest_total:
        return convolutions
    return [*convolutions, ("biases and norms", rest_kept / rest_total)]


def _marker(history: History) -> str:
    return "." if len(history.step) == 1 else ""


def tidy(axes, label: str) -> None:
    """Small ticks, a faint grid, and a label below."""
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
