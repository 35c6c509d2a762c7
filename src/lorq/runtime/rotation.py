"""An input taken into a basis once for all layers that share it."""

import weakref

import torch
from torch import Tensor

from lorq.core.weight import LayerFormat
from lorq.kernels import turn


class SharedRotation:
    """Takes an input into the basis of the layers that share it, once for all of them.

    Keeps the last input's image until all layers that share the basis have taken it, at the longest while that
    input is alive and unchanged. In programs that lorq compiles equal calls become one
    (`lorq.runtime.compiled.merge_calls`).
    """

    def __init__(self, layers: int = 1):
        self.layers = layers
        self._forget()

    def _forget(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, bool, bool] | None = None
        self._image: Tensor | None = None
        self._left = 0

    def __call__(self, x: Tensor, permutation: Tensor | None, format: LayerFormat) -> Tensor:
        def image() -> Tensor:
            return turn(x, permutation, format.rotation_block, format.rotation_skip)

        # Inference tensors do not count their changes.
        if self.layers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return image()
        seen, kept = self._seen, self._image
        state = x._version, x.requires_grad, torch.is_grad_enabled()
        if kept is None or seen is None or seen[0]() is not x or seen[1:] != state:
            kept = self._image = image()
            # Not every sharer need read this input (o_proj beside q, k, v): with it the image goes too.
            me = weakref.proxy(self)
            self._seen, self._left = (weakref.ref(x, lambda _: me._forget()), *state), self.layers
        self._left -= 1
        if self._left == 0:
            self._forget()
        return kept

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedRotation":
        # Layers that are copied together go on sharing; what is remembered stays behind.
        return SharedRotation(self.layers)

    def __reduce__(self) -> tuple[type["SharedRotation"], tuple[int]]:
        return SharedRotation, (self.layers,)
