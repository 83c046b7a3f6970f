"""Reading YAML files of settings, from people and from other runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from sparse_gen.experiments.config import show

_MOST_BYTES = 2**20
# What PyYAML's constructors let through: `!!bool x` a KeyError, `!!timestamp x` an AttributeError, and so on.
_UNWRAPPED = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


def read_settings(path: str | os.PathLike[str], what: str = "config") -> dict[str, Any]:
    """The plain values of a YAML file of settings, unchecked, so that others can be laid over them.

    Args:
        path: its name.
        what: how messages call it.

    Raises:
        OSError: if the file is missing, a folder, or cannot be read.
        ValueError: if it is not UTF-8, not YAML, not a mapping, or names a setting twice.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{what}: expected a YAML file, got {path}, which is not there, check the name")
    if path.is_dir():
        raise IsADirectoryError(f"{what}: expected a YAML file, got the folder {path}, name a file in it")
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{what}: expected a YAML file of settings, got {path} of over a megabyte, name another")
    try:
        values = yaml.load(content, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{what}: expected text in UTF-8, got {path} with what YAML does not allow at position {error.position}, "
            "correct it"
        ) from None
    except (yaml.YAMLError, *_UNWRAPPED) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error or "unreadable").split())
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{what}: expected lines like `density: 0.05`, got {path}{line}: {reason}, correct it"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected lines like `density: 0.05`, got {show(values)} in {path}, correct it")
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-2 as a number (YAML 1.1 calls it text) and refuses what surprises.

    That is repeated keys; merge keys, which unfold nine levels of nine to gigabytes; and numbers to base 60, which
    make 750 of 12:30 and take minutes to build from a megabyte.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is set twice", problem_mark=key.start_mark
                )
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(problem="merging (<<) is not read", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> int | float:
        if ":" in node.value:
            raise yaml.constructor.ConstructorError(
                problem=f"{show(node.value)} would be a number to base 60, quote it if it is text",
                problem_mark=node.start_mark,
            )
        is_float = node.tag == "tag:yaml.org,2002:float"
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_plain_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
