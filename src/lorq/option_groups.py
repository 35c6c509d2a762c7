"""Help of commands with many options, in groups: what a newcomer needs comes first."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cyclopts.help import DefaultFormatter, HelpPanel, InlineText
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

# Settings of a method that are in no group of quantize below.
OWN = "The method's own"
PAPER = "Details of the methods, seldom changed"
_CALIBRATION = "calibration samples seq-len start-token token-weights seed"
_TRAINING = "batch seq-len start-token learning-rate"
# By command: groups with their flags, both in the order in which they are shown.
GROUPS: dict[str, dict[str, str]] = {
    "quantize": {
        "Basics": "model out preset method bits bits-per-weight size",
        "Quality and size": "group-size symmetric rank budget widths fused-alike exclude override tune",
        "Embeddings and head": "embeddings head table-codebook table-group-size",
        "Calibration": f"{_CALIBRATION} stream expert-tokens router-weights pass-dtype",
        "Running and resuming": "device cluster dry-run resume overwrite memory-budget spill-bytes json",
        "Inputs and cache in 8 bits": "activations smoothing kv-cache",
        OWN: "",
        PAPER: (
            "order metric exponent sketch iterations epochs range-measure slope-window slope-threshold min-gain "
            "codebook-columns codebook-rows kmeans-iterations shrinkage damping"
        ),
    },
    "evaluate": {
        "Basics": "model reference text adapter record json",
        "How it is measured": "window windows start-token device dtype products",
        "Tasks of lm-eval": "tasks task-path task-limit",
    },
    "export": {
        "Basics": "model out to dtype adapter overwrite",
        "GGUF files": "type embeddings fallback fold tokenizer-pre",
    },
    "compensate": {
        "Basics": "original quantized out form",
        "Quality and size": "budget max-rank rank factor-type exclude",
        "Calibration": _CALIBRATION,
        "Running and resuming": "device dry-run resume spill-bytes json",
    },
    "tune": {
        "Basics": "model out reference text steps",
        "Training": f"block-steps samples held-out {_TRAINING} seed",
        "Running and resuming": "device dtype resume overwrite json",
    },
    "adapt": {
        "Basics": "model out text mode steps reference device json",
        "Training": f"rank {_TRAINING} scale-rate scale-steps warmup gradient-checkpointing seed",
    },
    "merge": {"Basics": "model adapter out to", "Codes with --to groups": "grid bits group-size"},
}


def in_groups(command: str, flags: Iterable[str]) -> dict[str, list[str]]:
    """A command's flags, without dashes, by the titles of their groups; those that no group names are `OWN`.

    Example:
        >>> in_groups("quantize", ["rotation", "samples", "out", "model"])
        {'Basics': ['model', 'out'], 'Calibration': ['samples'], "The method's own": ['rotation']}
    """
    groups, left = {title: line.split() for title, line in GROUPS[command].items()}, list(flags)
    known = {flag for named in groups.values() for flag in named}
    groups |= {OWN: [flag for flag in left if flag not in known]}
    found = {title: [flag for flag in named if flag in left] for title, named in groups.items()}
    return {title: named for title, named in found.items() if named}


class GroupedHelp(DefaultFormatter):
    """Prints a command's help: a panel a group in place of one of all options, and lines as wide as there is room."""

    def __init__(self, command: str = "") -> None:
        super().__init__()
        self.command = command

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: HelpPanel) -> None:
        entries = [entry.copy(description=_joined(entry.description)) for entry in panel.entries]
        if self.command not in GROUPS:
            super().__call__(console, options, panel.copy(entries=entries))
            return
        named = {entry.positive_names[0].removeprefix("--"): entry for entry in entries}
        for title, flags in in_groups(self.command, named).items():
            super().__call__(console, options, panel.copy(title=title, entries=[named[flag] for flag in flags]))

    def render_description(self, console: "Console", options: "ConsoleOptions", description: Any) -> None:
        super().render_description(console, options, _joined(description))


def _joined(text: Any) -> Any:
    """A docstring's paragraphs without the breaks that its lines have in the source."""
    if not isinstance(text, InlineText):
        return text
    paragraphs = str(text.primary_renderable).strip().split("\n\n")
    return InlineText(
        Text("\n\n".join(" ".join(lines.split()) for lines in paragraphs)), force_empty_end=text.force_empty_end
    )
