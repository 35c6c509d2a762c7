"""Perplexity, divergence and agreement against loops in float64 and models whose answers are known."""

import json
import math
from types import SimpleNamespace

import helpers
import pytest
import torch

from lorq import quality
from lorq.evaluation import Evaluation
from lorq.quality import divergence, evaluate_model, mean_stderr, token_nll, top1_agreement

VOCABULARY = 40


def tiny_model(seed: int = 0, **changes):
    return helpers.tiny_model(seed, **{"vocab_size": VOCABULARY} | changes).eval()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def windows(generator):
    return torch.randint(VOCABULARY, (5, 12), generator=generator)


def kl_loop(reference, logits):
    """The definition, one token of one row at a time, in float64."""
    result = []
    for a, b in zip(reference.double().tolist(), logits.double().tolist(), strict=True):
        za, zb = math.fsum(math.exp(x) for x in a), math.fsum(math.exp(x) for x in b)
        result.append(
            math.fsum(math.exp(x) / za * ((x - math.log(za)) - (y - math.log(zb))) for x, y in zip(a, b, strict=True))
        )
    return torch.tensor(result)


# ---- divergence -----------------------------------------------------------------------------------------


def test_divergence_is_its_definition_in_the_direction_reference_to_model(generator):
    p, q = torch.randn(2, 9, 30, generator=generator) * 3
    torch.testing.assert_close(divergence(p, q), kl_loop(p, q), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(divergence(p, q), divergence(q, p), rtol=0.01)


def test_divergence_of_two_coins_in_closed_form():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    torch.testing.assert_close(divergence(p.log(), q.log()), torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_from_itself_is_exactly_zero_and_float32(generator, dtype):
    p = (torch.randn(9, 300, generator=generator) * 10).to(dtype)
    assert torch.equal(divergence(p, p), torch.zeros(9))


def test_divergence_does_not_see_a_shift_of_the_logits(generator):
    p, q = torch.randn(2, 9, 30, generator=generator)
    shifted = divergence(p + 100, q - 100)
    # 100 + x keeps x to 4e-6, and the logits enter through differences of two of them.
    torch.testing.assert_close(shifted, divergence(p, q), rtol=1e-4, atol=2e-5)


def test_divergence_survives_logits_that_overflow_exp(generator):
    p, q = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert torch.equal(divergence(p, q), torch.tensor([1000.0]))


def test_divergence_is_never_negative(generator):
    p = torch.randn(500, 200, generator=generator)
    q = p + 1e-6 * torch.randn(500, 200, generator=generator)
    assert (divergence(p, q) >= 0).all()


@pytest.mark.parametrize("logits", [1, 30, 64, 10**9])
def test_chunks_do_not_change_a_result(generator, monkeypatch, logits):
    p, q = torch.randn(2, 9, 30, generator=generator)
    targets = torch.randint(30, (9,), generator=generator)
    whole = divergence(p, q), token_nll(p, targets)
    monkeypatch.setattr(quality, "CHUNK_LOGITS", logits)
    torch.testing.assert_close(divergence(p, q), whole[0])
    torch.testing.assert_close(token_nll(p, targets), whole[1])


def test_a_chunk_of_a_large_vocabulary_is_bounded():
    logits = torch.zeros(1, 1).expand(512, 49_152)  # one number in memory
    sizes = [chunk.numel() for chunk in quality._chunks(logits)]
    assert sum(sizes) == 512 * 49_152
    assert max(sizes) * 4 * 6 <= 200 * 10**6  # six float32 temporaries alive


# ---- negative log-likelihood and agreement --------------------------------------------------------------


def test_nll_is_the_log_of_the_softmax_in_float64(generator):
    logits = torch.randn(9, 30, generator=generator) * 3
    targets = torch.randint(30, (9,), generator=generator)
    expected = -logits.double().softmax(-1)[torch.arange(9), targets].log()
    torch.testing.assert_close(token_nll(logits, targets), expected.float(), rtol=1e-5, atol=1e-6)


def test_nll_of_half_precision_logits_is_computed_in_float32(generator):
    logits = (torch.randn(9, 30, generator=generator) * 3).to(torch.bfloat16)
    targets = torch.randint(30, (9,), generator=generator)
    assert torch.equal(token_nll(logits, targets), token_nll(logits.float(), targets))


def test_agreement_compares_the_first_rank_only():
    reference = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[9.0, 1.0, 2.0], [2.0, 3.0, 1.0], [5.0, 6.0, 7.0]])
    assert top1_agreement(reference, logits).tolist() == [True, False, True]


# ---- evaluate_model -------------------------------------------------------------------------------------


def uniform_model():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(windows):
    result = evaluate_model(uniform_model(), windows)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert (result.kl_mean, result.kl_p99, result.top1, result.kl_stderr) == (None, None, None, None)
    assert result.perplexity_stderr == pytest.approx(0, abs=1e-5)  # every token has the same NLL


def test_a_model_evaluated_against_itself_agrees_everywhere(windows):
    model = tiny_model()
    result = evaluate_model(model, windows, reference=model)
    assert (result.kl_mean, result.kl_p99, result.top1) == (0.0, 0.0, 1.0)


def test_every_number_is_that_of_a_float64_loop_over_all_windows_at_once(windows, generator):
    model, reference = tiny_model(1), tiny_model(1)
    with torch.no_grad():  # close enough for about half of the predictions to agree
        model.lm_head.weight += 0.3 * torch.randn(VOCABULARY, 16, generator=generator)
    result = evaluate_model(model, windows, reference=reference)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].reshape(-1, VOCABULARY).double()
        original = reference(input_ids=windows).logits[:, :-1].reshape(-1, VOCABULARY).double()
    targets = windows[:, 1:].reshape(-1)
    nll = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    kl = sorted(kl_loop(original, logits).tolist())
    place = 0.99 * (len(kl) - 1)  # between two tokens, linearly
    low = math.floor(place)
    p99 = kl[low] + (place - low) * (kl[low + 1] - kl[low])
    assert result.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert result.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    own_nll = -original.log_softmax(-1)[torch.arange(len(targets)), targets]
    by_token = {
        "kl": (kl_loop(original, logits), 1), "perplexity": (nll, nll.mean().exp()),
        "ratio": (nll - own_nll, (nll.mean() - own_nll.mean()).exp()),
    }  # fmt: skip
    for name, (tokens, slope) in by_token.items():  # of the function of the mean that is reported, at the mean
        means = [sum(window) / 11 for window in tokens.double().reshape(5, 11).tolist()]
        spread = sum((mean - sum(means) / 5) ** 2 for mean in means)
        expected = float(slope) * math.sqrt(spread / (5 * 4))
        assert getattr(result, f"{name}_stderr") == pytest.approx(expected, rel=1e-3)
    assert result.kl_p99 == pytest.approx(p99, rel=1e-4)
    assert result.top1 == (logits.argmax(-1) == original.argmax(-1)).double().mean().item()
    assert 0 < result.top1 < 1  # or the comparison before would show nothing


def test_the_standard_error_is_how_far_other_draws_of_windows_come_out(generator):
    # Tokens of a window share most of what they deviate by: as single tokens the error would be four times too small.
    draws = 0.5 * torch.randn(2000, 8, 1, generator=generator) + 0.5 * torch.randn(2000, 8, 32, generator=generator)
    told = torch.tensor([mean_stderr([*draw]) for draw in draws])
    assert told.square().mean().sqrt() == pytest.approx(float(draws.mean((1, 2)).std()), rel=0.05)


def test_one_window_tells_no_standard_error(windows):
    model = tiny_model()
    result = evaluate_model(model, windows[:1], reference=model)
    assert (result.perplexity_stderr, result.kl_stderr, result.ratio_stderr) == (None, None, None)


def test_a_reference_may_be_a_function_of_the_window(windows):
    model, reference = tiny_model(1), tiny_model(2)
    seen = []

    def stored(window):
        seen.append(window.tolist())
        return reference(input_ids=window[None]).logits[0]

    by_function = evaluate_model(model, windows, reference=stored)
    assert by_function == evaluate_model(model, windows, reference=reference)
    assert seen == windows.tolist()


def test_windows_do_not_see_each_other(windows):
    model = tiny_model()
    alone = [evaluate_model(model, windows[i : i + 1]).perplexity for i in range(5)]
    together = evaluate_model(model, windows).perplexity
    assert math.log(together) == pytest.approx(sum(map(math.log, alone)) / 5, rel=1e-6)


def test_dropout_is_off_and_both_models_modes_come_back(windows):
    model, reference = tiny_model(1, attention_dropout=0.5), tiny_model(2, attention_dropout=0.5)
    quiet = evaluate_model(model, windows, reference=reference)
    model.train()
    reference.train()
    assert evaluate_model(model, windows, reference=reference) == quiet
    assert model.training and reference.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_windows(windows):
    steps = []
    evaluate_model(
        uniform_model(),
        windows,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_result_is_a_dict_for_json():
    result = Evaluation(30.5, None, None, None, None, 4.25, 4088, "test.txt", 512, 8, False)
    assert json.loads(json.dumps(result.as_dict())) == {
        "perplexity": 30.5,
        "reference_perplexity": None,
        "kl_mean": None,
        "kl_p99": None,
        "top1": None,
        "bits_per_weight": 4.25,
        "tokens": 4088,
        "text": "test.txt",
        "window": 512,
        "windows": 8,
        "start_token": False,
        "perplexity_stderr": None,
        "kl_stderr": None,
        "ratio_stderr": None,
    }


class Bigrams(torch.nn.Module):
    """A model that sees one token only, so that a broken token breaks no other prediction."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_logits_that_are_not_finite_name_the_model_and_the_window(windows, broken):
    windows = torch.where(windows == 7, 8, windows)
    windows[3, 4] = 7
    models = {"model": Bigrams(), "reference": Bigrams()}
    with torch.no_grad():
        models[broken].table[7, 5] = float("nan")
    with pytest.raises(FloatingPointError, match=f"{broken}, window 3: .* got 1 NaN or infinite values of 480"):
        evaluate_model(**models, windows=windows)


def test_models_of_different_vocabularies_are_refused_with_both_sizes(windows):
    reference = tiny_model(vocab_size=48)
    with pytest.raises(ValueError, match="share a vocabulary, got 40 and 48 tokens"):
        evaluate_model(tiny_model(), windows, reference=reference)


def test_a_reference_function_of_another_length_is_refused(windows):
    def stored(window):
        return torch.zeros(11, VOCABULARY)

    with pytest.raises(ValueError, match=r"reference, window 0: .* length 12, got \(11, 40\)"):
        evaluate_model(tiny_model(), windows, reference=stored)


@pytest.mark.parametrize("shape", [(0, 12), (5, 1)])
def test_nothing_to_predict_is_refused(shape):
    windows = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"got {shape[0]} windows of {shape[1]}"):
        evaluate_model(tiny_model(), windows)
