"""Training: gradients through the rounding, the data it reads, the loop, and what it leaves behind when it fails."""

import copy
import dataclasses
import inspect
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import Straight, logits, packed_model, tiny_model

from lorq import adapt
from lorq.adapt import Settings, train
from lorq.adapt.adapters import adapters_of, attach, load_adapter, save_adapter, use_adapter
from lorq.adapt.qat import TrainableLinear, cancel_qat, finish_qat, prepare_qat
from lorq.adapt.rounded import FakeQuantized, Rounding
from lorq.adapt.training import read_dataset
from lorq.core.activations import Activations
from lorq.core.codes import LevelCodes, LevelFormat, LevelGrid, LowRankScale, level_values, levels
from lorq.core.weight import QuantizedWeight
from lorq.kernels import KERNELS
from lorq.kernels.reference import quant_linear_reference
from lorq.runtime.linear import QuantLinear

GRIDS = [("normal-float", 2), ("normal-float", 4), ("integer", 3), ("integer", 4)]
grids = pytest.mark.parametrize("kind, bits", GRIDS, ids=lambda value: str(value))


def pack(weight, *, rank=2, bits=4, grid="normal-float", bias=None, activations=None):
    """A weight on scales that fit its rows, with a little of rank ``rank`` besides; nearest codes."""
    generator = torch.Generator().manual_seed(7)
    out, in_ = weight.shape
    left, right = torch.randn(out, rank, generator=generator) / 50, torch.randn(rank, in_, generator=generator) / 2
    left[:, 0] = weight.abs().amax(1) / float(levels(grid, bits)[-1])
    right[0] = 1.0
    factors = LowRankScale(left.half(), right.half())
    codes = LevelGrid(bits, grid).encode(weight, factors.dense()).to(torch.uint8)
    stored = LevelCodes(codes, factors, LevelFormat(bits, grid, in_, rank))
    solved = QuantizedWeight(stored, activations=activations or Activations())
    return QuantLinear.from_weight(solved, bias).requires_grad_(False)


@pytest.fixture(scope="module")
def quantized():
    """A tiny language model with packed layers, not to be changed."""
    return packed_model(pack)


@pytest.fixture
def lords(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture
def windows(generator):
    return torch.randint(0, 256, (6, 12), generator=generator)


QUICK = {"steps": 3, "batch": 2, "learning_rate": 1e-3}


# ---- through the rounding ---------------------------------------------------------------------------------


def drawn(kind, bits, generator, shape=(12, 20), rank=3):
    """Weights and factors, float64: scales of both signs, quotients inside, a little and far outside the levels."""
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    table = levels(kind, bits).double()
    scale = left @ right
    quotient = torch.empty(shape, dtype=torch.float64).uniform_(1.6 * table[0], 1.6 * table[-1], generator=generator)
    assert (scale < 0).any() and (scale > 0).any() and (quotient > table[-1]).any() and (quotient < table[0]).any()
    return quotient * scale, left, right


def fake_lords(w, left, right, grid):
    """A weight rounded under scales of low rank."""
    format = LevelFormat(grid.bits, grid.kind, w.shape[1], left.shape[1])
    return FakeQuantized.apply(w, Rounding(format), left, right)


def by_autograd(function, parts, seed):
    """The value and the gradients of the same parts, copied."""
    copies = [part.detach().clone().requires_grad_() for part in parts]
    value = function(*copies)
    value.backward(seed)
    return value.detach(), [part.grad for part in copies]


def test_integer_gradients_are_those_of_the_authors_code(generator):
    """W^ = (clamp(round(W / |B A| + 8), 0, 15) - 8) |B A|: the level is rounded first and clamped then."""
    _, left, right = (part.abs() for part in drawn("integer", 4, generator))
    w = torch.empty(12, 20, dtype=torch.float64).uniform_(-10, 9, generator=generator) * (left @ right)
    seed = torch.randn(12, 20, generator=generator, dtype=torch.float64)

    def theirs(w, left, right):
        s = (left @ right).abs().clamp(min=1e-8)
        level = w / s + 8
        return (Straight.apply(level, level.round()).clamp(0, 15) - 8) * s

    parts = (w, left, right)
    value, expected = by_autograd(theirs, parts, seed)
    mine, found = by_autograd(lambda *p: fake_lords(*p, LevelGrid(4, "integer")), parts, seed)
    torch.testing.assert_close(mine, value)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    past = (w / (left @ right) > 7) & (w / (left @ right) < 7.5)
    assert past.any() and torch.equal(found[0][past], seed[past])


@grids
def test_gradients_are_those_of_the_levels_and_one_more_on_each_side_clamped(kind, bits, generator):
    """As for integers, whose next level is a step away: the nearest of these first, then back to the outermost."""
    table = levels(kind, bits).double()
    more = torch.cat([2 * table[:1] - table[1:2], table, 2 * table[-1:] - table[-2:-1]])
    parts = drawn(kind, bits, generator)
    seed = torch.randn(12, 20, generator=generator, dtype=torch.float64)

    def formula(w, left, right):
        scale = left @ right
        quotient = w / scale
        nearest = more[(quotient.detach().unsqueeze(-1) - more).abs().argmin(-1)]
        return Straight.apply(quotient, nearest).clamp(table[0], table[-1]) * scale

    value, expected = by_autograd(formula, parts, seed)
    mine, found = by_autograd(lambda *p: fake_lords(*p, LevelGrid(bits, kind)), parts, seed)
    torch.testing.assert_close(mine, value)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@grids
def test_the_scales_slope_outside_the_levels_is_the_finite_difference(kind, bits, generator):
    """There the outermost level stays the nearest, and nothing is straight through: the function is that smooth."""
    grid, table = LevelGrid(bits, kind), levels(kind, bits).double()
    _, left, right = drawn(kind, bits, generator)
    side = torch.where(torch.rand(12, 20, generator=generator) < 0.5, table[0] * 1.6, table[-1] * 1.6)
    w = (left @ right) * side
    parts = [w.requires_grad_(), left.requires_grad_(), right.requires_grad_()]
    seed = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    fake_lords(*parts, grid).backward(seed)
    for part in parts:
        step = 1e-6 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (
                fake_lords(*(p + sign * step if p is part else p for p in parts), grid) for sign in (1, -1)
            )
        torch.testing.assert_close((part.grad * step).sum(), ((ahead - behind) * seed).sum() / 2, rtol=1e-6, atol=1e-14)


@grids
def test_with_codes_that_stay_the_formula_is_smooth_but_for_what_goes_straight_through(kind, bits, generator):
    """Away from the boundaries d(levels[q] S) = levels[q] dS; straight through adds (dW - (W / S) dS) inside."""
    grid, table = LevelGrid(bits, kind), levels(kind, bits).double()
    _, left, right = drawn(kind, bits, generator)
    codes = torch.randint(0, 2**bits, (12, 20), generator=generator)
    gaps = table.diff().min() / 4
    scale = left @ right
    inward = torch.where(codes == 0, 1.0, -1.0)
    parts = [(scale * (table[codes] + gaps * inward)).requires_grad_(), left.requires_grad_(), right.requires_grad_()]
    seed = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    fake_lords(*parts, grid).backward(seed)
    steps = [1e-7 * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts]
    with torch.no_grad():
        ahead, behind = (
            fake_lords(*(p + s * step for p, step in zip(parts, steps, strict=True)), grid) for s in (1, -1)
        )
        slope = (ahead - behind) / 2
        d_scale = steps[1] @ parts[2] + parts[1] @ steps[2]
        through = steps[0] - parts[0] / scale * d_scale
        expected = ((slope + through) * seed).sum()
        found = sum((part.grad * step).sum() for part, step in zip(parts, steps, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


@grids
def test_the_rounded_weight_has_the_codes_of_the_grid(kind, bits, generator):
    grid = LevelGrid(bits, kind)
    w, left, right = (part.float() for part in drawn(kind, bits, generator))
    scale = left @ right
    expected = level_values(grid.encode(w, scale), kind, bits) * scale
    assert torch.equal(fake_lords(w, left, right, grid), expected)


def test_scales_of_zero_give_zeros_and_finite_gradients():
    w = torch.randn(4, 6).requires_grad_()
    left, right = torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    out = fake_lords(w, left, right, LevelGrid(4, "normal-float"))
    assert out.count_nonzero() == 0
    out.backward(torch.ones(4, 6))
    assert all(torch.isfinite(part.grad).all() for part in (w, left, right))
    assert left.grad.norm() > 0  # so that they can come back


def test_the_backward_pass_keeps_the_weight_and_two_thin_factors(generator):
    w, left, right = (part.float().requires_grad_() for part in drawn("integer", 4, generator))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_lords(w, left, right, LevelGrid(4, "integer"))
    assert sorted(t.numel() for t in kept) == sorted([12 * 20, 12 * 3, 3 * 20])
    assert any(t.data_ptr() == w.data_ptr() for t in kept)


# ---- layers in training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "activations",
    [
        Activations(),
        Activations("token", "token"),
        Activations("tensor", "none", torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32)),
    ],
    ids=["none", "token", "tensor"],
)
@pytest.mark.parametrize("bias", [False, True])
@grids
def test_a_layer_computes_the_same_before_in_and_after_training(
    kind, bits, activations, bias, dtype, generator, monkeypatch
):
    # Training rounds the weight to the inputs' type, as the reference does; the C++ kernels, compared with that
    # elsewhere, do not.
    product = dataclasses.replace(KERNELS["cpu"].products["quant_linear"], multiply=quant_linear_reference)
    monkeypatch.setitem(KERNELS, "cpu", dataclasses.replace(KERNELS["cpu"], products={"quant_linear": product}))
    bias = torch.randn(24, generator=generator).to(dtype) if bias else None
    layer = pack(torch.randn(24, 16, generator=generator), bits=bits, grid=kind, bias=bias, activations=activations)
    layer = layer.to(dtype) if bias is not None else layer
    x = torch.randn(2, 5, 16, generator=generator).to(dtype)
    training = TrainableLinear(layer, layer.value().dense())
    assert torch.equal(training(x), layer(x))
    assert torch.equal(training.finished().weight_packed, layer.weight_packed)
    with torch.no_grad():
        for part in (training.weight, training.scale_left, training.scale_right):
            part += 0.05 * torch.randn(part.shape, generator=generator)
    after = training.finished()
    assert torch.equal(after(x), training(x)) and not torch.equal(after(x), layer(x))
    assert after.format == layer.format and not after.training == training.train(False).finished().training
    if bias is not None:
        assert after.bias.dtype == dtype and torch.equal(after.bias, bias)


def test_a_layer_starts_from_the_originals_weight_with_nearest_codes(generator):
    weight = torch.randn(24, 16, generator=generator)
    layer = pack(weight)
    training = TrainableLinear(layer, weight)
    assert torch.equal(training.quantized(), layer.value().dense())  # whose codes are the nearest too
    assert torch.equal(training.weight, weight)


def test_unfinished_models_are_not_saved_and_finished_ones_have_no_adapters(lords, tmp_path):
    attach(lords, "one")
    expected = logits(lords)
    prepare_qat(lords)
    torch.testing.assert_close(logits(lords), expected, rtol=1e-2, atol=0.1)  # codes of float16 factors
    with pytest.raises(ValueError, match=r"a model in training is not saved, got the folder .*x'; finish_qat"):
        lords.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="no packed layers"):
        prepare_qat(lords)
    training = logits(lords)
    finish_qat(lords)
    assert torch.equal(logits(lords), training)
    assert list(adapters_of(lords).known) == ["base"]
    assert not any(p.requires_grad for p in lords.parameters())


def test_cancelling_puts_everything_back(lords):
    attach(lords, "one", rank=4)
    layers = {n: m for n, m in lords.named_modules() if isinstance(m, QuantLinear)}
    expected = logits(lords)
    prepare_qat(lords)
    cancel_qat(lords)
    assert {n: m for n, m in lords.named_modules() if isinstance(m, QuantLinear)} == layers
    assert torch.equal(logits(lords), expected) and adapters_of(lords).active == "one"


@pytest.mark.parametrize("part, message", [("weight", "weights must be finite"), ("scale_left", "finite in float16")])
def test_what_is_not_finite_is_not_packed(lords, part, message):
    prepare_qat(lords)
    layer = lords.model.layers[1].mlp.down_proj
    getattr(layer, part).data[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=message):
        finish_qat(lords)
    assert all(isinstance(block.mlp.up_proj, TrainableLinear) for block in lords.model.layers)


# ---- the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, rate", [("peft", 2e-2), ("qat", 1e-2)])
def test_losses_fall_and_only_what_trains_changes(lords, windows, mode, rate):
    before, frozen = logits(lords), {n: p.clone() for n, p in lords.named_parameters()}
    calls = []
    done = train(
        lords, windows, mode, steps=25, batch=3, learning_rate=rate, scale_rate=1.0, progress=lambda *c: calls.append(c)
    )
    assert len(done.losses) == 25 and done.losses[-1] < 0.7 * done.losses[0]
    assert calls == [("train", step, 25) for step in range(26)]
    assert not torch.equal(logits(lords), before)
    for name, parameter in frozen.items():
        assert torch.equal(lords.get_parameter(name), parameter)
    scales, weights = (
        2 * 2 * (16 + 16 + 8 + 16 + 8 + 16 + 16 + 16 + 3 * 40),
        2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24),
    )
    assert done.parameters == (scales if mode == "peft" else scales + weights)
    assert not lords.training and not any(p.requires_grad for p in lords.parameters())
    if mode == "peft":
        use_adapter(lords)
        assert torch.equal(logits(lords), before)


def test_weights_join_after_the_steps_of_the_scales(lords, windows):
    seen = []

    def watch(stage, done, total):
        layer = lords.model.layers[0].mlp.down_proj
        seen.append([part.detach().clone() for part in (layer.weight, layer.scale_left, layer.scale_right)])

    train(lords, windows, "qat", steps=5, scale_steps=3, batch=3, learning_rate=1e-2, progress=watch)
    moved = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(seen)]
    assert moved == [[False, True, True]] * 3 + [[True, True, True]] * 2


@pytest.mark.parametrize("mode", ["peft", "qat"])
def test_the_first_loss_is_the_quantized_models_own(lords, windows, mode):
    with torch.no_grad():
        expected = lords(windows, labels=windows).loss
    losses = train(lords, windows, mode, steps=1, batch=6).losses
    assert losses[0] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("mode", ["peft", "qat"])
def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_generator_alone(quantized, windows, mode):
    def run(**settings):
        model = copy.deepcopy(quantized)
        model.config.attention_dropout = 0.3
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.3
        before = torch.get_rng_state()
        losses = train(model, windows, mode, **QUICK, **settings).losses
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)  # somebody draws in between
        return losses, logits(model)

    (first, result), (again, same), (other, _) = run(), run(), run(seed=1)
    assert first == again != other and torch.equal(result, same)


def test_a_rank_of_an_adapter_is_drawn_from_the_seed(quantized, windows):
    rows = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(quantized)
        train(model, windows, rank=4, seed=seed, steps=1, learning_rate=1e-9)
        rows.append(model.model.layers[0].mlp.up_proj.scale_right.detach()[2:])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_gradient_checkpointing_changes_no_loss_and_is_off_afterwards(quantized, windows):
    def run(**settings):
        model = copy.deepcopy(quantized)
        losses = train(model, windows, **QUICK, **settings).losses
        assert not model.is_activation_checkpointing
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == pytest.approx(run(gradient_checkpointing=True), rel=1e-6)


def test_a_batch_of_unequal_lengths_has_the_mean_loss_of_its_tokens(lords, generator):
    examples = [{"input_ids": torch.randint(0, 256, (n,), generator=generator)} for n in (5, 12, 9)]
    with torch.no_grad():
        parts = [
            lords(e["input_ids"][None], labels=e["input_ids"][None]).loss * (len(e["input_ids"]) - 1) for e in examples
        ]
    expected = float(sum(parts)) / (4 + 11 + 8)
    assert train(lords, examples, steps=1, batch=3).losses[0] == pytest.approx(expected, rel=1e-5)


def test_labels_of_minus_100_do_not_count(lords, generator):
    ids = torch.randint(0, 256, (2, 10), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    with torch.no_grad():
        chances = lords(ids).logits[:, 5:-1].log_softmax(-1)
    expected = -chances.gather(-1, ids[:, 6:, None]).mean()
    examples = [{"input_ids": i.tolist(), "labels": l.tolist()} for i, l in zip(ids, labels, strict=True)]
    assert train(lords, examples, steps=1, batch=2).losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_an_adapter_trains_on_where_it_was(lords, windows):
    first = train(lords, windows, name="mine", rank=4, steps=20, learning_rate=2e-2).losses
    learned = logits(lords)
    use_adapter(lords)
    second = train(lords, windows, name="mine", steps=5, learning_rate=1e-9).losses
    assert torch.allclose(logits(lords), learned, atol=1e-4)
    assert second[0] < 0.8 * first[0]
    message = r"'mine' goes on with the rank it has, 4 in model\.layers\.0\.self_attn\.q_proj, got 3"
    with pytest.raises(ValueError, match=message):
        train(lords, windows, name="mine", rank=3, **QUICK)


def test_qat_starts_from_the_adapter_in_use(lords, windows):
    train(lords, windows, rank=4, steps=10, learning_rate=2e-2)
    with torch.no_grad():
        expected = float(lords(windows, labels=windows).loss)
    losses = train(lords, windows, "qat", steps=2, batch=6, learning_rate=1e-5).losses
    assert losses[0] == pytest.approx(expected, rel=1e-2)
    assert lords.model.layers[0].mlp.up_proj.format.codes.scale_rank == 4
    assert list(adapters_of(lords).known) == ["base"]


@pytest.mark.parametrize("mode", ["peft", "qat"])
def test_an_interrupt_keeps_what_was_learned_so_far(quantized, windows, mode):
    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    model, whole = copy.deepcopy(quantized), copy.deepcopy(quantized)
    with pytest.raises(KeyboardInterrupt):
        train(model, windows, mode, steps=20, learning_rate=1e-2, progress=stop)
    assert not model.training and all(isinstance(b.mlp.up_proj, QuantLinear) for b in model.model.layers)
    assert torch.isfinite(logits(model)).all() and not torch.equal(logits(model), logits(quantized))
    train(whole, windows, mode, steps=20, learning_rate=1e-2)
    assert not torch.equal(logits(model), logits(whole))
    assert len(train(model, windows, mode, **QUICK).losses) == 3


@pytest.mark.parametrize("mode", ["peft", "qat"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "trained on"])
def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(lords, windows, mode, old, monkeypatch):
    if old:
        train(lords, windows, **QUICK)
    expected, known = logits(lords), list(adapters_of(lords).known)

    def step(optimizer, *args, **kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule wonders about the optimizer
            with pytest.raises(
                ArithmeticError, match=r"finite, got nan at step 2 of 3; lower learning_rate, which is 0\.00[14]$"
            ):
                train(lords, windows, mode, **QUICK)
    assert torch.equal(logits(lords), expected) and list(adapters_of(lords).known) == known
    assert not lords.training and not any(p.requires_grad for p in lords.parameters())
    assert all(torch.isfinite(torch.tensor(train(lords, windows, mode, **QUICK).losses)))


@pytest.mark.parametrize("mode", ["peft", "qat"])
def test_a_gradient_that_is_not_finite_is_not_followed(lords, windows, mode):
    expected = logits(lords)

    def spoil(module, into, out):
        return (torch.full_like(into[0], torch.inf), *into[1:])

    hook = lords.model.layers[1].mlp.act_fn.register_full_backward_hook(spoil)
    with pytest.raises(ArithmeticError, match=r"the norm of its gradient must be finite, got (nan|inf) at step 1 of 3"):
        train(lords, windows, mode, **QUICK)
    hook.remove()
    assert torch.equal(logits(lords), expected) and list(adapters_of(lords).known) == ["base"]


def test_what_does_not_fit_float16_at_the_end_is_not_kept(lords, windows):
    expected = logits(lords)

    def grown(_, done, steps):
        if done == steps:
            lords.model.layers[0].mlp.up_proj.scale_left.data.fill_(7e4)

    with pytest.raises(ArithmeticError, match="finite in float16"):
        train(lords, windows, "qat", steps=1, progress=grown)
    assert torch.equal(logits(lords), expected)


# ---- the data ---------------------------------------------------------------------------------------------


class ByIndex:
    """A data set as torch has them: no iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index >= len(self.rows):
            raise RuntimeError("beyond the end")
        return {"input_ids": self.rows[index]}


def test_data_sets_come_as_windows_lists_mappings_and_by_index(lords, windows):
    expected = [row.tolist() for row in windows]
    rows = [{"input_ids": row[None], "labels": row[None]} for row in windows]  # as a tokenizer's tensors are
    given = (windows, expected, (row for row in windows), rows, ByIndex(windows), [{"input_ids": r} for r in expected])
    for dataset in given:
        found = read_dataset(lords, dataset, Settings())
        assert [e["input_ids"].tolist() for e in found] == [e["labels"].tolist() for e in found] == expected


def test_tokens_behind_the_mask_are_left_out(lords):
    example = {"input_ids": [0, 0, 7, 8, 9, 0], "attention_mask": [0, 0, 1, 1, 1, 0], "labels": [0, 0, 7, -100, 9, 0]}
    (found,) = read_dataset(lords, [example], Settings())
    assert found["input_ids"].tolist() == [7, 8, 9] and found["labels"].tolist() == [7, -100, 9]


IDS = [1, 2, 3]
DATA = {
    "nothing": ([], ValueError, "at least 1 example, got 0"),
    "a number": (7, TypeError, "must be a text, windows of tokens or examples, got int"),
    "no input_ids": ([{"text": "x", "n": 1}], ValueError, "example 0 .* must have input_ids, got text, n; tokenize"),
    "texts": (["one", "two"], ValueError, "example 0 .* must have input_ids, got 'one'; tokenize it first"),
    "one token": ([IDS, [5]], ValueError, "example 1 .* at least 2 tokens and a label after the first, got 1 tokens"),
    "no tokens": ([[]], ValueError, "example 0 .* at least 2 tokens and a label .*, got 0 tokens"),
    "a row of numbers": (torch.tensor(IDS), ValueError, r"example 0 .* one sequence of tokens, .* got shapes \[\(\), "),
    "a batch": ([{"input_ids": [IDS, IDS]}], ValueError, r"one sequence of tokens, .* got shapes \[\(2, 3\)"),
    "labels of another length": (
        [{"input_ids": IDS, "labels": [1, 2]}], ValueError, r"got shapes \[\(3,\), \(2,\), \(3,\)\]",
    ),
    "no label": (
        [{"input_ids": IDS, "labels": [4, -100, -100]}], ValueError, "label after the first, got 3 tokens and 1 labels",
    ),
    "too long": ([list(range(65))], ValueError, "example 0 .* as the model has positions, 64, got 65"),
    "beyond the vocabulary": ([[1, 257]], ValueError, "the model's vocabulary, 0 to 256, got 1 to 257"),
    "below zero": ([[-1, 5]], ValueError, "the model's vocabulary, 0 to 256, got -1 to 5"),
}  # fmt: skip


@pytest.mark.parametrize("data", list(DATA))
def test_data_that_cannot_be_trained_on_is_refused_before_the_model_is_touched(lords, data):
    dataset, kind, message = DATA[data]
    with pytest.raises(kind, match=message):
        train(lords, dataset, **QUICK)
    assert list(adapters_of(lords).known) == ["base"]


# ---- mistakes ---------------------------------------------------------------------------------------------

MISTAKES = {
    "mode": (("lora", {}), ValueError, "mode must be peft or qat, got 'lora'"),
    "reference": (("peft", {"reference": Path("x")}), ValueError, "reference serves mode qat, got 'x' with mode peft"),
    "rank": (("qat", {"rank": 4}), ValueError, "rank serves mode peft, got 4 with mode qat"),
    "name": (("qat", {"name": "x"}), ValueError, "name serves mode peft, got 'x' with mode qat"),
    "rank too large": (("peft", {"rank": 17}), ValueError, "at most a layer's smaller side, got 17: .* with rank 2"),
    "rank too small": (("peft", {"rank": 1}), ValueError, "must be at least the base's .*, got 1: .* with rank 2"),
    "rank 0": (("peft", {"rank": 0}), ValueError, "rank must be at least 1, or -1 for each layer's own, got 0"),
    "the base": (("peft", {"name": "base"}), ValueError, "the base itself cannot train"),
    "steps": (("peft", {"steps": 0}), ValueError, "steps must be at least 1, got 0"),
    "batch": (("peft", {"batch": 0}), ValueError, "batch must be at least 1, got 0"),
    "seq_len": (("peft", {"seq_len": 1}), ValueError, "seq_len must be at least 2, got 1"),
    "rate": (("peft", {"learning_rate": -1.0}), ValueError, "learning_rate must be between 0 and 1, got -1.0"),
    "rate nan": (("peft", {"learning_rate": float("nan")}), ValueError, "learning_rate must be .*, got nan"),
    "scale rate": (("qat", {"scale_rate": 2000.0}), ValueError, "scale_rate must be between 0 and 1000, got 2000"),
    "scale steps": (("qat", {"steps": 5, "scale_steps": 5}), ValueError, "fewer than the 5 steps, got 5"),
    "scale steps of peft": (("peft", {"scale_steps": 2}), ValueError, "scale_steps serves mode qat, got 2"),
    "warmup": (("qat", {"warmup": 1.5}), ValueError, "warmup must be between 0 and 1, got 1.5"),
    "seed": (("qat", {"seed": 2**63}), ValueError, "seed must be between 0 and .*807, got 9223372036854775808"),
    "negative seed": (("qat", {"seed": -1}), ValueError, "seed must be between 0 and .*807, got -1"),
    "unknown": (("peft", {"lr": 1, "stps": 2}), TypeError, "unknown settings: lr, stps; known are steps, batch, "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_refused_with_its_number_and_the_model_left_alone(lords, windows, mistake):
    (mode, settings), kind, message = MISTAKES[mistake]
    expected = logits(lords)
    # The functions under the shape check, which would refuse some values before they do.
    with pytest.raises(kind, match=message):
        inspect.unwrap(train)(lords, windows, mode, **settings)
    assert torch.equal(logits(lords), expected) and list(adapters_of(lords).known) == ["base"]


def test_a_model_that_was_not_quantized_with_lords_is_refused_before_the_data_is_read():
    for call in (lambda model: train(model, "no such text"), prepare_qat):
        with pytest.raises(
            ValueError, match=r"only models quantized with lords take adapters, this one has no packed layers"
        ):
            call(tiny_model())


def test_the_module_has_what_its_users_need(lords, windows, tmp_path):
    for name in adapt.__all__:
        assert getattr(adapt, name) is not None
    train(lords, windows, **QUICK)
    save_adapter(lords, tmp_path / "a")
    assert load_adapter(lords, tmp_path / "a") == "a"
