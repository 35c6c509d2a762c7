"""Windows of tokens cut out of texts."""

import hashlib
import json
import logging
import struct
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import BOS, BYTES, byte_tokenizer, tiny_model
from tokenizers import AddedToken

from lorq.models.self_text import check_self_windows
from lorq.models.windows import Encoder, Windows, positions_of, start_tokens, text_windows, token_windows
from lorq.pipeline.verify import _TOKENS, probe_tokens

# ---- where windows are cut ------------------------------------------------------------------------------


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
    cut = token_windows(text, Encoder(tokenizer, (), 257), windows=windows, length=8, what="test")
    assert cut.dtype == torch.int64
    assert cut.tolist() == [tokens[start : start + 8] for start in starts]


@pytest.mark.parametrize("windows, total", [(2, 16), (3, 29), (7, 80), (8, 64)])
def test_chosen_windows_do_not_overlap_and_reach_from_start_to_end(tokenizer, windows, total):
    # The letters count up without repeating, so that a window's first letter tells where it was cut.
    letters = [chr(33 + i) for i in range(total)]
    cut = token_windows("".join(letters), Encoder(tokenizer, (), 257), windows=windows, length=8, what="test")
    places = [letters.index(tokenizer.decode(row[:1])) for row in cut]
    gaps = [after - before for before, after in pairwise(places)]
    assert places[0] == 0 and places[-1] == total - 8
    assert min(gaps) >= 8 and max(gaps) - min(gaps) <= 1


def test_a_long_text_is_tokenized_without_special_tokens_and_without_a_warning(tokenizer, caplog):
    logger = logging.getLogger("transformers")  # it does not propagate to the root
    logger.addHandler(caplog.handler)
    try:
        cut = token_windows("ab" * 500, Encoder(tokenizer, (), 257), windows=None, length=10, what="test")
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
        token_windows(text, Encoder(tokenizer, (), 257), windows=windows, length=8, what="mine")
    assert numbers in str(caught.value) and "lower --windows or --window, or" in str(caught.value)


def test_all_windows_of_a_text_shorter_than_one_are_refused(tokenizer):
    with pytest.raises(ValueError, match="1 window of 8 tokens needs 8 tokens, but text 'mine' has 3"):
        token_windows("abc", Encoder(tokenizer, (), 257), windows=None, length=8, what="mine")


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({"windows": 0, "length": 8}, "windows must be at least 1, got 0"),
        ({"windows": 2, "length": 1}, "window must be at least 2 tokens, .* got 1"),
    ],
)
def test_counts_out_of_range_are_refused(tokenizer, settings, numbers):
    with pytest.raises(ValueError, match=numbers):
        token_windows("abcdefgh" * 9, Encoder(tokenizer, (), 257), what="test", **settings)


@pytest.mark.parametrize("windows", [None, 4])
def test_a_start_token_takes_the_first_place_of_every_window(tokenizer, windows):
    text, _ = numbered(tokenizer, 87)
    cut = token_windows(text, Encoder(tokenizer, (BOS,), 257), windows=windows, length=8, what="test")
    plain = token_windows(text, Encoder(tokenizer, (), 257), windows=windows, length=7, what="test")
    assert (cut[:, 0] == BOS).all() and torch.equal(cut[:, 1:], plain)


def test_a_window_needs_room_beside_its_start_tokens_and_no_more_than_the_models_positions(tokenizer):
    encoder = Encoder(tokenizer, (BOS, BOS), 257, positions=32)
    with pytest.raises(ValueError, match="window must be above the 2 start tokens, got 2"):
        token_windows("a" * 99, encoder, windows=1, length=2, what="test")
    with pytest.raises(ValueError, match="seq_len must be at most the model's 32 positions, got 33"):
        token_windows("a" * 99, encoder, windows=1, length=33, what="test", named=("samples", "seq_len"))


def test_calibration_windows_are_those_of_the_text_with_a_sum_of_their_tokens(tokenizer, tmp_path):
    path, encoder = tmp_path / "text.jsonl", Encoder(tokenizer, (), 257)
    path.write_text(json.dumps("abcdefgh" * 9), encoding="utf-8")
    result, again, other = (text_windows(str(path), encoder, samples=samples, seq_len=4) for samples in (3, 3, 2))
    assert torch.equal(result.tokens, token_windows("abcdefgh" * 9, encoder, windows=3, length=4, what="x"))
    assert result.source == str(path) and not result.start_token
    assert result.sha256 == again.sha256 != other.sha256


def test_the_sum_is_that_of_little_endian_int64():
    tokens = torch.tensor([[1, 2], [3, 256]])
    assert Windows(tokens, "self", True).sha256 == hashlib.sha256(struct.pack("<4q", 1, 2, 3, 256)).hexdigest()


# ---- what a window begins with --------------------------------------------------------------------------

CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300, bos_token_id=None))


def without_start():
    """A tokenizer that knows a start token and begins no text with it, as SmolLM2's."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = None
    return tokenizer


@pytest.mark.parametrize(
    "rule, tokenizer, start",
    [
        ("auto", byte_tokenizer, (BOS,)), ("always", byte_tokenizer, (BOS,)), ("never", byte_tokenizer, ()),
        ("auto", without_start, ()), ("always", without_start, (BOS,)), ("never", without_start, ()),
    ],
)  # fmt: skip
def test_auto_begins_windows_as_the_tokenizer_begins_a_text(rule, tokenizer, start):
    assert start_tokens(tokenizer(), CONFIG, rule) == start


def test_two_start_tokens_are_two():
    def glm(text, add_special_tokens=True):
        return {"input_ids": [7, 8, ord(text)] if add_special_tokens else [ord(text)]}

    assert start_tokens(glm, CONFIG, "auto") == (7, 8)


def test_always_needs_a_start_token_and_other_words_are_refused():
    tokenizer = without_start()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="a start token is needed, got none"):
        start_tokens(tokenizer, CONFIG, "always")
    with pytest.raises(ValueError, match="start_token must be one of auto, always, never, got 'yes'"):
        getattr(start_tokens, "__wrapped__", start_tokens)(tokenizer, CONFIG, "yes")


# ---- which tokens a text has ----------------------------------------------------------------------------


def test_characters_that_spell_a_special_token_stay_characters(tokenizer):
    encoder, text = Encoder(tokenizer, (), 257), "He wrote <s> and </s>."
    assert encoder.tokens(text, "test") == [tokenizer.convert_tokens_to_ids(c) for c in text.replace(" ", "\u0120")]
    assert BOS in tokenizer(text, add_special_tokens=False)["input_ids"]  # what it does unasked, afterwards too


def test_a_chat_template_means_its_special_tokens(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% endfor %}"
    chats = [[{"role": "a", "content": "b"}, {"role": "c", "content": "<s>"}]] * 2
    letters = tokenizer.convert_tokens_to_ids(["a", ":", "b", "c"])
    one = [BOS, *letters[:3], BOS, letters[3], letters[1], BOS]
    assert Encoder(tokenizer, (), 257).tokens(chats, "test") == 2 * one


@pytest.mark.parametrize("start", [(), (BOS,), (BOS, BOS)])
def test_windows_of_conversations_do_not_begin_twice(tokenizer, start):
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    letters = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    encoder = Encoder(tokenizer, start, 257)
    cut = token_windows([[{"role": "user", "content": "abc"}]] * 4, encoder, windows=1, length=6, what="x")
    template = [] if start == (BOS,) else [BOS]
    assert cut.tolist() == [[*start, *template, *letters, BOS, *letters][:6]]


@pytest.mark.parametrize("positions, limit", [(-1, None), (0, None), (7, 7)])
def test_less_than_one_position_is_no_limit(tokenizer, positions, limit, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = tiny_model().config
    config.max_position_embeddings = positions
    assert Encoder.open(tmp_path, config).positions == limit == positions_of(config)
    probed = probe_tokens(config, 0).shape[1]
    assert probed == (limit or _TOKENS) and check_self_windows(tokenizer, config, windows=1, length=limit or 99) == BOS


def test_conversations_without_a_template_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"need a tokenizer with a chat template.* write 'c.jsonl' with the field 'text'"
    ):
        Encoder(tokenizer, (), 257).tokens([[{"role": "a", "content": "b"}]], "c.jsonl")


def test_a_token_beyond_the_models_vocabulary_is_named(tokenizer):
    tokenizer.add_tokens([AddedToken("<new>", special=False)])
    encoder = Encoder(tokenizer, (), BYTES + 1)
    with pytest.raises(ValueError, match=r"vocabulary size 257, 'mine' has 257 \('<new>'\); the tokenizer has more"):
        token_windows("abc<new>" * 9, encoder, windows=1, length=8, what="mine")
