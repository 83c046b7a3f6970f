"""Without a GPU, Triton kernels run in Triton's interpreter: it must be asked for before they are imported."""

import os
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A change must not fail for what another run happens to draw; away from CI, every run draws anew.
# How fast examples are drawn says how busy the machine is, and nothing about them.
_BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fresh", **_BUSY)
settings.register_profile("repeatable", derandomize=True, **_BUSY)
settings.load_profile("repeatable" if os.environ.get("CI") else "fresh")

# What takes minutes: a process that came to one of these at the end would be at it alone.
LONGEST = ("test_sanitizers", "test_nvcc", "test_package")


def pytest_collection_modifyitems(config, items):
    """Where several processes share the files, the longest come first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def hastened_interpreter(request):
    # On a GPU these tests compile; other versions of Triton need not have what `hasten` replaces.
    if request.node.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") == "1":
        with suppress(ImportError):  # without Triton, the test skips itself
            from interpreted import hasten

            hasten()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Measured layouts neither come from the user's cache nor go there; processes that tests start share ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_GEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture
def poisoned():
    """Fills every torch.empty with NaN: what a kernel fails to write cannot pass for a result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def eight_processors(monkeypatch):
    """On fewer than a sweep's workers, there would be a warning."""
    from sparse_gen.experiments.sweep import sweep

    # In `sparse_gen.experiments` the function hides the module of its name.
    monkeypatch.setattr(sys.modules[sweep.__module__], "available_processors", lambda: 8)
