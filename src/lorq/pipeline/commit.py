"""Commit: what is solved is written, and put into the resident block, so that the walk goes on in it."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lorq.core.weight import layer_bytes
from lorq.models.blocks import Part, StreamedModel
from lorq.models.experts import expert_name, find_experts
from lorq.models.skeleton import get_tensor
from lorq.pipeline.one_block import Solved
from lorq.pipeline.plan import Plan
from lorq.pipeline.verify import Probe
from lorq.pipeline.walk import Visit
from lorq.storage.config import write_format
from lorq.storage.folder import LorqFolder
from lorq.storage.names import shard_name
from lorq.storage.report import LayerReport
from lorq.storage.writer import CheckpointWriter

Formats = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Commit:
    """Where solved blocks go.

    Attributes:
        model: whose blocks are resident when they are committed.
        plan: what was solved.
        writer: of the folder; has the blocks of an earlier run already.
    """

    model: StreamedModel
    plan: Plan
    writer: CheckpointWriter

    @property
    def finished(self) -> set[str]:
        """Names of the blocks that are written."""
        return {part.name for part in self.model.blocks if self._shard_of(part) in self.writer.completed}

    def _shard_of(self, block: Part) -> str:
        return shard_name(self.model.blocks.index(block) + 1, len(self.model.blocks))

    def outside(self, stored: dict[str, Tensor]) -> None:
        """Write what lies outside the blocks, unless it is written."""
        shard = shard_name(0, len(self.model.blocks))
        if shard not in self.writer.completed:
            self._write(shard, stored, [], {}, {})

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

    def read(self, block: Part) -> Solved:
        """A block that an earlier run has written."""
        shard = self._shard_of(block)
        folder = LorqFolder.of_shards(self.writer.folder, {shard: self.writer.completed[shard]})
        weights = {target: folder.weight(target.name) for target in self.plan.of(block)}
        kept = self.plan.kept(block) if self.plan.options.smoothing else []
        return Solved(weights, {}, {name: folder.reader.tensor(name) for name in kept})

    def _pack(self, visit: Visit, solved: Solved) -> tuple[dict[str, Tensor], list[LayerReport], Formats, Formats]:
        """A block's tensors, and of its layers the reports, formats, and formats of factors that they share."""
        modules = find_experts(self.model.model, visit.part.name)
        tensors = visit.kept | solved.changed
        reports: list[LayerReport] = []
        formats: Formats = {}
        tiles: Formats = {}
        for target, weight in solved.weights.items():
            tensors |= {f"{target.name}.{local}": t for local, t in weight.tensors().items()}
            formats[target.name] = write_format(weight.format)
            place = expert_name(target.name, modules)
            if weight.tile is not None and place is not None and place.tiles not in tiles:
                factors = weight.tile.factors
                tensors |= {f"{place.tiles}.{local}": t for local, t in factors.tensors().items()}
                tiles[place.tiles] = asdict(factors.format)
            reports.append(
                LayerReport(
                    name=target.name, shape=weight.shape, bits=weight.format.bits, rank=weight.rank,
                    stop=weight.record.stop, error_before=weight.record.error_before,
                    error_after=weight.record.error_after, bytes=layer_bytes(weight.stored_bits()),
                    note=solved.notes.get(target.name, ""),
                )
            )  # fmt: skip
        return tensors, reports, formats, tiles

    def _write(
        self, shard: str, tensors: dict[str, Tensor], reports: list[LayerReport], formats: Formats, tiles: Formats
    ) -> None:
        record = {
            "layers": [asdict(report) for report in reports],
            "formats": formats,
            "tiles": tiles,
            "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        }
        self.writer.write_shard(shard, tensors, record)
