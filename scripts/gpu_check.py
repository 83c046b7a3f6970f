"""Check and measure this checkout on a GPU, without network: build, tests, the machine itself, benchmarks, pictures.

    python scripts/gpu_check.py OUTPUT                       # all parts, at most nine minutes
    python scripts/gpu_check.py OUTPUT tests machine         # some of them
    python scripts/gpu_check.py OUTPUT tests bench --only concrete_mask     # one operator in a minute or two

OUTPUT then holds a log for every part, the benchmarks' records, machine-<device>.json, the restored pictures and
summary.json. The exit status is 0 if every part passed, 1 if one did not, 2 if there is nothing to check on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds each part may take; together less than nine minutes.
PARTS = {"build": 90, "tests": 150, "machine": 20, "bench": 150, "restore": 120}
CUT_OFF = "not finished in the time there was"
GRACE_SECONDS = 5  # for pytest to write what it has
NO_TESTS = 5  # pytest's exit status where an expression matches nothing
# Above the noisy picture's, after the default 2,500 steps: on a CPU three seeds gave 6.2 ± 0.3 dB (README).
GAIN_DB = 4.0
# The most telling suites first: those that the time does not suffice for are named, and what they measured is kept.
SUITES = (
    "end_to_end", "concrete_mask", "sparse_conv2d", "block_sparse_conv2d", "masked_conv2d", "sparse_upsample_conv2d",
    "norm_act", "masked_adam",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for logs and results")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"out of {', '.join(PARTS)}; default: all")
    parser.add_argument("--only", metavar="EXPRESSION", help="tests and benchmarks to run, as for pytest -k")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the script itself out")
    options = parser.parse_intermixed_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts out of {', '.join(PARTS)}, got {unknown[0]}")
    device = _device_name(options.device)
    if device is None:
        print("expected a CUDA device and a torch that can use it, got none", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    summary = {}
    for part, seconds in PARTS.items():
        if options.parts and part not in options.parts:
            continue
        start = time.perf_counter()
        with open(options.output / f"{part}.log", "w") as log:
            check, more = globals()[f"check_{part}"], {"only": options.only} if part in ("tests", "bench") else {}
            reason = check(options.output.resolve(), options.device, device, log, seconds, **more)
        # What is merely not finished is no wrong number.
        cut_off = reason if reason is not None and reason.startswith(CUT_OFF) else None
        reason = None if cut_off else reason
        taken = round(time.perf_counter() - start, 1)
        summary[part] = {"passed": reason is None, "reason": reason, "cut_off": cut_off, "seconds": taken}
        print(f"{part}: {reason or cut_off or 'passed'} ({taken} s)", flush=True)
        (options.output / "summary.json").write_text(json.dumps({"device": device, "parts": summary}, indent=1) + "\n")
    return 0 if all(part["passed"] for part in summary.values()) else 1


def _device_name(device: str) -> str | None:
    """As the benchmarks' files call it: h200, h100, …, or cpu."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().split()[0]


def _run(command: list[str], log, seconds: float) -> str | None:
    """None if the command succeeds in time, otherwise why not."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell gives that to what it starts in the background, and the command would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A session of its own, so that a command that takes too long ends with all that it started.
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        # First as Ctrl-C does, so that pytest writes what was measured until then.
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"took more than {seconds:.0f} s, see {log.name}"
    return None if status == 0 else f"exit status {status}, see {log.name}"


def check_build(_output, _device, _name, log, seconds):
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."]
    return _run(pip, log, seconds)


def check_tests(_output, _device, _name, log, seconds, *, only=None):
    """Where there is a GPU, the tests of the interpreter run on it."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "cuda or interpreter", "tests", *_matching(only)]
    reason = _run(pytest, log, seconds)
    return None if only and reason is not None and reason.startswith(f"exit status {NO_TESTS},") else reason


def _matching(only: str | None) -> list[str]:
    return [] if only is None else ["-k", only]


def check_machine(output, device, name, log, _seconds):
    """Driver, copy bandwidth and matmul rate, against which the other figures are to be read."""
    import torch

    torch.manual_seed(0)
    large = device == "cuda"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
    source = torch.empty((1 << 30 if large else 1 << 24) // 4, device=device).normal_()
    target = torch.empty_like(source)
    milliseconds = _median_ms(lambda: target.copy_(source), device)
    records = [_record("copy", name, driver, milliseconds, gigabytes_a_second=2 * source.nbytes / milliseconds / 1e6)]
    if not torch.equal(source, target):
        return "a copy differs from what was copied"
    size = 8192 if large else 256
    for precision in ("ieee", "tf32", "bf16") if large else ("ieee",):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        milliseconds = _median_ms(lambda a=a, b=b: a @ b, device)
        rate = 2 * size**3 / milliseconds / 1e9
        records.append(_record(f"matmul {size}, {precision}", name, driver, milliseconds, teraflops=rate))
        want = a[:1].double() @ b.double()
        error = (((a @ b)[:1].double() - want).norm() / want.norm()).item()
        if not error <= {"ieee": 5e-6, "tf32": 2e-3, "bf16": 2e-2}[precision]:
            return f"a product in {precision} is off by {error:.1e}"
    text = json.dumps(records, indent=1) + "\n"
    log.write(text)
    (output / f"machine-{name}.json").write_text(text)
    return None


def _median_ms(function, device, rounds=21):
    import torch

    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[3:])[rounds // 2]


def _record(case, name, driver, milliseconds, **rate):
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "suite": "machine",
        "case": case,
        "provider": "torch",
        "device": name,
        "driver": driver,
        "median_ms": round(milliseconds, 4),
        **{key: round(value, 2) for key, value in rate.items()},
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def check_bench(output, device, name, log, seconds, *, only=None):
    """Suite by suite, so that one that fails or takes long leaves the others' figures alone."""
    end, failed, unfinished = time.perf_counter() + seconds, [], []
    for suite in SUITES:
        left = end - time.perf_counter() - GRACE_SECONDS
        if left < 1:
            unfinished.append(suite)
            continue
        file = f"bench/bench_{suite}.py"
        pytest = [sys.executable, "-m", "pytest", "-q", file, "--device", device, "--save", *_matching(only)]
        reason = _run(pytest, log, left)
        if reason is not None and reason.startswith("took"):
            unfinished.append(suite)
        elif reason is not None and not reason.startswith(f"exit status {NO_TESTS},"):
            failed.append(f"{suite}: {reason}")
    for path in (ROOT / "bench/results").glob(f"*-{name}.json"):
        shutil.copy(path, output / path.name)
    if failed:
        return "; ".join(failed)
    return f"{CUT_OFF}: {', '.join(unfinished)}" if unfinished else None


def check_restore(output, device, _name, log, seconds):
    """Three seeds of the default restoration: each has to be well above the noisy picture."""
    end = time.perf_counter() + seconds
    for seed in range(3):
        folder = output / f"restored_{seed}"
        command = [
            sys.executable, "-m", "sparse_gen.cli", "denoise", "examples/astronaut_256.png", "--sigma", "0.1",
            "--seed", str(seed), "--device", device, "-o", str(folder), "--overwrite",
        ]  # fmt: skip
        reason = _run(command, log, end - time.perf_counter())
        if reason:
            return reason
        metrics = json.loads((folder / "metrics.json").read_text())
        gain = metrics["psnr_last"] - metrics["psnr_noisy"]
        if not gain >= GAIN_DB:
            return f"seed {seed} ends {gain:.2f} dB above the noisy picture, expected {GAIN_DB:g} dB or more"
    return None


if __name__ == "__main__":
    sys.exit(main())
