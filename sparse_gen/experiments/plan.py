"""The plan of a sweep: a YAML file, checked in one place, and the experiments it unfolds to.

Methods share everything but themselves: a plan gives images, noise, generators, seeds and the budget of steps for all
of them, and a method's options are those of the search, the training and the stopping alone. So y, z and the initial
weights are equal across methods by construction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from sparse_gen.experiments.config import DenoiseConfig, check_known, choice, floor_check, integer, show
from sparse_gen.files import write_yaml

KINDS = ("oes", "dense", "random", "magnitude", "snip", "grasp", "synflow", "imp")
_LISTS = ("images", "sigmas", "densities", "seeds")
_COMMON = ("budget", "every", "clip", "device", "threads", "engine", "force")
_GENERATOR = ("generator", "depth", "channels", "input_channels", "input_scale")
_TRAINING = (
    "method", "lr", "stop", "stop_window", "stop_patience", "stop_alpha", "run_on", "average", "input_jitter",
)  # fmt: skip
_OPTIONS = {
    "oes": (*_TRAINING, "search_steps", "search_lr", "kl_weight", "temperature", "prior", "prunable"),
    "dense": _TRAINING,
    "random": (*_TRAINING, "prunable"),
    **dict.fromkeys(("magnitude", "snip", "grasp"), (*_TRAINING, "prunable", "scope", "floor")),
    "synflow": (*_TRAINING, "prunable", "scope", "floor", "rounds"),
    "imp": (*_TRAINING, "prunable", "scope", "floor", "rounds", "search_steps"),
}
# What a method finds its mask with, besides the configuration; checked here, before the first experiment.
FINDING = {"scope": choice("global", "layer"), "floor": floor_check, "rounds": integer(1, 10**6)}
_ROUNDS = {"synflow": 100, "imp": 5}
_PASSES = {"snip": 1, "grasp": 2}
_PLURAL = {"image": "images", "sigma": "sigmas", "density": "densities", "seed": "seeds", "steps": "budget"}
_MOST = 10_000
_HEADING = "Go on, or begin again elsewhere, with: sparse-gen sweep run THIS_FILE -o FOLDER"


@dataclass(frozen=True)
class Experiment:
    """One row of a sweep.

    Attributes:
        image, generator, method: what the plan calls them.
        kind: "dense", or a method of `masks.find`.
        budget: steps in all, those of the search included.
        run_on: whether the training goes on after its rule has stopped it, so that the last output is known too.
        config: all settings; those of a search are idle in methods that have none.
        finding: `scope`, `floor` and `rounds` of methods that take them.
    """

    image: str
    generator: str
    method: str
    kind: str
    budget: int
    run_on: bool
    config: DenoiseConfig
    finding: dict[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int | None:
        """Of SynFlow and IMP; None where there are none."""
        return self.finding.get("rounds", _ROUNDS.get(self.kind))

    @property
    def search_steps(self) -> int:
        """What finding the mask takes off the training: steps, or passes over the network."""
        if self.kind == "imp":
            return self.config.search_steps // self.rounds * self.rounds
        if self.kind == "synflow":
            return self.rounds
        return self.config.search_steps if self.kind == "oes" else _PASSES.get(self.kind, 0)

    @property
    def key(self) -> str:
        """The SHA-256 of everything that the result depends on: the settings and the image's bytes, not names."""
        settings = {name: value for name, value in self.config.plain().items() if name != "image"}
        for name in ("mask", "mask_sha256"):  # of denoise alone
            del settings[name]
        content = {"settings": settings, "kind": self.kind, "run_on": self.run_on}
        if self.finding:
            content["finding"] = self.finding
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """As plain data, which `from_plain` takes."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "config"]
        return {name: getattr(self, name) for name in names} | {"config": self.config.plain()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Experiment:
        return cls(**{**values, "config": DenoiseConfig.from_mapping(values["config"])})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Images × generators × methods × densities × noise levels × seeds.

    Attributes:
        images: paths; relative ones are to the plan's file.
        methods: name → options: `method` ("dense", or one of `masks.find`; the name itself if left out), `lr`, which
            must be stated, and those of the configuration for search, stopping and training. `run_on: false` lets the
            stopping rule end the training; by default it selects an image and the training goes on. Besides them
            `scope` and `floor`, and `rounds` of "synflow" and "imp", which all have `search_steps` together.
        generators: name → options: `generator`, `depth`, `channels`, `input_channels`, `input_scale`.
        sigmas: of the noise, each in [0, 1].
        densities: kept fractions; methods that keep everything ignore them.
        seeds: each of noise, network, input and search.
        budget: steps of every experiment, those of its search included.
        every, clip, device, threads, engine, force: as in `DenoiseConfig`, for all; threads are those of one
            experiment.

    Raises:
        ValueError: naming the entry, what was expected, what came and what to do.
    """

    images: tuple[str, ...]
    methods: dict[str, dict[str, Any]]
    generators: dict[str, dict[str, Any]] = field(default_factory=lambda: {"hourglass": {}})
    sigmas: tuple[float, ...] = (0.1,)
    densities: tuple[float, ...] = (0.05,)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 2500
    every: int = 10
    clip: bool = True
    device: str = "auto"
    threads: int | None = None
    engine: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _list(name, getattr(self, name)))
        for name, known in {"generators": _GENERATOR, "methods": None}.items():
            object.__setattr__(self, name, _options(name, getattr(self, name), known))
        count = prod(len(getattr(self, name)) for name in (*_LISTS, "generators", "methods"))
        if count > _MOST:
            raise ValueError(f"plan: expected at most {_MOST:,} experiments, got {count:,}, make several of it")
        self._check_each_entry()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan, taking relative paths as relative to it.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a YAML mapping, has an unknown key (the nearest is named), or as `Plan`.
        """
        from sparse_gen.experiments.settings import read_settings

        values = read_settings(path, "plan")
        check_known(values, [entry.name for entry in dataclasses.fields(cls)], "plan: expected the name of an entry")
        for name in ("images", "methods"):
            if not values.get(name):
                raise ValueError(f"{name}: expected at least one, got none in {path}, name one")
        images = [
            os.path.join(os.path.dirname(os.path.abspath(path)), image) if isinstance(image, str) else image
            for image in _list("images", values["images"])
        ]
        return cls(**{**values, "images": images})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML.

        Raises:
            OSError: as `sparse_gen.files.atomic_write`.
        """
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        write_yaml(path, values | {name: list(values[name]) for name in _LISTS}, heading=_HEADING)

    def replace(self, **changes: Any) -> Plan:
        """The same with some entries changed, checked again."""
        return dataclasses.replace(self, **changes)

    def unfold(self) -> list[Experiment]:
        """Every experiment once, the seeds outermost, so that what is done first can already be compared.

        Raises:
            OSError: an image is missing or cannot be read.
            ValueError: the device is not there.
        """
        device = self.device
        if device != "cpu":  # torch is only loaded where it has to be asked
            from sparse_gen.experiments.environment import resolve_device

            device = str(resolve_device(device))
        digests = {image: _digest(image) for image in self.images}
        names = _short_names(self.images)
        return [
            self._experiment(*combination, device=device, name=names[combination[1]], sha256=digests[combination[1]])
            for combination in self._combinations()
        ]

    def _combinations(self) -> list[tuple[int, str, float, str, str, float]]:
        """Seed, image, sigma, generator, method, density; of densities only the first for methods without one."""
        every = product(self.seeds, self.images, self.sigmas, self.generators, self.methods, self.densities)
        return [c for c in every if self._kind(c[4]) != "dense" or c[5] == self.densities[0]]

    def _kind(self, method: str) -> str:
        return self.methods[method].get("method", method)

    def _experiment(self, seed, image, sigma, generator, method, density, *, device=None, name="", sha256=None):
        kind = self._kind(method)
        options = {key: value for key, value in self.methods[method].items() if key not in ("method", "run_on")}
        finding = {key: options.pop(key) for key in FINDING if key in options}
        try:
            config = DenoiseConfig(
                image=image,
                image_sha256=sha256,
                sigma=sigma,
                density=1 if kind == "dense" else density,
                seed=seed,
                device=device or self.device,
                rings=None,
                **{key: getattr(self, key) for key in ("every", "clip", "threads", "engine", "force")},
                **self.generators[generator],
                **options,
                steps=self.budget,
            )
            experiment = Experiment(name, generator, method, kind, self.budget, False, config, finding)
            search_steps = experiment.search_steps
            if kind == "imp" and not search_steps:
                raise ValueError(
                    f"search_steps: expected at least one for each of {experiment.rounds} rounds, got "
                    f"{config.search_steps}, raise it"
                )
            if search_steps >= self.budget:
                raise ValueError(
                    f"search_steps: expected fewer than the budget of {self.budget:,} steps, got {search_steps:,}, "
                    "leave some for the training"
                )
        except ValueError as error:
            raise ValueError(_in_the_plan(str(error), generator, method)) from None
        run_on = self.methods[method].get("run_on", True) and config.stop != "none"
        return dataclasses.replace(experiment, run_on=run_on, config=config.replace(steps=self.budget - search_steps))

    def _check_each_entry(self) -> None:
        """Unfold around the first combination, so that the configuration checks every entry once."""
        first = self._combinations()[0]
        entries = [self.seeds, self.images, self.sigmas, self.generators, self.methods, self.densities]
        for place, values in enumerate(entries):
            for value in values:
                self._experiment(*first[:place], value, *first[place + 1 :])


def _in_the_plan(message: str, generator: str, method: str) -> str:
    """A message of the configuration, which begins with the setting's name, with its place in the plan."""
    setting, rest = message.split(":", 1)
    if setting in _GENERATOR:
        setting = f"generators.{generator}.{setting}"
    elif setting in _OPTIONS["oes"]:
        setting = f"methods.{method}.{setting}"
    return f"{_PLURAL.get(setting, setting)}:{rest}"


def _list(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= _MOST:
        raise ValueError(f"{name}: expected a list, got {show(values)}, write it as [a, b]")
    seen: list[Any] = []
    for value in values:
        if isinstance(value, (dict, list, tuple)):
            raise ValueError(f"{name}: expected plain values in the list, got {show(value)}, write them as [a, b]")
        if value in seen:
            raise ValueError(f"{name}: expected each entry once, got {show(value)} twice, remove one")
        seen.append(value)
    return tuple(values)


def _options(name: str, entries: Any, known: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """Name → options, where a plain list of names stands for names without options."""
    if isinstance(entries, (list, tuple)) and all(isinstance(entry, str) for entry in entries):
        entries = {entry: {} for entry in entries}
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{name}: expected names with their options, got {show(entries)}, write `name: {{…}}`")
    checked = {}
    for entry, options in entries.items():
        if not isinstance(entry, str):
            raise ValueError(f"{name}: expected text as a name, got {show(entry)}, put it in quotes")
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ValueError(f"{name}.{entry}: expected options, got {show(options)}, write {{key: value}}")
        checked[entry] = _method(entry, options) if known is None else _generator(entry, options, known)
    return checked


def _generator(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    check_known(options, known, f"generators.{name}: expected an option of a generator")
    return {"generator": options.get("generator", name), **options}


def _method(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    kind = choice(*KINDS)(f"methods.{name}.method", options.get("method", name))
    check_known(options, _OPTIONS[kind], f"methods.{name}: expected an option of the method {kind}")
    if options.get("lr") is None:
        raise ValueError(f"methods.{name}.lr: expected the learning rate to be stated, got none, write it as lr: 1e-2")
    if not isinstance(options.get("run_on", True), bool):
        raise ValueError(
            f"methods.{name}.run_on: expected true or false, got {show(options['run_on'])}, write one of the two"
        )
    checked = {key: check(f"methods.{name}.{key}", options[key]) for key, check in FINDING.items() if key in options}
    return {"method": kind, **options, **checked}


def _digest(image: str) -> str:
    path = Path(image)
    if not path.exists():
        raise FileNotFoundError(f"images: expected image files, got {path}, which is not there, check the name")
    if path.is_dir():
        raise IsADirectoryError(f"images: expected image files, got the folder {path}, name files in it")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short_names(images: tuple[str, ...]) -> dict[str, str]:
    """The files' names without folder and ending, or the whole paths if two would be called the same."""
    stems = {image: Path(image).stem for image in images}
    return stems if len(set(stems.values())) == len(images) else {image: image for image in images}
