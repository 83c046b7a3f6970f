"""Triton's interpreter, without what it does over and over: the same numbers in half of the time."""

import inspect
from dataclasses import replace
from functools import cache

from triton.runtime import interpreter


@cache
def hasten():
    """Check no sum for overflow, and look a module's builtins up once instead of with every call of a function.

    The check computes everything a second time in 64 bits. An index that overflows is as wrong in the interpreter as on
    a GPU, where nothing checks it either: the comparison with the reference finds it.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    is_builtin, names = interpreter.tl.core.is_builtin, {}

    def patch_builtin(package, builder, *scope):
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in names[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin
