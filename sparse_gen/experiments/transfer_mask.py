"""A mask file moved to another photograph, size, noise, initialisation or width."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.files import claim_file

if TYPE_CHECKING:
    from sparse_gen.masks import Mask


def transfer_mask(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str,
    width: str = "same",
    image: str | os.PathLike[str] | None = None,
    sigma: float | None = None,
    clip: bool = True,
    seed: int | None = None,
    channels: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Mask:
    """Move a mask and write it as another file.

    Args:
        path: a mask file whose recipe tells its network.
        output: the file to write.
        weights, width: as for `masks.transfer`.
        image: the photograph it is to be used for; its size and channels decide those of z and of the network's output.
            None keeps what the recipe says of the image.
        sigma, clip: the noise to be added to it; None leaves the noise out (with `image`) or as it is (without).
        seed: of z and noise, and of the network where the weights are reinitialised; None keeps those of the recipe.
        channels: widths of the scales, outermost first; None keeps them.
        overwrite: whether a file that is there may be replaced.

    Returns:
        What was written.

    Raises:
        ValueError: the recipe has no network, the image does not fit it, or an argument of `masks.transfer`.
        OSError: a file cannot be read or written.

    Warns:
        DisconnectedMaskWarning: with an image, the moved mask cuts the network.
    """
    import sparse_gen as sg
    from sparse_gen.experiments.images import read_image

    # What a denoising run would refuse of these is refused here.
    DenoiseConfig(image=str(image or path), sigma=sigma, clip=clip, seed=seed or 0, channels=channels)
    mask = sg.Mask.load(path)
    made = mask.recipe.get("net")
    if not isinstance(made, dict):
        raise ValueError(f"mask: expected one whose recipe tells its network, got {path}, use masks.transfer in Python")
    arguments = dict(made.get("arguments", {}))
    if seed is not None and weights == "reinitialise":
        arguments["seed"] = seed
    if channels is not None:
        arguments["channels"] = list(channels)
    recipe: dict[str, Any] = {}
    photograph = None if image is None else read_image(image)
    if photograph is not None:
        arguments["out_channels"] = photograph.pixels.shape[1]
        recipe["image_sha256"] = photograph.sha256
    net = sg.generators.build({**made, "arguments": arguments})
    before = mask.recipe.get("z", {})
    z_seed = before.get("seed", 0) if seed is None else seed
    scale = before.get("scale", 0.1)
    recipe["z"] = {**before, "channels": net.in_channels, "scale": scale, "seed": z_seed}
    if image is not None or sigma is not None:
        recipe["noise"] = {"sigma": sigma, "clip": clip, "seed": z_seed}
    elif seed is not None and "noise" in mask.recipe:
        recipe["noise"] = {**mask.recipe["noise"], "seed": seed}
    z = None
    if photograph is not None:
        z = sg.noise_input(net.in_channels, tuple(photograph.pixels.shape[-2:]), seed=z_seed, scale=scale)
    file = claim_file(Path(output), overwrite)
    moved = sg.masks.transfer(mask, net, weights=weights, width=width, z=z, recipe=recipe)
    moved.save(file)
    return moved
