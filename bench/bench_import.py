"""How long it takes until something happens: the import beyond torch's own, and `--help`."""

import subprocess
import sys

import pytest

# Everything a run needs is imported when it is first used; this uses it.
STATEMENTS = {
    "import torch": "import torch",
    "import torch and all of sparse_gen": (
        "import torch, sparse_gen as sg; sg.fit, sg.search_mask, sg.compile, sg.generators.Hourglass, sg.Mask"
    ),
    "sparse-gen --help": "import sys; sys.argv = ['sparse-gen', '--help']; from sparse_gen.cli import main; main()",
    "python": "pass",
}


def bench_import(compare, device):
    if device != "cpu":
        pytest.skip("an import is measured once, on the CPU")

    def start(statement):
        return lambda: subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=True)

    providers = {name: start(statement) for name, statement in STATEMENTS.items()}
    medians = compare("import", "start of a process", providers, error=None, rounds=9, warmup=1)
    beyond = medians["import torch and all of sparse_gen"] - medians["import torch"]
    print(f"\nimport beyond torch: {beyond:.0f} ms; --help: {medians['sparse-gen --help']:.0f} ms")
