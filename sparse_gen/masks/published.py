"""Masks that the OES authors published, as masks of ours."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.masks.mask import Mask
from sparse_gen.masks.pickles import UnreadablePickle, read_pickled_tensors

# Ten times the largest network here in float64.
MOST_BYTES = 2**28
_PACKED = ("bits", "numel", "shapes")


def import_mask(path: str | PathLike, net: nn.Module | None = None) -> Mask:
    """Read a mask that the authors of Optimal Eye Surgeon published.

    Args:
        path: their `mask_*.pkl`, a list of tensors of zeros and ones, one a parameter, or one flat tensor; or the
            packed form, an .npz of `bits` (numpy.packbits of the flat mask), `numel` and `shapes` (JSON).
        net: the network it belongs to; by default the `Hourglass` they used, 3,008,867 parameters.

    Returns:
        A mask without weights, since the files hold none: it keeps a topology, not an initialisation. Its recipe tells
        the file's SHA-256.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds more than numbers, is damaged or too large, or its shapes are not the network's, both of
            which the message lists. Nothing in the file is ever executed.

    Ghosh et al., "Optimal Eye Surgeon" (ICML 2024).
    """
    network = default_network() if net is None else net
    content = _content(Path(path))
    packed = _is_packed(content)
    try:
        entries = _read_packed(content) if packed else read_pickled_tensors(content)
        flat = _flat(entries, ParameterLayout.of(network))
    except UnreadablePickle as refused:
        raise ValueError(f"expected a published mask, got {path}, {refused}") from None
    recipe = {
        "import": {
            "file": Path(path).name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "layout": "packed" if packed else "pickled",
        }
    }
    if hasattr(network, "recipe"):
        made = network.recipe()
        # Of which seed the authors' network was is not in the file.
        recipe["net"] = {**made, "arguments": {k: v for k, v in made["arguments"].items() if k != "seed"}}
    return Mask(ParameterLayout.of(network).views(flat), recipe=recipe)


def default_network() -> nn.Module:
    from sparse_gen.generators import Hourglass

    with torch.device("meta"):
        return Hourglass()


def _content(path: Path) -> bytes:
    expected = f"expected a published mask, got {path}"
    if not path.exists():
        raise FileNotFoundError(f"{expected}, which is not there, check the name")
    if path.is_dir():
        raise IsADirectoryError(f"{expected}, which is a folder, name a file in it")
    if not path.is_file():
        raise ValueError(f"{expected}, which is a device or a pipe, save it as a file first")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{expected} of {path.stat().st_size:,} bytes, more than any mask has, name another")
    return path.read_bytes()


def _is_packed(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _flat(entries: object, layout: ParameterLayout) -> torch.Tensor:
    tensors = entries if isinstance(entries, list) else [entries]
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise UnreadablePickle("which holds something else than tensors")
    wanted = list(layout.shapes.values())
    if len(tensors) == 1 and tensors[0].ndim == 1 and len(wanted) > 1:
        shapes, wanted = [tuple(tensors[0].shape)], [(layout.numel,)]
    else:
        shapes = [tuple(tensor.shape) for tensor in tensors]
    check_shapes(shapes, wanted)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    keep = flat != 0
    if not (keep == flat).all():
        raise UnreadablePickle("which holds other numbers than 0 and 1")
    return keep


def check_shapes(got: list, expected: list) -> None:
    """Raise UnreadablePickle, listing both, unless the shapes are those expected in their order."""
    if [tuple(shape) for shape in got] != [tuple(shape) for shape in expected]:
        raise UnreadablePickle(
            f"whose shapes are not the network's: expected {_shown(expected)}, got {_shown(got)}; name the network it "
            "belongs to"
        )


def _shown(shapes: list, most: int = 400) -> str:
    listed = [str("×".join(map(str, shape)) or "a number")[:60] for shape in shapes[:most]]
    return f"{len(shapes)} shapes: " + ", ".join(listed) + (", …" if len(shapes) > most else "")


def _read_packed(content: bytes) -> torch.Tensor | list[torch.Tensor]:
    """The mask of an .npz, split into its parameters."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            bits, numel, shapes = (_array(archive, name) for name in _PACKED)
        numel, shapes = int(numel), json.loads(str(shapes))
        sizes = [prod(shape) for shape in shapes]
        lengths = [length for shape in shapes for length in shape]
    except UnreadablePickle:
        raise
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, RecursionError, NotImplementedError):
        raise UnreadablePickle("which is cut off or damaged, fetch it again") from None
    if not all(type(length) is int and length >= 1 for length in lengths):
        raise UnreadablePickle("whose shapes are no lists of positive numbers")
    if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != (numel + 7) // 8 or numel < 1:
        raise UnreadablePickle(f"whose {bits.size:,} bytes of bits make no mask of {str(numel)[:60]} entries")
    if sum(sizes) != numel:
        raise UnreadablePickle(f"whose {len(sizes)} shapes have not {numel:,} entries in all: {_shown(shapes)}")
    flat = torch.from_numpy(np.unpackbits(bits, count=numel).astype(bool))
    return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, whose header is compared with the bytes there before numpy makes room for what it claims."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise UnreadablePickle(f"an .npz without {name}") from None
    if info.file_size > MOST_BYTES:
        raise UnreadablePickle(f"whose {name} claims {info.file_size:,} bytes, more than any mask has")
    with archive.open(info) as file:
        data = io.BytesIO(file.read(info.file_size))
    if np.lib.format.read_magic(data) != (1, 0):
        raise UnreadablePickle("which is cut off or damaged, fetch it again")
    shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    claimed, found = prod(shape) * dtype.itemsize, len(data.getbuffer()) - data.tell()
    if dtype.hasobject:
        raise UnreadablePickle(f"whose {name} is an array of objects, refused")
    if claimed != found:
        raise UnreadablePickle(f"whose {name} claims {claimed:,} bytes and has {found:,}, fetch it again")
    data.seek(0)
    return np.load(data, allow_pickle=False)
