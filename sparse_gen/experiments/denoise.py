"""Restore one photograph: search a sparse mask at initialisation, then train what it keeps."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import sparse_gen as sg
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.unfinished import begin, check_same, claim, finish
from sparse_gen.files import write_json

if TYPE_CHECKING:
    import torch

    from sparse_gen.checkpoint import Checkpoints
    from sparse_gen.experiments.problem import Problem

PLANS = "plan.json"  # of both stages, see `stage_plans`
PICTURES = ("restored.png", "restored.tif", "noisy.png", "noisy.tif")  # of which a run writes one or two
FILES = (
    *PICTURES,
    "report.png",
    "metrics.json",
    "mask.safetensors",
    "config.yaml",
    PLANS,
)
# The first step of a loop also allocates, so it is not one of the timed ones.
_TIMED_STEPS = 4


class DisconnectedError(ValueError):
    """The mask found lets no signal through, so training could restore nothing."""


class StageProgress(Protocol):
    """Called with "search" or "fit", the step, the number of steps, and what was measured."""

    def __call__(self, stage: str, step: int, total: int, metrics: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Start:
    """What is known before the first step: enough to decide whether to wait.

    Attributes:
        config: the settings with nothing left open: device, threads, depth and image are resolved.
        precision: how float32 convolutions are multiplied, such as `"ieee"`.
        size: image height and width.
        kept, total: parameters.
        measured: values of the noisy image, C·H·W.
        seconds: estimated from a few real steps at real size; of a resumed run, what is left.
        resumed_at: the stage, "search" or "fit", and how many of its steps are done; None from the beginning.
    """

    config: DenoiseConfig
    precision: str
    size: tuple[int, int]
    kept: int
    total: int
    measured: int
    seconds: float
    resumed_at: tuple[str, int] | None = None


@dataclass(frozen=True)
class DenoiseResult:
    """The restored image, (1, C, H, W) in [0, 1], what was measured, and the files written."""

    image: torch.Tensor
    metrics: dict[str, Any]
    files: list[Path]


def denoise(
    config: DenoiseConfig,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    plans: str | os.PathLike[str] | None = None,
    checkpoints: Checkpoints | None = None,
    on_start: Callable[[Start], None] | None = None,
    progress: StageProgress | None = None,
) -> DenoiseResult:
    """Restore the photograph of `config` by OES, or with a stored mask, and write the results into a folder.

    Args:
        config: every setting; with `sigma` the photograph is taken as clean, and noise is added.
        output: a new or empty folder for `restored.png`, `noisy.png` (with `sigma`; both `.tif` where the photograph
            is one of floats), `report.png`, `metrics.json`, `mask.safetensors`, `config.yaml` and `plan.json`. They are
            written at the end, so an interrupted run leaves what was there.
        overwrite: allow a folder that holds files; those named above are replaced or removed.
        plans: the `plan.json` of a run with these settings, to do it again to the same bits; without it, how each
            convolution runs is measured, and the bits may differ from those of another session.
        checkpoints: must be of the folder `checkpoints` in `output`. The run's settings and state are stored there,
            it may resume from them, and the folder is removed once the results are written. None stores nothing.
        on_start: called once, before the search, when settings and time are known.
        progress: called along the search and the fit.

    Returns:
        `DenoiseResult`.

    Raises:
        ValueError: if the image, the device, the depth, the density or the mask does not do, or the memory, or if
            there is nothing to resume, or a run with other settings, or if the plans cannot run here.
        DisconnectedError: if the mask disconnects the network and `config.force` is not set.
        FloatingPointError: if a loss stops being finite; the step is named.
        OSError: if a file cannot be read or written.
        RunInterrupted: after `checkpoints.request_stop()`; the run is stored.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024), sections 3.1 and 3.2.
    """
    # Here and not above: the command line's help imports this module, but needs no torch.
    from sparse_gen.experiments.environment import precision_in_use, resolve_device, use_threads
    from sparse_gen.experiments.images import read_image
    from sparse_gen.experiments.memory import check_memory
    from sparse_gen.experiments.problem import (
        check_density,
        check_same_image,
        choose_depth,
        make_rule,
        network_settings,
        pose,
        selected_step,
    )
    from sparse_gen.experiments.stage_plans import read_plans
    from sparse_gen.experiments.stages import last_output, psnr_curve, search, train
    from sparse_gen.experiments.stored_mask import digest, stored_mask

    device = resolve_device(config.device)
    given = {} if plans is None else read_plans(plans, device)
    searches = config.mask is None
    photograph = read_image(config.image, lambda shape: check_memory(config, shape, device, search=searches))
    check_same_image(config, photograph)
    image = photograph.pixels.to(device)
    size = tuple(image.shape[-2:])
    depth = choose_depth(config, size)

    with use_threads(config.threads) as threads:
        config = config.replace(
            image=str(photograph.path.resolve()),
            image_sha256=photograph.sha256,
            device=str(device),
            threads=threads,
            depth=depth,
        )

        problem = pose(config, image)
        config = config.replace(**network_settings(problem.net))
        stored = None if searches else stored_mask(problem, config)
        if stored is None:
            check_density(config, problem.net)
        else:
            path = Path(config.mask).resolve()
            config = config.replace(mask=str(path), mask_sha256=digest(path), density=stored.mask.density)
        _check_image_survives(photograph.path, Path(output))
        folder = claim(Path(output), overwrite, checkpoints)
        resumed_at = None
        if checkpoints is not None and checkpoints.resume:
            check_same(config, folder)
            resumed_at = checkpoints.newest()

        total = sum(parameter.numel() for parameter in problem.net.parameters())
        start = Start(
            config=config,
            precision=precision_in_use(device),
            size=size,
            kept=math.floor(config.density * total) if stored is None else stored.mask.kept,
            total=total,
            measured=image.numel(),
            seconds=_estimate_seconds(problem, config, resumed_at, stored),
            resumed_at=resumed_at,
        )
        if on_start is not None:
            on_start(start)
        if checkpoints is not None:
            begin(config, checkpoints)

        clock = time.perf_counter()
        found = stored or search(problem, config, plan=given.get("search"), checkpoints=checkpoints, progress=progress)
        seconds_search = time.perf_counter() - clock + _seconds_before(checkpoints, "search")
        check_connected(found, config)
        untrained = sg.masked_output(problem.net, problem.z, found.mask)

        clock = time.perf_counter()
        rule = make_rule(config)
        run = train(
            problem, found.mask, config, rule=rule, plan=given.get("fit"), checkpoints=checkpoints, progress=progress
        )
        seconds_fit = time.perf_counter() - clock + _seconds_before(checkpoints, "fit")

        curve = None
        if problem.clean is not None:
            curve = psnr_curve(run, last_output(run, problem.z), problem.clean, config.steps)
        selected = selected_step(rule)
        metrics = _quality(problem, untrained, run.image, curve, selected, config) | {
            "stop": config.stop,
            "stop_selected_step": selected,
            "stopped_at": run.stopped_at,
            "seconds_search": round(seconds_search, 3),
            "seconds_fit": round(seconds_fit, 3),
            "connected": bool(found.connected),
            "kept": found.mask.kept,
            "total": found.mask.total,
        }
        metrics |= _provenance(start)
        files = _write(folder, photograph, problem, untrained, found, run, curve, config, metrics)
        if checkpoints is not None:
            finish(checkpoints)
    return DenoiseResult(run.image, metrics, files)


def _check_image_survives(image: Path, folder: Path) -> None:
    if image.resolve() in [(folder / name).resolve() for name in FILES]:
        raise ValueError(f"output: expected a folder whose results leave {image} alone, got {folder}, name another")


def check_connected(found, config: DenoiseConfig) -> None:
    """Raise DisconnectedError if the mask disconnects the network and `config.force` is not set."""
    if not found.connected and not config.force:
        advice = "raise search_steps or density" if config.mask is None else "name another"
        raise DisconnectedError(
            f"mask: expected one that lets a signal through, got one that stops it at "
            f"{found.disconnected_at}, {advice}, or train on with force"
        )


def _seconds_before(checkpoints: Checkpoints | None, stage: str) -> float:
    return 0.0 if checkpoints is None else checkpoints.seconds_before(stage)


def _estimate_seconds(
    problem: Problem, config: DenoiseConfig, done: tuple[str, int] | None, stored: sg.SearchResult | None
) -> float:
    """What the run will take, from a few real steps of the search and of the fit.

    The fastest of them counts: what else the machine does only ever adds to a step.
    """
    from sparse_gen.experiments.stages import search, train

    times: dict[str, list[float]] = {"search": [], "fit": []}

    def note(stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
        times[stage].append(time.perf_counter())

    short = config.replace(search_steps=_TIMED_STEPS, steps=_TIMED_STEPS, every=1, rings=None, force=False)
    mask = (stored or search(problem, short, progress=note)).mask
    # The mask of a few steps is not the run's: what is measured of it would serve nobody.
    train(dataclasses.replace(problem, clean=None), mask, short, plan="rule", progress=note)
    left = {"search": config.search_steps, "fit": config.steps}
    if done is not None:
        stage, steps = done
        left[stage] -= steps
        if stage == "fit":
            left["search"] = 0
    return sum(left[stage] * min(after - before for before, after in pairwise(t)) for stage, t in times.items() if t)


def _quality(
    problem: Problem, untrained, restored, curve, selected: int | None, config: DenoiseConfig
) -> dict[str, Any]:
    """The values that need the clean image; each is None without it."""
    names = ("psnr_noisy", "psnr_masked_untrained", "psnr", "psnr_last", "psnr_stopped", "psnr_oracle_peak", "ssim")
    values: dict[str, Any] = dict.fromkeys(names)
    values |= {"psnr_oracle_peak_step": None, "psnr_oracle_peak_every": config.every}
    clean = problem.clean
    if clean is None:
        return values
    steps, psnr = curve
    values["psnr_noisy"] = sg.fitting.psnr(problem.noisy, clean).item()
    values["psnr_masked_untrained"] = sg.fitting.psnr(untrained, clean).item()
    values["psnr"] = sg.fitting.psnr(restored, clean).item()
    values["psnr_last"] = psnr[-1]
    values["psnr_stopped"] = values["psnr"] if selected is not None else None
    values["psnr_oracle_peak"] = max(psnr)
    values["psnr_oracle_peak_step"] = steps[psnr.index(max(psnr))]
    values["ssim"] = sg.fitting.ssim(restored, clean).item()
    # The PSNR of two equal images is infinite, for which JSON has no word.
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


def _provenance(start: Start) -> dict[str, Any]:
    from sparse_gen.experiments.environment import versions

    config = start.config
    return {
        "search_steps": config.search_steps if config.mask is None else 0,
        "mask": config.mask,
        "mask_sha256": config.mask_sha256,
        "steps": config.steps,
        "seed": config.seed,
        "device": config.device,
        "precision": start.precision,
        "threads": config.threads,
        "instruction_set": sg.ops.extension.status().instruction_set,
        "generator": config.generator,
        "depth": config.depth,
        "image": config.image,
        "image_height": start.size[0],
        "image_width": start.size[1],
        "image_sha256": config.image_sha256,
        "versions": versions(),
    }


def _write(folder: Path, photograph, problem, untrained, found, run, curve, config, metrics) -> list[Path]:
    from sparse_gen.experiments.images import write_image
    from sparse_gen.experiments.report import Report, draw_report
    from sparse_gen.experiments.stage_plans import write_plans

    pictures = {f"restored{photograph.suffix}": run.image}
    if config.sigma is not None:
        pictures[f"noisy{photograph.suffix}"] = problem.noisy
    for name, pixels in pictures.items():
        write_image(folder / name, pixels, like=photograph)
    found.mask.save(folder / "mask.safetensors")
    config.save(folder / "config.yaml")
    write_plans(folder / PLANS, found.plan, run.module.plan)
    write_json(folder / "metrics.json", metrics)
    report = Report(
        title=_title(photograph.path.name, config, metrics),
        noisy=problem.noisy,
        untrained=untrained,
        restored=run.image,
        clean=problem.clean,
        search=found.history,
        fit=run.history,
        psnr=curve,
        every=config.every,
        mask=found.mask,
        stopped=_stopped(config, metrics),
    )
    draw_report(report, folder / "report.png")
    stale = [name for name in PICTURES if name not in pictures]
    for name in stale:
        (folder / name).unlink(missing_ok=True)  # of an earlier run, if any
    return [folder / name for name in FILES if name not in stale]


def _stopped(config: DenoiseConfig, metrics: dict[str, Any]) -> tuple[str, int, float] | None:
    if metrics["psnr_stopped"] is None:
        return None
    return config.stop.upper(), metrics["stop_selected_step"], metrics["psnr_stopped"]


def _title(name: str, config: DenoiseConfig, metrics: dict[str, Any]) -> str:
    name = "".join(character if character.isprintable() else "?" for character in name)
    name = name if len(name) <= 40 else f"{name[:18]}…{name[-18:]}"
    noise = "" if config.sigma is None else f", σ = {config.sigma:.3g}"
    network = "" if config.generator == "hourglass" else f"{config.generator}, "
    found = f"{config.search_steps} search" if config.mask is None else "stored mask"
    stop = "" if config.stop == "none" else f" at most, {config.stop.upper()}"
    return (
        f"{name}, {metrics['image_width']} × {metrics['image_height']}{noise}, "
        f"{network}density {metrics['kept'] / metrics['total']:.3g}, depth {config.depth}, "
        f"{found} + {config.steps} training steps{stop}, seed {config.seed}"
    )
