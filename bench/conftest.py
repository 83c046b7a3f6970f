"""`compare`: several providers of one result, timed in turn within one process, recorded as JSON on request."""

from __future__ import annotations

import datetime
import json
import platform
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_gen.files import atomic_write

RESULTS = Path(__file__).parent / "results"
_records: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where to measure: cpu or cuda")
    parser.addoption("--save", action="store_true", help="write the figures to bench/results/")
    parser.addoption("--with-compile", action="store_true", help="also measure torch.compile (minutes of compiling)")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("expected a CUDA device for --device cuda, got none", returncode=2)
    return name


@pytest.fixture(scope="session")
def with_compile(request):
    return request.config.getoption("--with-compile")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return run.stdout.strip() or "unknown"


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().split()[0]
    return "cpu"


@pytest.fixture
def compare(benchmark, device):
    """Time providers in turn, round by round, so that a drift of the machine reaches all alike.

    compare(suite, case, {"published": f, "plain": g, "ours": h}, error=…, rounds=…) after equality was asserted;
    `error` is what was found then. pytest-benchmark shows the time of a whole round, the records hold each
    provider's median, which is also returned, and its 20th and 80th percentile.
    """

    def run(suite, case, providers, *, error, rounds=15, warmup=2):
        times = {name: [] for name in providers}

        def one_round():
            for name, function in providers.items():
                _synchronise(device)
                start = time.perf_counter()
                function()
                _synchronise(device)
                times[name].append(1e3 * (time.perf_counter() - start))

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup, iterations=1)
        medians = {name: float(np.median(t[warmup:])) for name, t in times.items()}
        for name, measured in times.items():
            p20, p80 = np.percentile(measured[warmup:], [20, 80])
            ratio = {
                f"ratio_{other}": round(medians[other] / medians[name], 3) if other in medians else None
                for other in ("published", "plain", "compile")
            }
            record = {
                "suite": suite,
                "case": case,
                "provider": name,
                "device": _machine(device),
                "median_ms": round(medians[name], 4),
                "p20_ms": round(float(p20), 4),
                "p80_ms": round(float(p80), 4),
                "error": error,
                **ratio,
                "peak_mb": round(_peak_mb(device), 1),
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "triton": _triton_version(),
                "commit": _commit(),
                "date": datetime.date.today().isoformat(),
            }
            _records.append(record)
            benchmark.extra_info[name] = record["median_ms"]
        return medians

    return run


def _peak_mb(device: str) -> float:
    """Peak memory of the whole process so far (of the device on a GPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def pytest_terminal_summary(terminalreporter, config):
    if not _records:
        return
    terminalreporter.section("providers, medians of alternating rounds")
    for record in _records:
        ratios = [
            f"{record[f'ratio_{other}']:.2f}× faster than {other}"
            for other in ("published", "plain", "compile")
            if record[f"ratio_{other}"] and other != record["provider"]
        ]
        terminalreporter.write_line(
            f"{record['case']:<44} {record['provider']:<12} {record['median_ms']:>10.3f} ms "
            f"({record['p20_ms']:.3f} … {record['p80_ms']:.3f})  {', '.join(ratios)}"
        )
    if config.getoption("--save"):
        for suite, machine in sorted({(r["suite"], r["device"]) for r in _records}):
            _save(RESULTS / f"{suite}-{machine}.json", [r for r in _records if r["suite"] == suite])
            terminalreporter.write_line(f"written: bench/results/{suite}-{machine}.json")


def _save(path: Path, records: list[dict]) -> None:
    """Replace the records of the measured cases and keep the others."""
    measured = {record["case"] for record in records}
    kept = [r for r in json.loads(path.read_text()) if r["case"] not in measured] if path.exists() else []
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump([*kept, *records], file, indent=1)
        file.write("\n")
