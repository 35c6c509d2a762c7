"""compensate(): the only place that calls the stages in order."""

import json
import os
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from lorq.core.checks import check_arguments
from lorq.foreign.choose import Compensated, pair_bits
from lorq.foreign.couple import Couple
from lorq.foreign.fit import fit, observing_plan
from lorq.foreign.gguf_file import GgufFile
from lorq.foreign.gguf_form import check_gguf, write_gguf
from lorq.foreign.lorq_form import check_lorq, write_lorq
from lorq.foreign.peft_form import write_peft
from lorq.foreign.settings import Form, Settings, check_new
from lorq.models.locate import full_path, refuse_adapter, resolve_model
from lorq.models.texts import SELF, check_text
from lorq.models.windows import Windows
from lorq.pipeline.options import Options
from lorq.pipeline.quantize import calibration_windows
from lorq.progress import OPEN, Progress, no_progress
from lorq.runtime.device import own_defaults, read_device
from lorq.storage.atomic import require_space, sync_folder, writing
from lorq.storage.journal import differences, read_journal
from lorq.storage.json_files import json_bytes
from lorq.storage.lock import owned
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.report import LayerReport, Report, read_report
from lorq.storage.writer import CheckpointWriter
from lorq.version import __version__

# Settings that say how a run is done; and with those that come after the candidates.
_HOW = ("device", "spill_bytes", "dry_run", "resume")
_NO_MATTER = (*_HOW, "budget", "factor_type")


@own_defaults()
def compensate(
    original: str | Path, quantized: str | Path, out: str | Path, *, form: Form = "peft",
    progress: Progress | None = None, **settings: Any,
) -> Report:  # fmt: skip
    """Fit low-rank factors to what ``quantized`` misses of ``original``, and write them into the folder ``out``.

    One block is in memory at a time. What is finished lies beside ``out``, in a folder that ends in ``.unfinished``,
    and ``resume`` goes on from there; ``out`` appears when it is whole.

    Args:
        original: the model that was quantized: a Hugging Face folder, a hub id, or a GGUF file.
        quantized: what somebody made of it, with GPTQ, AWQ, compressed-tensors, bitsandbytes or lorq; or a GGUF file;
            or a folder of weights that were rounded and stored dense.
        out: the new folder.
        form: "peft" (an adapter), "gguf" (a LoRA file for llama.cpp), or "lorq" (a lorq folder: the same codes, where
            they are integers with groups, with the factors).
        progress: called as ``progress(stage, done, total)``.
        **settings: fields of `lorq.foreign.settings.Settings`.

    Returns:
        The report, which the folder holds too. After a dry run it has the largest sizes that can come out.

    Raises:
        ValueError: for settings or models that do not fit, and an original that is not the quantized model's.
        FileNotFoundError, FileExistsError, OSError: for missing models, used folders, full disks.
    """
    started = time.monotonic()
    (form,) = check_arguments(compensate, form=form)
    chosen, progress = read_settings(settings), progress or no_progress
    if chosen.factor_type != "float16" and form != "lorq":
        raise ValueError(f"factor_type {chosen.factor_type!r} is for --form lorq, {form} has float16")
    if chosen.calibration != SELF:
        check_text(chosen.calibration, "calibration")
    out, file = full_path(out), full_path(quantized)
    if form == "gguf":
        check_gguf(file)
    work = check_new(out, resume=chosen.resume)
    progress(OPEN, 0, 1)
    folders = [resolve_model(original), resolve_model(quantized)]
    for folder in folders:
        refuse_adapter(folder)
    gguf = GgufFile.open(file) if file.is_file() else None
    couple = Couple.open(
        *folders, exclude=chosen.exclude, experts=form == "lorq", device=read_device(chosen.device), gguf=gguf
    )
    couple.check_embeddings()
    if form == "lorq":
        check_lorq(couple)
    progress(OPEN, 1, 1)
    if chosen.dry_run:
        return replace(_largest(couple, chosen), seconds=time.monotonic() - started)
    require_space(out, _needed_bytes(couple, form, chosen))
    with owned(work):
        plan = observing_plan(couple, chosen)
        windows = calibration_windows(plan.options, couple.original, progress)()
        run = _run_info(couple, chosen, windows)
        identity = run | {"threads": torch.get_num_threads(), "torch": torch.__version__, "experts": form == "lorq"}
        if chosen.resume and (work / JOURNAL).is_file():
            _check_begun(work, identity)
        writer = CheckpointWriter.create(work, identity, resume=chosen.resume, overwrite=not chosen.resume)
        fit(couple, plan, windows.tokens, chosen, writer, progress)
        for files in (couple.original.checkpoint, couple.quantized.checkpoint):
            files.check_unchanged("continue with --resume")
        done = Compensated.choose(couple, work, writer.completed, chosen)
        told = _without(_HOW, chosen) | {"calibration": windows.source}  # whose folder is nobody's business
        layers, run = tuple(map(done.report, done.layers)), run | {"form": form} | _made_by(folders[1])
        report = Report("compensate", told, layers, 0, dict(couple.kept), run, {})
        report = _write(done, form, str(quantized), report, work, out)
    return replace(report, seconds=time.monotonic() - started)


def _made_by(quantized: Path) -> dict[str, Any]:
    """How lorq made the quantized model, as far as a command tells it; nothing where another program did."""
    if not (quantized / REPORT_NAME).is_file():
        return {}
    told = read_report(quantized)
    kept = (*(field.name for field in fields(Options)), "tuning", "form", "quantized_by")
    own = {key: value for key, value in told.run.items() if key in kept}
    return {"quantized_by": {"method": told.method, "settings": told.settings, "run": own}}


def _write(done: Compensated, form: Form, base: str, report: Report, work: Path, out: Path) -> Report:
    """Write the result beside the candidates, and let it appear as ``out``, whole; the report with its size."""
    result = work / "result"
    with writing(out, report.bytes):
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        if form == "lorq":
            report = write_lorq(done, result, report)
        else:
            gguf = done.couple.gguf
            size = write_peft(done, result, base) if gguf is None or form == "peft" else write_gguf(done, result, gguf)
            report = replace(report, bytes=size)
            (result / REPORT_NAME).write_bytes(report.to_bytes())
        sync_folder(result)
        if out.exists():
            out.rmdir()  # it is empty
        os.replace(result, out)
        sync_folder(out.parent)
    shutil.rmtree(work)
    return report


def read_settings(settings: dict[str, Any]) -> Settings:
    """Settings by their names.

    Raises:
        TypeError: for unknown ones.
        ValueError: for values that they do not take.
    """
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(set(settings) - set(known)):
        raise TypeError(f"unknown settings: {', '.join(unknown)}; known are {', '.join(known)}")
    exclude, text = settings.get("exclude", ()), settings.get("calibration", SELF)
    given = {"exclude": (exclude,) if isinstance(exclude, str) else tuple(exclude)}
    return Settings(**settings | given | {"calibration": str(text)})


def _check_begun(work: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with what was begun with other settings or models."""
    if different := differences(read_journal(work / JOURNAL).identity, json.loads(json_bytes(identity))):
        raise ValueError(
            f"{work} was begun differently: {'; '.join(different)}; resume with the same settings, or delete it"
        )


def _without(names: tuple[str, ...], chosen: Settings) -> dict[str, Any]:
    return {key: value for key, value in asdict(chosen).items() if key not in names}


def _run_info(couple: Couple, chosen: Settings, windows: Windows) -> dict[str, Any]:
    """Everything that decides the candidates' bytes."""
    return {
        **_without(_NO_MATTER, chosen),
        "lorq_version": __version__,
        "model": couple.original.checkpoint.fingerprint(),
        "quantized": couple.files.fingerprint(),
        "calibration": windows.source,
        "calibration_tokens": windows.sha256,
        "start_token": windows.start_token,
        "device_type": couple.original.device.type,
    }


def _largest(couple: Couple, chosen: Settings) -> Report:
    """What can come out at most: the ranks asked for, or the same for all layers as far as the budget goes."""
    targets = [target for own in couple.targets.values() for target in own]
    shapes = [(target.out_features, target.in_features) for target in targets]
    stored = [couple.stored_bits(target) for target in targets]
    costs = [pair_bits(shape, chosen.factor_type) for shape in shapes]
    if chosen.rank:
        ranks = [min(chosen.rank, *shape) for shape in shapes]
        bits = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    else:
        allowed = chosen.allowed(sum(out * in_ for out, in_ in shapes), sum(stored))
        caps = [min(chosen.max_rank, *shape) for shape in shapes]
        bits = min(int(allowed), sum(cap * cost for cap, cost in zip(caps, costs, strict=True)))
        ranks = [min(bits // sum(costs), cap) for cap in caps]
    layers = tuple(
        LayerReport(
            target.name, shape, own // (shape[0] * shape[1]), rank, "largest", 0.0, 0.0, (own + rank * cost) // 8
        )
        for target, shape, own, rank, cost in zip(targets, shapes, stored, ranks, costs, strict=True)
    )
    return Report("compensate", _without(_HOW, chosen), layers, bits // 8, dict(couple.kept), {}, {})


def _needed_bytes(couple: Couple, form: Form, chosen: Settings) -> int:
    """On the disk, for candidates and result."""
    most = chosen.rank or chosen.max_rank
    targets = [target for own in couple.targets.values() for target in own]
    candidates = sum(2 * min(most, t.out_features, t.in_features) * (t.out_features + t.in_features) for t in targets)
    own = sum(header.file_bytes for header in couple.files.headers.values()) if form == "lorq" else 0
    return 2 * candidates + own + (1 << 20)
