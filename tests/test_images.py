"""Reading and writing photographs: what is not restored must come back unchanged."""

import hashlib
import struct
import zlib

import numpy as np
import png
import pytest
import tifffile
import torch
from pictures import COLOUR_TYPES, bare_tiff, encoded, png_chunk, png_file, tiff
from PIL import Image, ImageCms

from sparse_gen.experiments.images import read_image, write_image

WIDTH, HEIGHT = 7, 5
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_values(channels: int, dtype="uint8") -> np.ndarray:
    """(H, W, C) over the whole range, both ends included."""
    generator, shape = np.random.default_rng(0), (HEIGHT, WIDTH, channels)
    if np.dtype(dtype).kind == "f":
        values, most = generator.random(shape).astype(dtype), 1
    else:
        most = np.iinfo(dtype).max
        values = generator.integers(0, most, shape, dtype=dtype, endpoint=True)
    values.flat[0], values.flat[-1] = 0, most
    return values


def picture(channels: int) -> Image.Image:
    return Image.fromarray(random_values(channels).squeeze())


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def png_values(path) -> np.ndarray:
    """What is in an unfiltered 16-bit PNG, by hand."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour_type = struct.unpack(">IIBB", content[16:26])
    assert depth == 16
    position, body = 8, b""
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        if content[position + 4 : position + 8] == b"IDAT":
            body += content[position + 8 : position + 8 + length]
        position += 12 + length
    channels = {kind: count for count, kind in COLOUR_TYPES.items()}[colour_type]
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return np.ascontiguousarray(rows[:, 1:]).view(">u2").reshape(height, width, channels).astype(np.uint16)


def written_back(path, tmp_path):
    """Read a photograph, write its own pixels like it, and give photograph and file."""
    photograph = read_image(path)
    out = tmp_path / f"out{photograph.suffix}"
    write_image(out, photograph.pixels, like=photograph)
    return photograph, out


def check_pixels(photograph, values, dtype):
    """Of (H, W, C) values as the file holds them."""
    channels = values.shape[2]
    colour = values[..., : 1 if channels < 3 else 3]
    scale = 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
    expected = (colour.transpose(2, 0, 1) / np.float64(scale)).astype(np.float32)
    assert photograph.mode == MODES[channels]
    assert photograph.dtype == dtype
    assert photograph.pixels.dtype == torch.float32
    # A float32 quotient of two floats may differ by its last bit from one that was rounded from double.
    np.testing.assert_allclose(photograph.pixels[0].numpy(), expected, rtol=1.2e-7, atol=0)
    if channels in (2, 4):
        np.testing.assert_array_equal(photograph.alpha, values[..., -1])
    else:
        assert photograph.alpha is None


@pytest.mark.parametrize("channels", MODES)
def test_an_8_bit_png_comes_back_with_every_value(tmp_path, channels):
    values = random_values(channels)
    photograph, out = written_back(saved(picture(channels), tmp_path / "in.png"), tmp_path)
    check_pixels(photograph, values, "uint8")
    with Image.open(out) as written:
        assert written.mode == MODES[channels]
        np.testing.assert_array_equal(np.atleast_3d(np.asarray(written)), values)


@pytest.mark.parametrize("channels", MODES)
def test_a_16_bit_png_comes_back_with_every_value(tmp_path, channels):
    values = random_values(channels, "uint16")
    (tmp_path / "in.png").write_bytes(png_file(values, 16))
    photograph, out = written_back(tmp_path / "in.png", tmp_path)
    check_pixels(photograph, values, "uint16")
    np.testing.assert_array_equal(png_values(out), values)
    assert out.read_bytes()[25] == COLOUR_TYPES[channels]


def test_every_one_of_the_65536_levels_comes_back(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1)
    (tmp_path / "in.png").write_bytes(png_file(values, 16))
    _, out = written_back(tmp_path / "in.png", tmp_path)
    np.testing.assert_array_equal(png_values(out), values)


def test_filtered_and_interlaced_16_bit_pngs_are_read(tmp_path):
    smooth = (np.arange(40)[:, None] * 900 + np.arange(50) * 500).astype(np.uint16)
    path = saved(Image.fromarray(smooth), tmp_path / "filtered.png")  # Pillow can filter, and write 16-bit grey
    check_pixels(read_image(path), smooth[..., None], "uint16")
    values = random_values(4, "uint16")
    with open(tmp_path / "interlaced.png", "wb") as file:
        writer = png.Writer(WIDTH, HEIGHT, greyscale=False, alpha=True, bitdepth=16, interlace=True)
        writer.write(file, values.reshape(HEIGHT, -1).tolist())
    check_pixels(read_image(tmp_path / "interlaced.png"), values, "uint16")


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_becomes_8_bit_grey(tmp_path, depth):
    values = random_values(1) >> (8 - depth)
    (tmp_path / "in.png").write_bytes(png_file(values, depth))
    photograph, out = written_back(tmp_path / "in.png", tmp_path)
    expected = values * (255 // (2**depth - 1))
    check_pixels(photograph, expected, "uint8")
    with Image.open(out) as written:
        assert written.mode == "L"
        np.testing.assert_array_equal(np.asarray(written), expected[..., 0])


@pytest.mark.parametrize("alpha", [False, True])
def test_a_palette_becomes_rgb(tmp_path, alpha):
    source = picture(3).quantize(6)
    path = saved(source, tmp_path / "in.png", **({"transparency": bytes([0, 99, 255])} if alpha else {}))
    with Image.open(path) as opened:
        assert opened.mode == "P"
        expected = np.asarray(opened.convert("RGBA" if alpha else "RGB"))
    photograph, out = written_back(path, tmp_path)
    check_pixels(photograph, expected, "uint8")
    with Image.open(out) as written:
        assert written.mode == ("RGBA" if alpha else "RGB")
        np.testing.assert_array_equal(np.asarray(written), expected)


@pytest.mark.parametrize(("depth", "channels"), [(8, 1), (8, 3), (16, 1), (16, 3), (4, 1)])
def test_a_transparent_colour_becomes_alpha(tmp_path, depth, channels):
    values = random_values(channels, "uint16") >> (16 - depth)
    values[3:, :, :] = 7
    (tmp_path / "in.png").write_bytes(png_file(values, depth, png_chunk(b"tRNS", b"\0\7" * channels)))
    photograph, _ = written_back(tmp_path / "in.png", tmp_path)
    assert photograph.mode == MODES[channels] + "A"
    most = 65535 if depth == 16 else 255
    np.testing.assert_array_equal(photograph.alpha, np.where((values == 7).all(axis=2), 0, most))


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_an_8_bit_tiff_becomes_a_png_of_the_same_values(tmp_path, channels, compression):
    path = saved(picture(channels), tmp_path / "in.tif", compression=compression)
    photograph, out = written_back(path, tmp_path)
    check_pixels(photograph, random_values(channels), "uint8")
    with Image.open(out) as written:
        assert (written.format, written.mode) == ("PNG", MODES[channels])
        np.testing.assert_array_equal(np.atleast_3d(np.asarray(written)), random_values(channels))


LAYOUTS = {
    "plain": {},
    "deflated": {"compression": "zlib", "rowsperstrip": 2},
    "predicted": {"compression": "zlib", "predictor": 2},
    "tiled": {"tile": (16, 16)},
    "planar": {"planarconfig": "separate"},
    "big endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
}


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_16_bit_tiff_becomes_a_png_of_the_same_values(tmp_path, channels, layout):
    if layout == "planar" and channels == 1:
        pytest.skip("one channel has no planes")
    values = random_values(channels, "uint16")
    (tmp_path / "in.tif").write_bytes(tiff(values, **LAYOUTS[layout]))
    photograph, out = written_back(tmp_path / "in.tif", tmp_path)
    check_pixels(photograph, values, "uint16")
    np.testing.assert_array_equal(png_values(out), values)


def test_a_tiff_whose_white_is_zero_is_turned_round(tmp_path):
    values = random_values(1, "uint16")
    (tmp_path / "in.tif").write_bytes(tiff(values, photometric="miniswhite"))
    check_pixels(read_image(tmp_path / "in.tif"), 65535 - values, "uint16")


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("layout", ["plain", "deflated", "big endian"])
def test_a_float_tiff_comes_back_with_every_bit(tmp_path, channels, layout):
    values = random_values(channels, "float32")
    (tmp_path / "in.tif").write_bytes(tiff(values, **LAYOUTS[layout]))
    photograph, out = written_back(tmp_path / "in.tif", tmp_path)
    check_pixels(photograph, values, "float32")
    with tifffile.TiffFile(out) as file:
        page = file.pages[0]
        assert page.dtype == np.float32
        np.testing.assert_array_equal(np.atleast_3d(page.asarray()), values)
    if channels == 1:  # another reader of what was written
        with Image.open(out) as written:
            np.testing.assert_array_equal(np.asarray(written), values[..., 0])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_become_float32(tmp_path, dtype):
    values = random_values(4, dtype)
    (tmp_path / "in.tif").write_bytes(tiff(values))
    photograph, out = written_back(tmp_path / "in.tif", tmp_path)
    np.testing.assert_array_equal(tifffile.imread(out), values.astype(np.float32))
    assert photograph.alpha.dtype == np.float32


def test_equal_images_are_equal_files(tmp_path):
    for name, values in {"in.tif": random_values(3, "float32"), "deep.tif": random_values(3, "uint16")}.items():
        (tmp_path / name).write_bytes(tiff(values))
        _, out = written_back(tmp_path / name, tmp_path)
        first = out.read_bytes()
        _, out = written_back(tmp_path / name, tmp_path)
        assert out.read_bytes() == first


def test_the_hash_is_that_of_the_file(tmp_path):
    path = saved(picture(1), tmp_path / "in.png")
    assert read_image(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    path = saved(picture(3), tmp_path / "in.jpg", quality=95)
    with Image.open(path) as decoded:
        check_pixels(read_image(path), np.asarray(decoded), "uint8")


# What a camera that was held this way has done to the picture.
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "deep PNG", "JPEG", "TIFF", "deep TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_colour_and_alpha(tmp_path, orientation, kind):
    upright = picture(1 if kind == "JPEG" else 4)
    stored = upright.transpose(UNDO[orientation]) if orientation in UNDO else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, expected = tmp_path / "in", np.asarray(upright)
    if kind == "deep PNG":
        block = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(png_file(np.asarray(stored).astype(np.uint16) * 257, 16, block))
    elif kind == "deep TIFF":
        path.write_bytes(tiff(np.asarray(stored).astype(np.uint16) * 257, extratags=[(0x0112, 3, 1, orientation)]))
    elif kind == "JPEG":
        saved(stored, path, format="JPEG", exif=exif)
        with Image.open(path) as decoded:
            expected = np.asarray(decoded)
            back = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}.get(orientation, UNDO.get(orientation))
            expected = np.asarray(decoded.transpose(back) if back is not None else decoded)
    else:
        saved(stored, path, format=kind, exif=exif)
    photograph = read_image(path)
    np.testing.assert_array_equal(
        (photograph.pixels[0] * 255).round().numpy(), np.atleast_3d(expected)[..., :3].transpose(2, 0, 1)
    )
    if kind != "JPEG":
        np.testing.assert_array_equal(photograph.alpha // (257 if "deep" in kind else 1), expected[..., 3])


def test_the_colour_profile_is_kept(tmp_path):
    compressed = b"any name\0\0" + zlib.compress(PROFILE)
    files = {
        "8.png": saved(picture(3), tmp_path / "8.png", icc_profile=PROFILE).read_bytes(),
        "16.png": png_file(random_values(3, "uint16"), 16, png_chunk(b"iCCP", compressed)),
        "8.jpg": saved(picture(3), tmp_path / "8.jpg", icc_profile=PROFILE).read_bytes(),
        "8.tif": saved(picture(3), tmp_path / "8.tif", icc_profile=PROFILE).read_bytes(),
        "16.tif": tiff(random_values(3, "uint16"), extratags=[(34675, 7, len(PROFILE), PROFILE, True)]),
        "float.tif": tiff(random_values(3, "float32"), extratags=[(34675, 7, len(PROFILE), PROFILE, True)]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        _, out = written_back(tmp_path / name, tmp_path)
        with Image.open(out) if out.suffix == ".png" else tifffile.TiffFile(out) as written:
            profile = written.info["icc_profile"] if out.suffix == ".png" else bytes(written.pages[0].tags[34675].value)
        assert profile == PROFILE, name


@pytest.mark.parametrize("most", [255, 65535])
def test_written_values_are_clipped_and_rounded_to_the_nearest_level(tmp_path, most):
    path = tmp_path / "in.png"
    path.write_bytes(png_file(random_values(1, f"uint{most.bit_length()}"), most.bit_length()))
    photograph = read_image(path)
    values = torch.zeros_like(photograph.pixels, dtype=torch.float64)
    values[0, 0, 0] = torch.tensor([-0.5, 1.5, 100.4 / most, 100.6 / most, 0, 1, (most - 0.1) / most])
    write_image(tmp_path / "out.png", values, like=photograph)
    levels = (read_image(tmp_path / "out.png").pixels.double() * most).round()
    assert levels[0, 0, 0].tolist() == [0, most, 100, 101, 0, most, most]


def test_floats_are_written_as_they_are(tmp_path):
    (tmp_path / "in.tif").write_bytes(tiff(random_values(1, "float32")))
    photograph = read_image(tmp_path / "in.tif")
    write_image(tmp_path / "out.tif", photograph.pixels * 3 - 1, like=photograph)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), (photograph.pixels * 3 - 1)[0, 0].numpy())


def test_an_image_of_another_size_is_not_written(tmp_path):
    photograph = read_image(saved(picture(3), tmp_path / "in.png"))
    for shape in [(1, 1, HEIGHT, WIDTH), (1, 3, WIDTH, HEIGHT), (2, 3, HEIGHT, WIDTH)]:
        with pytest.raises(ValueError, match=r"expected \(C, H, W\) = \(3, 5, 7\)"):
            write_image(tmp_path / "out.png", torch.zeros(shape), like=photograph)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [
        (0, 255, "got values from 0 to 255 in {path}, divide them by 255 first"),
        (0, 65535, "got values from 0 to 6.554e+04 in {path}, divide them by 65535 first"),
        (0, 1e6, "got values from 0 to 1e+06 in {path}, divide them by 1e+06 first"),
        (-1, 1, "got values from -1 to 1 in {path}, shift and divide them first"),
    ],
)
def test_floats_out_of_range_are_refused_with_how_to_scale(tmp_path, low, high, advice):
    path = tmp_path / "in.tif"
    path.write_bytes(tiff(low + (high - low) * random_values(3, "float32")))
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == f"image: expected floats in [0, 1], {advice.format(path=path)}"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(tmp_path, bad):
    values = random_values(3, "float32")
    values[1, 2, 0] = values[4, 0, 1] = bad
    path = tmp_path / "in.tif"
    path.write_bytes(tiff(values))
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"image: expected finite numbers, got NaN or infinity in 2 of 105 values of {path}, replace them first"
    )


def test_out_of_range_alpha_is_nobodys_business(tmp_path):
    values = random_values(4, "float32")
    values[..., 3] *= 10
    (tmp_path / "in.tif").write_bytes(tiff(values))
    _, out = written_back(tmp_path / "in.tif", tmp_path)
    np.testing.assert_array_equal(tifffile.imread(out), values)


deep, floats = random_values(3, "uint16"), random_values(3, "float32")
WHICH_IS = "image: expected a PNG, JPEG or TIFF file, got {path}, which is"
NEITHER = f"{WHICH_IS} none or is damaged, save it as a PNG first"
DAMAGED = "image: expected a whole PNG, JPEG or TIFF file, got {path}, which is cut off or damaged, fetch it again"


def unfit(kind: str, advice: str = "save it as a PNG first") -> str:
    wanted = "grey, RGB or RGBA of 8 or 16 bits, or of floats in a TIFF"
    return f"image: expected {wanted}, got {kind} in {{path}}, {advice}"


UNFIT = {
    "CMYK": (encoded(Image.merge("CMYK", picture(4).split()), "JPEG"), unfit("CMYK colours")),
    "CMYK TIFF": (encoded(Image.merge("CMYK", picture(4).split()), "TIFF"), unfit("CMYK colours")),
    "animation": (
        encoded(picture(3), "PNG", save_all=True, append_images=[picture(3).rotate(180)]), unfit("an animation"),
    ),
    "two pages": (encoded(picture(3), "TIFF", save_all=True, append_images=[picture(3)]), unfit("several pictures")),
    "integers": (tiff(deep.astype(np.int32)), unfit("values of type int32")),
    "signed bytes": (tiff(deep.astype(np.int8)), unfit("values of type int8")),
    "complex": (tiff(floats[..., :1].astype(np.complex64)), unfit("values of type complex64")),
    "premultiplied": (
        tiff(random_values(4, "uint16"), extrasamples=["assocalpha"]),
        unfit("premultiplied alpha or another extra channel"),
    ),
    "five channels": (
        tiff(random_values(5, "uint16"), extrasamples=[0, 0]), unfit("premultiplied alpha or another extra channel"),
    ),
    "deep CMYK": (tiff(random_values(4, "uint16"), photometric="separated", extrasamples=None),
                  unfit("SEPARATED colours")),
    "another format": (encoded(picture(3), "BMP"), NEITHER),
    "text": (b"hello", NEITHER),
    "empty": (b"", f"{WHICH_IS} empty (0 bytes), fetch it again"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", NEITHER),
    "cut PNG": (encoded(picture(3), "PNG")[:-30], DAMAGED),
    "cut deep PNG": (png_file(deep, 16)[:-30], DAMAGED),
    "cut JPEG": (encoded(picture(3).resize((64, 64)), "JPEG")[:900], DAMAGED),
    "cut header": (encoded(picture(3), "PNG")[:20], DAMAGED),
    "cut TIFF": (encoded(picture(3), "TIFF")[:-30], DAMAGED),
    "cut deep TIFF": (tiff(deep)[:-30], DAMAGED),
    "cut deflated TIFF": (tiff(deep, compression="zlib")[:-30], DAMAGED),
    "a short strip": (bare_tiff(zlib.compress(bytes(64))), DAMAGED),
    "a missing strip": (bare_tiff(b"", count=0), DAMAGED),
    "an empty tile": (tiff(deep, tile=(16, 16)).replace(struct.pack("<HHII", 325, 4, 1, 16 * 16 * 6),
                                                        struct.pack("<HHII", 325, 4, 1, 0)), DAMAGED),
    "a strip of two": (bare_tiff(zlib.compress(bytes(64)), rows=4), DAMAGED),
    "a strip elsewhere": (bare_tiff(b"", offset=10**6, count=128, compression=1), DAMAGED),
    "TIFF header alone": (b"II*\0\x08\0\0\0", DAMAGED),
    "a row less": (png_file(deep, 16, body=b"\0" * (1 + 6 * WIDTH) * (HEIGHT - 1)), DAMAGED),
    "no width": (png_file(deep[:, :0], 16), NEITHER),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_could_not_be_written_back_is_refused_in_one_line(tmp_path, name, capfd, caplog):
    content, message = UNFIT[name]
    path = tmp_path / "in"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == message.format(path=path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_codecs_that_are_not_there_are_named(tmp_path):
    saved(Image.fromarray(deep[..., 0]), tmp_path / "in.tif", compression="tiff_lzw")
    with pytest.raises(ValueError) as caught:
        read_image(tmp_path / "in.tif")
    assert str(caught.value) == unfit("LZW compression", "save it without compression first").format(
        path=tmp_path / "in.tif"
    )


@pytest.mark.parametrize("name", ["8-bit PNG", "16-bit PNG", "16-bit TIFF", "deflated TIFF", "8-bit TIFF", "JPEG"])
def test_a_flipped_byte_is_read_or_refused_but_never_crashes(tmp_path, name):
    content = bytearray({
        "8-bit PNG": encoded(picture(4), "PNG"),
        "16-bit PNG": png_file(random_values(4, "uint16"), 16),
        "16-bit TIFF": tiff(deep),
        "deflated TIFF": tiff(deep, compression="zlib"),
        "8-bit TIFF": encoded(picture(3), "TIFF"),
        "JPEG": encoded(picture(3), "JPEG"),
    }[name])  # fmt: skip
    path = tmp_path / "in"
    refused = 0
    for position in range(len(content)):
        damaged = content.copy()
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_image(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    if "PNG" in name:  # which has checksums
        assert refused > len(content) // 2


def test_an_image_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    path = saved(picture(3), tmp_path / "in.png")
    (tmp_path / "deep.tif").write_bytes(tiff(deep))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # Pillow warns here, and refuses above twice
    assert read_image(path).pixels.shape[-1] == WIDTH
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    for refused in (path, tmp_path / "deep.tif"):
        with pytest.raises(ValueError) as caught:
            read_image(refused)
        assert str(caught.value) == (
            f"image: expected at most 0 megapixels, got more in {refused}, scale it down or cut it into parts"
        )


def test_the_shape_is_shown_before_anything_is_decoded(tmp_path):
    for name, content in {
        "8.png": encoded(picture(4), "PNG"),
        "16.png": png_file(deep, 16),
        "grey.tif": tiff(random_values(1, "float32")),
        "8.tif": encoded(picture(2), "TIFF"),
    }.items():
        (tmp_path / name).write_bytes(content)
        shapes = []

        def refuse(shape, shapes=shapes):
            shapes.append(shape)
            raise ValueError("not with me")

        with pytest.raises(ValueError, match="not with me"):
            read_image(tmp_path / name, refuse)
        assert shapes == [(read_image(tmp_path / name).pixels.shape[1], HEIGHT, WIDTH)]


def test_missing_files_folders_and_devices_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: expected a PNG, JPEG or TIFF file, got .*none\.png, which is"):
        read_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="got /dev/zero, which is a device or a pipe, save it as a file first"):
        read_image("/dev/zero")
