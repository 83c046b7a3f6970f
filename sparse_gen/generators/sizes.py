"""Which image sizes a generator of a given depth can take, and how any size is made to fit."""

from __future__ import annotations

import torch

# A reflection by two pixels, which a 5×5 convolution needs, has nothing to reflect on fewer.
DEEPEST_LEVEL = 3


def extended(size: int, depth: int) -> int:
    """The next multiple of 2^depth."""
    return -(-size // 2**depth) * 2**depth


def deepest_depth(size: tuple[int, int], limit: int = 6, deepest_level: int = DEEPEST_LEVEL) -> int:
    """The largest depth up to `limit` whose deepest level still has `deepest_level` pixels a side.

    Args:
        size: image height and width in pixels.
        limit: at most this depth, at least 1.
        deepest_level: pixels a side that the deepest level needs.

    Raises:
        ValueError: not even one level fits.
    """
    for depth in range(limit, 0, -1):
        if extended(min(size), depth) // 2**depth >= deepest_level:
            return depth
    raise ValueError(f"expected an image of at least {2 * deepest_level - 1} pixels a side, got {size[0]}×{size[1]}")


def check_size(size: tuple[int, int], depth: int, deepest_level: int = DEEPEST_LEVEL) -> None:
    """Raise a ValueError that names the depth that fits if `depth` does not."""
    if depth == 0:
        if min(size) < deepest_level:
            raise ValueError(f"expected an image of at least {deepest_level} pixels a side, got {size[0]}×{size[1]}")
        return
    fits = deepest_depth(size, depth, deepest_level)
    if fits < depth:
        raise ValueError(
            f"expected at least {deepest_level} pixels a side at the deepest level, got a {size[0]}×{size[1]} image "
            f"at depth {depth}, use depth={fits}"
        )


def _reflected_indices(size: int, count: int, device: torch.device) -> torch.Tensor:
    """0 1 2 … size-1 size-2 … 1 0 1 …: reflection without repeating the edge, as often as it takes."""
    period = max(2 * size - 2, 1)
    position = torch.arange(count, device=device) % period
    return torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)


def extend_by_reflection(z: torch.Tensor, depth: int) -> torch.Tensor:
    """Extend (E, C, H, W) at the bottom and right to multiples of 2^depth by reflection."""
    for dim in (-2, -1):
        size = z.shape[dim]
        if size % 2**depth:
            z = z.index_select(dim, _reflected_indices(size, extended(size, depth), z.device))
    return z
