"""The masks that the OES authors published, from beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_gen as sg

DATA = Path(__file__).parents[2] / "shared" / "data"
PUBLISHED = ("baboon", "barbara")


def published_mask(name: str) -> sg.Mask:
    """For the default hourglass; skips the test where the file is not there."""
    path = DATA / f"oes_mask_{name}.npz"
    if not path.exists():
        pytest.skip(f"the published masks are not part of the project, and {path.name} is not beside it")
    data = np.load(path)
    flat = torch.from_numpy(np.unpackbits(data["bits"])[: int(data["numel"])].astype(bool))
    net = sg.generators.Hourglass()
    assert [list(p.shape) for p in net.parameters()] == json.loads(str(data["shapes"]))
    pieces = flat.split([p.numel() for p in net.parameters()])
    return sg.Mask({n: k.view(p.shape) for (n, p), k in zip(net.named_parameters(), pieces, strict=True)})
