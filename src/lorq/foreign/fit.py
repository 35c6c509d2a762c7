"""The fit: calibration windows go through the original block by block, and each quantized layer gets candidates."""

from dataclasses import asdict, dataclass

from jaxtyping import Int
from torch import Tensor

from lorq.core.compensation import error_pairs
from lorq.core.low_rank import Metric, store_factors
from lorq.core.problem import layer_generator
from lorq.core.stats import InputStats
from lorq.foreign.couple import Couple
from lorq.foreign.settings import Settings
from lorq.methods import GPTQ
from lorq.models.blocks import Target
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.gradients import token_gradients
from lorq.pipeline.observe import same_inputs
from lorq.pipeline.options import Options
from lorq.pipeline.plan import Plan
from lorq.pipeline.walk import Streams, Visit, walk
from lorq.progress import COMPENSATE, Progress
from lorq.storage.names import shard_name
from lorq.storage.writer import CheckpointWriter

# What the Hessian is shrunk and damped by before it is factorised, as in the methods.
_SHRINKAGE, _DAMPING = 0.2, 0.01


@dataclass(frozen=True)
class Fitted:
    """What is known of a layer and its candidates; errors are ``tr(E H E^T)``, with ``H`` shrunk and damped.

    Attributes:
        stored_bits: what the quantized weight takes.
        stake: what an error of 1 costs, in nats a token, where gradients tell; else over the layer's output.
        energy: ``tr(W H W^T)``.
        before: the error without factors.
        gains: what each pair takes off it, falling.
        note: what is out of the ordinary.
    """

    name: str
    shape: tuple[int, int]
    stored_bits: int
    stake: float
    energy: float
    before: float
    gains: tuple[float, ...]
    note: str = ""


def observing_plan(couple: Couple, settings: Settings) -> Plan:
    """A plan by which the layers to compensate are looked at; nothing is quantized by it."""
    names = ("calibration", "samples", "seq_len", "start_token", "seed", "token_weights", "spill_bytes")
    options = Options(**{name: getattr(settings, name) for name in names}, stream="original")
    method = GPTQ()
    layers = {part: dict.fromkeys(targets, method) for part, targets in couple.targets.items()}
    return Plan(layers, couple.kept, method, options)


def fit(
    couple: Couple, plan: Plan, windows: Int[Tensor, "windows length"], settings: Settings, writer: CheckpointWriter,
    progress: Progress,
) -> None:  # fmt: skip
    """Write each block's candidates, those of a layer as ``NAME.left`` and ``NAME.right``, best pair first.

    The first ``r`` pairs are the best of rank ``r``, so that ranks can be chosen when all layers are known. Blocks that
    the writer has finished are only passed.
    """
    model, folder = couple.original, writer.folder
    shards = {part.name: shard_name(i, len(model.blocks)) for i, part in enumerate(model.blocks, 1)}
    finished = {name for name, shard in shards.items() if shard in writer.completed}
    gradients = None
    if settings.token_weights == "gradient":
        gradients = token_gradients(model, plan, windows, folder, progress, finished=finished)
    streams = Streams.begin(model, plan, windows, folder)
    progress(COMPENSATE, 0, len(shards))
    for number, visit in enumerate(walk(model, plan, streams, finished=finished, gradients=gradients), 1):
        if visit.part.name not in finished:
            _fit_block(couple, visit, settings, writer, shards[visit.part.name])
        progress(COMPENSATE, number, len(shards))


def _fit_block(couple: Couple, visit: Visit, settings: Settings, writer: CheckpointWriter, shard: str) -> None:
    model, part = couple.original, visit.part
    targets, experts = couple.targets[part.name], find_experts(model.model, part.name)
    layers = {t.name: model.model.get_submodule(t.name) for t in targets if expert_name(t.name, experts) is None}
    # What has left the block is as good as what enters it to see who is given the same.
    inputs = same_inputs(lambda: model.run(part, visit.streams.inputs, 0), layers)
    tensors: dict[str, Tensor] = {}
    fitted = []
    for target in targets:
        layer, own = _fit_layer(couple, target, visit.observed.stats[target.name], settings)
        fitted.append(asdict(layer))
        tensors |= own
    writer.write_shard(shard, tensors, {"layers": fitted, "inputs": inputs})


def _fit_layer(
    couple: Couple, target: Target, stats: InputStats, settings: Settings
) -> tuple[Fitted, dict[str, Tensor]]:
    """A layer's candidates."""
    missing = couple.missing(target)
    shape, bits = (target.out_features, target.in_features), couple.stored_bits(target)
    note = "" if missing.columns is None else "scales that the quantizer has moved out of it are allowed for"
    if stats.empty:
        return Fitted(target.name, shape, bits, 0.0, 0.0, 0.0, (), "its inputs are zero on every calibration token"), {}
    if missing.columns is not None:
        stats = stats.smoothed(missing.columns)
    metric = Metric.hessian(stats.prepared(shrinkage=_SHRINKAGE, damping=_DAMPING).factor)
    energy, before = (float(metric.apply(part).square().sum()) for part in (missing.target, missing.error))
    if not before:
        return Fitted(target.name, shape, bits, 0.0, energy, 0.0, (), "is the original's"), {}
    pairs = error_pairs(
        missing.error, metric, rank=min(settings.rank or settings.max_rank, *shape),
        generator=layer_generator(settings.seed, target.name, missing.error.device),
    )  # fmt: skip
    stored = store_factors(pairs.left, pairs.right, factor_type="float16")
    assert stored is not None
    stake = stats.sensitivity / (2 * shape[0]) if settings.token_weights == "gradient" else 1 / energy
    fitted = Fitted(target.name, shape, bits, stake, energy, before, tuple(pairs.gains.tolist()), note)
    return fitted, {f"{target.name}.left": stored.left, f"{target.name}.right": stored.right}
