"""`sparse-gen bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_gen.cli.errors import one_line_errors

EXAMPLE = "Example: sparse-gen bench --size 256 --density 0.05 -o speed.json"
_HEADINGS = {"published": "published loop", "plain": "plain PyTorch", "ours": "ours"}


@one_line_errors
def command(
    size: Annotated[int, typer.Option(help="Side of the square image in pixels.")] = 256,
    density: Annotated[float, typer.Option(help="Fraction of the parameters that the training keeps.")] = 0.05,
    rounds: Annotated[int, typer.Option(help="Steps of each that count, taken in turn.")] = 10,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to add the records to.", show_default=False)
    ] = None,
) -> None:
    """Measure a training and a mask-search step of the hourglass here, beside the published loop and plain PyTorch.

    The mask is random, with the layers' proportions of a searched one. The results are compared before the timing.
    """
    from rich.console import Console

    from sparse_gen.cli.progress import StageBars
    from sparse_gen.experiments.bench import bench
    from sparse_gen.experiments.timing import merge_records, read_records

    if output is not None:
        if not output.parent.is_dir():
            raise ValueError(f"output: expected a file in a folder that exists, got {output}, make the folder first")
        read_records(output)  # what it cannot be added to is better known now
    with StageBars() as bars:
        records = bench(
            size,
            density,
            rounds=rounds,
            device=device,
            threads=threads,
            progress=lambda name, done, total: bars(name, done, total, {}),
        )
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # a pipe has no width; cut names would be of no use
    console.print(_table(records))
    first = records[0]
    console.print(
        f"medians of {first['rounds']} steps in turn, float32, {first['device']}, {first['threads']} thread(s), "
        f"torch {first['torch']}"
    )
    if output is not None:
        merge_records(output, records)
        console.print(str(output), markup=False)


def _table(records: Sequence[dict[str, Any]]):
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in (*(f"{heading}, ms" for heading in _HEADINGS.values()), "over published", "over plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in dict.fromkeys(record["case"] for record in records):
        of = {record["provider"]: record for record in records if record["case"] == case}
        times = [f"{of[provider]['median_ms']:.1f}" for provider in _HEADINGS]
        ratios = [f"{of['ours'][f'ratio_{other}']:.1f}×" for other in ("published", "plain")]
        table.add_row(case, *times, *ratios)
    return table
