"""Compiles Triton kernels for a GPU that need not be there, and reads what their machine code needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A process of its own: the tests' one may have asked for the interpreter, and then has no compiler.
_CHILD = """
import importlib, json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

stem, configurations = json.load(sys.stdin)
module = importlib.import_module(f"sparse_gen.kernels.{stem}")
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
out = []
for name, types, constants, options in configurations:
    kernel = getattr(module, name)
    signature = {
        a: types.get(a, "constexpr" if a in constants else "*fp32" if a.startswith("p_") else "i32")
        for a in kernel.arg_names
    }
    # What a launch finds out by itself: allocations start at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    usage = ""
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    out.append({"shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"], **numbers})
print(json.dumps(out))
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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps([stem, list(configurations)]),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [
        MachineCode(result["ptx"], result["shared"], result.get("REG"), result.get("STACK"))
        for result in json.loads(run.stdout)
    ]


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
