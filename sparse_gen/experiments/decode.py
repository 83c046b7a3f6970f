"""Image files to arrays without losing a bit, or refused.

Pillow reads what has 8 bits. It reads 16-bit colour as 8 bits without a word, so PNGs of another depth go through
pypng (1 s a megapixel) and TIFFs of another type through tifffile.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _ICC_PROFILE = 274, 34675  # tags of TIFF, the first of EXIF too
# What a mode of Pillow's is restored as: palettes and single bits cannot hold a restored image.
_MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "PA": "RGBA"}
_WITH_ALPHA = {"L": "LA", "RGB": "RGBA"}
# One colour, 1 bit deep, deflated 1 to 1,032, is 8,256 pixels a byte. More is a header that asks for memory alone.
_PIXELS_A_BYTE = 10_000
_DEFLATE = (8, 32946)

Shape = tuple[int, int, int]


class Stored(NamedTuple):
    """An image as its file holds it: uint8, uint16 or float values (H, W, C), upright, and its colour profile."""

    values: np.ndarray
    icc_profile: bytes | None


def decode(data: bytes, path: Path, admit: Callable[[Shape], None] | None = None) -> Stored:
    """Decode the bytes of a PNG, JPEG or TIFF file.

    Args:
        data: the whole file.
        path: its name, for messages.
        admit: called with (C, H, W), alpha not counted, before pixels are decoded; it may refuse by raising.

    Returns:
        `Stored`, of 1 (grey), 2 (with alpha), 3 (colour) or 4 channels.

    Raises:
        ValueError: damaged, of another format, too large, or of a kind that could not be written back as it is.
    """
    with _one_line(path):
        picture = _open(data)
        height, width, channels = picture.shape
        if not 0 < height * width <= _PIXELS_A_BYTE * len(data):
            raise ValueError("a header that its file cannot hold")
    if admit is not None:
        admit((1 if channels < 3 else 3, height, width))
    with _one_line(path):
        return picture.read()


class _Refusal(Exception):
    """A picture that is whole but cannot be taken: what it is, and how to save it instead."""

    def __init__(self, kind: str, advice: str = "save it as a PNG first"):
        self.kind, self.advice = kind, advice


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        # Pillow warns of images above half the largest, which a generator can still be asked to fit.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except _Refusal as refusal:
        problem = f"grey, RGB or RGBA of 8 or 16 bits, or of floats in a TIFF, got {refusal.kind} in {path}"
        advice = refusal.advice
    except Image.UnidentifiedImageError:
        problem = f"a PNG, JPEG or TIFF file, got {path}, which is none or is damaged"
        advice = "save it as a PNG first"
    except Image.DecompressionBombError:
        problem = f"at most {_most_pixels() // 10**6} megapixels, got more in {path}"
        advice = "scale it down or cut it into parts"
    except Exception:
        # Decoders tell damage by whatever comes up: SyntaxError for a torn PNG, OSError for a torn JPEG, struct.error,
        # IndexError, KeyError and more for a bad tag.
        problem = f"a whole PNG, JPEG or TIFF file, got {path}, which is cut off or damaged"
        advice = "fetch it again"
    else:
        return
    raise ValueError(f"image: expected {problem}, {advice}")


class _Picture(Protocol):
    shape: Shape  # (H, W, C), C with alpha

    def read(self) -> Stored: ...


def _open(data: bytes) -> _Picture:
    if data.startswith(_TIFF_SIGNATURES):
        return _open_tiff(data)
    # Byte 24 is the bit depth, 25 the colour type, of which 3 is a palette.
    if data.startswith(_PNG_SIGNATURE) and len(data) > 25 and data[24] != 8 and data[25] != 3:
        return _DeepPng(data, ("PNG",))
    return _EightBits(data, ("PNG", "JPEG"))


class _EightBits:
    """What Pillow reads as it is."""

    def __init__(self, data: bytes, formats: tuple[str, ...]):
        self._data = data
        self._image = Image.open(io.BytesIO(data), formats=formats)
        if self._image.format == "PNG" and getattr(self._image, "is_animated", False):
            raise _Refusal("an animation")
        self.shape = (self._image.height, self._image.width, self._channels())

    def read(self) -> Stored:
        self._image.load()
        return Stored(_upright(self._values(), self._orientation()), self._image.info.get("icc_profile"))

    def _orientation(self) -> object:
        return self._image.getexif().get(_ORIENTATION)

    def _channels(self) -> int:
        if self._image.mode not in _MODES:
            raise _Refusal(f"{self._image.mode} colours")
        return len(_MODES[self._image.mode])

    def _values(self) -> np.ndarray:
        mode = _MODES[self._image.mode]
        if "transparency" in self._image.info:
            mode = _WITH_ALPHA.get(mode, mode)
        return np.atleast_3d(np.asarray(self._image.convert(mode)))


class _EightBitTiff(_EightBits):
    """A TIFF of 8 bits, compressed or not."""

    def read(self) -> Stored:
        with _silent_libtiff():
            return super().read()

    def _orientation(self) -> object:
        return None  # Pillow has turned it, though it need not have forgotten the tag


class _DeepPng(_EightBits):
    """A PNG of 16 bits, or of 1, 2 or 4, which become 8; Pillow still reads its profile and EXIF."""

    def _channels(self) -> int:
        return {0: 1, 2: 3, 4: 2, 6: 4}[self._data[25]]

    def _values(self) -> np.ndarray:
        import png

        height, width, channels = self.shape
        body = b"".join(body for kind, body in png.Reader(bytes=self._data).chunks() if kind == b"IDAT")
        # pypng inflates without a limit. Pixels take up to 8 bytes, and each row of each pass a byte more.
        _check_inflated(body, 8 * (height * width + height + width))
        reader = png.Reader(bytes=self._data)
        _, _, rows, info = reader.read()
        values = np.array([np.asarray(row) for row in rows]).reshape(height, width, channels)
        if reader.transparent is not None:
            opaque = (values != reader.transparent).any(axis=2, keepdims=True)
            values = np.concatenate([values, opaque * values.dtype.type(2 ** info["bitdepth"] - 1)], axis=2)
        return values if info["bitdepth"] == 16 else values * np.uint8(255 // (2 ** info["bitdepth"] - 1))


def _open_tiff(data: bytes) -> _Picture:
    import tifffile

    with _silent_tifffile():
        pages = tifffile.TiffFile(io.BytesIO(data)).pages
        count, page = len(pages), pages[0]
    if count != 1 or page.axes not in ("YX", "YXS", "SYX"):
        raise _Refusal("several pictures")
    if page.extrasamples not in ((), (tifffile.EXTRASAMPLE.UNASSALPHA,)):
        raise _Refusal("premultiplied alpha or another extra channel")
    if page.dtype in (np.uint8, np.bool_):
        return _EightBitTiff(data, ("TIFF",))
    return _DeepTiff(page)


class _DeepTiff:
    """A TIFF of 16 bits or of floats, without compression or deflated."""

    def __init__(self, page: Any):
        import tifffile

        white_is_0 = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        grey_or_colour = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
        if page.dtype not in (np.uint16, np.float16, np.float32, np.float64):
            raise _Refusal(f"values of type {page.dtype}")
        if page.bitspersample != 8 * page.dtype.itemsize:
            raise _Refusal(f"values of {page.bitspersample} bits")
        if not grey_or_colour and not (white_is_0 and page.dtype == np.uint16):
            raise _Refusal(f"{page.photometric.name} colours")
        if page.compression not in (1, *_DEFLATE) or page.predictor not in (1, 2):
            # Others take codecs of 26 megabytes; Pillow has them, but for 8 bits and grey only.
            kind = f"{page.compression.name} compression" + (", predicted" if page.predictor != 1 else "")
            raise _Refusal(kind, "save it without compression first")
        shape = dict(zip(page.axes, page.shape, strict=True))
        self.shape = (shape["Y"], shape["X"], shape.get("S", 1))
        if max(shape["Y"] * shape["X"], prod(page.chunks) // 4) > _most_pixels():
            raise Image.DecompressionBombError
        self._page, self._white_is_0 = page, white_is_0

    def read(self) -> Stored:
        page = self._page
        # tifffile takes what is missing as zeros.
        if len(page.dataoffsets) != prod(page.chunked):
            raise ValueError("a strip or tile is missing")
        with _silent_tifffile():
            for segment, index in page.parent.filehandle.read_segments(page.dataoffsets, page.databytecounts):
                if not segment:
                    raise ValueError(f"strip or tile {index} is empty")
                if page.compression in _DEFLATE:
                    _check_inflated(segment, prod(page.chunks) * page.dtype.itemsize)
            values = page.asarray()
        values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else np.atleast_3d(values)
        if self._white_is_0:
            values = np.iinfo(values.dtype).max - values
        orientation, icc_profile = (
            page.tags[number].value if number in page.tags else None for number in (_ORIENTATION, _ICC_PROFILE)
        )
        return Stored(_upright(values, orientation), icc_profile)


@contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Send standard error nowhere: below Pillow, libtiff writes there what it finds in a damaged file."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(nowhere)
        os.close(stderr)


@contextmanager
def _silent_tifffile() -> Iterator[None]:
    """Keep tifffile from logging what it finds in a damaged file."""
    logger, nothing = logging.getLogger("tifffile"), lambda _record: False
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _most_pixels() -> int:
    """Twice what Pillow warns of, from where on it refuses."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**31)


def _check_inflated(data: bytes, most: int) -> None:
    """Raise ValueError if data inflates to more than `most` bytes, without inflating more."""
    if len(zlib.decompressobj().decompress(data, most + 1)) > most:
        raise ValueError("more data than the picture has")


def _upright(values: np.ndarray, orientation: object) -> np.ndarray:
    """Turn (H, W, C) as EXIF's orientation, 1 to 8, says; anything else means nothing."""
    turn = {
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.swapaxes(0, 1),
        6: lambda v: v[::-1].swapaxes(0, 1),
        7: lambda v: v[::-1, ::-1].swapaxes(0, 1),
        8: lambda v: v[:, ::-1].swapaxes(0, 1),
    }.get(orientation, lambda v: v)
    return np.ascontiguousarray(turn(values))
