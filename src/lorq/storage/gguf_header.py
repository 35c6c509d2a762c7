"""The header of a GGUF file, which is hostile until checked: what the gguf package reads believes every count in it.

Layout: ``GGUF``, version (u32), number of tensors and of keys (u64); each key: a text, the number of its type, the
value; each tensor: a text, the number of its sizes (u32), the sizes (u64, the innermost first), the number of its type,
where it begins. A text is a length (u64) and UTF-8; an array the number of its type (u32), a length (u64), the values.
Tensors begin at multiples of the alignment, counted from the first multiple behind the header.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorq.storage.json_files import _short, damaged

_VERSIONS = (2, 3)
_TEXT, _ARRAY, _U32 = 8, 9, 4
# Bytes of a value by the number of its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_DEEPEST = 4  # arrays in arrays; llama.cpp writes none
_MOST_SIZES = 4  # GGML_MAX_DIMS
_MOST = 2**60
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class GgufTensor:
    """What the header says of a tensor.

    Attributes:
        shape: the innermost size last, as everywhere but in the file.
        type: its name in ggml, such as "q4_0".
        begin, end: in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    begin: int
    end: int


class _Header:
    """Bytes that are taken one after the other, and never behind the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise damaged(self.path, f"{what} ends at byte {self.at + count}, the file has {self.size}")
        self.at += count

    def take(self, count: int, what: str) -> bytes:
        self.skip(count, what)
        return self.data[self.at - count : self.at]

    def skip_texts(self, count: int, what: str) -> None:
        """Past the texts of an array, of which a vocabulary has half a million."""
        at, size, data, length_at = self.at, self.size, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size or (at := at + 8 + length_at(data, at)[0]) > size:
                raise damaged(self.path, f"{what} ends at byte {at}, the file has {size}")
        self.at = at

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]
        return value

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("Q", what), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"{what} must be UTF-8 ({error})") from None

    def count(self, what: str, least: int) -> int:
        """How many of something follow, each of at least so many bytes."""
        number = self.number("Q", what)
        if number * least > self.size - self.at:
            raise damaged(self.path, f"{what} must be as many as the file has room for, got {number}")
        return number


def read_gguf_header(path: Path) -> list[GgufTensor]:
    """Check a file's header, value by value, and that its tensors lie in the file, none in another.

    Returns:
        The tensors, in the order of the file.

    Raises:
        ValueError: naming what breaks the format.
        ImportError: without the gguf package, which knows ggml's types.
    """
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} must be a GGUF file, which begins with b'GGUF', it begins with {magic!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Header(path, data))


def _read(head: _Header) -> list[GgufTensor]:
    """The tensors of a file that begins as it must."""
    path = head.path
    head.skip(4, "the magic")
    if (version := head.number("I", "the version")) not in _VERSIONS:
        raise damaged(path, f"the version of GGUF must be one of {_VERSIONS}, got {version}")
    types = _types()
    tensors, keys = head.count("tensors", 24), head.number("Q", "keys")
    alignment = _keys(head, keys)
    found = [_tensor(head, types) for _ in range(tensors)]
    start = -(-head.at // alignment) * alignment
    return list(_placed(path, found, start, head.size, alignment))


def _types() -> dict[int, tuple[str, int, int]]:
    """ggml's types by their numbers: name, weights and bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the gguf package: pip install 'lorq[gguf]'") from error
    return {int(type_): (type_.name.lower(), *sizes) for type_, sizes in GGML_QUANT_SIZES.items()}


def _keys(head: _Header, count: int) -> int:
    """The alignment, after a look at every key."""
    alignment, names = 32, set()
    for _ in range(count):
        name = head.text("a key")
        if name in names:
            raise damaged(head.path, f"each key must be there once, {_short(name)} is twice")
        names.add(name)
        type_ = head.number("I", _short(name))
        if name == _ALIGNMENT:
            if type_ != _U32:
                raise damaged(head.path, f"{_ALIGNMENT} must be a u32 (type {_U32}), got type {type_}")
            alignment = head.number("I", name)
            if alignment < 1 or alignment & (alignment - 1):
                raise damaged(head.path, f"{_ALIGNMENT} must be a power of two, got {alignment}")
        else:
            _value(head, _short(name), type_)
    return alignment


def _value(head: _Header, name: str, type_: int, depth: int = 0) -> None:
    if type_ in _SIZES:
        head.skip(_SIZES[type_], name)
    elif type_ == _TEXT:
        head.text(name)
    elif type_ == _ARRAY and depth < _DEEPEST:
        inner = head.number("I", name)
        least = 8 if inner == _TEXT else 12 if inner == _ARRAY else 1
        count = head.count(f"the values of {name}", least)
        if inner in _SIZES:
            head.skip(count * _SIZES[inner], name)
        elif inner == _TEXT:
            head.skip_texts(count, f"a text of {name}")
        else:
            for _ in range(count):
                _value(head, name, inner, depth + 1)
    else:
        what = f"arrays up to {_DEEPEST} deep" if type_ == _ARRAY else "of a type from 0 to 12"
        raise damaged(head.path, f"{name} must have values {what}, got type {type_}")


def _tensor(head: _Header, types: dict[int, tuple[str, int, int]]) -> GgufTensor:
    """A tensor whose begin counts from the first."""
    name = head.text("the name of a tensor")
    if (dimensions := head.number("I", _short(name))) > _MOST_SIZES:
        raise damaged(head.path, f"{_short(name)} must have up to {_MOST_SIZES} sizes, got {dimensions}")
    shape = tuple(head.number("Q", _short(name)) for _ in range(dimensions))[::-1]
    type_, begin = head.number("I", _short(name)), head.number("Q", _short(name))
    if type_ not in types:
        raise damaged(head.path, f"{_short(name)} must have a type that the gguf package knows, got {type_}")
    kind, block, size = types[type_]
    entries = math.prod(shape)
    if entries >= _MOST or min(shape, default=1) < 1 or (shape or (1,))[-1] % block:
        raise damaged(
            head.path, f"{_short(name)} must have sizes from 1, the innermost a multiple of {block}, got {shape}"
        )
    return GgufTensor(name, shape, kind, begin, begin + entries // block * size)


def _placed(path: Path, found: list[GgufTensor], start: int, size: int, alignment: int) -> Iterator[GgufTensor]:
    """The same tensors in the order of the file, counted from its beginning."""
    at, names = 0, set()
    for tensor in sorted(found, key=lambda tensor: tensor.begin):
        name, begin, end = _short(tensor.name), start + tensor.begin, start + tensor.end
        if tensor.name in names:
            raise damaged(path, f"each tensor must be there once, {name} is twice")
        names.add(tensor.name)
        if tensor.begin % alignment:
            raise damaged(path, f"{name} must begin at a multiple of {alignment}, got {tensor.begin}")
        if tensor.begin < at:
            raise damaged(path, f"{name} must begin behind the tensor before it, at {at} or later, got {tensor.begin}")
        if end > size:
            raise damaged(path, f"{name} ends at byte {end}, the file has {size}")
        at = tensor.end
        yield GgufTensor(tensor.name, tensor.shape, tensor.type, begin, end)
