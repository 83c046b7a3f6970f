"""From a network and its mask to what runs."""

from sparse_gen.engine.analyse import StageAnalysis, analyse
from sparse_gen.engine.compile import CompiledGenerator, compile
from sparse_gen.engine.plan import Plan
from sparse_gen.engine.stack import Stack, stack

__all__ = ["CompiledGenerator", "Plan", "Stack", "StageAnalysis", "analyse", "compile", "stack"]
