"""Reading and writing photographs: what is not restored must come back unchanged."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sparse_gen.experiments.images import read_image, write_image

WIDTH, HEIGHT = 7, 5
CHANNELS = {"L": 1, "LA": 1, "RGB": 3, "RGBA": 3}


def picture(mode: str) -> Image.Image:
    bands = len(mode) if mode != "CMYK" else 4
    values = np.random.default_rng(0).integers(0, 256, (bands, HEIGHT, WIDTH), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(band) for band in values]) if bands > 1 else Image.fromarray(values[0])


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def png_with_sixteen_bits(colour_type: int) -> bytes:
    """By hand: Pillow cannot write 16-bit colour."""
    channels = {0: 1, 2: 3}[colour_type]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + b"\x12\x34" * WIDTH * channels) * HEIGHT
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("mode", CHANNELS)
def test_a_png_comes_back_with_every_byte_of_it(tmp_path, mode):
    source = picture(mode)
    photograph = read_image(saved(source, tmp_path / "in.png"))
    assert photograph.mode == mode
    assert photograph.pixels.shape == (1, CHANNELS[mode], HEIGHT, WIDTH)
    assert photograph.pixels.dtype == torch.float32
    assert photograph.pixels.min() >= 0 and photograph.pixels.max() <= 1
    write_image(tmp_path / "out.png", photograph.pixels, like=photograph)
    with Image.open(tmp_path / "out.png") as written:
        assert written.mode == mode
        np.testing.assert_array_equal(np.asarray(written), np.asarray(source))


def test_the_hash_is_that_of_the_file(tmp_path):
    path = saved(picture("L"), tmp_path / "in.png")
    assert read_image(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    path = saved(picture("RGB"), tmp_path / "in.jpg", quality=95)
    with Image.open(path) as decoded:
        expected = np.asarray(decoded).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(read_image(path).pixels[0].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_colour_and_alpha(tmp_path, orientation):
    upright = picture("RGBA")
    # The transposition that a camera held this way has done to the picture.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = read_image(saved(stored, tmp_path / "in.png", exif=exif))
    expected = np.asarray(upright)
    np.testing.assert_array_equal((photograph.pixels[0] * 255).round().numpy(), expected[..., :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(photograph.alpha, expected[..., 3])


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("RGB", (1, 2, 3))])
def test_a_transparent_colour_becomes_alpha(tmp_path, mode, colour):
    source = picture(mode)
    source.putpixel((2, 1), colour)
    photograph = read_image(saved(source, tmp_path / "in.png", transparency=colour))
    assert photograph.mode == mode + "A"
    assert photograph.alpha[1, 2] == 0
    assert photograph.alpha.max() == 255


def test_the_colour_profile_is_kept(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph = read_image(saved(picture("RGB"), tmp_path / "in.png", icc_profile=profile))
    write_image(tmp_path / "out.png", photograph.pixels, like=photograph)
    with Image.open(tmp_path / "out.png") as written:
        assert written.info["icc_profile"] == profile


def test_written_values_are_clipped_and_rounded_to_the_nearest_level(tmp_path):
    photograph = read_image(saved(picture("L"), tmp_path / "in.png"))
    values = torch.zeros_like(photograph.pixels)
    values[0, 0, 0] = torch.tensor([-0.5, 1.5, 100.4 / 255, 100.6 / 255, 0, 1, 254.9 / 255])
    write_image(tmp_path / "out.png", values, like=photograph)
    with Image.open(tmp_path / "out.png") as written:
        assert np.asarray(written)[0].tolist() == [0, 255, 100, 101, 0, 255, 255]


def test_an_image_of_another_size_is_not_written(tmp_path):
    photograph = read_image(saved(picture("RGB"), tmp_path / "in.png"))
    for shape in [(1, 1, HEIGHT, WIDTH), (1, 3, WIDTH, HEIGHT), (2, 3, HEIGHT, WIDTH)]:
        with pytest.raises(ValueError, match=r"expected \(C, H, W\) = \(3, 5, 7\)"):
            write_image(tmp_path / "out.png", torch.zeros(shape), like=photograph)
    assert not (tmp_path / "out.png").exists()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


UNFIT = {
    "palette": (encoded(picture("RGB").quantize(4), "PNG"), "got palette colours in"),
    "one bit": (encoded(picture("L").convert("1"), "PNG"), "got 1-bit black and white in"),
    "16-bit grey": (png_with_sixteen_bits(0), "got 16 bits a channel in"),
    "16-bit colour": (png_with_sixteen_bits(2), "got 16 bits a channel in"),
    "CMYK": (encoded(picture("CMYK"), "JPEG"), "got CMYK in"),
    "animation": (
        encoded(picture("RGB"), "PNG", save_all=True, append_images=[picture("RGB").rotate(180)]),
        "got an animation in",
    ),
    "another format": (encoded(picture("RGB"), "BMP"), "which is neither or is damaged"),
    "text": (b"hello", "which is neither or is damaged"),
    "empty": (b"", "which is empty"),
    "cut PNG": (encoded(picture("RGB"), "PNG")[:-30], "which is damaged"),
    "cut JPEG": (encoded(picture("RGB").resize((64, 64)), "JPEG")[:900], "which is damaged"),
    "cut header": (encoded(picture("RGB"), "PNG")[:20], "which is damaged"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_could_not_be_written_back_is_refused_in_one_line(tmp_path, name):
    content, reason = UNFIT[name]
    path = tmp_path / "in.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^image: expected .*, got .*, \w+") as caught:
        read_image(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_read_or_refused_but_never_crashes(tmp_path):
    content = bytearray(encoded(picture("RGBA"), "PNG"))
    path = tmp_path / "in.png"
    refused = 0
    for position in range(len(content)):
        damaged = content.copy()
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_image(path)
        except ValueError:
            refused += 1
    assert refused > len(content) // 2  # a PNG has checksums


def test_an_image_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    path = saved(picture("RGB"), tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # Pillow warns here, and refuses above twice
    assert read_image(path).pixels.shape[-1] == WIDTH
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    with pytest.raises(ValueError, match="expected at most 0 megapixels, got more in"):
        read_image(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: expected a PNG or JPEG file, got .*none\.png, which"):
        read_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        read_image(tmp_path)
