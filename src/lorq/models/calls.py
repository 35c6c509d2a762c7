"""Windows on their way through the blocks: their hidden states, and what else the model calls its blocks with."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.storage.atomic import TEMPORARY


class Room:
    """Room for what is kept of all windows: memory, or files mapped into memory past ``limit_bytes`` in all.

    The files have no name any more when they are made, so they vanish with the process, however that ends.
    """

    def __init__(self, limit_bytes: int | None = None, folder: Path | None = None):
        self._left, self._folder = limit_bytes, folder

    def take(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape, not filled."""
        size = torch.Size(shape).numel()
        bytes_ = size * dtype.itemsize
        if self._left is None or self._folder is None or bytes_ <= self._left or not size:
            self._left = None if self._left is None else self._left - bytes_
            return torch.empty(*shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".hidden-", suffix=TEMPORARY) as file:
            try:  # not a sparse file: a disk that fills up later would kill the process
                os.posix_fallocate(file.fileno(), 0, bytes_)
            except OSError as error:
                raise OSError(
                    f"what is kept of the calibration windows needs a file of {bytes_ / 1e9:.1f} GB in {self._folder}: "
                    f"{error.strerror}; take fewer samples, or raise spill_bytes to keep it in memory"
                ) from error
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)


# What a block leaves for later ones: whose it is, a block's or a mapping's, and its place there.
Key = tuple[str, Any]


@dataclass(frozen=True)
class _Slot:
    """In the place of a tensor: its number in `Calls.tensors`."""

    number: int


@dataclass(frozen=True)
class _Handed:
    """In the place of a tensor that another block has answered with."""

    key: Key


@dataclass(frozen=True)
class _Mapping:
    """In the place of a mapping: an empty one of its kind. Blocks may leave tensors in it for later ones."""

    name: str
    empty: MutableMapping[Any, Any]
    items: dict[Any, Any]


@dataclass(frozen=True)
class Answer:
    """The form in which blocks of one class answer: hidden states, or a tuple or list with them and ``rest``."""

    kind: Callable[[Sequence[Any]], Any] | None
    rest: tuple[Any, ...] = ()

    @classmethod
    def of(cls, out: Any, what: str) -> "Answer":
        """The form of an answer; a ValueError for others than these."""
        if isinstance(out, Tensor):
            return cls(None)
        if type(out) in (tuple, list) and out and isinstance(out[0], Tensor):
            return cls(type(out), tuple(out[1:]))
        raise ValueError(
            f"blocks must answer with hidden states, or a tuple that begins with them, {what} answers with "
            f"{type(out).__name__}; this architecture is not supported"
        )

    def copy(self) -> "Answer":
        """The same with tensors of its own, so that blocks' answers can be told apart."""
        return Answer(self.kind, _of_tensors(self.rest, torch.clone))

    def around(self, hidden: Tensor) -> Any:
        """Other hidden states in this form."""
        return hidden if self.kind is None else self.kind((hidden, *self.rest))


@dataclass
class Calls:
    """What a model calls its blocks with besides hidden states, for every window of one length.

    What is the same for all windows, such as masks and rotary angles, is kept once; what is not, such as inputs of each
    block that depend on the tokens, for every window.

    Attributes:
        shape: of a window's hidden states as blocks take them; one window is a batch.
        trees: arguments by block, `_Slot` and its like in place of tensors.
        tensors: by number; (windows, ...) where ``own`` has the number.
        last: the last block that needs what is numbered, or was handed on.
    """

    shape: tuple[int, ...] = (1, 1, 1)
    trees: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    last: dict[int | Key, str] = field(default_factory=dict)

    def forget(self, block: str) -> None:
        """Give back what no block after this one is called with."""
        for number in [n for n, last in self.last.items() if last == block and isinstance(n, int)]:
            self.tensors.pop(number, None)


class Recorder:
    """Makes `Calls` of what blocks are called with while the model runs on one window after another."""

    def __init__(self, windows: int, room: Room):
        self.calls, self.windows, self.room = Calls(), windows, room
        self._window = -1
        self._names: dict[int, str] = {}  # mappings of the first window, by id
        self._numbers: dict[int, int] = {}  # slots of the current window's tensors, by id
        self._alive: list[Any] = []  # so that ids stay what they are within a window
        self._handed: dict[int, Key] = {}  # by id of the first window's answers
        self._answers: list[Answer] = []  # of the first window, so that their ids stay what they are
        self._done: set[int] = set()

    def begin(self) -> None:
        """The next window comes."""
        self._window += 1
        for known in (self._numbers, self._alive, self._done):
            known.clear()

    def answered(self, block: str, answer: Answer) -> None:
        """What a block hands on besides hidden states."""
        if self._window == 0:
            self._answers.append(answer)
            for place, item in _places(answer.rest):
                self._handed[id(item)] = block, place

    def called(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a block is called with besides hidden states."""
        self._alive.append((args, kwargs))
        if self._window == 0:
            self.calls.trees[block] = self._first(args, block), self._first(kwargs, block, top=True)
        else:
            self._compare(self.calls.trees[block], (args, kwargs), block)

    def _first(self, value: Any, block: str, *, top: bool = False) -> Any:
        if isinstance(value, Tensor):
            if (key := self._handed.get(id(value))) is not None:
                self.calls.last[key] = block
                return _Handed(key)
            number = self._numbers.setdefault(id(value), len(self._numbers))
            self.calls.tensors[number] = value
            self.calls.last[number] = block
            return _Slot(number)
        if type(value) in (tuple, list):
            return type(value)(self._first(item, block) for item in value)
        if isinstance(value, MutableMapping) and not top:
            empty = copy.copy(value)
            empty.clear()
            name = self._names.setdefault(id(value), f"mapping {len(self._names)}")
            self.calls.last[name, None] = block
            return _Mapping(name, empty, {key: self._first(item, block) for key, item in value.items()})
        if isinstance(value, dict):
            return {key: self._first(item, block) for key, item in value.items()}
        return value

    def _compare(self, known: Any, value: Any, block: str) -> None:
        """Keep what differs from the first window's."""
        if isinstance(known, _Slot) and isinstance(value, Tensor):
            if known.number not in self._done:
                self._done.add(known.number)
                self._keep(known.number, value, block)
        elif isinstance(known, _Mapping):
            self._compare(known.items, dict(value), block)
        elif isinstance(known, dict) and isinstance(value, dict) and known.keys() == value.keys():
            for key, item in known.items():
                self._compare(item, value[key], block)
        elif isinstance(known, tuple | list) and isinstance(value, tuple | list) and len(known) == len(value):
            for one, other in zip(known, value, strict=True):
                self._compare(one, other, block)
        elif not isinstance(known, _Handed) and (type(known) is not type(value) or (_plain(known) and known != value)):
            raise ValueError(
                f"blocks must be called alike for all texts of one length, {block} was called with {_brief(known)} for "
                f"one and {_brief(value)} for another; this architecture is not supported"
            )

    def _keep(self, number: int, value: Tensor, block: str) -> None:
        calls = self.calls
        first = calls.tensors[number]
        if number not in calls.own:
            if first.shape == value.shape and torch.equal(first, value):
                return
            if first.shape != value.shape or first.dtype != value.dtype:
                raise ValueError(
                    f"blocks must be called alike for all texts of one length, {block} was called with a tensor of "
                    f"shape {tuple(first.shape)} for one and {tuple(value.shape)} for another; this architecture is "
                    "not supported"
                )
            calls.own.add(number)
            calls.tensors[number] = self.room.take((self.windows, *first.shape), first.dtype)
            calls.tensors[number][: self._window] = first.cpu()
        calls.tensors[number][self._window] = value.cpu()


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _brief(value: Any) -> str:
    """A value for an error: what may hold tensors by its kind alone."""
    return (
        f"{value!r:.60}" if _plain(value) else "a tensor" if isinstance(value, _Slot) else f"a {type(value).__name__}"
    )


@dataclass
class Stream:
    """Windows on their way through the blocks.

    Attributes:
        hidden: the hidden states with which each window enters a block; those of a model with several for each token,
            such as Gemma 3n, one under the other.
        handed: what blocks have left besides for later ones; each tensor is (windows, ...).
    """

    hidden: Float[Tensor, "windows length width"]
    calls: Calls
    room: Room
    handed: dict[Key, Any] = field(default_factory=dict)

    def fork(self) -> "Stream":
        """A stream of its own at the same block."""
        return Stream(self._own(self.hidden), self.calls, self.room, {k: self._own(v) for k, v in self.handed.items()})

    def become(self, other: "Stream") -> None:
        """Go on with what another stream at the same block holds."""
        self.hidden.copy_(other.hidden)
        self.handed = {key: self._own(value) for key, value in other.handed.items()}

    def _own(self, kept: Any) -> Any:
        return _of_tensors(kept, lambda tensor: self.room.take(tensor.shape, tensor.dtype).copy_(tensor))

    def enter(self, block: str, window: int, device: torch.device, *, differentiable: bool = False) -> "Entered":
        """A window's arguments for a block; ``differentiable``: what earlier blocks have left collects gradients."""
        mappings: dict[str, tuple[MutableMapping[Any, Any], dict[Any, Any]]] = {}
        given: dict[Key, Any] = {}

        def of_window(kept: Any) -> Any:
            return _of_tensors(kept, lambda tensor: tensor[window].to(device))

        def handed(key: Key) -> Any:
            if key not in given:
                own = of_window(self.handed[key])
                given[key] = _of_tensors(own, _leaf) if differentiable else own
            return given[key]

        def fill(value: Any) -> Any:
            if isinstance(value, _Slot):
                kept = self.calls.tensors[value.number]
                return of_window(kept) if value.number in self.calls.own else kept
            if isinstance(value, _Handed):
                return handed(value.key)
            if isinstance(value, _Mapping):
                if value.name not in mappings:
                    items = {key: fill(item) for key, item in value.items.items()}
                    items |= {key: handed((name, key)) for name, key in self.handed if name == value.name}
                    filled = copy.copy(value.empty)
                    filled.update(items)
                    mappings[value.name] = filled, items
                return mappings[value.name][0]
            if type(value) in (tuple, list):
                return type(value)(fill(item) for item in value)
            return {key: fill(item) for key, item in value.items()} if type(value) is dict else value

        args, kwargs = self.calls.trees[block]
        return Entered(fill(args), fill(kwargs), mappings, given)

    def left(self, block: str, entered: "Entered", rest: Sequence[Any]) -> Iterator[tuple[Key, Any]]:
        """What a block has left for later ones: of its answer, and in mappings."""
        for place, item in _places(tuple(rest)):
            if (block, place) in self.calls.last:
                yield (block, place), item
        for name, (mapping, before) in entered.mappings.items():
            if self.calls.last[name, None] != block:
                for key, item in mapping.items():
                    if item is not before.get(key):
                        yield (name, key), item

    def keep(self, key: Key, window: int, value: Any) -> None:
        """Hand on to later blocks what one has left of a window."""
        if key not in self.handed:
            windows = len(self.hidden)
            self.handed[key] = _of_tensors(value, lambda tensor: self.room.take((windows, *tensor.shape), tensor.dtype))
        for kept, item in zip(tensors_in(self.handed[key]), tensors_in(value), strict=True):
            kept[window] = item.detach().cpu()

    def forget(self, block: str) -> None:
        """Give back what no block after this one is given."""
        self.calls.forget(block)
        for name, place in list(self.handed):
            if block in (self.calls.last.get((name, place)), self.calls.last.get((name, None))):
                del self.handed[name, place]


@dataclass(frozen=True)
class Entered:
    """A window's arguments for a block. The mappings among them are its own, each beside what it held before.

    ``handed`` are those that earlier blocks have left.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mappings: dict[str, tuple[MutableMapping[Any, Any], dict[Any, Any]]]
    handed: dict[Key, Any]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor


def _of_tensors(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The same of other tensors: a tensor, or tuples and lists with such."""
    if isinstance(value, Tensor):
        return make(value)
    return type(value)(_of_tensors(item, make) for item in value) if type(value) in (tuple, list) else value


def _places(value: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Tensors in tuples and lists, each after where it is."""
    if isinstance(value, Tensor):
        yield at, value
    elif type(value) in (tuple, list):
        for place, item in enumerate(value):
            yield from _places(item, (*at, place))


def tensors_in(value: Any) -> list[Tensor]:
    """Those in tuples and lists, in order."""
    return [tensor for _, tensor in _places(value)]
