"""`sparse-gen info`."""

from __future__ import annotations

from sparse_gen.cli.errors import one_line_errors

EXAMPLE = "Example: sparse-gen info"


@one_line_errors
def command() -> None:
    """Print versions, instruction sets, GPU, and which backend each operator has."""
    from rich.console import Console
    from rich.table import Table

    from sparse_gen.experiments.environment import versions

    console = Console(highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, version in versions().items():
        facts.add_row(name, version or "not installed")
    for name, fact in _machine().items():
        facts.add_row(name, fact)
    console.print(facts)

    table = Table(box=None, padding=(0, 2, 0, 0))
    names, rows, reasons = _operators()
    for heading in ("operator", *names):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    for backend, reason in reasons:
        console.print(f"no {backend}: {reason}", markup=False)


def _machine() -> dict[str, str]:
    import torch

    from sparse_gen.ops.extension import status

    extension = status()
    if extension.available:
        compiled = ", ".join(extension.build.get("instruction_sets", [])) or "not recorded"
        facts = {
            "extension": f"compiled for {compiled}; in use {extension.instruction_set}",
            "compiler": extension.build.get("compiler") or "not recorded",
        }
    else:
        facts = {"extension": f"none: {extension.reason}"}
    cuda = extension.build.get("cuda_reason") or "not recorded"
    facts["CUDA kernels"] = f"compiled: {cuda}" if extension.build.get("cuda") else f"none: {cuda}"
    facts["processor supports"] = torch.backends.cpu.get_cpu_capability()
    facts["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        facts["GPU"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    else:
        facts["GPU"] = "none found" if torch.version.cuda else "none: PyTorch is built without CUDA"
    return facts


def _operators() -> tuple[list[str], list[list[str]], list[tuple[str, str]]]:
    """Backend names, one row per operator, and each reason for a no, once."""
    from sparse_gen.ops.dispatch import backends, operators

    found = {name: backends(name) for name in operators()}
    names = list(next(iter(found.values())))
    rows = [[name, *("yes" if by_backend[b] is None else "no" for b in names)] for name, by_backend in found.items()]
    reasons = {(b, reason): None for by_backend in found.values() for b, reason in by_backend.items() if reason}
    return names, rows, list(reasons)
