"""The table of tokens and the head: which settings they have, and their solving, a strip of rows at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.codes import TrellisGrid
from lorq.core.codes.trellis import MOST_BITS
from lorq.core.problem import Problem
from lorq.core.stats import InputStats, StatsAccumulator, output_energy
from lorq.core.weight import QuantizedWeight, join_rows
from lorq.methods import FLRQ, GPTQ, Method, Nearest
from lorq.methods.common import GgufType
from lorq.models.blocks import StreamedModel, Target
from lorq.models.calls import Stream
from lorq.models.tables import find_tables, head_inputs
from lorq.pipeline.options import Options
from lorq.pipeline.tasks import Task, solve_task
from lorq.progress import TABLES, Progress

# Weights of a strip: 64 MB in float32. Strips have a multiple of so many rows, which ends a word of zero points.
_STRIP, _ROWS = 1 << 24, 32
# Tokens whose logits are in memory at a time.
_TOKENS = 128
UNCALIBRATED = "no calibration: no error feedback"


def table_methods(
    model: StreamedModel, method: Method, options: Options, *, calibrated: bool
) -> tuple[dict[str, dict[Target, Method]], dict[str, str]]:
    """The settings of the table of tokens and of the head, by part, and why other tables stay as they are.

    Args:
        method: of the run's layers.
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
            layers[part] = {
                target: _method("embeddings and head" if found.tied else part, bits, method, options, feedback=feedback)
            }
    others = {other: f"not the table of tokens ({kind}), kept as it is" for other, kind in found.others.items()}
    return layers, others


def _method(what: str, bits: int | GgufType, method: Method, options: Options, *, feedback: bool) -> Method:
    """How a table is rounded."""
    if isinstance(bits, str):
        return GPTQ(grid=bits) if feedback else Nearest(grid=bits)
    codebook = options.table_codebook
    if codebook == "auto" and bits <= MOST_BITS and options.table_group_size == Options.table_group_size:
        codebook = getattr(method, "codebook", "scalar")
    if codebook == "trellis":
        window = max(getattr(method, "window", FLRQ.window), bits + 4)
        return FLRQ(bits=bits, codebook="trellis", window=window, budget=0.0, epochs=0)
    if bits == 1:
        raise ValueError(
            f"{what} must have 2 to 8 bits with scalar codes, got 1; trellis codes (table_codebook) have 1 to 6"
        )
    if feedback:
        return GPTQ(bits=bits, group_size=options.table_group_size)
    return Nearest(bits=bits, group_size=options.table_group_size, range_search="scale")


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
    model: StreamedModel,
    head: str,
    method: Method,
    tokens: Int[Tensor, "windows length"],
    stream: Stream,
    options: Options,
) -> InputStats:
    """Statistics of the head's inputs, over windows that are behind the last block.

    With ``token_weights="gradient"`` they know the outputs too, where ``method`` asks what a row is worth. The expected
    squared gradient of what the model says at a logit is ``E[(p - [it came])^2] = p (1 - p)``: the mean of these over
    the tokens, and a tenth of their mean for rows that no text of the calibration's kind needs.
    """
    # Tokens weighed by their gradients left the head the same (docs/log.md).
    gradient = options.token_weights == "gradient"
    rows = gradient and isinstance(method, FLRQ)  # whose trellis codes run from row to row
    layer = model.model.get_submodule(head)
    sums = StatsAccumulator(int(layer.in_features), "equal" if gradient else options.token_weights, model.device)
    spread = torch.zeros(int(layer.out_features), device=model.device)
    with model.resident(*model.outside):
        for window, hidden in zip(tokens, stream.hidden, strict=True):
            sums.add(head_inputs(model, head, window, hidden))
            if rows:
                # A few tokens at a time, where each has one hidden state.
                step = _TOKENS if len(hidden) == len(window) else len(hidden)
                for some, states in zip(window.split(step), hidden.split(step), strict=True):
                    spread += _spread(model.logits(some, states))
    if not rows:
        return sums.finish()
    return replace(sums.finish(), output_weights=spread / spread.mean() + 0.1)


def _spread(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "vocabulary"]:
    """``p (1 - p)`` summed over the tokens; ``p`` is what the model says, after whatever it does to its head's outputs.

    The slope of what it does, such as a cap's, is left out.
    """
    p = logits.flatten(0, -2).float().softmax(-1)
    return (p * (1 - p)).sum(0)


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
        stats = head_stats(model, head, method, tokens, stream, options) if calibrated else None
        count, strips = -(-target.out_features // _strip_rows(target.out_features, target.in_features, method)), []
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
    height, width = target.out_features, target.in_features
    white = InputStats(torch.eye(width, device=model.device), torch.ones(width, device=model.device), 0)
    table = model.stored_tensor(f"{target.name}.weight")
    for rows in torch.arange(height).split(_strip_rows(height, width, method)):
        weight = table[rows[0] : rows[-1] + 1].to(model.device, torch.float32)
        energy = weight.square().sum() if stats is None else output_energy(weight, stats.hessian)
        own = stats or (white if method.needs_stats else None)
        known = {} if own is None else {target.name: own.of_outputs(rows)}
        task = Task(method, Problem({target.name: weight}, known, seed, height=height))
        yield executor.submit(solve_task, task).result()[target.name], float(energy)


def _strip_rows(height: int, width: int, method: Method) -> int:
    """Rows of a table that are solved at a time: whole words of zero points, whole sequences of trellis codes."""
    codes = method.largest(height, width).codes
    step = math.lcm(_ROWS, codes.length) if isinstance(codes, TrellisGrid) else _ROWS
    return max(1, _STRIP // (step * width)) * step


def put_dense(weight: QuantizedWeight, resident: Tensor) -> None:
    """Put what a quantized table stands for where its weight is, strip by strip."""
    tensors, width = {name: t.to(resident.device) for name, t in weight.tensors().items()}, weight.shape[1]
    for index in torch.arange(len(resident), device=resident.device).split(max(1, _STRIP // width)):
        resident[index[0] : index[-1] + 1] = weight.format.decode_rows(tensors, index, width)
