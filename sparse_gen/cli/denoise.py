"""`sparse-gen denoise`."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_gen.cli.errors import one_line_errors
from sparse_gen.experiments.config import DenoiseConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_gen.experiments import DenoiseResult, Start

EXAMPLE = "Example: sparse-gen denoise photo.png --sigma 0.1 --density 0.05 -o results"
OVERFIT_RATIO = 0.3

_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(DenoiseConfig) if field.default is not dataclasses.MISSING
}


def read_number(text: str) -> int | float | str:
    """A number, or the text itself: the configuration then says in its own words what it expected."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _option(name: str, help: str, shown: str | None = None, *flags: str, **settings: Any) -> Any:
    """An option whose default, None, means the configuration's, which the help names."""
    default = shown if shown is not None else f"{_DEFAULTS[name]:g}"
    return typer.Option(*flags, help=f"{help} Default: {default}.", show_default=False, **settings)


def _number(name: str, help: str, shown: str | None = None) -> Any:
    return _option(name, help, shown, parser=read_number, metavar="NUMBER")


@one_line_errors
def command(
    image: Annotated[
        Path | None,
        typer.Argument(help="PNG or JPEG, 8-bit grey or colour. Default: that of --config.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results. Required.", show_default=False),
    ] = None,
    sigma: Annotated[
        float | None,
        _number(
            "sigma",
            "Take IMAGE as clean and add seeded noise of this standard deviation, 0 to 1.",
            "IMAGE is noisy already",
        ),
    ] = None,
    clip: Annotated[
        bool | None,
        _option("clip", "Clip the noisy image to 0 to 1.", "clip", "--clip/--no-clip"),
    ] = None,
    density: Annotated[float | None, _number("density", "Fraction of the parameters to keep.")] = None,
    search_steps: Annotated[int | None, _number("search_steps", "Steps of the mask search.")] = None,
    steps: Annotated[int | None, _number("steps", "Steps of the training after it.")] = None,
    seed: Annotated[int | None, _number("seed", "Seed of noise, network, network input and search.")] = None,
    device: Annotated[str | None, _option("device", "cpu, cuda, cuda:1, ... or auto.", "auto")] = None,
    threads: Annotated[int | None, _number("threads", "CPU threads; the bits depend on it.", "PyTorch's")] = None,
    depth: Annotated[int | None, _number("depth", "Scales of the network.", "the deepest up to 6 that fits")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings, such as a run's config.yaml; options given here win.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train on even if the mask disconnects the network.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write to a folder that already holds files.")] = False,
) -> None:
    """Restore a noisy photograph with a generator pruned at initialisation."""
    given = {
        "image": None if image is None else str(image),
        "sigma": sigma,
        "clip": clip,
        "density": density,
        "search_steps": search_steps,
        "steps": steps,
        "seed": seed,
        "device": device,
        "threads": threads,
        "depth": depth,
        "force": force or None,
    }
    settings = merge_settings({} if config is None else _read(config), given)
    if settings.get("image") is None:
        raise ValueError("image: expected a PNG or JPEG file, got none, name one or a --config that does")
    if output is None:
        raise ValueError("output: expected a folder for the results, got none, add -o DIR")
    _run(DenoiseConfig.from_mapping(settings), output, overwrite)


def _read(config: Path) -> dict[str, Any]:
    from sparse_gen.experiments.settings import read_settings

    return read_settings(config)


def merge_settings(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's settings with those given on the command line (not None) laid over them."""
    merged = file | {name: value for name, value in given.items() if value is not None}
    if given.get("image") is not None:
        merged.pop("image_sha256", None)  # it was that of the file's image
    return merged


def _run(config: DenoiseConfig, output: Path, overwrite: bool) -> None:
    from rich.console import Console

    from sparse_gen.cli.progress import StageBars
    from sparse_gen.experiments import denoise

    console = Console(highlight=False, soft_wrap=True)
    with StageBars() as bars:
        result = denoise(
            config,
            output,
            overwrite=overwrite,
            on_start=lambda start: _print_start(console, start, config),
            progress=bars,
        )
    _print_result(console, result)


def _print_start(console: Console, start: Start, asked: DenoiseConfig) -> None:
    config = start.config
    height, width = start.size
    depth = f"{config.depth}" + ("" if asked.depth else " (the deepest up to 6 that fits)")
    ratio = start.kept / start.measured
    threads = f"{config.threads} thread" + ("s" if config.threads > 1 else "")
    lines = {
        "device": f"{config.device}, fp32 {start.precision}, {threads}",
        "image": f"{width} × {height} pixels, {start.measured:,} values",
        "depth": depth,
        "parameters": f"{start.kept:,} kept of {start.total:,}, {ratio:.2f} per measured value",
        "time": f"about {format_seconds(start.seconds)}",
    }
    for name, text in lines.items():
        console.print(f"{name:<11}{text}", markup=False)
    if ratio > OVERFIT_RATIO:
        console.print(
            f"warning: {ratio:.2f} parameters per measured value, above {OVERFIT_RATIO}: the "
            "network will fit the noise too, lower --density or take fewer --steps",
            markup=False,
        )


def _print_result(console: Console, result: DenoiseResult) -> None:
    from rich.table import Table

    metrics = result.metrics
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    if metrics["psnr"] is not None:
        peak = f"oracle peak, every {metrics['psnr_oracle_peak_every']} steps"
        for name, key, unit in [
            ("PSNR noisy", "psnr_noisy", "dB"),
            ("PSNR masked, untrained", "psnr_masked_untrained", "dB"),
            ("PSNR restored", "psnr", "dB"),
            (f"PSNR {peak}", "psnr_oracle_peak", f"dB at {metrics['psnr_oracle_peak_step']}"),
            ("SSIM restored", "ssim", ""),
        ]:
            value = metrics[key]
            shown = "infinite" if value is None else f"{value:.2f}" if unit else f"{value:.3f}"
            table.add_row(name, f"{shown} {unit}".strip())
    table.add_row("search, training", " + ".join(
        format_seconds(metrics[key]) for key in ("seconds_search", "seconds_fit")
    ))  # fmt: skip
    console.print(table)
    for path in result.files:
        console.print(str(path), markup=False)


def format_seconds(seconds: float) -> str:
    """As people say it: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
