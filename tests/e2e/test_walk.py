"""A walk, its reads, and work in other processes: each tensor is read once, two walks are two lines, bytes stay."""

import os
import pickle
import signal
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial

import families
import pytest
import torch
from helpers import folder_digests, same_codes, tiny_model
from safetensors.torch import load_file, save_file

import lorq
from lorq.core.problem import BlockOutput, Problem
from lorq.core.stats import InputStats
from lorq.models.blocks import StreamedModel
from lorq.models.windows import Encoder, text_windows
from lorq.pipeline import quantize as stages
from lorq.pipeline.executors import SameProcess
from lorq.pipeline.options import Options
from lorq.pipeline.plan import make_plan
from lorq.pipeline.tasks import Task, solve_task
from lorq.pipeline.walk import Streams, advance, walk
from lorq.storage import reader
from lorq.storage.writer import CheckpointWriter

GPTQ = lorq.GPTQ(bits=3, group_size=32)


@pytest.fixture
def run(text_file):
    return {"calibration": str(text_file), "samples": 4, "seq_len": 32}


# ---- reads ------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """How often each tensor of the original has been read."""
    counted, read = Counter(), reader.read_tensor

    def count(path, header, name, index=None):
        counted[path.parent.name, name] += 1
        return read(path, header, name, index)

    monkeypatch.setattr(reader, "read_tensor", count)
    return counted


def of(reads, folder):
    """The numbers of reads of weights, of a block's other tensors, and of what is outside.

    The first block is read once more than the others: it runs to show in what form it answers.
    """
    kinds = {}
    for key in list(reads):
        if key[0] == folder.name and ".layers.0." in key[1]:
            reads[key] -= 1
    for (where, name), count in reads.items():
        if where == folder.name:
            kind = "outside" if ".layers." not in name else "kept" if "norm" in name else "weight"
            kinds.setdefault(kind, set()).add(count)
    return kinds


@pytest.mark.parametrize(
    "method, options",
    [
        (GPTQ, {}),
        (GPTQ, {"stream": "quantized"}),
        (lorq.LRQ(bits=3, group_size=32, steps=1), {"activations": "token", "smoothing": 0.5}),
        (lorq.Nearest(group_size=32), {"calibration": "self"}),
    ],
    ids=["gptq", "quantized stream", "lrq smoothed", "nearest"],
)
def test_all_of_a_small_model_is_read_to_be_looked_at_and_to_work(method, options, folder_of, run, reads, tmp_path):
    source = folder_of("llama")
    lorq.quantize(source, tmp_path / "out", method, **run | options)
    # Outside the blocks, to look, before them and after them.
    assert of(reads, source) == {"weight": {2}, "kept": {2}, "outside": {3}}


@pytest.fixture
def large(monkeypatch, tmp_path, tokenizer):
    """A model of four blocks that counts as large: a look at all its blocks would take too long."""
    monkeypatch.setattr("lorq.pipeline.check_walk._ALL_WEIGHTS", 0)
    tiny_model(num_hidden_layers=4, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.mark.parametrize("method, ahead", [(lorq.Nearest(group_size=32), 0), (GPTQ, 1)])
def test_a_large_models_weights_are_read_to_work_and_ahead_of_work_that_takes_long(
    method, ahead, large, run, reads, tmp_path
):
    lorq.quantize(large, tmp_path / "out", method, **run)
    counts = {name: count for (_, name), count in reads.items() if name.endswith("up_proj.weight")}
    # The first two are looked at besides, the first once more for the form in which it answers.
    assert list(counts.values()) == [3 + ahead, 2 + ahead, 1 + ahead, 1 + ahead]
    assert all(reads[large.name, f"model.layers.{i}.input_layernorm.weight"] == 1 for i in (2, 3))


@pytest.mark.parametrize("method", [lorq.Nearest(group_size=32), GPTQ], ids=["as it is read", "ahead"])
def test_a_large_models_weights_that_are_not_finite_are_named_all_together(method, large, run, tmp_path, monkeypatch):
    tensors = load_file(large / "model.safetensors")
    for block, projection in ((2, "up_proj"), (3, "down_proj")):
        tensors[f"model.layers.{block}.mlp.{projection}.weight"][0, :2] = torch.inf
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    solved, solve = [], stages.begin_block

    def slowly(model, plan, visit, *others):
        solved.append(visit.part.name)
        if method is GPTQ:
            time.sleep(1)
        return solve(model, plan, visit, *others)

    monkeypatch.setattr(stages, "begin_block", slowly)
    named = r"model.layers.2.mlp.up_proj \(2 of 8192\), model.layers.3.mlp.down_proj \(2 of 8192\); repair the model"
    with pytest.raises(ValueError, match=named):
        lorq.quantize(large, tmp_path / "out", method, **run)
    assert len(solved) == 2 if method is not GPTQ else len(solved) < 2
    with pytest.raises(ValueError, match=named):
        lorq.quantize(large, tmp_path / "dry", method, **run, dry_run=True)


def test_an_error_of_the_work_gives_way_to_weights_that_cause_it(large, run, tmp_path, monkeypatch):
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})

    def fail(*_):
        raise ArithmeticError("logits must be finite")

    monkeypatch.setattr(stages, "_calibration", lambda *_: fail)
    with pytest.raises(ValueError, match=r"in model.layers.3.mlp.up_proj \(1 of 8192\)"):
        lorq.quantize(large, tmp_path / "out", GPTQ, **run)
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_looks_once_and_does_not_check_its_weights_again(folder_of, run, reads, tmp_path, monkeypatch):
    source, solve = folder_of("llama"), stages.begin_block

    def stop(model, plan, visit, *others):
        if visit.part.name.endswith(".1"):
            raise KeyboardInterrupt
        return solve(model, plan, visit, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "begin_block", stop)
        lorq.quantize(source, tmp_path / "out", GPTQ, **run)
    reads.clear()
    lorq.quantize(source, tmp_path / "out", GPTQ, **run, resume=True)
    # The look before the work, which says what is not called, and the work.
    assert of(reads, source) == {"weight": {2}, "kept": {2}, "outside": {3}}


def test_a_callers_inference_mode_changes_nothing(folder_of, run, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "plain", GPTQ, **run)
    with torch.inference_mode():
        lorq.quantize(folder_of("llama"), tmp_path / "inference", GPTQ, **run)
    assert folder_digests(tmp_path / "plain") == folder_digests(tmp_path / "inference")


def test_what_is_kept_must_be_finite_too(large, run, tmp_path):
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinite values are in model.norm.weight; repair the model"):
        lorq.quantize(large, tmp_path / "out", GPTQ, **run)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float32_are_infinite_in_the_work(large, run, tmp_path):
    tensors = load_file(large / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].double().index_fill(0, torch.tensor([0]), 1e300)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"in model.layers.3.mlp.up_proj \(64 of 8192\)"):
        lorq.quantize(large, tmp_path / "out", GPTQ, **run)


def test_a_check_ahead_that_fails_says_so(large, run, tmp_path, monkeypatch):
    aside, solve = StreamedModel.tensor_aside, stages.begin_block

    def fail(model, name):
        if ".2." in name:
            raise OSError(5, "Input/output error")
        return aside(model, name)

    def slowly(*arguments):
        time.sleep(0.5)
        return solve(*arguments)

    monkeypatch.setattr(StreamedModel, "tensor_aside", fail)
    monkeypatch.setattr(stages, "begin_block", slowly)
    with pytest.raises(OSError, match="Input/output error"):
        lorq.quantize(large, tmp_path / "out", GPTQ, **run)


def test_what_fails_on_the_disk_stops_the_run_before_the_next_block_is_solved(folder_of, run, tmp_path, monkeypatch):
    write, solved, solve = CheckpointWriter.write_shard, [], stages.begin_block

    def fail(self, name, *others):
        if "00001" in name:
            raise OSError(28, "No space left on device")
        write(self, name, *others)

    def note(model, plan, visit, *others):
        solved.append(visit.part.name)
        return solve(model, plan, visit, *others)

    monkeypatch.setattr(CheckpointWriter, "write_shard", fail)
    monkeypatch.setattr(stages, "begin_block", note)
    with pytest.raises(OSError, match="No space left"):
        lorq.quantize(folder_of("llama"), tmp_path / "out", GPTQ, **run)
    assert solved == ["model.layers.0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_quantizes_as_its_parent_did(folder_of, tmp_path):
    lorq.quantize(folder_of("llama"), tmp_path / "parent", lorq.Nearest(group_size=32))
    child = os.fork()
    if not child:
        signal.alarm(60)
        torch.set_num_threads(1)  # OpenMP's threads do not come along
        lorq.quantize(folder_of("llama"), tmp_path / "child", lorq.Nearest(group_size=32))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert folder_digests(tmp_path / "child") == folder_digests(tmp_path / "parent")


def test_a_budget_counts_the_layers_that_are_left(tmp_path, run):
    """BART's attention to an encoder is not called when its decoder runs alone."""
    families.build("bart", "BartForCausalLM", tmp_path / "model")
    method, options = lorq.Nearest(group_size=16), run | {"token_weights": "gradient", "bits_per_weight": 4.0}
    report = lorq.quantize(tmp_path / "model", tmp_path / "out", method, **options)
    assert 3.6 < report.bits_per_weight <= 4.0 and len({layer.bits for layer in report.layers}) > 1


# ---- walks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["original", "quantized"])
def test_a_walk_that_only_looks_goes_before_the_one_that_solves(stream, folder_of, run, tmp_path, monkeypatch):
    source, begin = folder_of("llama"), Streams.begin
    lorq.quantize(source, tmp_path / "alone", GPTQ, **run, stream=stream)
    profiles = []

    def profile_first(model, plan, windows, folder):
        profiles.append(
            {v.part.name: list(v.observed.stats) for v in walk(model, plan, begin(model, plan, windows, folder))}
        )
        return begin(model, plan, windows, folder)

    monkeypatch.setattr(Streams, "begin", profile_first)
    lorq.quantize(source, tmp_path / "after", GPTQ, **run, stream=stream)
    assert folder_digests(tmp_path / "alone") == folder_digests(tmp_path / "after")
    assert [list(profile) for profile in profiles] == [["model.layers.0", "model.layers.1"]]
    assert all(len(names) == 7 for names in profiles[0].values())


@pytest.mark.parametrize(
    "method, stream, streams",
    [
        (GPTQ, "original", "one"), (GPTQ, "quantized", "one"),
        (lorq.LRQ(group_size=32), "original", "two"), (lorq.LRQ(group_size=32), "quantized", "two"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_streams_go_where_the_option_says(method, stream, streams, folder_of, text_file, tmp_path, tokenizer):
    """Blocks are doubled as a stand-in for being quantized."""
    model = StreamedModel.open(folder_of("llama"))
    plan = make_plan(model, method, Options(stream=stream))
    windows = text_windows(str(text_file), Encoder(tokenizer, (), 257), samples=3, seq_len=16).tokens

    def states(changed):
        """What enters and leaves each block, if blocks are changed before they are left."""
        stream = model.embed(windows)
        entered = []
        for block in model.blocks:
            entered.append(stream.hidden.clone())
            with model.resident(block):
                if changed:
                    double(block)
                advance(stream, partial(model.run, block))
        return [*entered, stream.hidden]

    def double(block):
        model.resident_weight(next(t for t in block.targets if t.name.endswith("down_proj"))).mul_(2)

    original, quantized = states(False), states(True)
    assert not torch.allclose(original[1], quantized[1])
    inputs = original if stream == "original" else quantized
    begun = Streams.begin(model, plan, windows, tmp_path)
    for number, visit in enumerate(walk(model, plan, begun)):
        double(visit.part)
        entered = inputs[number + (streams == "one" and stream == "original")]  # one stream has left it already
        assert torch.equal(begun.inputs.hidden, entered)
        if begun.original is not None:
            assert torch.equal(begun.original.hidden, original[number + 1])
    assert torch.equal(begun.inputs.hidden, inputs[-1])
    assert all(parameter.is_meta for parameter in model.model.parameters())


# ---- in what passes multiply ------------------------------------------------------------------------------


def test_passes_in_bfloat16_multiply_so_and_leave_the_rest(folder_of, tmp_path):
    model = StreamedModel.open(folder_of("llama"))
    stream, part = model.embed(torch.arange(40).view(1, 40)), model.blocks[0]
    with model.resident(part):
        exact = model.run(part, stream, 0)
        with model.products_in("bfloat16"):
            rough = model.run(part, stream, 0)
        again = model.run(part, stream, 0)
    assert rough.dtype == torch.float32 and torch.equal(exact, again)
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("options", [{}, {"token_weights": "gradient"}, {"stream": "corrected"}])
def test_passes_in_bfloat16_see_nearly_the_same_inputs(options, folder_of, run, tmp_path, monkeypatch):
    kept = {}

    def note(patch, dtype, begin=stages.begin_block):

        def noting(model, plan, visit, *others):
            kept[dtype, visit.part.name] = {name: one.hessian.clone() for name, one in visit.observed.stats.items()}
            return begin(model, plan, visit, *others)

        patch.setattr(stages, "begin_block", noting)

    for dtype in ("float32", "bfloat16"):
        with monkeypatch.context() as patch:
            note(patch, dtype)
            report = lorq.quantize(folder_of("llama"), tmp_path / dtype, GPTQ, **run, **options, pass_dtype=dtype)
        assert report.run["pass_dtype"] == dtype
    distances = {
        name: float((other - found[name]).norm() / found[name].norm())
        for (dtype, block), found in kept.items() if dtype == "float32"
        for name, other in kept["bfloat16", block].items()
    }  # fmt: skip
    assert max(distances.values()) < 0.2 and distances["model.layers.1.self_attn.o_proj"] > 0


# ---- tasks ------------------------------------------------------------------------------------------------


def test_an_executor_that_leaves_a_layer_out_is_refused(folder_of, run, tmp_path):
    class Lazy(SameProcess):
        def submit(self, function, task):
            done = super().submit(function, task).result()
            answer = Future()
            answer.set_result({name: weight for name, weight in done.items() if "up_proj" not in name})
            return answer

    with pytest.raises(RuntimeError, match=r"this one left out model.layers.0.mlp.up_proj"):
        lorq.quantize(folder_of("llama"), tmp_path / "out", lorq.Nearest(group_size=32), **run, executor=Lazy())


def task(**others):
    inputs = torch.randn(80, 32, generator=torch.Generator().manual_seed(0))
    stats = InputStats(inputs.T @ inputs / 80, inputs.abs().mean(0), 80)
    return Task(GPTQ, Problem({"a": torch.ones(8, 32), "b": torch.eye(32)}, dict.fromkeys("ab", stats), 0, **others))


def test_what_is_derived_from_statistics_does_not_travel_with_a_task():
    given = task()
    before, solved = len(pickle.dumps(given)), solve_task(given)
    assert len(pickle.dumps(given)) == before
    again = pickle.loads(pickle.dumps(given))
    assert again.problem.stats["a"] is again.problem.stats["b"]  # what they share is made once there
    assert all(same_codes(weight.codes, solved[name].codes) for name, weight in solve_task(again).items())


def test_a_task_that_runs_a_block_stays_where_the_model_is():
    hidden = torch.zeros(1, 2, 32)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(task(block=BlockOutput(lambda weights, windows: hidden, hidden)))


def test_work_in_the_same_process_is_done_when_it_is_handed_over():
    executor = SameProcess()
    assert executor.submit(divmod, 7, 2).done() and executor.submit(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 7, 0)
