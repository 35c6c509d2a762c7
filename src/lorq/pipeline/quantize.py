"""quantize(): the only place that calls the stages in order."""

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from lorq.methods import Method
from lorq.models.blocks import StreamedModel
from lorq.models.locate import cache_dir, full_path, load_dense, refuse_adapter, resolve_model
from lorq.models.self_text import cached_self_windows, check_self_windows
from lorq.models.skeleton import read_config
from lorq.models.tables import config_as_stored
from lorq.models.texts import SELF, check_text, text_name
from lorq.models.tokenizer import tokenizer_if_any
from lorq.models.windows import Encoder, Windows, text_windows
from lorq.pipeline.check_walk import check_walk, looks_at_all
from lorq.pipeline.check_weights import check_kinds, check_weights, checking_ahead
from lorq.pipeline.commit import Commit, check_records
from lorq.pipeline.dial import Choice, Dial, levelled
from lorq.pipeline.executors import UNGUARDED, SameProcess, open_executor
from lorq.pipeline.forecast import Forecast, fitted, forecast
from lorq.pipeline.gradients import token_gradients
from lorq.pipeline.identity import LATER, identity, run_info
from lorq.pipeline.observe import TokenGradients
from lorq.pipeline.one_block import Begun, begin_block, blocks_ahead, end_block
from lorq.pipeline.options import Options, method_name, read_method, read_options
from lorq.pipeline.plan import Plan, check_activations, estimate, make_plan, make_report
from lorq.pipeline.predict import predict
from lorq.pipeline.presets import DEFAULT, PAPERS, PRESETS
from lorq.pipeline.room import check_room, require_memory, too_large
from lorq.pipeline.shape_forecast import forecast_by_shapes
from lorq.pipeline.tables import solve_tables
from lorq.pipeline.verify import Probe, probe_tokens, verify
from lorq.pipeline.walk import Streams, Visit, walk
from lorq.progress import OPEN, PASS, QUANTIZE, TRY, WRITE, Progress, no_progress
from lorq.runtime.device import memory_peak, own_defaults, read_devices, reset_peak
from lorq.storage.companions import find_companions, with_code_of
from lorq.storage.folder import LorqFolder
from lorq.storage.journal import read_journal
from lorq.storage.lock import owned
from lorq.storage.measured import add_times
from lorq.storage.names import FORMAT_VERSION, JOURNAL, REPORT_NAME, SENTINEL
from lorq.storage.out_folder import check_out
from lorq.storage.report import Report, read_layer
from lorq.storage.writer import CheckpointWriter, check_begun
from lorq.version import __version__

T = TypeVar("T")


@own_defaults()
def quantize(
    model: str | Path,
    out: str | Path,
    method: str | Method | None = None,
    *,
    progress: Progress | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Report:
    """Quantize ``model`` into the folder ``out``.

    Everything that can be refused is refused before the long work starts. One decoder block is in memory at
    a time; each is written when it is solved. Before the folder becomes loadable it is read back and a short
    text's logits are compared with those of the solved weights.

    Args:
        model: a local Hugging Face folder, a hub id, or a GGUF file. Of one that others have quantized (GPTQ, AWQ,
            compressed-tensors, bitsandbytes, float8, GGUF) the dequantized weights are, which the report tells.
        out: the new folder.
        method: a name of `lorq.METHODS`, or an instance with its settings, such as ``lorq.FLRQ(bits=3)``; if left out,
            that of ``lorq.preset()``, with its options.
        progress: called as ``progress(stage, done, total)``.
        executor: where layers are solved, such as a process pool; if left out, where ``device`` and ``cluster`` say.
            Methods that fit a whole block run in the model and are always solved here.
        **options: fields of `Options`.

    Returns:
        The report, which the folder holds too. After a dry run it has the largest sizes that can come out.

    Raises:
        ValueError: for settings, models or texts that do not fit; all offending layers are listed at once.
        FileNotFoundError, FileExistsError, OSError: for missing models, used folders, full disks.
    """
    started = time.monotonic()
    reset_peak()
    progress = progress or no_progress
    chosen, solver = _asked(method, options)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A process of `Devices`, or of somebody else's, which imports the script that began it.
        print("this process would begin its script again: begin under if __name__ == '__main__':", file=sys.stderr)
        os._exit(UNGUARDED)
    if executor is not None and (chosen.cluster or "," in chosen.device):
        raise ValueError(
            f"layers are solved by an executor or where device and cluster say, got an executor, device "
            f"{chosen.device!r} and cluster {chosen.cluster!r}; give one"
        )
    if chosen.calibration != SELF:
        check_text(chosen.calibration, "calibration")
    out, there = full_path(out), full_path(model)
    if there.exists() and os.path.realpath(out) == os.path.realpath(there):
        raise FileExistsError(f"the output folder must not be the model's own, got {out} for both")
    check_out(out, overwrite=chosen.overwrite, resume=chosen.resume)
    progress(OPEN, 0, 1)
    source = resolve_model(model)
    refuse_adapter(source)
    streamed = StreamedModel.open(source, dequantize=True, device=read_devices(chosen.device)[0])
    whole = make_plan(streamed, solver, chosen)
    plan = levelled(whole, streamed)
    progress(OPEN, 1, 1)
    if chosen.resume and (out / JOURNAL).is_file():
        check_begun(out, {key: value for key, value in identity(plan, streamed, None).items() if key not in LATER})
    check_activations(plan)
    check_kinds(plan, streamed)
    unfit = too_large(streamed)
    if not (unfit and chosen.dry_run):  # which is for another machine, with other disks
        check_room(plan, streamed, out)
    with nullcontext() if chosen.dry_run else owned(out):
        calibration = _calibration(plan, streamed, progress)
        if unfit:
            if not chosen.dry_run:
                raise ValueError(unfit)
            report = _with_forecast(plan, streamed, estimate(plan, streamed), progress)
            return replace(report, seconds=time.monotonic() - started)
        whole = check_walk(streamed, whole, progress)
        check_activations(levelled(whole, streamed))
        if chosen.dry_run:
            report = _dry_run(whole, streamed, out, calibration, progress)
            return replace(report, seconds=time.monotonic() - started)
        with open_executor(chosen.device, chosen.cluster) if executor is None else nullcontext(executor) as where:
            report, stages, foretold = _carry_out(whole, streamed, out, calibration, where, progress)
        return _timed(report, out, time.monotonic() - started, stages, foretold)


def _dry_run(
    whole: Plan, model: StreamedModel, out: Path, calibration: Callable[[], Windows | None], progress: Progress
) -> Report:
    """What can be known before the work."""
    if not looks_at_all(model):
        check_weights(levelled(whole, model), model, progress)
    with TemporaryDirectory() as scratch:
        plan, _ = _chosen(whole, model, calibration, Path(scratch), SameProcess(), progress)
    return _with_forecast(plan, model, check_room(plan, model, out), progress)


def _with_forecast(plan: Plan, model: StreamedModel, report: Report, progress: Progress) -> Report:
    """The report of the largest sizes that can come out, and what the run will take; windows that are not written yet
    are random, as many tokens."""

    def windows() -> Windows | None:
        options, words = plan.options, model.model.config.get_text_config().vocab_size
        if plan.observing and options.calibration == SELF:
            return Windows(torch.randint(words, (options.samples, options.seq_len)), SELF, start_token=True)
        return _calibration(plan, model, progress)()

    told = _foretold(plan, model, report.bytes, windows, progress)
    if plan.options.memory_budget:
        fitted(plan, told)
    return replace(report, run=report.run | {"forecast": asdict(told)})


def _carry_out(
    whole: Plan, model: StreamedModel, out: Path, calibration: Callable[[], Windows | None], executor: Executor,
    progress: Progress,
) -> tuple[Report, dict[str, float], int]:  # fmt: skip
    """The work: the report, the seconds that stages took, and the memory that was foretold, if it was."""
    plan, options, foretold = levelled(whole, model), whole.options, 0
    # Without calibration the work is as fast as the check.
    ahead = plan.observing and not looks_at_all(model)
    with checking_ahead(plan, model) if ahead else nullcontext(lambda: None) as refuse:
        began = time.monotonic()
        windows = calibration()
        if windows is not None and options.resume and (out / JOURNAL).is_file():
            windows = _as_begun(out, windows)
        text_seconds = time.monotonic() - began
        refuse()
        if options.memory_budget:
            told = _foretold(plan, model, check_room(plan, model, out).bytes, lambda: windows, progress)
            whole, foretold = fitted(whole, told)
        plan, gradients = _chosen(whole, model, lambda: windows, out, executor, progress)
        own = identity(plan, model, windows)
        writer = CheckpointWriter.create(out, own, overwrite=options.overwrite, resume=options.resume)
        check_records(writer)
        with ThreadPoolExecutor(1, "write") as disk:
            commit = Commit(model, plan, writer, disk)
            stages = _solve(plan, model, windows, commit, executor, progress, refuse, gradients)
    stages["calibration"] += text_seconds
    return _finish(plan, model, writer, windows), stages, foretold


def _chosen(
    whole: Plan, model: StreamedModel, calibration: Callable[[], Windows | None], folder: Path, executor: Executor,
    progress: Progress,
) -> tuple[Plan, TokenGradients | None]:  # fmt: skip
    """The plan that meets a budget, if there is one: as the run in this folder has begun, or what is predicted best.

    And the gradients, where that took them.
    """
    if not whole.options.has_budget:
        return whole, None
    dial = Dial.open(whole, model)
    if whole.options.resume and (folder / JOURNAL).is_file():
        return dial.met(Choice(**read_journal(folder / JOURNAL).identity["budget"])), None
    windows = calibration()
    assert windows is not None  # with a budget every layer is looked at
    choice, gradients = predict(dial, model, windows.tokens, folder, executor, progress)
    return dial.met(choice), gradients


def _as_begun(out: Path, windows: Windows) -> Windows:
    """The windows under the name that the run began with, where they are the same under another."""
    then = read_journal(out / JOURNAL).identity
    same = then.get("calibration_tokens") == windows.sha256
    return replace(windows, source=then["calibration"]) if same and "calibration" in then else windows


def _solve(
    plan: Plan, model: StreamedModel, windows: Windows | None, commit: Commit, executor: Executor,
    progress: Progress, refuse: Callable[[], None], gradients: TokenGradients | None,
) -> dict[str, float]:  # fmt: skip
    """Walk through the model, solve and commit each block, and read it all back; the seconds that stages took.

    ``refuse`` is asked before each block whether something has come up meanwhile. ``gradients`` are taken here where
    they are needed and not there.

    Every tensor of a block is read once. What is outside is read twice, before the blocks and after them: to keep it in
    memory meanwhile would take gigabytes from large vocabularies, all the time.
    """
    seconds, folder = {"calibration": 0.0, "solving": 0.0}, commit.writer.folder
    with model.checkpoint.hashed() as source:
        stored = {name: model.stored_tensor(name) for name in plan.kept(*model.outside)}
    commit.outside(stored, source())
    with model.resident(*model.outside, stored=stored):
        tokens = torch.empty(0, 1, dtype=torch.int64) if windows is None else windows.tokens
        streams = Streams.begin(model, plan, tokens, folder)
        probe = Probe.begin(model, probe_tokens(model.model.config.get_text_config(), plan.options.seed))
    finished, began = commit.finished, time.monotonic()
    if gradients is None and windows is not None and plan.options.token_weights == "gradient":
        gradients = token_gradients(model, plan, windows.tokens, folder, progress, finished=finished)
        seconds["calibration"] += time.monotonic() - began
    behind, ahead = len(finished), len(model.blocks) - len(finished)
    progress(*(PASS, 0, behind) if behind else (QUANTIZE, 0, ahead))
    most = blocks_ahead(plan, executor)

    def begun() -> Iterator[tuple[Visit, Begun | None]]:
        for visit in walk(model, plan, streams, finished=finished, gradients=gradients, hold=most > 0):
            refuse()
            commit.look()
            began = time.monotonic()
            if visit.part.name in finished:
                yield visit, None
                continue
            under_way = begin_block(model, plan, visit, probe, executor)
            seconds["calibration"] += visit.seconds
            seconds["solving"] += time.monotonic() - began
            yield visit, under_way

    for number, (visit, under_way) in enumerate(_behind(begun(), most), 1):
        began = time.monotonic()
        solved = commit.read(visit) if under_way is None else end_block(model, plan, under_way, probe)
        seconds["solving"] += 0.0 if under_way is None else time.monotonic() - began
        commit.block(visit, solved, probe)
        visit.held.close()
        if number <= behind:  # what is finished comes first, and goes faster
            progress(PASS, number, behind)
        if number >= behind and ahead:
            progress(QUANTIZE, number - behind, ahead)
    began = time.monotonic()
    tables = commit.tables(
        lambda: solve_tables(model, plan.tables, tokens, streams.inputs, plan.options, executor, progress)
    )
    seconds["solving"] += time.monotonic() - began
    commit.settle()
    commit.check_source()
    verify(model, probe, LorqFolder.of_shards(folder, commit.writer.completed), tables, progress)
    return seconds


def _behind(items: Iterable[T], most: int) -> Iterator[T]:
    """The same, each when so many more have come, or there are no more."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > most:
            yield waiting.popleft()
    yield from waiting


def _calibration(plan: Plan, model: StreamedModel, progress: Progress) -> Callable[[], Windows | None]:
    """`calibration_windows`, if anything looks at inputs."""
    return calibration_windows(plan.options, model, progress) if plan.observing else lambda: None


def calibration_windows(options: Options, model: StreamedModel, progress: Progress) -> Callable[[], Windows]:
    """Calibration windows: those of a text are read at once, the model's own when called.

    So everything that can be refused is refused before gigabytes of weights are read.
    """
    folder, config = model.checkpoint.folder, model.model.config
    if options.calibration != SELF:
        encoder = Encoder.open(folder, config, options.start_token)
        read = text_windows(options.calibration, encoder, samples=options.samples, seq_len=options.seq_len)
        return lambda: replace(read, source=text_name(read.source))
    tokenizer = tokenizer_if_any(folder)
    size = {"windows": options.samples, "length": options.seq_len}
    check_self_windows(tokenizer, config, **size)
    cache_dir()  # the text goes there: refuses what has no such place

    def write() -> Windows:
        require_memory(model)
        progress(WRITE, 0, options.samples * (options.seq_len - 1))
        tokens = cached_self_windows(
            lambda: load_dense(folder, torch.float32), tokenizer, config, fingerprint=model.checkpoint.fingerprint(),
            dtype=torch.float32, seed=options.seed, **size,
            progress=lambda done, total: progress(WRITE, done, total),
        )  # fmt: skip
        return Windows(tokens, SELF, start_token=True)

    return write


def _asked(method: str | Method | None, options: dict[str, Any]) -> tuple[Options, Method]:
    """The options and the method of a run; those of the default preset where no method is given, a paper's run for its
    method."""
    if method is None:
        method, options = PRESETS[DEFAULT].method, PRESETS[DEFAULT].options | options
    solver = read_method(method)
    return read_options(PAPERS.get(method_name(solver), {}) | options), solver


def _finish(plan: Plan, model: StreamedModel, writer: CheckpointWriter, windows: Windows | None) -> Report:
    records, folder = list(writer.completed.values()), model.checkpoint.folder
    layers = [read_layer(entry, folder) for record in records for entry in record["layers"]]
    report = make_report(
        plan, model, layers, stored=sum(record["bytes"] for record in records),
        run_info=run_info(plan, model, windows), checksums=writer.shard_checksums(),
    )  # fmt: skip
    beside, left = find_companions(folder)
    report = replace(report, run=report.run | ({"not_copied": left} if left else {}))
    config = config_as_stored(model, with_code_of(read_config(folder, quantized=True).to_dict(), beside)) | {
        "transformers_weights": SENTINEL,
        "quantization_config": {
            "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": __version__,
            "method": plan.name, "settings": plan.settings,
            "layers": {name: format for record in records for name, format in record["formats"].items()},
            "tiles": {name: format for record in records for name, format in record["tiles"].items()},
            "inputs": [names for record in records for names in record["inputs"]],
            "embeddings": {table: head for record in records for table, head in record["embeddings"].items()},
        },
    }  # fmt: skip
    # Where the model was read from is nobody's business and would differ from machine to machine.
    config.pop("_name_or_path", None)
    writer.finish(config=config, files={**beside, REPORT_NAME: report.to_bytes()})
    return report


def _foretold(
    plan: Plan, model: StreamedModel, written: int, windows: Callable[[], Windows | None], progress: Progress
) -> Forecast:
    """What the run will take."""
    found = windows()
    tokens = None if found is None else found.tokens
    progress(TRY, 0, 1)
    if too_large(model):
        told = forecast_by_shapes(model, plan, None if tokens is None else (len(tokens), tokens.shape[1]), written)
    else:
        told = forecast(model, plan, tokens, written)
    progress(TRY, 1, 1)
    return told


def _timed(report: Report, out: Path, seconds: float, stages: dict[str, float], foretold: int) -> Report:
    """The report with the times and the memory of the run, which are kept beside it."""
    add_times(out, seconds, stages, memory=memory_peak(), foretold=foretold)
    return replace(report, seconds=seconds, stages=stages)
