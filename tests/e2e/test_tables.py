"""Tables of tokens and heads with codes: solved, stored once, looked up by rows, multiplied by, resumed."""

import json

import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf_models import gguf_folder
from helpers import BOS, BYTES, TIED, folder_digests, tiny_folder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import lorq
from lorq.core.codes import IntGrid
from lorq.core.rounding import RangeSearch, clip, gptq
from lorq.core.stats import PreparedHessian, StatsAccumulator
from lorq.models.blocks import StreamedModel
from lorq.models.windows import Encoder, text_windows
from lorq.runtime.embedding import QuantEmbedding, TiedHead
from lorq.runtime.linear import QuantLinear
from lorq.storage.folder import LorqFolder
from lorq.storage.names import TABLES

GROUP = 32
GPTQ = lorq.GPTQ(bits=4, group_size=GROUP)
SEARCH = RangeSearch(steps=20, depth=0.5, mode="scale")
# What has a table of its own kind, or beside it, or a head with a bias, or experts.
TRIED = ("llama", "mistral", "gemma3", "gpt2", "opt", "phi", "mixtral")


@pytest.fixture(scope="module")
def quantize(folder_of, text_file):
    def run(source, out, method=GPTQ, **options):
        given = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "table_group_size": GROUP}
        return lorq.quantize(source, out, method, **given | options)

    return run


@pytest.fixture(scope="module")
def quantized(folder_of, quantize, tmp_path_factory):
    """A family's folder with 4 bits in the table and 4 or 3 in the head, and its report; made once."""
    made = {}

    def of(family):
        if family not in made:
            out = tmp_path_factory.mktemp("tables") / family
            bits = {"embeddings": 4} if family in TIED else {"embeddings": 4, "head": 3}
            made[family] = out, quantize(folder_of(family), out, **bits)
        return made[family]

    return of


@pytest.fixture
def tokens():
    return torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))


def names_of(model):
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("family", TRIED)
@torch.no_grad()
def test_the_loaded_model_computes_what_the_original_does_with_the_decoded_weights(
    family, folder_of, quantized, tokens
):
    out, report = quantized(family)
    folder, packed = LorqFolder.open(out), lorq.load(out)
    dense = StreamedModel.open(folder_of(family))
    with dense.resident(*dense.parts):
        for part in dense.blocks:
            for target in part.targets:
                if target.name in folder.formats:
                    dense.resident_weight(target).copy_(folder.weight(target.name).dense())
        for name in names_of(dense.model):
            if name in folder.formats:
                dense.model.get_submodule(name).weight.copy_(folder.weight(name).dense())
        expected = dense.model(tokens).logits
    assert torch.allclose(packed(tokens).logits, expected, atol=2e-4, rtol=1e-3)
    table, head = names_of(packed)
    assert isinstance(packed.get_input_embeddings(), QuantEmbedding)
    assert isinstance(packed.get_output_embeddings(), TiedHead if family in TIED else QuantLinear)
    assert folder.embeddings == {table: head if family in TIED else ""}
    assert {"lorq-tables.safetensors"} == {f for n, f in folder.reader.files.items() if n.startswith(f"{table}.")}
    assert [layer.bits for layer in report.layers if layer.name in (table, head)] == [4, 3][: 2 - (family in TIED)]


def test_the_heads_codes_are_those_of_error_feedback_under_the_final_norms_output(folder_of, quantized, text_file):
    # By hand: windows through transformers' own model, its last hidden states into the Hessian.
    config = transformers.AutoConfig.from_pretrained(folder_of("llama"))
    windows = text_windows(str(text_file), Encoder.open(folder_of("llama"), config), samples=4, seq_len=32).tokens
    for family, name in (("llama", "model.embed_tokens"), ("mistral", "lm_head")):
        model = AutoModelForCausalLM.from_pretrained(folder_of(family))
        sums = StatsAccumulator(64)
        with torch.no_grad():
            for window in windows:
                sums.add(model.base_model(window[None]).last_hidden_state)
        hessian = sums.finish().prepared(shrinkage=0.2, damping=0.01)
        out, _ = quantized(family)
        bits = 4 if family == "llama" else 3
        expected = gptq(model.get_output_embeddings().weight.detach(), hessian, IntGrid(bits, GROUP), SEARCH)
        got = LorqFolder.open(out).weight(name).codes
        # Two ways to the last digits of the Hessian: a code or two in ten thousand may be the neighbour.
        assert (got.codes != expected.codes).float().mean() < 1e-3
        assert torch.allclose(got.decode(), expected.decode(), atol=float(expected.scale.max()) * 1.01)
    plain = clip(
        AutoModelForCausalLM.from_pretrained(folder_of("mistral")).model.embed_tokens.weight.detach(),
        PreparedHessian(torch.eye(64), 0.0), IntGrid(4, GROUP), SEARCH,
    )  # fmt: skip
    assert torch.equal(LorqFolder.open(quantized("mistral")[0]).weight("model.embed_tokens").codes.codes, plain.codes)


def test_a_lookup_reads_no_row_but_those_asked_for_and_keeps_what_its_class_does(quantized):
    for family in ("llama", "gemma3"):
        model = lorq.load(quantized(family)[0])
        table = model.get_input_embeddings()
        index = torch.tensor([[3, 250, 3], [0, BOS, 7]])
        scale = 8.0 if family == "gemma3" else 1.0  # the root of the width
        assert torch.equal(table(index), table.weight[index] * scale)
        assert table(index[:, :0]).shape == (2, 0, 64)
        for name in ("weight_packed", "weight_scale"):
            getattr(table, name)[1] = getattr(table, name)[2]
        before = table(index)
        table.weight_scale[100:200] = torch.nan
        assert torch.equal(table(index), before)
        half = model.to(torch.bfloat16)
        assert half.get_input_embeddings()(index).dtype == torch.bfloat16 and half(index).logits.dtype == torch.bfloat16
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor([[-1]]))


def test_one_stored_table_serves_both_wherever_it_is_moved(quantized):
    out, _ = quantized("llama")
    model = lorq.load(out)
    assert not any("lm_head" in name for name in LorqFolder.open(out).reader.names)
    assert not any("lm_head" in name for name in model.state_dict())
    table = model.get_input_embeddings()
    x = torch.randn(3, 64)
    assert torch.allclose(model.lm_head(x), x @ table.weight.T, atol=1e-4)
    table.weight_scale.zero_()
    assert not model.lm_head(x).any()
    model.tie_weights()
    assert model.get_input_embeddings() is table and isinstance(model.lm_head, TiedHead)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_dequantized_it_is_transformers_own_model_again(family, quantized, tokens, tmp_path):
    out, _ = quantized(family)
    packed = lorq.load(out)
    plain = AutoModelForCausalLM.from_pretrained(out).dequantize(torch.float32)
    assert type(plain.lm_head) is nn.Linear and isinstance(plain.get_input_embeddings(), nn.Embedding)
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == (family in TIED)
    with torch.no_grad():
        expected = packed(tokens).logits
        assert torch.allclose(plain(tokens).logits, expected, atol=1e-4)
        if family == "gemma3":
            return
        plain.config.quantization_config = None
        plain.hf_quantizer = None
        plain.save_pretrained(tmp_path / "plain")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.allclose(again(tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_model_without_the_head_has_the_table(family, quantized, tokens):
    out, _ = quantized(family)
    whole, base = lorq.load(out), AutoModel.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(whole.lm_head(base(tokens).last_hidden_state), whole(tokens).logits)


def test_strips_of_rows_and_the_whole_are_the_same_bytes(folder_of, quantize, quantized, tmp_path, monkeypatch):
    for family in ("llama", "mistral"):
        bits = {"embeddings": 4} if family in TIED else {"embeddings": 4, "head": 3}
        quantized(family)
        monkeypatch.setattr("lorq.pipeline.tables._STRIP", 64 * 64)
        told: list[tuple[str, int, int]] = []
        quantize(folder_of(family), tmp_path / family, progress=lambda *a, t=told: t.append(a), **bits)
        assert ("quantize embeddings and head", 5, 5) in told  # 257 rows
        whole, strips = (LorqFolder.open(folder) for folder in (quantized(family)[0], tmp_path / family))
        assert (tmp_path / family / TABLES).read_bytes() == (whole.path / TABLES).read_bytes()
        errors = [[layer.error_after for layer in folder.report.layers] for folder in (whole, strips)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("cut", ["last block", "tables"])
def test_a_run_that_is_interrupted_before_or_after_the_tables_ends_in_the_same_bytes(
    cut, folder_of, quantize, quantized, tmp_path
):
    class PowerCut(BaseException):
        pass

    def stop(stage, done, total):
        if (stage, done) == {"last block": ("quantize", 2), "tables": ("verify", 0)}[cut]:
            raise PowerCut

    with pytest.raises(PowerCut):
        quantize(folder_of("llama"), tmp_path / "out", embeddings=4, progress=stop)
    written = (tmp_path / "out" / TABLES).exists()
    assert written == (cut == "tables")
    solved = []
    quantize(folder_of("llama"), tmp_path / "out", embeddings=4, resume=True, progress=lambda s, *_: solved.append(s))
    assert ("quantize embeddings and head" in solved) != written
    assert folder_digests(tmp_path / "out") == folder_digests(quantized("llama")[0])


def test_the_dry_run_tells_the_size_and_the_report_the_notes(folder_of, quantize, quantized, tmp_path):
    for family in ("llama", "phi", "gpt2"):
        report, bits = quantized(family)[1], {"embeddings": 4} | ({} if family in TIED else {"head": 3})
        dry = quantize(folder_of(family), tmp_path / "none", dry_run=True, **bits)
        assert dry.bytes == report.bytes and dry.bits_per_weight == report.bits_per_weight
    assert quantized("gpt2")[1].kept == {"transformer.wpe": "not the table of tokens (Embedding), kept as it is"}
    report = quantize(folder_of("mistral"), tmp_path / "plain", lorq.Nearest(group_size=GROUP), head=8)
    assert report.notes == {"lm_head": "no calibration: no error feedback"}
    table, original = lorq.load(tmp_path / "plain").model.embed_tokens, lorq.load(folder_of("mistral"))
    assert torch.equal(table.weight, original.model.embed_tokens.weight)


def test_tables_in_blocks_of_gguf_are_looked_up_and_multiplied_by(folder_of, quantize, tokens, tmp_path):
    source, out = folder_of("mistral"), tmp_path / "out"
    quantize(source, out, lorq.GPTQ(grid="q4_0"), embeddings="q8_0", head="q5_1")
    weights = dict(LorqFolder.open(out).layers())
    assert {name: weights[name].format.codes.type for name in ("model.embed_tokens", "lm_head")} == {
        "model.embed_tokens": "q8_0", "lm_head": "q5_1",
    }  # fmt: skip
    plain = lorq.load(source)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight.dense())
        torch.testing.assert_close(lorq.load(out)(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused_before_the_work(folder_of, quantize, tmp_path):
    llama = folder_of("llama")
    with pytest.raises(ValueError, match="are one table and must have the same bits, got embeddings 4 and head 3"):
        quantize(llama, tmp_path / "out", embeddings=4, head=3)
    with pytest.raises(ValueError, match=r"head must be between 0 and 8, or one of q4_0, .*, tq2_0, got 9"):
        quantize(llama, tmp_path / "out", head=9)
    with pytest.raises(ValueError, match="embeddings and head must have 2 to 8 bits with scalar codes, got 1; trellis"):
        quantize(llama, tmp_path / "out", head=1)
    with pytest.raises(ValueError, match=r"model.embed_tokens: group_size .* 48 and width 64\nchoose other --emb"):
        quantize(llama, tmp_path / "out", head=4, table_group_size=48)
    with pytest.raises(ValueError, match=r"blocks of q6_k have 256 columns.* width 64; .*q8_0.*\nchoose other --emb"):
        quantize(llama, tmp_path / "out", embeddings="q6_k")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_two_tables_that_differ_are_two_whatever_the_config_says(tmp_path):
    # transformers believes the checkpoint, other readers the config: so what is written says it too.
    source, tokens = gguf_folder(tmp_path / "model", "llama", tie_word_embeddings=True), torch.arange(3, 15)[None]
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    lorq.quantize(source, tmp_path / "out", lorq.Nearest(bits=8, group_size=GROUP), head=8)
    lorq.export(tmp_path / "out", tmp_path / "dense", to="dense")
    lorq.export(tmp_path / "out", tmp_path / "model.gguf", gguf=lorq.GgufOptions(type="f16"))
    for made in (tmp_path / "out", tmp_path / "dense"):
        assert not json.loads((made / "config.json").read_text())["tie_word_embeddings"]
        assert (lorq.load(made)(tokens).logits - expected).norm() < 0.03 * expected.norm()
    in_file = {tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= in_file


class Positions(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + input[..., None]


def test_a_table_that_does_more_than_look_up_or_a_head_read_by_hand_is_refused(quantize, tmp_path, monkeypatch):
    source = tiny_folder(tmp_path / "mistral", "mistral")
    kind = transformers.models.mistral.modeling_mistral.MistralForCausalLM
    own = kind.forward

    def by_hand(self, *args, **kwargs):
        head, self.lm_head = self.lm_head, nn.Identity()
        try:
            answer = own(self, *args, **kwargs)
        finally:
            self.lm_head = head
        answer.logits = answer.logits @ head.weight.T
        return answer

    monkeypatch.setattr(kind, "forward", by_hand)
    with pytest.raises(ValueError, match=r"MistralForC.* must call its head .* weight of lm_head .* leave --head out"):
        quantize(source, tmp_path / "out", head=4)

    monkeypatch.undo()
    own = kind.__init__

    def with_positions(self, config):
        own(self, config)
        self.model.embed_tokens = Positions(config.vocab_size, config.hidden_size)

    monkeypatch.setattr(kind, "__init__", with_positions)
    with pytest.raises(ValueError, match=r"embeddings of Mistral.* Positions does more than look rows up; leave --emb"):
        quantize(source, tmp_path / "out", embeddings=4)


def test_a_damaged_entry_of_the_table_is_refused(quantized, tmp_path):
    import shutil

    out, _ = quantized("llama")
    for entry, words in (
        ({"model.embed_tokens": 3}, "head that multiplies by it .* got 'model.embed_tokens' with 3"),
        ({"model.norm": ""}, "must name layers, .* got 'model.norm'"),
        (
            {"model.embed_tokens": "model.norm"},
            "the table model.embed_tokens with the head 'model.norm', which the mod",
        ),
        ({"model.layers.0.mlp.up_proj": ""}, "the table model.layers.0.mlp.up_proj with the head ''"),
    ):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(out, tmp_path / "bad")
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["embeddings"] = entry
        (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            lorq.load(tmp_path / "bad")
