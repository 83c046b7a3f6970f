"""Lottery tickets of a deep image prior: dense against every round of IMP, denoising and inpainting one photograph.

    python bench/lottery.py              # 256², 3,000 steps a round: days on a CPU
    python bench/lottery.py --reduced    # 48², 100 steps a round: ten minutes with one thread
    python bench/lottery.py --draw       # table and picture only, of the preset that is named beside it

`Skip` at its defaults, jitter 1/30, Adam 1e-2; every round removes 20 % of the convolution weights that are left, by
magnitude, and goes back to the initialisation. Masks are found on the measurement. A round's training is that of what
the rounds before it have left, so that a density costs one training. Finished rounds wait in build/lottery, finished
cases are kept in bench/results/lottery-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import dataclass
from math import floor
from pathlib import Path

import numpy as np
import records
import torch
from quality import photograph
from rich.console import Console
from rich.progress import Progress

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints
from sparse_gen.files import atomic_write
from sparse_gen.history import History

RESULTS = Path(__file__).parent / "results" / "lottery-cpu.json"
ROUNDS = Path(__file__).parents[1] / "build" / "lottery"
TASKS = {"denoise": "denoising, σ = 25/255", "inpaint": "inpainting, half of the pixels missing"}
LR, JITTER, FRACTION = 1e-2, 1 / 30, 0.2


@dataclass(frozen=True)
class Preset:
    """Attributes: size of the square image; steps of a training; the EMA's decay; rounds, each removing a fifth."""

    name: str
    size: int
    steps: int
    average: float
    rounds: int = 11
    photograph: str = "astronaut"
    every: int = 10
    seed: int = 0
    depth: int = 5

    def case(self, task: str) -> str:
        return f"{self.photograph} {self.size}², {TASKS[task]}, {self.steps} steps a round"


FULL = Preset("full", 256, 3000, 0.99)
REDUCED = Preset("reduced", 48, 100, 0.9)


def place(record: dict) -> tuple:
    return record["case"], record["round"], record["seed"]


def problem(preset: Preset, task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """z, y, clean image and pixel weight."""
    clean = photograph(preset.photograph, preset.size)
    z = sg.noise_input(32, clean.shape[-2:], seed=preset.seed)
    if task == "denoise":
        return z, sg.inverse.add_noise(clean, 25 / 255, seed=preset.seed), clean, None
    known = torch.rand(1, 1, *clean.shape[-2:], generator=torch.Generator().manual_seed(preset.seed)) < 0.5
    return z, clean * known, clean, known.to(clean)


def run(preset: Preset, task: str, folder: Path = ROUNDS, progress=None) -> list[dict]:
    """A record for the dense network and one for what each round has left."""
    z, y, clean, weight = problem(preset, task)
    net = sg.generators.Skip(depth=preset.depth, seed=preset.seed)
    total = sum(parameter.numel() for parameter in net.parameters())
    convolutions = sum(parameter.numel() for parameter in net.parameters() if parameter.ndim == 4)
    kept = [convolutions]
    for _ in range(preset.rounds):
        kept.append(floor(kept[-1] * (1 - FRACTION)))
    whole = total - convolutions
    options = {
        "steps": preset.steps, "lr": LR, "input_jitter": JITTER, "average": preset.average, "clean": clean,
        "pixel_weight": weight, "every": preset.every,
    }  # fmt: skip
    checkpoints = Checkpoints(folder / preset.case(task).replace("/", "-"), resume=True)
    found = sg.masks.find(
        "imp", net, z, y, density=(kept[-1] + whole + 0.5) / total, fraction=FRACTION, seed=preset.seed, plan="rule",
        checkpoints=checkpoints, progress=progress, **options,
    )  # fmt: skip
    module = sg.compile(net, found.mask, z, weights="mask", plan="rule")
    last = sg.fit(module, z, y, seed=preset.seed, checkpoints=checkpoints, progress=progress, **options)
    histories = [*rounds(found.history, preset), last.history]
    flops = [*found.settings["flops"], sum(stage.flops_after for stage in module.plan.stages)]
    result = []
    for number, (history, count, flop) in enumerate(zip(histories, kept, flops, strict=True)):
        psnr, average = (history[name][:, 0].tolist() for name in ("psnr", "psnr_average"))
        result.append({
            "suite": "lottery", "case": preset.case(task), "preset": preset.name, "task": task, "round": number,
            "seed": preset.seed, "density": (count + whole) / total, "density_convolutions": count / convolutions,
            "kept": count + whole, "parameters": total, "steps": preset.steps, "lr": LR, "input_jitter": JITTER,
            "average": preset.average, "found_on": "measurement",
            "psnr_measured": sg.fitting.psnr(y, clean).item(), "psnr_last": psnr[-1],
            "psnr_average_last": average[-1], "psnr_oracle_peak": max(psnr),
            "psnr_average_oracle_peak": max(average), "oracle_peak_interval": preset.every,
            # Forward and two gradients of the convolutions, all rounds up to this one.
            "tflop": 3e-12 * preset.steps * sum(flops[: number + 1]), "flop": flop,
            "psnr_steps": history.step, "psnr_average_by_step": [round(value, 4) for value in average],
            "device": "cpu", "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        })  # fmt: skip
    checkpoints.clear()
    checkpoints.folder.rmdir()
    return result


def rounds(history: History, preset: Preset) -> list[History]:
    """The history of all rounds, cut into that of each."""
    parts = [History() for _ in range(preset.rounds)]
    for i, step in enumerate(history.step):
        number, own = divmod(step, preset.steps)
        parts[number].record(own, **{name: history[name][i] for name in history.columns})
    return parts


def table(found: list[dict]) -> str:
    """One table a case, a row a round. EMA is the running average of the outputs, which the papers show the peak of."""
    parts = []
    for case in dict.fromkeys(r["case"] for r in found):
        own = [r for r in found if r["case"] == case]
        title = case + (" (reduced)" if own[0]["preset"] == "reduced" else "")
        rows = [
            f"**{title}**, seed {own[0]['seed']}",
            "",
            "| rounds of pruning | convolution weights kept | last | EMA, last | "
            f"oracle peak of EMA, every {own[0]['oracle_peak_interval']} steps | TFLOP so far |",
            "|---|---|---|---|---|---|",
        ]
        for r in own:
            name = "dense" if r["round"] == 0 else str(r["round"])
            cells = [f"{r[key]:.2f}" for key in ("psnr_last", "psnr_average_last", "psnr_average_oracle_peak")]
            cells = [name, f"{r['density_convolutions']:.1%}", *cells, f"{r['tflop']:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def draw(found: list[dict], path: Path) -> None:
    """PSNR against density, a panel a task. Nothing without records."""
    if not found:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(r["case"] for r in found))
    figure, panels = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4.2), layout="constrained", squeeze=False)
    columns = {
        "psnr_last": "last",
        "psnr_average_last": "EMA, last",
        "psnr_average_oracle_peak": "oracle peak of EMA",
    }
    for axes, case in zip(panels[0], cases, strict=True):
        own = [r for r in found if r["case"] == case]
        densities = np.array([r["density_convolutions"] for r in own])
        for (column, label), marker in zip(columns.items(), "so^", strict=True):
            (line,) = axes.plot(densities, [r[column] for r in own], f"{marker}-", ms=4, lw=1, label=label)
            axes.axhline(own[0][column], color=line.get_color(), lw=0.8, ls=":")
        axes.set(xlabel="convolution weights kept (dotted: dense)", xscale="log", ylabel="PSNR, dB")
        axes.set_title(case.replace(", ", "\n", 1), fontsize=9)
        axes.set_xticks(densities[::2], [f"{d:.0%}" for d in densities[::2]])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="48², 100 steps a round")
    parser.add_argument("--draw", action="store_true", help="only table and picture, from the results")
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    preset = REDUCED if arguments.reduced else FULL
    with Progress(console=Console(stderr=True)) as bars:
        for task in () if arguments.draw else [arguments.task] if arguments.task else TASKS:
            done = sum(r["case"] == preset.case(task) for r in records.load(RESULTS))
            if done < preset.rounds + 1:
                bar = bars.add_task(task)
                made = run(
                    preset, task, progress=lambda step, total, _, bar=bar: bars.update(bar, completed=step, total=total)
                )
                for record in made:
                    records.add(RESULTS, record, place)
    found = [r for r in records.load(RESULTS) if r["case"] in [preset.case(task) for task in TASKS]]
    draw(found, RESULTS.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
