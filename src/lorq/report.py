"""The report of a quantized folder: one record per layer, and the totals."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorq.safefile import json_bytes, parse_json

REPORT_NAME = "lorq_report.json"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: module name.
        shape: (out, in).
        bits: width of a code.
        rank: of the low-rank part.
        stop: why the rank is not larger.
        error_before: relative output error of rounding to nearest on the same kind of grid.
        error_after: relative output error of the result.
        bytes: stored for this layer, everything counted.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    stop: str
    error_before: float
    error_after: float
    bytes: int


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
        seconds: wall time of the run; not stored, since it is never the same twice. 0 when read back.
    """

    method: str
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    bytes: int
    kept: dict[str, str]
    run: dict[str, Any]
    checksums: dict[str, str]
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers over the number of their weights."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / max(weights, 1)

    def as_dict(self) -> dict[str, Any]:
        """What `lorq inspect --json` prints and the folder keeps."""
        head = {"bits_per_weight": self.bits_per_weight, "bytes": self.bytes}
        rest = {k: v for k, v in asdict(self).items() if k not in ("seconds", "bytes")}
        return head | rest

    def to_bytes(self) -> bytes:
        """The file's content; the same for the same run."""
        return json_bytes(self.as_dict())


def read_report(folder: Path) -> Report:
    """The report of a finished lorq folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        unfinished = (folder / "lorq_journal.jsonl").exists()
        why = "the run is unfinished, finish it with --resume" if unfinished else "lorq did not write this folder"
        raise FileNotFoundError(f"{folder} has no {REPORT_NAME}: {why}")
    content = parse_json(path.read_bytes(), where=path)
    try:
        content = {key: value for key, value in content.items() if key != "bits_per_weight"}
        layers = tuple(LayerReport(**{**entry, "shape": tuple(entry["shape"])}) for entry in content.pop("layers"))
        return Report(layers=layers, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the folder again") from error


def record_of(layer: LayerReport) -> dict[str, Any]:
    """A layer's report as the journal keeps it."""
    return json.loads(json.dumps(asdict(layer)))
