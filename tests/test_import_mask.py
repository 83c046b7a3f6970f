"""Masks of others: what is read, and that nothing in a file is executed or believed."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from pickled import SAVE
from problems import small_net

import sparse_gen as sg
from sparse_gen.cli import main
from sparse_gen.masks.pickles import UnreadablePickle, read_pickled_tensors


def masks(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(p.shape, generator=generator) < 0.3).float() for p in net.parameters()]


def packed(path, tensors, **changes):
    flat = torch.cat([t.flatten() for t in tensors]).bool().numpy()
    shapes = json.dumps([list(t.shape) for t in tensors])
    np.savez_compressed(path, **{"bits": np.packbits(flat), "numel": flat.size, "shapes": shapes, **changes})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mask.pkl"


def refusal(path, net=None):
    with pytest.raises(ValueError) as caught:
        sg.masks.import_mask(path, small_net() if net is None else net)
    message = str(caught.value)
    start = f"expected a published mask, got {path}, "
    assert message.startswith(start)
    return message.removeprefix(start)


# -- what is read


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32, torch.float64, torch.bfloat16])
def test_every_layout_gives_the_mask(file, form, flat, dtype):
    net = small_net()
    tensors = [t.to(dtype) for t in masks(net)]
    SAVE[form](torch.cat([t.flatten() for t in tensors]) if flat else tensors, file)
    mask = sg.masks.import_mask(file, net)
    mask.check_fits(net)
    assert list(mask.tensors) == [name for name, _ in net.named_parameters()]
    assert all(torch.equal(keep, t.bool()) for keep, t in zip(mask.tensors.values(), tensors, strict=True))
    assert mask.weights is None
    assert "seed" not in mask.recipe["net"]["arguments"]


def test_the_packed_form_gives_the_mask(tmp_path):
    net = small_net()
    packed(tmp_path / "mask.npz", masks(net))
    mask = sg.masks.import_mask(tmp_path / "mask.npz", net)
    assert all(torch.equal(keep, t.bool()) for keep, t in zip(mask.tensors.values(), masks(net), strict=True))
    assert mask.recipe["import"]["layout"] == "packed"


@pytest.mark.parametrize("form", SAVE)
def test_views_parameters_and_dicts(file, form):
    """A transposed, an offset and a shared tensor, as a state dict might hold them."""
    base = torch.arange(24.0).view(4, 6)
    value = {"t": base.T, "part": base[1:3, 2:], "again": base, "p": torch.nn.Parameter(base[0]), "n": 3}
    SAVE[form](value, file)
    found = read_pickled_tensors(file.read_bytes())
    assert found.pop("n") == value.pop("n")
    assert found.keys() == value.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in value.items())


def test_tensors_of_a_gpu_come_to_the_cpu(file):
    """The device is only text in the file; this one is changed to name a GPU that need not be there."""
    SAVE["legacy"](masks(small_net()), file)
    content = file.read_bytes()
    assert content.count(b"X\x03\x00\x00\x00cpu") == 1
    file.write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    mask = sg.masks.import_mask(file, small_net())
    assert {keep.device.type for keep in mask.tensors.values()} == {"cpu"}


# -- what is refused


class Command:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_crafted_object_is_dangerous(tmp_path):
    """Otherwise the tests below would show nothing."""
    pickle.loads(pickle.dumps(Command(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", SAVE)
def test_a_command_is_refused_by_name_and_not_run(tmp_path, file, form):
    SAVE[form]([torch.zeros(3), Command(tmp_path / "ran")], file)
    assert refusal(file) == f"which asks for {os.mkdir.__module__}.mkdir, more than tensors need, refused"
    assert not (tmp_path / "ran").exists()


def test_a_command_inside_of_a_storage_is_refused(tmp_path, file):
    inner = pickle.dumps(Command(tmp_path / "ran"))

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    file.write_bytes(pickle.dumps([Nested()]))
    assert "mkdir, more than tensors need, refused" in refusal(file)
    assert not (tmp_path / "ran").exists()


PROGRAMS = {
    "builtins.eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bos.getcwd.x\x93.",
    "torch.load": b"ctorch\nload\n(S'x'\ntR.",
    "setting attributes": b"ccollections\nOrderedDict\n)R}b.",
    "an instance": b"(icollections\nOrderedDict\n.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a reference outside": b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06tQ.",
    "a dict of something": b"ccollections\nOrderedDict\n(]tR.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "a storage of text": b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x00a\x85R.",
    "a memo of 4,294,967,295": b"\x80\x02}(r\xff\xff\xff\xffK\x01K\x02.",
    "text of 2^60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",
    "a number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "lists in lists": b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
    "a list in itself": pickle.dumps((lambda own: own.append(own) or own)([]), 2),
    "no storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00K\x03\x85K\x01\x85\x89NtR.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_refused(file, name):
    file.write_bytes(PROGRAMS[name])
    assert refusal(file).startswith("which ")


@pytest.mark.parametrize("form", [*SAVE, "npz"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.999])
def test_a_file_cut_off_is_refused(file, form, part):
    tensors = masks(small_net())
    (packed if form == "npz" else lambda p, t: SAVE[form](t, p))(file.with_suffix(".npz"), tensors)
    content = file.with_suffix(".npz").read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    assert refusal(file).endswith("fetch it again")


@pytest.mark.parametrize("form", SAVE)
def test_flipped_bits_never_execute_and_never_crash(file, form):
    """A damaged file is a mask of the same shapes or a ValueError; whatever else comes is a bug of the reader."""
    net = small_net(channels=(2,), in_channels=1)
    SAVE[form](masks(net), file)
    content = bytearray(file.read_bytes())
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.choice(len(content), size=min(len(content), 400), replace=False):
        damaged = content.copy()
        damaged[position] ^= 1 << generator.integers(8)
        try:
            read_pickled_tensors(bytes(damaged))
        except UnreadablePickle:
            refused += 1
    assert refused > 20


def claim(storage: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A legacy file with one float of data, that says it has a storage and a tensor of these sizes."""
    numbers = "".join(f"L{n}L\n" for n in shape), "".join(f"L{n}L\n" for n in stride)
    program = (
        "ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n"
        f"L{storage}L\nNt\x51I0\n({numbers[0]}t({numbers[1]}tI00\nNtR."
    )
    head = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + program.encode() + pickle.dumps(["0"], 2) + struct.pack("<qf", storage, 1.0)


def test_the_crafted_file_is_otherwise_sound(file):
    file.write_bytes(claim(1, (1,), (1,)))
    assert torch.equal(read_pickled_tensors(file.read_bytes()), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10**12, (10**12,), (1,)), "claims 4,000,000,000,000 bytes for a tensor and has 4"),
        ((2, (2,), (1,)), "claims 8 bytes for a tensor and has 4"),
        ((1, (10**6, 10**6), (0, 0)), "claims a tensor of 1000000×1000000 in a storage of 1"),
        ((1, (2,), (0,)), "claims a tensor of 2 in a storage of 1"),
        ((1, (1, 1), (1,)), "a tensor without a storage, a shape or strides"),
        ((1, (-1,), (1,)), "a tensor without a storage, a shape or strides"),
        ((4, (2, 2), (1, 3)), "claims a tensor of 2×2 in a storage of 4"),
    ],
)
def test_more_claimed_than_there_is(file, arguments, message):
    file.write_bytes(claim(*arguments))
    assert message in refusal(file)


def test_a_zip_that_claims_more_than_its_storage(file):
    SAVE["zip"]([torch.ones(64)], file)
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:8] if name.endswith("/data/0") else content)
    assert refusal(file) == "which claims 256 bytes for a tensor and has 8, fetch it again"


def test_a_compressed_zip_is_not_unpacked(file):
    SAVE["zip"]([torch.ones(64)], file)
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert refusal(file) == "a zip that torch.save did not write"


def test_lists_of_lists_do_not_grow_beyond_the_file(file):
    value = [torch.ones(8)]
    for _ in range(7):
        value = [value] * 100
    file.write_bytes(pickle.dumps(value))
    assert "repeats them" in refusal(file)


def test_wrong_shapes_are_refused_with_both_lists(file):
    SAVE["zip"](masks(small_net(in_channels=5)), file)
    message = refusal(file)
    for net in (small_net(), small_net(in_channels=5)):
        shapes = ["×".join(map(str, p.shape)) for p in net.parameters()]
        assert f"{len(shapes)} shapes: {', '.join(shapes)}" in message
    SAVE["zip"](torch.ones(7), file)
    total = sum(p.numel() for p in small_net().parameters())
    assert f"expected 1 shapes: {total}, got 1 shapes: 7" in refusal(file)


def test_what_is_no_mask_is_refused(file):
    tensors = masks(small_net())
    tensors[3][0] = 0.5
    SAVE["zip"](tensors, file)
    assert refusal(file) == "which holds other numbers than 0 and 1"
    for value in ([], ["a"], {"a": torch.ones(3)}, 3):
        file.write_bytes(pickle.dumps(value))
        assert refusal(file) == "which holds something else than tensors"


def npy(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """An array's header, and four bytes."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": descr, "fortran_order": False, "shape": shape})
    return data.getvalue() + b"\0" * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy((10**12,)), "whose bits claims 1,000,000,000,000 bytes and has 4"),
        (npy((3,)), "whose bits claims 3 bytes and has 4"),
        (npy((4,), "|O"), "whose bits is an array of objects, refused"),
        (b"not an array", "which is cut off or damaged"),
        (None, "an .npz without bits"),
    ],
)
def test_a_crafted_npz_is_refused(tmp_path, content, message):
    packed(tmp_path / "sound.npz", masks(small_net()))
    with zipfile.ZipFile(tmp_path / "sound.npz") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "mask.npz", "w") as archive:
        for name, sound in entries.items():
            if name != "bits.npy" or content is not None:
                archive.writestr(name, content if name == "bits.npy" else sound)
    assert refusal(tmp_path / "mask.npz").startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numel": 10**9}, "bytes of bits make no mask of 1000000000 entries"),
        ({"bits": np.zeros(3, np.uint8)}, "whose 3 bytes of bits make no mask"),
        ({"shapes": "[[3, 4]]"}, "have not"),
        ({"shapes": "[[-3]]"}, "no lists of positive numbers"),
        ({"shapes": "[" * 3000}, "cut off or damaged"),
        ({"shapes": "3"}, "cut off or damaged"),
    ],
)
def test_an_npz_whose_parts_do_not_fit_is_refused(tmp_path, changes, message):
    packed(tmp_path / "mask.npz", masks(small_net()), **changes)
    assert message in refusal(tmp_path / "mask.npz")


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    array = np.empty(1, object)
    array[0] = Command(tmp_path / "ran")
    packed(tmp_path / "mask.npz", masks(small_net()), bits=array)
    assert refusal(tmp_path / "mask.npz") == "whose bits is an array of objects, refused"
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not there, check the name"):
        sg.masks.import_mask(tmp_path / "none.pkl")
    with pytest.raises(IsADirectoryError, match="which is a folder"):
        sg.masks.import_mask(tmp_path)
    with open(tmp_path / "huge.pkl", "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="268,435,457 bytes, more than any mask has"):
        sg.masks.import_mask(tmp_path / "huge.pkl")


# -- the command


def test_the_command_writes_a_mask_and_says_what_it_keeps(tmp_path, file, capsys):
    net = sg.generators.Hourglass(depth=1, out_channels=1)
    SAVE["pickle 2"](masks(net), file)
    out = tmp_path / "new" / "m.safetensors"
    command = ["mask", "import", str(file), "-o", str(out), "--depth", "1", "--out-channels", "1"]
    assert main(command) == 0
    mask = sg.Mask.load(out)
    assert f"{mask.kept:,} of {mask.total:,} weights kept" in capsys.readouterr().out
    assert sg.masks.import_mask(file, net).recipe == mask.recipe
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: output: expected a new file, got {out}, name another or add --overwrite\n"
    )
    assert main([*command, "--overwrite"]) == 0


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, file, capsys):
    SAVE["pickle 2"]([Command(tmp_path / "ran")], file)
    assert main(["mask", "import", str(file), "-o", str(tmp_path / "m.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected a published mask, got ") and "mkdir" in line
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m.safetensors").exists()
