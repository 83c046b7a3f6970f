"""What a restoration starts from: image, measurement, network input, network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import sparse_gen as sg
from sparse_gen.engine.stack import Stack
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.images import Photograph
from sparse_gen.generators.blocks import Generator
from sparse_gen.masks.selection import kept_count, prunable_layout

# A generator's class, and the deepest depth that is chosen for it.
_GENERATORS = {"hourglass": ("Hourglass", 6), "skip": ("Skip", 5), "decoder": ("DeepDecoder", 5)}


@dataclass(frozen=True)
class Problem:
    """Everything that compared methods have in common.

    It is a pure function of the image and of noise, generator and seed: methods have no part in it.

    Attributes:
        clean: (1, C, H, W), or None where it is not known.
        noisy: y, the same shape.
        z: (1, in_channels, H, W).
        net: at its initialisation; a stack where there are several experiments.
    """

    clean: torch.Tensor | None
    noisy: torch.Tensor
    z: torch.Tensor
    net: Generator | Stack


def pose(config: DenoiseConfig, image: torch.Tensor) -> Problem:
    """Make the problem of a configuration, on the image's device.

    Args:
        config: its noise, generator and seed are taken, and its depth, which must be known.
        image: (1, C, H, W) in [0, 1]; clean if the configuration has a sigma.
    """
    clean = None if config.sigma is None else image
    noisy = image
    if clean is not None:
        noisy = sg.inverse.add_noise(clean, config.sigma, seed=config.seed, clip=config.clip)
    net = make_network(config, image.shape[1]).to(image.device)
    size = tuple(image.shape[-2:])
    z = sg.noise_input(net.in_channels, size, seed=config.seed, scale=config.input_scale, device=image.device)
    return Problem(clean, noisy, z, net)


def pose_together(problems: Sequence[Problem]) -> Problem:
    """Problems of one architecture and size as the experiments of one; a single one is itself."""
    if len(problems) == 1:
        return problems[0]
    clean = None if problems[0].clean is None else torch.cat([problem.clean for problem in problems])
    noisy, z = (torch.cat([getattr(problem, name) for problem in problems]) for name in ("noisy", "z"))
    return Problem(clean, noisy, z, sg.stack([problem.net for problem in problems]))


def make_network(config: DenoiseConfig, out_channels: int) -> Generator:
    """The generator of a configuration whose depth is known."""
    given = {"channels": config.channels, "in_channels": config.input_channels, "depth": config.depth}
    return _generator(config.generator)(
        out_channels=out_channels,
        seed=config.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


def check_same_image(config: DenoiseConfig, photograph: Photograph) -> None:
    """Raise a ValueError if the image is not the one whose SHA-256 the configuration gives."""
    if config.image_sha256 not in (None, photograph.sha256):
        raise ValueError(
            f"image: expected the file with SHA-256 {config.image_sha256[:12]}…, got "
            f"{photograph.sha256[:12]}… in {config.image}, restore that file or remove image_sha256"
        )


def check_density(config: DenoiseConfig, net: Generator) -> None:
    """Raise a ValueError if the density is too small to keep what is not prunable."""
    total = sum(parameter.numel() for parameter in net.parameters())
    kept_count(config.density, total, total - prunable_layout(net, config.prunable).numel)


def choose_depth(config: DenoiseConfig, size: tuple[int, int]) -> int:
    """The configuration's depth, or the deepest that fits an image of this size.

    Raises:
        ValueError: the depth, or any, does not fit.
    """
    _, limit = _GENERATORS[config.generator]
    level = _generator(config.generator)(1, 1, channels=(1,), depth=1).deepest_level
    deepest = sg.generators.deepest_depth(size, config.depth or limit, level)
    if config.depth is not None and deepest < config.depth:
        raise ValueError(
            f"depth: expected at most {deepest} for an image of {size[1]} × {size[0]} pixels, "
            f"got {config.depth}, lower it or leave it out"
        )
    return deepest


def network_settings(net: Generator) -> dict[str, object]:
    """What the configuration may leave to the generator, as the generator took it."""
    arguments = net.recipe()["arguments"]
    return {"channels": tuple(arguments["channels"]), "input_channels": net.in_channels}


def make_rule(config: DenoiseConfig):
    """The stopping rule of a configuration, None for "none"."""
    if config.stop == "wmv":
        return sg.stop.WMV(config.stop_window, config.stop_patience)
    if config.stop == "emv":
        return sg.stop.EMV(config.stop_alpha, config.stop_patience)
    return None


def selected_step(rule, experiment: int = 0) -> int | None:
    """The step whose output a rule selects; None without a rule, or where the run was too short for a choice."""
    step = -1 if rule is None else int(rule.selected_step[experiment])
    return step if step >= 0 else None


def _generator(name: str) -> type[Generator]:
    return getattr(sg.generators, _GENERATORS[name][0])
