"""Parcels: objects with tensors as bytes, for another process or machine, and objects again on a device there."""

import pickle
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorq.version import __version__

# So often a task is tried whose process dies.
TRIES = 4
# Tasks that are handed over for each that can be solved at once: one more waits there.
IN_FLIGHT = 2

Apart = tuple[type, ...]


class _Packer(pickle.Pickler):
    """Tensors as their plain values, dense. torch's own way sends all of the storage that a view is of, or passes it
    through shared memory, of which containers have 64 MB."""

    def __init__(self, file: BytesIO, apart: Apart, left: list[Any]):
        super().__init__(file, protocol=5)
        self.apart, self.left = apart, left

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, self.apart):
            return None
        known = next((i for i, other in enumerate(self.left) if other is obj), None)
        if known is None:
            self.left.append(obj)
        return len(self.left) - 1 if known is None else known

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        values = obj.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return _tensor, (values, obj.dtype, tuple(obj.shape))


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: BytesIO, parts: Sequence[Any], device: torch.device | str):
        super().__init__(file)
        self.parts, self.device = parts, device

    def persistent_load(self, pid: int) -> Any:
        return self.parts[pid]

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name == _tensor.__name__:
            return lambda *parts: _tensor(*parts).to(self.device)
        return super().find_class(module, name)


def _tensor(values: "npt.NDArray[np.uint8]", dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not values.size:
        return torch.empty(shape, dtype=dtype)
    # The array may be a view of the parcel, which nobody may write to.
    return torch.from_numpy(np.array(values)).view(dtype).view(shape)


def pack(obj: Any, apart: Apart = ()) -> tuple[bytes, list[Any]]:
    """The bytes of an object, and what of these types is in it, which they do not hold: each once, in their order."""
    file, left = BytesIO(), list[Any]()
    _Packer(file, apart, left).dump(obj)
    return file.getvalue(), left


def unpack(parcel: bytes, parts: Sequence[Any] = (), device: torch.device | str = "cpu") -> Any:
    """The object, its tensors on ``device``; ``parts`` are those that were left apart.

    Only for what one's own process has packed: a parcel can run any code.
    """
    return _Unpacker(BytesIO(parcel), parts, device).load()


def call(parcel: bytes, parts: Sequence[bytes], device: str, threads: int, versions: tuple[str, ...]) -> bytes:
    """Do in another process what a parcel asks, a function and its arguments; the answer is packed, or the error.

    Args:
        parts: what was left apart of it, packed.
        threads: sums come out otherwise with another number of them.
        versions: as `versions` has them where the parcel was packed.
    """
    try:
        if versions != (here := own_versions()):
            raise ValueError(
                f"all machines must have the same lorq and torch, this one has {' and '.join(here)}, not "
                f"{' and '.join(versions)}; install these there"
            )
        torch.set_num_threads(threads)
        function, args = unpack(parcel, [unpack(part, device=device) for part in parts], device)
        answer: tuple[bool, Any] = True, function(*args)
    except Exception as error:
        answer = False, error
    return pack(answer)[0]


def answered(answer: bytes, device: torch.device | str) -> Any:
    """What a `call` has answered; its error is raised."""
    well, value = unpack(answer, device=device)
    if not well:
        raise value
    return value


def own_versions() -> tuple[str, ...]:
    """What must be the same wherever a run's tasks are solved."""
    return f"lorq {__version__}", f"torch {torch.__version__}"
