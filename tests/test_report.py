"""The figure shows the right things, and nothing in it lies over anything else."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import sparse_gen as sg
from sparse_gen.experiments.report import Report, build_figure, draw_report
from sparse_gen.history import History

EVERY = 10
TITLE = (
    f"{'a_long$name' * 4}, 1234 × 1234, σ = 0.0392, density 0.05, depth 6, 1000 search + 1500 training steps, seed 0"
)


def history(rows: int, start: float, end: float, **rings) -> History:
    record = History()
    for i, loss in enumerate(torch.linspace(start, end, rows)):
        record.record(i * EVERY, loss=loss[None], **{name: (i + 1) * ring[None] for name, ring in rings.items()})
    return record


def report(
    channels=3, size=(20, 24), known=True, rows=50, depth=6, prunable="conv_weights", title=TITLE, rings=None
) -> Report:
    net = sg.generators.Hourglass(channels=(4, 8), depth=depth, out_channels=channels)
    names = [n for n, p in net.named_parameters() if p.ndim == 4 or prunable == "all"]
    parameters = dict(net.named_parameters())
    mask = sg.Mask(
        {name: torch.arange(parameters[name].numel()).view(parameters[name].shape) % 3 == 0 for name in names},
        whole={name: tuple(p.shape) for name, p in parameters.items() if name not in names},
    )
    clean = torch.linspace(0.2, 0.8, channels * size[0] * size[1]).view(1, channels, *size)
    curve = np.interp(range(rows + 1), [0, rows // 2, rows], [10, 28, 27]).tolist()
    return Report(
        title=title,
        noisy=clean + 0.1,
        untrained=clean - 0.2,
        restored=clean + 0.01,
        clean=clean if known else None,
        search=history(rows, 0.11, 0.09),
        fit=history(rows, 0.1, 0.002, **_ring_columns(rings, known)),
        psnr=([*range(0, rows * EVERY, EVERY), rows * EVERY], curve) if known else None,
        every=EVERY,
        mask=mask,
    )


def _ring_columns(rings, known) -> dict[str, torch.Tensor]:
    if rings is None:
        return {}
    falling = 10.0 ** -torch.arange(rings)
    return {"ring_energy": falling, "ring_error": 1e-3 * falling} if known else {"ring_energy": falling}


def axes_by_title(figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_every_image_says_how_far_it_is_from_the_clean_one():
    titles = list(axes_by_title(build_figure(report())))
    assert titles[:4] == ["noisy, 20.00 dB", "masked, untrained, 13.98 dB", "restored, 40.00 dB", "clean"]


def test_without_the_clean_image_there_is_no_psnr():
    titles = list(axes_by_title(build_figure(report(known=False))))
    assert titles[:3] == ["noisy", "masked, untrained", "restored"]
    assert len(titles) == 6
    assert not any("dB" in title for title in titles)


def test_the_peak_is_called_an_oracle_with_its_interval():
    axes = axes_by_title(build_figure(report()))["PSNR, dB"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["last: 27.00 dB", "oracle peak, every 10 steps: 28.00 dB", "noisy: 20.00 dB"]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines[labels[0]].get_xydata().tolist() == [[500, 27]]
    assert lines[labels[1]].get_xydata().tolist() == [[250, 28]]


def test_what_a_rule_selected_stands_beside_the_last_and_the_peak():
    axes = axes_by_title(build_figure(dataclasses.replace(report(), stopped=("WMV", 300, 27.5))))["PSNR, dB"]
    (line,) = [line for line in axes.lines if line.get_label() == "selected by WMV: 27.50 dB"]
    assert line.get_xydata().tolist() == [[300, 27.5]]


def test_the_bars_are_the_density_of_the_convolutions():
    figure = build_figure(report(depth=2))
    axes = figure.axes[-1]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [
        "encoder.0.conv1.1", "encoder.0.conv2.1", "encoder.1.conv1.1", "encoder.1.conv2.1",
        "decoder.0.conv.1", "decoder.1.conv.1", "head",
    ]  # fmt: skip
    expected = [100 * kept / total for _, shape, kept, total in report(depth=2).mask.layers() if len(shape) == 4]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)


def test_biases_and_norms_are_one_bar_where_they_are_pruned():
    axes = build_figure(report(depth=2, prunable="all")).axes[-1]
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == "biases and norms"


@pytest.mark.parametrize("known", [True, False])
def test_bands_are_energies_over_those_of_the_reference(known):
    data = report(rings=5, known=known)
    panels = {title: axes for title, axes in axes_by_title(build_figure(data)).items() if "by frequency" in title}
    reference = {"ring_energy": data.noisy, "ring_error": data.clean}
    assert len(panels) == 1 + known
    for (name, image), axes in zip(reference.items(), panels.values(), strict=False):
        expected = data.fit[name][:, 0] / sg.analysis.ring_energies(image, 5)
        for line, values in zip(axes.lines, expected.T, strict=True):
            np.testing.assert_allclose(line.get_ydata(), values)
            assert line.get_xdata().tolist() == data.fit.step
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 and above"]


def test_of_many_bands_a_few_are_named():
    axes = axes_by_title(build_figure(report(rings=40)))["energy of the error / of the clean image, by frequency"]
    assert len(axes.lines) == 40
    assert len(axes.get_legend().get_texts()) == 8


def test_grey_images_are_drawn_in_grey_over_the_whole_range():
    for axes in build_figure(report(channels=1)).axes[:4]:
        (image,) = axes.images
        assert image.get_cmap().name == "gray"
        assert image.get_clim() == (0, 1)


SHAPES = {
    "square": {"size": (32, 32)},
    "wide": {"size": (8, 64)},
    "tall": {"size": (64, 8)},
    "noisy only": {"known": False},
    "deep": {"depth": 10},
    "shallow": {"depth": 1},
    "one step": {"rows": 1},
    "bands": {"rings": 5},
    "noisy only, wide, many bands": {"known": False, "rings": 30, "size": (8, 64)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_text_lies_over_another_or_outside(name, monkeypatch):
    drawn = {}
    draw = Text.draw

    def note(text, renderer, *arguments, **options):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)
        return draw(text, renderer, *arguments, **options)

    figure = build_figure(report(**SHAPES[name]))
    monkeypatch.setattr(Text, "draw", note)  # tick labels that are not drawn exist all the same
    figure.canvas.draw()
    assert len(drawn) > 20
    for (first, a), (second, b) in combinations(drawn.items(), 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), f"{first} lies over {second}"
    for text, box in drawn.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text} is cut off"


def test_the_file_is_a_png_of_the_figures_size(tmp_path):
    draw_report(report(known=False), tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
