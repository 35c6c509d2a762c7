"""Texts, windows cut out of them, and windows that the model writes itself."""

import hashlib
import json
import logging
import struct
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import BOS

from lorq.models import texts as calibration
from lorq.models.texts import calibration_windows, load_text, token_windows

# ---- text -----------------------------------------------------------------------------------------------


def test_python_docs_are_all_topics_in_the_order_of_their_names():
    from pydoc_data.topics import topics

    text = load_text("python-docs")
    assert text == load_text("python-docs", split="evaluation")
    assert len(text) == sum(len(topic) for topic in topics.values()) > 400_000
    assert text.startswith(topics[min(topics)]) and text.endswith(topics[max(topics)])


def test_the_halves_of_python_docs_are_every_other_topic_and_together_the_whole():
    from pydoc_data.topics import topics

    names = sorted(topics)
    halves = load_text("python-docs-even"), load_text("python-docs-odd")
    assert halves == tuple("".join(topics[name] for name in names[start::2]) for start in (0, 1))
    # The topics are told apart again, taken from both halves in turn: none is missing, none is in both.
    rest, whole = list(halves), ""
    for index, name in enumerate(names):
        assert rest[index % 2].startswith(topics[name])
        rest[index % 2] = rest[index % 2][len(topics[name]) :]
        whole += topics[name]
    assert rest == ["", ""] and whole == load_text("python-docs")
    assert all(len(half) > 150_000 for half in halves)
    assert load_text("python-docs-odd", split="evaluation") == halves[1]


def test_a_text_file_comes_back_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Zwölf Boxkämpfer\n\njagen\n", encoding="utf-8")
    assert load_text(str(path)) == "Zwölf Boxkämpfer\n\njagen\n"


def test_jsonl_takes_objects_and_strings_and_splits_at_newlines_only(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 3}\n\n"three\u2028four"\n', encoding="utf-8")
    assert load_text(str(path)) == "one\ntwo\n\nthree\u2028four"


@pytest.mark.parametrize("line", ['{"text": ', '{"body": "x"}', '{"text": 7}', "12"])
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "text.jsonl"
    path.write_text('"good"\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 3 must be .*got") as caught:
        load_text(str(path))
    assert line.strip() in str(caught.value)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_file_without_a_word_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match="must hold text, got 3 bytes"):
        load_text(str(path))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_file_in_another_encoding_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes('"Zwölf"'.encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8 text, got byte 0xf6"):
        load_text(str(path))


def test_an_unknown_text_lists_the_known_names(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"one of python-docs, python-docs-even, python-docs-odd, wikitext2, c4 .* got 'wikitext3'",
    ):
        load_text("wikitext3")
    with pytest.raises(FileNotFoundError, match="no such file exists"):
        load_text(str(tmp_path))  # a folder is no text


def test_an_unknown_split_is_refused():
    # The function under the shape check, which would refuse the value before the function does.
    unchecked = getattr(load_text, "__wrapped__", load_text)
    with pytest.raises(ValueError, match="'calibration' or 'evaluation', got 'train'"):
        unchecked("python-docs", split="train")


@pytest.mark.parametrize(
    "source, split, call",
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train"})),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})),
        ("c4", "calibration", ("allenai/c4", "en", {"split": "train", "streaming": True})),
        ("c4", "evaluation", ("allenai/c4", "en", {"split": "validation", "streaming": True})),
    ],
)
def test_data_sets_are_asked_for_by_split_and_joined_by_empty_lines(monkeypatch, source, split, call):
    calls = []

    def load_dataset(name, config, **options):
        calls.append((name, config, options))
        return {"text": ["a", "b", "c"]} if source == "wikitext2" else ({"text": t} for t in "abc")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(calibration, "C4_DOCUMENTS", 2)
    assert load_text(source, split=split) == ("a\n\nb\n\nc" if source == "wikitext2" else "a\n\nb")
    assert calls == [call]


def test_a_data_set_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'allenai/c4' needs .* pip install 'lorq\[data\]'"):
        load_text("c4")


def test_a_data_set_that_does_not_load_says_which_text_it_was(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConnectionError, match="offline") as caught:
        load_text("wikitext2")
    assert "while loading the text 'Salesforce/wikitext'" in caught.value.__notes__[0]


# ---- windows --------------------------------------------------------------------------------------------


def numbered(tokenizer, count: int) -> tuple[str, list[int]]:
    """A text of ``count`` letters whose places can be read from it, and its tokens."""
    text = "".join(chr(ord("a") + (i * i + i // 7) % 26) for i in range(count))
    return text, [tokenizer.convert_tokens_to_ids(letter) for letter in text]


@pytest.mark.parametrize(
    "windows, starts",
    [(None, range(0, 80, 8)), (10, [0, 8, 17, 26, 35, 43, 52, 61, 70, 79]), (4, [0, 26, 52, 79]), (1, [0])],
)
def test_windows_lie_side_by_side_and_cover_the_text_evenly(tokenizer, windows, starts):
    text, tokens = numbered(tokenizer, 87)  # 10 windows of 8, and a rest of 7 that none holds
    cut = token_windows(text, tokenizer, windows=windows, length=8, what="test")
    assert cut.dtype == torch.int64
    assert cut.tolist() == [tokens[start : start + 8] for start in starts]


@pytest.mark.parametrize("windows, total", [(2, 16), (3, 29), (7, 80), (8, 64)])
def test_chosen_windows_do_not_overlap_and_reach_from_start_to_end(tokenizer, windows, total):
    # The letters count up without repeating, so that a window's first letter tells where it was cut.
    letters = [chr(33 + i) for i in range(total)]
    cut = token_windows("".join(letters), tokenizer, windows=windows, length=8, what="test")
    places = [letters.index(tokenizer.decode(row[:1])) for row in cut]
    gaps = [after - before for before, after in pairwise(places)]
    assert places[0] == 0 and places[-1] == total - 8
    assert min(gaps) >= 8 and max(gaps) - min(gaps) <= 1


def test_a_long_text_is_tokenized_without_special_tokens_and_without_a_warning(tokenizer, caplog):
    logger = logging.getLogger("transformers")  # it does not propagate to the root
    logger.addHandler(caplog.handler)
    try:
        cut = token_windows("ab" * 500, tokenizer, windows=None, length=10, what="test")
    finally:
        logger.removeHandler(caplog.handler)
    assert cut.shape == (100, 10) and BOS not in cut
    assert not caplog.records


@pytest.mark.parametrize(
    "windows, numbers",
    [
        (11, "11 windows of 8 tokens need 88 tokens, but text 'mine' has 87 (enough for 10)"),
        (1000, "1000 windows of 8 tokens need 8000 tokens, but text 'mine' has 87 (enough for 10)"),
    ],
)
def test_a_text_too_short_is_refused_with_its_numbers(tokenizer, windows, numbers):
    text, _ = numbered(tokenizer, 87)
    with pytest.raises(ValueError) as caught:
        token_windows(text, tokenizer, windows=windows, length=8, what="mine")
    assert numbers in str(caught.value) and "lower --samples or --seq-len" in str(caught.value)


def test_all_windows_of_a_text_shorter_than_one_are_refused(tokenizer):
    with pytest.raises(ValueError, match="1 window of 8 tokens needs 8 tokens, but text 'mine' has 3"):
        token_windows("abc", tokenizer, windows=None, length=8, what="mine")


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({"windows": 0, "length": 8}, "windows must be at least 1, got 0"),
        ({"windows": 2, "length": 1}, "length must be at least 2 tokens, .* got 1"),
    ],
)
def test_counts_out_of_range_are_refused(tokenizer, settings, numbers):
    with pytest.raises(ValueError, match=numbers):
        token_windows("abcdefgh" * 9, tokenizer, what="test", **settings)


# ---- calibration_windows --------------------------------------------------------------------------------


def test_calibration_reads_a_text_and_sums_its_tokens(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps("abcdefgh" * 9), encoding="utf-8")
    result, again, other = (
        calibration_windows(str(path), tokenizer, samples=samples, seq_len=4, self_writer=lambda: pytest.fail("called"))
        for samples in (3, 3, 2)
    )
    assert torch.equal(result.tokens, token_windows("abcdefgh" * 9, tokenizer, windows=3, length=4, what="x"))
    assert result.source == str(path)
    assert result.sha256 == again.sha256 != other.sha256


def test_the_sum_is_that_of_little_endian_int64(tokenizer):
    tokens = torch.tensor([[1, 2], [3, 256]])
    result = calibration_windows("self", tokenizer, samples=2, seq_len=2, self_writer=lambda: tokens)
    assert result.sha256 == hashlib.sha256(struct.pack("<4q", 1, 2, 3, 256)).hexdigest()
    assert result.source == "self" and result.tokens is tokens


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)])
def test_a_writer_of_other_windows_is_refused(tokenizer, tokens):
    with pytest.raises(ValueError, match=r"int64 windows of shape \(2, 2\), got torch\.int(64|32) of shape \(2,"):
        calibration_windows("self", tokenizer, samples=2, seq_len=2, self_writer=lambda: tokens)
