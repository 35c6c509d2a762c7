"""lorq verify: whether what lorq has written is as it was written, and what is wrong with which layer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorq.adapt.folder import ADAPTER_CONFIG
from lorq.bars import console
from lorq.exports.made import is_for_others
from lorq.models.locate import full_path
from lorq.progress import IMPORT, Progress, no_progress
from lorq.storage.json_files import read_json, some_of
from lorq.storage.names import JOURNAL, REPORT_NAME
from lorq.storage.report import read_report


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        place: what was looked at.
        kind: what it is, in words.
        faults: what is wrong, each with the file, layer or tensor (``where``) and the rule with the value (``what``).
        sealed: files whose checksum is right.
        unsealed: files that no checksum is known of.
        tensors: how many were looked at.
        notes: what could not be looked at, and why.
    """

    place: Path
    kind: str
    faults: tuple[Any, ...]
    sealed: tuple[str, ...]
    unsealed: tuple[str, ...]
    tensors: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `lorq verify --json` prints."""
        return asdict(self) | {"place": str(self.place)}


def verify(out: str | Path, *, progress: Progress | None = None) -> Verified:
    """Compare OUT with its checksums, and look at every tensor: whether it is there, its type, shape and values.

    After the first fault it goes on; all that is wrong is listed, with the file, layer or tensor. The exit status is 1
    where something is. Nothing is run, one layer at a time is in memory.

    Args:
        out: a lorq folder, an adapter, or a folder or GGUF file that `lorq export` wrote. Of models of other programs
            no checksum is known, the rest is looked at.

    Raises:
        FileNotFoundError: if nothing of these is there, or a run is unfinished.
    """
    place, progress = full_path(out), progress or no_progress
    kind = _kind(place)
    progress(IMPORT, 0, 1)
    from lorq.runtime.device import own_defaults
    from lorq.storage.findings import Findings

    progress(IMPORT, 1, 1)
    found = Findings(place, progress)
    with own_defaults():
        if kind == "a lorq folder":
            _check_lorq(place, found)
        elif kind == "an adapter of lorq":
            from lorq.adapt.check_adapter import check_adapter

            check_adapter(place, found)
        else:
            from lorq.exports.check_made import check_made

            check_made(place, found)
    return Verified(
        place, kind, tuple(found.faults), tuple(found.sealed), tuple(dict.fromkeys(found.unsealed)), found.tensors,
        tuple(found.notes),
    )  # fmt: skip


def _kind(place: Path) -> str:
    """What it is, in words.

    Raises:
        FileNotFoundError: if it is nothing that is known here.
    """
    if place.is_file():
        return "a file for llama.cpp"
    if (place / ADAPTER_CONFIG).is_file():
        return "an adapter of lorq"
    if is_for_others(place):
        adapts = any((place / name).is_file() for name in ("adapter_config.json", "adapter.gguf"))
        return "an adapter" if adapts else "an export"
    if (place / REPORT_NAME).is_file() or (place / JOURNAL).exists() or not (place / "config.json").is_file():
        if not (place / REPORT_NAME).is_file() or (place / JOURNAL).exists():
            read_report(place)  # whose errors say what it is
        return "a lorq folder"
    try:
        own = read_json(place / "config.json").get("quantization_config")
    except ValueError:
        own = None  # which is a fault
    return "a lorq folder" if isinstance(own, dict) and own.get("quant_method") == "lorq" else "a model of others"


def _check_lorq(place: Path, found: Any) -> None:
    """A lorq folder by itself, and as the model that its config tells of."""
    from lorq.storage.check_folder import check_folder

    check_folder(place, found)
    if any("must have the sha256" not in fault.what for fault in found.faults):
        return  # the model could only say the same
    from lorq.runtime.swap import check_fits
    from lorq.storage.folder import LorqFolder

    with found.of("config.json"):
        check_fits(LorqFolder.open(place))


def print_verified(done: Verified, as_json: bool) -> None:
    """What was found, and an error if something is wrong."""
    if as_json:
        print(json.dumps(done.as_dict()))
    else:
        for fault in done.faults:
            console.print(f"{fault.where}: {fault.what}", soft_wrap=True)
        for note in done.notes:
            console.print(f"note: {note}", soft_wrap=True)
        without = f"; no checksum is known of {some_of(done.unsealed)}" if done.unsealed else ""
        sealed = f"{len(done.sealed)} files match their checksums, {done.tensors} tensors were looked at{without}"
        console.print(f"{done.place} is {done.kind}: {sealed}", soft_wrap=True)
    refuse_faults(done)


def refuse_faults(done: Verified) -> None:
    """An error if something is wrong, a ValueError that has the first of it."""
    if done.faults:
        first, count = done.faults[0], len(done.faults)
        more = "1 fault" if count == 1 else f"{count} faults, the first"
        raise ValueError(
            f"{done.place} has {more}: {first.where}: {first.what}; copy or write it again, `lorq verify` lists all"
        )
