"""Gradients weigh tokens: block by block as torch's autograd has them through the whole model, and into statistics."""

import pytest
import torch
from helpers import BOS, Recorder, byte_tokenizer, folder_digests, inputs_of, tiny_folder
from kinds import EXCLUDED, MODELS, kind_folder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lorq
from lorq.core.problem import layer_generator
from lorq.models import backward
from lorq.models.blocks import StreamedModel
from lorq.models.windows import Encoder, text_windows
from lorq.pipeline.check_walk import check_walk
from lorq.pipeline.gradients import token_gradients
from lorq.pipeline.options import Options
from lorq.pipeline.plan import make_plan
from lorq.progress import WEIGH, WEIGH_BACK, WEIGH_END, no_progress

SMALL = {"samples": 4, "seq_len": 32}
TOKENS = 4 * 32
GRADIENT = {"token_weights": "gradient"}


def windows_of(seed):
    return torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(seed))


def planned(folder, kind, **options):
    model = StreamedModel.open(folder)
    plan = make_plan(model, lorq.GPTQ(group_size=-1), Options(**GRADIENT, exclude=EXCLUDED.get(kind, ()), **options))
    return model, check_walk(model, plan, no_progress)


def by_autograd(folder, names, windows, seed=0):
    """Squared gradients at modules' outputs, (tokens, channels) by name, from transformers' own model in one piece."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    outputs, found = {}, {name: [] for name in names}

    def hook(name):
        def look(module, args, out):
            out.requires_grad_() if not out.requires_grad else None
            out.retain_grad()
            outputs.setdefault(name, []).append(out)

        return look

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    for number, window in enumerate(windows):
        outputs.clear()
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        generator = layer_generator(seed, f"next tokens of window {number}")
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
        for name, made in outputs.items():
            for out in made:
                gradient = torch.zeros_like(out) if out.grad is None else out.grad
                found[name].append(gradient.reshape(-1, out.shape[-1]).double().square())
    return {name: torch.cat(parts) for name, parts in found.items()}


KINDS = ["llama", "gpt2", "gemma2", "mixtral", "gpt-oss", "falcon", "gemma4_text", "gemma3n_text", "glm_moe_dsa"]


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_gradients_are_those_of_the_model_in_one_piece(kind, folder_of, tmp_path):
    folder = kind_folder(tmp_path / kind, kind) if kind in MODELS else folder_of(kind)
    model, plan = planned(folder, kind)
    windows, told = windows_of(1), []
    got = token_gradients(model, plan, windows, tmp_path, lambda *step: told.append(step))
    expected = by_autograd(folder, list(got.squared), windows)
    assert got.squared.keys() >= {t.name for t, _ in plan.jobs() if ".experts." not in t.name}
    assert any(float(tokens.std()) for tokens in got.squared.values())
    for name, squares in expected.items():
        tokens, channels = squares.sum(1), squares.mean(0)
        assert got.mean[name] == pytest.approx(float(tokens.mean()), rel=1e-4)
        # float32 through two or four blocks, other sums.
        assert_close(got.squared[name].double() * got.mean[name], tokens, rtol=1e-3, atol=1e-4 * float(tokens.max()))
        if name in got.outputs:
            assert got.outputs[name].mean() == pytest.approx(1)
            assert_close(got.outputs[name].double() * channels.mean(), channels, rtol=1e-3, atol=1e-4 * channels.max())
    assert got.outputs.keys() == {t.name for t, _ in plan.jobs() if ".experts." not in t.name and got.mean[t.name]}
    blocks = len(model.blocks)
    ways = {WEIGH: blocks, WEIGH_END: len(windows), WEIGH_BACK: blocks}
    assert told == [(way, done, count) for way, count in ways.items() for done in range(count + 1)]


def test_what_does_not_fit_in_memory_goes_to_files_that_leave_no_trace(folder_of, tmp_path):
    found = []
    for limit in (0, 1 << 30):
        model, plan = planned(folder_of("llama"), "llama", spill_bytes=limit)
        found.append(token_gradients(model, plan, windows_of(1), tmp_path, no_progress))
    for name, tokens in found[0].squared.items():
        assert torch.equal(tokens, found[1].squared[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text"])
def test_a_head_for_some_positions_at_a_time_is_the_whole_head(kind, folder_of, tmp_path, monkeypatch):
    folder = kind_folder(tmp_path / kind, kind) if kind in MODELS else folder_of(kind)
    model, plan = planned(folder, kind)
    whole = token_gradients(model, plan, windows_of(1), tmp_path, no_progress)
    monkeypatch.setattr(backward, "_LOGITS", 7 * 257)  # 24 positions are 7, 7, 7 and 3
    parts = token_gradients(model, plan, windows_of(1), tmp_path, no_progress)
    for name, tokens in whole.squared.items():
        assert_close(parts.squared[name], tokens, rtol=1e-3, atol=1e-4 * float(tokens.max()))


def test_one_block_at_a_time_has_memory(folder_of, tmp_path, monkeypatch):
    model, plan = planned(folder_of("llama"), "llama")
    real = {"forward": [], "back": []}
    call = model.call

    def look(block, *args):
        way = "back" if torch.is_grad_enabled() else "forward"
        real[way].append(
            {n.split(".")[2] for n, p in model.model.named_parameters() if ".layers." in n and not p.is_meta}
        )
        return call(block, *args)

    monkeypatch.setattr(model, "call", look)
    token_gradients(model, plan, windows_of(1), tmp_path, no_progress)
    assert real == {"forward": [{"0"}] * 3 + [{"1"}] * 3, "back": [{"1"}] * 3 + [{"0"}] * 3}


def test_the_draw_is_the_seeds(folder_of, tmp_path):
    model, plan = planned(folder_of("llama"), "llama")
    first, again = (token_gradients(model, plan, windows_of(1), tmp_path, no_progress) for _ in range(2))
    model, plan = planned(folder_of("llama"), "llama", seed=1)
    other = token_gradients(model, plan, windows_of(1), tmp_path, no_progress)
    for name, tokens in first.squared.items():
        assert torch.equal(tokens, again.squared[name]) and not torch.equal(tokens, other.squared[name])


# ---- into statistics --------------------------------------------------------------------------------------


@pytest.fixture
def recorder():
    Recorder.seen.clear()
    return Recorder(bits=8, group_size=32)


@pytest.fixture
def quantize(text_file):
    def run(source, out, method, **options):
        return lorq.quantize(source, out, method, **{"calibration": str(text_file)} | SMALL | GRADIENT | options)

    return run


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_definition(x, d):
    """``sum d x x^T / n`` and ``sum sqrt(d) |x| / n`` in float64."""
    x, d = x.double(), d.double()
    return (x * d[:, None]).T @ x / len(x), (d.sqrt()[:, None] * x.abs()).mean(0)


def check(stats, x, d):
    hessian, mean_abs = by_definition(x, d)
    assert stats.tokens == len(x)
    # float32 sums over at most 128 tokens, after a block in float32.
    assert_close(stats.hessian.double(), hessian, rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))
    assert_close(stats.mean_abs.double(), mean_abs, rtol=1e-3, atol=1e-5 * float(mean_abs.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_weighs_the_tokens_of_its_input_by_its_own_gradients(
    family, folder_of, recorder, quantize, text_file, tmp_path
):
    folder = folder_of(family)
    quantize(folder, tmp_path / "out", recorder)
    windows = text_windows(str(text_file), Encoder(byte_tokenizer(128), (BOS,), 257), **SMALL).tokens
    names = list(recorder.stats)
    squared = {name: of.sum(1) for name, of in by_autograd(folder, names, windows).items()}
    inputs = inputs_of(dense(folder), names, windows)
    for name, stats in recorder.stats.items():
        assert stats.sensitivity == pytest.approx(float(squared[name].mean()), rel=1e-4)
        check(stats, inputs[name][0], squared[name] / squared[name].mean())
    if family == "llama":
        q, k, o = (recorder.stats[f"model.layers.1.self_attn.{name}_proj"] for name in "qko")
        assert q.input == k.input != o.input and not torch.equal(q.hessian, k.hessian)


def test_an_expert_weighs_tokens_by_the_gradient_of_the_sum_and_the_routers_weight(
    folder_of, recorder, quantize, text_file, tmp_path
):
    folder, path = folder_of("mixtral"), "model.layers.0.mlp.experts"
    windows = text_windows(str(text_file), Encoder(byte_tokenizer(128), (BOS,), 257), **SMALL).tokens
    squared = {path: by_autograd(folder, [path], windows)[path].sum(1)}
    model = dense(folder)
    inputs = inputs_of(model, [path], windows)
    x, index, weights = inputs[path]
    d = squared[path] / squared[path].mean()
    counts = torch.bincount(index.flatten(), minlength=4).tolist()
    ask = sorted(counts)[2]
    report = quantize(folder, tmp_path / "out", recorder, expert_tokens=ask)
    fused = model.model.layers[0].mlp.experts
    for expert in range(4):
        token, place = torch.where(index == expert)
        own = d[token] * weights[token, place].double().square()
        if counts[expert] < ask:  # as if all tokens were routed there, alike
            token, own = torch.arange(TOKENS), d
        gate, up = fused.gate_up_proj[expert].detach().chunk(2)
        middle = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        check(recorder.stats[f"{path}.{expert}.gate_proj"], x[token], own)
        check(recorder.stats[f"{path}.{expert}.down_proj"], middle, own)
        assert recorder.stats[f"{path}.{expert}.up_proj"] is recorder.stats[f"{path}.{expert}.gate_proj"]
        assert recorder.stats[f"{path}.{expert}.up_proj"].sensitivity == pytest.approx(float(squared[path].mean()))
        assert (f"{path}.{expert}" in report.notes) == (counts[expert] < ask)


def test_layers_of_one_input_still_share_a_basis(folder_of, quantize, tmp_path):
    quantize(folder_of("llama"), tmp_path / "out", lorq.LoPRo(bits=3, group_size=32, rank=2, importance="log"))
    model = lorq.load(tmp_path / "out")
    q, k, v = (model.get_submodule(f"model.layers.0.self_attn.{name}_proj") for name in "qkv")
    assert torch.equal(q.permutation, k.permutation) and torch.equal(q.permutation, v.permutation)


def test_a_layer_that_no_gradient_reaches_counts_tokens_alike_and_says_so(
    folder_of, recorder, quantize, text_file, tmp_path
):
    folder = tiny_folder(tmp_path / "dead", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = quantize(folder, tmp_path / "out", recorder)
    dead = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert {l.name for l in report.layers if "no gradient reaches its output" in l.note} == dead
    weighed = dict(recorder.stats)
    quantize(folder, tmp_path / "equal", recorder, token_weights="equal")
    for name, stats in weighed.items():
        same = torch.equal(stats.hessian, recorder.stats[name].hessian)
        assert same == (name in dead) and (stats.sensitivity == 0.0) == (name in dead)


# ---- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_an_interrupted_run_ends_in_the_same_bytes(stream, folder_of, quantize, tmp_path):
    method, source = lorq.GPTQ(bits=3, group_size=32), folder_of("mixtral")
    told = []

    def stop(stage, done, total):
        told.append((stage, done, total))
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    quantize(source, tmp_path / "whole", method, stream=stream)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", method, stream=stream, progress=stop)
    with pytest.raises(ValueError, match=r'token_weights \(folder: "gradient", now: "equal"\)'):
        quantize(source, tmp_path / "out", method, stream=stream, resume=True, token_weights="equal")
    told.clear()
    quantize(source, tmp_path / "out", method, stream=stream, resume=True, progress=lambda *step: told.append(step))
    assert folder_digests(tmp_path / "out") == folder_digests(tmp_path / "whole")
    assert (WEIGH, 2, 2) in told and (WEIGH_BACK, 1, 1) in told  # two blocks forward, the one that is left back


def test_gradients_that_overflow_name_the_layer(folder_of, quantize, tmp_path):
    folder = tiny_folder(tmp_path / "loud", "llama")
    tensors = load_file(folder / "model.safetensors")
    # Forward nothing comes out of the gate; back, its gradient is the product of the other two.
    tensors["model.layers.0.mlp.gate_proj.weight"].zero_()
    for name in ("up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = r"gradients must be finite, got NaN or infinite ones for \d+ of 128 tokens at the output of \S+gate_proj"
    with pytest.raises(FloatingPointError, match=named):
        quantize(folder, tmp_path / "out", lorq.GPTQ(bits=3, group_size=32))


def test_router_weights_would_count_twice(folder_of, quantize, tmp_path):
    with pytest.raises(ValueError, match="token_weights 'gradient' counts a routed token by its squared router weight"):
        quantize(folder_of("mixtral"), tmp_path / "out", lorq.GPTQ(group_size=32), router_weights=True)


def test_files_between_blocks_need_room_on_the_disk(folder_of, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.pipeline.room.require_space", lambda out, size: asked.append(size))
    asked, method = [], lorq.GPTQ(group_size=32)
    for options in (
        {"spill_bytes": 1 << 30},
        {"spill_bytes": 0, "token_weights": "equal"},
        {"spill_bytes": 0, "token_weights": "equal", "stream": "corrected"},
        {"spill_bytes": 0},
        {"spill_bytes": 0, "stream": "corrected"},
    ):
        quantize(folder_of("llama"), tmp_path / "out", method, dry_run=True, **options)
    states = 4 * TOKENS * 64  # float32, of one place
    # One or two streams, and with gradients what enters two blocks and leaves the second.
    assert [size - asked[0] for size in asked[1::2]] == [0, states, 2 * states, 4 * states, 5 * states]
