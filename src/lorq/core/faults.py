"""What is wrong with stored tensors: some that are missing or of another form, and values that nothing can mean."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lorq.core.activations import TOP
from lorq.core.checks import all_finite
from lorq.core.packing import Layout
from lorq.core.tile_factors import TileFormat


def layout_faults(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Each tensor that is not as a layout has it, by local name, with the rule and what came.

    Example:
        >>> list(layout_faults({"scale": ((2,), torch.float16)}, {"scale": torch.zeros(3)}))
        ['scale must be float16 of shape (2,), it is float32 of shape (3,)']
    """
    for name, (shape, dtype) in layout.items():
        own = tensors.get(name)
        if own is None:
            yield f"{name} is missing, it must be {_words(dtype)} of shape {shape}"
        elif (tuple(own.shape), own.dtype) != (shape, dtype):
            yield f"{name} must be {_words(dtype)} of shape {shape}, it is {_words(own.dtype)} of shape {(*own.shape,)}"
    for name in sorted(tensors.keys() - layout.keys()):
        yield f"{name} has no place in its format, which has {', '.join(layout)}"


def value_faults(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Each tensor of a layer, by local name, that has values which nothing can mean."""
    for name, tensor in tensors.items():
        if wrong := not_finite(tensor):
            yield f"{name} {wrong}"
    order, scale, zero = (tensors.get(name) for name in ("permutation", "input_scale", "input_zero_point"))
    if order is not None and not is_permutation(order):
        yield f"permutation must hold each of 0 .. {len(order) - 1} once, it does not"
    if scale is not None and not bool((scale > 0).all()):
        yield f"input_scale must be above 0, got {scale.flatten()[:3].tolist()}"
    if zero is not None and bool(((zero < 0) | (zero > TOP)).any()):
        yield f"input_zero_point must be 0 to {TOP}, got {zero.flatten()[:3].tolist()}"


def tile_faults(tensors: Mapping[str, Tensor], format: TileFormat, out: int, in_: int) -> Iterator[str]:
    """All that is wrong with the factors that experts share, of weights of this shape."""
    yield from layout_faults(format.layout(out, in_), tensors)
    yield from tile_value_faults(tensors, format)


def tile_value_faults(tensors: Mapping[str, Tensor], format: TileFormat) -> Iterator[str]:
    """The same of their values alone."""
    yield from value_faults({name: tensor for name, tensor in tensors.items() if name != "input_scale"})
    if wrong := not_finite(tensors.get("input_scale", torch.zeros(0))):
        yield f"input_scale {wrong}"
    cells = tensors.get("cells")
    if cells is not None and cells.ndim == 2 and cells.shape[1] == 2 and len(cells):
        limits = torch.tensor([format.rows, format.columns], device=cells.device)
        if bool(((cells < 0) | (cells >= limits)).any()):
            lowest, highest = cells.amin(0).tolist(), cells.amax(0).tolist()
            yield f"cells must lie in a grid of {format.rows} x {format.columns}, got {lowest} to {highest}"


def not_finite(tensor: Tensor) -> str:
    """The rule and how many values break it; nothing where all are finite, or whole numbers.

    Example:
        >>> not_finite(torch.tensor([1.0, torch.nan])), not_finite(torch.tensor([1]))
        ('must be finite, 1 of 2 values are NaN or infinite', '')
    """
    if not tensor.is_floating_point() or all_finite(tensor.float() if tensor.itemsize == 1 else tensor):
        return ""
    wrong = int((~torch.isfinite(tensor.float())).sum())
    return f"must be finite, {wrong} of {tensor.numel()} values are NaN or infinite"


def is_permutation(order: Tensor) -> bool:
    """Whether each number below its length is in it once."""
    return torch.equal(order.long().sort()[0], torch.arange(len(order), device=order.device))


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
