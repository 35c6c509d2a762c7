"""Commit: what is solved is written, and put into the resident block, so that the walk goes on in it."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lorq.core.weight import QuantizedWeight, layer_bytes
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.experts import expert_name, find_experts
from lorq.models.skeleton import get_tensor
from lorq.pipeline.one_block import Solved
from lorq.pipeline.plan import Plan
from lorq.pipeline.tables import embedding_heads
from lorq.pipeline.verify import Probe
from lorq.pipeline.walk import Visit
from lorq.storage.config import write_format
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import check_kinds
from lorq.storage.names import JOURNAL, TABLES, shard_name
from lorq.storage.report import LayerReport, read_layer
from lorq.storage.writer import CheckpointWriter


@dataclass(frozen=True)
class Commit:
    """Where solved blocks of a model go: into its resident blocks, and into a folder that may have some already.

    Attributes:
        disk: where files are written, one at a time, while the work goes on; `settle` waits for the last.
    """

    model: StreamedModel
    plan: Plan
    writer: CheckpointWriter
    disk: Executor
    _under_way: list[Future[None]] = field(default_factory=list, repr=False, compare=False)

    @property
    def finished(self) -> set[str]:
        """Names of the blocks that are written."""
        return {part.name for part in self.model.blocks if self._shard_of(part) in self.writer.completed}

    def _shard_of(self, block: Part) -> str:
        return shard_name(self.model.blocks.index(block) + 1, len(self.model.blocks))

    def outside(self, stored: dict[str, Tensor], source: str) -> None:
        """Write what lies outside the blocks, unless it is written; ``source`` is the checksum of what was read."""
        shard = shard_name(0, len(self.model.blocks))
        if shard in self.writer.completed:
            return self._require_same(shard, "what lies outside the blocks", source)
        self._write(shard, stored, _record(source))

    def tables(self, solve: Callable[[], Iterable[tuple[Target, QuantizedWeight]]]) -> dict[Target, QuantizedWeight]:
        """Solve and write the table of tokens and the head, unless they are written; then what is written of them."""
        tables = self.plan.tables
        if not tables:
            return {}
        with self.model.checkpoint.hashed() as source:
            for target in tables:
                self.model.stored_tensor(f"{target.name}.weight")
        if TABLES in self.writer.completed:
            self._require_same(TABLES, " and ".join(target.name for target in tables), source())
            folder = LorqFolder.of_shards(self.writer.folder, {TABLES: self.writer.completed[TABLES]})
            return {target: folder.weight(target.name) for target in tables}
        weights, record = dict(solve()), _record(source())
        tensors: dict[str, Tensor] = {}
        for target, weight in weights.items():
            tensors |= _add(record, target, weight, weight.record.note)
        record["embeddings"] = embedding_heads(self.model, tables)
        self._write(TABLES, tensors, record)
        return weights

    def block(self, visit: Visit, solved: Solved, probe: Probe) -> None:
        """Write a block, unless it is written, and re-enter it with the solved weights; the probe goes through it."""
        shard = self._shard_of(visit.part)
        if shard not in self.writer.completed:
            self._write(shard, *self._pack(visit, solved))
        for name, tensor in solved.changed.items():
            get_tensor(self.model.model, name).data.copy_(tensor)
        for target, weight in solved.weights.items():
            self.model.resident_weight(target).copy_(weight.dense())
        probe.advance(self.model, visit.part)
        visit.rounding.update({t.name: (weight.activations, weight.basis) for t, weight in solved.weights.items()})

    def _require_same(self, shard: str, what: str, source: str) -> None:
        """Refuse to go on where the model is no longer the one of which a shard was made."""
        then = self.writer.completed[shard]["source"]
        if then != source:
            raise ValueError(
                f"{what} of {self.model.checkpoint.folder} must be as it was when {shard} was made, its checksum was "
                f"{then[:12]} and is {source[:12]}: the weights have changed; begin again with --overwrite"
            )

    def read(self, visit: Visit) -> Solved:
        """A block that an earlier run has written."""
        block, shard = visit.part, self._shard_of(visit.part)
        self._require_same(shard, block.name, visit.source)
        folder = LorqFolder.of_shards(self.writer.folder, {shard: self.writer.completed[shard]})
        weights = {target: folder.weight(target.name) for target in self.plan.of(block)}
        kept = self.plan.kept(block) if self.plan.options.smoothing else []
        changed = {name: folder.reader.tensor(name) for name in kept}
        return Solved(weights, {}, changed, self.writer.completed[shard]["inputs"])

    def _pack(self, visit: Visit, solved: Solved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A block's tensors, and what the journal keeps of its layers."""
        modules = find_experts(self.model.model, visit.part.name)
        tensors = visit.kept | solved.changed
        record = _record(visit.source) | {"inputs": solved.inputs}
        for target, weight in solved.weights.items():
            tensors |= _add(record, target, weight, solved.notes.get(target.name, ""))
            place = expert_name(target.name, modules)
            if weight.tile is not None and place is not None and place.tiles not in record["tiles"]:
                factors = weight.tile.factors
                tensors |= {f"{place.tiles}.{local}": t for local, t in factors.tensors().items()}
                record["tiles"][place.tiles] = asdict(factors.format)
        return tensors, record

    def _write(self, shard: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.check_source()
        self.settle()
        self._under_way.append(
            self.disk.submit(self.writer.write_shard, shard, dict(tensors), record | {"bytes": size})
        )

    def check_source(self) -> None:
        """Refuse to write what may be of two models, with a ValueError."""
        self.model.checkpoint.check_unchanged("continue with --resume; or begin again with --overwrite")

    def look(self) -> None:
        """Raise what has gone wrong on the disk so far."""
        if self._under_way and self._under_way[0].done():
            self.settle()

    def settle(self) -> None:
        """Wait until all that was given to the disk is on it; raises what went wrong there."""
        while self._under_way:
            self._under_way.pop().result()


def check_records(writer: CheckpointWriter) -> None:
    """Refuse, with a ValueError, a journal whose records are not as `Commit` writes them; lorq never wrote it."""
    for shard, record in writer.completed.items():
        where = f"{writer.folder / JOURNAL}, {shard}"
        check_kinds(record, _RECORD, where=where)
        for entry in record["layers"]:
            read_layer(entry, where)


_RECORD: dict[str, type] = {
    "layers": list, "formats": dict, "tiles": dict, "inputs": list, "embeddings": dict, "source": str, "bytes": int,
}  # fmt: skip


def _record(source: str) -> dict[str, Any]:
    """What the journal keeps of a shard, before anything is in it; ``source`` is the checksum of what it is made of."""
    return {"layers": [], "formats": {}, "tiles": {}, "inputs": [], "embeddings": {}, "source": source}


def _add(record: dict[str, Any], target: Target, weight: QuantizedWeight, note: str) -> dict[str, Tensor]:
    """Tell a shard's record of a layer; its tensors."""
    record["formats"][target.name] = write_format(weight.format)
    report = LayerReport(
        name=target.name, shape=weight.shape, bits=weight.format.bits, rank=weight.rank,
        stop=weight.record.stop, error_before=weight.record.error_before,
        error_after=weight.record.error_after, bytes=layer_bytes(weight.stored_bits()), note=note,
    )  # fmt: skip
    record["layers"].append(asdict(report))
    return {f"{target.name}.{local}": tensor for local, tensor in weight.tensors().items()}
