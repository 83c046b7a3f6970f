"""Photographs in and out: what a generator does not restore (alpha, colour profile) is put back."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparse_gen.experiments.decode import Shape, decode
from sparse_gen.files import atomic_write

_ICC_PROFILE = 34675  # its tag in a TIFF


@dataclass(frozen=True)
class Photograph:
    """An image file as the generators want it, with what it takes to write a result like it.

    Attributes:
        pixels: float32 (1, C, H, W) in [0, 1]; C is 1 for grey, 3 for colour, without alpha.
        dtype: what the file is written back in: "uint8", "uint16" or "float32".
        alpha: (H, W) of that type, or None.
        icc_profile: the colour profile's bytes, or None.
        sha256: of the file's bytes.
        path: where it was read.
    """

    pixels: torch.Tensor
    dtype: str
    alpha: np.ndarray | None
    icc_profile: bytes | None
    sha256: str
    path: Path

    @property
    def mode(self) -> str:
        """Pillow's word for it: L, LA, RGB or RGBA."""
        colour = "L" if self.pixels.shape[1] == 1 else "RGB"
        return colour if self.alpha is None else colour + "A"

    @property
    def suffix(self) -> str:
        """Of the files that `write_image` writes like it: floats need a TIFF."""
        return ".tif" if self.dtype == "float32" else ".png"


def read_image(path: str | os.PathLike[str], admit: Callable[[Shape], None] | None = None) -> Photograph:
    """Read a grey or colour image, with or without alpha, turned as its EXIF says.

    Args:
        path: a PNG (of any depth, palettes included), a JPEG, or a TIFF of 8 or 16 bits or of floats in [0, 1].
        admit: called with (C, H, W) once the header is read; it may refuse the image by raising.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is a folder or cannot be read.
        ValueError: if it is empty, damaged, of a kind that could not be written back as it is (CMYK, animation,
            premultiplied alpha, …), or holds floats out of [0, 1].
    """
    path = Path(path)
    data = _read_bytes(path)
    values, icc_profile = decode(data, path, admit)
    alpha = values[..., -1] if values.shape[2] in (2, 4) else None
    colour = values[..., : 1 if values.shape[2] < 3 else 3]
    if values.dtype.kind == "f":
        _check_range(colour, path)
        dtype, scale = "float32", 1.0
        alpha = None if alpha is None else alpha.astype(np.float32)
    else:
        dtype, scale = values.dtype.name, float(np.iinfo(values.dtype).max)
    pixels = np.ascontiguousarray(colour.transpose(2, 0, 1)[None], np.float32)
    pixels /= scale
    return Photograph(torch.from_numpy(pixels), dtype, alpha, icc_profile, hashlib.sha256(data).hexdigest(), path)


def write_image(path: str | os.PathLike[str], pixels: torch.Tensor, like: Photograph) -> None:
    """Write an image of the same kind as `like`: its depth, alpha and colour profile are kept.

    Args:
        path: the file's name, with `like.suffix`: floats go to a TIFF, all else to a PNG.
        pixels: (1, C, H, W) or (C, H, W) in [0, 1], of `like`'s size. Whole numbers are clipped and rounded to the
            nearest level; floats are written as they are.
        like: the photograph that was restored.

    Raises:
        ValueError: if the size differs from `like`'s.
        OSError: if it cannot be written.
    """
    expected = tuple(like.pixels.shape[1:])
    image = pixels.detach().cpu()
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    if tuple(image.shape) != expected:
        raise ValueError(
            f"pixels: expected (C, H, W) = {expected} like {like.path}, got {tuple(pixels.shape)}, "
            "write one image at a time and of the same size"
        )
    values = image.permute(1, 2, 0).numpy()
    if like.dtype != "float32":
        values = (values.astype(np.float64).clip(0, 1) * np.iinfo(like.dtype).max).round()
    values = values.astype(like.dtype)
    if like.alpha is not None:
        values = np.concatenate([values, like.alpha[..., None]], axis=2)
    encode = {"uint8": _png, "uint16": _deep_png, "float32": _tiff}[like.dtype]
    content = encode(np.ascontiguousarray(values), like.icc_profile)
    with atomic_write(path) as file:
        file.write(content)


def _read_bytes(path: Path) -> bytes:
    expected = "image: expected a PNG, JPEG or TIFF file"
    if not path.exists():
        raise FileNotFoundError(f"{expected}, got {path}, which is not there, check the name")
    if path.is_dir():
        raise IsADirectoryError(f"{expected}, got the folder {path}, name a file in it")
    if not path.is_file():
        raise ValueError(f"{expected}, got {path}, which is a device or a pipe, save it as a file first")
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{expected}, got {path}, which cannot be read ({reason}), see to it first") from None
    if not data:
        raise ValueError(f"{expected}, got {path}, which is empty (0 bytes), fetch it again")
    return data


def _check_range(values: np.ndarray, path: Path) -> None:
    unfit = values.size - np.count_nonzero(np.isfinite(values))
    if unfit:
        raise ValueError(
            f"image: expected finite numbers, got NaN or infinity in {unfit:,} of {values.size:,} values of {path}, "
            "replace them first"
        )
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        advice = "shift and divide them first"
        if low >= 0:
            advice = f"divide them by {255 if high <= 255 else 65535 if high <= 65535 else f'{high:.4g}'} first"
        raise ValueError(
            f"image: expected floats in [0, 1], got values from {low:.4g} to {high:.4g} in {path}, {advice}"
        )


def _png(values: np.ndarray, icc_profile: bytes | None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    image.save(buffer, format="PNG", icc_profile=icc_profile)
    return buffer.getvalue()


def _deep_png(values: np.ndarray, icc_profile: bytes | None) -> bytes:
    """16 bits a channel, which Pillow cannot write; pypng can, but for the profile, whose chunk is put in by hand."""
    import png

    height, width, channels = values.shape
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
    buffer = io.BytesIO()
    writer.write_packed(buffer, (row.tobytes() for row in values.astype(">u2")))
    if icc_profile is None:
        return buffer.getvalue()
    header, *others = png.Reader(bytes=buffer.getvalue()).chunks()
    buffer = io.BytesIO()
    png.write_chunks(buffer, [header, (b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile)), *others])
    return buffer.getvalue()


def _tiff(values: np.ndarray, icc_profile: bytes | None) -> bytes:
    import tifffile

    channels = values.shape[2]
    buffer = io.BytesIO()
    # Without the library's own words in the file, equal images are equal files.
    tifffile.imwrite(
        buffer,
        values[..., 0] if channels == 1 else values,
        photometric="minisblack" if channels < 3 else "rgb",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        extratags=[] if icc_profile is None else [(_ICC_PROFILE, 7, len(icc_profile), icc_profile, True)],
        metadata=None,
        software=False,
    )
    return buffer.getvalue()
