"""How good the images are that differently found masks restore: every method on the same noise, z, network and steps.

    python bench/pruning.py              # 256², depth 6, 1,000 + 1,500 steps, 3 seeds: hours on a CPU
    python bench/pruning.py --reduced    # 256², depth 6, 400 + 800 steps, 1 seed: an hour with one thread
    python bench/pruning.py --small      # 128², depth 5, 300 + 600 steps, 1 seed: half an hour with one thread
    python bench/pruning.py --draw       # table and picture only, of the preset that is named beside it

The steps that a method takes to find its mask are taken off its training: passes over the network for SNIP (1), GraSP
(2) and SynFlow (100 rounds), rounds × steps for IMP. Finished runs are kept in bench/results/pruning-cpu.json, and are
not done again; several processes may run at a time. Masks of OES wait in build/pruning for the rows that move them, and
there a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pruning_report
import records
import torch
from quality import photograph
from rich.console import Console
from rich.progress import Progress

import sparse_gen as sg
from sparse_gen.checkpoint import Checkpoints, fingerprint
from sparse_gen.engine.functional import training_copy
from sparse_gen.experiments.methods import Watched
from sparse_gen.fitting.stop import WMV
from sparse_gen.masks.connectivity import probe_connectivity

RESULTS = Path(__file__).parent / "results" / "pruning-cpu.json"
MASKS = Path(__file__).parents[1] / "build" / "pruning"
# Rows whose weights are all kept: one run whatever the densities.
WHOLE = {"dense": 1e-3, "decoder": 1e-2}
LR = 1e-2
METHODS = (
    "dense", "decoder", "random", "magnitude", "snip", "snip_all", "grasp", "synflow", "imp", "oes", "oes_8x1",
    "oes_moved", "oes_reinitialised",
)  # fmt: skip
_PASSES = {"snip": 1, "snip_all": 1, "grasp": 2, "synflow": 100}


@dataclass(frozen=True)
class Preset:
    """What all methods of a comparison share.

    Attributes:
        name: stands in every record.
        size, depth: of the square image and the hourglass.
        search_steps, steps: of a search and of the training after it; methods without a search train for both.
        window, patience: of WMV.
        rounds: of IMP, search_steps // rounds steps each.
    """

    name: str
    size: int
    depth: int
    search_steps: int
    steps: int
    window: int
    patience: int
    seeds: tuple[int, ...] = (0, 1, 2)
    densities: tuple[float, ...] = (0.05,)
    photographs: tuple[str, ...] = ("astronaut", "coffee")
    methods: tuple[str, ...] = METHODS
    sigma: float = 0.1
    every: int = 10
    rounds: int = 5

    def case(self, name: str) -> str:
        return f"{name} {self.size}², depth {self.depth}, sigma {self.sigma}, {self.search_steps} + {self.steps} steps"

    def jobs(self) -> list[tuple[str, str, float | None, int]]:
        """(photograph, method, density, seed), masks before the rows that move them."""
        jobs = [
            (name, method, None if method in WHOLE else density, seed)
            for seed in self.seeds
            for density in self.densities
            for method in self.methods
            for name in self.photographs
        ]
        return list(dict.fromkeys(jobs))


def _place(record: dict) -> tuple:
    return record["case"], METHODS.index(record["provider"]), record["density_asked"] or 1, record["seed"]


FULL = Preset("full", 256, 6, 1000, 1500, window=100, patience=1000)
REDUCED = Preset("reduced", 256, 6, 400, 800, window=100, patience=400, seeds=(0,))
SMALL = Preset("reduced", 128, 5, 300, 600, window=50, patience=200, seeds=(0,))


class Comparison:
    """Runs a preset's methods and keeps their records."""

    def __init__(self, preset: Preset, results: Path = RESULTS, masks: Path = MASKS):
        self.preset, self.results, self.masks = preset, results, masks

    def records(self) -> list[dict]:
        return records.load(self.results)

    def todo(self) -> list[tuple]:
        done = {(r["case"], r["provider"], r["density_asked"], r["seed"]) for r in self.records()}
        return [job for job in self.preset.jobs() if (self.preset.case(job[0]), *job[1:]) not in done]

    def measure(self) -> None:
        todo = self.todo()
        with Progress(console=Console(stderr=True)) as bars:
            runs, steps = bars.add_task("runs", total=len(todo)), bars.add_task("steps")
            for job in todo:
                if job not in self.todo():  # another process was faster
                    bars.advance(runs)
                    continue
                bars.update(steps, description=" ".join(map(str, job[:2])), completed=0)
                record = self.run(*job, lambda step, total, _values: bars.update(steps, completed=step, total=total))
                records.add(self.results, record, _place)
                bars.advance(runs)

    def problem(self, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Module]:
        """z, y, clean, network: nothing of it depends on the method."""
        clean = photograph(name, self.preset.size)
        y = sg.inverse.add_noise(clean, self.preset.sigma, seed=seed)
        z = sg.noise_input(32, clean.shape[-2:], seed=seed)
        return z, y, clean, sg.generators.Hourglass(depth=self.preset.depth, seed=seed)

    def run(self, name: str, method: str, density: float | None, seed: int, progress: Any = None) -> dict:
        preset = self.preset
        z, y, clean, net = self.problem(name, seed)
        mask, passes = None, 0
        if method == "decoder":
            net = sg.generators.DeepDecoder(depth=min(preset.depth, 5), seed=seed)
            z = sg.noise_input(net.in_channels, z.shape[-2:], seed=seed)
        elif method == "oes_moved":
            mask, _ = self.stored("oes", self.other(name), density, seed, progress)
            mask, passes = sg.masks.transfer(mask, net, weights="keep"), preset.search_steps
        elif method == "oes_reinitialised":
            mask, passes = self.stored("oes", name, density, seed, progress)
            net = sg.generators.Hourglass(depth=preset.depth, seed=seed + 1000)
            mask = sg.masks.transfer(mask, net, weights="reinitialise")
        elif method in ("oes", "synflow", "imp"):
            mask, passes = self.stored(method, name, density, seed, progress)
        elif method not in WHOLE:
            mask, passes = self.find(method, net, z, y, density, seed, progress)
        whole = sg.compile(net, example_input=z, plan="rule")
        # The engine runs the search of OES; scores take gradients of the network as it is written.
        column = "flops_after" if method.startswith("oes") else "flops"
        flop_search = passes * sum(getattr(stage, column) for stage in whole.plan.stages)
        if method == "imp":  # every round runs what the rounds before it have left
            rounds = mask.recipe["search"]["flops"]
            flop_search = sum(rounds) * passes // len(rounds)
        record = {
            "suite": "pruning", "case": preset.case(name), "preset": preset.name, "provider": method, "seed": seed,
            "density_asked": density, "density": 1.0 if mask is None else mask.density,
            "parameters": sum(p.numel() for p in net.parameters()), "steps_search": passes,
            "steps_fit": preset.search_steps + preset.steps - passes, "lr": WHOLE.get(method, LR),
            "psnr_noisy": sg.fitting.psnr(y, clean).item(),
        }  # fmt: skip
        if mask is not None:
            found = probe_connectivity(training_copy(net), mask.dense_weights(net), z)
            record |= {
                "disconnected_at": found.disconnected_at,
                "layer_density": {n: kept / total for n, shape, kept, total in mask.layers() if len(shape) == 4},
            }
        # A constant image cannot be trained.
        if record.get("disconnected_at") is None:
            # The fixed rule for every layer: a measurement would differ from run to run, and be disturbed by others.
            module = whole if mask is None else sg.compile(net, mask, z, weights="mask", plan="rule")
            record |= self.train(module, z, y, clean, record, progress)
        return record | {
            # Forward and two gradients of the convolutions.
            "tflop_search": 3e-12 * flop_search,
            "tflop": 3e-12 * (flop_search + record.get("flop", 0) * record["steps_fit"]),
            "device": "cpu",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }

    def train(self, module, z, y, clean, record: dict, progress: Any) -> dict:
        preset = self.preset
        rule = WMV(preset.window, preset.patience)
        name = ", ".join(str(record[key]) for key in ("case", "provider", "density", "seed"))
        checkpoints = Checkpoints(self.masks / f"{name}, training", seconds=30, resume=True)
        untrained = sg.fitting.psnr(module(z).detach(), clean).item()
        fit = sg.fit(
            module, z, y, steps=record["steps_fit"], lr=record["lr"], clean=clean, every=preset.every,
            seed=record["seed"], stop=Watched(rule), checkpoints=checkpoints, progress=progress,
        )  # fmt: skip
        with torch.no_grad():
            last = fit.module(z)
        checkpoints.clear()
        checkpoints.folder.rmdir()
        # History holds the output before each step's update; the last output is a point of the curve too.
        psnr = [*fit.history["psnr"][:, 0].tolist(), sg.fitting.psnr(last, clean).item()]
        steps = [*fit.history.step, record["steps_fit"]]
        peak = max(range(len(psnr)), key=psnr.__getitem__)
        selected = int(rule.selected_step)
        return {
            "flop": sum(stage.flops_after for stage in module.plan.stages),
            "psnr_untrained": untrained,
            "psnr_last": psnr[-1],
            "psnr_wmv": sg.fitting.psnr(fit.image, clean).item() if selected >= 0 else None,
            "wmv_selected_step": selected,
            "wmv_stopped_at": int(rule.stopped_at) if rule.stopped_at >= 0 else None,
            "psnr_oracle_peak": psnr[peak],
            "oracle_peak_step": steps[peak],
            "oracle_peak_interval": preset.every,
            "psnr_steps": steps,
            "psnr_by_step": [round(value, 4) for value in psnr],
        }

    def find(self, method, net, z, y, density, seed, progress) -> tuple[sg.Mask, int]:
        """The mask, and what finding it takes off the training."""
        preset, options = self.preset, {}
        kind, _, how = method.partition("_")
        if how == "all":
            options["prunable"] = "all"
        if kind == "oes":
            options |= {"steps": preset.search_steps, "group": how or None, "plan": "rule"}
        elif kind == "imp":
            options |= {"steps": preset.search_steps // preset.rounds, "plan": "rule"}
            # Falling by one factor, as a fixed fraction would, to arrive in a round's last step at the density.
            options["schedule"] = [density ** (k / preset.rounds) for k in range(1, preset.rounds)] + [density]
            name = f"imp {fingerprint(z, y)[:16]}, {density}, {options['steps']} steps a round"
            options["checkpoints"] = Checkpoints(self.masks / name, resume=True)
        elif kind == "synflow":
            options["rounds"] = self.rounds()
        found = sg.masks.find(kind, net, z, y, density=density, seed=seed, progress=progress, **options)
        if kind == "imp":
            options["checkpoints"].clear()
            options["checkpoints"].folder.rmdir()
        searched = {"oes": preset.search_steps, "imp": preset.rounds * options.get("steps", 0)}
        return found.mask, searched.get(kind, options.get("rounds", _PASSES.get(method, 0)))

    def stored(self, method: str, name: str, density: float, seed: int, progress: Any) -> tuple[sg.Mask, int]:
        """The mask of a method that takes long, searched once and kept in a file, and the steps it took."""
        preset = self.preset
        title, passes = preset.case(name), preset.search_steps
        if method == "imp":
            title, passes = f"imp, {title}", preset.search_steps // preset.rounds * preset.rounds
        if method == "synflow":  # which looks at no image
            title, passes = f"synflow {preset.size}², depth {preset.depth}, {self.rounds()} rounds", self.rounds()
        file = self.masks / f"{title}, {density}, seed {seed}.safetensors"
        if not file.exists():
            z, y, _, net = self.problem(name, seed)
            self.masks.mkdir(parents=True, exist_ok=True)
            self.find(method, net, z, y, density, seed, progress)[0].save(file)
        return sg.Mask.load(file), passes

    def rounds(self) -> int:
        """Of SynFlow, no more than the steps of a search."""
        return min(_PASSES["synflow"], self.preset.search_steps)

    def other(self, name: str) -> str:
        names = self.preset.photographs
        return names[(names.index(name) + 1) % len(names)]


def main() -> None:
    def listed(kind):
        return lambda text: tuple(kind(word) for word in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="256², depth 6, 400 + 800 steps, 1 seed")
    parser.add_argument("--small", action="store_true", help="128², depth 5, 300 + 600 steps, 1 seed")
    parser.add_argument("--draw", action="store_true", help="only table and picture, from the results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--densities", type=listed(float), help="such as 0.02,0.05,0.1; default: 0.05")
    parser.add_argument("--seeds", type=listed(int), help="such as 0,1,2")
    parser.add_argument("--photographs", type=listed(str), help="of scikit-image; default: astronaut,coffee")
    parser.add_argument("--methods", type=listed(str), help=f"out of {','.join(METHODS)}")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("densities", "seeds", "photographs", "methods")}
    unknown = set(arguments.methods or ()) - set(METHODS)
    if unknown:
        parser.error(f"expected methods out of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    preset = SMALL if arguments.small else REDUCED if arguments.reduced else FULL
    preset = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(arguments.threads)
    comparison = Comparison(preset)
    if not arguments.draw:
        comparison.measure()
    cases = [preset.case(name) for name in preset.photographs]
    found = [record for record in comparison.records() if record["case"] in cases]
    pruning_report.draw(found, RESULTS.with_suffix(".png"))
    print(pruning_report.table(found))


if __name__ == "__main__":
    main()
