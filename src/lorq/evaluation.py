"""How good a model is."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorq.adapt.folder import read_adapter_config
from lorq.models.locate import resolve_model
from lorq.progress import Progress
from lorq.storage.names import REPORT_NAME
from lorq.storage.report import read_report

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        perplexity: exp of the mean token NLL.
        kl_mean: mean divergence from the reference, in nats per token; None without a reference.
        kl_p99: 99th percentile of the tokens' divergences, linearly interpolated; None without a reference.
        top1: share of predictions where both rank the same token first; None without a reference.
        bits_per_weight: stored bits of the quantized layers over the number of their weights.
        tokens: predicted tokens, ``windows * (window - 1)``.
        text: name of the text.
        window: tokens of a window; the stride is the same.
        windows: how many.
    """

    perplexity: float
    kl_mean: float | None
    kl_p99: float | None
    top1: float | None
    bits_per_weight: float
    tokens: int
    text: str
    window: int
    windows: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    text: str = "python-docs",
    window: int = 2048,
    windows: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    products: str = "exact",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, and how far it is from a reference.

    Args:
        model: a lorq folder, or anything that quantize takes.
        reference: the original; adds KL divergence (mean, 99th percentile) and top-1 agreement.
        adapter: a folder that `lorq adapt` wrote, to be used on the model.
        text: python-docs (or its halves, python-docs-even and python-docs-odd), wikitext2, c4, or a text or JSONL file.
        window: tokens of a window; windows do not overlap, the stride is the window.
        windows: how many, evenly spread over the text; 0 for all that fit.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        dtype: of the activations: float32, bfloat16 or float16; auto is float32 on a CPU.
        products: how inputs of the model (not of the reference) meet integer codes on a CPU: exact, or bytes, which
            rounds them to 8 bits on the fly. With the model as its own reference the divergence is that of bytes alone.
        progress: called as ``progress("evaluate", done, total)``.

    Raises:
        FileNotFoundError, ValueError: as `lorq.load` and `lorq.models.texts.load_text` do, if text or model are too
            short for the window, and for another word for products.
        FloatingPointError: if a logit is not finite.
    """
    # Here, so that the command line has its flags before torch is there.
    from transformers import AutoConfig, AutoTokenizer

    from lorq.adapt.adapters import load_adapter
    from lorq.kernels.cpu import check_products
    from lorq.models.texts import load_text, text_name, token_windows
    from lorq.quality import bits_per_weight, evaluate_model
    from lorq.runtime.hf import load

    check_products(products)
    folder = resolve_model(model)
    if adapter is not None:
        read_adapter_config(Path(adapter))  # before the model is read
    original_folder = None if reference is None else resolve_model(reference)
    limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ValueError(f"window must be at most the model's {limit} positions, got {window}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = token_windows(
        load_text(text, split="evaluation"), tokenizer, windows=windows or None, length=window, what=text
    )
    if (folder / REPORT_NAME).is_file() and read_report(folder).run.get("calibration") == text_name(text):
        _log.warning("%s was calibrated on %s; if it is this text, these figures flatter it", model, text_name(text))
    measured = load(folder, device=device, dtype=dtype)
    if adapter is not None:
        load_adapter(measured, adapter)
    quality = evaluate_model(
        measured,
        tokens,
        reference=None if original_folder is None else load(original_folder, device=device, dtype=dtype),
        products=products,
        progress=None if progress is None else lambda done, total: progress("evaluate", done, total),
    )
    count = len(tokens)
    return Evaluation(
        **vars(quality), bits_per_weight=bits_per_weight(measured, folder), tokens=count * (window - 1), text=text,
        window=window, windows=count,
    )  # fmt: skip
