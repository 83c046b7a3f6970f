"""Compiles Triton kernels for a GPU that need not be there, and reads what their machine code needs."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

# A process of its own: the tests' one may have asked for the interpreter, and then has no compiler. It answers every
# line with one, and whatever else it has to say goes to stderr.
_CHILD = """
import importlib, json, pathlib, re, subprocess, sys, tempfile, traceback
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(stem, name, types, constants, options):
    kernel = getattr(importlib.import_module(f"sparse_gen.kernels.{stem}"), name)
    signature = {
        a: types.get(a, "constexpr" if a in constants else "*fp32" if a.startswith("p_") else "i32")
        for a in kernel.arg_names
    }
    # What a launch finds out by itself: allocations start at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    code = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    usage = ""
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    return {"shared": code.metadata.shared, "ptx": code.asm["ptx"], **numbers}


answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    try:
        answer = compiled(*json.loads(line))
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), file=answers, flush=True)
"""


@dataclass(frozen=True)
class MachineCode:
    """What one kernel became: PTX, bytes of shared memory, registers a thread and bytes of stack (spills).

    Registers and stack are None where Triton comes without cuobjdump.
    """

    ptx: str
    shared: int
    registers: int | None
    stack: int | None

    def assert_within(self, *, shared: int, registers: int) -> None:
        assert ".target sm_90" in self.ptx
        assert self.shared <= shared
        assert "ld.local" not in self.ptx
        if self.registers is not None:
            assert self.registers <= registers
            assert self.stack == 0, "registers spill to the stack"


def compile_for_sm_90(
    stem: str, configurations: Sequence[tuple[str, Mapping[str, str], Mapping[str, Any], Mapping[str, Any]]]
) -> list[MachineCode]:
    """Compile kernels of `sparse_gen.kernels.<stem>`.

    Args:
        stem: the operator's.
        configurations: kernel's name, types that are neither "*fp32" for p_… nor "i32", constexprs, and options
            (num_warps, num_stages).

    Returns:
        One result a configuration.
    """
    return [_compile(stem, *configuration) for configuration in configurations]


def _compile(stem: str, name: str, *rest: Mapping[str, Any]) -> MachineCode:
    compiler = _compiler()
    print(json.dumps([stem, name, *rest]), file=compiler.stdin, flush=True)
    answer = json.loads(compiler.stdout.readline() or '"the compiling process has ended"')
    assert isinstance(answer, dict), f"{stem}, {name}: {answer}"
    return MachineCode(answer["ptx"], answer["shared"], answer.get("REG"), answer.get("STACK"))


@cache
def _compiler() -> subprocess.Popen[str]:
    """One process for all tests: to import torch and Triton takes it longer than to compile most kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.communicate)  # closes its stdin, at which it ends
    return process


def assert_tensor_cores(code: MachineCode, precision: str) -> None:
    """Products run as wgmma of that precision alone; "ieee" uses no tensor cores."""
    kind = {"tf32": ".tf32.tf32", "bf16": ".bf16.bf16", "ieee": None}[precision]
    lines = [line for line in code.ptx.splitlines() if "wgmma.mma_async" in line]
    assert "mma.sync" not in code.ptx
    if kind is None:
        assert not lines
    else:
        assert lines
        assert all(kind in line for line in lines)
