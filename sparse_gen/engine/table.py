"""A plan as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_gen.engine.plan import Plan

_HEADER = ("stage", "input", "output", "live in", "live out", "density", "layout", "MFLOP", "after", "ms", "share")


def table(plan: Plan) -> str:
    """One row a convolution of the first experiment, then what else there is, and the sums."""
    total = sum(item.ms or 0 for item in (*plan.stages, *plan.others))

    def times(ms: float | None) -> tuple[str, str]:
        return ("–", "–") if ms is None or not total else (f"{ms:.2f}", f"{ms / total:.0%}")

    rows = [
        (
            s.name, _size(s.input_shape), _size(s.output_shape),
            f"{s.live_in} of {s.weight_shape[1]}", f"{s.live_out} of {s.weight_shape[0]}", f"{s.live_density:.1%}",
            s.kernel, f"{s.flops / 1e6:,.1f}", f"{s.flops_after / 1e6:,.1f}", *times(s.ms),
        )
        for s in plan.stages
    ]  # fmt: skip
    empty = [""] * (len(_HEADER) - 3)
    rows += [(f"{other.kind} ×{other.count}", *empty, *times(other.ms)) for other in plan.others]
    flops, after = (sum(getattr(s, name) for s in plan.stages) for name in ("flops", "flops_after"))
    rows.append(("total", *empty[:-2], f"{flops / 1e6:,.1f}", f"{after / 1e6:,.1f}", *times(total or None)))
    table_rows = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*table_rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table_rows
    ]
    lines += [plan.reason, *(f"plain PyTorch: {call}" for call in plan.calls)]
    return "\n".join([*lines, _machine(plan)])


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _machine(plan: Plan) -> str:
    machine = plan.machine
    versions = f"{plan.dtype}, torch {machine['torch']}, sparse_gen {machine['sparse_gen']}"
    if "gpu" in machine:
        return f"{machine['gpu']}, CUDA {machine['cuda']}, {machine['precision']}, {versions}"
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return f"{machine['processor']}, {threads}, {machine['instruction_set'] or 'no compiled library'}, {versions}"
