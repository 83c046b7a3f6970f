"""Every setting is checked, and a file gives back what was saved."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gen.experiments.config import DenoiseConfig
from sparse_gen.experiments.settings import read_settings

WHOLE = "expected a whole number from"
RANGE = "give one in that range"
BAD = [
    ("sigma", 25, "expected a number in [0, 1], got 25, did you mean 25/255 = 0.09804?"),
    ("sigma", -0.1, "expected a number in [0, 1], got -0.1, give it on the image's scale"),
    ("sigma", 1000, "expected a number in [0, 1], got 1000, give it on the image's scale"),
    ("sigma", "0,1", "expected a number in [0, 1], got '0,1', give it on the image's scale"),
    ("density", 0, "expected a number in (0, 1], got 0, give the fraction of the parameters to keep"),
    ("density", 5, "expected a number in (0, 1], got 5, did you mean 5 % = 0.05?"),
    ("density", float("nan"), "expected a number in (0, 1], got nan, give the fraction of the parameters to keep"),
    ("density", True, "expected a number in (0, 1], got True, give the fraction of the parameters to keep"),
    ("density", None, "expected a number in (0, 1], got null, give the fraction of the parameters to keep"),
    ("search_steps", 0, f"{WHOLE} 1 to 1,000,000,000, got 0, {RANGE}"),
    ("steps", -5, f"{WHOLE} 1 to 1,000,000,000, got -5, {RANGE}"),
    ("steps", 2.5, f"{WHOLE} 1 to 1,000,000,000, got 2.5, {RANGE}"),
    ("steps", "many", f"{WHOLE} 1 to 1,000,000,000, got 'many', {RANGE}"),
    ("every", 0, f"{WHOLE} 1 to 1,000,000,000, got 0, {RANGE}"),
    ("search_lr", 0, "expected a number above 0, got 0, give a positive number"),
    ("lr", float("inf"), "expected a number above 0, got inf, give a positive number"),
    ("lr", 10**400, "expected a number above 0, got 100000000000000000...0000000000000000000, give a positive number"),
    ("kl_weight", -1, "expected a number from 0, got -1, give 0 or a positive number"),
    ("temperature", 0, "expected a number above 0, got 0, give a positive number"),
    ("prior", 1, "expected a number in (0, 1), got 1, leave it out"),
    ("prunable", "weights", "expected conv_weights or all, got 'weights', use one of them"),
    ("stop", "es", "expected none, wmv or emv, got 'es', use one of them"),
    ("stop_window", 1, f"{WHOLE} 2 to 1,000,000, got 1, {RANGE}"),
    ("stop_patience", 0, f"{WHOLE} 1 to 1,000,000,000, got 0, {RANGE}"),
    ("stop_alpha", 1, "expected a number in (0, 1), got 1, leave it out"),
    ("average", 1.5, "expected a number in (0, 1), got 1.5, leave it out"),
    ("input_jitter", -0.1, "expected a number from 0, got -0.1, give 0 or a positive number"),
    ("rings", 0, f"{WHOLE} 1 to 1,000, got 0, {RANGE}"),
    ("generator", "unet", "expected hourglass, skip or decoder, got 'unet', use one of them"),
    ("seed", -1, f"{WHOLE} 0 to 9,223,372,036,854,775,807, got -1, {RANGE}"),
    ("device", "gpu", "expected auto, cpu, cuda or cuda:N, got 'gpu', use one of them"),
    ("threads", 0, f"{WHOLE} 1 to 1,024, got 0, {RANGE}"),
    ("depth", 99, f"{WHOLE} 1 to 16, got 99, {RANGE}"),
    ("channels", [], "expected 1 to 16 whole numbers, got [], write them as [16, 32, 64]"),
    ("channels", 16, "expected 1 to 16 whole numbers, got 16, write them as [16, 32, 64]"),
    ("channels", [16, 0], f"{WHOLE} 1 to 4,096, got 0, {RANGE}"),
    ("input_channels", 0, f"{WHOLE} 1 to 4,096, got 0, {RANGE}"),
    ("input_scale", 0, "expected a number above 0, got 0, give a positive number"),
    ("clip", "yes", "expected true or false, got 'yes', write one of the two"),
    ("force", 1, "expected true or false, got 1, write one of the two"),
    ("image", 3, "expected the path of a PNG, JPEG or TIFF, got 3, name one"),
    ("image_sha256", "abc", "expected 64 hexadecimal digits, got 'abc', remove it to accept any image"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_is_named_with_what_to_do(name, value, message):
    with pytest.raises(ValueError) as caught:
        DenoiseConfig(**{"image": "a.png", name: value})
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma", 0), ("sigma", 1), ("density", 1), ("seed", 2**63 - 1), ("kl_weight", 0), ("device", "cuda:3")],
)
def test_the_ends_of_the_ranges_belong_to_them(name, value):
    assert getattr(DenoiseConfig(image="a.png", **{name: value}), name) == value


def test_what_is_saved_is_loaded(tmp_path):
    config = DenoiseConfig(
        image="/a folder/ü: #1.png", image_sha256="0" * 64, sigma=25 / 255, kl_weight=1e-7, lr=1.0 / 3,
        search_steps=7, seed=2**63 - 1, depth=2, channels=(4, 8), prior=0.2, device="cuda:1", threads=3, force=True,
        stop="emv", stop_alpha=0.3, average=0.99, input_jitter=1.0 / 30, rings=None, generator="skip",
    )  # fmt: skip
    config.save(tmp_path / "config.yaml")
    assert DenoiseConfig.load(tmp_path / "config.yaml") == config


def test_settings_left_out_keep_their_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("image: a.png\nlr: 1e-3\nsearch_lr: 5E-2\n")
    loaded = DenoiseConfig.load(tmp_path / "c.yaml")
    assert loaded == DenoiseConfig(image="a.png", lr=1e-3, search_lr=0.05)


def test_defaults_are_those_of_the_functions_they_reach():
    """So that a script and the command line do the same."""
    import inspect

    import sparse_gen as sg
    from sparse_gen.masks.search import PRESETS

    config = DenoiseConfig(image="a.png")
    quick = PRESETS["quick"]
    assert (config.search_steps, config.search_lr, config.kl_weight, config.prunable) == (
        quick["steps"], quick["lr"], quick["kl_weight"], quick["prunable"],
    )  # fmt: skip

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert config.density == default(sg.search_mask, "density")
    assert config.temperature == default(sg.search_mask, "temperature")
    assert (config.steps, config.lr) == (default(sg.fit, "steps"), default(sg.fit, "lr"))
    assert (config.average, config.input_jitter) == (default(sg.fit, "average"), default(sg.fit, "input_jitter"))
    assert (config.stop_window, config.stop_patience) == (
        default(sg.stop.WMV, "window"), default(sg.stop.WMV, "patience"),
    )  # fmt: skip
    assert (config.stop_alpha, config.stop_patience) == (
        default(sg.stop.EMV, "alpha"),
        default(sg.stop.EMV, "patience"),
    )
    assert config.channels is None and config.input_channels is None  # the generator's own
    assert config.input_scale == default(sg.noise_input, "scale")


BAD_FILES = {
    "unknown key": (b"image: a.png\nsearch_step: 3\n", "got 'search_step', did you mean search_steps?"),
    "no such key at all": (b"image: a.png\nzzz: 3\n", "got 'zzz', use image, image_sha256, "),
    "number as key": (b"image: a.png\n3: 3\n", "expected the name of a setting, got 3, use image, "),
    "twice": (b"seed: 1\nseed: 2\n", "line 2: seed is set twice"),
    "no image": (b"seed: 1\n", "image: expected the path of a PNG, JPEG or TIFF, got none, name one"),
    "merge key": (b"a: &a {seed: 1}\n<<: *a\n", "line 2: merging (<<) is not read, correct it"),
    "time of day": (b"seed: 12:30\n", "line 1: '12:30' would be a number to base 60, quote it if it is text, correct"),
    "time in seconds": (b"lr: 1:30.5\n", "line 1: '1:30.5' would be a number to base 60, quote it if it is text"),
    "endless digits": (b"image: a.png\nseed: 0x" + b"f" * 5000, "seed: expected a whole number from 0 to "
                       "9,223,372,036,854,775,807, got a number of thousands of digits, give one in that range"),
    "a list": (b"- 1\n- 2\n", "expected lines like `density: 0.05`, got [1, 2] in"),
    "nothing": (b"", "expected lines like `density: 0.05`, got null in"),
    "torn": (b"channels: [1, 2\n", "line 2: expected ',' or ']'"),
    "not text": (b"\x89PNG\r\n\x1a\n", "with what YAML does not allow at position 0, correct it"),
    "an object": (b"a: !!python/object:os.system {}\n", "could not determine a constructor"),
    "a list as key": (b"? [1]\n: 2\n", "found unhashable key"),
    "deep": (b"a: " + b"[" * 10_000, "expected lines like `density: 0.05`, got"),
    "no truth": (b"a: !!bool maybe\n", "correct it"),
    "no time": (b"a: !!timestamp now\n", "correct it"),
    "no number": (b"a: !!int ''\n", "correct it"),
    "huge": (b"a: " + b"x" * 2**20, "of over a megabyte, name another"),
    "impossible date": (b"a: 2001-99-99\n", "month must be in 1..12"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name):
    content, reason = BAD_FILES[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        DenoiseConfig.load(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_value_that_unfolds_to_gigabytes_makes_a_short_message(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "image: *a11"]))
    with pytest.raises(ValueError, match="expected the name of a setting, got 'a0'"):
        DenoiseConfig.load(tmp_path / "c.yaml")
    values = read_settings(tmp_path / "c.yaml")
    with pytest.raises(ValueError) as caught:
        DenoiseConfig(image=values["image"])
    assert len(str(caught.value)) < 600


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: expected a YAML file, got .*c\.yaml, which is not there"):
        DenoiseConfig.load(tmp_path / "c.yaml")
    with pytest.raises(IsADirectoryError, match="config: expected a YAML file, got the folder"):
        DenoiseConfig.load(tmp_path)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_settings_or_a_value_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_settings(path), dict)
    except ValueError as error:
        assert "\n" not in str(error)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from([field.name for field in dataclasses.fields(DenoiseConfig)])


@given(values=st.dictionaries(names, plain | st.lists(plain, max_size=3)))
def test_any_plain_values_are_a_configuration_or_a_value_error(values):
    try:
        config = DenoiseConfig.from_mapping(values)
    except ValueError as error:
        assert "expected" in str(error) and "got" in str(error)
    else:
        assert DenoiseConfig.from_mapping(dataclasses.asdict(config)) == config
