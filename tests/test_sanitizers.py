"""The C++ kernels under the address and undefined-behaviour sanitizers: the operators' own tests, run once more.

The library is built a second time, put into a copy of the package, and loaded into a Python that starts with the
sanitizers' runtimes: torch's memory is then watched too, and one float read beyond a tensor ends the process.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_package import script

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = ("libasan.so", "libubsan.so")
CHECK = """
import sys
import sparse_gen
from sparse_gen.ops.extension import status
assert sparse_gen.__file__.startswith(sys.argv[1]), sparse_gen.__file__
assert status().available, status().reason
"""
RUN_PYTEST = CHECK + "import pytest; sys.exit(pytest.main(sys.argv[2:]))"
# beta is one element short, which only the Python in front of the operator would have noticed.
READ_BEYOND = (
    CHECK
    + """
import torch
torch.ops.sparse_gen.norm_act(torch.rand(1, 2, 8, 8), torch.ones(1, 2), torch.ones(1, 1), 1e-5, 0.2)
"""
)


def runtimes(compiler: str) -> list[str] | None:
    """The sanitizers' runtimes of a compiler; None where it has none beside it."""
    found = []
    for name in RUNTIMES:
        command = [*shlex.split(compiler), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path) or not os.path.exists(path):
            return None
        found.append(os.path.realpath(path))
    return found


def tests_of_operators() -> list[str]:
    """The test files of all operators that have a C++ kernel."""
    registers = re.compile(r"STABLE_TORCH_LIBRARY_IMPL\(sparse_gen, CPU\b")
    stems = sorted(path.stem for path in ROOT.glob("csrc/*.cpp") if registers.search(path.read_text()))
    return sorted({str(file_of(stem)) for stem in stems})


def file_of(stem: str) -> Path:
    """The test file of a kernel: of its stem, or of the operator of which it is one layout."""
    path = ROOT / "tests" / f"test_{stem}.py"
    shorter = stem.rpartition("_")[0]
    return path if path.exists() or not shorter else file_of(shorter)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs code in a Python whose sparse_gen has the sanitized library."""
    tools = script.find_tools()
    if (reason := script.why_no_extension(None, tools)) is not None:
        pytest.skip(f"the extension cannot be built on this machine: {reason}")
    preload = runtimes(tools.compiler)
    if preload is None:
        pytest.skip(f"{tools.compiler} comes without {' and '.join(RUNTIMES)}")
    library, _ = script.compile_library(tools, cuda=False, architectures="", sanitize=True)

    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "sparse_gen"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "sparse_gen", package, ignore=ignore)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignore)
    shutil.copy(library, package)
    (package / script.RECORD).write_text(json.dumps({"library": script.LIBRARY}))
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory until they end, which is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        # Threads that wait for each other take most of the time; the tests that are about threads set their number.
        "OMP_NUM_THREADS": "1",
        "CI": "1",  # hypothesis then draws the same examples every time
    }

    def run(code, *arguments):
        command = [sys.executable, "-c", code, str(folder), *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_the_operators_tests_pass_without_a_report(run):
    files = tests_of_operators()
    assert len(files) >= 5
    # What is compiled for GPUs is no C++ of ours; opcheck traces Python and takes longer than all kernels together.
    # -s: what a sanitizer writes before it ends the process is not to vanish in pytest's capture.
    # AVX2 has the same sources as the baseline and AVX-512, with vectors of a length between.
    skipped = ["-m", "not interpreter and not aot and not nvcc", "-k", "not opcheck and not avx2"]
    options = ["-q", "-s", "-p", "no:cacheprovider", *skipped]
    with ThreadPoolExecutor() as pool:  # one thread each: two halves side by side
        halves = list(pool.map(lambda half: run(RUN_PYTEST, *options, *half), (files[::2], files[1::2])))
    for done in halves:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    assert sum(int(re.search(r"(\d+) passed", done.stdout)[1]) for done in halves) > 500


def test_a_read_beyond_a_tensor_is_reported(run):
    done = run(READ_BEYOND)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "norm_act" in done.stderr
