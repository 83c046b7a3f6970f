"""`compare`: several providers of one result, timed in turn within one process, recorded as JSON on request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_gen.engine.capture import StepRunner, capturer
from sparse_gen.experiments.timing import (
    BASELINES,
    fastest_plain,
    make_records,
    merge_records,
    timed_round,
    warm_up_rounds,
)

RESULTS = Path(__file__).parent / "results"
_records: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure: cpu or cuda")
    parser.addoption("--save", action="store_true", help="write the figures to bench/results/")
    parser.addoption("--with-compile", action="store_true", help="also measure torch.compile (minutes of compiling)")


def pytest_configure(config):
    # Shown, not an error: a provider that cannot be captured is timed call by call.
    config.addinivalue_line("filterwarnings", "default:steps run call by call")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("expected a CUDA device for --device cuda, got none", returncode=2)
    with fastest_plain(name):
        yield name


@pytest.fixture(scope="session")
def with_compile(request):
    return request.config.getoption("--with-compile")


@pytest.fixture
def compare(benchmark, device):
    """Time providers in turn, round by round, so that a drift of the machine reaches all alike.

    compare(suite, case, {"published": f, "plain": g, "ours": h}, error=…, rounds=…) after equality was asserted;
    `error` is what was found then, `peak_mb` and `facts` are as for `make_records`. pytest-benchmark shows the time of
    a whole round, the records hold each provider's median, which is also returned, and its 20th and 80th percentile.
    On a GPU all but the published ones are replayed from CUDA graphs, since Python takes longer than an operator; steps
    that see to that themselves say `captures=False`.
    """

    def run(
        suite, case, providers, *, error, rounds=15, peak_mb=None, facts=None, in_a_row=1, captures=True
    ):  # fmt: skip
        warmup = warm_up_rounds(device)
        if captures and device == "cuda":
            providers = {
                name: function if name == "published" else StepRunner(function, capturer(torch.device(device)))
                for name, function in providers.items()
            }
            in_a_row = max(in_a_row, 10)
        times = {}
        arguments = (providers, times, device, in_a_row)
        benchmark.pedantic(timed_round, arguments, rounds=rounds, warmup_rounds=warmup, iterations=1)
        if benchmark.disabled:  # one round, to see that everything runs
            return {name: measured[0] for name, measured in times.items()}
        counted = {name: measured[warmup:] for name, measured in times.items()}
        _records.extend(make_records(suite, case, counted, device=device, error=error, peak_mb=peak_mb, facts=facts))
        medians = {name: float(np.median(measured)) for name, measured in counted.items()}
        benchmark.extra_info.update({name: round(median, 4) for name, median in medians.items()})
        return medians

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not _records:
        return
    terminalreporter.section("providers, medians of alternating rounds")
    for record in _records:
        ratios = [
            f"{record[f'ratio_{other}']:.2f}× faster than {other}"
            for other in BASELINES
            if record[f"ratio_{other}"] and other != record["provider"]
        ]
        memory = [f"peak {record['peak_mb']:.0f} MB"] if record["peak_mb"] else []
        terminalreporter.write_line(
            f"{record['case']:<44} {record['provider']:<12} {record['median_ms']:>10.3f} ms "
            f"({record['p20_ms']:.3f} … {record['p80_ms']:.3f})  {', '.join([*ratios, *memory])}"
        )
    if config.getoption("--save"):
        for suite, machine in sorted({(r["suite"], r["device"]) for r in _records}):
            RESULTS.mkdir(exist_ok=True)
            merge_records(RESULTS / f"{suite}-{machine}.json", [r for r in _records if r["suite"] == suite])
            terminalreporter.write_line(f"written: bench/results/{suite}-{machine}.json")
