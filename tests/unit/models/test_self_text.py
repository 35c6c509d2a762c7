"""Windows that the model writes itself, and the cache that keeps them."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import BOS, BYTES, tiny_model
from safetensors.torch import load_file, save_file

from lorq.models import self_text as selftext
from lorq.models.self_text import cache_dir, cached_self_windows, eval_mode, self_windows
from lorq.models.windows import start_token_of

# ---- text that the model writes itself ------------------------------------------------------------------


def without_cache(model, *, windows, length, seed, batch, temperature=1.0):
    """The same sampling, the whole prefix through the model for every token."""
    generator = torch.Generator().manual_seed(seed)
    written = []
    for first in range(0, windows, batch):
        rows = torch.full((min(batch, windows - first), 1), BOS)
        while rows.shape[1] < length:
            with torch.no_grad():
                logits = model(input_ids=rows, use_cache=False).logits[:, -1]
            choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            rows = torch.cat([rows, choice], dim=1)
        written.append(rows)
    return torch.cat(written)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_with_the_cache_equals_sampling_without(model, tokenizer, temperature):
    size = {"windows": 3, "length": 12, "seed": 3, "batch": 2, "temperature": temperature}
    written = self_windows(model, tokenizer, **size)
    assert written.dtype == torch.int64 and written.shape == (3, 12)
    assert torch.equal(written, without_cache(model, **size))
    assert (written[:, 0] == BOS).all()


def test_logits_along_the_cache_are_those_of_the_whole_window(model, tokenizer):
    rows = self_windows(model, tokenizer, windows=3, length=24, seed=0)
    with torch.no_grad():
        stepped = torch.stack(list(selftext._next_logits(model, rows)), dim=1)
        whole = model(input_ids=rows, use_cache=False).logits[:, :-1]
    # float32 in another summation order; the logits have magnitudes up to 10.
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)


def test_the_seed_decides_and_the_global_generator_is_left_alone(model, tokenizer):
    size = {"windows": 2, "length": 16}
    state = torch.random.get_rng_state()
    first = self_windows(model, tokenizer, seed=1, **size)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(self_windows(model, tokenizer, seed=1, **size), first)
    assert not torch.equal(self_windows(model, tokenizer, seed=2, **size), first)
    assert not torch.equal(first[0], first[1])


def test_written_tokens_follow_the_models_distribution(tokenizer):
    # With no blocks' influence (zero embedding of everything) the logits are constant: a known distribution.
    model = tiny_model(vocab_size=BYTES + 1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # The normed hidden state is all ones, so a row's sum is the token's logit.
        model.lm_head.weight[:3, 0] = torch.tensor([60.0, 60.0, 60.0]) + torch.tensor([0.6, 0.3, 0.1]).log()
    written = self_windows(model, tokenizer, windows=256, length=17, seed=0, batch=256)[:, 1:]
    counts = torch.bincount(written.flatten(), minlength=BYTES + 1)
    assert counts[3:].sum() == 0
    share = counts[:3] / counts.sum()  # 4,096 draws: a standard deviation below 0.008
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.03)


def test_writing_goes_on_after_an_end_token_until_the_window_is_full(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely, the end token among them
    model.config.eos_token_id = list(range(BYTES))
    assert self_windows(model, tokenizer, windows=2, length=40, seed=0).shape == (2, 40)


def test_dropout_is_off_while_writing_and_the_mode_comes_back(tokenizer):
    model = tiny_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    size = {"windows": 2, "length": 12, "seed": 0}
    written = self_windows(model, tokenizer, **size)
    assert model.training and not model.model.layers[1].mlp.training
    assert torch.equal(written, self_windows(model.eval(), tokenizer, **size))


def test_eval_mode_restores_every_part_after_an_error(model):
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    inner[1].eval()
    with pytest.raises(RuntimeError, match="inside"), eval_mode(inner):
        assert not inner[0].training
        raise RuntimeError("inside")
    assert inner.training and inner[0].training and not inner[1].training


def test_written_windows_can_be_trained_on(model, tokenizer):
    tokens = self_windows(model, tokenizer, windows=1, length=8, seed=0)
    assert not tokens.is_inference()
    model(input_ids=tokens, use_cache=False).logits.sum().backward()
    model.zero_grad()


def test_progress_counts_sampled_tokens_up_to_the_total(model, tokenizer):
    steps = []
    self_windows(model, tokenizer, windows=3, length=4, seed=0, batch=2, progress=lambda *step: steps.append(step))
    assert steps == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize(
    "bos, config_bos, eos, start",
    [(BOS, 5, 6, BOS), (None, 5, 6, 5), (None, None, 6, 6), (None, 0, None, 0)],
)
def test_the_start_token_is_bos_then_the_configs_then_eos(bos, config_bos, eos, start):
    model = tiny_model(bos_token_id=config_bos)
    special = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    assert start_token_of(special, model.config) == start


def test_without_a_tokenizer_the_configs_start_token_serves(model, tokenizer):
    size = {"windows": 2, "length": 8, "seed": 0}
    assert torch.equal(self_windows(tiny_model(bos_token_id=BOS), None, **size), self_windows(model, tokenizer, **size))


def test_without_a_start_token_nothing_is_written():
    model = tiny_model(bos_token_id=None)
    with pytest.raises(ValueError, match="bos_token_id and eos_token_id are None"):
        start_token_of(SimpleNamespace(bos_token_id=None, eos_token_id=None), model.config)


def test_a_start_token_beyond_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="below the model's vocabulary size 100, got 256"):
        self_windows(tiny_model(vocab_size=100), tokenizer, windows=1, length=4, seed=0)


@pytest.mark.parametrize(
    "change, numbers",
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2 tokens, .* got 1"),
        ({"length": 65}, "seq_len must be at most the model's 64 positions, got 65"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(model, tokenizer, change, numbers):
    size = {"windows": 2, "length": 8, "seed": 0} | change
    with pytest.raises(ValueError, match=numbers):
        self_windows(model, tokenizer, **size)


def test_logits_that_are_not_finite_are_refused(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="got 2 NaN or infinite values of 514 at token 1"):
        self_windows(model, tokenizer, windows=2, length=8, seed=0)


# ---- the cache ------------------------------------------------------------------------------------------


@pytest.fixture
def write(model, tokenizer, tmp_path, monkeypatch):
    """``cached_self_windows`` of the tiny model in an empty cache; ``write.loads`` counts loaded models."""
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))

    def load_model():
        write.loads += 1
        return model

    def write(**changes):
        settings = {"fingerprint": "abc", "dtype": torch.float32, "windows": 2, "length": 8, "seed": 0}
        return cached_self_windows(load_model, tokenizer, model.config, **settings | changes)

    write.loads = 0
    return write


def test_the_second_run_reads_the_cache_and_loads_no_model(write, model, tokenizer):
    first = write()
    assert torch.equal(first, self_windows(model, tokenizer, windows=2, length=8, seed=0))
    assert torch.equal(write(), first) and write().dtype == torch.int64
    assert write.loads == 1
    (file,) = cache_dir().iterdir()  # and nothing temporary beside it
    assert file.suffix == ".safetensors" and torch.equal(load_file(file)["tokens"], first)


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "abd"}, {"windows": 3}, {"length": 9}, {"seed": 1}, {"batch": 1}, {"temperature": 0.9}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_has_its_own_file(write, change):
    write()
    write(**change)
    assert write.loads == 2 and len(list(cache_dir().iterdir())) == 2


def test_another_dtype_or_start_token_has_its_own_file(write, tokenizer, model):
    write()
    half = tiny_model().to(torch.bfloat16)
    settings = {"fingerprint": "abc", "windows": 2, "length": 8, "seed": 0}
    cached_self_windows(lambda: half, tokenizer, half.config, dtype=torch.bfloat16, **settings)
    tokenizer.bos_token = "a"
    started = cached_self_windows(lambda: model, tokenizer, model.config, dtype=torch.float32, **settings)
    assert (started[:, 0] == tokenizer.bos_token_id).all() and tokenizer.bos_token_id != BOS
    assert len(list(cache_dir().iterdir())) == 3


@pytest.mark.parametrize(
    "damage, reason",
    [
        (b"", "not a file of tokens"),
        (b"\xff" * 100, "not a file of tokens"),
        ({"text": torch.zeros(2, 8, dtype=torch.int64)}, "not a file of tokens"),
        ({"tokens": torch.zeros(2, 7, dtype=torch.int64)}, r"is torch.int64 of shape \(2, 7\)"),
        ({"tokens": torch.zeros(2, 8)}, r"is torch.float32 of shape \(2, 8\)"),
        ({"tokens": torch.full((2, 8), BYTES + 1)}, "must be 0 .. 256, are 257 .. 257"),
        ({"tokens": torch.full((2, 8), -1)}, "must be 0 .. 256, are -1 .. -1"),
    ],
    ids=["empty", "garbage", "name", "shape", "dtype", "above", "below"],
)
def test_a_corrupt_cache_is_logged_and_written_again(write, caplog, damage, reason):
    first = write()
    (file,) = cache_dir().iterdir()
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        save_file(damage, file)
    assert torch.equal(write(), first) and write.loads == 2
    (record,) = [record for record in caplog.records if record.name == "lorq.models.self_text"]
    assert record.levelname == "WARNING" and re.search(f"corrupt.*{reason}", record.getMessage())
    assert torch.equal(load_file(file)["tokens"], first)


def test_a_write_that_fails_leaves_nothing_behind(write, monkeypatch):
    monkeypatch.setattr(selftext.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(cache_dir().iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_fails_before_the_model_is_loaded(write, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError) as caught:
        write()
    assert "set LORQ_CACHE" in caught.value.__notes__[0] and write.loads == 0


def test_the_stated_dtype_and_fingerprint_are_checked(write):
    with pytest.raises(ValueError, match=r"stated, torch\.float16, got torch\.float32"):
        write(dtype=torch.float16)
    with pytest.raises(ValueError, match="fingerprint must identify the model, got ''"):
        write(fingerprint="")


def test_the_cache_lies_in_the_home_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORQ_CACHE", "")
    assert cache_dir() == tmp_path / ".cache" / "lorq"
    monkeypatch.setenv("LORQ_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
