"""The table of tokens and the head: which settings they have, and their solving, a strip of rows at a time."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from lorq.core.problem import Problem
from lorq.core.stats import InputStats, StatsAccumulator, output_energy
from lorq.core.weight import QuantizedWeight, join_rows
from lorq.methods import GPTQ, Method, Nearest
from lorq.methods.common import GgufType
from lorq.models.blocks import StreamedModel, Target
from lorq.models.calls import Stream
from lorq.models.tables import find_tables, head_inputs
from lorq.pipeline.options import Options
from lorq.pipeline.tasks import Task, solve_task
from lorq.progress import TABLES, Progress

# Weights of a strip: 64 MB in float32. Strips have a multiple of so many rows, which ends a word of zero points.
_STRIP, _ROWS = 1 << 24, 32
UNCALIBRATED = "no calibration: rounded to nearest"


def table_methods(
    model: StreamedModel, options: Options, *, calibrated: bool
) -> tuple[dict[str, dict[Target, Method]], dict[str, str]]:
    """The settings of the table of tokens and of the head, by part, and why other tables stay as they are.

    Args:
        calibrated: the run has calibration windows.

    Raises:
        ValueError: if the model has no such layer to quantize, or one table is asked to have two widths.
    """
    if not (options.embeddings or options.head):
        return {}, {}
    found, name = find_tables(model), type(model.model).__name__
    asked = {"embeddings": (options.embeddings, found.embedding), "head": (options.head, found.head)}
    for part, (bits, target) in asked.items():
        if bits and isinstance(target, str):
            raise ValueError(f"{part} of {name} cannot be quantized, {target}; leave --{part} {bits} out")
    if found.tied:
        if options.embeddings and options.head and options.embeddings != options.head:
            raise ValueError(
                f"embeddings and head of {name} are one table and must have the same bits, got embeddings "
                f"{options.embeddings} and head {options.head}; give one of them"
            )
        asked = {"embeddings": (options.embeddings or options.head, found.embedding)}
    layers: dict[str, dict[Target, Method]] = {}
    for part, (bits, target) in asked.items():
        if bits and isinstance(target, Target):
            feedback = calibrated and (part == "head" or found.tied)
            layers[part] = {target: _method(bits, options.table_group_size, feedback=feedback)}
    others = {other: f"not the table of tokens ({kind}), kept as it is" for other, kind in found.others.items()}
    return layers, others


def _method(bits: int | GgufType, group_size: int, *, feedback: bool) -> Method:
    """How a table is rounded."""
    if isinstance(bits, str):
        return GPTQ(grid=bits) if feedback else Nearest(grid=bits)
    if feedback:
        return GPTQ(bits=bits, group_size=group_size)
    return Nearest(bits=bits, group_size=group_size, range_search="scale")


def head_table(model: StreamedModel, tables: Iterable[Target]) -> tuple[str, Target | None]:
    """The name of the head's module, and which of the quantized tables it multiplies by; "" and None for none."""
    found = find_tables(model)
    if isinstance(found.head, Target):
        for target in tables:
            if found.tied or target == found.head:
                return found.head.name, target
    return "", None


def embedding_heads(model: StreamedModel, tables: Iterable[Target]) -> dict[str, str]:
    """The quantized tables of tokens, each with the head that multiplies by it, or ""."""
    head, table = head_table(model, tables)
    return {t.name: head if t == table else "" for t in tables if t.name != head}


def head_stats(
    model: StreamedModel, head: str, tokens: Int[Tensor, "windows length"], stream: Stream, options: Options
) -> InputStats:
    """Statistics of the head's inputs, over windows that are behind the last block."""
    # Gradients of logits are probabilities less what came: weighed by them the head came out the same (docs/log.md).
    kind = "equal" if options.token_weights == "gradient" else options.token_weights
    sums = StatsAccumulator(int(model.model.get_submodule(head).in_features), kind, model.device)
    with model.resident(*model.outside):
        for window, hidden in zip(tokens, stream.hidden, strict=True):
            sums.add(head_inputs(model, head, window, hidden))
    return sums.finish()


def solve_tables(
    model: StreamedModel,
    layers: Mapping[Target, Method],
    tokens: Int[Tensor, "windows length"],
    stream: Stream,
    options: Options,
    executor: Executor,
    progress: Progress,
) -> Iterator[tuple[Target, QuantizedWeight]]:
    """The quantized tables, one after the other; windows in ``stream`` are behind the last block."""
    head, of_head = head_table(model, layers)
    for target, method in layers.items():
        calibrated = target == of_head and len(tokens) > 0
        stats = head_stats(model, head, tokens, stream, options) if calibrated else None
        count, strips = -(-target.out_features // strip_rows(target.in_features)), []
        progress(TABLES, 0, count)
        for strip in _solve(model, target, method, stats, options.seed, executor):
            strips.append(strip)
            progress(TABLES, len(strips), count)
        weight = join_rows(*zip(*strips, strict=True))
        if target == of_head and not calibrated:
            weight = replace(weight, record=replace(weight.record, note=UNCALIBRATED))
        yield target, weight


def _solve(
    model: StreamedModel, target: Target, method: Method, stats: InputStats | None, seed: int, executor: Executor
) -> Iterator[tuple[QuantizedWeight, float]]:
    """The strips of one table, and their output's energy; rows are independent of each other, given the statistics."""
    known = {} if stats is None else {target.name: stats}
    for strip in model.stored_tensor(f"{target.name}.weight").split(strip_rows(target.in_features)):
        weight = strip.to(model.device, torch.float32)
        energy = weight.square().sum() if stats is None else output_energy(weight, stats.hessian)
        task = Task(method, Problem({target.name: weight}, known, seed))
        yield executor.submit(solve_task, task).result()[target.name], float(energy)


def strip_rows(width: int) -> int:
    """Rows of a table that are solved, or decoded, at a time."""
    return max(1, _STRIP // (_ROWS * width)) * _ROWS


def put_dense(weight: QuantizedWeight, resident: Tensor) -> None:
    """Put what a quantized table stands for where its weight is, strip by strip."""
    tensors, width = {name: t.to(resident.device) for name, t in weight.tensors().items()}, weight.shape[1]
    for index in torch.arange(len(resident), device=resident.device).split(strip_rows(width)):
        resident[index[0] : index[-1] + 1] = weight.format.decode_rows(tensors, index, width)
