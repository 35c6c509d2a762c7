"""How good a model is."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from lorq.adapt.folder import read_adapter_config
from lorq.core.checks import Dtype, Products, Range, check_arguments
from lorq.harness import open_tasks, read_tasks, run_tasks
from lorq.models.locate import full_path, resolve_model
from lorq.models.texts import TEXTS, StartToken, check_text, load_text, text_name
from lorq.models.tokenizer import check_tokenizer
from lorq.progress import EVALUATE, IMPORT, READ, Progress, no_progress
from lorq.storage.measured import add_evaluation
from lorq.storage.names import REPORT_NAME
from lorq.storage.report import read_report

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        perplexity: exp of the mean token NLL.
        reference_perplexity: of the reference, on the same windows; None without one.
        kl_mean: mean divergence from the reference, in nats per token; None without a reference.
        kl_p99: 99th percentile of the tokens' divergences, linearly interpolated; None without a reference.
        top1: share of predictions where both rank the same token first; None without a reference.
        bits_per_weight: stored bits of the quantized layers over the number of their weights.
        tokens: predicted tokens, ``windows * (window - 1)`` where a window begins with at most one start token.
        text: name of the text.
        window: tokens of a window, the start token included; windows do not overlap.
        windows: how many.
        start_token: whether each window begins with one.
        perplexity_stderr: standard error of the perplexity, as another text of this kind would change it: the
            perplexity times that of the mean NLL, `lorq.quality.mean_stderr`; None where there is one window.
        kl_stderr: of ``kl_mean``, windows counted as clusters.
        ratio_stderr: of ``perplexity / reference_perplexity``: the ratio times that of the mean of each token's
            difference in NLL. Both read the same windows, so this is what tells them apart, not ``perplexity_stderr``.
        tasks: what lm-eval found, metrics by their names, by task; {} where none were asked for.
    """

    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1: float | None
    bits_per_weight: float
    tokens: int
    text: str
    window: int
    windows: int
    start_token: bool
    perplexity_stderr: float | None = None
    kl_stderr: float | None = None
    ratio_stderr: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; without tasks where there are none."""
        return {key: value for key, value in asdict(self).items() if key != "tasks" or value}


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    text: str | Path = "python-docs",
    window: Annotated[int, Range(2)] = 2048,
    windows: Annotated[int, Range(0)] = 16,
    start_token: StartToken = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    products: Products = "exact",
    tasks: str = "",
    task_path: str | Path | None = None,
    task_limit: Annotated[int, Range(0)] = 0,
    record: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, how far it is from a reference, and what it scores at tasks.

    Args:
        model: a lorq folder, or anything that quantize takes.
        reference: the original; adds its own perplexity, KL divergence (mean, 99th percentile) and top-1 agreement.
        adapter: a folder that `lorq adapt` wrote, to be used on the model.
        text: python-docs (or its halves, python-docs-even and python-docs-odd), wikitext2, c4, or a text or JSONL file.
        window: tokens of a window, a start token included; windows do not overlap.
        windows: how many, evenly spread over the text; 0 for all that fit.
        start_token: begin each window with a start token: auto (as the model's tokenizer does), always or never.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        dtype: of the activations: float32, bfloat16 or float16; auto is float32 on a CPU.
        products: how inputs of the model (not of the reference) meet integer codes on a CPU: exact, or bytes, which
            rounds them to 8 bits on the fly. With the model as its own reference the divergence is that of bytes alone.
        tasks: of lm-eval (pip install 'lorq[tasks]'), commas between, such as hellaswag,arc_easy; their data comes from
            the hub. Like ``lm_eval --model hf``, which takes the folder too.
        task_path: a folder with task files (.yaml) of your own, which may name local data.
        task_limit: examples of each task; 0 for all.
        record: keep the figures in a lorq folder, beside its report: `lorq inspect` and `lorq report` show them.
        progress: called as ``progress(stage, done, total)``; the stages are named in `lorq.progress`.

    Raises:
        ImportError, OSError: if tasks are asked for and lm-eval or their data is not there.
        ValueError: for tasks that lm-eval does not know, or that are broken.
        FileNotFoundError, ValueError: as `lorq.load` and `lorq.models.texts.load_text` do, if text or model are too
            short for the window, and for another word for products.
        FloatingPointError: if a logit is not finite.
    """
    dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    window, windows, start_token, device, dtype, products, task_limit = check_arguments(
        evaluate, window=window, windows=windows, start_token=start_token, device=device, dtype=dtype,
        products=products, task_limit=task_limit,
    )  # fmt: skip
    names, place = read_tasks(tasks, task_path)
    text, progress = check_text(text), progress or no_progress
    folder = resolve_model(model)
    check_tokenizer(folder)
    if adapter is not None:
        read_adapter_config(adapter)
    original = None if reference is None else resolve_model(reference)
    progress(IMPORT, 0, 1)  # here, so that flags and refusals come before
    from lorq.models.windows import Encoder, token_windows
    from lorq.quality import bits_per_weight, evaluate_model
    from lorq.runtime.device import own_defaults

    opened = open_tasks(names, place) if names else None
    progress(IMPORT, 1, 1)
    with own_defaults():
        encoder = Encoder.open(folder, _config_of(folder, original), start_token)
        content = load_text(text, split="evaluation")
        tokens = token_windows(content, encoder, windows=windows or None, length=window, what=text)
        if (folder / REPORT_NAME).is_file() and read_report(folder).run.get("calibration") == text_name(text):
            _log.warning("%s was calibrated on %s", model, _flattering(text))
        models = _loaded([folder] if original is None else [folder, original], adapter, device, dtype, progress)
        progress(EVALUATE, 0, len(tokens))
        seen, other = max(1, len(encoder.start)), None if original is None else models[1]
        quality = evaluate_model(
            models[0], tokens, reference=other, seen=seen, products=products,
            progress=lambda done, total: progress(EVALUATE, done, total),
        )  # fmt: skip
        scores = run_tasks(models[0], encoder.tokenizer, opened, limit=task_limit) if opened else {}
        found = Evaluation(
            **vars(quality), bits_per_weight=bits_per_weight(models[0], folder), tokens=len(tokens) * (window - seen),
            text=text, window=window, windows=len(tokens), start_token=bool(encoder.start), tasks=scores,
        )  # fmt: skip
    if record:
        places = {name: place and Path(place).name for name, place in (("reference", reference), ("adapter", adapter))}
        how = {"text": text_name(text), "dtype": dtype, "products": products}
        _keep(full_path(model), found.as_dict() | places | how)
    return found


def _loaded(places: list[Path], adapter: str | Path | None, device: str, dtype: str, progress: Progress) -> list[Any]:
    """The models of these folders, the first with the adapter."""
    from lorq.adapt.adapters import load_adapter
    from lorq.runtime.hf import load

    models: list[Any] = []
    progress(READ, 0, len(places))
    for place in places:
        models.append(load(place, device=device, dtype=dtype))  # type: ignore[arg-type]
        progress(READ, len(models), len(places))
    if adapter is not None:
        load_adapter(models[0], adapter)
    return models


def _config_of(folder: Path, original: Path | None) -> Any:
    """The model's config; a ValueError if the original has another vocabulary."""
    from lorq.models.skeleton import read_own_config

    configs = [read_own_config(place) for place in (folder, original or folder)]
    size, reference = (config.get_text_config().vocab_size for config in configs)
    if size != reference:
        raise ValueError(
            f"model and reference must share a vocabulary, got {size} and {reference} tokens; is this the original "
            "model?"
        )
    return configs[0]


def _keep(folder: Path, entry: dict[str, Any]) -> None:
    """Write down what was found, and how, in the lorq folder that was named by its path."""
    if not (folder / REPORT_NAME).is_file():
        return
    try:
        add_evaluation(folder, entry)
    except (OSError, ValueError) as error:  # the figures are there, and matter more
        _log.warning("these figures are not kept in the folder: %s", error)


def _flattering(text: str) -> str:
    """What calibration on a text of this name means for the figures."""
    if text not in TEXTS:  # a file, of which the report has the name alone
        return f"{text_name(text)}; if it is this text, these figures flatter it"
    if text.startswith("python-docs"):  # the same for both uses
        return f"{text}, the text it is measured on: these figures flatter it"
    return f"another part of {text} than the one it is measured on: these figures flatter it a little"
