"""quantize(): the only place that calls the stages in order."""

import ctypes
import hashlib
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import lorq
from lorq.blocks import (
    Calls,
    StreamedModel,
    Target,
    hidden_states,
    observed,
    shared_inputs,
)
from lorq.calibration import SELF, Windows, calibration_windows
from lorq.checkpoint import CheckpointWriter, SourceCheckpoint, require_space
from lorq.hf import FORMAT_VERSION, SENTINEL, read_device, swap_layers
from lorq.linear import pack_weight, unpack_weight
from lorq.methods import METHODS, Method
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
from lorq.safefile import read_header
from lorq.selftext import cached_self_windows
from lorq.skeleton import read_config, skeleton
from lorq.source import COMPANIONS, resolve_model
from lorq.stats import InputStats
from lorq.weight import LayerFormat, QuantizedWeight

# Tokens of the window that is followed through the quantized model in memory and again from disk.
_PROBE_TOKENS = 64  # fewer if the model has fewer positions
# float32 sums in another order differ by about 1e-6 a block; a wrong bit in any layer is far above this.
_PROBE_SQNR_DB = 60.0


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
    windows = _windows(run)
    writer = CheckpointWriter.create(out, _identity(run, windows), overwrite=chosen.overwrite, resume=chosen.resume)
    _Solver(run, writer, windows).solve_blocks()
    report = _finish(run, writer, windows)
    return replace(report, seconds=time.monotonic() - started)


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
    keep = ("samples", "seq_len", "seed", "token_weights", "stream", "exclude", "override")
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

    def solve_blocks(self) -> None:
        run, blocks = self.run, self.run.model.blocks
        outside = shard_name(0, len(blocks))
        if outside not in self.writer.completed:
            self._write(outside, {name: run.model.stored_tensor(name) for name in kept_names(run, None)}, [], {})
        for index, block in enumerate(blocks):
            shard = shard_name(index + 1, len(blocks))
            with run.model.resident_block(index):
                if shard in self.writer.completed:
                    weights = self._read(shard, block)
                    if run.options.stream == "original":
                        self._advance(index)
                else:
                    weights = self._solve(index)
                    self._write(shard, *self._shard(block, weights))
                for target in run.plan[block]:
                    dense = weights[target].dense()
                    parameter = run.model.model.get_submodule(target.name).weight
                    parameter.data.copy_(dense.T if target.transposed else dense)
                if run.options.stream == "quantized":
                    self._advance(index)
                self.probe_hidden[0] = run.model.run(index, self.probe_hidden[0], self.probe_calls).cpu()
            _give_memory_back()
            run.progress("quantize", index + 1, len(blocks))
        logits = run.model.logits(self.probe, self.probe_hidden[0])
        verify(run, self.writer, self.probe, logits)

    def _advance(self, index: int) -> None:
        """Replace every window's hidden states by the resident block's outputs."""
        for i in range(len(self.hidden)):
            self.hidden[i] = self.run.model.run(index, self.hidden[i], self.calls).cpu()

    def _solve(self, index: int) -> dict[Target, QuantizedWeight]:
        model, options, block = self.run.model, self.run.options, self.run.model.blocks[index]
        jobs = self.run.plan[block]
        stats: dict[str, InputStats] = {}
        if len(self.hidden):
            layers = {t.name: model.model.get_submodule(t.name) for t, m in jobs.items() if m.needs_stats}
            owners = shared_inputs(lambda: model.run(index, self.hidden[0], self.calls), layers)
            with observed(layers, owners, token_weights=options.token_weights, device=model.device) as stats:
                if options.stream == "original":
                    self._advance(index)
                else:
                    for hidden in self.hidden:
                        model.run(index, hidden, self.calls)
        return {target: self._solve_layer(target, method, stats.get(target.name)) for target, method in jobs.items()}

    def _solve_layer(self, target: Target, method: Method, stats: InputStats | None) -> QuantizedWeight:
        device, seed = self.run.model.device, self.run.options.seed
        weight = self.run.model.weight(target).to(device, torch.float32)
        try:
            solved = method.solve(weight, stats, generator=layer_generator(seed, target.name, device))
            _check_finite(solved)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            error.add_note(f"while solving {target.name}")
            raise
        return solved

    def _shard(
        self, block: str, weights: dict[Target, QuantizedWeight]
    ) -> tuple[dict[str, Tensor], list[LayerReport], dict[str, LayerFormat]]:
        tensors = {name: self.run.model.stored_tensor(name) for name in kept_names(self.run, block)}
        reports, formats = [], {}
        for target, weight in weights.items():
            tensors |= {f"{target.name}.{local}": t for local, t in pack_weight(weight).items()}
            formats[target.name] = weight.format
            reports.append(
                LayerReport(
                    name=target.name, shape=weight.shape, bits=weight.bits, rank=weight.format.rank,
                    stop=weight.record.stop, error_before=weight.record.error_before,
                    error_after=weight.record.error_after, bytes=layer_bytes(weight.format, weight.shape),
                )
            )  # fmt: skip
        return tensors, reports, formats

    def _write(
        self, shard: str, tensors: dict[str, Tensor], reports: list[LayerReport], formats: dict[str, LayerFormat]
    ) -> None:
        record = {
            "layers": [record_of(report) for report in reports],
            "formats": {name: asdict(format) for name, format in formats.items()},
            "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        }
        self.writer.write_shard(shard, tensors, record)

    def _read(self, shard: str, block: str) -> dict[Target, QuantizedWeight]:
        """A block that an earlier run has solved."""
        tensors, formats = self.writer.read_shard(shard), self.writer.completed[shard]["formats"]
        weights = {}
        for target in self.run.plan[block]:
            prefix = target.name + "."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            weights[target] = unpack_weight(own, LayerFormat(**formats[target.name]))
        return weights


def _check_finite(weight: QuantizedWeight) -> None:
    """Nothing that is not a number is ever written."""
    parts = [weight.scale, *(weight.low_rank.factors() if weight.low_rank else ())]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ArithmeticError("scales and factors must be finite, got NaN or infinite values; raise the damping")


def probe_tokens(config: Any, seed: int) -> Int[Tensor, "length"]:
    """Random tokens for comparing logits; any text would do."""
    length = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", _PROBE_TOKENS))
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def layer_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A layer's own source of randomness, so that neither order nor interruption changes a bit."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shard_name(number: int, blocks: int) -> str:
    """File of one block, counted from 1; 0 holds what lies outside the blocks."""
    return f"lorq-{number:05d}-of-{blocks:05d}.safetensors"


# -- after the work -----------------------------------------------------------------------------------------


def verify(
    run: Run, writer: CheckpointWriter, probe: Int[Tensor, "length"], expected: Float[Tensor, "length vocabulary"]
) -> None:
    """Read the written shards back into packed layers, block by block, and compare the probe's logits.

    Raises:
        ArithmeticError: if they differ, or are not finite.
    """
    formats = {n: LayerFormat(**f) for r in writer.completed.values() for n, f in r["formats"].items()}
    empty = skeleton(read_config(run.folder))
    swap_layers(empty, formats)
    headers = {name: read_header(writer.folder / name) for name in writer.completed}
    files = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    model = StreamedModel(empty, SourceCheckpoint(writer.folder, headers, files), device=run.model.device)
    hidden = torch.empty(1, len(probe), run.model.model.config.get_text_config().hidden_size)
    calls = model.embed(probe[None], hidden)
    for index in range(len(model.blocks)):
        with model.resident_block(index):
            hidden[0] = model.run(index, hidden[0], calls).cpu()
        run.progress("verify", index + 1, len(model.blocks))
    logits = model.logits(probe, hidden[0]).cpu()
    expected = expected.cpu()
    if not bool(torch.isfinite(logits).all()):
        raise ArithmeticError(f"{writer.folder} read back gives logits that are not finite; keep it for a bug report")
    sqnr = 10 * torch.log10(expected.square().sum() / (expected - logits).square().sum().clamp(min=1e-30))
    if float(sqnr) < _PROBE_SQNR_DB:
        raise ArithmeticError(
            f"{writer.folder} read back must give the solved model's logits to {_PROBE_SQNR_DB:.0f} dB, got "
            f"{float(sqnr):.1f} dB; the disk or memory is faulty, or this is a bug: run again with --overwrite"
        )


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
    config = read_config(run.folder).to_dict() | {
        "transformers_weights": SENTINEL,
        "quantization_config": {
            "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": lorq.__version__,
            "method": run.name, "settings": asdict(run.method), "layers": formats,  # type: ignore[call-overload]
        },
    }  # fmt: skip
    # Where the model was read from is nobody's business and would differ from machine to machine.
    config.pop("_name_or_path", None)
    writer.finish(config=config, files=files)
    return report
