"""Texts by name and from files."""

import json
import sys
from types import SimpleNamespace

import pytest

from lorq.models import texts as calibration
from lorq.models.texts import check_text, load_text


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


@pytest.mark.parametrize("name", ["text.jsonl", "text.JSONL", "text.ndjson", "text.json", "text.JSON", "text.txt"])
def test_what_is_called_json_is_read_as_json_whatever_its_suffix_and_byte_order_mark(tmp_path, name):
    rows = [{"text": "one"}, "two"]
    whole = json.dumps(rows) if name.lower().endswith(".json") else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + whole.encode())
    assert load_text(str(tmp_path / name)) == (whole if name.endswith(".txt") else "one\n\ntwo")


def test_half_of_a_surrogate_pair_becomes_the_character_that_says_so(tmp_path):
    path = tmp_path / "text.jsonl"
    chat = '{"messages": [{"role": "user", "content": "\\ud83d!"}]}'
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert load_text(str(path)) == "cut \ufffd\n\nwhole \U0001f600"
    path.write_text(chat)
    assert load_text(str(path)) == [[{"role": "user", "content": "\ufffd!"}]]


def test_conversations_come_back_as_their_messages(tmp_path):
    path, messages = (
        tmp_path / "chats.jsonl",
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
    )
    path.write_text("".join(json.dumps({"messages": messages, "id": i}) + "\n" for i in range(2)))
    assert load_text(str(path)) == [messages, messages]
    path.write_text(path.read_text() + '{"text": "prose"}\n')
    with pytest.raises(ValueError, match="must hold texts or conversations, got 1 and 2; split it"):
        load_text(str(path))


@pytest.mark.parametrize(
    "line, got",
    [
        ('{"text": ', "Expecting value"),
        ('{"body": "x"}', "the fields body: "),
        ('{"conversations": [], "id": 1}', "the fields conversations, id: "),
        ('{"messages": []}', "the fields messages: "),
        ('{"messages": [{"role": "user", "content": null}]}', "the fields messages: "),
        ('{"text": 7}', "the fields text: "),
        ("{}", "the fields none: "),
        ("12", "another value: 12"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_its_number_and_its_fields(tmp_path, line, got):
    path = tmp_path / "text.jsonl"
    path.write_text('"good"\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 3 must be .*got") as caught:
        load_text(str(path))
    assert line.strip() in str(caught.value) and got in str(caught.value)


def test_a_number_that_python_does_not_read_is_named_by_its_line(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('"good"\n' + "1" * 5000 + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 2 must be JSON: Exceeds the limit .*; got '1{60}'$"):
        load_text(str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": "b"}', r"text\.json must be JSON: Extra data.* one document a line is named \.jsonl"),
        ('{"text": "a"}', r"text\.json must be a JSON list of documents, got '\{\"text"),
        ('["a", {"title": "b"}]', r"text\.json, entry 2 must be .*got the fields title"),
    ],
)
def test_json_that_is_no_list_of_documents_is_refused_and_not_read_as_prose(tmp_path, content, message):
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / "text.json"))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json"])
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
    with pytest.raises(FileNotFoundError, match="is a folder; name a file in it"):
        load_text(str(tmp_path))


def test_a_text_that_is_not_there_is_named_by_its_option_and_what_is_like_it(tmp_path):
    (tmp_path / "calibration.txt").touch()
    with pytest.raises(
        FileNotFoundError, match=r"^calibration must be .*, self or a file; got 'wikitext'.* mean wikitext2\?"
    ):
        check_text("wikitext", "calibration")
    with pytest.raises(FileNotFoundError, match=r"^text must be .* did you mean .*/calibration\.txt\?"):
        check_text(str(tmp_path / "calibratoin.txt"))


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
