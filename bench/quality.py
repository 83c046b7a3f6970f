"""How good the restored images are: OES against dense DIP, with and without early stopping, and a random mask.

    python bench/quality.py            # everything that is not in the results yet, then table and picture
    python bench/quality.py --draw     # table and picture only

Every method gets the same noisy image, the same z and the same number of steps in all. Finished runs are kept in
bench/results/quality-cpu.json, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from skimage import data, transform

import sparse_gen as sg
from sparse_gen.files import atomic_write
from sparse_gen.fitting.stop import WMV
from sparse_gen.masks.random import random_mask

RESULTS = Path(__file__).parent / "results" / "quality-cpu.json"
PICTURE = RESULTS.with_suffix(".png")
SIZE, SIGMA, DENSITY, SEARCH_STEPS, STEPS, EVERY = 256, 0.1, 0.05, 1000, 1500, 10
WINDOW, PATIENCE = 100, 1000
SEEDS = (0, 1, 2)
METHODS = {
    "oes": "OES, 5 % (Adam 1e-2)",
    "dense": "dense DIP (Adam 1e-3)",
    "random": "random mask, 5 % (Adam 1e-2)",
}
PHOTOGRAPHS = {"astronaut": tuple(METHODS), "coffee": ("oes", "dense")}


def photograph(name: str, size: int = SIZE) -> torch.Tensor:
    """A square photograph of scikit-image, (1, 3, size, size) in [0, 1]."""
    image = getattr(data, name)()
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    image = transform.resize(image[top : top + side, left : left + side], (size, size), anti_aliasing=True)
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


class Watched:
    """A stopping rule that is asked and noted, but not obeyed: one run then shows both ends."""

    def __init__(self, rule):
        self.rule = rule

    def update(self, step, image):
        self.rule.update(step, image)
        return False

    @property
    def image(self):
        return self.rule.image


def run(name: str, method: str, seed: int) -> dict:
    torch.set_num_threads(1)
    clean = photograph(name)
    y = sg.inverse.add_noise(clean, SIGMA, seed=seed)
    z = sg.noise_input(32, (SIZE, SIZE), seed=seed)
    net = sg.generators.Hourglass(seed=seed)
    start = time.perf_counter()
    masked_untrained, steps, lr = None, STEPS, 1e-2
    if method == "oes":
        mask = sg.search_mask(net, z, y, density=DENSITY, steps=SEARCH_STEPS, seed=seed).mask
    elif method == "random":
        mask = random_mask(net, DENSITY, seed=seed)
        steps = SEARCH_STEPS + STEPS
    else:
        mask, steps, lr = None, SEARCH_STEPS + STEPS, 1e-3
    if mask is not None:
        masked_untrained = sg.fitting.psnr(sg.masked_output(net, z, mask), clean).item()
    module = net if mask is None else sg.compile(net, mask, z)
    stop = Watched(WMV(WINDOW, PATIENCE))
    fit = sg.fit(module, z, y, steps=steps, lr=lr, clean=clean, every=EVERY, seed=seed, stop=stop)
    with torch.no_grad():
        last = fit.module(z)
    psnr = fit.history["psnr"][:, 0]
    peak = int(psnr.argmax())
    return {
        "suite": "quality",
        "case": f"{name} {SIZE}, sigma {SIGMA}",
        "provider": method,
        "seed": seed,
        "steps_search": SEARCH_STEPS if method == "oes" else 0,
        "steps_fit": steps,
        "lr": lr,
        "psnr_noisy": sg.fitting.psnr(y, clean).item(),
        "psnr_masked_untrained": masked_untrained,
        "psnr_last": sg.fitting.psnr(last, clean).item(),
        "psnr_wmv": sg.fitting.psnr(fit.image, clean).item(),
        "wmv_selected_step": int(stop.rule.selected_step),
        "wmv_stopped_at": int(stop.rule.stopped_at) if stop.rule.stopped_at >= 0 else None,
        "psnr_oracle_peak": psnr[peak].item(),
        "oracle_peak_step": fit.history.step[peak],
        "oracle_peak_interval": EVERY,
        "ssim_last": sg.fitting.ssim(last, clean).item(),
        "seconds": time.perf_counter() - start,
        "threads": 1,
        "psnr_by_step": [round(value, 4) for value in psnr.tolist()],
        "device": "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def measure(workers: int) -> None:
    done = {(record["case"].split()[0], record["provider"], record["seed"]) for record in load()}
    jobs = [(name, method, seed) for seed in SEEDS for name, methods in PHOTOGRAPHS.items() for method in methods]
    todo = [job for job in jobs if job not in done]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for finished in as_completed(pool.submit(run, *job) for job in todo):
            record = finished.result()
            records = sorted([*load(), record], key=lambda r: (r["case"], r["provider"], r["seed"]))
            with atomic_write(RESULTS, "w") as file:
                json.dump(records, file, indent=1)
            print(
                f"{record['case']}, {record['provider']} seed {record['seed']}: {record['psnr_last']:.2f} dB",
                flush=True,
            )


def table(records: list[dict]) -> str:
    def spread(values):
        if not values:
            return "–"
        return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

    lines = [
        "| photograph | method | noisy | masked, untrained | last | WMV | oracle peak, every 10 steps | SSIM | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, methods in PHOTOGRAPHS.items():
        for method in methods:
            own = [r for r in records if r["provider"] == method and r["case"].startswith(name)]
            if own:
                columns = [
                    "psnr_noisy",
                    "psnr_masked_untrained",
                    "psnr_last",
                    "psnr_wmv",
                    "psnr_oracle_peak",
                    "ssim_last",
                ]
                cells = [spread([r[column] for r in own if r[column] is not None]) for column in columns]
                lines.append(f"| {' | '.join([name, METHODS[method], *cells, str(len(own))])} |")
    return "\n".join(lines)


def draw(records: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(PHOTOGRAPHS), figsize=(11, 4), layout="constrained", sharey=True, squeeze=False
    )
    colors = dict(zip(METHODS, ["tab:blue", "tab:orange", "tab:gray"], strict=True))
    for axes, name in zip(panels[0], PHOTOGRAPHS, strict=True):
        own = [record for record in records if record["case"].startswith(name)]
        labelled = set()
        for record in own:
            method = record["provider"]
            # The search's steps belong to the budget, so OES starts training at step 1,000.
            start = record["steps_search"]
            steps = start + EVERY * np.arange(len(record["psnr_by_step"]))
            label = None if method in labelled else METHODS[method]
            axes.plot(steps, record["psnr_by_step"], color=colors[method], alpha=0.8, lw=1, label=label)
            if method != "random":
                axes.plot(start + record["wmv_selected_step"], record["psnr_wmv"], "o", color=colors[method], ms=5)
            labelled.add(method)
        if own:
            axes.axhline(np.mean([r["psnr_noisy"] for r in own]), color="black", lw=0.8, ls=":", label="noisy image")
        axes.plot([], [], "o", color="black", ms=5, label="selected by WMV, without the clean image")
        axes.set(xlabel="step, search included", title=f"{name} {SIZE}², σ = {SIGMA}, a line a seed", ylim=(10, None))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR, dB")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    with atomic_write(PICTURE) as file:
        figure.savefig(file, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--draw", action="store_true", help="only the table and the picture, from the results")
    arguments = parser.parse_args()
    if not arguments.draw:
        measure(arguments.workers)
    records = load()
    draw(records)
    print(table(records))


if __name__ == "__main__":
    main()
