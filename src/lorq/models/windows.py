"""Text to windows of tokens."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from lorq.models.texts import Chats, StartToken, load_text
from lorq.models.tokenizer import open_tokenizer

if TYPE_CHECKING:  # importing a model class takes seconds; here it is only named
    import transformers


@dataclass(frozen=True)
class Encoder:
    """How text becomes a model's tokens.

    Attributes:
        start: what every window begins with, such as ``<s>``; nothing, or one token, of a few models two.
        vocabulary: how many tokens the model knows.
        positions: how many it can take at once; None for no limit.
    """

    tokenizer: "transformers.PreTrainedTokenizerBase"
    start: tuple[int, ...]
    vocabulary: int
    positions: int | None = None

    @classmethod
    def open(cls, folder: Path, config: Any, start_token: StartToken = "auto") -> "Encoder":
        """That of a model's folder; errors are those of `open_tokenizer` and `start_tokens`."""
        tokenizer = open_tokenizer(folder)
        text = config.get_text_config()
        return cls(tokenizer, start_tokens(tokenizer, config, start_token), text.vocab_size, positions_of(config))

    def tokens(self, text: str | Chats, what: str) -> list[int]:
        """All of a text, without special tokens; of conversations as the model's chat template writes them.

        A start that the template writes before the first is left out: every window begins with it.

        Characters that spell a special token, such as ``<s>``, stay characters: who writes about a token does not
        mean it. A chat template means its own.

        Raises:
            ValueError: if the model does not know a token, or has no template for conversations.
        """
        if isinstance(text, str):
            unasked: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
            if type(self.tokenizer).__name__ != "MistralCommonBackend":  # which never reads special tokens out of text
                unasked["split_special_tokens"] = True
            # verbose=False: the warning about sequences beyond the model's length does not apply to a text to be cut.
            tokens: list[int] = self.tokenizer(text, verbose=False, add_special_tokens=False, **unasked)["input_ids"]
        elif self.tokenizer.chat_template:
            templated: Any = [self.tokenizer.apply_chat_template(chat, return_dict=False) for chat in text]
            tokens = [token for chat in templated for token in chat]
            if self.start and tuple(tokens[: len(self.start)]) == self.start:
                tokens = tokens[len(self.start) :]
        else:
            raise ValueError(
                f"conversations ('messages') need a tokenizer with a chat template, the model's has none; write "
                f"{what!r} with the field 'text'"
            )
        self.check(tokens, what)
        return tokens

    def check(self, tokens: list[int], what: str) -> None:
        """Refuse tokens that the model does not know, with a ValueError."""
        if (worst := max(tokens, default=0)) >= self.vocabulary:
            raise ValueError(
                f"tokens must be below the model's vocabulary size {self.vocabulary}, {what!r} has {worst} "
                f"({self.tokenizer.convert_ids_to_tokens(worst)!r}); the tokenizer has more tokens than the model: "
                "take the model's own, or resize its embeddings"
            )


def positions_of(config: Any) -> int | None:
    """How many tokens a model takes at once; None for no limit, which some configs write as -1."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def start_tokens(tokenizer: Any, config: Any, rule: StartToken) -> tuple[int, ...]:
    """What a window begins with: "auto" as the tokenizer begins a text by itself, "always" or "never" a start token.

    Raises:
        ValueError: for another rule, and for "always" where neither tokenizer nor config has a start token.
    """
    if rule not in ("auto", "always", "never"):
        raise ValueError(f"start_token must be one of auto, always, never, got {rule!r}")
    if rule == "never":
        return ()
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:before]) or ((start_token_of(tokenizer, config),) if rule == "always" else ())


def start_token_of(tokenizer: Any | None, config: Any) -> int:
    """``bos`` of the tokenizer, else of the model's config, else ``eos`` of the tokenizer; None is no tokenizer."""
    text_config = config.get_text_config()
    # The config before eos: instruct models end a turn with eos and start a document with the config's bos.
    config_bos = getattr(text_config, "bos_token_id", None)
    own = (None, None) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for start in (own[0], config_bos, own[1]):
        if start is None:
            continue
        if not 0 <= start < text_config.vocab_size:
            raise ValueError(
                f"the start token must be below the model's vocabulary size {text_config.vocab_size}, got "
                f"{start}; is this the model's tokenizer?"
            )
        return int(start)
    raise ValueError(
        "a start token is needed, got none: bos_token_id and eos_token_id are None; set bos_token_id in config.json, "
        "or name a text, with start_token auto or never"
    )


@dataclass(frozen=True)
class Windows:
    """Calibration tokens, int64, and where they come from.

    Attributes:
        source: the text's name or path, or ``self``.
        start_token: whether each window begins with one.
    """

    tokens: Int[Tensor, "windows length"]
    source: str
    start_token: bool

    @cached_property
    def sha256(self) -> str:
        """Of the tokens as little-endian int64, row by row; equal sums mean equal calibration."""
        return hashlib.sha256(self.tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def text_windows(source: str, encoder: Encoder, *, samples: int, seq_len: int) -> Windows:
    """``samples`` calibration windows of ``seq_len`` tokens of a source of `load_text`."""
    text = load_text(source, split="calibration", what="calibration")
    named = ("samples", "seq_len")
    tokens = token_windows(text, encoder, windows=samples, length=seq_len, what=source, named=named)
    return Windows(tokens, source, start_token=bool(encoder.start))


def token_windows(
    text: str | Chats,
    encoder: Encoder,
    *,
    windows: int | None,
    length: int,
    what: str,
    named: tuple[str, str] = ("windows", "window"),
) -> Int[Tensor, "windows length"]:
    """Cut non-overlapping windows out of ``text``, evenly spread over it: int64 tokens, in the order of the text.

    The text is tokenized once, whole. Each window is what the encoder starts with and ``n`` tokens of the text, which
    make it ``length``; window ``i`` has those from ``floor(i (tokens - n) / (windows - 1))`` on: the first at the start
    of the text, the last at its end.

    Args:
        text: the whole text; ``what`` is its name, for messages.
        encoder: of the model.
        windows: how many, at least 1; None takes all that fit side by side from the start.
        length: tokens of each window, at least 2.
        named: what the caller calls ``windows`` and ``length``, for messages.

    Raises:
        ValueError: if the text is too short for that many windows, the model does not know a token of it, or a count
            is out of range.
    """
    check_window_counts(windows, length, named)
    if encoder.positions is not None and length > encoder.positions:
        raise ValueError(f"{named[1]} must be at most the model's {encoder.positions} positions, got {length}")
    tokens = torch.tensor(encoder.tokens(text, what), dtype=torch.int64)
    own = length - len(encoder.start)
    if own < 1:
        raise ValueError(f"{named[1]} must be above the {len(encoder.start)} start tokens, got {length}")
    total = tokens.numel() // own
    wanted = total if windows is None else windows
    if not 1 <= wanted <= total:
        many, flags = max(wanted, 1), [f"--{name.replace('_', '-')}" for name in named]
        started = f" (and {length - own} to start with)" if encoder.start else ""
        raise ValueError(
            f"{many} {'windows' if many > 1 else 'window'} of {own} tokens{started} {'need' if many > 1 else 'needs'} "
            f"{many * own} tokens, but text {what!r} has {tokens.numel()} (enough for {total}); lower "
            f"{f'{flags[0]} or ' if many > 1 else ''}{flags[1]}, or name a longer text"
        )
    if windows is None:
        cut = tokens[: total * own].view(total, own)
    else:
        starts = [i * (tokens.numel() - own) // max(wanted - 1, 1) for i in range(wanted)]
        cut = torch.stack([tokens[start : start + own] for start in starts])
    return torch.cat([torch.tensor([encoder.start] * wanted, dtype=torch.int64), cut], 1) if encoder.start else cut


def check_window_counts(windows: int | None, length: int, named: tuple[str, str] = ("windows", "length")) -> None:
    """Refuse counts out of range, with a ValueError; ``named`` is what the caller calls them."""
    if windows is not None and windows < 1:
        raise ValueError(f"{named[0]} must be at least 1, got {windows}")
    if length < 2:
        raise ValueError(f"{named[1]} must be at least 2 tokens, one to see and one to predict, got {length}")
