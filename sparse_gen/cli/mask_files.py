"""`sparse-gen mask import`: mask files made into other mask files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_gen.cli.errors import one_line_errors

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
