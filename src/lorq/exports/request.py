"""What is asked of a target, what it answers, and how it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch, which help and refusals do not wait for
    from lorq.storage.folder import LorqFolder


@dataclass(frozen=True)
class ExportRequest:
    """What is asked beside the folder and the place to write to.

    Attributes:
        out: the name that the export will have, for what is printed and what files say of each other.
        dtype: of what is not quantized, "bfloat16", "float16" or "float32"; "auto" is the folder's own.
        adapter: the name that the adapter will have, where the low-rank part is asked for as one.
        adapter_place: where to write it.
    """

    out: Path
    dtype: str = "auto"
    adapter: Path | None = None
    adapter_place: Path | None = None


@dataclass(frozen=True)
class Exported:
    """What came out.

    Attributes:
        bytes: of all that was written.
        lines: to print, such as the command that serves it.
        lost: what the target cannot hold and the export is without, with how much that is.
        out: where; `lorq.export` puts it in.
    """

    bytes: int
    lines: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    out: Path = Path()


class Target(Protocol):
    """A module of this room."""

    def export(self, folder: "LorqFolder", out: Path, request: ExportRequest) -> Exported:
        """Write a folder's model to ``out``, a path where nothing is: a new folder, or a file.

        Targets that write no adapter must refuse ``request.adapter``.

        Raises:
            ValueError: `refusal`, before anything is written, if the target cannot hold the model.
        """


def refusal(target: str, what: str, others: str) -> ValueError:
    """The error for what a target cannot hold.

    Args:
        what: the rule and the first thing that breaks it, ``holds integer codes, model.layers.0 has trellis ones``.
        others: targets that can.
    """
    return ValueError(f"--to {target} {what}; it can be exported --to {others}")
