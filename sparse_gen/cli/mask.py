"""`sparse-gen mask`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_gen.cli import mask_files, mask_find
from sparse_gen.cli.errors import one_line_errors

EXAMPLE = "Example: sparse-gen mask show results/mask.safetensors"
_BAR_WIDTH = 20

app = typer.Typer(help="Find masks, look at their files, and take over those of others.", epilog=EXAMPLE)
app.command("compare", epilog=mask_files.COMPARE_EXAMPLE)(mask_files.compare)
app.command("find", epilog=mask_find.EXAMPLE)(mask_find.find)
app.command("import", epilog=mask_files.IMPORT_EXAMPLE)(mask_files.import_)
app.command("transfer", epilog=mask_files.TRANSFER_EXAMPLE)(mask_files.transfer)


@app.command("show", epilog=EXAMPLE)
@one_line_errors
def show(
    file: Annotated[Path, typer.Argument(help="A mask.safetensors.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers' densities (and p, if stored) to this PNG.", show_default=False)
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Add the kernel planes of this parameter to the plot.", show_default=False)
    ] = None,
    experiment: Annotated[int, typer.Option(help="Whose planes and p, where a mask has several.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(help="Say what is left to compute for an image of this many pixels a side.", show_default=False),
    ] = None,
    overwrite: mask_files.Overwrite = False,
) -> None:
    """Print what a mask keeps of each layer, and the recipe of the network it belongs to."""
    from rich.console import Console
    from rich.table import Table

    import sparse_gen as sg

    if layer is not None and plot is None:
        raise ValueError("layer: expected --plot FILE beside it, got none, add one")
    mask = sg.Mask.load(file)
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True)
    table.add_column("parameter", "total", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("kept", f"{mask.kept:,} of {mask.total:,}", justify="right", no_wrap=True)
    table.add_column("density", f"{mask.density:.2%}", no_wrap=True)
    whole = 0
    for name, shape, kept, total in mask.layers():
        if name in mask.whole:
            whole += total
        else:
            shown = "×".join(map(str, shape))
            table.add_row(name, shown, f"{round(kept):,}", f"{density_bar(kept / total)} {kept / total:.2%}")
    if whole:
        table.add_row(f"{len(mask.whole)} more, kept whole", "", f"{whole:,}", f"{density_bar(1)} {1:.2%}")
    console = Console(highlight=False)
    console.width = max(console.width, 100)  # a pipe has no width; cut names would be of no use
    console.print(table)
    if size is not None:
        console.print(_left_to_compute(mask, size))
    console.print(f"recipe {json.dumps(mask.recipe, ensure_ascii=False)}", markup=False, soft_wrap=True)
    if plot is not None:
        from sparse_gen.experiments.mask_picture import draw_mask
        from sparse_gen.files import claim_file

        draw_mask(mask, claim_file(plot, overwrite), layer, experiment)
        console.print(str(plot), markup=False)


def _left_to_compute(mask, size: int):
    """Live channels and multiplications of every convolution, as a table."""
    from rich.table import Table

    import sparse_gen as sg
    from sparse_gen.engine import analyse

    if "net" not in mask.recipe or not isinstance(mask.recipe["net"], dict):
        raise ValueError("size: expected a file whose recipe tells of one network, got none, leave --size out")
    net = sg.generators.build(mask.recipe["net"])
    stages = analyse(net, mask, sg.noise_input(net.in_channels, (size, size)))
    total = [sum(getattr(stage, name) for stage in stages) / 1e9 for name in ("dense_flops", "sparse_flops")]
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True)
    table.add_column("convolution", f"forward at {size}²", no_wrap=True)
    for name in ("channels in", "channels out", "weights that count"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, sum_ in zip(("GFLOP dense", "GFLOP left"), total, strict=True):
        table.add_column(name, f"{sum_:.2f}", justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.name,
            f"{stage.live_inputs} of {stage.inputs}",
            f"{stage.live_outputs} of {stage.outputs}",
            f"{stage.reaching:,} of {stage.kept:,}",
            f"{stage.dense_flops / 1e9:.3f}",
            f"{stage.sparse_flops / 1e9:.3f}",
        )
    return table


def density_bar(density: float, width: int = _BAR_WIDTH) -> str:
    """`density` as blocks, an eighth of a character fine; whatever is above 0 shows."""
    eighths = round(density * width * 8)
    if density > 0:
        eighths = max(1, eighths)
    full, part = divmod(eighths, 8)
    return ("█" * full + ("", *"▏▎▍▌▋▊▉")[part]).ljust(width)
