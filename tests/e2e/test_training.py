"""Training on folders: the quantized model, its adapters, what is written of them, and transformers' own trainer."""

import json
import warnings

import pytest
import torch
from helpers import BYTES, folder_digests, tiny_folder
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lorq
from lorq.adapt.adapters import ADAPTER_TENSORS, adapters_of, lords_layers
from lorq.adapt.qat import TrainableLinear
from lorq.runtime.linear import QuantLinear
from lorq.storage.names import MEASURED

# Nearest codes, so that training from the original begins where the quantized model is.
METHOD = lorq.LoRDS(bits=4, group_size=32, rounding="nearest", weighting="none", steps=1, refine_steps=0)
QUICK = {"steps": 3, "batch": 2, "seq_len": 16, "learning_rate": 5e-3}
CALIBRATION = {"samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def quantized(folder_of, text_file, tmp_path_factory):
    """The folder of a family quantized with lords; made once, not to be changed."""
    made = {}

    def of(family, method=METHOD, **options):
        key = family, method, *options.items()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("lords") / family
            options = {"calibration": str(text_file), **CALIBRATION, **options}
            lorq.quantize(folder_of(family), made[key], method, **options)
        return made[key]

    return of


@pytest.fixture(scope="module")
def base(quantized):
    return quantized("llama")


@pytest.fixture(scope="module")
def trained(base, text_file, tmp_path_factory):
    """An adapter's folder of rank 9 for the base, and the logits of the model that it was trained with."""
    model, out = lorq.load(base), tmp_path_factory.mktemp("adapters") / "mine"
    lorq.adapt.train(model, str(text_file), rank=9, **QUICK | {"steps": 10})
    lorq.adapt.save_adapter(model, out)
    return out, logits(model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))


WINDOW = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model):
    return model(WINDOW.to(model.device)).logits


def stored(folder):
    """All tensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_ordinary(folder, model, base):
    """A whole lorq folder, whose numbers are those of its files and which computes what the model does."""
    report = lorq.read_report(folder)
    assert lorq.verify(folder).faults == ()
    tensors = stored(folder)
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    layers = lords_layers(model)
    ranks = {name: layer.format.codes.scale_rank for name, layer in layers.items()}
    assert {layer.name: layer.rank for layer in report.layers} == ranks
    assert [layer.name for layer in report.layers] == [layer.name for layer in lorq.read_report(base).layers]
    for layer in report.layers:
        own = {n: t for n, t in tensors.items() if n.rpartition(".")[0] == layer.name and not n.endswith(".bias")}
        assert layer.bytes == sum(tensor.nbytes for tensor in own.values())
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()} - {MEASURED}
    assert torch.equal(logits(lorq.load(folder)), logits(model))


# ---- adapters ---------------------------------------------------------------------------------------------


def test_an_adapter_from_its_folder_computes_what_was_trained_to_float16s_rounding(base, trained):
    folder, expected = trained
    model = lorq.load(base)
    before = logits(model)
    lorq.adapt.load_adapter(model, folder)
    moved, off = (logits(model) - before).norm(), (logits(model) - expected).norm()
    assert off < 0.02 * moved


def test_a_merged_model_is_an_ordinary_folder_of_the_same_logits(base, trained, tmp_path):
    model = lorq.load(base)
    lorq.adapt.load_adapter(model, trained[0])
    with_adapter = logits(model)
    lorq.adapt.merge(model)
    assert torch.equal(logits(model), with_adapter)
    lorq.adapt.save(model, tmp_path / "merged")
    assert_ordinary(tmp_path / "merged", model, base)
    report = lorq.read_report(tmp_path / "merged")
    assert all(layer.note.endswith("merged; errors are those before") for layer in report.layers)
    # Only scales have changed.
    for file in base.glob("*.safetensors"):
        old, new = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert list(old) == list(new)
        for name, tensor in old.items():
            assert torch.equal(new[name], tensor) != name.endswith(("scale_left", "scale_right"))


def test_saving_twice_gives_the_same_bytes_and_never_overwrites(base, trained, tmp_path):
    for name in ("one", "two"):
        model = lorq.load(base)
        lorq.adapt.load_adapter(model, trained[0])
        lorq.adapt.save(model, tmp_path / name)  # in use is enough
    assert folder_digests(tmp_path / "one") == folder_digests(tmp_path / "two")
    with pytest.raises(FileExistsError, match="complete lorq checkpoint"):
        lorq.adapt.save(model, tmp_path / "one")


def test_saving_without_a_change_gives_the_weights_as_they_were(base, tmp_path):
    lorq.adapt.save(lorq.load(base), tmp_path / "same", note="")
    names = [path.name for path in base.glob("*.safetensors")] + ["config.json"]
    old, new = folder_digests(base), folder_digests(tmp_path / "same")
    assert {name: old[name] for name in names} == {name: new[name] for name in names}


def test_evaluating_with_an_adapter_is_evaluating_the_merged_model(base, trained, text_file, tmp_path):
    model = lorq.load(base)
    lorq.adapt.load_adapter(model, trained[0])
    lorq.adapt.save(model, tmp_path / "merged")
    options = {"text": str(text_file), "window": 32, "windows": 2}
    merged, without = (lorq.evaluate(folder, **options) for folder in (tmp_path / "merged", base))
    assert lorq.evaluate(base, adapter=trained[0], **options) == merged
    assert merged.bits_per_weight == lorq.read_report(tmp_path / "merged").bits_per_weight > without.bits_per_weight
    assert merged.perplexity < without.perplexity  # trained on this text


def test_generating_with_an_adapter_is_generating_with_the_merged_model(base, trained, tmp_path):
    model = lorq.load(base)
    lorq.adapt.load_adapter(model, trained[0])
    lorq.adapt.save(model, tmp_path / "merged")
    told, expected = (
        "".join(lorq.generate(folder, "Line 3:", adapter=adapter, tokens=8, chat=False))
        for folder, adapter in ((base, trained[0]), (tmp_path / "merged", None))
    )
    assert told == expected != ""


def test_an_adapter_of_another_base_is_refused(quantized, trained, folder_of):
    other = lorq.load(
        quantized("llama", lorq.LoRDS(bits=3, group_size=32, rounding="nearest", steps=0, refine_steps=0))
    )
    with pytest.raises(ValueError, match=r"is an adapter for the base [0-9a-f]{12}, this model is [0-9a-f]{12}; load"):
        lorq.adapt.load_adapter(other, trained[0])
    with pytest.raises(ValueError, match="this one has no packed layers"):
        lorq.adapt.load_adapter(lorq.load(folder_of("llama")), trained[0])


def test_an_adapter_fits_the_merged_model_too_whose_codes_are_the_same(base, trained, tmp_path):
    model = lorq.load(base)
    lorq.adapt.load_adapter(model, trained[0])
    expected = logits(model)
    lorq.adapt.merge(model)
    lorq.adapt.save(model, tmp_path / "merged")
    again = lorq.load(tmp_path / "merged")
    lorq.adapt.load_adapter(again, trained[0])
    assert torch.equal(logits(again), expected)


def test_the_folder_to_save_from_must_be_the_models_own(base, quantized, folder_of, tmp_path):
    model = lorq.load(base)
    for family, what in (
        ("qwen2", "lm_head.weight, model.embed_tokens.weight"),
        ("gpt2", "model.layers.0.mlp.down_proj"),
    ):
        with pytest.raises(
            ValueError, match=f"must be the model's own folder, it lacks or differs in {what}.*; give base"
        ):
            lorq.adapt.save(model, tmp_path / "x", base=quantized(family))
    with pytest.raises(FileNotFoundError, match="lorq did not write this folder"):
        lorq.adapt.save(model, tmp_path / "x", base=folder_of("llama"))
    model.model.layers[0].mlp.up_proj.scale_left[3] = torch.inf
    with pytest.raises(ArithmeticError, match="scale factors must be finite in float16"):
        lorq.adapt.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_was_trained_beside_the_layers_is_not_dropped_without_a_word(base, tmp_path):
    model = lorq.load(base)
    model.model.norm.weight.data[3] += 1
    with pytest.raises(ValueError, match=r"it lacks or differs in model\.norm\.weight; give base"):
        lorq.adapt.save(model, tmp_path / "x")


# ---- quantization-aware training --------------------------------------------------------------------------


def test_training_from_the_original_begins_with_the_quantized_model(base, folder_of):
    model = lorq.load(base)
    expected = logits(model)
    lorq.adapt.prepare_qat(model, folder_of("llama"))
    assert torch.equal(logits(model), expected)
    own = load_file(folder_of("llama") / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, TrainableLinear):
            assert torch.equal(module.weight, own[f"{name}.weight"])


def test_a_model_trained_through_the_rounding_is_an_ordinary_folder(base, folder_of, text_file, tmp_path):
    model, last = lorq.load(base), []
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    codes = {name: layer.weight_packed for name, layer in lords_layers(model).items()}

    def watch(stage, done, total):
        if done == total:
            model.eval()
            last.append(logits(model))

    lorq.adapt.train(model, str(text_file), "qat", reference=folder_of("llama"), progress=watch, **QUICK)
    assert torch.equal(logits(model), last[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert any(not torch.equal(layer.weight_packed, codes[name]) for name, layer in lords_layers(model).items())
    lorq.adapt.save(model, tmp_path / "out", note="trained for 3 steps")
    assert_ordinary(tmp_path / "out", model, base)


def test_a_reference_that_is_not_the_original_is_refused(base, quantized, folder_of, tmp_path):
    other = tiny_folder(tmp_path / "other", "llama", seed=1)
    wide = tiny_folder(tmp_path / "wide", "llama", intermediate_size=96)
    smooth = quantized("llama", activations="token", smoothing=0.5)
    for folder, reference, message in (
        (base, folder_of("gpt2"), r"has nothing for model\.layers\.0\.self_attn\.q_proj of shape \(64, 64\)"),
        (base, other, "has another model.layers.0.input_layernorm.weight: it is another model"),
        (smooth, folder_of("llama"), "this one was smoothed when it was quantized; leave the reference out"),
        (base, wide, r"has \(96, 64\) for model\.layers\.0\.mlp\.gate_proj of shape \(128, 64\)"),
    ):  # fmt: skip
        model = lorq.load(folder)
        with pytest.raises(ValueError, match=f"the reference must be the original of the model, .*{message}"):
            lorq.adapt.prepare_qat(model, reference)
        assert not any(isinstance(module, TrainableLinear) for module in model.modules())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lorq.adapt.prepare_qat(lorq.load(base), tmp_path / "nowhere" / "to" / "be")


# ---- other models -----------------------------------------------------------------------------------------

VARIANTS = {
    "mixtral": ("mixtral", {}),
    "biases": ("qwen2", {}),
    "biases and positions": ("opt", {}),
    "transposed weights": ("gpt2", {}),
    "integers": ("llama", {"method": lorq.LoRDS(bits=3, group_size=32, grid="integer", steps=1, refine_steps=0)}),
    "8-bit activations": ("llama", {"activations": "token", "kv_cache": "token"}),
    "smoothed": ("llama", {"activations": "tensor", "smoothing": 0.5}),
    "some layers left out": ("llama", {"exclude": ("down_proj",)}),
}


@pytest.mark.parametrize("mode", ["peft", "qat"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_kind_of_model_trains_and_comes_back_bit_for_bit(variant, mode, quantized, text_file, tmp_path):
    family, options = VARIANTS[variant]
    folder = quantized(family, **options)
    model = lorq.load(folder)
    with torch.no_grad():
        first = float(model(WINDOW, labels=WINDOW).loss)
    windows = [{"input_ids": row} for row in WINDOW]
    lorq.adapt.train(model, windows, mode, **QUICK | {"steps": 6})
    with torch.no_grad():
        last = float(model(WINDOW, labels=WINDOW).loss)
    assert last < 0.98 * first
    if mode == "peft":
        lorq.adapt.save_adapter(model, tmp_path / "adapter")
        lorq.adapt.merge(model)
    lorq.adapt.save(model, tmp_path / "out", base=folder)
    assert_ordinary(tmp_path / "out", model, folder)
    if mode == "peft":
        again = lorq.load(folder)
        lorq.adapt.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))


def test_every_expert_that_saw_a_token_has_learned(quantized):
    model = lorq.load(quantized("mixtral"))
    lorq.adapt.attach(model)
    model(WINDOW, labels=WINDOW).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "experts" in n and p.requires_grad]
    assert len(grads) == 2 * 4 * 3 * 2
    assert sum(grad is not None and bool(grad.norm() > 0) for grad in grads) > 0.9 * len(grads)


def test_a_model_in_bfloat16_trains_its_factors_in_float32(base, text_file, tmp_path):
    model = lorq.load(base, dtype="bfloat16")
    done = lorq.adapt.train(model, str(text_file), rank=9, gradient_checkpointing=True, **QUICK | {"steps": 12})
    assert done.losses[-1] < done.losses[0]
    assert {p.dtype for n, p in model.named_parameters() if "scale" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "scale" not in n} == {torch.bfloat16}
    lorq.adapt.save_adapter(model, tmp_path / "a")
    other = lorq.load(base)
    lorq.adapt.load_adapter(other, tmp_path / "a")
    assert torch.nn.functional.cosine_similarity(logits(other).flatten(), logits(model).float().flatten(), 0) > 0.99


def test_a_model_in_bfloat16_is_trained_through_the_rounding_and_saved_as_it_was_stored(base, text_file, tmp_path):
    model = lorq.load(base, dtype="bfloat16")
    lorq.adapt.train(model, str(text_file), "qat", **QUICK)
    lorq.adapt.save(model, tmp_path / "out")
    assert torch.equal(logits(lorq.load(tmp_path / "out", dtype="bfloat16")), logits(model))
    for file in base.glob("*.safetensors"):
        old, new = load_file(file), load_file(tmp_path / "out" / file.name)
        assert {name: tensor.dtype for name, tensor in old.items()} == {n: t.dtype for n, t in new.items()}


# ---- transformers' trainer --------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    """A trainer for a model, which writes every second of four steps."""

    def make(model):
        rows = torch.randint(BYTES, (8, 16), generator=torch.Generator().manual_seed(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `activation_checkpointing` from 5.23 on
            arguments = TrainingArguments(
                output_dir=str(tmp_path / "runs"), max_steps=4, per_device_train_batch_size=2, save_steps=2,
                report_to=[], use_cpu=True, gradient_checkpointing=True, learning_rate=1e-2, disable_tqdm=True,
                logging_strategy="no",
            )  # fmt: skip
        return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_trainer_trains_an_adapter_and_writes_folders_that_load(base, trainer, tmp_path):
    model = lorq.load(base)
    expected = logits(model)
    parameters = lorq.adapt.attach(model, "mine", rank=9)
    trainer(model).train()
    assert not torch.equal(logits(model.eval()), expected)
    for step in (2, 4):
        folder = tmp_path / "runs" / f"checkpoint-{step}"
        assert (folder / ADAPTER_TENSORS).is_file() and not list(folder.glob("model*"))
    again = lorq.load(base)
    assert lorq.adapt.load_adapter(again, folder) == "checkpoint-4"
    for name, layer in lords_layers(model).items():
        assert torch.equal(layer.scale_left.half().float(), again.get_submodule(name).scale_left)
    assert parameters[0] is model.model.layers[0].self_attn.q_proj.scale_left
    lorq.adapt.use_adapter(model)
    assert torch.equal(logits(model), expected)


def test_transformers_trainer_refuses_what_does_not_train(base, trained, trainer):
    model = lorq.load(base)
    refused = pytest.raises(ValueError, match=r"(?s)quantized.*(fine-tun|train)")
    with refused:
        trainer(model)
    lorq.adapt.load_adapter(model, trained[0])
    with refused:
        trainer(model)
    lorq.adapt.use_adapter(model, "mine", trainable=True)
    trainer(model)
    lorq.adapt.use_adapter(model)
    with refused:
        trainer(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_trainer_trains_through_the_rounding_too(base, trainer, tmp_path):
    model = lorq.load(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lorq.adapt.prepare_qat(model)
    run = trainer(model)
    run.args.save_strategy = "no"
    run.train()
    lorq.adapt.finish_qat(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lorq.adapt.save(model.eval(), tmp_path / "out")
    assert_ordinary(tmp_path / "out", model, base)


def test_a_finished_model_still_refuses_to_be_saved_by_transformers(base, tmp_path):
    model = lorq.load(base)
    lorq.adapt.attach(model)
    lorq.adapt.use_adapter(model)
    with pytest.raises(ValueError, match=r"is not saved again.*copy the folder it was loaded from"):
        model.save_pretrained(tmp_path / "x")
    assert not list(tmp_path.glob("x/*.safetensors"))
    assert all(isinstance(layer, QuantLinear) for layer in lords_layers(model).values())
    assert json.loads((base / "config.json").read_bytes())["quantization_config"]["quant_method"] == "lorq"
    assert list(adapters_of(model).known) == ["base", "default"]
