"""Tune a folder: read it and its original, fit the one to the other, write what was learned."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.adapt.block_tuning import BlockTuning
from lorq.adapt.fit import Fit, fit
from lorq.adapt.settings import Tuning
from lorq.adapt.tuned import learning, prepare_tuning, stored_numbers
from lorq.core.descent import Outcome
from lorq.models.blocks import StreamedModel
from lorq.models.locate import load_dense
from lorq.models.self_text import cached_self_windows, check_self_windows
from lorq.models.skeleton import read_config
from lorq.models.texts import SELF, text_name
from lorq.models.tokenizer import tokenizer_if_any
from lorq.models.windows import Encoder, Windows, text_windows
from lorq.progress import READ, WRITE, Progress
from lorq.runtime.device import available_bytes, read_dtype
from lorq.runtime.hf import load
from lorq.storage.atomic import in_words, require_space
from lorq.storage.companions import find_companions
from lorq.storage.folder import LorqFolder
from lorq.storage.names import REPORT_NAME, TUNED_BLOCKS, TUNING
from lorq.storage.reader import WeightFiles
from lorq.storage.report import Report
from lorq.storage.writer import CheckpointWriter
from lorq.version import __version__


@dataclass(frozen=True)
class Run:
    """A tuning that nothing speaks against.

    Attributes:
        folder: to be tuned; nothing in it is changed.
        original: its original's folder.
        text: to tune on; ``given`` are its windows where they were read already, None where the original writes them.
        dtype: of products.
    """

    folder: LorqFolder
    original: Path
    text: str
    given: Windows | None
    settings: Tuning
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    @classmethod
    def prepare(
        cls, folder: LorqFolder, original: Path, text: str, settings: Tuning, *, device: torch.device, dtype: str,
        progress: Progress,
    ) -> "Run":  # fmt: skip
        """Refuse what can be refused, with a ValueError, and read the text."""
        _check_original(folder, original)
        if settings.steps:
            _check_memory(folder, original)
        if settings.block_steps and folder.tiles:
            raise ValueError(
                f"block_steps must be 0 where experts share factors, as in {len(folder.tiles)} projections of "
                f"{folder.path}, got {settings.block_steps}; tune the whole model, with steps"
            )
        given = read_windows(original, text, settings)
        return cls(folder, original, text, given, settings, device, _products(dtype, device), progress)

    def into(self, out: Path, *, resume: bool, overwrite: bool) -> Report:
        """Tune, and write the result; the folder ``out`` is ours."""
        windows = self.given or self._written()
        info = {
            **asdict(self.settings), "text": windows.source, "text_tokens": windows.sha256,
            "start_token": windows.start_token, "dtype": str(self.dtype).removeprefix("torch."),
            "device_type": self.device.type,
        }  # fmt: skip
        identity = info | {
            "tuned_from": self.folder.reader.fingerprint(), "lorq_version": __version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        require_space(out, 2 * self.folder.report.bytes)
        writer = CheckpointWriter.create(out, identity, resume=resume, overwrite=overwrite)
        shards = self.folder.reader.headers
        if writer.completed.keys() != shards.keys():
            self._shards(writer, windows.tokens, out)
        for name in (TUNED_BLOCKS, TUNING):
            (out / name).unlink(missing_ok=True)
        return self._finish(writer, info)

    def _shards(self, writer: CheckpointWriter, windows: Tensor, out: Path) -> None:
        """Fit blocks and model, and write all files."""
        source, chosen = self.folder.reader, self.settings
        apart = _held_out(len(windows), chosen.held_out)
        numbers: dict[str, Tensor] = {}
        reached: dict[str, Any] = {}
        if chosen.block_steps:
            original = StreamedModel.open(self.original, device=self.device)
            blocks = BlockTuning(
                original, self.folder, windows, apart, chosen, self.dtype, out / TUNED_BLOCKS, self.progress
            )
            numbers, found = blocks.run()
            reached = {"kl_before": found.before, "kl_after": found.after}
        if chosen.steps:
            numbers, outcome = self._whole(numbers, windows, apart, out / TUNING)
            reached = {"kl_before": outcome.start} | reached | {"kl_after": outcome.best, "kept_step": outcome.step}
        for file, header in sorted(source.headers.items()):
            if file not in writer.completed:
                tensors = self._tensors(header.tensors, numbers)
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                writer.write_shard(file, tensors, {"bytes": size, "reached": reached})

    def _tensors(self, names: Iterable[str], numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors with their new numbers, be these tensors or inside of them."""
        source, names = self.folder.reader, list(names)
        tensors = {name: numbers[name] if name in numbers else source.tensor(name) for name in names}
        inside = {name.rpartition(".")[0] for name in numbers if name not in source.files}
        for layer in sorted(inside & {name.rpartition(".")[0] for name in names}):
            weight = self.folder.weight(layer)
            own = {local: numbers[f"{layer}.{local}"] for local in weight.continuous()}
            tensors |= {f"{layer}.{local}": tensor for local, tensor in weight.refitted(own).tensors().items()}
        return tensors

    def _whole(
        self, numbers: Mapping[str, Tensor], windows: Tensor, apart: Tensor, checkpoint: Path
    ) -> tuple[dict[str, Tensor], Outcome]:
        """The whole model's numbers, which begin with those given, as they are stored."""
        self.progress(READ, 0, 2)
        model = load(self.folder.path, device=self.device, dtype="float32")
        self.progress(READ, 1, 2)
        original = load(self.original, device=self.device, dtype="float32").requires_grad_(False)
        self.progress(READ, 2, 2)
        prepare_tuning(model, self.folder.reader.dtype)
        own = learning(model)
        with torch.no_grad():
            for name, number in numbers.items():
                own[name].copy_(number)
        outcome = fit(
            model, Fit(original, windows[~apart], windows[apart], self.dtype), self.settings, checkpoint, self.progress
        )
        return stored_numbers(model, own), outcome

    def _finish(self, writer: CheckpointWriter, info: dict[str, Any]) -> Report:
        reached = next(iter(writer.completed.values()))["reached"]
        self.folder.reader.check_unchanged("continue with --resume")
        before = self.folder.report
        report = replace(
            before, run=before.run | {"tuning": info | reached}, checksums=writer.shard_checksums(),
            bytes=sum(record["bytes"] for record in writer.completed.values()),
        )  # fmt: skip
        files = find_companions(self.folder.path)[0] | {REPORT_NAME: report.to_bytes()}
        writer.finish(config=self.folder.config, files=files)
        return report

    def _written(self) -> Windows:
        """Windows that the original writes, unless they are kept from another run."""
        chosen, count = self.settings, self.settings.samples + self.settings.held_out
        self.progress(WRITE, 0, count * (chosen.seq_len - 1))
        tokens = cached_self_windows(
            lambda: load_dense(self.original, torch.float32), tokenizer_if_any(self.original),
            read_config(self.original, quantized=True), fingerprint=WeightFiles.open(self.original).fingerprint(),
            dtype=torch.float32, windows=count, length=chosen.seq_len, seed=chosen.seed,
            progress=lambda done, total: self.progress(WRITE, done, total),
        )  # fmt: skip
        return Windows(tokens, SELF, start_token=True)


def read_windows(original: Path, text: str, settings: Tuning) -> Windows | None:
    """The windows of a text, those held out included; None where the original is to write them.

    Raises:
        ValueError: if the text is too short, or the model takes no such windows.
    """
    config, count = read_config(original, quantized=True), settings.samples + settings.held_out
    if text == SELF:
        check_self_windows(tokenizer_if_any(original), config, windows=count, length=settings.seq_len)
        return None
    encoder = Encoder.open(original, config, settings.start_token)
    try:
        read = text_windows(text, encoder, samples=count, seq_len=settings.seq_len)
    except ValueError as error:
        error.add_note(f"for tuning on {settings.samples} windows and measuring on {settings.held_out} (--held-out)")
        raise
    return replace(read, source=text_name(text))


def _held_out(windows: int, count: int) -> Tensor:
    """Which windows are held out: evenly spread over the text."""
    apart = torch.zeros(windows, dtype=torch.bool)
    apart[[(2 * i + 1) * windows // (2 * count) for i in range(count)]] = True
    return apart


def _check_original(folder: LorqFolder, original: Path) -> None:
    """Refuse a reference that the folder was not made of."""
    if (original / REPORT_NAME).is_file():
        raise ValueError(
            f"the reference must be the original, {original} is quantized itself; name what it was made of"
        )
    then, now = folder.report.run.get("model"), WeightFiles.open(original).fingerprint()
    if then != now:
        raise ValueError(
            f"the reference must be the original that {folder.path} was made of, whose fingerprint is "
            f"{str(then)[:12]}, {original} has {now[:12]}; name the model that was quantized, as it was then"
        )


def _check_memory(folder: LorqFolder, original: Path) -> None:
    """Refuse what does not fit: original and what surrounds the codes in float32, the codes, gradients of numbers."""
    dense = WeightFiles.open(original)
    entries = sum(math.prod(entry.shape) for header in dense.headers.values() for entry in header.tensors.values())
    packed = sum(layer.shape[0] * layer.shape[1] for layer in folder.report.layers)
    needed = 4 * entries + 4 * (entries - packed) + 2 * packed + 6 * folder.report.bytes // 8
    if needed > 0.9 * (available := available_bytes()):
        raise ValueError(
            f"tuning needs model and original in memory at once, {in_words(needed)} and what a batch takes, "
            f"{in_words(available)} are free; tune it block by block, with --steps 0 --block-steps 100"
        )


def _products(name: str, device: torch.device) -> torch.dtype:
    """The type of products behind its name."""
    if name != "auto":
        return read_dtype(name)
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
