"""What a fit does to an image's spectrum."""

from sparse_gen.analysis.rings import ring_energies

__all__ = ["ring_energies"]
