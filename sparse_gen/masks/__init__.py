"""Finding, storing and checking masks."""

from sparse_gen.masks.compare import Comparison, Overlap, compare
from sparse_gen.masks.connectivity import DisconnectedMaskWarning
from sparse_gen.masks.find import METHODS, find
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.published import import_mask
from sparse_gen.masks.search import SearchResult, masked_output, search_mask
from sparse_gen.masks.transfer import transfer

__all__ = [
    "METHODS",
    "Comparison",
    "DisconnectedMaskWarning",
    "Mask",
    "Overlap",
    "SearchResult",
    "compare",
    "find",
    "import_mask",
    "masked_output",
    "search_mask",
    "transfer",
]
