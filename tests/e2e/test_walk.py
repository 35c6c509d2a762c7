"""A walk, its reads, and work in other processes: each tensor is read once, two walks are two lines, bytes stay."""

import multiprocessing
import pickle
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch
from helpers import folder_digests, same_codes

import lorq
from lorq.core.problem import BlockOutput, Problem
from lorq.core.stats import InputStats
from lorq.models.blocks import StreamedModel
from lorq.models.windows import Encoder, text_windows
from lorq.pipeline import quantize as stages
from lorq.pipeline.options import Options
from lorq.pipeline.plan import make_plan
from lorq.pipeline.tasks import SameProcess, Task, solve_task
from lorq.pipeline.walk import Streams, walk
from lorq.storage import reader

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
    """The numbers of reads of weights, of a block's other tensors, and of what is outside."""
    kinds = {}
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
def test_weights_are_read_to_check_and_to_work_and_what_is_kept_once(method, options, folder_of, run, reads, tmp_path):
    source = folder_of("llama")
    lorq.quantize(source, tmp_path / "out", method, **run | options)
    # Outside the blocks, before them and after them.
    assert of(reads, source) == {"weight": {2}, "kept": {1}, "outside": {2}}


def test_a_resumed_run_does_not_check_again_and_reads_each_weight_once(folder_of, run, reads, tmp_path, monkeypatch):
    source, solve = folder_of("llama"), stages.solve_block

    def stop(model, plan, visit, *others):
        if visit.part.name.endswith(".1"):
            raise KeyboardInterrupt
        return solve(model, plan, visit, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "solve_block", stop)
        lorq.quantize(source, tmp_path / "out", GPTQ, **run)
    reads.clear()
    lorq.quantize(source, tmp_path / "out", GPTQ, **run, resume=True)
    assert of(reads, source) == {"weight": {1}, "kept": {1}, "outside": {2}}


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
        hidden = torch.empty(*windows.shape, 64)
        calls = model.embed(windows, hidden)
        entered = []
        for block in model.blocks:
            entered.append(hidden.clone())
            with model.resident(block):
                if changed:
                    double(block)
                hidden = torch.stack([model.run(block, window, calls) for window in hidden])
        return [*entered, hidden]

    def double(block):
        model.resident_weight(next(t for t in block.targets if t.name.endswith("down_proj"))).mul_(2)

    original, quantized = states(False), states(True)
    assert not torch.allclose(original[1], quantized[1])
    inputs = original if stream == "original" else quantized
    begun = Streams.begin(model, plan, windows, tmp_path)
    for number, visit in enumerate(walk(model, plan, begun)):
        double(visit.part)
        entered = inputs[number + (streams == "one" and stream == "original")]  # one stream has left it already
        assert torch.equal(begun.inputs, entered)
        if begun.original is not None:
            assert torch.equal(begun.original, original[number + 1])
    assert torch.equal(begun.inputs, inputs[-1])
    assert all(parameter.is_meta for parameter in model.model.parameters())


# ---- tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, method",
    [
        ("llama", GPTQ),
        ("mixtral", lorq.TileQ(bits=3, group_size=32, rank=2)),
        ("llama", lorq.LRQ(bits=3, group_size=32, steps=1)),
    ],
    ids=["layers", "experts", "block"],
)
def test_layers_solved_in_another_process_have_the_same_bytes(family, method, folder_of, run, tmp_path):
    lorq.quantize(folder_of(family), tmp_path / "here", method, **run)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        lorq.quantize(folder_of(family), tmp_path / "there", method, **run, executor=executor)
    assert folder_digests(tmp_path / "here") == folder_digests(tmp_path / "there")


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
        pickle.dumps(task(block=BlockOutput(lambda weights, states: states, hidden, hidden)))


def test_work_in_the_same_process_is_done_when_it_is_handed_over():
    executor = SameProcess()
    assert executor.submit(divmod, 7, 2).done() and executor.submit(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 7, 0)
