"""Every knob of a denoising run, checked in one place, and its YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_gen.files import write_yaml

PRUNABLE = ("conv_weights", "all")
GENERATORS = ("hourglass", "skip", "decoder")
ENGINES = ("auto", "reference")
STOPS = ("none", "wmv", "emv")
_HEADING = "Rerun to the same bits with: sparse-gen denoise --config THIS_FILE -o NEW_FOLDER"


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """What `sparse_gen.experiments.denoise` does, and to which image.

    Attributes:
        image: path of a PNG, JPEG or TIFF.
        image_sha256: of the image's bytes; a run refuses another file. None accepts any.
        sigma: standard deviation of the noise added to `image`, in units of its [0, 1] range;
            None takes the image as noisy already.
        clip: whether the noisy image is clipped to [0, 1].
        density: fraction of all parameters kept, in (0, 1].
        mask: path of a mask that is taken instead of searching one; `density` and the search's settings are then idle.
        mask_sha256: of that file's bytes; a run refuses another file. None accepts any.
        search_steps: steps of the mask search.
        search_lr: Adam's learning rate on the logits.
        kl_weight: weight of the KL term that pulls every probability to `prior`.
        temperature: of the soft mask; lower is closer to a hard one.
        prior: probability of keeping a parameter, in (0, 1); None takes `density`.
        prunable: `"conv_weights"` or `"all"`.
        steps: training steps of what the mask keeps.
        lr: Adam's learning rate for them.
        stop: rule that ends the training without the clean image and selects the restored one: `"wmv"`, `"emv"`
            (see `sparse_gen.stop`) or `"none"`.
        stop_window: outputs whose variance WMV takes.
        stop_patience: steps that a rule waits for the variance to fall further.
        stop_alpha: weight of the newest output in EMV's averages, in (0, 1).
        average: decay of a running average of the outputs, in (0, 1), which is then the restored image unless a
            rule selects it; None takes the last output.
        input_jitter: standard deviation of fresh noise added to z at every training step; DIP takes 1/30.
        rings: frequency rings whose energies are recorded for the report; None records none.
        every: history and progress are taken every so many steps, and at the last.
        seed: of the noise, the network, its input and the search, in [0, 2**63).
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:1"` and so on.
        threads: CPU threads; None takes PyTorch's number. Bits depend on it.
        generator: `"hourglass"`, `"skip"` (the deep image prior's) or `"decoder"` (the deep decoder).
        depth: its scales; None takes the deepest that fits the image, up to 6 (hourglass) or 5.
        channels: widths of the scales, outermost first; the last serves any further scale. None takes the
            generator's own.
        input_channels: channels of the fixed network input z; None takes the generator's own.
        input_scale: z is uniform in [0, input_scale].
        engine: `"auto"` (the sparse operators where they are there) or `"reference"` (plain PyTorch).
        force: train what is left even where the mask disconnects the network.

    Raises:
        ValueError: naming the knob, what was expected, what came and what to do.
    """

    image: str
    image_sha256: str | None = None
    sigma: float | None = None
    clip: bool = True
    density: float = 0.05
    mask: str | None = None
    mask_sha256: str | None = None
    search_steps: int = 1000
    search_lr: float = 5e-2
    kl_weight: float = 1e-7
    temperature: float = 0.2
    prior: float | None = None
    prunable: str = "conv_weights"
    steps: int = 1500
    lr: float = 1e-2
    stop: str = "none"
    stop_window: int = 100
    stop_patience: int = 1000
    stop_alpha: float = 0.1
    average: float | None = None
    input_jitter: float = 0.0
    rings: int | None = 5
    every: int = 10
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    generator: str = "hourglass"
    depth: int | None = None
    channels: tuple[int, ...] | None = None
    input_channels: int | None = None
    input_scale: float = 0.1
    engine: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = check(name, getattr(self, name))
            object.__setattr__(self, name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DenoiseConfig:
        """Build from plain values, as a YAML file gives them.

        Raises:
            ValueError: for an unknown key (the nearest known one is named), a missing image, or a
                value that does not pass.
        """
        check_known(values, [field.name for field in dataclasses.fields(cls)], "expected the name of a setting")
        if values.get("image") is None:
            raise ValueError("image: expected the path of a PNG, JPEG or TIFF, got none, name one")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DenoiseConfig:
        """Read a file that `save` or a person wrote; settings left out keep their defaults.

        Raises:
            OSError: if the file cannot be read.
            ValueError: as `from_mapping`, or if the file is not a YAML mapping.
        """
        from sparse_gen.experiments.settings import read_settings

        return cls.from_mapping(read_settings(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every setting as YAML.

        Raises:
            OSError: as `sparse_gen.files.atomic_write`.
        """
        write_yaml(path, self.plain(), heading=_HEADING)

    def plain(self) -> dict[str, Any]:
        """Every setting as plain data, which `from_mapping` takes and JSON and YAML hold."""
        values = dataclasses.asdict(self)
        return values if self.channels is None else values | {"channels": list(self.channels)}

    def replace(self, **changes: Any) -> DenoiseConfig:
        """The same with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)


def check_known(given: Iterable[Any], known: Iterable[str], expected: str) -> None:
    """Raise a ValueError, which names the nearest one known, if a key is not known."""
    known = list(known)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"use {', '.join(known)}"
            raise ValueError(f"{expected}, got {show(key)}, {advice}")


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 2


def show(value: Any) -> str:
    """A value in a message: short however large it is, None as YAML's null."""
    try:
        return "null" if value is None else _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _is_number(value: Any) -> bool:
    finite_float = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return finite_float and not isinstance(value, bool)


def _number(
    expected: str, holds: Callable[[float], bool], advice: str | Callable[[Any], str]
) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if _is_number(value) and holds(value):
            return float(value)
        hint = advice(value) if callable(advice) else advice
        raise ValueError(f"{name}: expected {expected}, got {show(value)}, {hint}")

    return check


def integer(least: int, most: int) -> Callable[[str, Any], int]:
    """A check that a value is a whole number in a range."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        raise ValueError(
            f"{name}: expected a whole number from {least} to {most:,}, got {show(value)}, give one in that range"
        )

    return check


def floor_check(name: str, value: Any) -> int | float:
    """A floor of `masks.find`: a count of weights, or a share of a layer."""
    if _is_number(value) and value > 0 and (isinstance(value, int) or value < 1):
        return value
    raise ValueError(f"{name}: expected a count of weights or a share in (0, 1), got {show(value)}, give one of them")


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}: expected true or false, got {show(value)}, write one of the two")


def _path(name: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return os.fspath(value)
    raise ValueError(f"{name}: expected the path of a PNG, JPEG or TIFF, got {show(value)}, name one")


def _mask(name: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return os.fspath(value)
    raise ValueError(f"{name}: expected the path of a mask file, got {show(value)}, name one or leave it out")


def _digest(name: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value
    what = name.removesuffix("_sha256")
    raise ValueError(f"{name}: expected 64 hexadecimal digits, got {show(value)}, remove it to accept any {what}")


def choice(*choices: str) -> Callable[[str, Any], str]:
    """A check that a value is one of the words."""
    *most, last = choices

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {show(value)}, use one of them")

    return check


def _stop(name: str, value: Any) -> str:
    return "none" if value is None else choice(*STOPS)(name, value)  # YAML's null says the same


def check_device(name: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError(f"{name}: expected auto, cpu, cuda or cuda:N, got {show(value)}, use one of them")


def _channels(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)) and 1 <= len(value) <= 16:
        return tuple(_width(name, width) for width in value)
    raise ValueError(f"{name}: expected 1 to 16 whole numbers, got {show(value)}, write them as [16, 32, 64]")


def _sigma_advice(value: Any) -> str:
    if _is_number(value) and 1 < value <= 255:
        return f"did you mean {value:g}/255 = {value / 255:.4g}?"
    return "give it on the image's scale"


def _density_advice(value: Any) -> str:
    if _is_number(value) and 1 < value <= 100:
        return f"did you mean {value:g} % = {value / 100:g}?"
    return "give the fraction of the parameters to keep"


_above_zero = _number("a number above 0", lambda v: v > 0, "give a positive number")
_from_zero = _number("a number from 0", lambda v: v >= 0, "give 0 or a positive number")
_fraction = _number("a number in (0, 1)", lambda v: 0 < v < 1, "leave it out")
# Far above anything that fits a machine; without a bound a slip of the finger asks for terabytes.
_steps = integer(1, 10**9)
_width = integer(1, 4096)

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "image": _path,
    "image_sha256": _optional(_digest),
    "sigma": _optional(_number("a number in [0, 1]", lambda v: 0 <= v <= 1, _sigma_advice)),
    "clip": _flag,
    "density": _number("a number in (0, 1]", lambda v: 0 < v <= 1, _density_advice),
    "mask": _optional(_mask),
    "mask_sha256": _optional(_digest),
    "search_steps": _steps,
    "search_lr": _above_zero,
    "kl_weight": _from_zero,
    "temperature": _above_zero,
    "prior": _optional(_fraction),
    "prunable": choice(*PRUNABLE),
    "steps": _steps,
    "lr": _above_zero,
    "stop": _stop,
    "stop_window": integer(2, 10**6),
    "stop_patience": _steps,
    "stop_alpha": _fraction,
    "average": _optional(_fraction),
    "input_jitter": _from_zero,
    "rings": _optional(integer(1, 1000)),
    "every": _steps,
    "seed": integer(0, 2**63 - 1),
    "device": check_device,
    "threads": _optional(integer(1, 1024)),
    "generator": choice(*GENERATORS),
    "depth": _optional(integer(1, 16)),
    "channels": _optional(_channels),
    "input_channels": _optional(_width),
    "input_scale": _above_zero,
    "engine": choice(*ENGINES),
    "force": _flag,
}
