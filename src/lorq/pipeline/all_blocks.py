"""Solve a model block after block: calibrate, solve, write, go on in the quantized block."""

import ctypes
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.basis import Basis
from lorq.core.problem import BlockOutput, Problem
from lorq.core.tile_factors import TileFactors
from lorq.core.weight import QuantizedWeight, Tile, layer_bytes
from lorq.models.blocks import Calls, Target, hidden_states
from lorq.models.experts import Experts, expert_name, find_experts
from lorq.models.skeleton import get_tensor
from lorq.models.texts import Windows
from lorq.pipeline.dense_activations import Smoothed, layer_activations, quantized_activations, smooth_block
from lorq.pipeline.observe import Observed, Observer, observed, routed_alike
from lorq.pipeline.one_block import solve_block, solve_whole_block
from lorq.pipeline.plan import Run, kept_names
from lorq.pipeline.verify import probe_tokens, verify
from lorq.storage.config import read_format, write_format
from lorq.storage.names import shard_name
from lorq.storage.report import LayerReport, record_of
from lorq.storage.writer import CheckpointWriter


def _give_memory_back() -> None:
    """Hand the last block's memory back to the system.

    glibc keeps what is freed between longer-lived tensors: resident memory rose by 6 MB a block of 10 MB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


@dataclass(frozen=True)
class _Solved:
    """A block's weights, and what else goes into its file and report."""

    weights: dict[Target, QuantizedWeight]
    notes: dict[str, str]
    changed: dict[str, Tensor]  # parameters outside the layers that smoothing changed, by name


class Solver:
    """Solves and writes block after block; also follows a short probe through the quantized blocks.

    Methods of scope "block" need two streams of hidden states: the inputs that the quantized blocks before have made
    (or the original ones, as the option says), and the original's, whose outputs are the targets.
    """

    def __init__(self, run: Run, writer: CheckpointWriter, windows: Windows | None):
        self.run, self.writer = run, writer
        model, config = run.model, run.model.model.config.get_text_config()
        width = int(config.hidden_size)
        tokens = torch.empty(0, 1, dtype=torch.int64) if windows is None else windows.tokens
        shape = (tokens.shape[0], tokens.shape[1], width)
        self.hidden = hidden_states(shape, limit_bytes=run.options.spill_bytes, folder=writer.folder)
        self.calls = model.embed(tokens, self.hidden) if len(tokens) else Calls(())
        self.targets: Tensor | None = None  # the original's stream, where it goes beside the other
        if run.blockwise:
            self.targets = hidden_states(shape, limit_bytes=run.options.spill_bytes, folder=writer.folder)
            self.targets.copy_(self.hidden)
        self.probe = probe_tokens(config, run.options.seed)
        self.probe_hidden = torch.empty(1, len(self.probe), width)
        self.probe_calls = model.embed(self.probe[None], self.probe_hidden)
        self.probe_routes: dict[str, tuple[Tensor, Tensor]] = {}
        self.calibrating = self.solving = 0.0  # seconds

    def solve_blocks(self) -> None:
        run, blocks = self.run, self.run.model.blocks
        outside = shard_name(0, len(blocks))
        if outside not in self.writer.completed:
            self._write(outside, _Shard({name: run.model.stored_tensor(name) for name in kept_names(run, None)}))
        for index, block in enumerate(blocks):
            shard = shard_name(index + 1, len(blocks))
            with run.model.resident_block(index):
                if shard in self.writer.completed:
                    self._leave_original(index)
                    solved = self._read(shard, block)
                else:
                    solved = self._solve(index)
                    self._write(shard, self._shard(block, solved))
                layers = self._put(solved)
                with routed_alike(self._experts(index), self.probe_routes):
                    self.probe_hidden[0] = run.model.run(index, self.probe_hidden[0], self.probe_calls).cpu()
                if run.stream == "quantized":
                    with quantized_activations(run.model.model, layers):
                        self._advance(index, self.hidden)
                elif self.targets is not None:
                    self.hidden.copy_(self.targets)
            _give_memory_back()
            run.progress("quantize", index + 1, len(blocks))
        logits = run.model.logits(self.probe, self.probe_hidden[0])
        verify(run, self.writer.folder, self.writer.completed, self.probe, logits, self.probe_routes)

    def _put(self, solved: _Solved) -> dict[str, tuple[Activations, Basis | None]]:
        """Give the resident block the solved weights; what is left to do is to round its activations."""
        model = self.run.model.model
        for name, tensor in solved.changed.items():
            get_tensor(model, name).data.copy_(tensor)
        for target, weight in solved.weights.items():
            dense = weight.dense()
            model.get_submodule(target.name).weight.data.copy_(dense.T if target.transposed else dense)
        return {target.name: (weight.activations, weight.basis) for target, weight in solved.weights.items()}

    def _advance(self, index: int, stream: Tensor) -> None:
        """Replace every window's hidden states by the resident block's outputs."""
        for i in range(len(stream)):
            stream[i] = self.run.model.run(index, stream[i], self.calls).cpu()

    def _leave_original(self, index: int) -> None:
        """Take the original's stream through the block, whose weights are still the original's."""
        if self.targets is not None:
            self._advance(index, self.targets)
        elif self.run.stream == "original":
            self._advance(index, self.hidden)

    def _solve(self, index: int) -> _Solved:
        run, block = self.run, self.run.model.blocks[index]
        jobs, model, options = run.plan[block], run.model, run.options
        began = time.monotonic()
        if self.targets is not None:
            self._leave_original(index)
        found = self._observe(index) if len(self.hidden) else Observed()
        smoothed = self._smooth(index, found) if options.smoothing else Smoothed()
        activations = {
            t.name: layer_activations(
                t.name, found.stats.get(t.name), inputs=options.activations, cache=options.kv_cache
            )
            for t in jobs
        }  # fmt: skip
        observed_at = time.monotonic()

        def weight(target: Target) -> Tensor:
            stored = model.weight(target).to(model.device, torch.float32)
            return stored * smoothed.scales[target.name] if target.name in smoothed.scales else stored

        weights: dict[Target, QuantizedWeight] = {}
        if self.targets is None:
            weights = solve_block(jobs, found.stats, self._experts(index), weight=weight, seed=options.seed)
        elif jobs:
            with quantized_activations(model.model, {name: (a, None) for name, a in activations.items()}):
                problem = self._problem(index, {t: weight(t) for t in jobs}, found)
                weights = solve_whole_block(jobs, problem)
        weights = {t: replace(w, activations=activations[t.name]) for t, w in weights.items()}
        self.calibrating += observed_at - began
        self.solving += time.monotonic() - observed_at
        notes: dict[str, str] = {}
        for name, note in [
            *found.notes.items(), *smoothed.notes.items(), *((t.name, w.record.note) for t, w in weights.items()),
        ]:  # fmt: skip
            if note:
                notes[name] = f"{notes[name]}; {note}" if name in notes else note
        return _Solved(weights, notes, smoothed.tensors)

    def _problem(self, index: int, weights: Mapping[Target, Tensor], found: Observed) -> Problem:
        """The resident block as methods of scope "block" take it."""
        assert self.targets is not None
        model, targets = self.run.model, {target.name: target for target in weights}

        def forward(given: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            own = {targets[name]: weight for name, weight in given.items()}
            # One window at a time: masks and rotary angles are those of one.
            return torch.stack([model.differentiable_run(index, h, self.calls, own) for h in hidden])

        return Problem(
            {target.name: weight for target, weight in weights.items()},
            found.stats,
            self.run.options.seed,
            methods={t.name: method for t, method in self.run.plan[self.run.model.blocks[index]].items()},
            block=BlockOutput(forward, self.hidden, self.targets),
        )

    def _smooth(self, index: int, found: Observed) -> Smoothed:
        model, block = self.run.model, self.run.model.blocks[index]
        return smooth_block(
            model.model.get_submodule(block),
            {t.name: model.model.get_submodule(t.name) for t in self.run.plan[block]},
            lambda: model.run(index, self.probe_hidden[0], self.probe_calls),
            found.stats,
            prefix=block,
            exponent=self.run.options.smoothing,
        )

    def _experts(self, index: int) -> dict[str, Experts]:
        """The block's experts modules, by name."""
        return find_experts(self.run.model.model, self.run.model.blocks[index])

    def _observe(self, index: int) -> Observed:
        """Statistics of the block's inputs; with the original's stream alone, the block is left behind."""
        model, options, block = self.run.model, self.run.options, self.run.model.blocks[index]
        layers = {
            t.name: model.model.get_submodule(t.name)
            for t, method in self.run.plan[block].items()
            if method.needs_stats or self.run.needs_ranges
        }
        experts = self._experts(index)
        observer = Observer(options.token_weights, options.router_weights, options.expert_tokens, model.device)
        with observed(layers, experts, lambda: model.run(index, self.hidden[0], self.calls), observer) as found:
            if self.targets is None and self.run.stream == "original":
                self._advance(index, self.hidden)
            else:
                for hidden in self.hidden:
                    model.run(index, hidden, self.calls)
        return found

    def _shard(self, block: str, solved: _Solved) -> "_Shard":
        modules = find_experts(self.run.model.model, block)
        kept = {name: self.run.model.stored_tensor(name) for name in kept_names(self.run, block)}
        shard = _Shard(kept | solved.changed)
        for target, weight in solved.weights.items():
            shard.tensors.update({f"{target.name}.{local}": t for local, t in weight.tensors().items()})
            shard.formats[target.name] = write_format(weight.format)
            place = expert_name(target.name, modules)
            if weight.tile is not None and place is not None and place.tiles not in shard.tiles:
                factors = weight.tile.factors
                shard.tensors.update({f"{place.tiles}.{local}": t for local, t in factors.tensors().items()})
                shard.tiles[place.tiles] = asdict(factors.format)
            shard.reports.append(
                LayerReport(
                    name=target.name, shape=weight.shape, bits=weight.format.bits, rank=weight.rank,
                    stop=weight.record.stop, error_before=weight.record.error_before,
                    error_after=weight.record.error_after, bytes=layer_bytes(weight.stored_bits()),
                    note=solved.notes.get(target.name, ""),
                )
            )  # fmt: skip
        return shard

    def _write(self, name: str, shard: "_Shard") -> None:
        record = {
            "layers": [record_of(report) for report in shard.reports],
            "formats": shard.formats,
            "tiles": shard.tiles,
            "bytes": sum(t.numel() * t.element_size() for t in shard.tensors.values()),
        }
        self.writer.write_shard(name, shard.tensors, record)

    def _read(self, shard: str, block: str) -> _Solved:
        """A block that an earlier run has solved."""
        tensors, record = self.writer.read_shard(shard), self.writer.completed[shard]
        modules = find_experts(self.run.model.model, block)

        def under(name: str) -> dict[str, Tensor]:
            return {n.removeprefix(name + "."): t for n, t in tensors.items() if n.startswith(name + ".")}

        tiles = {name: TileFactors.read(under(name)) for name in record["tiles"]}
        weights = {}
        for target in self.run.plan[block]:
            weight = read_format(target.name, record["formats"][target.name]).read(under(target.name))
            place = expert_name(target.name, modules)
            if place is not None and place.tiles in tiles:
                weight = replace(weight, low_rank=Tile(tiles[place.tiles], place.expert))
            weights[target] = weight
        changed = {name: tensors[name] for name in kept_names(self.run, block)} if self.run.options.smoothing else {}
        return _Solved(weights, {}, changed)


@dataclass(frozen=True)
class _Shard:
    """What goes into one file, and what the journal keeps of it."""

    tensors: dict[str, Tensor]
    reports: list[LayerReport] = field(default_factory=list)
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)
