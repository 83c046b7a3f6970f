"""Which constants let the mask search settle in few steps: candidates against the paper's constants and 60,000 steps.

    python bench/search_study.py             # 256², depth 6, three photographs, three seeds: days on a CPU
    python bench/search_study.py --reduced   # 128², depth 5, two photographs, two seeds: hours with one thread
    python bench/search_study.py --tiny      # 64², depth 4, two photographs, one seed, the paper's 60,000 steps as well
    python bench/search_study.py --draw      # table and picture only

Every setting is tried on the first photograph with one seed; `FINALISTS` then go over all seeds and photographs, so
that the others judge what was tuned on the first. The paper's search runs on the second. A mask is as good as what
training of what it keeps restores (Adam 1e-2, equal steps): last, mean of the last 200 steps, stopped by WMV, oracle
peak. Finished runs are kept in bench/results/search_study-cpu.json, and are not done again. The paper's search goes on
from its last checkpoint in build/search_study, and what it has reached is judged by `--only paper --stored`.
"""

from __future__ import annotations

import argparse
import datetime
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
import search_report
import torch
from quality import Watched, photograph
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save
from search_trials import Exchanges, Snapshots, trial

import sparse_gen as sg
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.stack import initial_weights
from sparse_gen.files import atomic_write
from sparse_gen.fitting.stop import WMV
from sparse_gen.masks.connectivity import probe_connectivity
from sparse_gen.masks.search import PRESETS, make_mask
from sparse_gen.masks.selection import kept_count, prunable_layout, top_k
from sparse_gen.ops.philox import seed_tensor

RESULTS = Path(__file__).parent / "results" / "search_study-cpu.json"
BUILD = Path(__file__).parents[1] / "build" / "search_study"
LR, SIGMA, DENSITY, EVERY, WINDOW, PATIENCE = 1e-2, 0.1, 0.05, 10, 100, 400
PAPER, PAPER_CONV = "paper", "paper_conv"
_PAPERS = {PAPER: {}, PAPER_CONV: {"prunable": "conv_weights"}}
# What differs from lr 5e-2, λ 1e-7, convolution weights alone, temperature 0.2, logits from 0, one sample a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {},
    "lr2e-2": {"lr": 2e-2},
    "lr.1": {"lr": 0.1},
    "kl1e-8": {"kl_weight": 1e-8},
    "kl1e-6": {"kl_weight": 1e-6},
    "ramp1e-6": {"kl_weight": 1e-6, "kl_ramp": 1.0},
    "all": {"prunable": "all"},
    "prior": {"initial_logit": -2.944},
    "init1": {"initial_logit": 1.0},
    "tau.5": {"temperature": 0.5},
    "tau1": {"temperature": 1.0},
    "tau1-.2": {"temperature": 1.0, "final_temperature": 0.2},
    "mf.5": {"mean_field": 0.5},
    "mf1": {"mean_field": 1.0},
    "anti": {"antithetic": True},
    "x4": {"samples": 4, "lr": 0.1},
    "decay": {"decay": True},
}
# λ so small that in 2,000 steps it draws the logits as far as the paper's in 60,000 (6e-9: λ · lr · steps is the same),
# and densities at which convolution weights alone leave as few weights that reach the image.
REACHING: dict[str, dict[str, Any]] = {
    "kl1e-8": {"kl_weight": 1e-8},
    "all6e-9": {"kl_weight": 6e-9, "prunable": "all"},
    "all6e-9lr.1": {"kl_weight": 6e-9, "lr": 0.1, "prunable": "all"},
    "all1e-8": {"kl_weight": 1e-8, "prunable": "all"},
    "d.01": {"density": 0.01},
    "d.02": {"density": 0.02},
    "kl1e-8d.01": {"kl_weight": 1e-8, "density": 0.01},
    "kl1e-8d.02": {"kl_weight": 1e-8, "density": 0.02},
}
# Those that were not behind the default where all were tried.
FINALISTS = ("quick", "anti", "lr.1", "decay")


@dataclass(frozen=True)
class Preset:
    """What all settings share.

    Attributes:
        name: stands in every record.
        size, channels: of the square image, and of the hourglass, outermost first.
        tried_steps: of every setting's search on the first photograph, in passes over the network; 0 to leave it out.
        judged_at: after how many steps, rising, a finalist's search is judged, on all photographs.
        short_at: the default is also judged after these, of a search of their own.
        fit_steps: of the training after it.
        paper_at: after how many steps the paper's search on the second photograph is judged.
        papers_everywhere: whether it runs on all photographs.
        photographs: the first to tune on, the others to judge.
    """

    name: str
    size: int
    channels: tuple[int, ...]
    tried_steps: int = 1000
    judged_at: tuple[int, ...] = (500, 1000, 2000)
    finalists: tuple[str, ...] = FINALISTS
    short_at: tuple[int, ...] = ()
    fit_steps: int = 1000
    paper_at: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 16_000, 24_000, 32_000, 40_000, 50_000, 60_000)
    papers: tuple[str, ...] = (PAPER, PAPER_CONV)
    papers_everywhere: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    photographs: tuple[str, ...] = ("astronaut", "coffee", "chelsea")

    def case(self, name: str) -> str:
        return f"{name} {self.size}², channels {'-'.join(map(str, self.channels))}, sigma {SIGMA}"

    def jobs(self) -> list[tuple[str, str, int, int]]:
        """(photograph, setting, steps, seed)."""
        first = self.photographs[0]
        searched = self.photographs if self.papers_everywhere else self.photographs[1:2]
        tried = [(first, s, self.tried_steps, self.seeds[0]) for s in SETTINGS if self.tried_steps]
        pairs = [(n, seed) for seed in self.seeds for n in self.photographs]
        judged = [(n, s, self.judged_at[-1], seed) for n, seed in pairs for s in self.finalists]
        short = [(n, "quick", steps, seed) for n, seed in pairs for steps in self.short_at[-1:]]
        papers = [(n, paper, self.paper_at[-1], self.seeds[0]) for n in searched for paper in self.papers]
        return [*tried, *judged, *short, *papers]


FULL = Preset("full", 256, (16, 32, 64, 128, 128, 128), fit_steps=1500)
# Half as wide it keeps half a weight a measured value, where the noise is hardly fitted; as wide as above it keeps two.
NARROW = Preset(
    "reduced", 128, (8, 16, 32, 64, 64), judged_at=(1000,), short_at=(300, 500), fit_steps=1500, papers=(),
    seeds=(0, 1), photographs=("astronaut", "coffee"),
)  # fmt: skip
REDUCED = Preset(
    "reduced", 128, (16, 32, 64, 128, 128), finalists=("quick",), papers=(PAPER,), seeds=(0, 1),
    photographs=("astronaut", "coffee"),
)  # fmt: skip

TINY = Preset(
    "reduced", 64, (12, 24, 48, 96), tried_steps=0, judged_at=(1000, 2000), finalists=("quick", *REACHING),
    fit_steps=1500, papers=(PAPER,), papers_everywhere=True, seeds=(0,), photographs=("astronaut", "coffee"),
)  # fmt: skip


class Study:
    """Runs a preset's settings and keeps their records."""

    def __init__(self, preset: Preset, results: Path = RESULTS, build: Path = BUILD):
        self.preset, self.results, self.build = preset, results, build

    def records(self) -> list[dict]:
        return records.load(self.results)

    def todo(self, only: tuple[str, ...] = ()) -> list[tuple[str, str, int, int]]:
        """The jobs whose last record is missing."""
        done = {(r["case"], r["provider"], r["steps_search"], r["seed"]) for r in self.records()}
        jobs = [job for job in dict.fromkeys(self.preset.jobs()) if not only or job[1] in only]
        return [(name, *job) for name, *job in jobs if (self.preset.case(name), *job) not in done]

    def measure(self, only: tuple[str, ...] = (), *, stored: bool = False) -> None:
        todo = self.todo(only)
        with Progress(console=Console(stderr=True)) as bars:
            runs, steps = bars.add_task("runs", total=len(todo)), bars.add_task("steps")
            for job in todo:
                bars.update(steps, description=" ".join(map(str, job[:2])), completed=0)
                show = lambda step, total, _: bars.update(steps, completed=step, total=total)  # noqa: E731
                for record in self.run(*job, stored=stored, progress=show):
                    self.keep(record)
                bars.advance(runs)

    def keep(self, record: dict) -> None:
        def place(r: dict) -> tuple:
            order = [*SETTINGS, *REACHING, *_PAPERS]
            return r["case"], order.index(r["provider"]), r["steps_search"], r["seed"]

        records.add(self.results, record, place)

    def problem(self, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Module]:
        """z, y, clean, network: nothing of it depends on the setting."""
        clean = photograph(name, self.preset.size)
        y = sg.inverse.add_noise(clean, SIGMA, seed=seed)
        z = sg.noise_input(32, clean.shape[-2:], seed=seed)
        return z, y, clean, sg.generators.Hourglass(channels=self.preset.channels, seed=seed)

    def run(
        self, name: str, setting: str, steps: int, seed: int, *, stored: bool = False, progress: Any = None
    ) -> Iterator[dict]:
        """A record for each number of steps after which the mask of one search is judged."""
        z, y, clean, net = self.problem(name, seed)
        shares: list[float] = []
        if setting in _PAPERS:
            options = {**PRESETS["paper"], **_PAPERS[setting]}
            del options["steps"]
            found, samples = self.paper(name, setting, steps, seed, options, stored, progress), 1
        else:
            options = {"lr": 5e-2, "kl_weight": 1e-7, "prunable": "conv_weights"}
            options |= {"density": DENSITY} | {**SETTINGS, **REACHING}[setting]
            samples = options.get("samples", 1)
            # As many passes over the network whatever a step takes.
            rule, count = Exchanges(), steps // samples
            series = [at for at in (self.preset.judged_at, self.preset.short_at) if steps in at[-1:]]
            at = [number // samples for number in sum(series, ())]
            found = trial(
                net, z, y, steps=count, at=at, seed=seed, rule=rule, progress=progress, **options,
            )  # fmt: skip
            shares = rule.shares
        for done, logits in found:
            mask = self.mask(net, logits, options["prunable"], seed, options.get("density", DENSITY))
            yield {
                "suite": "search_study", "case": self.preset.case(name), "preset": self.preset.name,
                "provider": setting, "options": options, "seed": seed, "steps_search": done * samples,
                "steps_fit": self.preset.fit_steps, "lr_fit": LR, "density": mask.density,
                "exchanged": list(shares), "psnr_noisy": sg.fitting.psnr(y, clean).item(),
                **self.judge(net, mask, z, y, clean, seed),
                "threads": torch.get_num_threads(), "device": "cpu", "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }  # fmt: skip

    def paper(self, name, setting, steps, seed, options, stored, progress) -> Iterator[tuple[int, torch.Tensor]]:
        """The logits that `search_mask` reaches; with `stored` those that an unfinished search has left."""
        z, y, _, net = self.problem(name, seed)
        self.build.mkdir(parents=True, exist_ok=True)
        stem = f"{self.preset.case(name)}, {setting}, seed {seed}"
        file = lambda done: self.build / f"{stem}, {done} steps.safetensors"  # noqa: E731
        wanted = [done for done in self.preset.paper_at if done <= steps]

        def store(done: int, logits: torch.Tensor) -> None:
            with atomic_write(file(done)) as stream:
                stream.write(save({"logits": logits.contiguous()}))

        if not stored and not file(wanted[-1]).exists():
            checkpoints = sg.Checkpoints(self.build / f"run {stem}", seconds=120, resume=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sg.DisconnectedMaskWarning)
                sg.search_mask(
                    net, z, y, **options, density=DENSITY, steps=steps, seed=seed, plan="rule", every=100,
                    stop=Snapshots(wanted, store), checkpoints=checkpoints, progress=progress,
                )  # fmt: skip
        for done in wanted:
            if file(done).exists():
                yield done, load_file(file(done))["logits"]

    def mask(self, net: torch.nn.Module, logits: torch.Tensor, prunable: str, seed: int, density: float) -> sg.Mask:
        network = training_copy(net)
        layout = prunable_layout(network, prunable)
        whole = ParameterLayout.of(network, [n for n, _ in network.named_parameters() if n not in layout.shapes])
        weight, kept_whole = initial_weights(net, layout), initial_weights(net, whole)
        count = kept_count(density, layout.numel + whole.numel, whole.numel)
        keep = top_k(logits, count, seed_tensor(seed))
        return make_mask(layout, whole, keep, weight[0], whole.views(kept_whole), {})

    def judge(self, net, mask: sg.Mask, z, y, clean, seed: int) -> dict:
        found = probe_connectivity(training_copy(net), mask.dense_weights(net), z)
        record = {
            "disconnected_at": found.disconnected_at,
            "layer_density": {n: round(kept / total, 5) for n, shape, kept, total in mask.layers() if len(shape) == 4},
        }
        # A constant image cannot be trained.
        if found.disconnected_at is not None:
            return record
        # The fixed rule for every layer: a measurement would differ from run to run, and be disturbed by others.
        module = sg.compile(net, mask, z, weights="mask", plan="rule")
        stages = [stage for stage in module.plan.stages if stage.kept]
        record["live_kept"] = sum(stage.live_kept for stage in stages)
        record["live_channels"] = {stage.name: stage.live_out for stage in stages}
        record["psnr_untrained"] = sg.fitting.psnr(module(z).detach(), clean).item()
        stop = Watched(WMV(WINDOW, PATIENCE))
        fit = sg.fit(module, z, y, steps=self.preset.fit_steps, lr=LR, clean=clean, every=EVERY, seed=seed, stop=stop)
        with torch.no_grad():
            last = sg.fitting.psnr(fit.module(z), clean).item()
        psnr = fit.history["psnr"][:, 0]
        return record | {
            "psnr_last": last,
            "psnr_tail": psnr[-200 // EVERY :].mean().item(),
            "psnr_wmv": sg.fitting.psnr(fit.image, clean).item(),
            "psnr_oracle_peak": psnr.max().item(),
            "oracle_peak_step": fit.history.step[int(psnr.argmax())],
            "oracle_peak_interval": EVERY,
            "psnr_by_step": [round(value, 3) for value in psnr.tolist()],
        }


def main() -> None:
    known = {**SETTINGS, **REACHING, **_PAPERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="128², depth 5, two photographs, two seeds")
    parser.add_argument("--tiny", action="store_true", help="64², depth 4, two photographs, one seed")
    parser.add_argument("--draw", action="store_true", help="only table and picture, from the results")
    parser.add_argument("--stored", action="store_true", help="judge what a paper's search has reached, no more steps")
    parser.add_argument("--only", default="", help=f"settings out of {','.join(known)}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    only = tuple(arguments.only.split(",")) if arguments.only else ()
    unknown = set(only) - known.keys()
    if unknown:
        parser.error(f"expected settings out of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    presets = (NARROW, REDUCED) if arguments.reduced else (TINY,) if arguments.tiny else (FULL,)
    studies = [Study(preset) for preset in presets]
    if not arguments.draw:
        for study in studies:
            study.measure(only, stored=arguments.stored)
    found = studies[0].records()
    search_report.draw(found, RESULTS.with_suffix(".png"))
    print(search_report.table(found))


if __name__ == "__main__":
    main()
