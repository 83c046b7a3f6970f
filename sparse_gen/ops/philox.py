"""Random numbers as a pure function of (seed, stream, step, index), the same bits on every backend.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    key = (seed low, seed high), counter = (index // 4, step, stream, 0), word = index mod 4.

So nothing has a state: a resumed run, another device or another order of work draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from sparse_gen.ops.dispatch import register_operator

_LOW_HALF = 0xFFFFFFFF


class Stream(IntEnum):
    """What a random number is for; one seed gives independent numbers for each."""

    INIT = 0
    Z = 1
    NOISE = 2
    MASK = 3
    TIES = 4
    JITTER = 5
    LANGEVIN = 6


def philox_4x32_10(counter: list[torch.Tensor], key: list[torch.Tensor]) -> torch.Tensor:
    """Ten rounds on four counter words under two key words, each an int64 tensor holding 32 bits; stacked last."""
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product1 >> 32 & _LOW_HALF) ^ counter[1] ^ key[0],
            product1 & _LOW_HALF,
            (product0 >> 32 & _LOW_HALF) ^ counter[3] ^ key[1],
            product0 & _LOW_HALF,
        ]
        key = [key[0] + 0x9E3779B9 & _LOW_HALF, key[1] + 0xBB67AE85 & _LOW_HALF]
    return torch.stack(torch.broadcast_tensors(*counter), dim=-1)


def philox_reference(seed: torch.Tensor, step: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """The words of indices 0 … count - 1 for each seed.

    Args:
        seed: (E,) int64.
        step: () int64.
        stream: one of `Stream`.
        count: how many.

    Returns:
        (E, count) int32, the 32 bits of each word.
    """
    blocks = torch.arange((count + 3) // 4, device=seed.device)
    zeros = torch.zeros_like(blocks)
    key = [(seed & _LOW_HALF)[:, None], (seed >> 32 & _LOW_HALF)[:, None]]
    words = philox_4x32_10([blocks, zeros + step, zeros + stream, zeros], key)
    return words.reshape(len(seed), -1)[:, :count].to(torch.int32)


register_operator(
    "philox(Tensor seed, Tensor step, int stream, int count) -> Tensor",
    reference=philox_reference,
    fake=lambda seed, step, stream, count: seed.new_empty((seed.shape[0], count), dtype=torch.int32),
)


def seed_tensor(seed: int | Sequence[int] | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """One or several seeds as a tensor of shape (E,), int64.

    Raises:
        ValueError: a seed is no integer of 64 bits, or there is none.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed) if isinstance(seed, Sequence) else seed
    if isinstance(seeds, torch.Tensor):
        seeds = seeds.tolist()
    integers = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    if not integers or not seeds or not all(-(2**63) <= s < 2**63 for s in seeds):
        raise ValueError(f"expected a seed of 64 bits, or a list of one an experiment, got {seed!r}")
    return torch.tensor(seeds, dtype=torch.int64, device=device)


def uniform_from_words(words: torch.Tensor) -> torch.Tensor:
    """Words as float32 strictly inside (0, 1): ((word >> 9) + 1/2) · 2⁻²³; both u and 1 - u are exact."""
    return ((words >> 9 & 0x7FFFFF).float() + 0.5) * 2.0**-23


def uniform(seed: torch.Tensor, step: int | torch.Tensor, stream: Stream, count: int) -> torch.Tensor:
    """Uniform numbers in (0, 1): (E, count) float32 for seeds (E,); the step may be a () int64 tensor beside them."""
    step = step if isinstance(step, torch.Tensor) else torch.tensor(step, device=seed.device)
    words = torch.ops.sparse_gen.philox(seed, step, int(stream), count)
    return uniform_from_words(words)


def normal(seed: torch.Tensor, step: int | torch.Tensor, stream: Stream, count: int) -> torch.Tensor:
    """Standard normal numbers by the inverse of the distribution: (E, count) float32 for seeds (E,).

    With 23 random bits the largest is 5.3 standard deviations.
    """
    # In double, so that devices agree although their ndtri do not in the last bits of a float.
    return torch.special.ndtri(uniform(seed, step, stream, count).double()).float()
