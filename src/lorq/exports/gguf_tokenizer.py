"""Tokenizers as llama.cpp reads them: tokens with kinds and scores or merges, and the name of how text is split."""

import json
from pathlib import Path
from typing import Any

_GPT2 = ("ByteLevel", True)
_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*|" + r"\p{N}|" + _TAIL
_O200K = f"{_LETTERS}{_UPPER}*{_LOWER}+{_CASELESS}?|{_LETTERS}{_UPPER}+{_LOWER}*{_CASELESS}?|" + r"\p{N}{1,3}|" + _TAIL
# How text is split before merges, and whether whole words that are tokens are taken unmerged -> llama.cpp's name.
SPLITS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _CL100K),), True): "llama-bpe",
    ((("Split", _CL100K),), False): "dbrx",
    ((("Split", _QWEN2),), False): "qwen2",
    ((("Split", _TEKKEN),), True): "tekken",
    ((("Split", _O200K),), False): "gpt-4o",
}


def write_tokenizer(writer: Any, folder: Path, vocabulary: int, pre: str | None = None) -> None:
    """Tokens, merges or scores, special tokens and the chat template.

    Args:
        vocabulary: rows of the model's table; what the tokenizer lacks of them stands as unused.
        pre: llama.cpp's name of how text is split, where it is not to be found out.

    Raises:
        ValueError: if llama.cpp has no such tokenizer.
    """
    from gguf import SpecialVocab

    from lorq.models.tokenizer import open_tokenizer

    opened: Any = open_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not file.is_file() and not hasattr(opened, "backend_tokenizer"):
        raise ValueError(
            f"{folder} must have a tokenizer.json, or a tokenizer that transformers makes one of; try dense"
        )
    told = json.loads(file.read_text(encoding="utf-8") if file.is_file() else opened.backend_tokenizer.to_str())
    tokens, kinds = _tokens(told, vocabulary)
    model = told["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"llama.cpp reads tokenizers of byte pairs here, that of {folder} is {model['type']}; try dense"
        )
    pieces = bool(model.get("byte_fallback"))
    special = SpecialVocab(folder, n_vocab=vocabulary)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_adds_space(opened))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or split_name(told))
        special.merges = [" ".join(_pair(merge)) for merge in model["merges"]]
        if not special.merges:
            raise ValueError(f"llama.cpp reads no tokenizer without merges, that of {folder} has none; try dense")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special.special_token_ids |= {
        kind: number
        for kind in ("bos", "eos", "unk", "pad")
        if (number := getattr(opened, f"{kind}_token_id")) is not None
    }
    ids = opened("a")["input_ids"]
    special.add_special_token = {
        "bos": ids[0] == opened.bos_token_id if opened.bos_token_id is not None else False,
        "eos": ids[-1] == opened.eos_token_id if opened.eos_token_id is not None else False,
    }
    template = opened.chat_template or None
    named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else ()
    special.chat_template = named or template
    special.add_to_gguf(writer, quiet=True)


def _pair(merge: str | list[str]) -> list[str]:
    """The two sides of a merge; spaces within, which part them in a GGUF file, as bytes of byte-level tokens."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return [left.replace(" ", "Ġ"), right.replace(" ", "Ġ")]


def _tokens(told: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token's text and kind, by its number."""
    from gguf import TokenType

    known = {number: text for text, number in told["model"]["vocab"].items()}
    added = {token["id"]: token for token in told.get("added_tokens", [])}
    if (most := max(*known, *added, 0)) >= vocabulary:
        raise ValueError(
            f"the tokenizer's tokens must be below the model's {vocabulary} rows, one has the number {most}"
        )
    unknown, pieces = told["model"].get("unk_token"), bool(told["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(vocabulary):
        text, kind = known.get(number), TokenType.NORMAL
        if number in added:
            text = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            text = text.replace("▁", " ") if pieces and kind == TokenType.USER_DEFINED else text
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif pieces and text == unknown:
            kind = TokenType.UNKNOWN
        elif pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """What is merged first has the highest score: SentencePiece's order, which the merges were made from."""
    merged: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        merged.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    last = -float(len(model["merges"]))
    return [merged.get(token, last) for token in tokens]


def _adds_space(opened: Any) -> bool:
    """Whether a text's first word has a space put before it."""
    return opened.convert_ids_to_tokens(opened("a", add_special_tokens=False)["input_ids"])[0].startswith("▁")


def split_name(told: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits text into words, by its tokenizer.json.

    Raises:
        ValueError: if it has none of that kind, or it is not known.
    """
    steps = told.get("pre_tokenizer") or {}
    found = tuple(_step(step) for step in steps.get("pretokenizers", [steps] if steps else []))
    # Byte-level without a pattern of its own only names bytes, which llama.cpp does anyway.
    found = tuple(step for step in found if step != ("ByteLevel", False))
    key = (found, bool(told["model"].get("ignore_merges")))
    if key in SPLITS:
        return SPLITS[key]
    raise ValueError(
        f"llama.cpp must know how the tokenizer splits text, this one does by {_short(found)}"
        f"{' with ignore_merges' if key[1] else ''}, which is none of {', '.join(SPLITS.values())}; name what "
        "llama.cpp calls it with --tokenizer-pre"
    )


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (kind, bool(step.get("use_regex", True)))
    if kind == "Digits":
        return (kind, bool(step.get("individual_digits")))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (kind, step["pattern"].get("Regex", step["pattern"]))
    return (kind, json.dumps(step))


def _short(found: tuple[Any, ...]) -> str:
    text = ", ".join(" ".join(map(str, step)) for step in found) or "nothing"
    return text if len(text) <= 120 else f"{text[:117]}..."
