"""How a quantized model is compensated."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lorq.core.checks import Range, check_settings
from lorq.models.texts import StartToken
from lorq.storage.journal import read_journal
from lorq.storage.lock import refuse_busy
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.report import read_report

Form = Literal["peft", "gguf", "lorq"]
_BUDGET = "5%"


@dataclass(frozen=True)
class Settings:
    """How a quantized model is compensated.

    Attributes:
        rank: of the factors of every layer; 0 gives each layer its own, under ``budget``.
        budget: what all factors together may take: bits per weight, such as "0.2", or a share of what the quantized
            layers take, such as "5%"; left out, that. Layers in which a bit gains most get the higher ranks.
        max_rank: the most that a layer gets under a budget; servers have limits (vLLM's is 512).
        factor_type: "float16", or "int8" in a lorq folder.
        calibration: text that the inputs are measured on: "self" (the original writes it, kept for the next run),
            "python-docs" (or its halves, "python-docs-even" and "python-docs-odd"), "wikitext2", "c4", or a text or
            JSONL file.
        samples: calibration windows.
        seq_len: tokens of a window.
        start_token: begin each window of a text with a start token: "auto" (as the model's tokenizer does), "always" or
            "never".
        token_weights: "gradient" counts each calibration token by how much each layer's output at it decides what the
            model says, which also tells where a bit gains most; "equal" counts each the same, "plain" by its squared
            length.
        exclude: regular expressions; layers whose name one of them matches get no factors.
        seed: of what is drawn at random; the same seed gives the same bytes.
        device: where blocks are run and factors fitted: "auto", "cpu", "cuda", "cuda:1" and so on.
        spill_bytes: hidden states go to files mapped into memory past this.
        dry_run: check what can be checked before the work, report the sizes, write nothing.
        resume: continue an interrupted run; what it has finished lies beside OUT, in a folder that ends in .unfinished.
    """

    rank: Annotated[int, Range(0)] = 0
    budget: str = ""
    max_rank: Annotated[int, Range(1)] = 128
    factor_type: Literal["float16", "int8"] = "float16"
    calibration: str = "self"
    samples: Annotated[int, Range(1)] = 128
    seq_len: Annotated[int, Range(2)] = 2048
    start_token: StartToken = "auto"
    token_weights: Literal["equal", "plain", "gradient"] = "gradient"
    exclude: tuple[str, ...] = ()
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"
    spill_bytes: Annotated[int, Range(0)] = 2 << 30
    dry_run: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rank and self.budget:
            raise ValueError(f"give a rank or a budget, got rank {self.rank} and budget {self.budget!r}")
        if self.rank and self.max_rank != Settings.max_rank:
            raise ValueError(
                f"max_rank limits what a budget gives, got max_rank {self.max_rank} and rank {self.rank}; keep one"
            )
        self.allowed(1, 1)  # refuses a budget that says nothing
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"exclude must be a regular expression, got {pattern!r} ({error})") from None

    def allowed(self, weights: int, stored_bits: int) -> float:
        """The bits that all factors may take, beside so many weights that are stored in so many bits.

        Example:
            >>> Settings(budget="0.2").allowed(1000, 4000), Settings(budget="5%").allowed(1000, 4000)
            (200.0, 200.0)
        """
        text = self.budget or _BUDGET
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = 0.0
        if not 0 < number < 100:
            raise ValueError(f"budget must be bits per weight, such as 0.2, or a share, such as 5%, got {text!r}")
        return number / 100 * stored_bits if text.endswith("%") else number * weights


def check_new(out: Path, *, resume: bool) -> Path:
    """The folder for unfinished work beside a new folder.

    Raises:
        FileExistsError: if the new one is there, or unfinished work is and is not to be resumed.
    """
    work = out.with_name(f"{out.name}.unfinished")
    refuse_busy(work)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        if _is_made(out, work):  # the run was stopped when all else was done
            shutil.rmtree(work)
            raise FileExistsError(f"{out} is already complete, nothing to resume; choose another, or delete it first")
        raise FileExistsError(
            f"{out} must be a new folder, it is there and not empty; choose another, or delete it first"
        )
    there = (work / JOURNAL).is_file() and bool(read_journal(work / JOURNAL).shards)
    if there and not resume:
        raise FileExistsError(f"{work} has unfinished work; go on with --resume, or delete it first")
    return work


def _is_made(out: Path, work: Path) -> bool:
    """Whether what is in a folder was made of the unfinished work beside it."""
    if not ((out / REPORT_NAME).is_file() and (work / JOURNAL).is_file()):
        return False
    report, begun = read_report(out), read_journal(work / JOURNAL).identity
    return report.method == "compensate" and all(report.run.get(key, own) == own for key, own in begun.items())
