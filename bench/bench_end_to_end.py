"""A whole step of mask search, masked training and dense training, over sizes, densities, masks and experiments.

In pieces: `pytest bench/bench_end_to_end.py -k NAME --save`, NAME out of search, training, published, dense, density,
experiments, large.
"""

import pytest
from masks import PUBLISHED, published_mask

from sparse_gen.experiments.bench import PROVIDERS, StepCase, check
from sparse_gen.experiments.peak import peak_mb

ROUNDS = {256: 12, 512: 8, 1024: 5, 2048: 4}
DENSITIES = [0.01, 0.02, 0.1, 0.2, 0.5, 1.0]  # 5 % is bench_training


@pytest.fixture
def measure(compare, with_compile):
    """Checks, then times a case and, with `memory`, measures its providers' peaks."""

    def run(case: StepCase, *, memory: bool = False, only_ours: bool = False):
        error = check(case)
        names = ("ours",) if only_ours else (*PROVIDERS, *(["compile"] if with_compile else []))
        inputs = case.inputs()
        steps = {name: case.step(name, inputs) for name in names}
        peaks = {name: peak_mb(case, name) for name in names} if memory else None
        rounds = ROUNDS[case.size]
        compare(
            "end_to_end", case.name, steps, error=error, rounds=rounds, peak_mb=peaks, facts=case.facts,
            in_a_row=(3 if case.size <= 512 else 1) if case.device == "cpu" else 10, captures=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("size", [256, 512, 1024])
def bench_search(measure, device, size):
    measure(StepCase("search", size, device=device), memory=size == 512)


@pytest.mark.parametrize("size", [256, 512, 1024])
def bench_training(measure, device, size):
    measure(StepCase("training", size, device=device), memory=True)


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("name", PUBLISHED)
def bench_published(measure, device, tmp_path, name, size):
    mask = published_mask(name)
    mask.save(tmp_path / "mask.safetensors")
    case = StepCase(
        "training", size, mask.density, str(tmp_path / "mask.safetensors"), f"published {name} mask", device=device
    )
    measure(case, memory=size == 512)


@pytest.mark.parametrize("size", [256, 512, 1024])
def bench_dense(measure, device, size):
    measure(StepCase("dense", size, device=device), memory=size == 512)


@pytest.mark.parametrize("density", DENSITIES)
def bench_density(measure, device, density):
    measure(StepCase("training", 256, density, device=device))


@pytest.mark.parametrize("kind", ["search", "training"])
def bench_experiments(measure, device, kind):
    measure(StepCase(kind, 256, experiments=4, device=device))


def bench_large(measure, device):
    measure(StepCase("training", 2048, device=device), memory=True, only_ours=True)
