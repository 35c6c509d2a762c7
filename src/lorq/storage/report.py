"""The report of a quantized folder: one record per layer, and the totals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorq.storage.json_files import check_kinds, damaged, json_bytes, read_json, some_of
from lorq.storage.names import EXPORTED, JOURNAL, REPORT_NAME, check_version


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: module name.
        shape: (out, in).
        bits: width of a code.
        rank: of the low-rank part.
        stop, error_before, error_after: see `lorq.core.weight.Record`.
        bytes: stored for this layer, everything counted.
        note: what is out of the ordinary, such as an expert that saw too few tokens for statistics of its own.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    stop: str
    error_before: float
    error_after: float
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A quantization run's result.

    Attributes:
        method: its name.
        settings: its fields, before overrides.
        layers: in the order of the model.
        bytes: of all weight files' tensors, those left in full precision included.
        kept: parameters left as they were, by name, with the reason where it is not the rule.
        run: calibration text, samples, seed and so on, as asked for.
        checksums: sha256 of each weight file.
        seconds, stages: wall time of the run, and of calibration and solving; not stored, as never the same twice.
    """

    method: str
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    bytes: int
    kept: dict[str, str]
    run: dict[str, Any]
    checksums: dict[str, str]
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers over the number of their weights."""
        return _bits_per_weight(self.layers)

    @property
    def bits_in_words(self) -> str:
        """The same, and apart where the table of tokens or the head have codes: they are large in small models."""
        # Modules of blocks have the block's number in their names.
        tables = [layer for layer in self.layers if not any(part.isdigit() for part in layer.name.split("."))]
        if not 0 < len(tables) < len(self.layers):
            return f"{self.bits_per_weight:.3f}"
        blocks = _bits_per_weight([layer for layer in self.layers if layer not in tables])
        each = ", ".join(f"{_bits_per_weight([layer]):.3f} in {layer.name}" for layer in tables)
        return f"{self.bits_per_weight:.3f} ({blocks:.3f} in the blocks, {each})"

    def mean_error(self, when: str = "after") -> float:
        """Of the layers' outputs, "after" or "before"."""
        return sum(getattr(layer, f"error_{when}") for layer in self.layers) / max(len(self.layers), 1)

    @property
    def before_in_words(self) -> str:
        """What the errors before are those of."""
        if self.method == "compensate":
            return "without factors"
        if self.settings.get("grid", "integer") in ("integer", "normal-float"):
            return "rounding to nearest"
        return "rounding to integers of as many bits"  # what blocks of GGUF are measured against

    @property
    def errors_in_words(self) -> str:
        """The mean error of the layers' outputs, what to compare it with, and what it holds with."""
        words = f"{self.mean_error():.4f} ({self.before_in_words}: {self.mean_error('before'):.4f})"
        return words + (", with its adapter" if "low_rank_part" in self.run else "")

    def stop_in_words(self, layer: LayerReport) -> str:
        """Why a layer's rank is not larger."""
        if layer.stop != "candidates":
            return layer.stop
        return "asked for" if self.settings.get("rank") else "max rank"

    @property
    def notes(self) -> dict[str, str]:
        """The layers' notes by module, once for layers of one module with the same note, as those of an expert.

        And that the original had been quantized, where the low-rank part is, and why files that lie beside its weights
        do not lie beside these.
        """
        modules: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.note:
                modules.setdefault((layer.name.rpartition(".")[0], layer.note), []).append(layer.name)
        notes = {module if len(names) > 1 else names[0]: note for (module, note), names in modules.items()}
        if whole := [self.run[key] for key in ("dequantized", "low_rank_part") if key in self.run]:
            notes["all layers"] = "; ".join(whole)
        return notes | {name: f"not copied, {why}" for name, why in self.run.get("not_copied", {}).items()}

    def as_dict(self) -> dict[str, Any]:
        """What the folder keeps; `lorq inspect --json` prints it with `runs` beside it."""
        head = {"bits_per_weight": self.bits_per_weight, "bytes": self.bytes}
        rest = {k: v for k, v in asdict(self).items() if k not in ("seconds", "stages", "bytes")}
        return head | rest

    @classmethod
    def of(cls, told: dict[str, Any], *, where: Path) -> "Report":
        """What `as_dict` gave; a ValueError that names ``where`` if it is damaged."""
        check_kinds(told, _REPORT, where=where)
        if unknown := told.keys() - {key.removesuffix("?") for key in _REPORT}:
            raise damaged(where, f"it must have the keys of a report, {some_of(unknown)} is none")
        for name in ("kept", "checksums"):
            check_kinds(told[name], dict.fromkeys(told[name], str), where=where, what=f"{name}: ")
        _check_run(told["run"], where)
        layers = tuple(read_layer(entry, where) for entry in told["layers"])
        rest = {key: value for key, value in told.items() if key not in ("bits_per_weight", "layers")}
        return cls(layers=layers, **rest)

    def to_bytes(self) -> bytes:
        """The file's content; the same for the same run."""
        return json_bytes(self.as_dict())


_REPORT: dict[str, type] = {
    "method": str, "settings": dict, "layers": list, "bytes": int, "kept": dict, "run": dict, "checksums": dict,
    "bits_per_weight?": float, "seconds?": float, "stages?": dict,
}  # fmt: skip
_LAYER: dict[str, type] = {
    "name": str, "shape": list, "bits": int, "rank": int, "stop": str, "error_before": float, "error_after": float,
    "bytes": int, "note?": str,
}  # fmt: skip
# Of what a run was asked for, that which others than its own methods look into.
_RUN: dict[str, type] = {
    "original_bytes?": int, "not_copied?": dict, "tuning?": dict, "budget?": dict, "dequantized?": str,
    "low_rank_part?": str, "quantized_by?": dict, "form?": str, "lorq_version?": str,
}  # fmt: skip
_TUNING: dict[str, type] = {"kl_before": float, "kl_after": float, "held_out?": int, "steps?": int, "kept_step?": int}


def read_layer(entry: Any, where: Path | str) -> LayerReport:
    """What a report or a journal says of a layer; a ValueError that names ``where`` if it is damaged."""
    if not isinstance(entry, dict):
        raise damaged(where, f"layers must be objects, got {entry!r:.80}")
    what = f"{entry.get('name')!r:.80}: "
    check_kinds(entry, _LAYER, where=where, what=what)
    if unknown := entry.keys() - {key.removesuffix("?") for key in _LAYER}:
        raise damaged(where, f"{what}it must have the keys of a layer, {some_of(unknown)} is none")
    shape = entry["shape"]
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise damaged(where, f"{what}shape must be two numbers from 1, got {shape!r:.80}")
    if min(entry["bits"], entry["rank"], entry["bytes"]) < 0:
        raise damaged(where, f"{what}bits, rank and bytes must be at least 0, got {entry!r:.200}")
    return LayerReport(**{**entry, "shape": (shape[0], shape[1])})


def _check_run(run: dict[str, Any], where: Path) -> None:
    """Refuse, with a ValueError, what of a run is not as it was written."""
    check_kinds(run, _RUN, where=where, what="run: ")
    left = run.get("not_copied", {})
    check_kinds(left, dict.fromkeys(left, str), where=where, what="run: not_copied: ")
    if "tuning" in run:
        check_kinds(run["tuning"], _TUNING, where=where, what="run: tuning: ")
    if "budget" in run:
        check_kinds(run["budget"], {"harm?": float}, where=where, what="run: budget: ")
    if "quantized_by" in run:
        before = run["quantized_by"]
        check_kinds(before, {"method": str, "settings": dict, "run": dict}, where=where, what="run: quantized_by: ")
        _check_run(before["run"], where)


def ranks_in_words(ranks: Sequence[int], mean: bool = False) -> str:
    """From the least to the largest, and their mean where that is asked for and they differ.

    Example:
        >>> ranks_in_words([3, 16, 2]), ranks_in_words([3, 16, 2], mean=True), ranks_in_words([16, 16], mean=True)
        ('2 to 16', 'mean 7.0, 2 to 16', '16')
    """
    least, most = min(ranks), max(ranks)
    if least == most:
        return str(most)
    return (f"mean {sum(ranks) / len(ranks):.1f}, " if mean else "") + f"{least} to {most}"


def _bits_per_weight(layers: Sequence[LayerReport]) -> float:
    return 8 * sum(layer.bytes for layer in layers) / max(sum(layer.shape[0] * layer.shape[1] for layer in layers), 1)


def read_report(folder: str | Path) -> Report:
    """The report of a finished lorq folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or of a newer lorq.
    """
    folder = Path(folder).expanduser()
    path = folder / REPORT_NAME
    if (folder / JOURNAL).exists():
        raise FileNotFoundError(f"{folder} is an unfinished run and has no report yet; finish it with --resume")
    if not path.is_file():
        raise FileNotFoundError(_what_it_is(folder))
    if (folder / "config.json").is_file():  # adapters have none
        told = read_json(folder / "config.json").get("quantization_config")
        if isinstance(told, dict) and told.get("quant_method") == "lorq":
            check_version(told.get("format_version"))
    return Report.of(read_json(path), where=path)


def _what_it_is(folder: Path) -> str:
    """Of a place without a report, and what to do."""
    if not folder.exists():
        begun = folder.with_name(f"{folder.name}.unfinished")
        if begun.exists():
            return f"{folder} is not there yet, {begun} is its unfinished run; finish it with --resume"
        what = "file" if folder.suffix == ".gguf" else "folder"
        return f"there is no {what} {folder}; name one that `lorq quantize` wrote"
    if folder.is_file():
        return f"{folder} is a file and no lorq folder; name a folder that `lorq quantize` wrote"
    if (folder / EXPORTED).is_file():
        return f"{folder} is what `lorq export` wrote, and no lorq folder; name the folder that it was made of"
    if not (folder / "config.json").is_file():
        return f"{folder} has no {REPORT_NAME}: lorq did not write this folder; name one that `lorq quantize` wrote"
    return (
        f"{folder} has no {REPORT_NAME}: lorq did not write this folder, it looks like a model that lorq has not "
        f"quantized; `lorq quantize {folder} OUT` makes a folder of it"
    )
