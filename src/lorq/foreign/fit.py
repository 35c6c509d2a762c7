"""The fit: the original's windows go through it block by block, and each quantized layer gets its candidates."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lorq.core.compensation import error_pairs
from lorq.core.low_rank import Metric, store_factors
from lorq.core.problem import layer_generator
from lorq.core.stats import InputStats
from lorq.foreign.couple import Couple
from lorq.foreign.settings import Settings
from lorq.models.blocks import Target
from lorq.models.calls import Room
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.observe import Observer, observed, same_inputs
from lorq.pipeline.walk import advance
from lorq.progress import COMPENSATE, Progress
from lorq.storage.names import shard_name
from lorq.storage.writer import CheckpointWriter

# What the Hessian is shrunk and damped by before it is factorised, as in `lorq.methods.flrq`.
_SHRINKAGE, _DAMPING = 0.2, 0.01
# An expert that sees fewer tokens has the statistics of all.
_EXPERT_TOKENS = 128


@dataclass(frozen=True)
class Fitted:
    """What is known of a layer and its candidates; errors are ``tr(E H E^T)``, with ``H`` shrunk and damped.

    Attributes:
        stored_bits: what the quantized weight takes.
        energy: ``tr(W H W^T)``.
        before: the error without factors.
        gains: what each pair takes off it, falling.
        note: what is out of the ordinary.
    """

    name: str
    shape: tuple[int, int]
    stored_bits: int
    energy: float
    before: float
    gains: tuple[float, ...]
    note: str = ""


def fit(
    couple: Couple, windows: Int[Tensor, "windows length"], settings: Settings, writer: CheckpointWriter,
    progress: Progress,
) -> None:  # fmt: skip
    """Write each block's candidates, those of a layer as ``NAME.left`` and ``NAME.right``, best pair first.

    The first ``r`` pairs are the best of rank ``r``, so that ranks can be chosen when all layers are known. Blocks that
    the writer has finished are only passed.
    """
    model, blocks = couple.original, couple.original.blocks
    stream = model.embed(windows, Room(settings.spill_bytes, writer.folder))
    progress(COMPENSATE, 0, len(blocks))
    for number, part in enumerate(blocks, 1):
        shard = shard_name(number, len(blocks))
        with model.resident(part):
            run = partial(model.run, part)
            if shard in writer.completed:
                advance(stream, run)
            else:
                layers = {t.name: model.model.get_submodule(t.name) for t in couple.targets[part.name]}
                experts = find_experts(model.model, part.name)
                plain = {name: layer for name, layer in layers.items() if expert_name(name, experts) is None}
                inputs = same_inputs(lambda: run(stream, 0), plain)  # noqa: B023, called at once
                observer = Observer(settings.token_weights, expert_tokens=_EXPERT_TOKENS, device=model.device)
                with observed(layers, experts, lambda: run(stream, 0), observer) as found:  # noqa: B023
                    advance(stream, run)
                tensors: dict[str, Tensor] = {}
                record: dict[str, Any] = {"layers": [], "inputs": inputs}
                for target in couple.targets[part.name]:
                    fitted, own = _fit_layer(couple, target, found.stats[target.name], settings)
                    record["layers"].append(asdict(fitted))
                    tensors |= own
                writer.write_shard(shard, tensors, record)
            stream.forget(part.name)
        progress(COMPENSATE, number, len(blocks))


def _fit_layer(
    couple: Couple, target: Target, stats: InputStats, settings: Settings
) -> tuple[Fitted, dict[str, Tensor]]:
    """A layer's candidates."""
    missing = couple.missing(target)
    shape, bits = (target.out_features, target.in_features), couple.stored_bits(target)
    note = "" if missing.columns is None else "scales that the quantizer has moved out of it are allowed for"
    if stats.empty:
        return Fitted(target.name, shape, bits, 0.0, 0.0, (), "its inputs are zero on every calibration token"), {}
    if missing.columns is not None:
        stats = stats.smoothed(missing.columns)
    metric = Metric.hessian(stats.prepared(shrinkage=_SHRINKAGE, damping=_DAMPING).factor)
    energy, before = (float(metric.apply(part).square().sum()) for part in (missing.target, missing.error))
    if not before:
        return Fitted(target.name, shape, bits, energy, 0.0, (), "is the original's"), {}
    pairs = error_pairs(
        missing.error, metric, rank=min(settings.rank or settings.max_rank, *shape),
        generator=layer_generator(settings.seed, target.name, missing.error.device),
    )  # fmt: skip
    stored = store_factors(pairs.left, pairs.right, factor_type="float16")
    assert stored is not None
    fitted = Fitted(target.name, shape, bits, energy, before, tuple(pairs.gains.tolist()), note)
    return fitted, {f"{target.name}.left": stored.left, f"{target.name}.right": stored.right}
