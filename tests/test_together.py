"""Experiments of a sweep that run at the same time have the results that they have alone."""

import sys
from threading import Event

import numpy as np
import pytest
from pictures import stripes
from PIL import Image

from sparse_gen.experiments.plan import Plan
from sparse_gen.experiments.shards import read_rows
from sparse_gen.experiments.sweep import sweep
from sparse_gen.experiments.together import grouped

pytestmark = pytest.mark.usefixtures("eight_processors")

METHODS = {
    "OES": {"method": "oes", "search_steps": 6, "lr": 1e-2},
    "random": {"lr": 1e-2, "average": 0.9},
    "dense": {"lr": 1e-2, "stop": "wmv", "stop_window": 3, "stop_patience": 4},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    image = stripes()
    names = []
    for name, pixels in {"a": image, "b": image[::-1, :, ::-1]}.items():
        names.append(str(folder / f"{name}.png"))
        Image.fromarray(np.ascontiguousarray(pixels)).save(names[-1])
    return names


@pytest.fixture
def small(tmp_path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "small.png")
    return str(tmp_path / "small.png")


def plan(images, **changes):
    settings = {
        "images": images, "sigmas": (0.1,), "seeds": (0, 1), "densities": (0.5,), "budget": 18, "every": 4,
        "generators": {"small": {"generator": "hourglass", "depth": 2, "channels": [4, 6]}}, "device": "cpu",
        "threads": 1, "methods": METHODS,
    }  # fmt: skip
    return Plan(**{**settings, **changes})


def measured(folder):
    """Everything but times, by experiment."""
    return {
        key: {name: value for name, value in row["results"].items() if not name.startswith("seconds")}
        for key, row in read_rows(folder / "results").items()
    }


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[sweep.__module__], "available_processors", lambda: 8)
        assert sweep(plan(images), folder, workers=1).done == 12
    return measured(folder)


@pytest.mark.parametrize("together", [3, 32])
def test_together_as_alone(images, alone, tmp_path, together):
    status = sweep(plan(images), tmp_path / "out", workers=1, together=together)
    assert (status.total, status.done, status.left) == (12, 12, 0)
    assert measured(tmp_path / "out") == alone
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_group_that_was_stopped_goes_on(images, alone, tmp_path):
    stop = Event()

    def progress(status):
        if status.done:
            stop.set()

    first = sweep(plan(images), tmp_path / "out", workers=1, together=4, stop=stop, progress=progress)
    assert 0 < first.done < 12
    assert sweep(plan(images), tmp_path / "out", workers=1, together=4).done == 12
    assert measured(tmp_path / "out") == alone


def test_groups_have_one_size_method_and_density(images, small):
    unfolded = plan([*images, small], densities=(0.2, 0.5)).unfold()
    experiments = {experiment.key: experiment for experiment in unfolded}
    groups = grouped(experiments, 3)
    assert sorted(key for group in groups for key in group) == sorted(experiments)
    assert max(map(len, groups)) == 3
    for group in groups:
        own = [experiments[key] for key in group]
        assert len({(e.kind, e.config.density, "small" in e.image) for e in own}) == 1
    assert grouped(experiments, 1) == [(key,) for key in experiments]


def test_what_its_rule_ends_stays_alone(images):
    obeyed = plan(images, methods={"dense": METHODS["dense"] | {"run_on": False}})
    assert {len(group) for group in grouped({e.key: e for e in obeyed.unfold()}, 8)} == {1}


def test_an_image_that_cannot_be_read_stays_alone(images, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    experiments = {e.key: e for e in plan([*images, str(tmp_path / "torn.png")]).unfold()}
    torn = {key for key, experiment in experiments.items() if experiment.image == "torn"}
    assert torn and all(len(group) == 1 for group in grouped(experiments, 8) if torn & set(group))


def test_fewer_than_one_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="together: expected 1 or more, got 0"):
        sweep(plan(images), tmp_path / "out", together=0)
