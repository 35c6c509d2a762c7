"""quantize(): the only place that calls the stages in order."""

import ctypes
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorq
from lorq.blocks import Calls, StreamedModel, Target, hidden_states
from lorq.calibration import SELF, Windows, calibration_windows
from lorq.checkpoint import CheckpointWriter, require_space
from lorq.config import FORMAT_VERSION
from lorq.experts import Experts, find_experts
from lorq.hf import SENTINEL, read_device
from lorq.linear import pack_weight, unpack_weight
from lorq.methods import METHODS, Method
from lorq.observe import Observed, Observer, observed, routed_alike
from lorq.plan import (
    Progress,
    Run,
    check_weights,
    estimate,
    kept_names,
    layer_bytes,
    make_report,
    plan_layers,
    read_method,
    read_options,
)  # fmt: skip
from lorq.report import REPORT_NAME, LayerReport, Report, record_of
from lorq.selftext import cached_self_windows
from lorq.skeleton import read_config
from lorq.solve import expert_name, solve_block
from lorq.source import COMPANIONS, resolve_model
from lorq.tiled import pack_tiles, unpack_tiles
from lorq.verify import probe_tokens, verify
from lorq.weight import LayerFormat, QuantizedWeight, Tile


def quantize(
    model: str | Path,
    out: str | Path,
    method: str | Method = "flrq",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantize ``model`` into the folder ``out``.

    Everything that can be refused is refused before the long work starts. One decoder block is in memory at
    a time; each is written when it is solved. Before the folder becomes loadable it is read back and a short
    text's logits are compared with those of the solved weights.

    Args:
        model: a local Hugging Face folder, a hub id, or a GGUF file.
        out: the new folder.
        method: a name of `lorq.METHODS`, or an instance with its settings, such as ``lorq.FLRQ(bits=3)``.
        progress: called as ``progress(stage, done, total)``.
        **options: fields of `Options`.

    Returns:
        The report, which the folder holds too. After a dry run it has the largest sizes that can come out.

    Raises:
        ValueError: for settings, models or texts that do not fit; all offending layers are listed at once.
        FileNotFoundError, FileExistsError, OSError: for missing models, used folders, full disks.
    """
    started = time.monotonic()
    chosen, solver = read_options(options), read_method(method)
    source, out = resolve_model(model), Path(out)
    if out.resolve() == source.resolve():
        raise FileExistsError(f"the output folder must not be the model's own, got {out} for both")
    CheckpointWriter.check(out, overwrite=chosen.overwrite, resume=chosen.resume)
    device = read_device(chosen.device)
    streamed = StreamedModel.open(source, device=device)
    plan, excluded = plan_layers(streamed, solver, exclude=chosen.exclude, override=chosen.override)
    name = next((key for key, kind in METHODS.items() if type(solver) is kind), type(solver).__name__.lower())
    run = Run(streamed, source, plan, excluded, solver, name, chosen, progress or (lambda *_: None))
    check_weights(run)
    largest = estimate(run)
    # What is finished is on the disk already; the head room is for index, report and journal.
    finished = sum(file.stat().st_size for file in out.glob("lorq-*.safetensors")) if chosen.resume else 0
    require_space(out, max(0, largest.bytes - finished) + (1 << 20))
    if chosen.dry_run:
        if chosen.calibration != SELF:
            _windows(run)
        return replace(largest, seconds=time.monotonic() - started)
    began = time.monotonic()
    windows = _windows(run)
    text_seconds = time.monotonic() - began
    writer = CheckpointWriter.create(out, _identity(run, windows), overwrite=chosen.overwrite, resume=chosen.resume)
    work = _Solver(run, writer, windows)
    work.solve_blocks()
    report = _finish(run, writer, windows)
    stages = {"calibration": text_seconds + work.calibrating, "solving": work.solving}
    return replace(report, seconds=time.monotonic() - started, stages=stages)


def _give_memory_back() -> None:
    """Hand the last block's memory back to the system.

    glibc keeps what is freed between longer-lived tensors: resident memory rose by 6 MB a block of 10 MB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


# -- calibration text ---------------------------------------------------------------------------------------


def _windows(run: Run) -> Windows | None:
    """Calibration windows, if any method looks at inputs."""
    if not any(method.needs_stats for _, method in run.jobs()):
        return None
    from transformers import AutoTokenizer

    options, folder = run.options, run.folder
    limit = getattr(run.model.model.config, "max_position_embeddings", None)
    if limit is not None and options.seq_len > limit:
        raise ValueError(f"seq_len must be at most the model's {limit} positions, got {options.seq_len}")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    dtype = torch.float32

    def write() -> Tensor:
        _require_memory(run)
        return cached_self_windows(
            lambda: load_dense(folder, dtype),
            tokenizer,
            run.model.model.config,
            fingerprint=run.model.checkpoint.fingerprint(),
            dtype=dtype,
            windows=options.samples,
            length=options.seq_len,
            seed=options.seed,
            progress=lambda done, total: run.progress("write calibration text", done, total),
        )

    return calibration_windows(
        options.calibration, tokenizer, samples=options.samples, seq_len=options.seq_len, self_writer=write
    )  # fmt: skip


def load_dense(folder: Path, dtype: torch.dtype) -> Any:
    """The whole original model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _require_memory(run: Run) -> None:
    """The model writes text only if it fits in memory with room to spare."""
    parameters = sum(p.numel() for p in run.model.model.parameters())
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * parameters > 0.7 * available:
        raise ValueError(
            f"calibration 'self' needs the whole model in memory ({4 * parameters / 1e9:.1f} GB in float32), "
            f"{available / 1e9:.1f} GB are free; name a text instead, such as --calibration FILE or wikitext2"
        )


def _identity(run: Run, windows: Windows | None) -> dict[str, Any]:
    """Everything that decides the bytes of the folder; resuming with another one is refused."""
    options = run.options if windows else replace(run.options, samples=0, seq_len=0)
    keep = (
        "samples", "seq_len", "seed", "token_weights", "router_weights", "expert_tokens", "stream", "exclude",
        "override",
    )  # fmt: skip
    return {
        "format_version": FORMAT_VERSION,
        "lorq_version": lorq.__version__,
        "model": run.model.checkpoint.fingerprint(),
        "method": run.name,
        "settings": asdict(run.method),  # type: ignore[call-overload]
        "calibration": None if windows is None else windows.source,
        "calibration_tokens": None if windows is None else windows.sha256,
        **{key: getattr(options, key) for key in keep},
        "device_type": run.model.device.type,
    }


# -- the work -----------------------------------------------------------------------------------------------


class _Solver:
    """Solves and writes block after block; also follows a short probe through the quantized blocks."""

    def __init__(self, run: Run, writer: CheckpointWriter, windows: Windows | None):
        self.run, self.writer = run, writer
        model, config = run.model, run.model.model.config.get_text_config()
        width = int(config.hidden_size)
        tokens = torch.empty(0, 1, dtype=torch.int64) if windows is None else windows.tokens
        self.hidden = hidden_states(
            (tokens.shape[0], tokens.shape[1], width),
            limit_bytes=run.options.spill_bytes, folder=writer.folder,
        )  # fmt: skip
        self.calls = model.embed(tokens, self.hidden) if len(tokens) else Calls(())
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
                    weights = self._read(shard, block)
                    if run.options.stream == "original":
                        self._advance(index)
                else:
                    weights, notes = self._solve(index)
                    self._write(shard, self._shard(block, weights, notes))
                for target in run.plan[block]:
                    dense = weights[target].dense()
                    parameter = run.model.model.get_submodule(target.name).weight
                    parameter.data.copy_(dense.T if target.transposed else dense)
                if run.options.stream == "quantized":
                    self._advance(index)
                with routed_alike(self._experts(index), self.probe_routes):
                    self.probe_hidden[0] = run.model.run(index, self.probe_hidden[0], self.probe_calls).cpu()
            _give_memory_back()
            run.progress("quantize", index + 1, len(blocks))
        logits = run.model.logits(self.probe, self.probe_hidden[0])
        verify(run, self.writer.folder, self.writer.completed, self.probe, logits, self.probe_routes)

    def _advance(self, index: int) -> None:
        """Replace every window's hidden states by the resident block's outputs."""
        for i in range(len(self.hidden)):
            self.hidden[i] = self.run.model.run(index, self.hidden[i], self.calls).cpu()

    def _solve(self, index: int) -> tuple[dict[Target, QuantizedWeight], dict[str, str]]:
        """The block's weights, and notes on layers."""
        jobs = self.run.plan[self.run.model.blocks[index]]
        began = time.monotonic()
        found = self._observe(index) if len(self.hidden) else Observed()
        observed_at = time.monotonic()
        device, modules = self.run.model.device, self._experts(index)
        weights = solve_block(
            jobs, found.stats, modules, seed=self.run.options.seed, device=device,
            weight=lambda target: self.run.model.weight(target).to(device, torch.float32),
        )  # fmt: skip
        self.calibrating += observed_at - began
        self.solving += time.monotonic() - observed_at
        return weights, found.notes

    def _experts(self, index: int) -> dict[str, Experts]:
        """The block's experts modules, by name."""
        return find_experts(self.run.model.model, self.run.model.blocks[index])

    def _observe(self, index: int) -> Observed:
        """Statistics of the block's inputs; with the original's stream, the block is left behind."""
        model, options, block = self.run.model, self.run.options, self.run.model.blocks[index]
        layers = {t.name: model.model.get_submodule(t.name) for t, m in self.run.plan[block].items() if m.needs_stats}
        experts = self._experts(index)
        observer = Observer(options.token_weights, options.router_weights, options.expert_tokens, model.device)
        with observed(layers, experts, lambda: model.run(index, self.hidden[0], self.calls), observer) as found:
            if options.stream == "original":
                self._advance(index)
            else:
                for hidden in self.hidden:
                    model.run(index, hidden, self.calls)
        return found

    def _shard(self, block: str, weights: dict[Target, QuantizedWeight], notes: dict[str, str]) -> "_Shard":
        modules = find_experts(self.run.model.model, block)
        shard = _Shard({name: self.run.model.stored_tensor(name) for name in kept_names(self.run, block)})
        for target, weight in weights.items():
            shard.tensors.update({f"{target.name}.{local}": t for local, t in pack_weight(weight).items()})
            shard.formats[target.name] = asdict(weight.format)
            place = expert_name(target.name, modules)
            if weight.tile is not None and place is not None and place.tiles not in shard.tiles:
                factors = weight.tile.factors
                shard.tensors.update({f"{place.tiles}.{local}": t for local, t in pack_tiles(factors).items()})
                shard.tiles[place.tiles] = asdict(factors.format)
            shard.reports.append(
                LayerReport(
                    name=target.name, shape=weight.shape, bits=weight.bits, rank=weight.rank,
                    stop=weight.record.stop, error_before=weight.record.error_before,
                    error_after=weight.record.error_after, bytes=layer_bytes(weight.stored_bits()),
                    note=notes.get(target.name, ""),
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

    def _read(self, shard: str, block: str) -> dict[Target, QuantizedWeight]:
        """A block that an earlier run has solved."""
        tensors, record = self.writer.read_shard(shard), self.writer.completed[shard]
        modules = find_experts(self.run.model.model, block)

        def under(name: str) -> dict[str, Tensor]:
            return {n.removeprefix(name + "."): t for n, t in tensors.items() if n.startswith(name + ".")}

        tiles = {name: unpack_tiles(under(name)) for name in record["tiles"]}
        weights = {}
        for target in self.run.plan[block]:
            weight = unpack_weight(under(target.name), LayerFormat(**record["formats"][target.name]))
            place = expert_name(target.name, modules)
            if place is not None and place.tiles in tiles:
                weight = replace(weight, tile=Tile(tiles[place.tiles], place.expert))
            weights[target] = weight
        return weights


@dataclass(frozen=True)
class _Shard:
    """What goes into one file, and what the journal keeps of it."""

    tensors: dict[str, Tensor]
    reports: list[LayerReport] = field(default_factory=list)
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)


def shard_name(number: int, blocks: int) -> str:
    """File of one block, counted from 1; 0 holds what lies outside the blocks."""
    return f"lorq-{number:05d}-of-{blocks:05d}.safetensors"


# -- after the work -----------------------------------------------------------------------------------------


def _finish(run: Run, writer: CheckpointWriter, windows: Windows | None) -> Report:
    records = list(writer.completed.values())
    layers = [LayerReport(**{**l, "shape": tuple(l["shape"])}) for record in records for l in record["layers"]]
    identity = _identity(run, windows)
    run_info = {key: value for key, value in identity.items() if key not in ("method", "settings")}
    stored = sum(record["bytes"] for record in records)
    report = make_report(run, layers, kept_bytes=0, run_info=run_info, checksums=writer.shard_checksums())
    report = replace(report, bytes=stored)
    files: dict[str, bytes | Path] = {name: run.folder / name for name in COMPANIONS if (run.folder / name).is_file()}
    files[REPORT_NAME] = report.to_bytes()
    formats = {name: format for record in records for name, format in record["formats"].items()}
    tiles = {name: format for record in records for name, format in record["tiles"].items()}
    config = read_config(run.folder).to_dict() | {
        "transformers_weights": SENTINEL,
        "quantization_config": {
            "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": lorq.__version__,
            "method": run.name, "settings": asdict(run.method), "layers": formats,  # type: ignore[call-overload]
            "tiles": tiles,
        },
    }  # fmt: skip
    # Where the model was read from is nobody's business and would differ from machine to machine.
    config.pop("_name_or_path", None)
    writer.finish(config=config, files=files)
    return report
