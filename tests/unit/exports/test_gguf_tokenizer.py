"""Tokenizers in GGUF files."""

import json

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorq.exports.gguf_tokenizer import split_name, write_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Said(dict):
    """Stands for a GGUF writer: remembers what it is told."""

    def __getattr__(self, name):
        return lambda value: self.__setitem__(name.removeprefix("add_"), value)


def split(pattern):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


def told(pre, ignore_merges=False):
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre
    return json.loads(backend.to_str())


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "expected"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False, "smollm",
        ),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
        (split(QWEN2), False, "qwen2"),
        (split(TEKKEN), True, "tekken"),
    ],
)  # fmt: skip
def test_ways_of_splitting_text_have_llama_cpps_names(pre, ignore_merges, expected):
    assert split_name(told(pre, ignore_merges)) == expected


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "what"),
    [
        (split(QWEN2), True, "with ignore_merges, which is none of gpt-2, smollm"),
        (pre_tokenizers.Whitespace(), False, "this one does by Whitespace"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, "add_prefix_space"),
    ],
)
def test_unknown_ways_are_refused_and_can_be_named(pre, ignore_merges, what):
    with pytest.raises(ValueError, match=rf"(?s){what}.*name what llama.cpp calls it with --tokenizer-pre"):
        split_name(told(pre, ignore_merges))


def test_pieces_with_bytes_have_scores_in_the_order_of_merges(tmp_path):
    # As of Llama 2 and Gemma: SentencePiece's tokenizer, in the file that transformers makes of it.
    pieces = ["<unk>", "<s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "x", "▁▁"]
    backend = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, [("a", "b"), ("▁", "ab")], byte_fallback=True, unk_token="<unk>"
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.add_tokens(["▁▁"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path)
    said = Said()
    write_tokenizer(said, tmp_path, 11)
    assert (said["tokenizer_model"], said["tokenizer_pre"], said["add_space_prefix"]) == ("llama", "default", True)
    assert said["token_list"] == [*pieces[:-1], "  ", "[PAD10]"]
    assert said["token_scores"] == [-2, -2, -2, -2, -2, -2, 0, -1, -2, -2, -2]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, *[TokenType.NORMAL] * 6]
    assert said["token_types"] == [*kinds, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert (said["bos_token_id"], said["unk_token_id"], said["add_bos_token"]) == (1, 0, False)


def test_too_many_tokens_and_other_kinds_are_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="below the model's 1 rows, one has the number 1"):
        write_tokenizer(Said(), tmp_path, 1)
    with pytest.raises(ValueError, match=r"reads tokenizers of byte pairs here, .* is WordLevel"):
        write_tokenizer(Said(), tmp_path, 2)
