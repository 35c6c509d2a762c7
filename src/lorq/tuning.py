"""Fit what is continuous in a quantized model to the original's predictions."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lorq.adapt.settings import Tuning
from lorq.core.checks import check_arguments
from lorq.models.locate import full_path, resolve_model
from lorq.models.texts import SELF, check_text
from lorq.progress import IMPORT, Progress, no_progress
from lorq.storage.journal import differences
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.out_folder import check_out, refuse_link, refuse_source
from lorq.storage.report import Report, read_report

Products = Literal["auto", "float32", "bfloat16"]
_OF_THE_TEXT = ("calibration", "samples", "seq_len", "start_token")


def tune(
    model: str | Path,
    out: str | Path,
    *,
    reference: str | Path,
    text: str | Path = SELF,
    settings: Tuning = Tuning(),  # noqa: B008  # frozen
    device: str = "auto",
    dtype: Products = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Tune MODEL against its original, into the folder OUT: all codes stay, and so does the size.

    What is continuous (scales, low-rank factors, entries of codebooks, norms) is fitted to the original's predictions
    by gradient steps through the whole model; model, original and gradients must fit in memory. Numbers are trained
    as they will be stored. What measures best on text that is held out is kept.

    Args:
        model: a lorq folder.
        out: the new folder.
        reference: the original, of which the folder was made.
        text: to tune on: self (the original writes it, kept for the next run), python-docs (or its halves,
            python-docs-even and python-docs-odd), wikitext2, c4, or a text or JSONL file.
        settings: how.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        dtype: of products while it is tuned: float32 or bfloat16; auto is bfloat16 where the machine multiplies that
            faster.
        resume: continue an interrupted run in the same folder.
        overwrite: replace a folder that lorq wrote.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The report, with both measurements under ``run["tuning"]``.

    Raises:
        ValueError: if the reference is not the original, the text is too short, a setting is out of range, or memory
            does not suffice.
        FileNotFoundError, FileExistsError, OSError: for missing models, used folders, full disks.
        ArithmeticError: if the loss is not finite.
    """
    (dtype,) = check_arguments(tune, dtype=dtype)
    if text != SELF:
        text = check_text(text)
    progress, source, out = progress or no_progress, full_path(model), full_path(out)
    read_report(source)  # refuses other folders before torch is there
    if os.path.realpath(out) == os.path.realpath(source):
        raise FileExistsError(f"the output folder must not be the model's own, got {out} for both")
    check_out(out, overwrite=overwrite, resume=resume)
    original = resolve_model(reference)
    progress(IMPORT, 0, 1)
    from lorq.adapt.tuning import Run
    from lorq.runtime.device import own_defaults, read_device
    from lorq.storage.folder import LorqFolder
    from lorq.storage.lock import owned

    progress(IMPORT, 1, 1)
    with own_defaults():
        folder, place = LorqFolder.open(source), read_device(device)
        run = Run.prepare(folder, original, str(text), settings, device=place, dtype=dtype, progress=progress)
        with owned(out):
            return run.into(out, resume=resume, overwrite=overwrite)


def quantize_and_tune(
    model: str | Path, out: str | Path, method: Any, steps: int, *, progress: Progress | None = None, **options: Any
) -> Report:
    """`lorq.quantize`, and `tune` for so many steps on the windows of its calibration, of which a few are held out.

    The folder that is tuned is beside ``out``, with ``.untuned`` at the end of its name, and is removed in the end.

    Args:
        model, out, method, progress, options: as of `lorq.quantize`.
        steps: through the whole model, at least 1.

    Raises:
        ValueError: for fewer steps.
    """
    if steps < 1:
        raise ValueError(f"tune must be at least 1 step, got {steps}; leave it out for none")
    from lorq.adapt.tuning import read_windows
    from lorq.methods import Method
    from lorq.pipeline.options import Options, read_method, read_options
    from lorq.pipeline.quantize import quantize
    from lorq.storage.writer import finish_removal, remove_made

    chosen: Options = read_options(dict(options))
    solver: Method = read_method(method)
    if chosen.samples < 2:
        raise ValueError(f"tune holds windows out, samples must be at least 2, got {chosen.samples}")
    held_out = max(1, min(Tuning.held_out, chosen.samples // 4))
    settings = Tuning(
        steps=steps, samples=chosen.samples - held_out, held_out=held_out, seq_len=chosen.seq_len,
        start_token=chosen.start_token, seed=chosen.seed,
    )  # fmt: skip
    out, text = full_path(out), chosen.calibration
    read_windows(resolve_model(model), text if text == SELF else check_text(text, "calibration"), settings)
    if chosen.dry_run:
        return quantize(model, out, solver, progress=progress, **options)
    plain = out.with_name(f"{out.name}.untuned")
    refuse_source(full_path(model), plain)
    refuse_link(plain)
    if chosen.resume:
        finish_removal(plain)
    if chosen.resume and _is_tuned(out) and plain.exists() and is_made(plain, solver, vars(chosen)):
        remove_made(plain)  # the run was stopped when all else was done
        return read_report(out)
    check_out(out, overwrite=chosen.overwrite, resume=chosen.resume)
    begun = chosen.resume and plain.exists()
    if not (begun and is_made(plain, solver, vars(chosen))):
        options |= {"resume": begun, "overwrite": chosen.overwrite and plain.exists()}
        quantize(model, plain, solver, progress=progress, **options)
    report = tune(
        plain, out, reference=model, text=text, settings=settings, device=chosen.device,
        resume=chosen.resume and out.exists(), overwrite=chosen.overwrite, progress=progress,
    )  # fmt: skip
    remove_made(plain)
    return report


def _is_tuned(folder: Path) -> bool:
    """Whether a folder is finished, and by `tune`."""
    finished = (folder / REPORT_NAME).is_file() and not (folder / JOURNAL).exists()
    return finished and "tuning" in read_report(folder).run


def is_made(folder: Path, method: Any, options: dict[str, Any]) -> bool:
    """Whether a folder is finished; original and text are compared when it is tuned.

    Raises:
        ValueError: if it was made in another way.
    """
    if (folder / JOURNAL).exists() or not (folder / REPORT_NAME).is_file():
        return False
    report = read_report(folder)
    then = report.run | report.settings
    # What a report says of the text is what was read; "auto" is there what it came to.
    now = json.loads(json.dumps(options | asdict(method)))
    same = [key for key in now if key in then and key not in _OF_THE_TEXT and now[key] != "auto"]
    if different := differences({key: then[key] for key in same}, {key: now[key] for key in same}):
        raise ValueError(
            f"{folder} was made differently: {'; '.join(different)}; resume with the same settings, or begin again "
            "with --overwrite"
        )
    return True
