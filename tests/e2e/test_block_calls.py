"""Models that call their blocks in their own ways are walked through as they run; those that cannot be are refused."""

from functools import partial

import pytest
import torch
from helpers import folder_digests, tiny_folder
from kinds import EXCLUDED, MODELS, kind_folder
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

import lorq
from lorq.models.blocks import StreamedModel
from lorq.models.calls import Answer, Recorder, Room, Stream
from lorq.pipeline.check_walk import check_walk
from lorq.pipeline.options import Options
from lorq.pipeline.plan import Plan
from lorq.pipeline.walk import advance
from lorq.progress import no_progress


@pytest.fixture(scope="module")
def folder_of_kind(tmp_path_factory):
    """The folder of a random model, by model type; made once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = kind_folder(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return of


def windows_of(seed):
    return torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def own_logits(folder, windows):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return torch.cat([model(window[None], use_cache=False).logits for window in windows])


@pytest.mark.parametrize("kind", MODELS)
def test_every_window_walks_as_it_runs_in_the_model(kind, folder_of_kind, tmp_path):
    folder, windows = folder_of_kind(kind), windows_of(1)
    streamed, expected = StreamedModel.open(folder), own_logits(folder, windows)
    check_walk(streamed, Plan({}, {}, lorq.Nearest(), Options()), no_progress)
    for room in (Room(), Room(0, tmp_path)):
        stream = streamed.embed(windows, room)
        for block in streamed.blocks:
            with streamed.resident(block):
                advance(stream, partial(streamed.run, block))
            stream.forget(block.name)
        got = torch.stack([streamed.logits(*both) for both in zip(windows, stream.hidden, strict=True)])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert not stream.handed and not stream.calls.tensors  # given back behind the last block
    assert list(tmp_path.iterdir()) == []


def test_two_streams_hand_on_what_is_their_own(folder_of_kind):
    folder, windows = folder_of_kind("gemma4_text"), windows_of(1)
    streamed, expected = StreamedModel.open(folder), own_logits(folder, windows)
    first = streamed.embed(windows)
    second = first.fork()
    second.hidden.mul_(1.5)
    for block in streamed.blocks:
        with streamed.resident(block):
            advance(first, partial(streamed.run, block))
            advance(second, partial(streamed.run, block))
    got = torch.stack([streamed.logits(*both) for both in zip(windows, first.hidden, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# ---- the look before the work -----------------------------------------------------------------------------


def bare(self, hidden):
    return hidden


def forgets(self, *_):
    pass


@pytest.mark.parametrize(
    "kind, where, name, what",
    [
        ("trocr", Answer, "around", bare),
        ("falcon", Answer, "around", bare),
        ("gemma4_text", Recorder, "_keep", forgets),
        ("gemma4_text", Stream, "left", forgets),
        ("gemma3n_text", Recorder, "_keep", forgets),
        ("glm_moe_dsa", Recorder, "answered", forgets),
    ],
)
def test_a_walk_that_does_not_follow_the_model_is_refused_before_the_work(
    kind, where, name, what, folder_of_kind, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(where, name, what)
    options = {"calibration": str(text_file), "samples": 2, "seq_len": 16, "exclude": EXCLUDED.get(kind, ())}
    with pytest.raises(ValueError, match=r"ForCausalLM is not supported: (its )?blocks .*(must|answer)"):
        lorq.quantize(folder_of_kind(kind), tmp_path / "out", lorq.Nearest(group_size=16), **options, dry_run=True)
    assert not (tmp_path / "out").exists()


class Rearranged(torch.nn.ModuleList):
    """Blocks that the model takes in another order than they are named in."""

    order = (0, 1)

    def __getitem__(self, index):
        return [self[i] for i in self.order] if isinstance(index, slice) else super().__getitem__(index)


@pytest.mark.parametrize(
    "order, message",
    [
        ((1, 0), r"MistralForCausalLM is not supported: blocks .* model.layers.0 is called out of this order"),
        ((0, 1, 0), r"model.layers.0 is called again"),
        ((0,), r"model.layers.1 is called never"),
    ],
    ids=["swapped", "twice", "never"],
)
def test_blocks_must_be_called_once_each_and_in_order(order, message, folder_of):
    streamed = StreamedModel.open(folder_of("mistral"))
    base = streamed.model.model
    base.layers = Rearranged(base.layers)
    base.layers.order = order
    with pytest.raises(ValueError, match=message):
        streamed.embed(windows_of(1))


def test_hidden_states_must_come_to_a_block_as_the_one_before_has_left_them(folder_of):
    streamed = StreamedModel.open(folder_of("mistral"))
    streamed.model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] / 2, *args[1:]))
    with pytest.raises(ValueError, match=r"model.layers.1 is called again, or with what the model has changed"):
        streamed.embed(windows_of(1))


# ---- quantizing -------------------------------------------------------------------------------------------


GPTQ, LRQ = lorq.GPTQ(bits=8, group_size=16), lorq.LRQ(bits=8, group_size=16, steps=1)


@pytest.mark.parametrize(
    "kind, method, options",
    [
        ("falcon", GPTQ, {}),
        ("gemma4_text", LRQ, {"activations": "token", "smoothing": 0.5}),
        ("gemma4_text", LRQ, {"stream": "original"}),
        ("gemma3n_text", GPTQ, {"stream": "quantized", "exclude": EXCLUDED["gemma3n_text"]}),
    ],
    ids=["falcon", "gemma4 lrq", "gemma4 lrq original", "gemma3n quantized"],
)
def test_they_are_quantized(kind, method, options, folder_of_kind, text_file, tmp_path):
    folder, windows = folder_of_kind(kind), windows_of(2)
    given = {"calibration": str(text_file), "samples": 3, "seq_len": 24, **options}
    lorq.quantize(folder, tmp_path / "files", method, **given, spill_bytes=0)
    expected, got = own_logits(folder, windows), own_logits(tmp_path / "files", windows)
    assert 20 * torch.log10(expected.norm() / (expected - got).norm()).item() > 25
    if "activations" in options:
        lorq.quantize(folder, tmp_path / "memory", method, **given)
        assert folder_digests(tmp_path / "memory") == folder_digests(tmp_path / "files")


def test_a_disk_without_room_for_the_windows_is_told_of(tmp_path):
    with pytest.raises(OSError, match=rf"needs a file of 4000000000.0 GB in {tmp_path}: .*; take fewer samples"):
        Room(0, tmp_path).take((10**9, 10**9))
    assert list(tmp_path.iterdir()) == []


# ---- what blocks hand on besides hidden states --------------------------------------------------------------


class Handing(modeling_llama.LlamaDecoderLayer):
    """A block that answers with another tensor besides, and adds one that it is given."""

    def forward(self, hidden_states, first=None, **more):
        out = super().forward(hidden_states, **more)
        return out if first is None else out + first, (self.input_layernorm(hidden_states),)


def hand_on_the_first(model, input_ids, **_):
    """A forward in which every block is given what the first has answered."""
    hidden, first = model.embed_tokens(input_ids), None
    places = torch.arange(hidden.shape[1])[None]
    more = {"position_ids": places, "position_embeddings": model.rotary_emb(hidden, places)}
    for layer in model.layers:
        hidden, (value,) = layer(hidden, first=first, **more)
        assert value.shape == hidden.shape
        first = value if first is None else first
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden))


def test_a_block_is_given_what_the_first_has_answered_and_not_the_one_before(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "llama", "llama", num_hidden_layers=4)
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Handing)
    monkeypatch.setattr(modeling_llama.LlamaPreTrainedModel, "_no_split_modules", ["Handing"])
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", hand_on_the_first)
    streamed = StreamedModel.open(folder)
    for length in (8, 24):  # as blocks answer for windows of one length, they do for no other
        windows = windows_of(1)[:, :length]
        stream = streamed.embed(windows)
        for block in streamed.blocks:
            with streamed.resident(block):
                advance(stream, partial(streamed.run, block))
            stream.forget(block.name)
        got = torch.stack([streamed.logits(*both) for both in zip(windows, stream.hidden, strict=True)])
        torch.testing.assert_close(got, own_logits(folder, windows), rtol=1e-5, atol=1e-4)
        assert not stream.handed


def test_a_block_called_otherwise_for_another_text_is_named_in_one_line():
    recorder = Recorder(2, Room())
    recorder.begin()
    recorder.called("block", (), {"given": (torch.ones(900),)})
    recorder.begin()
    with pytest.raises(ValueError, match="block was called with a tuple for one and None for another") as error:
        recorder.called("block", (), {"given": None})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
