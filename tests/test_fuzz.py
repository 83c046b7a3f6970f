"""Any bytes in place of a mask, checkpoint, configuration or image are read or refused in one line.

None makes a reader crash or ask for memory without bound.
"""

import json
import math
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import bare_tiff, encoded, png_chunk, png_file, tiff
from PIL import Image
from problems import problem, random_mask, small_net

import sparse_gen as sg
from sparse_gen.checkpoint import VERSION, OtherRunError
from sparse_gen.experiments import DenoiseConfig, read_image
from sparse_gen.tensorfile import read_tensors, write_tensors

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
MEGABYTE = 2**20


@contextmanager
def little_memory(megabytes: int):
    """Let the process ask for so much more inside the block, and then fail with a MemoryError or a crash."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * MEGABYTE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_read(read: Callable[[], object], megabytes: int) -> bool:
    """Whether a file is read; if it is not, the error is one of the two kinds and one line."""
    try:
        with little_memory(megabytes):
            read()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        assert 10 < len(str(error)) < 1500
        assert "expected" in str(error)
        return False
    return True


@st.composite
def mutations(draw) -> list[tuple]:
    """One to four changes of bytes, at places given as fractions of the length."""
    place = st.floats(0, 1, exclude_max=True)
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("set"), place, st.sampled_from(EXTREMES)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("remove"), place, st.integers(1, 64)),
        st.tuples(st.just("repeat"), place, st.integers(1, 64)),
        st.tuples(st.just("cut"), place, st.just(0)),
        st.tuples(st.just("digit"), place, st.sampled_from(b'0123456789-.e[]{}",:&*<! ')),
    )
    return draw(st.lists(change, min_size=1, max_size=4))


EXTREMES = [
    struct.pack(order + kind, value)
    for order in "<>"
    for kind, value in [("Q", 2**63), ("Q", 2**64 - 1), ("I", 2**31 - 1), ("I", 2**32 - 1), ("H", 2**16 - 1), ("Q", 0)]
]


def mutate(content: bytes, changes: list[tuple]) -> bytes:
    data = bytearray(content)
    for kind, place, value in changes:
        at = int(place * len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "set":
            data[at : at + len(value)] = value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "remove":
            del data[at : at + value]
        elif kind == "repeat":
            data[at:at] = data[at : at + value]
        elif kind == "cut":
            del data[at:]
        elif kind == "digit" and data:
            data[at] = value
    return bytes(data)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([2**63, -1, 10**40, math.inf, math.nan]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture(scope="module")
def masks(folder):
    """Two masks' bytes: one of a search with weights and recipe, one of two experiments without."""
    z, y, _ = problem()
    net = small_net(channels=(3, 4))
    sg.search_mask(net, z, y, density=0.3, steps=1, recipe={"z": {"seed": 0}}).mask.save(folder / "a")
    random_mask(net, experiments=2).save(folder / "b")
    return [(folder / name).read_bytes() for name in "ab"]


@settings(FUZZ, max_examples=400)
@given(which=st.integers(0, 1), changes=mutations())
def test_mutated_masks(folder, masks, which, changes):
    path, read = folder / "mask.safetensors", []
    path.write_bytes(mutate(masks[which], changes))
    if is_read(lambda: read.append(sg.Mask.load(path)), 64):
        # Only white space of the JSON, or nothing in the end, has changed.
        assert same_masks(read[0], sg.Mask.load(folder / "ab"[which]))


def same_masks(a: sg.Mask, b: sg.Mask) -> bool:
    tensors = [[*mask.tensors.items(), *(mask.weights or {}).items()] for mask in (a, b)]
    equal = all(n == m and torch.equal(s, t) for (n, s), (m, t) in zip(*tensors, strict=True))
    return equal and (a.recipe, a.whole, a.experiments) == (b.recipe, b.whole, b.experiments)


@FUZZ
@given(data=st.data())
def test_masks_whose_header_says_anything(folder, masks, data):
    """Stamped with the right checksum, as another program might write them."""
    path = folder / "header.safetensors"
    header, tensors = read_tensors(folder / "a", kind="mask", version=1)
    version = header.pop("version")
    key = data.draw(st.sampled_from([*header]))
    if isinstance(header[key], dict) and header[key] and data.draw(st.booleans()):
        header[key] = header[key] | {data.draw(st.sampled_from([*header[key]])): data.draw(anything)}
    else:
        header[key] = data.draw(anything)
    write_tensors(path, tensors, kind="mask", version=version, header=header)
    is_read(lambda: str(sg.Mask.load(path)), 64)


types = st.sampled_from(
    ["BOOL", "U8", "I8", "F8_E4M3", "F4", "F16", "BF16", "F32", "F64", "I64", "U64", "C64", "X", ""]
)


@FUZZ
@given(
    shape=st.lists(st.integers(0, 2**64) | st.sampled_from([0, 1, 2**31, 2**63, -1]), max_size=4),
    type=types,
    begin=st.integers(0, 2**40) | st.just(0),
    length=st.integers(0, 2**64) | st.sampled_from([0, 8, 2**63]),
    key=st.sampled_from(["sparse-gen mask", "sparse-gen checkpoint", "x"]),
)
def test_tensors_that_claim_anything(folder, shape, type, begin, length, key):
    entry = {"dtype": type, "shape": shape, "data_offsets": [begin, begin + length]}
    claims = json.dumps({"__metadata__": {key: "0 {}"}, "mask/a": entry}).encode()
    path = folder / "claims.safetensors"
    path.write_bytes(struct.pack("<Q", len(claims)) + claims + bytes(8))
    assert not is_read(lambda: sg.Mask.load(path), 64)


@pytest.fixture(scope="module")
def runs(folder):
    """Of a search and a fit, the path of the newest checkpoint and its bytes."""
    z, y, clean = problem()
    net = small_net(channels=(3, 4))
    checkpoints = [sg.Checkpoints(folder / name, seconds=0) for name in ("search", "fit")]
    sg.search_mask(net, z, y, density=0.3, steps=2, stop=sg.stop.Settled(4, 0.0), checkpoints=checkpoints[0])
    fast = sg.compile(net, random_mask(net), z)
    sg.fit(fast, z, y, steps=2, clean=clean, stop=sg.stop.WMV(3, 100), checkpoints=checkpoints[1])
    return [newest(each.folder) for each in checkpoints]


def newest(where: Path) -> tuple[Path, bytes]:
    older, newer = sorted(where.glob("*.safetensors"))  # and not the plan that lies beside them
    older.unlink()
    return newer, newer.read_bytes()


@settings(FUZZ, max_examples=100)
@given(which=st.integers(0, 1), changes=mutations())
def test_mutated_checkpoints(runs, which, changes):
    path, content = runs[which]
    damaged = mutate(content, changes)
    path.write_bytes(damaged)
    name = path.name.split("-")[0]
    checkpoints = sg.Checkpoints(path.parent, resume=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with little_memory(64):
                state = checkpoints.load(name, {})
        except OtherRunError as error:  # sound, but here asked for without settings
            assert "\n" not in str(error)
        else:
            assert state is None
            (warning,) = warned
            assert warning.category is RuntimeWarning
            assert "\n" not in str(warning.message)
            assert damaged != content


@FUZZ
@given(data=st.data())
def test_checkpoints_whose_header_says_anything(folder, runs, data):
    path, content = runs[data.draw(st.integers(0, 1))]
    path.write_bytes(content)
    header, tensors = read_tensors(path, kind="checkpoint", version=VERSION)
    identity = header["identity"]
    version = header.pop("version")
    header[data.draw(st.sampled_from([*header]))] = data.draw(anything)
    write_tensors(path, tensors, kind="checkpoint", version=version, header=header)
    checkpoints = sg.Checkpoints(path.parent, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_read(lambda: checkpoints.load(path.name.split("-")[0], identity), 64)


CONFIG = """\
# a comment
image: photo.png
sigma: 0.1
clip: true
density: 5e-2
search_steps: 1000
channels: [16, 32, 64]
device: "auto"
depth: ~
force: no
stop: wmv
input_scale: +.1
"""


@settings(FUZZ, max_examples=400)
@given(changes=mutations())
def test_mutated_configurations(folder, changes):
    path = folder / "config.yaml"
    path.write_bytes(mutate(CONFIG.encode(), changes))
    is_read(lambda: DenoiseConfig.load(path), 64)


YAML_WORDS = [
    *[
        "- ",
        "? ",
        ": ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "<<: ",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "#",
    ],
    *["!!int ", "!!float ", "!!set ", "!!omap ", "!!timestamp ", "!!binary ", "!!bool ", "!!python/name:os.system "],
    *["seed", "image", "1", "1:2", "0x", "1e999", ".inf", ".nan", "~", "2001-99-99", "| ", "> ", "'", '"', "\t", "\\x"],
]


@settings(FUZZ, max_examples=400)
@given(words=st.lists(st.sampled_from(YAML_WORDS), max_size=30))
def test_configurations_of_any_words(folder, words):
    path = folder / "words.yaml"
    path.write_bytes("".join(words).encode())
    is_read(lambda: DenoiseConfig.load(path), 64)


def images() -> dict[str, bytes]:
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 4), dtype=np.uint16)
    small = Image.fromarray((values >> 8).astype(np.uint8)[..., :3])
    floats = (values[..., :3] / 65535).astype(np.float32)
    return {
        "8-bit PNG": encoded(small, "PNG", icc_profile=b"profile"),
        "palette PNG": encoded(small.quantize(4), "PNG"),
        "16-bit PNG": png_file(values, 16, png_chunk(b"iCCP", b"p\0\0" + zlib.compress(b"profile"))),
        "1-bit PNG": png_file(values[..., :1] >> 15, 1, png_chunk(b"tRNS", b"\0\1")),
        "JPEG": encoded(small, "JPEG"),
        "8-bit TIFF": encoded(small, "TIFF"),
        "LZW TIFF": encoded(small, "TIFF", compression="tiff_lzw"),
        "16-bit TIFF": tiff(values),
        "deflated TIFF": tiff(values, compression="zlib", predictor=2, rowsperstrip=2),
        "tiled TIFF": tiff(floats, tile=(16, 16), compression="zlib"),
        "float TIFF": tiff(floats),
    }  # fmt: skip


IMAGES = images()


@settings(FUZZ, max_examples=700)
@given(which=st.sampled_from([*IMAGES]), changes=mutations(), sealed=st.booleans())
def test_mutated_images(folder, which, changes, sealed, capfd):
    content = mutate(IMAGES[which], changes)
    path = folder / "image"
    path.write_bytes(seal(content) if sealed and "PNG" in which else content)
    # Ten thousand pixels a byte of the file may be asked for, as a blank PNG of one bit has.
    is_read(lambda: read_image(path), 512)
    assert capfd.readouterr() == ("", "")


def seal(content: bytes) -> bytes:
    """Give the chunks of a mutated PNG the checksums of what is in them, so that a decoder goes on."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def unfolding(first: str, entry: str, levels: int) -> bytes:
    """Nine times nine times nine, as often as there are levels."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {entry}".replace("*", ", ".join([f"*a{i - 1}"] * 9)) for i in range(1, levels)]
    return "\n".join(lines).encode()


@cache
def bombs() -> dict[str, tuple[str, bytes]]:
    """What is small and asks for very much: who reads it, and the file."""
    zeros = zlib.compress(bytes(400 * MEGABYTE))
    nested = json.dumps({"__metadata__": {"sparse-gen mask": "0 " + "[" * 10**6}}).encode()
    outside = b'{"a":' * 10**5
    grey, colour = np.zeros((5, 7, 1), np.uint8), np.zeros((5, 7, 3), np.uint16)
    claim = png_file(np.broadcast_to(np.uint8(0), (13_000, 13_000, 4)), 16, body=b"\0")
    start = png_file(colour, 16)[:33]
    return {
        "mask with a header of 2^63 bytes": ("mask", struct.pack("<Q", 2**63) + b"{}"),
        "mask with nested JSON": ("mask", struct.pack("<Q", len(nested)) + nested),
        "mask with nested JSON around": ("mask", struct.pack("<Q", len(outside)) + outside),
        "config that unfolds": ("config", unfolding("[x, x, x]", "[*]", 40)),
        "config that merges": ("config", unfolding("{x: 1, y: 2}", "{<<: [*]}", 12)),
        "config that nests lists": ("config", b"image: " + b"[" * 500_000),
        "config that nests blocks": ("config", b"- " * 250_000),
        "config with a number to base 60": ("config", b"seed: 1" + b":59" * 300_000),
        "config with long digits": ("config", b"image: a\nseed: " + b"9" * 10**6),
        "config with long hexadecimals": ("config", b"image: a\nseed: 0x" + b"f" * 10**6),
        "PNG that claims 169 megapixels": ("image", claim),
        "16-bit PNG that inflates": ("image", start + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")),
        "PNG with a profile that inflates": ("image", png_file(grey, 8, png_chunk(b"iCCP", b"p\0\0" + zeros))),
        "PNG with text that inflates": ("image", png_file(grey, 8, png_chunk(b"zTXt", b"p\0\0" + zeros))),
        "TIFF that inflates": ("image", bare_tiff(zeros)),
        "TIFF that claims 169 megapixels": ("image", bare_tiff(zlib.compress(b""), width=13_000, height=13_000)),
        "TIFF of four billion rows": ("image", bare_tiff(zlib.compress(bytes(128)), height=2**32 - 1)),
        "TIFF of four billion channels": ("image", bare_tiff(zlib.compress(bytes(128)), channels=2**32 - 1)),
        "TIFF of four billion bytes": ("image", bare_tiff(zlib.compress(bytes(128)), count=2**32 - 1, compression=1)),
    }


READERS = {
    "mask": lambda path: sg.Mask.load(path),
    "config": lambda path: DenoiseConfig.load(path),
    "image": lambda path: read_image(path),
}


def test_the_tiff_by_hand_is_one(folder):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (folder / "sound.tif").write_bytes(bare_tiff(zlib.compress(values.tobytes())))
    np.testing.assert_array_equal(read_image(folder / "sound.tif").pixels[0, 0] * 65535, values)


@pytest.mark.parametrize("name", bombs())
def test_what_asks_for_very_much_is_refused_with_little(folder, name):
    kind, content = bombs()[name]
    path = folder / "bomb"
    path.write_bytes(content)
    assert not is_read(lambda: READERS[kind](path), 64)


def test_a_blank_picture_is_no_bomb(folder):
    """The largest that its bytes can hold: a megapixel in 200 bytes."""
    path = folder / "blank.png"
    path.write_bytes(encoded(Image.new("1", (1000, 1000)), "PNG", compress_level=9))
    assert path.stat().st_size < 300
    assert not read_image(path).pixels.any()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is limited")
def test_the_limit_limits():
    """What was freed before may be had again; a gigabyte was not."""
    with pytest.raises(MemoryError), little_memory(64):
        bytearray(1000 * MEGABYTE)
    assert bytearray(1000 * MEGABYTE)
