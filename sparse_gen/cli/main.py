"""The app: its commands, and what happens to their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from sparse_gen.cli import bench, denoise, info, mask, sweep
from sparse_gen.cli.errors import BAD_INPUT, one_line_warnings, print_error

app = typer.Typer(
    name="sparse-gen",
    help="Restore photographs with image generators pruned to a few percent of their weights.",
    epilog="Example: sparse-gen denoise photo.png --sigma 0.1 -o results",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("denoise", epilog=denoise.EXAMPLE)(denoise.command)
app.command("bench", epilog=bench.EXAMPLE)(bench.command)
app.command("info", epilog=info.EXAMPLE)(info.command)
app.add_typer(mask.app, name="mask")
app.add_typer(sweep.app, name="sweep")

# typer does not export this class, and where it lives has moved between typer's versions.
_UsageError = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sparse-gen`.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        0, 2 after an error in the input (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    with one_line_warnings():
        try:
            code = app(arguments or ["--help"], prog_name="sparse-gen", standalone_mode=False)
        except _UsageError as error:
            print_error(error.format_message())
            return BAD_INPUT
    return code if isinstance(code, int) else 0
