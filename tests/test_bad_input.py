"""Bad input of every kind: one line that says what was expected, what came and what to do; nothing is overwritten."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import encoded, png_chunk, png_file, tiff
from PIL import Image
from problems import problem, random_mask, small_net
from safetensors.torch import save_file

import sparse_gen as sg
from sparse_gen.cli import main
from sparse_gen.experiments import DenoiseConfig, memory, read_image, write_image
from sparse_gen.tensorfile import read_tensors, write_tensors

WIDTH, HEIGHT = 48, 40


def flipped(content: bytes, position: int) -> bytes:
    """With one bit turned over."""
    damaged = bytearray(content)
    damaged[position] ^= 1
    return bytes(damaged)


def image_files() -> dict[str, bytes]:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    values = np.stack([4 * x, 5 * y, 255 * (x > WIDTH // 2)], axis=-1).astype(np.uint8)
    image, deep, floats = Image.fromarray(values), values.astype(np.uint16) * 257, values.astype(np.float32) / 255
    photo = encoded(image, "PNG")
    cmyk = Image.merge("CMYK", [*image.split(), image.convert("L")])
    bad = floats.copy()
    bad[3, 4, 0], infinite = np.nan, floats.copy()
    infinite[0, 0] = -np.inf
    huge = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return {
        "photo.png": photo,
        "empty.png": b"",
        "text.png": b"hello",
        "cut.png": photo[:90],
        "flipped.png": flipped(photo, 70),
        "cut16.png": png_file(deep, 16)[:-60],
        "cut.jpg": encoded(image, "JPEG")[:700],
        "cut.tif": tiff(deep)[:-60],
        "no_pixels.png": png_file(values[:, :0], 8),
        "liar.png": png_file(np.broadcast_to(np.uint8(0), (9_000, 9_000, 3)), 8, body=b"\0"),
        "huge.png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", huge) + png_chunk(b"IDAT", zlib.compress(b"")),
        "tiny.png": encoded(Image.fromarray(values[:4, :4]), "PNG"),
        "large.png": encoded(Image.new("L", (3000, 2000)), "PNG"),
        "cmyk.jpg": encoded(cmyk, "JPEG"),
        "moving.png": encoded(image, "PNG", save_all=True, append_images=[image.rotate(180)]),
        "pages.tif": encoded(image, "TIFF", save_all=True, append_images=[image]),
        "int32.tif": tiff(values.astype(np.int32)),
        "lzw.tif": encoded(Image.fromarray(deep[..., 0]), "TIFF", compression="tiff_lzw"),
        "premultiplied.tif": tiff(np.concatenate([deep, deep[..., :1]], axis=2), extrasamples=["assocalpha"]),
        "nan.tif": tiff(bad),
        "infinite.tif": tiff(infinite),
        "255.tif": tiff(255 * floats),
        "negative.tif": tiff(2 * floats - 1),
        "bitmap.bmp": encoded(image, "BMP"),
    }


def config_files() -> dict[str, bytes]:
    quick = b"density: 0.6\ndepth: 3\nchannels: [4, 6]\nsearch_steps: 12\nsteps: 25\nevery: 5\nthreads: 1\n"
    return {
        "quick.yaml": quick,
        "typo.yaml": b"densty: 0.6\n",
        "nothing_like_it.yaml": b"zzz: 1\n",
        "torn.yaml": b"channels: [4, 6\n",
        "list.yaml": b"- density\n- 0.05\n",
        "binary.yaml": b"\x89PNG\r\n\x1a\n",
        "twice.yaml": b"seed: 1\nseed: 2\n",
        "object.yaml": b"seed: !!python/object/apply:os.getcwd []\n",
        "merge.yaml": b"<<: {seed: 1}\n",
        "long.yaml": b"#" * (2**20 + 1),
        "wide.yaml": b"channels: [16, 9999]\n",
        "other.yaml": b"image_sha256: " + b"0" * 64 + b"\n",
        "clip.yaml": b"clip: maybe\n",
    }


def mask_files(folder) -> None:
    """Next to sound.safetensors, files of which each has one thing wrong."""
    sound = folder / "sound.safetensors"
    z, y, _ = problem()
    sg.search_mask(small_net(), z, y, density=0.2, steps=1).mask.save(sound)
    content = sound.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, tensors = read_tensors(sound, kind="mask", version=1)
    del header["version"]

    def changed(name, version=1, kind="mask", **changes):
        write_tensors(folder / name, tensors, kind=kind, version=version, header=header | changes)

    changed("version.safetensors", version=9)
    changed("checkpoint.safetensors", kind="checkpoint")
    changed("shapes.safetensors", shapes=header["shapes"] | {"head.weight": [300, 6, 1, 1]})
    changed("recipe.safetensors", recipe="hourglass")
    changed("experiments.safetensors", experiments=2)
    save_file({"a": torch.zeros(3)}, folder / "other.safetensors")
    claims = json.dumps({"mask/a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    for name, damaged in {
        "cut.safetensors": content[:-100],
        "cut_header.safetensors": content[: length // 2],
        "flipped.safetensors": flipped(content, len(content) - 50),
        "flipped_header.safetensors": content.replace(b'\\"steps\\": 1', b'\\"steps\\": 3'),
        "longer.safetensors": content + b"0" * 9,
        "oversized.safetensors": (2**60).to_bytes(8, "little") + content[8:],
        "oversized_tensor.safetensors": len(claims).to_bytes(8, "little") + claims,
        "empty.safetensors": b"",
    }.items():
        assert damaged != content
        (folder / name).write_bytes(damaged)


def unfinished_run(folder, photo) -> None:
    """What an interrupted run leaves."""
    (folder / "checkpoints").mkdir(parents=True)
    settings = DenoiseConfig(
        image=str(photo), image_sha256=read_image(photo).sha256, device="cpu", depth=3, channels=(4, 6), density=0.6,
        input_channels=32, search_steps=12, steps=25, every=5, threads=1,
    )  # fmt: skip
    settings.save(folder / "checkpoints" / "config.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in (image_files() | config_files()).items():
        (folder / name).write_bytes(content)
    mask_files(folder)
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "own").mkdir()
    (folder / "own" / "noisy.png").write_bytes((folder / "photo.png").read_bytes())
    unfinished_run(folder / "unfinished", folder / "photo.png")
    return folder


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


IMAGE = "image: expected a PNG, JPEG or TIFF file, got {f}"
KIND = "image: expected grey, RGB or RGBA of 8 or 16 bits, or of floats in a TIFF, got"
TORN = "image: expected a whole PNG, JPEG or TIFF file, got {f}"
STEPS = "expected a whole number from 1 to 1,000,000,000, got"
RANGE = "give one in that range"
SIGMA = "sigma: expected a number in [0, 1], got"
DENSITY = "density: expected a number in (0, 1], got"
FRACTION = "give the fraction of the parameters to keep"
CONFIG = "config: expected lines like `density: 0.05`, got"
MASK = "expected a sparse-gen mask file, got {f}"
NAMES = ", ".join(DenoiseConfig.__dataclass_fields__)
DENOISE = "denoise {f}/photo.png -o {o}"

# Arguments after `sparse-gen`, with {f} the folder of files and {o} an output folder, and the one line on stderr.
COMMANDS = {
    "no image": ("denoise -o {o}",
                 "image: expected a PNG, JPEG or TIFF file, got none, name one or a --config that does"),
    "image missing": ("denoise {f}/none.png -o {o}", f"{IMAGE}/none.png, which is not there, check the name"),
    "image in no folder": ("denoise {f}/none/a.png -o {o}", f"{IMAGE}/none/a.png, which is not there, check the name"),
    "image below a file": ("denoise {f}/text.png/a.png -o {o}",
                           f"{IMAGE}/text.png/a.png, which is not there, check the name"),
    "image is a folder": ("denoise {f} -o {o}",
                          "image: expected a PNG, JPEG or TIFF file, got the folder {f}, name a file in it"),
    "image is a device": ("denoise /dev/null -o {o}", "image: expected a PNG, JPEG or TIFF file, got /dev/null, which "
                          "is a device or a pipe, save it as a file first"),
    "image of zero bytes": ("denoise {f}/empty.png -o {o}",
                            f"{IMAGE}/empty.png, which is empty (0 bytes), fetch it again"),
    "image of text": ("denoise {f}/text.png -o {o}",
                      f"{IMAGE}/text.png, which is none or is damaged, save it as a PNG first"),
    "image of another format": ("denoise {f}/bitmap.bmp -o {o}",
                                f"{IMAGE}/bitmap.bmp, which is none or is damaged, save it as a PNG first"),
    "image cut": ("denoise {f}/cut.png -o {o}", f"{TORN}/cut.png, which is cut off or damaged, fetch it again"),
    "image flipped": ("denoise {f}/flipped.png -o {o}",
                      f"{TORN}/flipped.png, which is cut off or damaged, fetch it again"),
    "16-bit image cut": ("denoise {f}/cut16.png -o {o}",
                         f"{TORN}/cut16.png, which is cut off or damaged, fetch it again"),
    "JPEG cut": ("denoise {f}/cut.jpg -o {o}", f"{TORN}/cut.jpg, which is cut off or damaged, fetch it again"),
    "TIFF cut": ("denoise {f}/cut.tif -o {o}", f"{TORN}/cut.tif, which is cut off or damaged, fetch it again"),
    "image of no pixels": ("denoise {f}/no_pixels.png -o {o}",
                           f"{IMAGE}/no_pixels.png, which is none or is damaged, save it as a PNG first"),
    "image with a false size": ("denoise {f}/liar.png -o {o}",
                                f"{TORN}/liar.png, which is cut off or damaged, fetch it again"),
    "image of 400 megapixels": ("denoise {f}/huge.png -o {o}", "image: expected at most 178 megapixels, got more in "
                                "{f}/huge.png, scale it down or cut it into parts"),
    "image too small": ("denoise {f}/tiny.png -o {o}", "expected an image of at least 5 pixels a side, got 4×4"),
    "CMYK": ("denoise {f}/cmyk.jpg -o {o}", f"{KIND} CMYK colours in {{f}}/cmyk.jpg, save it as a PNG first"),
    "animation": ("denoise {f}/moving.png -o {o}", f"{KIND} an animation in {{f}}/moving.png, save it as a PNG first"),
    "two pages": ("denoise {f}/pages.tif -o {o}",
                  f"{KIND} several pictures in {{f}}/pages.tif, save it as a PNG first"),
    "32-bit integers": ("denoise {f}/int32.tif -o {o}",
                        f"{KIND} values of type int32 in {{f}}/int32.tif, save it as a PNG first"),
    "unknown compression": ("denoise {f}/lzw.tif -o {o}",
                            f"{KIND} LZW compression in {{f}}/lzw.tif, save it without compression first"),
    "premultiplied alpha": (
        "denoise {f}/premultiplied.tif -o {o}",
        f"{KIND} premultiplied alpha or another extra channel in {{f}}/premultiplied.tif, save it as a PNG first",
    ),
    "NaN in the image": ("denoise {f}/nan.tif -o {o}", "image: expected finite numbers, got NaN or infinity in 1 of "
                         "5,760 values of {f}/nan.tif, replace them first"),
    "infinity in the image": ("denoise {f}/infinite.tif -o {o}", "image: expected finite numbers, got NaN or infinity "
                              "in 3 of 5,760 values of {f}/infinite.tif, replace them first"),
    "floats to 255": ("denoise {f}/255.tif -o {o}", "image: expected floats in [0, 1], got values from 0 to 255 in "
                      "{f}/255.tif, divide them by 255 first"),
    "negative floats": ("denoise {f}/negative.tif -o {o}", "image: expected floats in [0, 1], got values from -1 to 1 "
                        "in {f}/negative.tif, shift and divide them first"),
    "no output": ("denoise {f}/photo.png", "output: expected a folder for the results, got none, add -o DIR"),
    "output is a file": ("denoise {f}/photo.png -o {f}/text.png",
                         "output: expected a folder, got the file {f}/text.png, name another"),
    "output below a file": ("denoise {f}/photo.png -o {f}/text.png/out", "output: expected a folder that can be "
                            "written to, got {f}/text.png/out (Not a directory), name another"),
    "output holds files": ("denoise {f}/photo.png -o {f}/full", "output: expected a new or empty folder, got {f}/full "
                           "with files in it, name another or add --overwrite"),
    "output would replace the image": (
        "denoise {f}/own/noisy.png -o {f}/own --overwrite",
        "output: expected a folder whose results leave {f}/own/noisy.png alone, got {f}/own, name another",
    ),
    "output holds an unfinished run": (
        "denoise {f}/photo.png -o {f}/unfinished",
        "output: expected a new or empty folder, got {f}/unfinished with an unfinished run in it, add --resume to go "
        "on with it or --overwrite to begin anew",
    ),
    "resume of another run": (
        "denoise --resume --seed 5 --density 0.7 -o {f}/unfinished",
        "resume: expected the settings of the run in {f}/unfinished, got density = 0.7 instead of 0.6, seed = 5 "
        "instead of 0, leave them out or name another folder",
    ),
    "resume where nothing runs": (
        "denoise {f}/photo.png --resume -o {f}/full",
        "resume: expected a folder with an unfinished run, got {f}/full with none, name another or leave --resume out",
    ),
    "resume and overwrite": ("denoise {f}/photo.png --resume --overwrite -o {f}/unfinished",
                             "resume: expected --resume or --overwrite, got both, leave one out"),
    "negative seconds": (f"{DENOISE} --checkpoint-seconds -1",
                         "expected the seconds between checkpoints from 0 on, got -1.0"),
    "sigma of 8 bits": (f"{DENOISE} --sigma 25", f"{SIGMA} 25, did you mean 25/255 = 0.09804?"),
    "sigma below 0": (f"{DENOISE} --sigma -0.1", f"{SIGMA} -0.1, give it on the image's scale"),
    "sigma far above": (f"{DENOISE} --sigma 256", f"{SIGMA} 256, give it on the image's scale"),
    "sigma NaN": (f"{DENOISE} --sigma nan", f"{SIGMA} nan, give it on the image's scale"),
    "sigma infinite": (f"{DENOISE} --sigma inf", f"{SIGMA} inf, give it on the image's scale"),
    "density 0": (f"{DENOISE} --density 0", f"{DENSITY} 0, {FRACTION}"),
    "density below 0": (f"{DENOISE} --density -0.05", f"{DENSITY} -0.05, {FRACTION}"),
    "density in percent": (f"{DENOISE} --density 5", f"{DENSITY} 5, did you mean 5 % = 0.05?"),
    "density NaN": (f"{DENOISE} --density nan", f"{DENSITY} nan, {FRACTION}"),
    "density a word": (f"{DENOISE} --density half", f"{DENSITY} 'half', {FRACTION}"),
    "density too small for what is kept": (
        f"{DENOISE} --config {{f}}/quick.yaml --density 0.001",
        "expected a density above 0.0231, since 183 of 7,959 parameters are always kept, got 0.001, raise it or use "
        "prunable='all'",
    ),
    "no steps": (f"{DENOISE} --steps 0", f"steps: {STEPS} 0, {RANGE}"),
    "negative steps": (f"{DENOISE} --steps -5", f"steps: {STEPS} -5, {RANGE}"),
    "no search": (f"{DENOISE} --search-steps 0", f"search_steps: {STEPS} 0, {RANGE}"),
    "half a step": (f"{DENOISE} --search-steps 1.5", f"search_steps: {STEPS} 1.5, {RANGE}"),
    "seed below 0": (f"{DENOISE} --seed -1",
                     f"seed: expected a whole number from 0 to 9,223,372,036,854,775,807, got -1, {RANGE}"),
    "no threads": (f"{DENOISE} --threads 0", f"threads: expected a whole number from 1 to 1,024, got 0, {RANGE}"),
    "unknown device": (f"{DENOISE} --device gpu",
                       "device: expected auto, cpu, cuda or cuda:N, got 'gpu', use one of them"),
    "unknown rule": (f"{DENOISE} --stop early", "stop: expected none, wmv or emv, got 'early', use one of them"),
    "unknown generator": (f"{DENOISE} --generator unet",
                          "generator: expected hourglass, skip or decoder, got 'unet', use one of them"),
    "depth that does not fit": (
        f"{DENOISE} --depth 6",
        "depth: expected at most 4 for an image of 48 × 40 pixels, got 6, lower it or leave it out",
    ),
    "depth 0": (f"{DENOISE} --depth 0", f"depth: expected a whole number from 1 to 16, got 0, {RANGE}"),
    "config missing": (f"{DENOISE} --config {{f}}/none.yaml",
                       "config: expected a YAML file, got {f}/none.yaml, which is not there, check the name"),
    "config is a folder": (f"{DENOISE} --config {{f}}",
                           "config: expected a YAML file, got the folder {f}, name a file in it"),
    "config with an unknown key": (f"{DENOISE} --config {{f}}/typo.yaml",
                                   "expected the name of a setting, got 'densty', did you mean density?"),
    "config with a key like no other": (f"{DENOISE} --config {{f}}/nothing_like_it.yaml",
                                        f"expected the name of a setting, got 'zzz', use {NAMES}"),
    "config torn": (f"{DENOISE} --config {{f}}/torn.yaml",
                    f"{CONFIG} {{f}}/torn.yaml line 2: expected ',' or ']', but got '<stream end>', correct it"),
    "config of a list": (f"{DENOISE} --config {{f}}/list.yaml",
                         f"{CONFIG} ['density', 0.05] in {{f}}/list.yaml, correct it"),
    "config of bytes": (f"{DENOISE} --config {{f}}/binary.yaml",
                        "config: expected text in UTF-8, got {f}/binary.yaml with what YAML does not allow at position "
                        "0, correct it"),
    "config with a key twice": (f"{DENOISE} --config {{f}}/twice.yaml",
                                f"{CONFIG} {{f}}/twice.yaml line 2: seed is set twice, correct it"),
    "config with a merge": (f"{DENOISE} --config {{f}}/merge.yaml",
                            f"{CONFIG} {{f}}/merge.yaml line 1: merging (<<) is not read, correct it"),
    "config with code": (
        f"{DENOISE} --config {{f}}/object.yaml",
        f"{CONFIG} {{f}}/object.yaml line 1: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd', correct it",
    ),
    "config of a megabyte": (f"{DENOISE} --config {{f}}/long.yaml", "config: expected a YAML file of settings, got "
                             "{f}/long.yaml of over a megabyte, name another"),
    "config with a bad value": (f"{DENOISE} --config {{f}}/wide.yaml",
                                f"channels: expected a whole number from 1 to 4,096, got 9999, {RANGE}"),
    "config with a bad word": (f"{DENOISE} --config {{f}}/clip.yaml",
                               "clip: expected true or false, got 'maybe', write one of the two"),
    "mask missing": ("mask show {f}/none.safetensors", f"{MASK}/none.safetensors, which is not there, check the name"),
    "mask is a folder": ("mask show {f}", f"{MASK}, which is a folder, name a file in it"),
    "mask is a device": ("mask show /dev/null", "expected a sparse-gen mask file, got /dev/null, which is a device or "
                         "a pipe, save it as a file first"),
    "mask of zero bytes": ("mask show {f}/empty.safetensors",
                           f"{MASK}/empty.safetensors, which is cut off or damaged, fetch it again"),
    "mask cut": ("mask show {f}/cut.safetensors",
                 f"{MASK}/cut.safetensors, which is cut off or damaged, fetch it again"),
    "mask cut in the header": ("mask show {f}/cut_header.safetensors",
                               f"{MASK}/cut_header.safetensors, which is cut off or damaged, fetch it again"),
    "mask with a flipped bit": (
        "mask show {f}/flipped.safetensors",
        f"{MASK}/flipped.safetensors, whose checksum is wrong: the file is damaged, fetch it again",
    ),
    "mask with a flipped bit in the header": (
        "mask show {f}/flipped_header.safetensors",
        f"{MASK}/flipped_header.safetensors, whose checksum is wrong: the file is damaged, fetch it again",
    ),
    "mask with a tail": ("mask show {f}/longer.safetensors",
                         f"{MASK}/longer.safetensors, which is cut off or damaged, fetch it again"),
    "mask with an oversized header": ("mask show {f}/oversized.safetensors",
                                      f"{MASK}/oversized.safetensors, which is cut off or damaged, fetch it again"),
    "mask with an oversized tensor": (
        "mask show {f}/oversized_tensor.safetensors",
        f"{MASK}/oversized_tensor.safetensors, which is cut off or damaged, fetch it again",
    ),
    "mask of another version": (
        "mask show {f}/version.safetensors",
        f"{MASK}/version.safetensors of version 9, install the release that wrote it: this one reads 1",
    ),
    "mask that is a checkpoint": (
        "mask show {f}/checkpoint.safetensors",
        f"{MASK}/checkpoint.safetensors, a safetensors file of something else, name another",
    ),
    "mask that is no mask": ("mask show {f}/other.safetensors",
                             f"{MASK}/other.safetensors, a safetensors file of something else, name another"),
    "mask that is an image": ("mask show {f}/photo.png",
                              f"{MASK}/photo.png, which is cut off or damaged, fetch it again"),
    "mask with wrong shapes": (
        "mask show {f}/shapes.safetensors",
        f"{MASK}/shapes.safetensors, whose content does not fit: 3 bytes of bits make no mask of shape (300, 6, 1, 1)",
    ),
    "mask with a wrong recipe": ("mask show {f}/recipe.safetensors",
                                 f"{MASK}/recipe.safetensors, whose content does not fit: the recipe is no mapping"),
    "mask with wrong experiments": (
        "mask show {f}/experiments.safetensors",
        f"{MASK}/experiments.safetensors, whose content does not fit: expected encoder.0.conv1.1.weight with a leading "
        "axis of 2 experiments, got (6, 6, 5, 5)",
    ),
}  # fmt: skip


def check_command(arguments: list[str], message: str, files, out, capsys) -> None:
    before = snapshot(files)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""
    assert not out.exists()
    assert snapshot(files) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_one_line_and_exit_code_2(files, tmp_path, capsys, name):
    arguments, message = COMMANDS[name]
    places = {"f": files, "o": tmp_path / "out"}
    check_command(arguments.format(**places).split(), message.format(**places), files, tmp_path / "out", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there(files, tmp_path, capsys, device):
    reason = f"PyTorch {torch.__version__} is built without CUDA"
    reason = reason if torch.version.cuda is None else "PyTorch finds no GPU"
    message = f"device: expected one that is there, got {device}, but {reason}, use --device cpu"
    arguments = ["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out"), "--device", device]
    check_command(arguments, message, files, tmp_path / "out", capsys)


def test_the_image_of_a_configuration_that_has_changed(files, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"image: {files / 'photo.png'}\nimage_sha256: '{'0' * 64}'\n")
    digest = read_image(files / "photo.png").sha256
    message = (
        f"image: expected the file with SHA-256 000000000000…, got {digest[:12]}… in {files / 'photo.png'}, restore "
        "that file or remove image_sha256"
    )
    arguments = ["denoise", "--config", str(config), "-o", str(tmp_path / "out")]
    check_command(arguments, message, files, tmp_path / "out", capsys)


def test_an_image_that_may_not_be_read(files, tmp_path, capsys, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    # By the operating system's own word: as root, every file may be read.
    arguments = ["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out")]
    before = snapshot(files)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", denied)
        assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: image: expected a PNG, JPEG or TIFF file, got {files / 'photo.png'}, which cannot be read (Permission "
        "denied), see to it first\n"
    )
    assert snapshot(files) == before
    assert not (tmp_path / "out").exists()


def test_an_image_that_does_not_fit_into_memory(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda _: 4 * 10**9)
    monkeypatch.setattr(memory, "_need", lambda _, shape, *rest: 10_000 * shape[1] * shape[2])
    message = (
        "memory: expected a run that fits into the 4.0 GB available on cpu, got one of about 60.0 GB for 3000 × 2000 "
        "pixels, scale the image down to about 736 × 491 or lower channels (widths), input_channels (of z) or depth"
    )
    arguments = ["denoise", str(files / "large.png"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    check_command(arguments, message, files, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_memory_that_runs_out_all_the_same(files, tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sg, "search_mask", fail)
    assert main(["denoise", str(files / "photo.png"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: memory: expected a run that fits, got one that does not, scale the image down or lower channels\n"
    )


def test_a_folder_that_may_not_be_written(files, tmp_path, capsys, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.touch", denied)
    message = f"output: expected a folder that can be written to, got {files / 'new'} (Permission denied), name another"
    assert main(["denoise", str(files / "photo.png"), "-o", str(files / "new")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    os.rmdir(files / "new")


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


def resumed(folder, **arguments):
    z, y, _ = problem()
    for resume in (False, True):
        given = arguments if resume else {}
        sg.fit(small_net(), z, y, **{"steps": 1, **given}, checkpoints=sg.Checkpoints(folder, resume=resume))


z, y, clean = problem()
net = small_net()
mask = random_mask(net)
stored = sg.Mask(
    {"head.weight": torch.ones(3, 6, 1, 1, dtype=torch.bool)}, weights={"head.weight": torch.zeros(18)}
)  # fmt: skip
FIRST = "encoder.0.conv1.1.weight"

CALLS = {
    "z of a list": (lambda f: sg.fit(net, [1.0], y), "expected z as a tensor, got list"),
    "z of rank 3": (lambda f: sg.fit(net, z[0], y), "expected z of shape (E, C, H, W), got (6, 27, 34)"),
    "z without pixels": (lambda f: sg.fit(net, z[..., :0], y), "expected z of shape (E, C, H, W), got (1, 6, 27, 0)"),
    "z of halves": (lambda f: sg.search_mask(net, z.half(), y),
                    "expected z of float32 (or float64), got torch.float16, convert it with .float()"),
    "z with NaN": (lambda f: sg.fit(net, changed(z, float("nan")), y),
                   "expected finite numbers in z, got NaN or infinity"),
    "z with infinity": (lambda f: sg.search_mask(net, changed(z, float("inf")), y),
                        "expected finite numbers in z, got NaN or infinity"),
    "y of bytes": (lambda f: sg.fit(net, z, (255 * y).byte()),
                   "expected y of float32 (or float64), got torch.uint8, convert it with .float()"),
    "y to 255": (lambda f: sg.fit(net, z, torch.full_like(y, 255)),
                 "expected y in [0, 1], got values from 255 to 255, scale it (8 bit: /255)"),
    "y with NaN": (lambda f: sg.search_mask(net, z, changed(y, float("nan"))),
                   "expected finite numbers in y, got NaN or infinity"),
    "y of rank 3": (lambda f: sg.search_mask(net, z, y[0]), "expected y of shape (E, C, H, W), got (3, 27, 34)"),
    "y of five channels": (lambda f: sg.fit(net, z, y[:, [0, 1, 2, 0, 1]]),
                           "expected y with 1 to 4 channels, got 5"),
    "y of another size": (lambda f: sg.fit(net, z, y[..., :30]),
                          "expected y and z of one size, got 27×30 and 27×34"),
    "y of doubles": (lambda f: sg.fit(net, z, y.double()),
                     "expected y of torch.float32 on cpu like z, got torch.float64 on cpu"),
    "y of grey": (lambda f: sg.fit(net, z, y[:, :1]),
                  "expected y of the network's output shape (C, H, W) = (3, 27, 34), got (1, 27, 34)"),
    "clean out of range": (lambda f: sg.fit(net, z, y, clean=clean - 1),
                           f"expected clean in [0, 1], got values from {(clean - 1).min():.3g} to "
                           f"{(clean - 1).max():.3g}, scale it (8 bit: /255)"),
    "no steps": (lambda f: sg.fit(net, z, y, steps=0), "expected steps as an integer of at least 1, got 0"),
    "negative steps": (lambda f: sg.search_mask(net, z, y, steps=-3),
                       "expected steps as an integer of at least 1, got -3"),
    "lr 0": (lambda f: sg.fit(net, z, y, lr=0), "expected lr above 0, got 0"),
    "lr NaN": (lambda f: sg.search_mask(net, z, y, lr=float("nan")), "expected lr above 0, got nan"),
    "density 0": (lambda f: sg.search_mask(net, z, y, density=0),
                  "expected a density above 0 and at most 1, got 0"),
    "density 5": (lambda f: sg.search_mask(net, z, y, density=5),
                  "expected a density above 0 and at most 1, got 5"),
    "density NaN": (lambda f: sg.search_mask(net, z, y, density=float("nan")),
                    "expected a density above 0 and at most 1, got nan"),
    "density too small": (
        lambda f: sg.search_mask(net, z, y, density=0.01),
        "expected a density above 0.0241, since 275 of 11,445 parameters are always kept, got 0.01, raise it or use "
        "prunable='all'",
    ),
    "preset unknown": (lambda f: sg.search_mask(net, z, y, preset="slow"),
                       "expected preset as one of quick, lean, paper, got 'slow'"),
    "prunable unknown": (lambda f: sg.search_mask(net, z, y, prunable=["head.wieght"]),
                         "expected parameter names of the network, got 'head.wieght'"),
    "sigma of 8 bits": (lambda f: sg.inverse.add_noise(clean, 25),
                        "expected sigma from 0 to 1, on the image's own scale, got 25, did you mean 25/255?"),
    "sigma below 0": (lambda f: sg.inverse.add_noise(clean, -0.1),
                      "expected sigma from 0 to 1, on the image's own scale, got -0.1"),
    "sigma NaN": (lambda f: sg.inverse.add_noise(clean, float("nan")),
                  "expected sigma from 0 to 1, on the image's own scale, got nan"),
    "seed of a half": (lambda f: sg.noise_input(6, (8, 8), seed=0.5),
                       "expected a seed of 64 bits, or a list of one an experiment, got 0.5"),
    "size 0": (lambda f: sg.noise_input(6, (0, 8)),
               "expected at least one channel and pixel, got channels=6, size=0×8"),
    "image too small for the depth": (
        lambda f: small_net()(z[..., :9, :]),
        "expected at least 3 pixels a side at the deepest level, got a 9×34 image at depth 3, use depth=2",
    ),
    "mask of another network": (
        lambda f: sg.compile(small_net(in_channels=5), mask, z[:, :5]),
        f"expected a mask of this network, whose {FIRST} is (6, 5, 5, 5), got (6, 6, 5, 5)",
    ),
    "mask of a deeper network": (
        lambda f: sg.compile(small_net(channels=(6, 8)), mask, z),
        "expected a mask of this network, got one with encoder.2.conv1.1.weight (10, 8, 5, 5), which the network "
        f"lacks; its parameters are {FIRST} (6, 6, 5, 5), encoder.0.conv1.1.bias (6,), encoder.0.norm1.weight (6,), "
        f"encoder.0.norm1.bias (6,) and 26 more, the mask's {FIRST} (6, 6, 5, 5), encoder.0.conv2.1.weight "
        "(6, 6, 5, 5), encoder.1.conv1.1.weight (8, 6, 5, 5), encoder.1.conv2.1.weight (8, 8, 5, 5) and 40 more",
    ),
    "mask of other weights": (
        lambda f: sg.compile(net, stored, z),
        "expected the network that the mask was found on, got other initial weights than the mask holds, say "
        "weights='mask' or weights='net'",
    ),
    "mask of floats": (lambda f: sg.Mask({"a": torch.ones(3)}), "expected a bool tensor for a, got torch.float32"),
    "mask of nothing": (lambda f: sg.Mask({}), "expected a mask of at least one parameter, got none"),
    "mask with NaN weights": (
        lambda f: sg.Mask({"a": torch.ones(2, dtype=torch.bool)}, weights={"a": torch.tensor([0, float("nan")])}),
        "expected finite stored weights, got NaN or infinity in a",
    ),
    "network in evaluation mode": (
        lambda f: sg.compile(small_net().eval(), mask, z),
        "expected a network in training mode, got encoder.0.norm1 in evaluation mode, call .train(): a prior fitted to "
        "one image normalises by that image's own statistics",
    ),
    "no example": (lambda f: sg.compile(net, mask), "expected an example_input of shape (E, C, H, W), got none"),
    "recipe of an unknown class": (lambda f: sg.generators.build({"class": "Unet"}),
                                   "expected a generator out of Hourglass, Skip, DeepDecoder, got 'Unet'"),
    "resume with another lr": (
        lambda f: resumed(f, lr=0.5),
        "expected to resume the run of {f}, which has lr = 0.01, got 0.5, use its settings or another folder",
    ),
    "resume with other steps": (
        lambda f: resumed(f, steps=7),
        "expected to resume the run of {f}, which has steps = 1, got 7, use its settings or another folder",
    ),
    "a rule of one output": (lambda f: sg.stop.WMV(window=1),
                             "expected window as an integer of at least 2, got 1"),
    "a configuration with NaN": (lambda f: DenoiseConfig(image="a.png", lr=float("nan")),
                                 "lr: expected a number above 0, got nan, give a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_raises_a_value_error_of_one_line(tmp_path, name):
    call, message = CALLS[name]
    with pytest.raises(ValueError) as caught:
        call(tmp_path)
    assert str(caught.value) == message.replace("{f}", str(tmp_path))


def test_a_result_of_another_size_is_not_written(files, tmp_path):
    photograph = read_image(files / "photo.png")
    (tmp_path / "kept.png").write_bytes(b"kept")
    with pytest.raises(ValueError) as caught:
        write_image(tmp_path / "kept.png", photograph.pixels[..., 1:], like=photograph)
    assert str(caught.value) == (
        f"pixels: expected (C, H, W) = (3, 40, 48) like {files / 'photo.png'}, got (1, 3, 40, 47), write one image at "
        "a time and of the same size"
    )
    assert (tmp_path / "kept.png").read_bytes() == b"kept"


def test_the_table_is_long_enough():
    assert len(COMMANDS) + len(CALLS) >= 100
    assert len(COMMANDS) >= 40
