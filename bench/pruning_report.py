"""Table and picture of what `pruning.py` has measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparse_gen.files import atomic_write

LABELS = {
    "dense": "dense DIP; stopped: dense + WMV",
    "decoder": "deep decoder",
    "random": "random",
    "magnitude": "magnitude",
    "snip": "SNIP",
    "snip_all": "SNIP, everything prunable",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "imp": "IMP",
    "oes": "OES",
    "oes_8x1": "OES on 8×1 blocks",
    "oes_moved": "OES mask and weights of the other image",
    "oes_reinitialised": "OES mask, weights drawn anew",
}


def _of(records: list[dict], column: str) -> list[float]:
    return [r[column] for r in records if r.get(column) is not None]


def _spread(values: list[float], form: str = ".2f") -> str:
    if not values:
        return "–"
    mean = format(np.mean(values), form)
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else mean


def table(records: list[dict]) -> str:
    """One table a case, a row a method and density. Networks that a mask cuts are in no mean, and said."""
    parts = []
    for case in dict.fromkeys(r["case"] for r in records):
        own = [r for r in records if r["case"] == case]
        noisy = _spread(list({r["seed"]: r["psnr_noisy"] for r in own}.values()))
        every = "/".join(sorted({str(v) for v in _of(own, "oracle_peak_interval")})) or "–"
        parts.append(
            f"**{_title(case, own)}**, noisy image {noisy} dB\n\n"
            f"| method | kept | untrained | last | stopped (WMV) | oracle peak, every {every} steps | "
            "search + training steps | TFLOP in all | seeds |\n|---|---|---|---|---|---|---|---|---|\n" + _rows(own)
        )
    return "\n\n".join(parts)


def _title(case: str, records: list[dict]) -> str:
    return case + (" (reduced)" if any(r["preset"] == "reduced" for r in records) else "")


def _rows(records: list[dict]) -> str:
    rows = []
    for method, name in LABELS.items():
        here = [r for r in records if r["provider"] == method]
        for density in dict.fromkeys(r["density_asked"] for r in here):
            own = [r for r in here if r["density_asked"] == density]
            cut = [r for r in own if r.get("disconnected_at")]
            share = "all" if density is None else f"{own[0]['density']:.2%}"
            kept = f"{round(own[0]['density'] * own[0]['parameters']):,} ({share})"
            cells = [_spread(_of(own, f"psnr_{key}")) for key in ("untrained", "last", "wmv", "oracle_peak")]
            if cut:
                places = ", ".join(sorted({r["disconnected_at"] for r in cut}))
                cells[1] += f" ({len(cut)} of {len(own)} cut at {places})"
            steps = f"{own[0]['steps_search']} + {own[0]['steps_fit'] if len(cut) < len(own) else 0}"
            row = [name, kept, *cells, steps, _spread(_of(own, "tflop"), ".1f"), str(len(own))]
            rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def draw(records: list[dict], path: Path) -> None:
    """A row an image: PSNR against step, end PSNR against density, density of the layers. Nothing without records."""
    if not records:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(r["case"] for r in records))
    colours = {method: plt.get_cmap("tab20")(i) for i, method in enumerate(LABELS)}
    figure, panels = plt.subplots(len(cases), 3, figsize=(17, 4.6 * len(cases)), layout="constrained", squeeze=False)
    for axes, case in zip(panels, cases, strict=True):
        own = [r for r in records if r["case"] == case]
        _against_step(axes[0], own, colours)
        axes[0].set_title(_title(case, own), fontsize=10)
        _against_density(axes[1], own, colours)
        _layers(axes[2], own, colours)
    for marker, name in (("s", "last"), ("o", "stopped (WMV)"), ("^", "oracle peak")):
        panels[0][0].plot([], [], marker, color="black", ms=5, label=name)
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def _against_step(axes, records: list[dict], colours: dict) -> None:
    # One density, the one that most runs have: several would hide each other.
    asked = [r["density_asked"] for r in records if r["density_asked"] is not None]
    shown = max(set(asked), key=asked.count) if asked else None
    labelled = set()
    for r in records:
        if "psnr_by_step" not in r or r["density_asked"] not in (None, shown):
            continue
        method, start = r["provider"], r["steps_search"]
        label = None if method in labelled else LABELS[method]
        labelled.add(method)
        steps = start + np.array(r["psnr_steps"])
        axes.plot(steps, r["psnr_by_step"], color=colours[method], lw=1, label=label)
        ends = [
            (start + r["steps_fit"], r["psnr_last"], "s"), (start + r["oracle_peak_step"], r["psnr_oracle_peak"], "^"),
        ]  # fmt: skip
        if r["wmv_selected_step"] >= 0:
            ends.append((start + r["wmv_selected_step"], r["psnr_wmv"], "o"))
        for x, y, marker in ends:
            axes.plot(x, y, marker, color=colours[method], ms=5)
    axes.axhline(np.mean(_of(records, "psnr_noisy")), color="black", lw=0.8, ls=":", label="noisy image")
    axes.set(xlabel="step, search included", ylabel="PSNR, dB")
    axes.grid(alpha=0.3)


def _against_density(axes, records: list[dict], colours: dict) -> None:
    for method in LABELS:
        own = [r for r in records if r["provider"] == method and "psnr_last" in r]
        if method in ("dense", "decoder"):
            for r in own:
                axes.axhline(r["psnr_last"], color=colours[method], lw=1)
            continue
        reached = sorted({r["density_asked"] for r in own})
        means = [np.mean([r["psnr_last"] for r in own if r["density_asked"] == d]) for d in reached]
        axes.plot(reached, means, "s-", color=colours[method], ms=5, lw=1)
        axes.plot([r["density_asked"] for r in own], [r["psnr_last"] for r in own], ".", color=colours[method], ms=3)
    axes.set(xlabel="density", ylabel="PSNR at the end, dB", xscale="log")
    densities = sorted({r["density_asked"] for r in records if r["density_asked"] is not None})
    axes.set_xticks(densities, [f"{100 * d:g} %" for d in densities])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _layers(axes, records: list[dict], colours: dict) -> None:
    """Of the first seed; an empty layer has no point on the logarithmic scale."""
    names = []
    for method in LABELS:
        own = [r for r in records if r["provider"] == method and "layer_density" in r]
        if own:
            densities = own[0]["layer_density"]
            names = names or list(densities)
            values = [densities[name] or np.nan for name in names]
            axes.plot(range(len(names)), values, "-", color=colours[method], lw=1, marker=".", ms=4)
    short = [name.removesuffix(".weight").replace("encoder", "enc").replace("decoder", "dec") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=6)
    axes.set(ylabel="kept share of the layer", yscale="log")
    axes.grid(alpha=0.3)
