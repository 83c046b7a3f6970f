"""Tensors out of pickles that others wrote, without running anything that is in them.

Three layouts are read: what torch.save writes now (a zip), what it wrote before 1.6 (pickles, then raw storages), and a
plain pickle of tensors, each of whose storages is a file of the second kind. A pickle is a program: here it may make
lists, dicts, numbers and text, and call the few names below, which are ours and only note what they are given. Nothing
is allocated before the bytes for it were seen to be there.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from dataclasses import dataclass
from math import prod

import torch

# Plain data, and calls of what `find_class` gives. Not among them: whatever makes or changes instances.
_PLAIN = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES BINBYTES8 SHORT_BINBYTES UNICODE BINUNICODE BINUNICODE8
    SHORT_BINUNICODE EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM
    SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"""
_OPCODES = frozenset(_PLAIN.split())
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
    "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DEEPEST = 2  # a pickle, and the storages in it
_NESTING = 8


class UnreadablePickle(ValueError):
    """The content is refused, is no pickle, or is cut off; the message is what follows "got FILE, "."""


@dataclass
class _Storage:
    """Raw numbers of a file, on whatever device they once were."""

    dtype: torch.dtype
    count: int
    data: bytes | None = None


@dataclass(frozen=True)
class _View:
    """A tensor whose storage may not have been read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        if self.storage.data is None:
            raise UnreadablePickle("which is cut off: a tensor's numbers are missing")
        if not self.storage.count:
            return torch.empty(self.size, dtype=self.storage.dtype)
        numbers = torch.frombuffer(bytearray(self.storage.data), dtype=self.storage.dtype)
        return numbers.as_strided(self.size, self.stride, self.offset).clone()


def read_pickled_tensors(content: bytes) -> object:
    """What a file of torch.save or pickle.dump holds, as lists, dicts and tensors on the CPU.

    Raises:
        UnreadablePickle: it holds more than tensors and plain data, or is damaged; nothing of it was executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged text has escapes that Python warns of
            return _Resolver(len(content))(_read(content, 0))
    except UnreadablePickle:
        raise
    # A damaged pickle fails in any of its instructions, and each has errors of its own.
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError, LookupError, AttributeError,
        ArithmeticError, RecursionError, NotImplementedError, RuntimeError, AssertionError,
    ):  # fmt: skip
        raise UnreadablePickle("which is cut off or damaged, fetch it again") from None


def _read(content: bytes, depth: int) -> object:
    if depth >= _DEEPEST:
        raise UnreadablePickle("whose pickles are nested deeper than any tensor's")
    if content.startswith(b"PK"):
        return _read_zip(content, depth)
    stream = io.BytesIO(content)
    first = _load(stream, depth, None)
    return _read_legacy(stream, depth) if first == _LEGACY_MAGIC and isinstance(first, int) else first


def _read_zip(content: bytes, depth: int) -> object:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        programs = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(programs) != 1:
            raise UnreadablePickle("a zip that torch.save did not write")
        folder = programs[0].removesuffix("data.pkl")

        def bytes_of(name: str) -> bytes:
            # torch.save does not compress: whatever an entry unpacks to is in the file.
            if name not in entries or entries[name].compress_type != zipfile.ZIP_STORED:
                raise UnreadablePickle("a zip that torch.save did not write")
            return archive.read(entries[name])

        if f"{folder}byteorder" in entries and bytes_of(f"{folder}byteorder") != b"little":
            raise UnreadablePickle("which a big-endian machine wrote")

        def fill(key: str, storage: _Storage) -> None:
            name = f"{folder}data/{key}"
            if name not in entries or entries[name].file_size != storage.count * storage.dtype.itemsize:
                raise UnreadablePickle(_claims(storage, entries[name].file_size if name in entries else 0))
            storage.data = bytes_of(name)

        return _load(io.BytesIO(bytes_of(programs[0])), depth, fill)


def _read_legacy(stream: io.BytesIO, depth: int) -> object:
    """Protocol number, the machine's properties, the object, its storages' keys, and each storage's numbers."""
    protocol, machine = _load(stream, depth, None), _load(stream, depth, None)
    if protocol != _LEGACY_PROTOCOL or machine.get("little_endian") is not True:
        raise UnreadablePickle("of a version of torch.save or a machine that is not read")
    storages: dict[str, _Storage] = {}
    value = _load(stream, depth, storages.__setitem__)
    for key in _load(stream, depth, None):
        storage = storages.pop(key)
        count = int.from_bytes(stream.read(8), "little")
        left = len(stream.getbuffer()) - stream.tell()
        if count != storage.count or count * storage.dtype.itemsize > left:
            raise UnreadablePickle(_claims(storage, left))
        storage.data = stream.read(count * storage.dtype.itemsize)
    return value


def _claims(storage: _Storage, found: int) -> str:
    claimed = storage.count * storage.dtype.itemsize
    return f"which claims {claimed:,} bytes for a tensor and has {found:,}, fetch it again"


def _load(stream: io.BytesIO, depth: int, note) -> object:
    """The next pickle of the stream; `note` is called with the key of each storage that it names."""
    start = stream.tell()
    for opcode, _, _ in pickletools.genops(stream):
        if opcode.name not in _OPCODES:
            raise UnreadablePickle(f"which uses {opcode.name}, more than tensors need, refused")
    stream.seek(start)
    return _Restricted(stream, depth, note).load()


class _Restricted(pickle._Unpickler):
    """The one in Python: in C, a memo index that a crafted file names allocates as many entries."""

    def __init__(self, stream: io.BytesIO, depth: int, note):
        super().__init__(stream)
        self._depth, self._note = depth, note
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        allowed = {
            "torch._utils._rebuild_tensor": _rebuild,
            "torch._utils._rebuild_tensor_v2": _rebuild,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
            "torch.storage._load_from_bytes": self._nested,
            "collections.OrderedDict": _empty,
            "_codecs.encode": _encode,
        }
        full = f"{module}.{name}"
        if full not in allowed:
            shown = full if len(full) <= 80 else f"{full[:80]}…"
            raise UnreadablePickle(f"which asks for {shown}, more than tensors need, refused")
        return allowed[full]

    def persistent_load(self, identity: object) -> _Storage:
        if self._note is None or not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise UnreadablePickle("which refers to something outside of it, refused")
        kind, dtype, key, _, count, *view = identity
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or view not in ([], [None]):
            raise UnreadablePickle("which refers to something outside of it, refused")
        if type(count) is not int or count < 0:
            raise UnreadablePickle("which has a storage without a size")
        if key not in self._storages:
            self._storages[key] = _Storage(dtype, count)
            self._note(key, self._storages[key])
        return self._storages[key]

    def _nested(self, content: object) -> object:
        if not isinstance(content, bytes):
            raise UnreadablePickle("which has a storage that is not made of bytes")
        return _read(content, self._depth + 1)


def _rebuild(storage, offset, size, stride, *_ignored) -> _View:
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise UnreadablePickle("which has a tensor without a storage, a shape or strides")
    if len(size) != len(stride):
        raise UnreadablePickle("which has a tensor without a storage, a shape or strides")
    count = prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
    # An expanded tensor would repeat its numbers as often as a file cares to say.
    if count > storage.count or reach >= storage.count:
        shape = "×".join(map(str, size))
        raise UnreadablePickle(
            f"which claims a tensor of {shape[:80]} in a storage of {storage.count:,}, fetch it again"
        )
    return _View(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(view, *_ignored) -> _View:
    if not isinstance(view, _View):
        raise UnreadablePickle("which has a parameter without a tensor")
    return view


def _empty(*arguments) -> dict:
    if arguments:
        raise UnreadablePickle("which has an ordered dict made of something, more than tensors need, refused")
    return {}


def _encode(text, encoding) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnreadablePickle("which encodes text otherwise than pickles do, refused")
    return text.encode("latin1")


class _Resolver:
    """Views as tensors. What names something again and again cannot grow beyond the file's own size."""

    def __init__(self, most: int):
        self._left = most

    def __call__(self, value: object, depth: int = 0) -> object:
        self._left -= 1 + (prod(value.size) if isinstance(value, _View) else 0)
        if depth > _NESTING or self._left < 0:
            raise UnreadablePickle("which is nested deeper than lists of tensors are, or repeats them")
        if isinstance(value, _View):
            return value.tensor()
        if isinstance(value, (list, tuple)):
            return [self(entry, depth + 1) for entry in value]
        if isinstance(value, dict):
            return {name: self(entry, depth + 1) for name, entry in value.items()}
        return value
