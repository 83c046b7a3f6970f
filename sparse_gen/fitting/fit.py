"""Fitting a generator to one image (or to one an experiment)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sparse_gen.analysis.rings import ring_energies
from sparse_gen.checkpoint import Checkpoints, fingerprint
from sparse_gen.engine.capture import StepRunner, capturer
from sparse_gen.engine.checks import (
    check_count,
    check_image,
    check_input,
    check_measurement,
    check_pixel_weight,
    check_positive,
)
from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.engine.measure import machine
from sparse_gen.engine.readback import Readback, Values, reporter
from sparse_gen.fitting.metrics import psnr
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.fitting.step import FitStep
from sparse_gen.history import History
from sparse_gen.ops.philox import seed_tensor

Progress = Callable[[int, int, dict[str, float]], None]

_ASK_EVERY = 16  # steps between two looks at whether the rule has ended a fit on a GPU


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
    z = z.detach().contiguous(memory_format=module.memory_format if compiled else torch.channels_last)
    seeds = seed_tensor(seed, z.device)
    optimiser = Optimiser(module, lr, langevin, seeds)
    history, mean_output, stopped_at = History(), None, None

    settings = {
        "steps": steps, "lr": lr, "average": average, "input_jitter": input_jitter, "tv_weight": tv_weight,
        "langevin": langevin, "rings": rings, "every": every, "seed": seeds.tolist(), "stop": _describe(stop),
    }  # fmt: skip
    start, over = 0, False
    if checkpoints is not None:
        if stop is not None and not hasattr(stop, "state"):
            raise ValueError(f"expected a rule of sparse_gen.stop beside checkpoints, got {type(stop).__name__}")
        # Another plan adds up in another order.
        settings |= {"plan": module.plan.layouts if compiled else None, "gpu": machine(z.device).get("gpu")}
        inputs = [z, y, *module.parameters(), *(given for given in (clean, pixel_weight) if given is not None)]
        settings["inputs"] = fingerprint(*inputs)
        restored = checkpoints.load("fit", settings)
        if restored is not None:
            start, state, history = restored
            optimiser.restore(state)
            mean_output = state["average"].to(z.device, copy=True) if "average" in state else None
            if stop is not None:
                stop.restore(_only(state, "stop/"), z.device)
                over = stop.over

    # Where steps are captured the host runs ahead, hears of the rule's end some steps later and goes back to it. Of a
    # plain module that would copy every parameter at every step, and the wait is short beside such a step.
    capture = capturer(z.device)
    rule = stop if hasattr(stop, "advance") else None
    obeyed = hasattr(rule, "ended")
    late = capture is not None and (compiled or not obeyed)
    body = FitStep(
        module, z, y, optimiser, seeds, start=start, rule=rule, average=average, input_jitter=input_jitter,
        tv_weight=tv_weight, pixel_weight=pixel_weight, mean_output=mean_output, keep_last=late and obeyed,
    )  # fmt: skip
    run_step, rows, ends = StepRunner(body, capture), Readback(late), Readback(late)
    kept = "" if checkpoints is None else f", the state before it is in {checkpoints.folder}"

    def state() -> dict[str, torch.Tensor]:
        stored = optimiser.state()
        if body.mean_output is not None:
            stored["average"] = body.mean_output
        if stop is not None:
            stored |= {f"stop/{name}": tensor for name, tensor in stop.state().items()}
        return stored

    def store(done: int, last: bool) -> None:
        # A look at the device would stall it, so it comes last.
        if checkpoints is not None and (capture is None or checkpoints.due(last=last)) and body.first_bad < 0:
            checkpoints.store("fit", settings, done, state, history, last=last)

    def end(values: Values) -> None:
        nonlocal over
        over = bool(values["ended"])

    done = start
    for step in range(start, start if over else steps):
        run_step()
        done, final = step + 1, step == steps - 1
        if step % every == 0 or final:
            row = _row(body, clean, rings)
            history.record(step, **row)
            shown = {name: value for name, value in row.items() if value.ndim == 1}
            rows.push({"": body.first_bad, **shown}, reporter(step, steps, lr, progress, kept))
        if stop is not None and rule is None:
            over = stop.update(step, body.output if capture is None else body.output.clone())
        elif obeyed and (not late or step % _ASK_EVERY == 0):
            ends.push({"ended": rule.ended(z.device)}, end)
        if late and obeyed and checkpoints is not None and checkpoints.due():
            over = rule.over  # what is written has to be waited for anyway
        if over or final:
            break
        store(done, last=False)
    rows.flush()
    if over or (late and obeyed and rule.over):
        if late and obeyed:
            body.go_back()
            done = int(rule.stopped_at.max())
            history.cut(done)
        stopped_at = done
    if done > start:
        store(done, last=True)

    with torch.no_grad():
        image = module(z) if body.mean_output is None else body.mean_output
    if stop is not None:
        image = stop.image
    if hasattr(stop, "stopped_after"):
        stopped_at = stop.stopped_after()
    return FitResult(image, history, stopped_at, module)


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


def _row(body: FitStep, clean: torch.Tensor | None, rings: int | None) -> dict[str, torch.Tensor]:
    """What the history records of the last step, in memory of its own."""
    values = {"loss": body.loss.clone()}
    if clean is not None:
        values["psnr"] = psnr(body.output, clean)
        if body.mean_output is not None:
            values["psnr_average"] = psnr(body.mean_output, clean)
    if body.variation is not None:
        values["total_variation"] = body.variation.clone()
    if rings is not None:
        values["ring_energy"] = ring_energies(body.output, rings)
        if clean is not None:
            values["ring_error"] = ring_energies(body.output - clean, rings)
    return values


def _describe(stop: Stop | None) -> dict[str, Any] | None:
    if stop is None:
        return None
    plain = {name: value for name, value in vars(stop).items() if isinstance(value, (int, float, str))}
    return {"rule": type(stop).__name__, **plain}


def _only(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
