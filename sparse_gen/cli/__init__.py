"""The command `sparse-gen`."""

from sparse_gen.cli.main import main

__all__ = ["main"]
