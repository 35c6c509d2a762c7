"""Training: a LoRDS model's scale factors while codes stay (PEFT), or weights and scales through the rounding (QAT)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorq.adapt.adapters import adapters_of, attach, lords_layers, trainable_layers, use_adapter
from lorq.adapt.qat import cancel_qat, finish_qat, prepare_qat
from lorq.adapt.settings import Settings
from lorq.models.locate import resolve_model
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, positions_of, token_windows
from lorq.progress import TRAIN, Progress
from lorq.runtime.device import own_defaults


@dataclass(frozen=True)
class Trained:
    """What a training has done, in ``seconds`` of wall time.

    Attributes:
        losses: of each step, mean negative log likelihood of a token, in nats.
        parameters: how many numbers were trained.
    """

    losses: tuple[float, ...]
    parameters: int
    seconds: float


@own_defaults()
def train(
    model: Any,
    dataset: Any,
    mode: Literal["peft", "qat"] = "peft",
    *,
    name: str = "default",
    reference: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Trained:
    """Train a loaded model on a data set; afterwards it is quantized as before, with what was learned.

    Args:
        model: quantized with lords, as `lorq.load` or ``from_pretrained`` give it; for "qat" its layers may be codes in
            groups too, of gptq, nearest or lrq. "peft" adds an adapter to it and puts it into use (`save_adapter`
            writes it, `merge` makes it the model's own); "qat" changes codes and scales (`save` writes the model).
        dataset: a text as `lorq.quantize` takes for calibration; windows of tokens (windows, length); or any iterable
            of examples with ``input_ids`` and, if they differ, ``labels``.
        mode: "peft" trains the scale factors while the codes stay; "qat" trains weights and scales through the
            rounding.
        name: of the adapter. An adapter of this name that the model has trains on.
        reference: the original model, whose weights "qat" starts from; None starts from the dequantized ones.
        progress: called as ``progress(stage, done, steps)``.
        **settings: fields of `Settings`.

    Raises:
        ValueError: if the model's layers cannot train so, the data set is empty, or a setting is out of range.
        ArithmeticError: if a loss or its gradient is not finite; the model and its adapters are then what they were
            before. After an interrupt they are as far as training got.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(Settings)})
    if unknown:
        known = ", ".join(field.name for field in fields(Settings))
        raise TypeError(f"unknown settings: {', '.join(unknown)}; known are {known}")
    chosen = Settings(**settings)
    _check_together(mode, name, reference, chosen)
    (trainable_layers if mode == "qat" else lords_layers)(model)  # refuses other models before the data is read
    examples = read_dataset(model, dataset, chosen)
    began = time.monotonic()
    if mode == "qat":
        prepare_qat(model, reference)
        session = _ended(lambda: finish_qat(model), lambda: cancel_qat(model))
    else:
        session = _ended(lambda: use_adapter(model, name), _begin_adapter(model, name, chosen))
    with session:
        rate = chosen.learning_rate or {"peft": 5e-4, "qat": 5e-5}[mode]
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        scales = [p for n, p in learning.items() if n.endswith(("scale_left", "scale_right", "weight_scale"))]
        weights = [p for n, p in learning.items() if n.endswith(".weight")]
        groups = [{"params": scales, "lr": rate * (chosen.scale_rate if mode == "qat" else 1.0)}]
        groups += [{"params": weights, "lr": rate, "begins": chosen.scale_steps}] if weights else []
        losses = descend(model, examples, groups, chosen, progress)
    count = sum(p.numel() for p in learning.values())
    return Trained(tuple(losses), count, time.monotonic() - began)


def _check_together(mode: str, name: str, reference: Any, chosen: Settings) -> None:
    """Refuse arguments that the mode would ignore."""
    if mode not in ("peft", "qat"):
        raise ValueError(f"mode must be peft or qat, got {mode!r}")
    if reference is not None and mode == "peft":
        raise ValueError(f"a reference serves mode qat, got {str(reference)!r} with mode peft; leave it out")
    if chosen.rank != -1 and mode == "qat":
        raise ValueError(f"rank serves mode peft, got {chosen.rank} with mode qat; quantize with that rank instead")
    if chosen.scale_steps and mode == "peft":
        raise ValueError(f"scale_steps serves mode qat, got {chosen.scale_steps} with mode peft; leave it out")
    if name != "default" and mode == "qat":
        raise ValueError(f"an adapter's name serves mode peft, got {name!r} with mode qat; leave it out")


def _begin_adapter(model: Any, name: str, chosen: Settings) -> Callable[[], None]:
    """Let an adapter train, a new one or one that is there; returns what undoes it."""
    state = adapters_of(model)
    before = state.active
    if name not in state.known:
        attach(model, name, rank=chosen.rank, seed=chosen.seed)

        def undo() -> None:
            use_adapter(model, before)
            del state.known[name]

        return undo
    if other := [n for n, (left, _) in state.known[name].items() if chosen.rank not in (-1, left.shape[1])]:
        raise ValueError(
            f"the adapter {name!r} goes on with the rank it has, {state.known[name][other[0]][0].shape[1]} in "
            f"{other[0]}, got {chosen.rank}; leave rank out, or choose another name"
        )
    use_adapter(model, name, trainable=True)
    kept = {layer: [part.detach().clone() for part in pair] for layer, pair in state.known[name].items()}

    def restore() -> None:
        for layer, pair in state.known[name].items():
            for part, old in zip(pair, kept[layer], strict=True):
                part.data.copy_(old)
        use_adapter(model, before)

    return restore


@contextmanager
def _ended(end: Callable[[], None], undo: Callable[[], None]) -> Iterator[None]:
    """Call ``end`` after the work, interrupted or not, and ``undo`` if numbers went out of range."""
    try:
        try:
            yield
        except ArithmeticError:
            raise
        except BaseException:
            end()
            raise
        end()
    except ArithmeticError:
        undo()
        raise


def descend(
    model: Any, examples: Sequence[Any], groups: list[dict[str, Any]], chosen: Settings, progress: Progress | None
) -> list[float]:
    """The loop: AdamW without weight decay over shuffled batches, gradients clipped to a norm of 1; each step's loss.

    ``groups`` are of the model's parameters, each with its ``lr`` after the warm-up, and the step that it ``begins`` at
    if that is not the first: until then its parameters are frozen.

    Raises:
        ArithmeticError: if a loss or the norm of its gradient is not finite; that step is not taken.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(chosen.warmup * chosen.steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, chosen.steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parameters = [p for group in groups for p in group["params"]]
    order, losses = _shuffled(len(examples), chosen.seed), []
    if progress is not None:
        progress(TRAIN, 0, chosen.steps)
    with _training(model, chosen):
        for step in range(chosen.steps):
            for group in groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(step >= group.get("begins", 0))
            batch = _collate([examples[next(order)] for _ in range(min(chosen.batch, len(examples)))], model.device)
            loss = model(**batch, use_cache=False).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            for what, value in (("loss", losses[-1]), ("norm of its gradient", norm)):
                if not math.isfinite(value):
                    raise ArithmeticError(
                        f"the {what} must be finite, got {value} at step {step + 1} of {chosen.steps}; lower "
                        f"learning_rate, which is {groups[0]['initial_lr']:g}"
                    )
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(TRAIN, step + 1, chosen.steps)
    return losses


@contextmanager
def _training(model: Any, chosen: Settings) -> Iterator[None]:
    """The model in training mode, its dropout seeded; afterwards in the mode it was, torch's generators untouched."""
    was_training, checkpointing = model.training, model.is_activation_checkpointing
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(chosen.seed)  # dropout reads no other generator
        try:
            model.train()
            if chosen.gradient_checkpointing and not checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            yield
        finally:
            model.train(was_training)
            if chosen.gradient_checkpointing and not checkpointing:
                model.activation_checkpointing_disable()


def _shuffled(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@own_defaults()
def read_dataset(model: Any, dataset: Any, chosen: Settings) -> list[dict[str, Tensor]]:
    """Examples with 1-D ``input_ids`` and ``labels``; tokens that an ``attention_mask`` hides are left out.

    Raises:
        ValueError: if there are none, or one is no sequence of the model's tokens with something to predict.
    """
    given: Any = _text_windows(model, str(dataset), chosen) if isinstance(dataset, str | Path) else dataset
    if not hasattr(given, "__iter__"):
        if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
            raise TypeError(f"a data set must be a text, windows of tokens or examples, got {type(given).__name__}")
        given = map(dataset.__getitem__, range(len(dataset)))
    config = model.config.get_text_config()
    limit, vocabulary = positions_of(config), config.vocab_size
    examples = []
    for number, example in enumerate(given):
        try:
            ids, labels = _sequence(example)
            if limit is not None and len(ids) > limit:
                raise ValueError(f"at most as many tokens as the model has positions, {limit}, got {len(ids)}")
            if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
                found = f"{int(ids.min())} to {int(ids.max())}"
                raise ValueError(f"tokens of the model's vocabulary, 0 to {vocabulary - 1}, got {found}")
        except ValueError as error:
            raise ValueError(f"example {number} of the data set must have {error}") from None
        examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise ValueError("the data set must have at least 1 example, got 0; name a text or give windows of tokens")
    return examples


def _sequence(example: Any) -> tuple[Tensor, Tensor]:
    """Tokens and labels of an example; a ValueError ends a sentence that begins with "an example must have"."""
    entry: Mapping[str, Any] = example if isinstance(example, Mapping) else {"input_ids": example}
    if "input_ids" not in entry or isinstance(entry["input_ids"], str):
        got = ", ".join(map(str, entry)) if isinstance(example, Mapping) else repr(example)[:60]
        raise ValueError(f"input_ids, got {got}; tokenize it first")
    ids = torch.as_tensor(entry["input_ids"])
    labels = torch.as_tensor(entry.get("labels", ids))
    mask = torch.as_tensor(entry.get("attention_mask", torch.ones_like(ids)))
    shapes = [tuple(tensor.shape) for tensor in (ids, labels, mask)]
    if len(set(shapes)) > 1 or shapes[0][:-1] not in ((), (1,)) or not shapes[0]:
        raise ValueError(f"one sequence of tokens, with as many labels and as long a mask, got shapes {shapes}")
    kept = mask.flatten().bool()
    ids, labels = ids.flatten()[kept].long(), labels.flatten()[kept].long()
    if len(ids) < 2 or bool((labels[1:] == -100).all()):
        raise ValueError(
            f"at least 2 tokens and a label after the first, got {len(ids)} tokens and {int((labels != -100).sum())} "
            "labels"
        )
    return ids, labels


def _text_windows(model: Any, text: str, chosen: Settings) -> Tensor:
    """All windows of a text that fit side by side."""
    content, named = load_text(text), ("steps", "seq_len")  # all windows: the first of these is never told of
    encoder = Encoder.open(resolve_model(model.name_or_path), model.config, chosen.start_token)
    return token_windows(content, encoder, windows=None, length=chosen.seq_len, what=text, named=named)


def _collate(examples: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """A batch, padded at the end with tokens that nobody sees and labels that do not count."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [example["input_ids"] for example in examples]
    batch = {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }
    if len({len(own) for own in ids}) > 1:
        batch["attention_mask"] = pad([torch.ones_like(own) for own in ids], batch_first=True)
    return {key: tensor.to(device) for key, tensor in batch.items()}
