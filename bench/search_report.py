"""Table and picture of what `search_study.py` has measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparse_gen.files import atomic_write

LABELS = {
    "quick": "default: lr 5e-2, λ 1e-7, convolution weights",
    "lr2e-2": "lr 2e-2",
    "lr.1": "lr 0.1",
    "kl1e-8": "λ 1e-8",
    "kl1e-6": "λ 1e-6",
    "ramp1e-6": "λ rising from 0 to 1e-6",
    "all": "everything prunable",
    "prior": "logits from the prior (-2.94)",
    "init1": "logits from 1",
    "tau.5": "temperature 0.5",
    "tau1": "temperature 1",
    "tau1-.2": "temperature falling from 1 to 0.2",
    "mf.5": "mean field, samples in the second half",
    "mf1": "mean field",
    "anti": "antithetic samples",
    "x4": "4 samples a step, lr 0.1, a quarter of the steps",
    "decay": "lr falling to 0 over the second half",
    "all6e-9": "everything prunable, λ 6e-9",
    "all6e-9lr.1": "everything prunable, λ 6e-9, lr 0.1",
    "all1e-8": "everything prunable, λ 1e-8",
    "d.01": "1 % kept",
    "d.02": "2 % kept",
    "kl1e-8d.01": "λ 1e-8, 1 % kept",
    "kl1e-8d.02": "λ 1e-8, 2 % kept",
    "paper": "the paper's constants",
    "paper_conv": "the paper's constants, convolution weights",
}
COLUMNS = {
    "psnr_untrained": "untrained",
    "psnr_last": "last",
    "psnr_tail": "last 200 steps",
    "psnr_wmv": "stopped (WMV)",
    "psnr_oracle_peak": "oracle peak",
}


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def rows(records: list[dict]) -> list[tuple[str, int, list[dict]]]:
    """(setting, search steps, its records of all seeds) of one case."""
    found: dict[tuple[str, int], list[dict]] = {}
    for setting in LABELS:
        for r in records:
            if r["provider"] == setting:
                found.setdefault((setting, r["steps_search"]), []).append(r)
    return [(setting, steps, own) for (setting, steps), own in sorted(found.items(), key=_place)]


def _place(item: tuple) -> tuple:
    (setting, steps), _ = item
    return list(LABELS).index(setting), steps


def table(records: list[dict]) -> str:
    """One table a case, a row a setting and number of search steps; networks that are cut are in no mean, and said."""
    parts = []
    for case in dict.fromkeys(r["case"] for r in records):
        own = [r for r in records if r["case"] == case]
        noisy = _spread(list({r["seed"]: r["psnr_noisy"] for r in own}.values()))
        reduced = " (reduced)" if any(r["preset"] == "reduced" for r in own) else ""
        trained = "/".join(sorted({f"{r['steps_fit']:,}" for r in own}))
        columns = [*COLUMNS.values(), "kept and alive", "exchanged by the last 100", "seeds"]
        lines = [
            f"**{case}, {trained} training steps{reduced}**, noisy image {noisy} dB",
            "",
            f"| setting | search steps | {' | '.join(columns)} |",
            "|" + "---|" * (len(columns) + 2),
        ]
        for setting, steps, same in rows(own):
            cells = [_spread([r[c] for r in same if r.get(c) is not None]) for c in COLUMNS]
            places = sorted({r["disconnected_at"] for r in same if r["disconnected_at"]})
            if places:
                cut = sum(bool(r["disconnected_at"]) for r in same)
                cells[1] += f" ({cut} of {len(same)} cut at {', '.join(places)})"
            shares = [r["exchanged"][-1] for r in same if r["exchanged"]]
            exchanged = f"{np.mean(shares):.0%}" if shares else "–"
            alive = [r["live_kept"] for r in same if "live_kept" in r]
            cells.append(f"{np.mean(alive):,.0f}" if alive else "–")
            lines.append(f"| {LABELS[setting]} | {steps:,} | {' | '.join(cells)} | {exchanged} | {len(same)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(records: list[dict], path: Path) -> None:
    """A panel a case: each setting's PSNR over the last 200 steps, a dot a seed. Nothing without records."""
    if not records:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(r["case"] for r in records))
    found = {case: rows([r for r in records if r["case"] == case]) for case in cases}
    heights = [len(own) for own in found.values()]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(9, 1.2 * len(cases) + 0.26 * sum(heights)), layout="constrained", squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for axes, (case, own) in zip(panels[:, 0], found.items(), strict=True):
        for y, (_, _, same) in enumerate(own):
            for column, marker, colour in (("psnr_oracle_peak", "^", "tab:gray"), ("psnr_tail", "o", "tab:blue")):
                values = [r[column] for r in same if column in r]
                axes.plot(values, [y] * len(values), marker, color=colour, ms=5, alpha=0.8)
            if not any("psnr_tail" in r for r in same):
                axes.text(
                    0.01, y, "cut", transform=axes.get_yaxis_transform(), va="center", fontsize=7, color="tab:red"
                )
        names = [f"{LABELS[setting]}, {steps:,}" for setting, steps, _ in own]
        axes.set_yticks(range(len(own)), names, fontsize=7)
        axes.set(title=case, ylim=(len(own) - 0.5, -0.5))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    panels[-1][0].set_xlabel("PSNR, dB, after training; search steps behind each name")
    panels[0][0].plot([], [], "o", color="tab:blue", ms=5, label="mean of the last 200 steps, a dot a seed")
    panels[0][0].plot([], [], "^", color="tab:gray", ms=5, label="oracle peak")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)
