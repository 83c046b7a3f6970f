"""`sparse-gen mask find`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_gen.cli.denoise import merge_settings, read_number
from sparse_gen.cli.errors import one_line_errors
from sparse_gen.cli.mask_files import Output, Overwrite
from sparse_gen.cli.signals import Interrupted, stop_on_signal

EXAMPLE = "Example: sparse-gen mask find photo.png --method snip --sigma 0.1 -o snip.safetensors"


def _number(help: str) -> Any:
    return typer.Option(help=help, parser=read_number, metavar="NUMBER", show_default=False)


def _setting(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, show_default=False)


@one_line_errors
def find(
    images: Annotated[
        list[Path],
        typer.Argument(help="PNG, JPEG or TIFF; several of one size for one mask with imp.", show_default=False),
    ],
    output: Output,
    method: Annotated[str, typer.Option(help="oes, imp, magnitude, random, snip, grasp or synflow.")] = "oes",
    density: Annotated[float | None, _number("Fraction of the parameters to keep. Default: 0.05.")] = None,
    scope: Annotated[str, typer.Option(help="global, or layer: the same fraction of every layer.")] = "global",
    floor: Annotated[float | None, _number("Keep so many weights (or this share, below 1) of every layer.")] = None,
    variant: Annotated[
        str | None, _setting("as_published: what the OES repository runs under this name. Default: the paper's.")
    ] = None,
    prunable: Annotated[str | None, _setting("conv_weights or all. Default: conv_weights.")] = None,
    sigma: Annotated[
        float | None, _number("Take IMAGES as clean and add seeded noise of this standard deviation, 0 to 1.")
    ] = None,
    clip: Annotated[bool | None, _setting("Clip the noisy image to 0 to 1. Default: clip.", "--clip/--no-clip")] = None,
    target: Annotated[str, typer.Option(help="Find it on the noisy or the clean image.")] = "noisy",
    steps: Annotated[
        int | None, _number("Steps of the search (oes, default at most 1000) or of each round's training (imp, 1500).")
    ] = None,
    settle: Annotated[
        float | None,
        _number(
            "oes: end before --steps, once at most this share of the kept weights was exchanged in 100 steps. "
            "Default: 0.1 without --steps, else never."
        ),
    ] = None,
    group: Annotated[
        str | None,
        _setting("oes: kept or pruned together: kernel, filter, or output x input channels such as 8x1."),
    ] = None,
    fraction: Annotated[float | None, _number("imp: what a round removes of the weights left. Default: 0.2.")] = None,
    rewind: Annotated[int | None, _number("imp: go back to the weights after so many steps. Default: 0.")] = None,
    input_jitter: Annotated[float | None, _number("imp: noise on z at every step. Default: 0.")] = None,
    rounds: Annotated[int | None, _number("synflow: how many. Default: 100.")] = None,
    generator: Annotated[str | None, _setting("hourglass, skip or decoder. Default: hourglass.")] = None,
    depth: Annotated[int | None, _number("Scales of the network. Default: the deepest that fits.")] = None,
    seed: Annotated[int | None, _number("Seed of noise, network, network input and ties. Default: 0.")] = None,
    device: Annotated[str | None, _setting("cpu, cuda, cuda:1, ... or auto. Default: auto.")] = None,
    threads: Annotated[int | None, _number("CPU threads; the bits depend on it. Default: PyTorch's.")] = None,
    config: Annotated[Path | None, _setting("YAML file of settings as of denoise; options given here win.")] = None,
    store_logits: Annotated[
        bool, typer.Option("--store-logits", help="oes: store the logits too, 4 bytes a weight.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="oes, imp: go on with the search of this output that was interrupted.")
    ] = False,
) -> None:
    """Find which weights to keep, by any method, and write them as a mask file.

    Searches of oes and imp store where they are beside OUTPUT, every minute and after every round.
    """
    from sparse_gen.checkpoint import Checkpoints, RunInterrupted
    from sparse_gen.cli.progress import StageBars
    from sparse_gen.experiments import DenoiseConfig
    from sparse_gen.experiments.find_mask import MaskRequest, find_mask
    from sparse_gen.experiments.settings import read_settings
    from sparse_gen.masks.search import SETTLED

    given = {
        "image": str(images[0]), "density": density, "prunable": prunable, "sigma": sigma, "clip": clip,
        "generator": generator, "depth": depth, "seed": seed, "device": device, "threads": threads,
    }  # fmt: skip
    settings = merge_settings({} if config is None else read_settings(config), given)
    if method == "oes" and settle is None and steps is None and "search_steps" not in settings:
        settle = SETTLED
    own = {
        "group": group, "fraction": fraction, "rewind": rewind, "input_jitter": input_jitter, "rounds": rounds,
        "steps": steps,
    }  # fmt: skip
    request = MaskRequest(
        method=method, scope=scope, floor=floor, variant=variant, target=target, store_logits=store_logits,
        settle=settle,
        options={name: value for name, value in own.items() if value is not None},
    )  # fmt: skip
    folder = output.with_name(f"{output.name}.unfinished")
    if resume and not folder.is_dir():
        raise ValueError(f"resume: expected an interrupted search in {folder}, got none, leave --resume out")
    checkpoints = Checkpoints(folder, resume=resume)
    with stop_on_signal(checkpoints.request_stop) as received, StageBars() as bars:
        try:
            result = find_mask(
                DenoiseConfig.from_mapping(settings), request, output, more_images=images[1:], overwrite=overwrite,
                checkpoints=checkpoints, progress=lambda step, total, metrics: bars("search", step, total, metrics),
            )  # fmt: skip
        except RunInterrupted as error:
            raise Interrupted(received.code, f"{error}; go on with the same command and --resume") from None
    if settle is not None:
        steps = result.settings["steps"]
        if result.settled_at is None:
            last = result.history["exchanged"][-1].item()
            print(f"not settled in {steps:,} steps: the last 100 exchanged {last:.1%} of the kept weights")
        else:
            print(f"settled after {result.settled_at:,} of {steps:,} steps")
    mask = result.mask
    print(f"{output}: {mask.kept:,} of {mask.total:,} weights kept, {mask.density:.2%}")
