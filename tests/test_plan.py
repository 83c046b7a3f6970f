"""A sweep's plan: checked entry by entry, and unfolded to experiments that share what they are to share."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sparse_gen.cli import sweep as command
from sparse_gen.experiments.images import read_image
from sparse_gen.experiments.plan import Experiment, Plan
from sparse_gen.experiments.problem import choose_depth, pose

EXAMPLE = Path(__file__).parent.parent / "examples" / "sweep.yaml"
METHODS = {
    "OES": {"method": "oes", "lr": 1e-2, "search_steps": 5},
    "random": {"lr": 1e-2},
    "dense": {"lr": 1e-3},
    "dense+WMV": {"method": "dense", "lr": 1e-3, "stop": "wmv", "run_on": False},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[::-1]).save(folder / "b.png")
    return [str(folder / "a.png"), str(folder / "b.png")]


def plan(images, **entries):
    return Plan(**{"images": images, "methods": METHODS, "budget": 20, "device": "cpu", "threads": 1, **entries})


def test_every_combination_once_and_methods_without_density_once_for_all(images):
    unfolded = plan(images, sigmas=[0.1, 0.2], densities=[0.1, 0.5], seeds=[0, 1]).unfold()
    assert len(unfolded) == len({e.key for e in unfolded}) == 2 * 2 * 2 * (2 + 2 + 1 + 1)
    assert {e.config.density for e in unfolded if e.kind == "dense"} == {1}
    assert {e.config.density for e in unfolded if e.kind != "dense"} == {0.1, 0.5}
    assert [e.config.seed for e in unfolded] == sorted(e.config.seed for e in unfolded)
    assert {e.image for e in unfolded} == {"a", "b"}


def test_the_budget_holds_for_all_with_the_search_in_it(images):
    for e in plan(images).unfold():
        assert e.search_steps + e.config.steps == e.budget == 20
        assert e.search_steps == (5 if e.kind == "oes" else 0)


def test_methods_get_the_same_measurement_input_and_weights(images):
    generators = {"hourglass": {"depth": 2, "channels": [4, 6]}, "decoder": {"channels": [8], "depth": 1}}
    experiments = plan(images, generators=generators, seeds=[0, 1], densities=[0.5]).unfold()
    posed = {}
    for e in experiments:
        pixels = read_image(e.config.image).pixels
        problem = pose(e.config.replace(depth=choose_depth(e.config, pixels.shape[-2:])), pixels)
        parts = (problem.noisy, problem.z, *problem.net.parameters())
        posed.setdefault((e.image, e.generator, e.config.seed), []).append(parts)
    assert [len(same) for same in posed.values()] == [len(METHODS)] * 8
    for first, *others in posed.values():
        for other in others:
            assert all(map(torch.equal, first, other))
    noisy = [same[0][0] for same in posed.values()]
    assert len({hashlib.sha256(y.numpy().tobytes()).hexdigest() for y in noisy}) == 4  # image × seed


def test_every_way_to_find_a_mask_has_the_budget(images):
    finding = {"scope": "layer", "floor": 2}
    methods = {
        "magnitude": finding, "snip": finding, "grasp": {}, "synflow": {"rounds": 7},
        "lottery": {"method": "imp", "search_steps": 13, "rounds": 3},
    }  # fmt: skip
    unfolded = plan(images, methods={name: {"lr": 1e-2, **options} for name, options in methods.items()}, seeds=[0])
    experiments = {e.method: e for e in unfolded.unfold()}
    found = {name: e.search_steps for name, e in experiments.items()}
    assert found == {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 7, "lottery": 12}
    assert all(e.search_steps + e.config.steps == 20 for e in experiments.values())
    assert experiments["snip"].finding == finding and experiments["lottery"].finding == {"rounds": 3}
    assert len({e.key for e in experiments.values()}) == 5
    again = plan(images, methods={"snip": {"lr": 1e-2, "floor": 3}}, seeds=[0]).unfold()[0]
    assert again.key not in {e.key for e in experiments.values()}
    assert Experiment.from_plain(json.loads(json.dumps(again.plain()))) == again


def test_no_option_of_a_method_reaches_what_is_shared(images):
    for name in ("sigma", "clip", "seed", "channels", "depth", "generator", "input_scale", "steps", "image", "density"):
        with pytest.raises(ValueError, match=f"methods.dense: expected an option of the method dense, got '{name}'"):
            plan(images, methods={"dense": {"lr": 1e-3, name: 1}})


def test_the_key_is_of_settings_and_bytes_and_not_of_names(images, tmp_path):
    (experiment,) = plan(images[:1], methods={"dense": METHODS["dense"]}, seeds=[0]).unfold()
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(images[0]).read_bytes())
    (renamed,) = plan([str(copy)], methods={"DIP": {"method": "dense", "lr": 1e-3}}, seeds=[0]).unfold()
    assert renamed.key == experiment.key != dataclasses.replace(renamed, run_on=True).key

    def key(**changes):
        return dataclasses.replace(experiment, config=experiment.config.replace(**changes)).key

    changed = [key(lr=2e-3), key(seed=1), key(sigma=0.2), key(threads=2), key(steps=21), key(image_sha256="0" * 64)]
    assert len({experiment.key, *changed}) == 1 + len(changed)
    copy.write_bytes(copy.read_bytes() + b"\0")
    (other,) = plan([str(copy)], methods={"dense": METHODS["dense"]}, seeds=[0]).unfold()
    assert other.key != experiment.key


def test_experiments_and_plans_survive_their_files(images, tmp_path):
    made = plan(images, generators={"deep": {"generator": "decoder", "channels": [8, 4]}}, force=True)
    made.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == made
    for experiment in made.unfold():
        assert Experiment.from_plain(yaml.safe_load(yaml.safe_dump(experiment.plain()))) == experiment


def test_relative_images_are_relative_to_the_plan(images, tmp_path, monkeypatch):
    folder = Path(images[0]).parent
    (folder / "p.yaml").write_text("images: [a.png]\nmethods: {dense: {lr: 1e-3}}\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    assert Plan.load(folder / "p.yaml").images == (images[0],)


def test_images_of_one_name_are_told_apart(images, tmp_path):
    other = tmp_path / "a.png"
    other.write_bytes(Path(images[1]).read_bytes())
    unfolded = plan([images[0], str(other)]).unfold()
    assert {e.image for e in unfolded} == {images[0], str(other)}


def test_the_example_is_the_one_in_the_help_and_loads():
    assert yaml.safe_load(EXAMPLE.read_text()) == yaml.safe_load(command.PLAN)
    loaded = Plan.load(EXAMPLE)
    assert len(loaded.replace(device="cpu").unfold()) == 9
    defaults = Plan(images=loaded.images, methods=loaded.methods)
    assert dataclasses.replace(loaded, generators=defaults.generators) == defaults


def test_a_plan_needs_no_torch():
    code = f"""
import sys
from sparse_gen.experiments.plan import Plan
from sparse_gen.experiments import sweep, sweep_folder, table
assert len(Plan.load({str(EXAMPLE)!r}).replace(device="cpu").unfold()) == 9
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


OES = {"method": "oes", "lr": 1e-2, "search_steps": 5}
BAD = {
    "no method": ({"methods": {}}, "methods: expected names with their options, got {}, write `name: {…}`"),
    "lr left out": (
        {"methods": {"dense": {}}},
        "methods.dense.lr: expected the learning rate to be stated, got none, write it as lr: 1e-2",
    ),
    "lr 0": (
        {"methods": {"dense": {"lr": 0}}},
        "methods.dense.lr: expected a number above 0, got 0, give a positive number",
    ),
    "second method": (
        {"methods": {"dense": {"lr": 1}, "D": {"method": "dense", "lr": "x"}}},
        "methods.D.lr: expected a number above 0, got 'x', give a positive number",
    ),
    "unknown method": (
        {"methods": {"snap": {"lr": 1}}},
        "methods.snap.method: expected oes, dense, random, magnitude, snip, grasp, synflow or imp, got 'snap', use one "
        "of them",
    ),
    "unknown option": (
        {"methods": {"OES": {**OES, "serach_lr": 1}}},
        "methods.OES: expected an option of the method oes, got 'serach_lr', did you mean search_lr?",
    ),
    "option of another method": (
        {"methods": {"dense": {"lr": 1, "temperature": 1}}},
        "methods.dense: expected an option of the method dense, got 'temperature', use method, lr, stop, stop_window, "
        "stop_patience, stop_alpha, run_on, average, input_jitter",
    ),
    "rounds": (
        {"methods": {"synflow": {"lr": 1, "rounds": 0}}},
        "methods.synflow.rounds: expected a whole number from 1 to 1,000,000, got 0, give one in that range",
    ),
    "rounds over the budget": (
        {"methods": {"synflow": {"lr": 1}}},
        "methods.synflow.search_steps: expected fewer than the budget of 20 steps, got 100, leave some for the "
        "training",
    ),
    "rounds over the steps": (
        {"methods": {"imp": {"lr": 1, "search_steps": 3}}},
        "methods.imp.search_steps: expected at least one for each of 5 rounds, got 3, raise it",
    ),
    "scope": (
        {"methods": {"snip": {"lr": 1, "scope": "local"}}},
        "methods.snip.scope: expected global or layer, got 'local', use one of them",
    ),
    "floor": (
        {"methods": {"snip": {"lr": 1, "floor": 1.5}}},
        "methods.snip.floor: expected a count of weights or a share in (0, 1), got 1.5, give one of them",
    ),
    "run_on": (
        {"methods": {"dense": {"lr": 1, "run_on": "yes"}}},
        "methods.dense.run_on: expected true or false, got 'yes', write one of the two",
    ),
    "options no mapping": ({"methods": {"dense": 3}}, "methods.dense: expected options, got 3, write {key: value}"),
    "name no text": ({"methods": {1: {}}}, "methods: expected text as a name, got 1, put it in quotes"),
    "search over the budget": (
        {"methods": {"OES": {**OES, "search_steps": 20}}},
        "methods.OES.search_steps: expected fewer than the budget of 20 steps, got 20, leave some for the training",
    ),
    "generator": (
        {"generators": ["unet"]},
        "generators.unet.generator: expected hourglass, skip or decoder, got 'unet', use one of them",
    ),
    "depth": (
        {"generators": {"h": {"generator": "hourglass", "depth": 0}}},
        "generators.h.depth: expected a whole number from 1 to 16, got 0, give one in that range",
    ),
    "option of a generator": (
        {"generators": {"hourglass": {"widths": [1]}}},
        "generators.hourglass: expected an option of a generator, got 'widths', use generator, depth, channels, "
        "input_channels, input_scale",
    ),
    "sigma": ({"sigmas": [0.1, 25]}, "sigmas: expected a number in [0, 1], got 25, did you mean 25/255 = 0.09804?"),
    "density": ({"densities": [0]}, "densities: expected a number in (0, 1], got 0, "
                "give the fraction of the parameters to keep"),
    "seed": ({"seeds": [0, -1]}, "seeds: expected a whole number from 0 to 9,223,372,036,854,775,807, got -1, "
             "give one in that range"),
    "no list": ({"seeds": 3}, "seeds: expected a list, got 3, write it as [a, b]"),
    "empty list": ({"sigmas": []}, "sigmas: expected a list, got [], write it as [a, b]"),
    "list in a list": ({"seeds": [[0]]}, "seeds: expected plain values in the list, got [0], write them as [a, b]"),
    "twice": ({"seeds": [1, 0, 1]}, "seeds: expected each entry once, got 1 twice, remove one"),
    "budget": ({"budget": 0}, "budget: expected a whole number from 1 to 1,000,000,000, got 0, "
               "give one in that range"),
    "threads": ({"threads": 0}, "threads: expected a whole number from 1 to 1,024, got 0, give one in that range"),
    "too many": ({"seeds": list(range(9999))}, "plan: expected at most 10,000 experiments, got 79,992, "
                 "make several of it"),
    "device": ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'gpu', use one of them"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_named_with_what_to_do(images, name):
    entries, message = BAD[name]
    with pytest.raises(ValueError) as caught:
        plan(images, **entries)
    assert str(caught.value) == message


BAD_FILES = {
    "unknown entry": (
        "images: [a.png]\nmethod: {}\n",
        "plan: expected the name of an entry, got 'method', did you mean methods?",
    ),
    "no images": ("methods: {dense: {lr: 1}}\n", "images: expected at least one, got none in {path}, name one"),
    "no methods": ("images: [a.png]\n", "methods: expected at least one, got none in {path}, name one"),
    "no mapping": ("[1]\n", "plan: expected lines like `density: 0.05`, got [1] in {path}, correct it"),
    "number as image": (
        "images: [3]\nmethods: {dense: {lr: 1}}\n",
        "images: expected the path of a PNG or JPEG, got 3, name one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        Plan.load(path)
    expected = message.replace("{path}", str(path))
    # What images are called is not this file's business.
    assert str(caught.value).split(" a PNG")[0] == expected.split(" a PNG")[0]


def test_missing_images_are_named(images, tmp_path):
    missing = str(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"images: expected image files, got .*none\.png, which is not there"):
        plan([images[0], missing]).unfold()
    with pytest.raises(IsADirectoryError, match="images: expected image files, got the folder"):
        plan([str(tmp_path)]).unfold()
