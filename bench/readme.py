"""Fill the tables of the README and of docs/ from bench/results, and draw the picture beside them.

`python bench/readme.py`, or `--check` to only say if one is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import groups
import lottery
import pruning_report
import quality
import targets

from sparse_gen.files import atomic_write

BENCH = Path(__file__).parent
README = BENCH.parent / "README.md"
PICTURE = BENCH / "results" / "speed-cpu.png"
PROVIDERS = {"published": "published loop", "plain": "plain PyTorch", "compile": "torch.compile", "ours": "ours"}
COLORS = {"published": "tab:gray", "plain": "tab:orange", "compile": "tab:green", "ours": "tab:blue"}


def _suites() -> list[str]:
    """Whole steps first, then the operators."""
    found = {path.stem.removesuffix("-cpu") for path in (BENCH / "results").glob("*-cpu.json")}
    apart = {"end_to_end", "quality", "import", "pruning", "search_study", "groups", "lottery"}
    return ["end_to_end", *sorted(found - apart)]


def _records(name: str) -> list[dict]:
    path = BENCH / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def speed(suites: list[str]) -> str:
    """Providers side by side, a row a case; a ratio below 1 is a loss and stands here like any other."""
    rows = [
        "| | published loop, ms | plain PyTorch, ms | ours, ms | over published | over plain | peak memory of plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite in suites:
        records = _records(f"{suite}-cpu")
        for case in dict.fromkeys(record["case"] for record in records):
            of = {record["provider"]: record for record in records if record["case"] == case}
            ours = of["ours"]
            times = [f"{of[name]['median_ms']:.1f}" if name in of else "–" for name in ("published", "plain")]
            ratios = ["–" if ours[key] is None else f"{ours[key]:.1f}×" for key in ("ratio_published", "ratio_plain")]
            peaks = [of[name]["peak_mb"] if name in of else None for name in ("ours", "plain")]
            memory = f"{peaks[0] / peaks[1]:.2f}×" if all(peaks) else "–"
            label = case if suite == "end_to_end" else f"`{suite}`: {case}"
            rows.append(f"| {' | '.join([label, *times, format(ours['median_ms'], '.1f'), *ratios, memory])} |")
    return "\n".join(rows)


def start() -> str:
    of = {record["provider"]: record["median_ms"] for record in _records("import-cpu")}
    if not of:
        return "not measured yet"
    beyond = of["import torch and all of sparse_gen"] - of["import torch"]
    return f"Import beyond torch's own: {beyond:.0f} ms. `sparse-gen --help`: {of['sparse-gen --help']:.0f} ms."


def aims() -> str:
    """The targets, and the picture where there is one."""
    table = targets.table({suite: _records(f"{suite}-cpu") for suite in _suites()})
    if not PICTURE.exists():
        return table
    return f"{table}\n\n![Milliseconds a step over image sizes and densities]({PICTURE.relative_to(README.parent)})"


def draw() -> None:
    """Milliseconds a step: training and search over sizes, training over densities. Nothing without records."""
    records = _records("end_to_end-cpu")
    panels = {
        "training step, 5 % kept": ("side of the image, pixels", lambda p: targets.sizes(records, "training", p)),
        "mask-search step": ("side of the image, pixels", lambda p: targets.sizes(records, "search", p)),
        "training step, 256²": ("weights kept", lambda p: targets.densities(records, p)),
    }
    if not any(points("ours") for _, points in panels.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained")
    for axis, (title, (label, points)) in zip(axes, panels.items(), strict=True):
        ticks = set()
        for provider, name in PROVIDERS.items():
            of = dict(sorted(points(provider).items()))
            if of:
                axis.plot(list(of), list(of.values()), "o-", ms=4, color=COLORS[provider], label=name)
                ticks |= set(of)
        axis.set(title=title, xlabel=label, xscale="log", yscale="log")
        axis.set_xticks(sorted(ticks), [f"{100 * t:g} %" if label == "weights kept" else f"{t}" for t in sorted(ticks)])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PROVIDERS), fontsize=8)
    with atomic_write(PICTURE) as file:
        figure.savefig(file, dpi=110, format="png")


DOCS = README.parent / "docs"
PAGES = {
    README: {
        "targets": aims,
        "quality": lambda: quality.table(quality.load()),
        "speed": lambda: speed(["end_to_end"]),
        "start": start,
    },
    DOCS / "masks.md": {
        "pruning": lambda: pruning_report.table(_records("pruning-cpu")) or "not measured yet",
        "groups": lambda: groups.table(_records("groups-cpu")) or "not measured yet",
        "lottery": lambda: lottery.table(_records("lottery-cpu")) or "not measured yet",
    },
    DOCS / "operators.md": {"operators": lambda: speed(_suites()[1:])},
}


def filled(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        content = make()
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"expected {begin.strip()} … {end} in {page.name}, got none")
        head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = f"{head}{content}\n{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date")
    arguments = parser.parse_args()
    if not arguments.check:
        draw()
    stale = {page: text for page in PAGES if (text := filled(page)) != page.read_text(encoding="utf-8")}
    if arguments.check:
        names = ", ".join(page.name for page in stale)
        sys.exit(f"{names} not up to date: run python bench/readme.py" if stale else 0)
    for page, text in stale.items():
        with atomic_write(page, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
