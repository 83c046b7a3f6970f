"""Forward operators: what turns an image into a measurement."""

from sparse_gen.inverse.noise import add_noise

__all__ = ["add_noise"]
