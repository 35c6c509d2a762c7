"""peft on a loaded folder: adapters are attached, trained by transformers and trl, saved, not merged into codes."""

import pytest
import torch
from helpers import BYTES, byte_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorq
from lorq.runtime.linear import QuantLinear

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Of each kind of codes, and of what stands beside them.
KINDS = {
    "integers": (lorq.Nearest(bits=4, group_size=16), {}),
    "low rank": (lorq.FLRQ(bits=3, group_size=16, budget=2.0, min_gain=0.0, epochs=0, rounding="nearest"), {}),
    "blocks of GGUF": (lorq.Nearest(grid="q4_0"), {}),
    "levels": (lorq.Nearest(bits=3, group_size=16, grid="normal-float"), {}),
    "product scales": (lorq.LoRDS(bits=4, group_size=32, weighting="none", steps=1), {}),
    "vectors": (lorq.LoPRo(bits=2, group_size=32, codebook="vector", rank=2), {}),
    "trellis": (lorq.FLRQ(bits=2, codebook="trellis", window=8, budget=0.0, epochs=0), {}),
    "tables": (lorq.Nearest(bits=4, group_size=16), {"embeddings": 4, "table_group_size": 16}),
    "8-bit inputs": (lorq.LRQ(bits=8, group_size=-1, steps=1), {"activations": "token"}),
}
WINDOW = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def quantized(folder_of, text_file, tmp_path_factory):
    """A folder of a kind of codes; made once, not to be changed."""
    made = {}

    def of(kind="integers", family="llama"):
        if (kind, family) not in made:
            method, options = KINDS[kind]
            made[kind, family] = tmp_path_factory.mktemp("peft") / family
            calibration = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
            lorq.quantize(folder_of(family), made[kind, family], method, **calibration | options)
        return made[kind, family]

    return of


def with_lora(model, **changes):
    """The model with an adapter that is not zero."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS} | changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped.eval()


def logits(model):
    with torch.no_grad():
        return model(WINDOW).logits


def gradients(model):
    """Of the loss, by parameter."""
    model.zero_grad()
    model(WINDOW, labels=WINDOW).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "8-bit inputs"])
def test_adapters_get_the_gradients_that_dense_weights_give(kind, quantized):
    packed = with_lora(lorq.load(quantized(kind)))
    dense = with_lora(lorq.load(quantized(kind)).dequantize())
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-3, atol=1e-3)
    ours, theirs = gradients(packed), gradients(dense)
    assert len(ours) == 2 * 2 * len(TARGETS) and ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert float(gradient.norm()) > 0
        torch.testing.assert_close(
            gradient, theirs[name], rtol=5e-3, atol=5e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_are_the_same_where_blocks_are_run_again_for_them(quantized):
    model = with_lora(lorq.load(quantized("trellis")))
    plain = gradients(model)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    again = gradients(model.train())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


def test_layers_of_8_bit_inputs_let_gradients_through(quantized):
    found = gradients(with_lora(lorq.load(quantized("8-bit inputs"))))
    assert all(float(gradient.norm()) > 0 for gradient in found.values())


def test_experts_are_wrapped_one_by_one(quantized):
    dense = with_lora(lorq.load(quantized(family="mixtral")))
    layers = [m for m in dense.modules() if isinstance(m, QuantLinear)]
    assert sum("experts" in n and n.endswith("down_proj") for n, _ in dense.named_modules()) == 8 and layers
    assert sum(float(g.norm()) > 0 for n, g in gradients(dense).items() if "experts" in n and g is not None) > 8


def test_experts_that_share_factors_are_refused(folder_of, text_file, tmp_path):
    method = lorq.TileQ(bits=3, group_size=32, rank=2)
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    lorq.quantize(folder_of("mixtral"), tmp_path / "q", method, **options)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj belongs to experts that share factors \(tileq\)"):
        with_lora(lorq.load(tmp_path / "q"))
    assert len(gradients(with_lora(lorq.load(tmp_path / "q"), target_modules=["q_proj"]))) == 4


def test_all_linear_layers_are_found_but_for_the_head(quantized):
    model = with_lora(lorq.load(quantized()), target_modules="all-linear")
    wrapped = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(wrapped) == 14 and not any("lm_head" in name for name in wrapped)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))  # on what is wrapped already
    assert all(module.r == {"default": 4, "other": 2} for n, module in model.named_modules() if n in wrapped)


def test_what_is_saved_is_what_is_loaded_and_the_base_is_not_touched(quantized, tmp_path):
    folder = quantized("trellis")
    before = logits(lorq.load(folder))
    trained = with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    expected = logits(trained)
    assert float((expected - before).abs().max()) > 0.1
    trained.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(lorq.load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(again.unload()), before, rtol=0, atol=0)


def test_attaching_saving_and_taking_off_decode_no_weight(quantized, tmp_path, monkeypatch):
    model = lorq.load(quantized())
    looks = []
    monkeypatch.setattr(QuantLinear, "weight", property(lambda layer: looks.append(layer)))
    wrapped = with_lora(model, target_modules="all-linear")
    logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = wrapped.unload()
    peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert looks == []


def test_merging_is_refused_and_goes_with_dense_weights(quantized, tmp_path):
    model = with_lora(lorq.load(quantized()))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"cannot be merged into codes.*lorq\.load\(FOLDER\)\.dequantize\(\)"):
        model.merge_and_unload()
    dense = lorq.load(quantized()).dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(read), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_that_change_the_base_are_refused(start, quantized):
    changes = {"loftq_config": peft.LoftQConfig()} if start == "loftq" else {}
    with pytest.raises(ValueError, match=f"init_lora_weights '{start}' changes the weights of the base"):
        with_lora(lorq.load(quantized()), init_lora_weights=start, **changes)


def test_dora_reads_the_packed_weights(quantized):
    found = [with_lora(model, use_dora=True) for model in (lorq.load(quantized()), lorq.load(quantized()).dequantize())]
    torch.testing.assert_close(*map(logits, found), rtol=1e-3, atol=1e-3)


def arguments(folder, kind=TrainingArguments, **more):
    return kind(
        folder, max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_transformers_trainer_takes_ten_steps(quantized, tmp_path):
    model = lorq.load(quantized("trellis"))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, arguments(tmp_path), train_dataset=[])
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    wrapped = peft.get_peft_model(model, config)
    rows = [{"input_ids": row, "labels": row} for row in WINDOW.repeat(4, 1)]
    codes = {name: tensor.clone() for name, tensor in model.named_buffers()}
    trainer = Trainer(wrapped, arguments(tmp_path), train_dataset=rows)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 10 and found[-1] < found[0] - 0.2
    assert all(torch.equal(tensor, codes[name]) for name, tensor in model.named_buffers())
    trainer.save_model(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(lorq.load(quantized("trellis")), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(wrapped.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # trl's, and those of datasets
def test_trls_trainer_takes_ten_steps(quantized, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset

    rows = Dataset.from_list([{"text": f"Line {i}: {i * i} is the square of {i}."} for i in range(8)])
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(quantized(), dtype=torch.float32),
        args=arguments(tmp_path, trl.SFTConfig, max_length=32, bf16=False, gradient_checkpointing=False),
        train_dataset=rows, processing_class=with_end(byte_tokenizer(64)),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    found = losses(trainer)
    assert len(found) == 10 and found[-1] < found[0]


def with_end(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token
    return tokenizer
