"""`lorq compensate`."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

import lorq
from lorq.bars import console, progress_bars
from lorq.foreign.settings import Form, Settings, check_new
from lorq.models.locate import full_path
from lorq.models.texts import SELF, check_text
from lorq.progress import IMPORT
from lorq.storage.report import Report, ranks_in_words


def compensate(
    original: str,
    quantized: str,
    out: Path,
    *,
    form: Form = "peft",
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),  # noqa: B008  # frozen
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Fit low-rank factors to what QUANTIZED, which any program may have quantized, misses of ORIGINAL.

    Args:
        original: the model that was quantized: a Hugging Face folder, a hub id, or a GGUF file.
        quantized: what came out: a folder or hub id of GPTQ, AWQ, compressed-tensors, bitsandbytes or lorq, or a GGUF
            file.
        out: the new folder.
        form: peft (an adapter for transformers, vLLM ...), gguf (a LoRA file for llama.cpp), or lorq (a lorq folder:
            the same codes, where they are integers with groups, with the factors).
        json_: print the report as one JSON object.
    """
    check_new(full_path(out), resume=settings.resume)
    if settings.calibration != SELF:
        check_text(settings.calibration, "calibration")
    with progress_bars() as progress:
        progress(IMPORT, 0, 1)
        run: Any = lorq.compensate
        progress(IMPORT, 1, 1)
        report = run(original, quantized, out, form=form, progress=progress, **vars(settings))
    if json_:
        print(json.dumps(report.as_dict()))
        return
    print_compensation(report, form, None if settings.dry_run else full_path(out))


def print_compensation(report: Report, form: str, out: Path | None) -> None:
    """What came out; without ``out`` what can at most."""
    ranks = [layer.rank for layer in report.layers]
    table = Table(show_header=False)
    table.add_row("form", form)
    table.add_row("layers", f"{sum(map(bool, ranks))} with factors, of {len(ranks)}")
    table.add_row("rank", ranks_in_words(ranks, mean=True))
    table.add_row("bits per weight", f"{report.bits_per_weight:.3f}, factors included")
    table.add_row("weights on disk", f"{report.bytes / 1e6:.1f} MB" + ("" if out else " at most"))
    if out:
        table.add_row("mean output error", report.errors_in_words)
        table.add_row("folder", str(out))
    if report.seconds:
        table.add_row("seconds", f"{report.seconds:.1f}")
    console.print(table)
