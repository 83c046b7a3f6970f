"""A mask for photographs, by any method, as a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_gen.experiments.config import DenoiseConfig, choice
from sparse_gen.files import claim_file

if TYPE_CHECKING:
    import torch

    from sparse_gen.checkpoint import Checkpoints
    from sparse_gen.masks.search import SearchResult

TARGETS = ("noisy", "clean")


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """How a mask is to be found; what the network, noise and seed are is in a `DenoiseConfig`.

    Attributes:
        method, scope, floor, variant: as for `masks.find`.
        target: "noisy" or, as the lottery image prior's masks were found, "clean".
        store_logits: whether the file holds the logits, 4 bytes a prunable weight; "oes" only.
        settle: end the search before its last step, as soon as at most this share of the kept weights was exchanged
            within 100 steps; "oes" only.
        options: the method's own. Those of "oes" and "imp" that the configuration has too are taken from there.
    """

    method: str = "oes"
    scope: str = "global"
    floor: int | float | None = None
    variant: str | None = None
    target: str = "noisy"
    store_logits: bool = False
    settle: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        choice(*TARGETS)("target", self.target)
        if self.store_logits and self.method != "oes":
            raise ValueError(f"store_logits: expected method oes, which has logits, got {self.method}, leave one out")
        if self.settle is not None and self.method != "oes":
            raise ValueError(f"settle: expected method oes, whose search can settle, got {self.method}, leave one out")
        if self.settle is not None and not 0 <= self.settle < 1:
            raise ValueError(f"settle: expected a share from 0 to below 1, got {self.settle}, 0.05 is 5 %")


def find_mask(
    config: DenoiseConfig,
    request: MaskRequest,
    output: str | os.PathLike[str],
    *,
    more_images: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    checkpoints: Checkpoints | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> SearchResult:
    """Find a mask for the photograph of `config` and write its file.

    Args:
        config: image, noise, density, generator, seed, device and threads; the rest concerns "oes" and "imp".
        request: the method.
        output: the file to write, at the end.
        more_images: with "imp", further photographs of the same size for one shared mask. The noise of the i-th has the
            seed `config.seed` + i.
        overwrite: whether a file that is there may be replaced.
        checkpoints: where "oes" and "imp" store their state, and whether to go on from there; cleared at the end.
        progress: called with (step, steps, latest values).

    Returns:
        What `masks.find` found. Its recipe, in the file, tells z, noise, images and target.

    Raises:
        ValueError: an image, the device, the depth or the density does not do, or the memory, or an argument of
            `masks.find`.
        OSError: a file cannot be read or written.
        RunInterrupted: `checkpoints.request_stop()` was called.

    Warns:
        DisconnectedMaskWarning: the mask cuts the network.
    """
    import sparse_gen as sg
    from sparse_gen.experiments.environment import resolve_device, use_threads
    from sparse_gen.experiments.images import read_image
    from sparse_gen.experiments.memory import check_memory
    from sparse_gen.experiments.problem import check_same_image, choose_depth, pose
    from sparse_gen.experiments.stages import recipe_of

    if more_images and request.method != "imp":
        raise ValueError(f"image: expected one for {request.method}, got {1 + len(more_images)}, use method imp")
    if request.target == "clean" and config.sigma is None:
        raise ValueError("target: expected noisy where no sigma is given, got clean, give a sigma or leave it out")
    device = resolve_device(config.device)
    photographs = [
        read_image(path, lambda shape: check_memory(config, shape, device)) for path in (config.image, *more_images)
    ]
    check_same_image(config, photographs[0])
    shapes = {tuple(photograph.pixels.shape): photograph.path for photograph in photographs}
    if len(shapes) > 1:
        listed = ", ".join(f"{path} of {shape[3]} × {shape[2]}" for shape, path in shapes.items())
        raise ValueError(f"image: expected images of one size and kind, got {listed}, crop them")
    file = claim_file(Path(output), overwrite)
    if checkpoints is not None and not checkpoints.resume:
        checkpoints.clear()  # of an earlier search, if any
    with use_threads(config.threads):
        image = photographs[0].pixels.to(device)
        config = config.replace(
            image_sha256=photographs[0].sha256, device=str(device), depth=choose_depth(config, tuple(image.shape[-2:]))
        )
        problem = pose(config, image)
        config = config.replace(input_channels=problem.net.in_channels)
        targets = [problem.clean if request.target == "clean" else problem.noisy]
        targets += [
            _target(config, request, photograph.pixels.to(device), i) for i, photograph in enumerate(photographs[1:], 1)
        ]
        recipe = {**recipe_of(config), "target": request.target}
        if more_images:
            recipe["image_sha256"] = [photograph.sha256 for photograph in photographs]
            recipe["noise"] = {**recipe["noise"], "seed": [config.seed + i for i in range(len(photographs))]}
        rule = {} if request.settle is None else {"stop": sg.stop.Settled(tolerance=request.settle)}
        result = sg.masks.find(
            request.method,
            problem.net,
            problem.z,
            _stacked(targets),
            density=config.density,
            scope=request.scope,
            prunable=None if request.variant is not None else config.prunable,
            seed=config.seed,
            floor=request.floor,
            variant=request.variant,
            recipe=recipe,
            progress=progress,
            **(_options(config, request, len(targets)) | request.options | rule | _stored(request, checkpoints)),
        )
        if request.store_logits:
            result.mask.logits = result.logits
        result.mask.save(file)
    if checkpoints is not None:
        checkpoints.clear()
        with suppress(OSError):  # it was never made, or holds a file of the user's
            checkpoints.folder.rmdir()
    return result


def _stored(request: MaskRequest, checkpoints: Checkpoints | None) -> dict[str, Any]:
    """Methods that take no steps have nothing to store."""
    return {} if checkpoints is None or request.method not in ("oes", "imp") else {"checkpoints": checkpoints}


def _target(config: DenoiseConfig, request: MaskRequest, image: torch.Tensor, number: int) -> torch.Tensor:
    import sparse_gen as sg

    if config.sigma is None or request.target == "clean":
        return image
    return sg.inverse.add_noise(image, config.sigma, seed=config.seed + number, clip=config.clip)


def _stacked(targets: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(targets)


def _options(config: DenoiseConfig, request: MaskRequest, images: int) -> dict[str, Any]:
    """What the configuration has of a method's options."""
    if request.method == "oes":
        return {
            "steps": config.search_steps, "lr": config.search_lr, "kl_weight": config.kl_weight,
            "temperature": config.temperature, "prior": config.prior, "every": config.every,
        }  # fmt: skip
    if request.method == "imp":
        jitter = {"input_jitter": config.input_jitter, "multi_image": images > 1}
        return {"steps": config.steps, "lr": config.lr, "every": config.every, **jitter}
    return {}
