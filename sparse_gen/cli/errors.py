"""What the command line does with mistakes: one line on stderr, never a traceback."""

from __future__ import annotations

import functools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

from sparse_gen.cli.signals import Interrupted

BAD_INPUT = 2

_Command = TypeVar("_Command", bound=Callable[..., Any])


def one_line_errors(command: _Command) -> _Command:
    """Make bad values, files, diverging runs and Ctrl-C of a command one line and an exit code.

    Anything else is a bug of ours, and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:
            print_error(describe(error))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt as error:
            interrupted = error if isinstance(error, Interrupted) else Interrupted(128 + signal.SIGINT)
            print(interrupted, file=sys.stderr)
            raise typer.Exit(interrupted.code) from None
        except Exception as error:
            if not _out_of_memory(error):
                raise
            print_error(
                "memory: expected a run that fits, got one that does not, scale the image down or lower channels"
            )
            raise typer.Exit(BAD_INPUT) from None

    return run


def _out_of_memory(error: Exception) -> bool:
    """Whether this is Python's error or one of PyTorch's, which is not imported for it."""
    pytorch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, MemoryError) or pytorch


def print_error(message: str) -> None:
    """Print one line; line breaks inside the message, say of a file's name, become spaces."""
    print("error:", " ".join(message.splitlines()), file=sys.stderr)


def describe(error: Exception) -> str:
    """An error's message, without the number that the operating system puts in front."""
    if isinstance(error, OSError) and error.strerror is not None:
        name = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{name}"
    return str(error)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings inside the block as one line on stderr, without their place in the source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print("warning:", " ".join(str(message).splitlines()), file=sys.stderr)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
