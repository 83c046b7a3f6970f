"""Fitting a generator to one image (or to one an experiment)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sparse_gen.analysis.rings import ring_energies
from sparse_gen.checkpoint import Checkpoints, fingerprint
from sparse_gen.engine.checks import (
    check_count,
    check_image,
    check_input,
    check_measurement,
    check_output,
    check_pixel_weight,
    check_positive,
)
from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.engine.functional import squared_errors
from sparse_gen.fitting.metrics import psnr
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.history import History
from sparse_gen.ops.philox import Stream, normal, seed_tensor

Progress = Callable[[int, int, dict[str, float]], None]


class Stop(Protocol):
    """A stopping rule that needs no clean image.

    Those of `sparse_gen.stop` also stop each experiment on its own, and can be stored in a checkpoint.
    """

    def update(self, step: int, image: torch.Tensor) -> bool:
        """Take the output of a step, (E, C, H, W), and say whether to stop."""

    @property
    def image(self) -> torch.Tensor:
        """The output that the rule selects."""


@dataclass
class FitResult:
    """What a fit gave.

    Attributes:
        image: the output after the last step, its running average, or what the stopping rule selected; (E, C, H, W).
        history: columns "loss", "psnr" with a clean image, and one for each option that is on.
        stopped_at: after how many steps the rule stopped, None if it did not; a list where there are experiments.
        module: the module that was trained.
    """

    image: torch.Tensor
    history: History
    stopped_at: int | list[int | None] | None
    module: nn.Module


def fit(
    module: nn.Module,
    z: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int = 1500,
    lr: float = 1e-2,
    clean: torch.Tensor | None = None,
    pixel_weight: torch.Tensor | None = None,
    stop: Stop | None = None,
    average: float | None = None,
    input_jitter: float = 0.0,
    tv_weight: float = 0.0,
    langevin: float = 0.0,
    rings: int | None = None,
    seed: int | Sequence[int] = 0,
    every: int = 10,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train a generator's parameters with Adam until its output fits y.

    Args:
        module: what `sg.compile` returned, or any module; it is trained in place.
        z: its input, (E, C, H, W); a plain module takes one experiment.
        y: the measurement, (E, C, H, W) in [0, 1].
        steps: how many at most.
        lr: Adam's learning rate; the papers take 1e-2 for masked networks and 1e-3 for whole ones.
        clean: the clean image, for the PSNR in the history only.
        pixel_weight: w of the loss (1/N) Σ w·(x − y)² over an image's N values, from 0 on, of a shape that broadcasts
            to y's; with 0 where nothing was measured and 1 elsewhere, the fit inpaints.
        stop: a stopping rule, asked after every step; it selects the image.
        average: decay of a running average of the outputs, such as 0.99, which is then the image.
        input_jitter: standard deviation of fresh Gaussian noise added to z at every step; DIP takes 1/30.
        tv_weight: weight of the output's total variation (mean absolute difference of neighbours).
        langevin: noise added to every kernel weight after a step, in units of lr; the SGLD comparison takes 0.5.
        rings: record the energy of the output's (and, with `clean`, its error's) spectrum in so many rings.
        seed: of jitter and Langevin noise, or one an experiment.
        every: record the history (and report progress) every so many steps.
        checkpoints: where to store the run's state and whether to resume from it.
        progress: called with (step, steps, latest values).

    Returns:
        `FitResult`. The loss at step t is that of the output before the t-th update.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or the checkpoint is of another run.
        FloatingPointError: the loss is not finite; the message names the step. Checkpoints stay at finite ones.
        RunInterrupted: `checkpoints.request_stop()` was called.

    Ulyanov et al., "Deep image prior" (CVPR 2018), eq. 2; Ghosh et al., ICML 2024, section 3.2; Cheng et al., "A
    Bayesian perspective on the deep image prior" (CVPR 2019) for the Langevin noise.
    """
    _check(module, z, y, clean, pixel_weight, steps, every, lr, average, input_jitter, tv_weight, langevin, rings)
    compiled = isinstance(module, CompiledGenerator)
    # oneDNN and cuDNN convolve without reordering where the channels come last.
    z = z.contiguous(memory_format=module.memory_format if compiled else torch.channels_last)
    seeds = seed_tensor(seed, z.device)
    optimiser = Optimiser(module, lr, langevin, seeds)
    history, mean_output, stopped_at = History(), None, None
    first_bad = torch.tensor(-1, device=z.device)

    settings = {
        "steps": steps, "lr": lr, "average": average, "input_jitter": input_jitter, "tv_weight": tv_weight,
        "langevin": langevin, "rings": rings, "every": every, "seed": seeds.tolist(), "stop": _describe(stop),
    }  # fmt: skip
    start, over = 0, False
    if checkpoints is not None:
        if stop is not None and not hasattr(stop, "state"):
            raise ValueError(f"expected a rule of sparse_gen.stop beside checkpoints, got {type(stop).__name__}")
        # Another plan adds up in another order.
        settings["plan"] = module.plan.layouts if compiled else None
        inputs = [z, y, *module.parameters(), *(given for given in (clean, pixel_weight) if given is not None)]
        settings["inputs"] = fingerprint(*inputs)
        restored = checkpoints.load("fit", settings)
        if restored is not None:
            start, state, history = restored
            optimiser.restore(state)
            mean_output = state["average"].to(z.device) if "average" in state else None
            if stop is not None:
                stop.restore(_only(state, "stop/"), z.device)
                over = stop.over

    def state() -> dict[str, torch.Tensor]:
        stored = optimiser.state()
        if mean_output is not None:
            stored["average"] = mean_output
        if stop is not None:
            stored |= {f"stop/{name}": tensor for name, tensor in stop.state().items()}
        return stored

    for step in range(start, start if over else steps):
        output = module(_jittered(z, input_jitter, seeds, step) if input_jitter else z)
        if step == start:
            check_output(output, y)
        loss = squared_errors(output, y) if pixel_weight is None else weighted_errors(output, y, pixel_weight)
        variation = total_variation(output) if tv_weight else None
        optimiser.step((loss if variation is None else loss + tv_weight * variation).sum(), step)

        output = output.detach()
        if average is not None:
            mean_output = output if mean_output is None else torch.lerp(output, mean_output, average)
        first_bad = torch.where((first_bad < 0) & ~loss.isfinite().all(), step, first_bad)
        if step % every == 0 or step == steps - 1:
            _check_finite(first_bad, lr, checkpoints)
            _record(history, step, output, loss, clean, mean_output, variation, rings)
            if progress is not None:
                progress(step + 1, steps, history.last())
        over = stop is not None and stop.update(step, output)
        if checkpoints is not None and first_bad < 0:
            checkpoints.store("fit", settings, step + 1, state, history, last=over or step == steps - 1)
        if over:
            stopped_at = step + 1
            break

    with torch.no_grad():
        image = module(z) if mean_output is None else mean_output
    if stop is not None:
        image = stop.image
    if hasattr(stop, "stopped_after"):
        stopped_at = stop.stopped_after()
    return FitResult(image, history, stopped_at, module)


def weighted_errors(output: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1/N) Σ w·(x − y)² of each image, (E,), from (E, C, H, W) and a weight that broadcasts to it."""
    return (weight * (output - y).square()).mean(dim=(1, 2, 3))


def total_variation(image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours: (E, C, H, W) to (E,)."""
    rows = (image[..., 1:, :] - image[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return rows + (image[..., 1:] - image[..., :-1]).abs().mean(dim=(1, 2, 3))


def _check(
    module, z, y, clean, pixel_weight, steps, every, lr, average, input_jitter, tv_weight, langevin, rings
) -> None:
    check_input(z)
    check_measurement(y, z)
    if clean is not None:
        check_image(clean, z, "clean")
    if pixel_weight is not None:
        check_pixel_weight(pixel_weight, y)
    check_count(steps, "steps")
    check_count(every, "every")
    check_positive(lr, "lr")
    if average is not None and not 0 < average < 1:
        raise ValueError(f"expected average between 0 and 1, got {average!r}")
    for name, value in {"input_jitter": input_jitter, "tv_weight": tv_weight, "langevin": langevin}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"expected {name} from 0 on, got {value!r}")
    if rings is not None:
        check_count(rings, "rings")
    experiments = max(len(z), len(y))
    if not isinstance(module, CompiledGenerator) and experiments > 1:
        raise ValueError(
            f"expected one experiment for a plain module, whose normalisation would mix them, got {experiments}, "
            "use sg.compile(module, example_input=z)"
        )


def _jittered(z: torch.Tensor, deviation: float, seeds: torch.Tensor, step: int) -> torch.Tensor:
    numbers = normal(seeds, step, Stream.JITTER, z[0].numel()).view(-1, *z.shape[1:])
    return z + deviation * numbers.to(z.dtype)


def _check_finite(first_bad: torch.Tensor, lr: float, checkpoints: Checkpoints | None) -> None:
    if first_bad >= 0:
        kept = "" if checkpoints is None else f", the state before it is in {checkpoints.folder}"
        raise FloatingPointError(f"expected a finite loss, got none at step {int(first_bad)}, lower lr ({lr}){kept}")


def _record(history: History, step, output, loss, clean, mean_output, variation, rings) -> None:
    values: dict[str, torch.Tensor] = {"loss": loss}
    if clean is not None:
        values["psnr"] = psnr(output, clean)
        if mean_output is not None:
            values["psnr_average"] = psnr(mean_output, clean)
    if variation is not None:
        values["total_variation"] = variation
    if rings is not None:
        values["ring_energy"] = ring_energies(output, rings)
        if clean is not None:
            values["ring_error"] = ring_energies(output - clean, rings)
    history.record(step, **values)


def _describe(stop: Stop | None) -> dict[str, Any] | None:
    if stop is None:
        return None
    plain = {name: value for name, value in vars(stop).items() if isinstance(value, (int, float, str))}
    return {"rule": type(stop).__name__, **plain}


def _only(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
