"""How much memory a run takes, told before it starts, and whether the machine has it."""

from __future__ import annotations

from math import prod, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.problem import choose_depth, make_network
from sparse_gen.generators.blocks import Generator
from sparse_gen.generators.sizes import extended

_MEMINFO = Path("/proc/meminfo")
# Float32 copies of all parameters at a stage's peak: weights, gradients, moments, masks. A search also sorts its
# logits, with 64-bit indices.
_COPIES = {"search": 14, "fit": 9}
# Of a whole run beside its stages, in the computer's memory: libraries loaded on the way, oneDNN's caches, the report.
# Measured: 290 MB at 512², 440 MB at 256².
_BESIDE = 300_000_000
_SMALLEST_ADVISED = 64  # pixels a side; a photograph is of no use below


class Memory(NamedTuple):
    """Peak bytes of the two stages of a run, above what the process holds before it."""

    search: int
    fit: int


def estimate_memory(
    network: Generator, size: tuple[int, int], *, experiments: int = 1, window: int = 0, device: str = "cpu"
) -> Memory:
    """Estimate the peak of searching a mask for a generator, and of fitting it, from one pass over a small image.

    Args:
        network: on the CPU; its running statistics change.
        size: height and width of the image in pixels.
        experiments: E.
        window: outputs that a stopping rule keeps.
        device: where the run will be, "cpu" or "cuda".

    Returns:
        `Memory`. On a CPU, measured peaks were 0.75 to 1.3 of it for the three generators, from 128² to 512².
    """
    side = network.deepest_level * 2**network.depth
    saved, largest, probe, image = _bytes_of_a_pass(network, side)
    growth = prod(extended(length, network.depth) for length in size) / side**2
    z = 4 * network.in_channels * prod(size)
    parameters = _parameter_bytes(network)
    # A backward pass holds what was saved and up to three gradients; z is there in two memory formats.
    step = experiments * (growth * saved + 2 * z) + 3 * growth * largest
    fit = step + experiments * (_COPIES["fit"] * parameters + window * growth * image)
    search = step + experiments * _COPIES["search"] * parameters
    # The probe of a mask's connectivity holds z twice in double. On a CPU, what the steps before it freed is not all
    # given back to the system.
    before = 0.8 * search if device == "cpu" else experiments * 8 * parameters
    search = max(search, growth * probe + 4 * z + 2 * experiments * z + before)
    return Memory(round(search), round(fit))


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:  # macOS has no such file
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(
    config: DenoiseConfig,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    search: bool = True,
    experiments: int = 1,
) -> None:
    """Raise ValueError unless a run fits into the memory that is there.

    Args:
        config: of the run.
        shape: (C, H, W) of its image.
        device: where it is to run.
        search: whether it searches a mask or only fits.
        experiments: E, how many run together.

    Raises:
        ValueError: it does not fit; the message says what to lower. Or the depth does not fit the image.
    """
    available = available_memory(device)
    if available is None:
        return
    needed = _need(config, shape, device, search, available, experiments)
    if needed > available:
        raise ValueError(
            f"memory: expected a run that fits into the {_shown(available)} available on {device}, got one of about "
            f"{_shown(needed)} for {shape[2]} × {shape[1]} pixels, {_advice(config, shape, device, search, available)}"
        )


def _need(
    config: DenoiseConfig, shape, device: torch.device, search: bool, available: int, experiments: int = 1
) -> int:
    channels, *size = shape
    config = config.replace(depth=choose_depth(config, tuple(size)))
    with torch.device("meta"):
        parameters = _parameter_bytes(make_network(config, channels))
    copies = experiments * _COPIES["search" if search else "fit"]
    if copies * parameters > available:  # then the network itself may be too large to be made
        return copies * parameters
    window = config.stop_window if config.stop == "wmv" else 0
    network = make_network(config, channels)
    memory = estimate_memory(network, tuple(size), experiments=experiments, window=window, device=device.type)
    return (max(memory) if search else memory.fit) + (_BESIDE if device.type == "cpu" else 0)


def _advice(config: DenoiseConfig, shape, device: torch.device, search: bool, available: int) -> str:
    channels, height, width = shape
    others = "channels (widths), input_channels (of z) or depth"
    if config.stop == "wmv":
        others = f"stop_window, {others}"
    # Most memory goes with the pixels, so this comes down to what fits in a few rounds, if anything does. A margin,
    # since estimates are rough.
    needed, scale = _need(config, shape, device, search, available), 1.0
    try:
        for _ in range(5):
            scale *= 0.95 * sqrt(available / needed)
            smaller = (channels, round(height * scale), round(width * scale))
            needed = _need(config, smaller, device, search, available)
            if needed <= available and min(smaller[1:]) >= _SMALLEST_ADVISED:
                return f"scale the image down to about {smaller[2]} × {smaller[1]} or lower {others}"
    except ValueError:  # smaller than the network takes
        pass
    return f"lower {others}"


def _shown(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _parameter_bytes(network: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in network.parameters())


def _bytes_of_a_pass(network: Generator, side: int) -> tuple[int, int, int, int]:
    """Run the network on an image of side × side: what is saved for the backward pass, the largest layer's output, the
    largest layer of a pass in double without one, and the image.
    """
    saved: dict[int, int] = {}
    layers: list[tuple[int, int]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        columns = 0
        if isinstance(layer, nn.Conv2d) and prod(layer.kernel_size) > 1:
            # oneDNN has no convolution in double, and PyTorch's own unfolds its input.
            columns = layer.in_channels * prod(layer.kernel_size) * output.shape[-2] * output.shape[-1]
        layers.append((4 * output.numel(), 8 * (columns + inputs[0].numel() + 2 * output.numel())))

    hooks = [layer.register_forward_hook(note) for layer in network.modules() if not list(layer.children())]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(torch.zeros(1, network.in_channels, side, side))
    for hook in hooks:
        hook.remove()
    largest, probe = (max(sizes) for sizes in zip(*layers, strict=True))
    return sum(saved.values()), largest, probe, 4 * output.numel()
