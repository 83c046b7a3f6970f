"""From a network and its mask to what runs."""

from sparse_gen.engine.compile import CompiledGenerator, compile

__all__ = ["CompiledGenerator", "compile"]
