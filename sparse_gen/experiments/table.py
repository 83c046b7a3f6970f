"""The table of a sweep: one row a method and setting, means and spreads over seeds, as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from sparse_gen.experiments.plan import Experiment
from sparse_gen.experiments.shards import DONE, FAILED

# Columns of measurements: name in the results, heading, digits shown.
_MEASURED = (
    ("psnr_noisy", "noisy", 2),
    ("psnr_masked_untrained", "masked, untrained", 2),
    ("psnr_last", "last", 2),
    ("psnr_stopped", "stopped", 2),
    ("psnr_average", "average", 2),
    ("psnr_oracle_peak", "oracle peak", 2),
    ("ssim_last", "SSIM last", 3),
    ("ssim_stopped", "SSIM stopped", 3),
    ("seconds", "time, s", 1),
)
# Columns that tell rows apart: name, heading, and how an entry is written.
_SETTINGS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("image", "image", str),
    ("sigma", "σ", "{:.3g}".format),
    ("generator", "generator", str),
    ("method", "method", str),
    ("density", "density", "{:.3g}".format),
    ("lr", "lr", "{:.3g}".format),
)


@dataclass(frozen=True)
class Group:
    """Experiments that differ in their seeds only, and the results of those that are done.

    Attributes:
        experiment: one of them.
        seeds: how many the plan has.
        failed: how many failed.
        results: of each that is done.
    """

    experiment: Experiment
    seeds: int
    failed: int
    results: list[Mapping[str, Any]]

    def values(self, name: str) -> list[float]:
        """What was measured, of the seeds that have it."""
        return [result[name] for result in self.results if result.get(name) is not None]

    def setting(self, name: str) -> Any:
        named = name in ("image", "generator", "method")
        return getattr(self.experiment if named else self.experiment.config, name)

    @property
    def stopped(self) -> int:
        """How many of those that are done were stopped by the rule before their last step."""
        return sum(result.get("stopped_at") is not None for result in self.results)


def group(experiments: Sequence[Experiment], rows: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Experiments by everything but their seed, in the order in which they first come."""
    members: dict[tuple, list[Experiment]] = {}
    for e in experiments:
        names = (e.image, e.generator, e.method, e.run_on)  # a method's name stands for how it finds masks
        members.setdefault((*names, e.config.replace(seed=0)), []).append(e)
    groups = []
    for same in members.values():
        ended = [rows[e.key] for e in same if e.key in rows]
        done = [row["results"] for row in ended if row["status"] == DONE]
        groups.append(Group(same[0], len(same), sum(row["status"] == FAILED for row in ended), done))
    return groups


def table_rows(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Rows for a CSV file: settings, numbers of seeds, and mean and spread of every measurement."""
    rows = []
    for g in groups:
        config = g.experiment.config
        row = {name: g.setting(name) for name, _, _ in _SETTINGS} | {
            "kind": g.experiment.kind,
            "search_steps": g.experiment.search_steps,
            "training_steps": config.steps,
            "stop": config.stop,
            "seeds": g.seeds,
            "done": len(g.results),
            "failed": g.failed,
            "stopped": g.stopped if config.stop != "none" else None,
            "oracle_peak_every": config.every,
        }
        for name, _, _ in _MEASURED:
            values = g.values(name)
            row[name] = mean(values) if values else None
            row[f"{name}_spread"] = stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def markdown(groups: Sequence[Group]) -> str:
    """A table for a paper: what is the same in every row stands above it, once."""
    every = sorted({g.experiment.config.every for g in groups})
    constant = {name: len({g.setting(name) for g in groups}) == 1 for name, _, _ in _SETTINGS}
    constant["method"] = constant["image"] = constant["lr"] = False
    columns = [setting for setting in _SETTINGS if not constant[setting[0]]]
    measured = [column for column in _MEASURED if any(g.values(column[0]) for g in groups)]
    interval = f", every {every[0]:,} steps" if len(every) == 1 else ""
    headings = [heading for _, heading, _ in columns]
    headings += [heading + interval if name == "psnr_oracle_peak" else heading for name, heading, _ in measured]
    lines = [[*headings, "seeds"]]
    for g in groups:
        cells = [write(g.setting(name)) for name, _, write in columns]
        cells += [_cell(g, name, digits) for name, _, digits in measured]
        lines.append([*cells, _seeds(g)])
    rows = ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]
    return "\n".join([*_caption(groups, constant), "", rows[0], "|" + "---|" * len(lines[0]), *rows[1:], ""])


def _caption(groups: Sequence[Group], constant: Mapping[str, bool]) -> list[str]:
    config = groups[0].experiment.config
    same = [f"{heading} {write(groups[0].setting(name))}" for name, heading, write in _SETTINGS if constant[name]]
    budgets = ", ".join(f"{budget:,}" for budget in sorted({g.experiment.budget for g in groups}))
    searches = {g.experiment.method: g.experiment.search_steps for g in groups if g.experiment.search_steps}
    searched = "".join(f" ({method}: {steps:,} of them)" for method, steps in searches.items())
    stops = {g.experiment.config.stop.upper() for g in groups if g.experiment.config.stop != "none"}
    lines = [
        "PSNR in dB, mean ± standard deviation over seeds.",
        f"All methods get the same noisy image, z, initial weights and {budgets} steps, the search included{searched}.",
        "Oracle peak: the largest of the values taken along the run, which takes the clean image to know.",
    ]
    if stops:
        lines.append(f"Stopped: what {' or '.join(sorted(stops))} selects without the clean image.")
    if same:
        lines.append(f"In all rows: {', '.join(same)}.")
    threads = f"{config.threads} thread" + ("s" if config.threads != 1 else "")
    return [*lines, f"Time: of one experiment on {threads}, the search included."]


def _cell(g: Group, name: str, digits: int) -> str:
    values = g.values(name)
    if not values:
        return "–"
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    if name == "psnr_stopped" and g.stopped < len(g.results):
        text += f" ({g.stopped} of {len(g.results)} before the end)"
    return text


def _seeds(g: Group) -> str:
    text = str(len(g.results)) if len(g.results) == g.seeds else f"{len(g.results)} of {g.seeds}"
    return text + (f", {g.failed} failed" if g.failed else "")


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
