"""Whole experiments, from an image file to a folder of results."""

import lazy_loader

# Eager, although the rest is lazy: a lazy `denoise` would be the module, not the function, as soon
# as anything imported the module; so with `sweep`. None of these imports torch before something runs.
from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.denoise import DenoiseResult, DisconnectedError, Start, denoise
from sparse_gen.experiments.plan import Experiment, Plan
from sparse_gen.experiments.sweep import sweep
from sparse_gen.experiments.sweep_folder import Status, SweepFolder

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
    "Experiment",
    "Photograph",
    "Plan",
    "Report",
    "Start",
    "Status",
    "SweepFolder",
    "denoise",
    "draw_report",
    "read_image",
    "sweep",
    "write_image",
]
