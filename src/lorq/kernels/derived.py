"""Derived: what is made from tensors once, and again when they are others."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """What a function makes of tensors, kept for as long as they are the same and all of them live.

    The same are tensors in the same memory, and, where their content is copied, the same objects, unchanged. They are
    held weakly: what was made goes with the first of them that goes, so that no memory is taken for another's.

    Args:
        make: of the tensors and settings.
        copies: what is made depends on what the tensors hold, so that it is made again when one was written to. Nothing
            is kept then where one was made in inference mode, which counts no changes.

    Example:
        >>> doubled = Derived(lambda tensors: 2 * tensors[0], copies=True)
        >>> x = Tensor([1.0])
        >>> doubled.of([x]) is doubled.of([x]), doubled.of([x.add_(1)])
        (True, tensor([4.]))
    """

    def __init__(self, make: Callable[..., T], *, copies: bool):
        self._make, self._copies = make, copies
        # By the id of the first tensor: what was seen of all, settings, what was made, who says when a tensor goes.
        self._kept: dict[int, tuple[list[int], tuple[Any, ...], T, list[weakref.ref[Tensor]]]] = {}

    def of(
        self,
        tensors: Sequence[Tensor | None],
        *settings: Any,
        replace: Callable[[T], Sequence[Tensor | None]] | None = None,
    ) -> T:
        """What is made of these tensors, of which the first must be one, with these settings.

        ``replace`` puts others in the tensors' place when it was made, which it is kept for.
        """
        # In line: a layer asks at every call.
        seen = [0 if t is None else t.data_ptr() for t in tensors]
        if self._copies:
            try:
                seen += _contents(tensors)
            except RuntimeError:  # inference tensors count no changes
                return self._make(tensors, *settings)
        key = id(tensors[0])
        kept = self._kept.get(key)
        if kept is None or kept[0] != seen or kept[1] != settings:
            value = self._make(tensors, *settings)
            if replace is not None:
                tensors = replace(value)
                key = id(tensors[0])
            seen = [0 if t is None else t.data_ptr() for t in tensors] + (_contents(tensors) if self._copies else [])
            live = [weakref.ref(t, self._forgetter(key)) for t in tensors if t is not None]
            kept = self._kept[key] = seen, settings, value, live
        return kept[2]

    def _forgetter(self, key: int) -> Callable[[weakref.ref[Tensor]], None]:
        me = weakref.ref(self)

        def forget(gone: weakref.ref[Tensor]) -> None:
            # Another tensor may have the id by now, and this be gone; and so may what was kept, where tensors of one
            # entry go in two threads.
            own = me()
            if own is not None and (kept := own._kept.get(key)) and any(ref is gone for ref in kept[3]):
                own._kept.pop(key, None)

        return forget


def _contents(tensors: Sequence[Tensor | None]) -> list[int]:
    """Who the tensors are, and how often they were written to."""
    return [*map(id, tensors), *(0 if t is None else t._version for t in tensors)]
