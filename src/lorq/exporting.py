"""A lorq folder as what other programs read."""

import os
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any

from lorq.core.checks import Dtype, check_arguments, check_name
from lorq.exports import TARGETS
from lorq.exports.request import Exported, ExportRequest, GgufOptions
from lorq.models.locate import full_path, resolve_model
from lorq.progress import IMPORT, Progress, no_progress
from lorq.storage.appear import appearing, clear_up, refuse_used
from lorq.storage.measured import read_measured
from lorq.storage.names import REPORT_NAME
from lorq.storage.out_folder import refuse_link, refuse_source
from lorq.storage.report import Report, read_report
from lorq.storage.seal import is_sealed
from lorq.tuning import is_made, quantize_and_tune
from lorq.version import __version__


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    dtype: Dtype = "auto",
    adapter: str | Path | None = None,
    gguf: GgufOptions = GgufOptions(),  # noqa: B008  # frozen
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write MODEL, a lorq folder, as what another program reads.

    OUT appears when it is whole. What the target cannot hold is refused, with the reason and the targets that can, and
    what is lost on the way is measured and printed.

    Args:
        model: a lorq folder.
        out: the new folder, or file.
        to: compressed-tensors (integer codes of 2 to 8 bits for vLLM and transformers), gptq (2, 3, 4 and 8 bits for
            readers of that format), peft (a lorq folder without its low-rank part, which becomes an adapter), gguf (a
            file for llama.cpp; need not be said where OUT ends in .gguf), or dense (an ordinary Hugging Face folder, as
            large as the original).
        dtype: of what is not quantized: bfloat16, float16 or float32; auto is the original's.
        adapter: where the low-rank part goes as an adapter beside OUT, for targets that take it so.
        gguf: types and what else a GGUF file leaves open.
        overwrite: replace what an earlier export has written there.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        What was written, what was lost, and how to go on.

    Raises:
        ValueError: for an unknown target, or one that cannot hold the model.
        FileNotFoundError, FileExistsError, OSError: for missing models, used names, full disks.
    """
    (dtype,) = check_arguments(export, dtype=dtype)
    progress, out, place = progress or no_progress, full_path(out), None if adapter is None else full_path(adapter)
    name = to or _by_name(out)
    check_name("to", name, TARGETS)
    if name != "gguf" and gguf != GgufOptions():
        raise ValueError(f"type, embeddings, fallback, fold and tokenizer_pre are for --to gguf, got them for {name}")
    outputs = [out] if place is None else [out, place]
    seen = [refuse_used(output, overwrite=overwrite) for output in outputs]
    source = full_path(model)
    if source.exists():
        read_report(source)  # refuses other folders before torch is there
    places = [Path(os.path.realpath(path)) for path in (source, *outputs)]
    if any(one.is_relative_to(other) for one, other in permutations(places, 2)):
        given = ", ".join(map(str, places))
        raise FileExistsError(f"model, out and adapter must be places of their own, none in another, got {given}")
    progress(IMPORT, 0, 1)
    from lorq.runtime.device import own_defaults
    from lorq.storage.folder import LorqFolder

    progress(IMPORT, 1, 1)
    mark: dict[str, Any] = {"target": name, "lorq_version": __version__}
    with own_defaults(), ExitStack() as stack:
        folder = LorqFolder.open(resolve_model(model))
        told = list(read_measured(folder.path).evaluations)  # refuses a damaged file before the work
        made = [
            stack.enter_context(appearing(output, mark, there)) for output, there in zip(outputs, seen, strict=True)
        ]
        request = ExportRequest(out, dtype, place, made[1] if place else None, gguf, progress)
        done: Exported = import_module(TARGETS[name]).export(folder, made[0], request)
        folder.reader.check_unchanged()
        mark |= {"lost": dict(done.lost), "command": request.command(name), "evaluations": told}
        mark |= {"report": replace(folder.report, checksums={}).as_dict()}  # of what it was made of
    return replace(done, out=out)


def quantize_into_file(
    model: str | Path,
    out: str | Path,
    method: Any,
    steps: int | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Report, Exported | None]:
    """Quantize, and export as a file for llama.cpp.

    The folder that is quantized is beside ``out``, with ``.unfinished`` at the end of its name, and is removed in the
    end, but for files that lorq did not write; ``resume`` goes on with it.

    Args:
        model, method, progress, options: as of `lorq.quantize`.
        out: the new file.
        steps: of tuning in between, as `lorq.tuning.quantize_and_tune` does it; None for none.

    Returns:
        The report of the folder, and what was written; None after a dry run.

    Raises:
        ValueError: for a model, a tokenizer or a method whose file llama.cpp would not read, before the long work.
        FileExistsError: if a place that is written to or removed is used, the model's own, or a link.
    """
    from lorq.exports.gguf import check_file
    from lorq.pipeline.options import Options, read_method, read_options
    from lorq.pipeline.quantize import quantize
    from lorq.storage.writer import finish_removal, remove_made

    chosen: Options = read_options(dict(options))
    solver, out = read_method(method), full_path(out)
    plain = out.with_name(f"{out.name}.unfinished")
    refuse_source(full_path(model), out, plain)
    refuse_link(plain)
    goes_on = chosen.resume and not chosen.dry_run
    if goes_on:
        finish_removal(plain)
        clear_up(out)
    if goes_on and (done := _exported_before(plain, out)) and is_made(plain, solver, vars(chosen)):
        report = read_report(plain)
        remove_made(plain)
        return report, done
    refuse_used(out, overwrite=chosen.overwrite)
    check_file(resolve_model(model), solver)
    begun = chosen.resume and plain.exists()
    if chosen.dry_run:
        return quantize(model, plain, solver, progress=progress, **options), None
    if begun and is_made(plain, solver, vars(chosen)):
        report = read_report(plain)
    else:
        options |= {"resume": begun, "overwrite": chosen.overwrite and plain.exists()}
        if steps is None:
            report = quantize(model, plain, solver, progress=progress, **options)
        else:
            report = quantize_and_tune(model, plain, solver, steps, progress=progress, **options)
    try:
        exported = export(plain, out, overwrite=chosen.overwrite, progress=progress)
    except OSError as error:
        error.add_note(f"what is quantized is kept in {plain}: the same command with --resume goes on")
        raise
    remove_made(plain)
    return report, exported


def _exported_before(plain: Path, out: Path) -> Exported | None:
    """What a run wrote that was stopped when it had its file; None where that is not there, or not of the folder."""
    from lorq.exports.gguf_told import read_file

    if not ((plain / REPORT_NAME).is_file() and out.is_file() and is_sealed(out)):
        return None
    made = read_file(out)
    if made.report is None or made.report.as_dict() != replace(read_report(plain), checksums={}).as_dict():
        return None
    return Exported(out.stat().st_size, (f"tensors: {made.types()}",), made.lost, out)


def _by_name(out: Path) -> str:
    """The target that an output's name tells."""
    if out.suffix.lower() != ".gguf":
        raise ValueError(f"to must be given unless OUT ends in .gguf: one of {', '.join(TARGETS)}, for {out}")
    return "gguf"
