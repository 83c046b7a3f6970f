"""What the CPU engine is to reach, and how far it came: a table in plain words from the committed records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from masks import PUBLISHED

Records = dict[str, list[dict]]  # suite → records


class Target(NamedTuple):
    """One promise.

    Attributes:
        what: is measured.
        over: what it is compared with.
        bound: the ratio to reach (at least) or to stay below (`at_most`).
        values: what was measured, with the words for each; nothing where it was not.
        at_most: whether the ratio is one of costs, not of speeds.
    """

    what: str
    over: str
    bound: float
    values: Callable[[Records], dict[str, float]]
    at_most: bool = False


def _of(records: Records, suite: str, case: str) -> dict[str, dict]:
    return {record["provider"]: record for record in records.get(suite, []) if record["case"] == case}


def _ratio(suite: str, cases: dict[str, str], other: str, key: str = "median_ms", inverse: bool = False):
    """How many times less ours takes than another provider, for named cases of a suite; or the other way round."""

    def values(records: Records) -> dict[str, float]:
        found = {}
        for name, case in cases.items():
            of = _of(records, suite, case)
            if "ours" in of and other in of and of["ours"][key] and of[other][key]:
                ratio = of[other][key] / of["ours"][key]
                found[name] = 1 / ratio if inverse else ratio
        return found

    return values


def _published(size: int) -> dict[str, str]:
    return {f"{name} mask": f"masked training step, {size}², published {name} mask" for name in PUBLISHED}


BOTH = "forward + backward"
LAYERS = {
    "32→16, 5×5": "32 to 16, 5×5, 256², density 0.07",
    "128→128, 5×5": "128 to 128, 5×5, 32², density 0.008",
    "128→128, 3×3": "128 to 128, 3×3, 64², density 0.19",
    "128→64, 3×3": "128 to 64, 3×3, 128², density 0.17",
    "64→32, 3×3": "64 to 32, 3×3, 256², density 0.2",
}


def sizes(records: Iterable[dict], kind: str, provider: str) -> dict[int, float]:
    """Milliseconds of a step by the image's side, of one experiment with a 5 % stand-in mask, if it has one."""
    return {
        record["size"]: record["median_ms"]
        for record in records
        if record.get("kind") == kind
        and record["provider"] == provider
        and record["experiments"] == 1
        and (record["kind"] != "training" or (record["mask"], record["density"]) == ("layered", 0.05))
    }


def densities(records: Iterable[dict], provider: str, size: int = 256) -> dict[float, float]:
    """Milliseconds of a training step by density, of the stand-in masks, the densest first."""
    found = {
        record["density"]: record["median_ms"]
        for record in records
        if record.get("kind") == "training"
        and record["provider"] == provider
        and record["size"] == size
        and record["experiments"] == 1
        and record["mask"] == "layered"
    }
    return dict(sorted(found.items(), reverse=True))


def _cost_per_pixel(records: Records) -> dict[str, float]:
    """Of each size over that of 256²."""
    ms = sizes(records.get("end_to_end", []), "training", "ours")
    if 256 not in ms:
        return {}
    return {f"{size}²": (ms[size] / size**2) / (ms[256] / 256**2) for size in sorted(ms) if size > 256}


def _cost_per_density(records: Records) -> dict[str, float]:
    """Of each density over that of the next denser mask."""
    ms = densities(records.get("end_to_end", []), "ours")
    return {f"{100 * sparser:g} %": ms[sparser] / ms[denser] for denser, sparser in pairwise(ms)}


def _steps(what: str, cases: Callable[[int], dict[str, str]], bounds: dict[int, tuple[float, float]]) -> list[Target]:
    return [
        Target(f"{what}, {size}²", over, bound, _ratio("end_to_end", cases(size), provider))
        for size, both in bounds.items()
        for (over, provider), bound in zip(
            {"published loop": "published", "plain PyTorch": "plain"}.items(), both, strict=True
        )
    ]


TARGETS = [
    *_steps("training step", _published, {256: (8, 6.5), 512: (9, 7.5)}),
    *_steps("mask-search step", lambda size: {"": f"mask-search step, {size}²"}, {256: (10, 3.5), 512: (5.5, 3)}),
    Target(
        "dense DIP step, 512²", "plain PyTorch", 2, _ratio("end_to_end", {"": "dense DIP step, 512²"}, "plain")
    ),
    Target(
        "peak memory of a training step, 512²", "plain PyTorch", 0.3,
        _ratio("end_to_end", _published(512), "plain", "peak_mb", inverse=True), at_most=True,
    ),
    Target(
        "`sparse_conv2d`, 128→128, 3×3, 64², density 0.19, forward", "oneDNN, dense", 2.5,
        _ratio("sparse_conv2d", {"": f"{LAYERS['128→128, 3×3']}, forward"}, "plain"),
    ),
    Target(
        f"the same, {BOTH}", "oneDNN, dense", 2.2,
        _ratio("sparse_conv2d", {"": f"{LAYERS['128→128, 3×3']}, {BOTH}"}, "plain"),
    ),
    Target(
        f"`sparse_conv2d`, {BOTH}, on each of five layers", "SparseProp", 4,
        _ratio("sparse_conv2d", {name: f"{case}, {BOTH}" for name, case in LAYERS.items()}, "sparseprop"),
    ),
    Target(
        f"`sparse_upsample_conv2d`, 64→32, 3×3, to 256², density 0.19, {BOTH}", "PyTorch, dense", 4,
        _ratio("sparse_upsample_conv2d", {"": f"64 to 32, 3×3, to 256², density 0.19, {BOTH}"}, "plain"),
    ),
    Target("training step's cost per pixel", "that of 256²", 1, _cost_per_pixel, at_most=True),
    Target("training step, 256², from 100 % kept down", "next denser mask", 1, _cost_per_density, at_most=True),
]  # fmt: skip


def table(records: Records) -> str:
    """Every target with what was measured, and whether that meets it."""
    lines = ["| | compared with | target | measured | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        values = target.values(records)
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:g}×"
        shown = ", ".join(f"{_number(value)}× {name}".strip() for name, value in values.items()) or "–"
        lines.append(f"| {target.what} | {target.over} | {bound} | {shown} | {verdict(target, values)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def verdict(target: Target, values: dict[str, float]) -> str:
    """In a word or two; a target of several cases is met if all of them meet it."""
    if not values:
        return "not measured"
    met = [value <= target.bound if target.at_most else value >= target.bound for value in values.values()]
    if all(met):
        return "met"
    return f"missed ({sum(met)} of {len(met)} met)" if any(met) else "missed"
