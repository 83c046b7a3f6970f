"""`sparse-gen mask import`, `compare` and `transfer`: mask files made into others, and laid beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_gen.cli.denoise import read_number
from sparse_gen.cli.errors import one_line_errors

COMPARE_EXAMPLE = "Example: sparse-gen mask compare baboon.safetensors barbara.safetensors"
TRANSFER_EXAMPLE = (
    "Example: sparse-gen mask transfer mask.safetensors --weights keep --image other.png --sigma 0.1 "
    "-o moved.safetensors"
)
IMPORT_EXAMPLE = "Example: sparse-gen mask import mask_baboon.pkl -o baboon.safetensors"

Output = Annotated[Path, typer.Option("--output", "-o", help="The mask file to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]


@one_line_errors
def import_(
    file: Annotated[Path, typer.Argument(help="The authors' mask_*.pkl, or its packed form, an .npz.")],
    output: Output,
    depth: Annotated[int, typer.Option(min=1, max=16, help="Scales of the hourglass it belongs to.")] = 6,
    out_channels: Annotated[int, typer.Option(min=1, max=4, help="Channels of its image.")] = 3,
    overwrite: Overwrite = False,
) -> None:
    """Take over a mask that the authors of Optimal Eye Surgeon published.

    Nothing in the file is executed: it may hold tensors, and whatever asks for more is refused.
    """
    import torch

    import sparse_gen as sg
    from sparse_gen.files import claim_file

    with torch.device("meta"):
        net = sg.generators.Hourglass(out_channels=out_channels, depth=depth)
    mask = sg.masks.import_mask(file, net)
    mask.save(claim_file(output, overwrite))
    print(f"{output}: {mask.kept:,} of {mask.total:,} weights kept, {mask.density:.2%}")


@one_line_errors
def compare(
    first: Annotated[Path, typer.Argument(help="A mask file.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same network.")],
) -> None:
    """Print what two masks both keep of each layer, and what they would by chance.

    Chance keeps as many of each layer as the masks do, anywhere in it; σ is its standard deviation.
    """
    from rich.console import Console
    from rich.table import Table

    import sparse_gen as sg

    found = sg.masks.compare(sg.Mask.load(first), sg.Mask.load(second))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", no_wrap=True)
    for column in ("first", "second", "both", "by chance", "overlap", "Jaccard", "by chance", "above chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*found.layers, found.total]:
        if row is found.total:
            table.add_section()
        counts = [f"{row.first:,}", f"{row.second:,}", f"{row.both:,}", f"{row.chance:,.1f}"]
        shares = [_share(row.overlap), _share(row.jaccard), _share(row.chance_jaccard)]
        table.add_row(row.name, *counts, *shares, "–" if row.sigmas != row.sigmas else f"{row.sigmas:+.1f} σ")
    console = Console(highlight=False)
    console.width = max(console.width, 140)  # a pipe has no width; cut numbers would be of no use
    console.print(table)
    total = found.total
    console.print(
        f"Of {total.total:,} prunable weights both keep {total.both:,}. With the layers' densities as they are, chance "
        f"gives {total.chance:,.0f}; with the two numbers of kept weights alone, {found.anywhere:,.0f}.",
        soft_wrap=True,
    )
    if found.whole:
        console.print(f"{len(found.whole)} parameters that both keep whole are not counted.")


@one_line_errors
def transfer(
    file: Annotated[Path, typer.Argument(help="A mask file whose recipe tells its network.")],
    output: Output,
    weights: Annotated[
        str,
        typer.Option(
            help="keep: train the weights that the mask holds; reinitialise: fresh ones. Required.", show_default=False
        ),
    ],
    image: Annotated[
        Path | None, typer.Option(help="The photograph it is to be used for, of any size.", show_default=False)
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise to be added to it.", parser=read_number, metavar="NUMBER", show_default=False),
    ] = None,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Clip the noisy image to 0 to 1.")] = True,
    seed: Annotated[
        int | None,
        typer.Option(help="Of z and noise, and of fresh weights. Default: the mask's.", show_default=False),
    ] = None,
    width: Annotated[str, typer.Option(help="same, or tile: repeat or cut off channels for other widths.")] = "same",
    channels: Annotated[
        str | None, typer.Option(help="Widths of the scales, as 16,32,64. Default: the mask's.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Move a mask to another image, size, noise, initialisation or width; its file tells what was kept."""
    from sparse_gen.experiments.transfer_mask import transfer_mask

    mask = transfer_mask(
        file, output, weights=weights, width=width, image=image, sigma=sigma, clip=clip, seed=seed,
        channels=None if channels is None else _widths(channels), overwrite=overwrite,
    )  # fmt: skip
    print(f"{output}: {mask.kept:,} of {mask.total:,} weights kept, {mask.density:.2%}, {_STARTS[weights]}")


_STARTS = {"keep": "training starts from the mask's own weights", "reinitialise": "training starts from fresh weights"}


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"channels: expected widths such as 16,32,64, got {text!r}, give positive whole numbers")
    return [int(part) for part in parts]


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.2%}"  # NaN: one of them keeps nothing
