"""Tables of tokens and heads in trellis codes: what they stand for, whose rows weigh how much, strips, refusals."""

import pytest
import torch
import transformers
from helpers import BYTES, tiny_folder
from safetensors.torch import load_file, save_file
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM

import lorq
from lorq.core.basis import Basis
from lorq.core.codes import TrellisGrid
from lorq.core.rounding import trellis
from lorq.core.stats import StatsAccumulator
from lorq.models.windows import Encoder, text_windows
from lorq.storage.folder import LorqFolder
from lorq.storage.names import TABLES

TRELLIS = lorq.FLRQ(bits=3, codebook="trellis", budget=0.0, epochs=0)
WIDTH = 64


@pytest.fixture(scope="module")
def quantize(text_file):
    def run(source, out, method=TRELLIS, **options):
        return lorq.quantize(source, out, method, calibration=str(text_file), samples=4, seq_len=32, **options)

    return run


@pytest.fixture(scope="module")
def folders(folder_of, quantize, tmp_path_factory):
    """Of a tied model and of one with a head of its own."""
    root = tmp_path_factory.mktemp("trellis-tables")
    quantize(folder_of("llama"), root / "llama", head=4, token_weights="gradient")
    quantize(folder_of("mistral"), root / "mistral", embeddings=5, head=3, table_codebook="trellis")
    quantize(folder_of("gemma3"), root / "gemma3", embeddings=4)
    return root


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_lookups_and_logits_are_those_of_the_decoded_tables(family, folder_of, folders):
    folder, packed = LorqFolder.open(folders / family), lorq.load(folders / family)
    plain = AutoModelForCausalLM.from_pretrained(folder_of(family))
    for name, weight in folder.layers():
        plain.get_submodule(name).weight.copy_(weight.dense())
        if not name.startswith("model.layers"):
            assert isinstance(weight.format.codes, TrellisGrid) and weight.format.rotation_block == WIDTH
    tokens = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(packed(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=2e-4)
    # A row by itself reads no scale of another.
    table = packed.get_input_embeddings()
    before = table(tokens[:1, :4])
    table.weight_scale[~torch.isin(torch.arange(len(table.weight_scale)), tokens[0, :4])] = torch.nan
    assert torch.equal(table(tokens[:1, :4]), before)


@pytest.mark.parametrize(("family", "part"), [("llama", "head"), ("mistral", "embeddings"), ("mistral", "head")])
@pytest.mark.parametrize("method", [TRELLIS, lorq.GPTQ(bits=3, group_size=32)], ids=["trellis", "gptq"])
def test_a_table_of_zeros_is_a_table(family, part, method, quantize, tmp_path):
    source = tiny_folder(tmp_path / "model", family)
    tensors = load_file(source / "model.safetensors")
    name = "lm_head" if (family, part) == ("mistral", "head") else "model.embed_tokens"
    tensors[f"{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", method, **{part: 4})
    assert not LorqFolder.open(tmp_path / "out").weight(name).dense().any()
    assert lorq.load(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()


def test_a_constant_row_of_a_table_is_kept(quantize, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    table[5] = 50.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize(source, tmp_path / "out", head=4)
    off = LorqFolder.open(tmp_path / "out").weight("model.embed_tokens").dense() - table
    relative = off.square().sum(1) / table.square().sum(1)
    assert relative[5] < 1e-3 and relative.median() < 0.02
    assert next(layer for layer in report.layers if "embed" in layer.name).error_after < 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_rows_of_a_head_weigh_what_the_models_words_depend_on_them(family, quantize, text_file, tmp_path):
    # By hand: transformers' own model on the same windows, p (1 - p) of its words, a tenth of the mean for all.
    cap = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    source = tiny_folder(tmp_path / "model", family, initializer_range=0.3, **cap)
    quantize(source, tmp_path / "out", head=4, token_weights="gradient")
    model = AutoModelForCausalLM.from_pretrained(source)
    encoder = Encoder.open(source, transformers.AutoConfig.from_pretrained(source))
    sums, spread, uncapped = StatsAccumulator(WIDTH), torch.zeros(BYTES + 1), torch.zeros(BYTES + 1)
    for window in text_windows(str(text_file), encoder, samples=4, seq_len=32).tokens:
        inputs = model.base_model(window[None]).last_hidden_state
        sums.add(inputs)
        for logits, total in ((model(window[None]).logits, spread), (model.lm_head(inputs), uncapped)):
            p = softmax(logits, -1)
            total += (p - p.square()).sum((0, 1))
    hessian = sums.finish().prepared(shrinkage=0.2, damping=0.01, block=WIDTH)
    target, grid = Basis(None, WIDTH, 0).rotate(model.lm_head.weight), TrellisGrid.of(BYTES + 1, 4, 12)
    rows, others = ((own / own.mean() + 0.1).sqrt() for own in (spread, uncapped))
    got = LorqFolder.open(tmp_path / "out").weight("model.embed_tokens").codes

    def cost(codes):
        error = (codes.decode() - target) * rows.sqrt().unsqueeze(1)
        return float((error @ hessian.matrix * error).sum())

    expected, equal = trellis(target, hessian, grid, rows), trellis(target, hessian, grid)
    assert got.format == expected.format and torch.equal(got.scale, expected.scale)
    # Last digits of the Hessian may turn a stream elsewhere, not what it costs.
    assert cost(got) == pytest.approx(cost(expected), rel=1e-2)
    # A cap makes words alike, which leaves little to tell apart.
    assert cost(got) < (1 if cap else 0.95) * cost(equal)
    if cap:
        assert cost(got) < cost(trellis(target, hessian, grid, others))


def test_strips_have_the_sequences_of_the_whole_table(folder_of, folders, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("lorq.pipeline.tables._STRIP", 64 * WIDTH)
    told: list[tuple[str, int, int]] = []
    options = {"embeddings": 5, "head": 3, "table_codebook": "trellis"}
    quantize(folder_of("mistral"), tmp_path / "out", progress=lambda *a: told.append(a), **options)
    assert ("quantize embeddings and head", 5, 5) in told  # 257 rows
    assert (tmp_path / "out" / TABLES).read_bytes() == (folders / "mistral" / TABLES).read_bytes()


def test_tables_take_the_methods_kind_of_codes_unless_another_is_asked_for(folder_of, quantize, tmp_path):
    source = folder_of("llama")

    def kind(**options):
        report = quantize(source, tmp_path / "out", overwrite=True, **options)
        assert report.bytes == quantize(source, tmp_path / "none", dry_run=True, **options).bytes
        return LorqFolder.open(tmp_path / "out").formats["model.embed_tokens"].codes.kind

    assert kind(head=4) == "trellis"
    assert kind(head=8) == "integer"  # trellis codes have 6 bits at most
    assert kind(head=4, table_group_size=32) == "integer"
    assert kind(head=4, table_codebook="scalar") == "integer"
    assert kind(method=lorq.GPTQ(bits=4, group_size=32), head=4) == "integer"
    assert kind(method=lorq.GPTQ(bits=4, group_size=32), head=4, table_codebook="trellis") == "trellis"


def test_the_table_is_trellis_coded_without_calibration(folder_of, quantize, tmp_path):
    report = quantize(
        folder_of("mistral"), tmp_path / "out", lorq.Nearest(group_size=32), head=4, table_codebook="trellis"
    )
    assert report.notes == {"lm_head": "no calibration: no error feedback"}
    weight = LorqFolder.open(tmp_path / "out").weight("lm_head")
    original = AutoModelForCausalLM.from_pretrained(folder_of("mistral")).lm_head.weight
    error = (weight.dense() - original).norm() / original.norm()
    assert 0.03 < error < 0.09  # 4 bits of a Gaussian: 0.0625 is the bound of any code, but for the seams


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"table_codebook": "trellis"}, "table_codebook serves embeddings and head, got trellis and neither"),
        ({"table_codebook": "trellis", "head": 7}, "trellis codes have 1 to 6 bits, got head 7"),
        ({"table_codebook": "trellis", "head": 4, "table_group_size": 32}, "a scale for each row, got table_group_siz"),
        ({"table_codebook": "trellis", "embeddings": "q8_0"}, "q8_0 says what its codes stand for, got table_codebook"),
    ],
)
def test_what_no_table_can_be_is_refused(options, words, folder_of, quantize, tmp_path):
    with pytest.raises(ValueError, match=words):
        quantize(folder_of("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
