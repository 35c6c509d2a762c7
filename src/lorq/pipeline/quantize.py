"""quantize(): the only place that calls the stages in order."""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.methods import METHODS, Method
from lorq.models.blocks import StreamedModel
from lorq.models.locate import load_dense, resolve_model
from lorq.models.self_text import cached_self_windows
from lorq.models.skeleton import read_config
from lorq.models.texts import SELF, Windows, calibration_windows
from lorq.pipeline.all_blocks import Solver
from lorq.pipeline.options import read_method, read_options
from lorq.pipeline.plan import Run, check_activations, check_weights, estimate, make_report, plan_layers
from lorq.pipeline.widths import mix_widths
from lorq.progress import Progress
from lorq.runtime.device import read_device
from lorq.storage.atomic import require_space
from lorq.storage.config import FORMAT_VERSION
from lorq.storage.names import COMPANIONS, REPORT_NAME, SENTINEL
from lorq.storage.out_folder import check_out
from lorq.storage.report import LayerReport, Report
from lorq.storage.writer import CheckpointWriter, check_begun
from lorq.version import __version__


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
    check_out(out, overwrite=chosen.overwrite, resume=chosen.resume)
    device = read_device(chosen.device)
    streamed = StreamedModel.open(source, device=device)
    plan, excluded = plan_layers(streamed, solver, exclude=chosen.exclude, override=chosen.override)
    plan = mix_widths(plan, solver, chosen)
    name = next((key for key, kind in METHODS.items() if type(solver) is kind), type(solver).__name__.lower())
    run = Run(streamed, source, plan, excluded, solver, name, chosen, progress or (lambda *_: None))
    if chosen.resume:  # the text is compared when it is read
        settings = _identity(run, None)
        check_begun(out, {key: settings[key] for key in ("format_version", "lorq_version", "method", "settings")})
    check_activations(run)
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
    work = Solver(run, writer, windows)
    work.solve_blocks()
    report = _finish(run, writer, windows)
    stages = {"calibration": text_seconds + work.calibrating, "solving": work.solving}
    return replace(report, seconds=time.monotonic() - started, stages=stages)


# -- calibration text ---------------------------------------------------------------------------------------


def _windows(run: Run) -> Windows | None:
    """Calibration windows, if anything looks at inputs."""
    if not (run.needs_ranges or any(method.needs_stats for _, method in run.jobs())):
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
        "samples", "seq_len", "seed", "token_weights", "router_weights", "expert_tokens", "exclude", "override",
        "activations", "kv_cache", "smoothing", "average_bits", "wide_bits", "wide_layers",
    )  # fmt: skip
    return {
        "format_version": FORMAT_VERSION,
        "lorq_version": __version__,
        "model": run.model.checkpoint.fingerprint(),
        "method": run.name,
        "settings": asdict(run.method),  # type: ignore[call-overload]
        "calibration": None if windows is None else windows.source,
        "calibration_tokens": None if windows is None else windows.sha256,
        **{key: getattr(options, key) for key in keep},
        "stream": run.stream,
        "device_type": run.model.device.type,
    }


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
            "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": __version__,
            "method": run.name, "settings": asdict(run.method), "layers": formats,  # type: ignore[call-overload]
            "tiles": tiles,
        },
    }  # fmt: skip
    # Where the model was read from is nobody's business and would differ from machine to machine.
    config.pop("_name_or_path", None)
    writer.finish(config=config, files=files)
    return report
