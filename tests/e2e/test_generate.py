"""What `generate` writes, and what it leaves behind."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import BOS, byte_tokenizer
from tokenizers import processors

import lorq
from lorq.generation import _read_prompt
from lorq.kernels import cpu
from lorq.models.windows import Encoder

PROMPT = "One, two, three,"


@pytest.fixture(scope="module")
def folder(folder_of, tmp_path_factory):
    """Whole numbers under group scales, which C++ kernels multiply, not to be changed."""
    out = tmp_path_factory.mktemp("generate") / "out"
    lorq.quantize(folder_of("llama"), out, lorq.Nearest(bits=4, group_size=32))
    return out


def first_logits(model):
    """Logits of the prompt's last token, as `evaluate` has them."""
    with torch.inference_mode():
        inputs = transformers.AutoTokenizer.from_pretrained(model.name_or_path)(PROMPT, return_tensors="pt")
        return model(input_ids=inputs["input_ids"], use_cache=False).logits[0, -1]


def seen_logits(monkeypatch):
    """Logits of each pass of models that `generate` loads."""
    seen, load = [], lorq.load

    def watched(*arguments, **options):
        model = load(*arguments, **options)
        model.register_forward_hook(lambda *call: seen.append(call[-1].logits[0, -1]))
        return model

    monkeypatch.setattr("lorq.runtime.hf.load", watched)
    return seen


@pytest.mark.skipif(cpu.library()[0] is None, reason="the C++ kernels were not built")
@pytest.mark.parametrize("products", cpu.PRODUCTS)
def test_products_are_those_that_were_asked_for(products, folder, monkeypatch):
    model = lorq.load(folder)
    exact = first_logits(model)
    with cpu.products(products):
        expected = first_logits(model)
    apart = (expected - exact).abs().max()
    assert apart == 0 if products == "exact" else apart > 1e-2
    seen = seen_logits(monkeypatch)
    list(lorq.generate(folder, PROMPT, tokens=3, chat=False, products=products))
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)  # attention with a cache sums in another order
    assert torch.equal(first_logits(model), exact)


@pytest.mark.skipif(cpu.library()[0] is None, reason="the C++ kernels were not built")
def test_an_answer_that_nobody_reads_on_ends_and_leaves_products_as_they_were(folder, monkeypatch):
    model = lorq.load(folder)
    exact = first_logits(model)
    seen = seen_logits(monkeypatch)
    answer = lorq.generate(folder, PROMPT, tokens=100, chat=False, products="bytes")
    next(answer)
    answer.close()
    written = len(seen)
    assert written < 100
    assert torch.equal(first_logits(model), exact)
    assert len(seen) == written


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A"])
def test_a_prompt_to_be_continued_does_not_end_with_what_the_tokenizer_appends(template):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    start = (BOS,) if "<s>" in template else ()
    for prompt in ("Hello", "Hello</s>"):  # which is the user's own
        inputs = _read_prompt(Encoder(tokenizer, start, 300), prompt, chat=True)
        assert inputs["input_ids"].tolist() == [[*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]]
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    with pytest.raises(ValueError, match="at least one token, got an empty one") if not start else nullcontext():
        assert _read_prompt(Encoder(tokenizer, start, 300), "", chat=True)["input_ids"].tolist() == [[BOS]]


def test_a_model_that_ends_at_once_says_so(folder, monkeypatch, caplog):
    load = lorq.load

    def favour_the_end(*call):
        call[-1].logits[..., BOS] = 1e9

    def ends(*arguments, **options):
        model = load(*arguments, **options)
        model.generation_config.eos_token_id = BOS
        model.register_forward_hook(favour_the_end)
        return model

    monkeypatch.setattr("lorq.runtime.hf.load", ends)
    caplog.set_level("INFO", "lorq")
    assert "".join(lorq.generate(folder, PROMPT, tokens=4, chat=False)) == ""
    assert "the model ended at once: its first token was the end token" in caplog.text
