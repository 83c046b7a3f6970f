"""Without a GPU, Triton kernels run in Triton's interpreter: it must be asked for before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request, monkeypatch):
    """Runs a test once for every instruction set that this machine has and the library was built for."""
    from sparse_gen.ops.extension import status

    if not status().available:
        pytest.skip(f"no compiled library: {status().reason}")
    monkeypatch.setenv("SPARSE_GEN_ISA", request.param)
    if status().instruction_set != request.param:
        pytest.skip(f"this machine or this build has no {request.param}")
    return request.param
