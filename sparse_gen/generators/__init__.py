"""Networks that make an image from a fixed random input."""

from sparse_gen.generators.decoder import DeepDecoder
from sparse_gen.generators.hourglass import Hourglass
from sparse_gen.generators.noise import noise_input
from sparse_gen.generators.sizes import deepest_depth
from sparse_gen.generators.skip import Skip

__all__ = ["DeepDecoder", "Hourglass", "Skip", "build", "deepest_depth", "noise_input"]

_GENERATORS = {generator.__name__: generator for generator in (Hourglass, Skip, DeepDecoder)}


def build(recipe: dict):
    """Build a generator from its `recipe()`.

    Args:
        recipe: {"class": name, "arguments": {...}}, as a mask file holds it.

    Raises:
        ValueError: the class or an argument is unknown.
    """
    generator = _GENERATORS.get(recipe.get("class"))
    if generator is None:
        raise ValueError(f"expected a generator out of {', '.join(_GENERATORS)}, got {recipe.get('class')!r}")
    try:
        return generator(**recipe.get("arguments", {}))
    except TypeError as error:
        raise ValueError(f"expected the arguments of {generator.__name__}, got {error}") from None
