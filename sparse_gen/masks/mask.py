"""A mask: which weights of a network are kept, with what is needed to find that network again."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from os import PathLike
from typing import NamedTuple

import torch
from torch import nn


class LayerCount(NamedTuple):
    """One parameter of a mask: its shape, and how many of its entries one experiment keeps (on average)."""

    name: str
    shape: tuple[int, ...]
    kept: float
    total: int


class Mask:
    """Parameter name → bool tensor, True where the weight is kept.

    Args:
        tensors: for each masked parameter a bool tensor of its shape, or (E, *shape) for E experiments.
        experiments: E where the tensors have a leading experiment axis, None where they have none.
        whole: shapes of the parameters that are kept whole; they count as kept weights.
        weights: for each parameter, masked or whole, the initial values of its kept weights, 1-D in the order of
            the mask's True entries (experiment by experiment).
        logits: for each masked parameter the logits of a search, of the mask's shape; 4 bytes a weight in the file.
        recipe: plain data that tells how network, input and noise are made: {"net": …, "z": …, "noise": …}.

    Raises:
        ValueError: a tensor is not bool, a leading axis is not E, weights or logits are not finite or do not match the
            kept entries or the mask.

    Density is the kept fraction over all parameters, whole ones included, so that it compares across methods.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        experiments: int | None = None,
        whole: Mapping[str, tuple[int, ...]] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        logits: Mapping[str, torch.Tensor] | None = None,
        recipe: dict | None = None,
    ):
        self.tensors = dict(tensors)
        self.whole = {name: tuple(shape) for name, shape in (whole or {}).items()}
        self.weights = None if weights is None else dict(weights)
        self.logits = None if logits is None else dict(logits)
        self.recipe = recipe or {}
        self._experiments = experiments
        self._check()

    def _check(self) -> None:
        if not self.tensors:
            raise ValueError("expected a mask of at least one parameter, got none")
        both = self.tensors.keys() & self.whole.keys()
        if both:
            raise ValueError(f"expected each parameter masked or whole, got both for {', '.join(sorted(both))}")
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
                got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"expected a bool tensor for {name}, got {got}")
            if tensor.numel() == 0:
                raise ValueError(f"expected at least one entry in {name}, got a mask of shape {tuple(tensor.shape)}")
            if self._experiments is not None and tensor.shape[:1] != (self._experiments,):
                raise ValueError(
                    f"expected {name} with a leading axis of {self._experiments} experiments, got {tuple(tensor.shape)}"
                )
        if self.weights is not None:
            self._check_weights()
        if self.logits is not None:
            self._check_logits()

    def _check_weights(self) -> None:
        for name, values in self.weights.items():
            if not isinstance(values, torch.Tensor) or values.ndim != 1 or not values.is_floating_point():
                raise ValueError(f"expected the stored weights of {name} as a vector of floats, got {_kind(values)}")
            if not values.isfinite().all():
                raise ValueError(f"expected finite stored weights, got NaN or infinity in {name}")
        expected = {name: int(tensor.sum()) for name, tensor in self.tensors.items()}
        expected |= {name: prod(shape) * self.experiments for name, shape in self.whole.items()}
        got = {name: values.numel() for name, values in self.weights.items()}
        if got != expected:
            name = next(name for name in expected | got if expected.get(name) != got.get(name))
            raise ValueError(
                f"expected one stored weight for each kept entry of {name}, {expected.get(name)}, got {got.get(name)}"
            )

    def _check_logits(self) -> None:
        if self.logits.keys() != self.tensors.keys():
            name = next(iter(self.logits.keys() ^ self.tensors.keys()))
            raise ValueError(f"expected logits of every masked parameter and of no other, got a difference in {name}")
        for name, values in self.logits.items():
            wanted = tuple(self.tensors[name].shape)
            if not isinstance(values, torch.Tensor) or not values.is_floating_point() or tuple(values.shape) != wanted:
                raise ValueError(f"expected the logits of {name} as floats of shape {wanted}, got {_kind(values)}")
            if not values.isfinite().all():
                raise ValueError(f"expected finite logits, got NaN or infinity in {name}")

    @property
    def experiments(self) -> int:
        """E; 1 where there is no experiment axis."""
        return self._experiments or 1

    @property
    def has_experiment_axis(self) -> bool:
        return self._experiments is not None

    def layers(self) -> list[LayerCount]:
        """Every parameter with its shape and counts, masked ones first."""
        skip = 1 if self.has_experiment_axis else 0
        layers = [
            LayerCount(name, tuple(t.shape[skip:]), int(t.sum()) / self.experiments, t.numel() // self.experiments)
            for name, t in self.tensors.items()
        ]
        return layers + [LayerCount(name, s, prod(s), prod(s)) for name, s in self.whole.items()]

    @property
    def kept(self) -> int:
        """Kept weights of one experiment, whole parameters included (the mean where experiments differ)."""
        return round(sum(layer.kept for layer in self.layers()))

    @property
    def total(self) -> int:
        """All parameters of one experiment."""
        return sum(layer.total for layer in self.layers())

    @property
    def density(self) -> float:
        return self.kept / self.total

    def check_fits(self, network: nn.Module) -> None:
        """Raise a ValueError that lists both shapes unless the mask belongs to this network."""
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        for name, shape, _, _ in self.layers():
            if name not in shapes:
                raise ValueError(
                    f"expected a mask of this network, got one with {name} {shape}, which the network lacks; its "
                    f"parameters are {_listed(shapes)}, the mask's {_listed({n: s for n, s, _, _ in self.layers()})}"
                )
            if shapes[name] != shape:
                raise ValueError(f"expected a mask of this network, whose {name} is {shapes[name]}, got {shape}")

    def dense(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """For every parameter of the network a bool tensor (E, *shape)."""
        dense = {}
        for name, parameter in network.named_parameters():
            shape = (self.experiments, *parameter.shape)
            tensor = self.tensors.get(name)
            dense[name] = torch.ones(shape, dtype=torch.bool) if tensor is None else tensor.view(shape)
        return dense

    def dense_weights(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """For every parameter of the network the stored weights (E, *shape), zero where pruned.

        A parameter that the mask does not know keeps the network's own values.
        """
        dense = {}
        for name, keep in self.dense(network).items():
            if name in self.weights:
                values = torch.zeros(keep.shape)
                values[keep] = self.weights[name].float()
            else:
                values = dict(network.named_parameters())[name].detach().expand(keep.shape)
            dense[name] = values
        return dense

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file; see `sparse_gen.masks.file`.

        Raises:
            OSError: the file cannot be written; one that was there before is left as it is.
        """
        from sparse_gen.masks.file import save

        save(self, path)

    @staticmethod
    def load(path: str | PathLike) -> Mask:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no mask, or it is damaged.
        """
        from sparse_gen.masks.file import load

        return load(path)

    def __repr__(self) -> str:
        of = f"{self.experiments} experiments, " if self.has_experiment_axis else ""
        return f"Mask({of}{self.kept:,} of {self.total:,} weights kept, {self.density:.2%})"

    def __str__(self) -> str:
        rows = [(n, "×".join(map(str, s)), f"{round(k):,}", f"{k / t:.1%}") for n, s, k, t in self.layers()]
        header = ("parameter", "shape", "kept", "density")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
        return "\n".join([*lines, repr(self)])


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _listed(shapes: Mapping[str, tuple[int, ...]], most: int = 4) -> str:
    listed = [f"{name} {shape}" for name, shape in list(shapes.items())[:most]]
    return ", ".join(listed) + (f" and {len(shapes) - most} more" if len(shapes) > most else "")
