"""Random layers of every kind, what they are timed against, and how."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorq.bench.timing import seconds_of
from lorq.core.codes import IntGrid, LevelFormat, TrellisGrid, VectorGrid
from lorq.core.codes.trellis import MOST_BITS
from lorq.core.codes.vectors import VECTOR_LENGTHS
from lorq.core.scale_factors import parity_rank
from lorq.core.weight import LayerFormat
from lorq.kernels import cpu
from lorq.methods import LoPRoPaper
from lorq.runtime.linear import QuantLinear

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "14336x4096")
KINDS = ("integer", "rotated", "lords", "vector", "trellis")
_WINDOW = 12  # of trellis codes
# Weights of one kind in rotation are larger than any cache, but for very small ones.
_ROTATION_BYTES = 128 << 20
_MOST_LAYERS = 64
READ_BYTES = 256 << 20
_REPLAYS = 20  # of a graph, so that the first launch and the last wait do not count


def read_shape(shape: str) -> tuple[int, int]:
    """(out, in) of a shape such as 4096x4096."""
    parts = shape.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape must be out x in such as 4096x4096, got {shape!r}")
    return int(parts[0]), int(parts[1])


def check_fit(
    out: int, in_: int, kinds: Sequence[str], bits: Sequence[int], group_size: int, ranks: Sequence[int]
) -> None:
    """Refuse what no layer of the shape can have."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(unknown)}")
    own = in_ if group_size == -1 else group_size
    if own < 1 or (not {"integer", "rotated"}.isdisjoint(kinds) and in_ % own):
        raise ValueError(
            f"group_size must divide the width, or be -1 for one group per row, got group_size {group_size} and shape "
            f"{out}x{in_}"
        )
    most = max((VECTOR_LENGTHS.get(width, 1) for width in bits), default=1)
    if "vector" in kinds and in_ % most:
        raise ValueError(f"vectors of a codebook must divide the width, got vectors of {most} and shape {out}x{in_}")
    if wrong := [width for width in bits if not 2 <= width <= 8]:
        raise ValueError(f"bits must be between 2 and 8, got {wrong[0]}")
    if wrong := [rank for rank in ranks if not 0 <= rank <= min(out, in_)]:
        raise ValueError(f"ranks must be between 0 and {min(out, in_)} for shape {out}x{in_}, got {wrong[0]}")
    if "rotated" in kinds:
        format_of("rotated", 2, 0, out, in_, own)  # refuses widths that no blocks fit


def format_of(kind: str, bits: int, rank: int, out: int, in_: int, group_size: int) -> LayerFormat | None:
    """The layer's format; None where a kind has none of that width."""
    if kind == "integer":
        return LayerFormat(IntGrid(bits, group_size), rank, "int8")
    if kind == "rotated":
        return LoPRoPaper(bits=bits, group_size=group_size, rank=rank, factor_type="int8").largest(out, in_)
    if kind == "lords":
        return LayerFormat(LevelFormat(bits, "normal-float", in_, parity_rank(out, in_, group_size)), rank, "int8")
    if kind == "trellis":
        return LayerFormat(TrellisGrid.of(out, bits, _WINDOW), rank, "int8") if bits <= MOST_BITS else None
    vector = VECTOR_LENGTHS.get(bits)
    if vector is None:
        return None
    rows = max(n for n in range(1, 257) if out % n == 0)
    return LayerFormat(VectorGrid(bits, vector, rows, math.gcd(in_, 256), in_), rank, "int8")


def random_layers(out: int, in_: int, format: LayerFormat, x: Tensor, generator: torch.Generator) -> list[QuantLinear]:
    """As many random layers as no cache holds."""
    layers = []
    for _ in range(_rotation(format.stored_bits(out, in_))):
        layer = QuantLinear(in_, out, format, device=x.device)
        for name, tensor in layer.stored().items():
            if name == "weight_shape":
                tensor.copy_(torch.tensor([out, in_]))
            elif name == "permutation":
                tensor.copy_(torch.randperm(in_, generator=generator, device=x.device))
            elif tensor.dtype in (torch.int16, torch.int32):
                range_of = torch.iinfo(tensor.dtype)
                tensor.random_(range_of.min, range_of.max, generator=generator)
            elif tensor.dtype == torch.int8:
                tensor.random_(-127, 128, generator=generator)
            else:
                # A low-rank part as small as it is in models, or it would be all that the output has.
                small = 1e-4 if name in ("left_scale", "right_scale") else 0.02
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device=x.device) * small)
        layers.append(layer)
    return layers


@torch.no_grad()
def sqnr_db(layer: QuantLinear, x: Tensor, way: str) -> float:
    """``20 log10(norm(y) / norm(y - y'))`` against the product with the decoded weight in float32."""
    y = x.float() @ layer.value().dense().T
    with cpu.products(way):
        return float(20 * torch.log10(y.norm() / (y - layer(x).float()).norm()))


def others(
    out: int, in_: int, group_size: int, x: Tensor, generator: torch.Generator
) -> dict[Any, list[Callable[[], Any]]]:
    """What layers are timed against: a plain read, the dense product, and torch's int4 operator where it fits."""
    buffer = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=x.device)
    count = _rotation(8 * out * in_ * x.element_size())
    weights = [torch.randn(out, in_, generator=generator, device=x.device).to(x) for _ in range(count)]
    dense = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
    int4 = _int4(out, in_, group_size, x, generator)
    return {"read": [buffer.sum], "dense": dense} | ({"int4": int4} if int4 else {})


def _int4(out: int, in_: int, group_size: int, x: Tensor, generator: torch.Generator) -> list[Callable[[], Any]]:
    """Calls of torch's own operator for 4-bit codes; none where it does not fit."""
    cuda = x.device.type == "cuda"
    unfit = group_size not in (32, 64, 128, 256) or in_ % group_size or out % 32 or (cuda and in_ % 1024)
    if unfit or x.dtype != torch.bfloat16 or x.device.type not in ("cpu", "cuda"):
        return []
    calls: list[Callable[[], Any]] = []
    for _ in range(_rotation(4 * out * in_)):
        scales = torch.rand(in_ // group_size, out, 2, generator=generator, device=x.device).to(x)
        if cuda:
            pairs = torch.randint(0, 256, (out, in_ // 2), generator=generator, dtype=torch.uint8, device=x.device)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
            calls.append(partial(torch.ops.aten._weight_int4pack_mm, x, packed, group_size, scales))
        else:
            codes = torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            calls.append(partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, group_size, scales))
    return calls


def _rotation(layer_bits: int) -> int:
    """How many layers take turns."""
    return min(_MOST_LAYERS, max(2, math.ceil(8 * _ROTATION_BYTES / layer_bits)))


@torch.no_grad()
def medians(
    ways: dict[Any, list[Callable[[], Any]]], repeats: int, device: torch.device
) -> tuple[dict[Any, float], dict[Any, float]]:
    """Seconds of one call by way, the median over rounds in which all ways take turns; one round is not counted.

    Returns:
        What the device takes, and what a caller waits who makes one call after the other; on a CPU the same. A CUDA
        device replays a graph of the calls for the former, as compiled programs do: there a call's way through Python
        and the driver takes longer than a small layer's work.
    """
    cuda = device.type == "cuda"
    graphs = {key: _graph(calls) for key, calls in ways.items()} if cuda else {}
    taken: dict[Any, list[float]] = {key: [] for key in ways}
    waited: dict[Any, list[float]] = {key: [] for key in ways}
    for round_ in range(repeats + 1):
        for key, calls in ways.items():
            with cpu.products(key[-1] if isinstance(key, tuple) else "exact"):
                called = seconds_of(lambda calls=calls: [call() for call in calls], device)  # type: ignore[misc]
            if round_:
                waited[key].append(called / len(calls))
                if cuda:
                    replay = graphs[key].replay
                    called = seconds_of(lambda replay=replay: [replay() for _ in range(_REPLAYS)], device) / _REPLAYS  # type: ignore[misc]
                taken[key].append(called / len(calls))
    return tuple({key: statistics.median(own) for key, own in times.items()} for times in (taken, waited))  # type: ignore[return-value]


def _graph(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """The calls as a CUDA graph."""
    for call in calls:  # compiles what is compiled at first calls
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
