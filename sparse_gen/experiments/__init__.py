"""Whole experiments, from an image file to a folder of results."""

import lazy_loader

# Eager, although the rest is lazy: a lazy `denoise` would be the module, not the function, as soon
# as anything imported the module. Neither file imports torch before something runs.
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.denoise import DenoiseResult, DisconnectedError, Start, denoise

_lazy, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["Photograph", "read_image", "write_image"],
        "report": ["Report", "draw_report"],
    },
)
__getattr__ = _lazy

__all__ = [
    "DenoiseConfig",
    "DenoiseResult",
    "DisconnectedError",
    "Photograph",
    "Report",
    "Start",
    "denoise",
    "draw_report",
    "read_image",
    "write_image",
]
