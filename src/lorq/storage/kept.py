"""Where unfinished work is, in a file that a crash leaves whole and that is known when it rots: numbers and tensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lorq.storage.atomic import RESUME, write_whole
from lorq.storage.json_files import parse_json
from lorq.storage.safetensors_file import read_header, read_tensor


def write_kept(path: Path, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write numbers, as JSON, and tensors by name, in place of what was kept before.

    Raises:
        OSError: if the disk is full; what was kept before stays.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(told)
    data = save(own, metadata={"told": text, "sha256": _checksum(text, own)})
    write_whole(path, data, RESUME)


def read_kept(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers and tensors of `write_kept`.

    Raises:
        ValueError: if they are not as they were written.
    """
    try:
        header = read_header(path)
        text, tensors = (
            header.metadata.get("told", ""),
            {name: read_tensor(path, header, name) for name in header.tensors},
        )
        if header.metadata.get("sha256") != (found := _checksum(text, tensors)):
            told = header.metadata.get("sha256", "none")
            raise ValueError(f"its content must have the checksum {told[:12]!r}, it has {found[:12]!r}")
        return parse_json(text.encode(), where=path), tensors
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, what it keeps is then made again") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {(*tensor.shape,)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
