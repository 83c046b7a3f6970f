"""How far a convolution in float32 may be from one in float64."""

from __future__ import annotations

import torch


def tolerance(x: torch.Tensor) -> float:
    """Norm-wise and relative: what rounding leaves where products are exact, and what TF32's ten bits leave."""
    return 2e-3 if x.is_cuda and torch.backends.cudnn.allow_tf32 else 5e-6
