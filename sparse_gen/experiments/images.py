"""Photographs in and out: what a generator does not restore (alpha, colour profile) is put back."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from sparse_gen.files import atomic_write

_COLOUR_MODES = {"L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB"}
_NAMES = {
    "1": "1-bit black and white",
    "P": "palette colours",
    "PA": "palette colours",
    "I;16": "16-bit grey",
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Photograph:
    """An image file as the generators want it, with what it takes to write a result like it.

    Attributes:
        pixels: float32 (1, C, H, W) in [0, 1]; C is 1 for grey, 3 for colour, without alpha.
        alpha: uint8 (H, W), or None.
        icc_profile: the colour profile's bytes, or None.
        sha256: of the file's bytes.
        path: where it was read.
    """

    pixels: torch.Tensor
    alpha: np.ndarray | None
    icc_profile: bytes | None
    sha256: str
    path: Path

    @property
    def mode(self) -> str:
        """Pillow's word for it: L, LA, RGB or RGBA."""
        colour = "L" if self.pixels.shape[1] == 1 else "RGB"
        return colour if self.alpha is None else colour + "A"


def read_image(path: str | os.PathLike[str]) -> Photograph:
    """Read an 8-bit grey or colour PNG or JPEG, with or without alpha, turned as its EXIF says.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is a folder or cannot be read.
        ValueError: if it is empty, broken, or of a kind that could not be written back unchanged
            (palette, 16 bit, CMYK, animation).
    """
    path = Path(path)
    data = _read_bytes(path)
    image = _decode(data, path)
    if "transparency" in image.info and image.mode in ("L", "RGB"):
        image = image.convert(image.mode + "A")
    if image.mode not in _COLOUR_MODES or _sixteen_bit_png(data):
        kind = "16 bits a channel" if _sixteen_bit_png(data) else _NAMES.get(image.mode, image.mode)
        raise ValueError(
            f"image: expected 8-bit grey, RGB or RGBA, got {kind} in {path}, save it as an 8-bit PNG first"
        )
    icc_profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    alpha = np.asarray(image.getchannel("A")) if image.mode.endswith("A") else None
    colour = np.asarray(image.convert(_COLOUR_MODES[image.mode]))
    colour = colour[:, :, None] if colour.ndim == 2 else colour
    pixels = torch.from_numpy(colour.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    return Photograph(pixels, alpha, icc_profile, hashlib.sha256(data).hexdigest(), path)


def write_image(path: str | os.PathLike[str], pixels: torch.Tensor, like: Photograph) -> None:
    """Write an 8-bit PNG of the same kind as `like`: its alpha and colour profile are put back.

    Args:
        path: the PNG's name.
        pixels: (1, C, H, W) or (C, H, W) in [0, 1], of `like`'s size; values outside are clipped,
            the rest rounded to the nearest of the 256 levels.
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
    levels = (image.double().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    planes = [*np.moveaxis(levels, 2, 0)] + ([like.alpha] if like.alpha is not None else [])
    merged = Image.merge(like.mode, [Image.fromarray(np.ascontiguousarray(p)) for p in planes])
    with atomic_write(path) as file:
        merged.save(file, format="PNG", icc_profile=like.icc_profile)


def _read_bytes(path: Path) -> bytes:
    expected = "image: expected a PNG or JPEG file"
    if not path.exists():
        raise FileNotFoundError(f"{expected}, got {path}, which is not there, check the name")
    if path.is_dir():
        raise IsADirectoryError(f"{expected}, got the folder {path}, name a file in it")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{expected}, got {path}, which is empty (0 bytes), fetch it again")
    return data


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        # Pillow warns of images above 89 megapixels, which a generator can still be asked to fit.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            if image.format == "PNG" and getattr(image, "is_animated", False):
                raise ValueError(f"image: expected one picture, got an animation in {path}, save one frame")
            image.load()
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"image: expected a PNG or JPEG file, got {path}, which is neither or is damaged, "
            "save it as an 8-bit PNG first"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"image: expected at most {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels, got more "
            f"in {path}, scale it down or cut it into parts"
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        # Pillow reports a torn PNG as SyntaxError and a torn JPEG as OSError.
        raise ValueError(
            f"image: expected a whole PNG or JPEG file, got {path}, which is damaged ({error}), fetch it again"
        ) from None
    return image


def _sixteen_bit_png(data: bytes) -> bool:
    """Whether the PNG header says 16 bits: Pillow reads 16-bit colour as 8-bit without a word."""
    return data.startswith(_PNG_SIGNATURE) and len(data) > 24 and data[24] == 16
