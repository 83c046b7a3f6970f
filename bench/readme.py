"""Fill the README's tables from bench/results: `python bench/readme.py`, or `--check` to only say if they are stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import quality

from sparse_gen.files import atomic_write

BENCH = Path(__file__).parent
README = BENCH.parent / "README.md"


def _records(name: str) -> list[dict]:
    path = BENCH / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def speed(*suites: str) -> str:
    """Providers side by side, a row a case; a ratio below 1 is a loss and stands here like any other."""
    rows = [
        "| | published loop, ms | plain PyTorch, ms | ours, ms | over published | over plain |",
        "|---|---|---|---|---|---|",
    ]
    for suite in suites:
        records = _records(f"{suite}-cpu")
        for case in dict.fromkeys(record["case"] for record in records):
            of = {record["provider"]: record for record in records if record["case"] == case}
            ours = of["ours"]
            times = [f"{of[name]['median_ms']:.1f}" if name in of else "–" for name in ("published", "plain")]
            ratios = ["–" if ours[key] is None else f"{ours[key]:.1f}×" for key in ("ratio_published", "ratio_plain")]
            label = case if suite == "end_to_end" else f"`{suite}`: {case}"
            rows.append(f"| {' | '.join([label, *times, format(ours['median_ms'], '.1f'), *ratios])} |")
    return "\n".join(rows)


def start() -> str:
    of = {record["provider"]: record["median_ms"] for record in _records("import-cpu")}
    if not of:
        return "not measured yet"
    beyond = of["import torch and all of sparse_gen"] - of["import torch"]
    return f"Import beyond torch's own: {beyond:.0f} ms. `sparse-gen --help`: {of['sparse-gen --help']:.0f} ms."


BLOCKS = {
    "quality": lambda: quality.table(quality.load()),
    "speed": lambda: speed("end_to_end", "concrete_mask", "sparse_conv2d", "sparse_upsample_conv2d", "norm_act"),
    "start": start,
}


def filled(text: str) -> str:
    for name, make in BLOCKS.items():
        content = make()
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"expected {begin.strip()} … {end.strip()} in {README.name}, got none")
        head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = head + content + tail
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README is not up to date")
    arguments = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check:
        sys.exit("README.md is not up to date: run python bench/readme.py" if after != before else 0)
    with atomic_write(README, "w") as file:
        file.write(after)


if __name__ == "__main__":
    main()
