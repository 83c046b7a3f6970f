"""`sparse-gen denoise`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_gen.cli.errors import describe, one_line_errors
from sparse_gen.cli.signals import Interrupted, stop_on_signal
from sparse_gen.cli.times import format_seconds
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.denoise import PLANS
from sparse_gen.experiments.unfinished import FOLDER, is_unfinished, settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_gen.cli.signals import Received
    from sparse_gen.experiments import DenoiseResult, Start

EXAMPLE = "Example: sparse-gen denoise photo.png --sigma 0.1 --density 0.05 -o results"
OVERFIT_RATIO = 0.3
STAGES = {"search": "mask search", "fit": "training"}

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
        typer.Argument(help="PNG, JPEG or TIFF, grey or colour. Default: that of --config.", show_default=False),
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
    mask: Annotated[
        Path | None,
        _option("mask", "Mask file to take instead of searching, with the weights that it holds.", "a search"),
    ] = None,
    search_steps: Annotated[int | None, _number("search_steps", "Steps of the mask search.")] = None,
    steps: Annotated[int | None, _number("steps", "Steps of the training after it.")] = None,
    stop: Annotated[
        str | None,
        _option("stop", "Rule that ends the training without the clean image: wmv, emv or none.", "none"),
    ] = None,
    generator: Annotated[str | None, _option("generator", "hourglass, skip or decoder.", "hourglass")] = None,
    seed: Annotated[int | None, _number("seed", "Seed of noise, network, network input and search.")] = None,
    device: Annotated[str | None, _option("device", "cpu, cuda, cuda:1, ... or auto.", "auto")] = None,
    threads: Annotated[int | None, _number("threads", "CPU threads; the bits depend on it.", "PyTorch's")] = None,
    engine: Annotated[str | None, _option("engine", "auto, or reference: everything as plain PyTorch.", "auto")] = None,
    depth: Annotated[int | None, _number("depth", "Scales of the network.", "the deepest that fits")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings, such as a run's config.yaml; options given here win.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train on even if the mask disconnects the network.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write to a folder that already holds files.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the output folder.")
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Store where the run is this often, in OUTPUT/checkpoints.", metavar="NUMBER")
    ] = 60,
) -> None:
    """Restore a noisy photograph with a generator pruned at initialisation.

    A run that was interrupted by Ctrl-C, SIGTERM or a crash goes on with: sparse-gen denoise --resume -o OUTPUT
    """
    given = {
        "image": None if image is None else str(image),
        "sigma": sigma,
        "clip": clip,
        "density": density,
        "mask": None if mask is None else str(mask),
        "search_steps": search_steps,
        "steps": steps,
        "stop": stop,
        "generator": generator,
        "seed": seed,
        "device": device,
        "threads": threads,
        "engine": engine,
        "depth": depth,
        "force": force or None,
    }
    file = {} if config is None else _read(config)
    settings = merge_settings(file, given)
    if output is None and (resume or settings.get("image") is not None):
        raise ValueError("output: expected a folder for the results, got none, add -o DIR")
    if resume:
        if overwrite:
            raise ValueError("resume: expected --resume or --overwrite, got both, leave one out")
        settings = merge_settings(settings_of(output).plain(), settings)
    elif settings.get("image") is None:
        raise ValueError("image: expected a PNG, JPEG or TIFF file, got none, name one or a --config that does")
    idle = [f"--{name.replace('_', '-')}" for name in ("density", "search_steps") if given[name] is not None]
    if settings.get("mask") is not None and idle:
        raise ValueError(
            f"mask: expected nothing about a search beside a mask, got {' and '.join(idle)}, leave one out"
        )
    plans = None if config is None or not _changes_nothing(file, given) else config.with_name(PLANS)
    _run(DenoiseConfig.from_mapping(settings), output, overwrite, resume, checkpoint_seconds, plans)


def _read(config: Path) -> dict[str, Any]:
    from sparse_gen.experiments.settings import read_settings

    return read_settings(config)


def merge_settings(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's settings with those given on the command line (not None) laid over them."""
    merged = file | {name: value for name, value in given.items() if value is not None}
    if given.get("image") is not None:
        merged.pop("image_sha256", None)  # it was that of the file's image
    if given.get("mask") is not None:
        merged.pop("mask_sha256", None)
    return merged


def _changes_nothing(file: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether the plan that a run left beside its settings is still one of these settings."""
    return all(file.get(name) == value for name, value in given.items() if value is not None and name != "force")


def _run(
    config: DenoiseConfig,
    output: Path,
    overwrite: bool,
    resume: bool,
    checkpoint_seconds: float,
    plans: Path | None,
) -> None:
    from rich.console import Console

    from sparse_gen.checkpoint import Checkpoints
    from sparse_gen.cli.progress import StageBars
    from sparse_gen.experiments import denoise

    console = Console(highlight=False, soft_wrap=True)
    checkpoints = Checkpoints(output / FOLDER, seconds=checkpoint_seconds, resume=resume)
    with (
        stop_on_signal(checkpoints.request_stop) as received,
        _telling_how_to_resume(output, received),
        StageBars() as bars,
    ):
        result = denoise(
            config,
            output,
            overwrite=overwrite,
            plans=plans if plans is not None and plans.is_file() and not resume else None,
            checkpoints=checkpoints,
            on_start=lambda start: _print_start(console, start, config),
            progress=bars,
        )
    _print_result(console, result)


@contextmanager
def _telling_how_to_resume(output: Path, received: Received) -> Iterator[None]:
    """Add the command that goes on with the run to what ends it."""
    from sparse_gen.checkpoint import RunInterrupted
    from sparse_gen.experiments import DisconnectedError

    resume = f"go on with: sparse-gen denoise --resume -o {shlex.quote(str(output))}"
    try:
        yield
    except (RunInterrupted, Interrupted) as error:
        raise Interrupted(received.code, f"{error}; {resume}" if is_unfinished(output) else str(error)) from None
    except DisconnectedError as error:
        raise DisconnectedError(f"{error} ({resume} --force)") from None
    except OSError as error:
        if not is_unfinished(output) or isinstance(error, FileExistsError):
            raise
        raise OSError(f"{describe(error)}; {resume}") from None


def _print_start(console: Console, start: Start, asked: DenoiseConfig) -> None:
    config = start.config
    height, width = start.size
    depth = f"{config.depth}" + ("" if asked.depth else " (the deepest that fits)")
    ratio = start.kept / start.measured
    threads = f"{config.threads} thread" + ("s" if config.threads > 1 else "")
    lines = {
        "device": f"{config.device}, fp32 {start.precision}, {threads}",
        "image": f"{width} × {height} pixels, {start.measured:,} values",
        "depth": depth if config.generator == "hourglass" else f"{depth}, {config.generator}",
        "parameters": f"{start.kept:,} kept of {start.total:,}, {ratio:.2f} per measured value",
        "time": f"about {format_seconds(start.seconds)}",
    }
    if start.resumed_at is not None:
        stage, step = start.resumed_at
        lines["resumed"] = f"after step {step:,} of the {STAGES[stage]}"
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
        restored = "PSNR restored"
        if metrics["stop_selected_step"] is not None:
            restored += f" ({metrics['stop'].upper()}, step {metrics['stop_selected_step']})"
        for name, key, unit in [
            ("PSNR noisy", "psnr_noisy", "dB"),
            ("PSNR masked, untrained", "psnr_masked_untrained", "dB"),
            (restored, "psnr", "dB"),
            *([("PSNR last", "psnr_last", "dB")] if metrics["psnr_last"] != metrics["psnr"] else []),
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
