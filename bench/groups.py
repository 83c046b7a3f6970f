"""What it costs, and what it saves, to prune in groups that hardware can skip: PSNR against the time of a step.

    python bench/groups.py --reduced           # 128², depth 5, 300 + 600 steps, 1 seed: a quarter of an hour
    python bench/groups.py                     # 256², depth 6, 1,000 + 1,500 steps, 3 seeds: hours on a CPU
    python bench/groups.py --reduced --time    # the step times alone, alone on the machine; --size 256
    python bench/groups.py --reduced --draw    # table and picture only

OES searches a mask for every kind of group at one density; what it keeps is trained as in `pruning.py`. Then a training
step of the first photograph's masks is timed with the plan that the engine measures, all groups in turn, after a
comparison with plain PyTorch in float64. Results are kept in bench/results/groups-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pruning
import records
import torch
from rich.console import Console
from rich.progress import Progress

import sparse_gen as sg
from sparse_gen.engine.functional import training_copy
from sparse_gen.experiments.bench import StepCase
from sparse_gen.experiments.timing import Times, make_records, timed_round, warm_up_rounds
from sparse_gen.files import atomic_write
from sparse_gen.masks.connectivity import probe_connectivity
from sparse_gen.ops.squared_errors import squared_errors

RESULTS = Path(__file__).parent / "results" / "groups-cpu.json"
DENSITY = 0.05
GROUPS = {
    "dense": "none: dense, Adam 1e-3",
    "weight": "weight",
    "4x1": "4 output channels",
    "8x1": "8 output channels",
    "16x1": "16 output channels",
    "4x4": "4 output × 4 input channels",
    "8x8": "8 output × 8 input channels",
    "4x4+head": "4 × 4, but for the head, which stays whole",
    "8x8+head": "8 × 8, but for the head, which stays whole",
    "kernel": "kernel plane",
    "filter": "filter",
}
CHECKED = 96  # the smallest side that five scales take
ROUNDS = 15


def place(record: dict) -> tuple:
    return record["case"], list(GROUPS).index(record["provider"]), record.get("seed", 0)


class Comparison(pruning.Comparison):
    """The pruning comparison's problems and trainings, with groups for methods."""

    groups = tuple(GROUPS)

    def jobs(self) -> list[tuple[str, str, int]]:
        preset = self.preset
        done = {(r["case"], r["provider"], r.get("seed")) for r in records.load(self.results)}
        every = [(name, group, seed) for seed in preset.seeds for name in preset.photographs for group in self.groups]
        return [job for job in every if (preset.case(job[0]), *job[1:]) not in done]

    def mask(self, name: str, group: str, seed: int, progress=None) -> sg.Mask:
        file = self.masks / f"{self.preset.case(name)}, {DENSITY}, {group}, seed {seed}.safetensors"
        if not file.exists():
            z, y, _, net = self.problem(name, seed)
            self.masks.mkdir(parents=True, exist_ok=True)
            kind, _, head = group.partition("+")
            sg.search_mask(
                net, z, y, density=DENSITY, steps=self.preset.search_steps, group=kind, seed=seed, progress=progress,
                prunable=lambda name, weight: weight.ndim == 4 and not (head and name == "head.weight"), plan="rule",
            ).mask.save(file)  # fmt: skip
        return sg.Mask.load(file)

    def quality(self, name: str, group: str, seed: int, progress=None) -> dict:
        preset = self.preset
        z, y, clean, net = self.problem(name, seed)
        dense = group == "dense"
        mask = None if dense else self.mask(name, group, seed, progress)
        record = {
            "suite": "groups", "case": preset.case(name), "preset": preset.name, "provider": group, "seed": seed,
            "density": 1.0 if dense else mask.density, "parameters": sum(p.numel() for p in net.parameters()),
            "steps_search": 0 if dense else preset.search_steps,
            "steps_fit": preset.steps + (preset.search_steps if dense else 0),
            "lr": pruning.WHOLE["dense"] if dense else pruning.LR, "psnr_noisy": sg.fitting.psnr(y, clean).item(),
            "device": "cpu", "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        if mask is not None:
            found = probe_connectivity(training_copy(net), mask.dense_weights(net), z)
            record["disconnected_at"] = found.disconnected_at
        if record.get("disconnected_at") is None:
            module = sg.compile(net, mask, z, weights="net" if dense else "mask", plan="rule")
            record |= self.train(module, z, y, clean, record, progress)
        return record

    def measure(self) -> None:
        todo = self.jobs()
        with Progress(console=Console(stderr=True)) as bars:
            runs, steps = bars.add_task("runs", total=len(todo)), bars.add_task("steps")
            for job in todo:
                bars.update(steps, description=" ".join(map(str, job[:2])), completed=0)
                record = self.quality(
                    *job, progress=lambda step, total, _: bars.update(steps, completed=step, total=total)
                )
                records.add(self.results, record, place)
                bars.advance(runs)

    def time_steps(self, size: int) -> None:
        """Steps of all groups in turn, with the masks of the first photograph and seed."""
        preset, name, seed = self.preset, self.preset.photographs[0], self.preset.seeds[0]
        trained = [
            r["provider"]
            for r in records.load(self.results)
            if r["case"] == preset.case(name) and r.get("seed") == seed and "psnr_last" in r
        ]
        steps, errors, plans = {}, {}, {}
        for group in trained:
            kind = "dense" if group == "dense" else "training"
            file = (
                ""
                if group == "dense"
                else str(self.masks / f"{preset.case(name)}, {DENSITY}, {group}, seed {seed}.safetensors")
            )
            case = StepCase(kind, size, DENSITY, mask=file or None, mask_name=group, depth=preset.depth)
            errors[group] = difference(replace(case, size=min(size, max(CHECKED, 3 * 2**preset.depth))))
            ours = case.ours(case.inputs())
            steps[group], plans[group] = ours.step, ours.module.plan
        times: Times = {}
        warm_up = warm_up_rounds("cpu")
        for _ in range(warm_up + ROUNDS):
            timed_round(steps, times, "cpu", in_a_row=2)
        counted = {group: measured[warm_up:] for group, measured in times.items()}
        title = f"training step of {name}'s masks, depth {preset.depth}, {size}²"
        for record in make_records("groups", title, counted, device="cpu", error=None, facts={"size": size}):
            group = record["provider"]
            stages = plans[group].stages
            record |= {
                "error": errors[group], "preset": preset.name, "flop": sum(stage.flops_after for stage in stages),
                "kernels": Counter(stage.kernel for stage in stages),
            }  # fmt: skip
            records.add(self.results, record, place)


def difference(case: StepCase) -> float:
    """Of the output and of its gradient at live weights to plain PyTorch in float64, relative to their norms.

    Kept weights of dead channels have no gradient here and an arbitrary one there: it is 0 in exact arithmetic, but
    every normalisation of a constant on its way back multiplies its rounding by up to 1/√ε = 316 (measured in float32:
    a norm of 1,122). Away from the initialisation, whose β of 0 put constant channels on the kink of LeakyReLU.
    """
    net, mask, z, y = case.inputs(torch.float64)
    outputs, gradients = [], []
    for engine in ("auto", "reference"):
        module = sg.compile(net, mask, z, engine=engine)
        with torch.no_grad():
            module.values += 0.01 * torch.randn(module.values.shape, generator=torch.Generator().manual_seed(0))
        outputs.append(module(z))
        squared_errors(outputs[-1], y).sum().backward()
        gradients.append(module.values.grad)
    live = gradients[0] != 0
    pairs = [outputs, [gradient[live] for gradient in gradients]]
    error = max(((own - other).norm() / other.norm()).item() for own, other in pairs)
    if not error <= 1e-9:
        raise RuntimeError(f"expected what plain PyTorch gives for {case.name}, got a difference of {error}")
    return error


def _quality(found: list[dict]) -> list[dict]:
    return [r for r in found if "psnr_noisy" in r]


def _times(found: list[dict], size: int) -> dict[str, dict]:
    return {r["provider"]: r for r in found if r.get("size") == size}


def _lost(found: list[dict], group: str, column: str = "psnr_last") -> tuple[float, float] | None:
    """Mean PSNR of a group, and what that is below weights on the same photographs and seeds."""
    own, weight = (
        {(r["case"], r["seed"]): r[column] for r in _quality(found) if r["provider"] == name and r.get(column)}
        for name in (group, "weight")
    )
    both = own.keys() & weight.keys()
    if not both:
        return None
    return float(np.mean([own[k] for k in both])), float(np.mean([weight[k] - own[k] for k in both]))


def table(found: list[dict]) -> str:
    """A row a kind of group: PSNR and what is lost of it, milliseconds and how many times faster."""
    quality = _quality(found)
    if not quality:
        return ""
    sizes = sorted({r["size"] for r in found if "size" in r})
    cases = ", ".join(dict.fromkeys(r["case"] for r in quality))
    reduced = " (reduced)" if quality[0]["preset"] == "reduced" else ""
    head = [
        "pruned together", "kept", "last, dB", "lost to weights, dB", "oracle peak, dB",
        *(f"step at {size}², ms | over weights" for size in sizes), f"layouts at {sizes[-1]}²" if sizes else "layouts",
    ]  # fmt: skip
    rows = [f"**{cases}**{reduced}", "", f"| {' | '.join(head)} |", "|" + "---|" * (len(head) + len(sizes))]
    for group, label in GROUPS.items():
        own = [r for r in quality if r["provider"] == group]
        if not own:
            continue
        cut = [r for r in own if r.get("disconnected_at")]
        last, peak = (_lost(found, group, column) for column in ("psnr_last", "psnr_oracle_peak"))
        cells = [f"{np.mean([r['density'] for r in own]):.2%}"]
        cells += ["–"] * 3 if last is None else [f"{last[0]:.2f}", f"{last[1]:+.2f}", f"{peak[0]:.2f}"]
        if cut:
            cells[1] += f" ({len(cut)} of {len(own)} cut at {', '.join(sorted({r['disconnected_at'] for r in cut}))})"
        kernels: Counter[str] = Counter()
        for size in sizes:
            times = _times(found, size)
            if group in times and "weight" in times:
                own_ms = times[group]["median_ms"]
                cells += [f"{own_ms:.1f}", f"{times['weight']['median_ms'] / own_ms:.2f}×"]
                kernels = Counter()
                for kernel, count in times[group]["kernels"].items():
                    kernels[_layout(kernel)] += count
            else:
                cells += ["–", "–"]
        cells.append(", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common()) or "–")
        rows.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(rows)


def _layout(kernel: str) -> str:
    """The layout of a convolution without what is folded into it; the head is dense."""
    name = kernel.split(",")[0].removeprefix("upsampled ")
    return {"with its normalisation": "dense", "dense tiles": "dense", "dense gemm": "dense"}.get(name, name)


def draw(found: list[dict], path: Path) -> None:
    """PSNR at the end against the milliseconds of a step, a panel a size, a point a kind of group."""
    sizes = sorted({r["size"] for r in found if "size" in r})
    if not sizes:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.2), layout="constrained", squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        for group, record in _times(found, size).items():
            shown = _lost(found, group)
            if shown is not None:
                axes.plot(record["median_ms"], shown[0], "o", color="tab:gray" if group == "dense" else "tab:blue")
                axes.annotate(group, (record["median_ms"], shown[0]), (4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="ms a training step", title=f"{size}²", ylabel="PSNR at the end, mean over photographs, dB")
        axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="128², depth 5, 300 + 600 steps, 1 seed")
    parser.add_argument("--time", action="store_true", help="only the times of steps, of masks that are there")
    parser.add_argument("--size", type=int, action="append", help="time steps of this size; default: 256 and 512")
    parser.add_argument("--draw", action="store_true", help="only table and picture, from the results")
    parser.add_argument("--threads", type=int, help="default: 1 for PSNR, all for times")
    arguments = parser.parse_args()
    preset = pruning.SMALL if arguments.reduced else pruning.FULL
    comparison = Comparison(preset, RESULTS, pruning.MASKS)
    threads = arguments.threads or torch.get_num_threads()
    if not arguments.draw and not arguments.time:
        torch.set_num_threads(arguments.threads or 1)
        comparison.measure()
    if not arguments.draw:
        torch.set_num_threads(threads)
        for size in arguments.size or (256, 512):
            comparison.time_steps(size)
    found = [r for r in records.load(RESULTS) if r["preset"] == preset.name]
    draw(found, RESULTS.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
