"""Image files that tests share, some of kinds that Pillow cannot write."""

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's, by channels


def stripes() -> np.ndarray:
    """A small picture of which every flip differs: (24, 28, 3) of 8 bits."""
    rows, columns = np.mgrid[0:24, 0:28]
    return np.stack([8 * columns, 9 * rows, 255 * (columns > 14)], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(values: np.ndarray, depth: int, extra: bytes = b"", body: bytes | None = None) -> bytes:
    """A PNG by hand, since Pillow cannot write 16-bit colour: (H, W, C) of `depth` bits a value."""
    height, width, channels = values.shape
    if body is None:
        bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(height, width * channels, 2), axis=2)
        rows = np.packbits(bits[..., 16 - depth :].reshape(height, -1), axis=1)
        body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(values, **options) -> bytes:
    buffer = io.BytesIO()
    channels = values.shape[2]
    options = {
        "photometric": "minisblack" if channels < 3 else "rgb",
        "planarconfig": None if channels == 1 else "contig",
        "extrasamples": ["unassalpha"] if channels in (2, 4) else None,
    } | options
    values = values[..., 0] if channels == 1 else values
    tifffile.imwrite(buffer, values.transpose(2, 0, 1) if options["planarconfig"] == "separate" else values, **options)
    return buffer.getvalue()


def bare_tiff(data: bytes, **changes: int) -> bytes:
    """A deflated 16-bit grey TIFF of 8 × 8 pixels whose tags say what is given."""
    tags = {"width": (256, 8), "height": (257, 8), "bits": (258, 16), "compression": (259, 8), "photometric": (262, 1),
            "offset": (273, 8), "channels": (277, 1), "rows": (278, 8), "count": (279, len(data))}  # fmt: skip
    tags |= {name: (tags[name][0], value) for name, value in changes.items()}
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags.values())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
