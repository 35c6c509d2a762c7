"""The mark by which a GGUF file is known as lorq's, and the checksum that tells whether somebody changed it since."""

import hashlib
import struct
from pathlib import Path
from typing import Any

from lorq.storage.names import GGUF_MARK, GGUF_SEAL
from lorq.version import __version__

_BEGIN = 4096  # bytes of a file, of which lorq's keys are among the first
_EMPTY = b" " * 64  # stands where the checksum is, in what it is the checksum of
# As a GGUF file has it: the key, the number of its type (text), and the bytes that follow.
_KEY = GGUF_SEAL.encode() + struct.pack("<IQ", 8, len(_EMPTY))


def mark(writer: Any) -> None:
    """Add lorq's first keys to a GGUF file, when it has its architecture and nothing else."""
    writer.add_string(GGUF_MARK, __version__)
    writer.add_string(GGUF_SEAL, _EMPTY.decode())


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    return _begin(file).startswith(b"GGUF")


def is_marked(file: Path) -> bool:
    """Whether lorq wrote a GGUF file, or somebody made it of one that lorq wrote."""
    return is_gguf(file) and GGUF_MARK.encode() in _begin(file)


def seal(file: Path) -> None:
    """Put the checksum of a finished file that has the keys of `mark` into it; others stay as they are."""
    if (found := _checksum(file)) is not None:
        with file.open("rb+") as opened:
            opened.seek(found[0])
            opened.write(found[1])


def is_sealed(file: Path) -> bool:
    """Whether a file is as it was when it got its checksum, to the last byte."""
    if (found := _checksum(file)) is None:
        return False
    with file.open("rb") as opened:
        opened.seek(found[0])
        return opened.read(len(_EMPTY)) == found[1]


def check_seal(file: Path) -> bool:
    """Whether a file has a checksum of lorq's, which is held against its content.

    Raises:
        ValueError: if it differs.
    """
    if (found := _checksum(file)) is None:
        return False
    with file.open("rb") as opened:
        opened.seek(found[0])
        told = opened.read(len(_EMPTY))
    if told == _EMPTY:
        return False
    if told != found[1]:
        raise ValueError(
            f"{file} must be as lorq wrote it, its sha256 is {found[1][:12].decode()}, its key {GGUF_SEAL} says "
            f"{told[:12].decode(errors='replace')}: it was changed since, or damaged; copy or export it again, or, if "
            f"it was changed on purpose, take the checksum out (gguf-new-metadata --remove-metadata {GGUF_SEAL})"
        )
    return True


def _begin(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_BEGIN)


def _checksum_place(file: Path) -> int | None:
    """Where a file's checksum is; None where there is no place for one."""
    begin = _begin(file)
    key = begin.find(_KEY)
    place = key + len(_KEY)
    return None if key < 0 or place + len(_EMPTY) > len(begin) else place


def _checksum(file: Path) -> tuple[int, bytes] | None:
    """Where a file's checksum is, and what it has to be, sha256 in hex; None where there is no place for one."""
    if (place := _checksum_place(file)) is None:
        return None
    begin = _begin(file)
    digest = hashlib.sha256(begin[:place] + _EMPTY + begin[place + len(_EMPTY) :])
    with file.open("rb") as opened:
        opened.seek(len(begin))
        hashlib.file_digest(opened, lambda: digest)
    return place, digest.hexdigest().encode()
