"""The commands that write, each small: what is injured, and how it goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gguf_models import gguf_folder

TRAIN = ("--steps=2", "--batch=2", "--seq-len=16")
GROUPS = ("--bits", 4, "--group-size", 32)
PLAIN = ("--method", "nearest", *GROUPS)


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        command: its words, with the models and texts of `Models` in braces, OUT and BESIDE.
        out: what it makes, in the place that is its own; BESIDE is another thing beside it.
        resume: what is added to go on; nothing where the same command does.
    """

    command: tuple[object, ...]
    out: str = "out"
    resume: tuple[str, ...] = ()


def _quantize(*more: object, out: str = "out") -> Case:
    return Case(("quantize", "{source}", "OUT", *more), out, ("--resume",))


def _export(target: str, out: str = "out") -> Case:
    return Case(("export", "{plain}", "OUT", "--to", target), out)


_SMALL = ("--calibration", "{text}", "--samples", 4, "--seq-len", 32)
_TUNE = ("--reference", "{source}", "--text", "{text}", "--samples=2", "--held-out=1", "--seq-len=16", "--batch=1")
_FACTORS = ("--rank", 4, "--calibration", "{text}", "--samples", 2, "--seq-len", 32, "--token-weights", "equal")
CASES = {
    "quantize": _quantize(*PLAIN),
    "quantize and tune": _quantize("--method", "gptq", *GROUPS, "--tune", 1, *_SMALL),
    "quantize into a file": _quantize("--method", "gptq", "--grid", "q4_0", *_SMALL, out="out.gguf"),
    "tune": Case(("tune", "{plain}", "OUT", *_TUNE, "--steps", 2, "--block-steps", 1), resume=("--resume",)),
    "compensate": Case(("compensate", "{source}", "{plain}", "OUT", *_FACTORS), resume=("--resume",)),
    "compensate a folder": Case(
        ("compensate", "{source}", "{plain}", "OUT", "--form", "lorq", *_FACTORS), resume=("--resume",)
    ),
    "export dense": _export("dense"),
    "export compressed-tensors": _export("compressed-tensors"),
    "export gptq": _export("gptq"),
    "export gguf": _export("gguf", "out.gguf"),
    # Two things never appear at once: where one is there, it is to be replaced.
    "export peft": Case(("export", "{ranks}", "OUT", "--to", "peft", "--adapter", "BESIDE"), resume=("--overwrite",)),
    "adapt": Case(("adapt", "{lords}", "OUT", "--text", "{text}", *TRAIN)),
    "adapt in groups": Case(
        ("adapt", "{plain}", "OUT", "--text", "{text}", "--mode", "qat", "--reference", "{source}", *TRAIN)
    ),
    "merge": Case(("merge", "{lords}", "{adapter}", "OUT")),
    "merge to groups": Case(("merge", "{lords}", "OUT", "--to", "groups", "--group-size", 32)),
}


@dataclass(frozen=True)
class Models:
    """What the commands read, made by a `harness.Machine` when first asked for; not to be changed."""

    folder: Path
    text: Path
    run: Callable[..., object] = field(repr=False)

    @cached_property
    def source(self) -> Path:
        """A random model."""
        return gguf_folder(self.folder / "source", "llama")

    @cached_property
    def plain(self) -> Path:
        """Codes in groups."""
        return self._made("plain", "quantize", self.source, *PLAIN)

    @cached_property
    def ranks(self) -> Path:
        """Codes and low-rank factors."""
        flags = ("--budget", 1, "--min-gain", 0, "--rounding", "nearest")
        return self._made("ranks", "quantize", self.source, "--method", "flrq", *GROUPS, *flags, *_SMALL)

    @cached_property
    def lords(self) -> Path:
        """Codes with scales of low rank."""
        flags = ("--rounding", "nearest", "--weighting", "none", "--steps", 2, "--refine-steps", 0)
        return self._made("lords", "quantize", self.source, "--method", "lords", *GROUPS, *flags, *_SMALL)

    @cached_property
    def adapter(self) -> Path:
        """Other scales for them."""
        return self._made("adapter", "adapt", self.lords, "--text", self.text, *TRAIN)

    def _made(self, name: str, command: str, model: Path, *flags: object) -> Path:
        out = self.folder / name
        self.run(self.folder, command, model, out, *self.filled(flags))
        return out

    def filled(self, words: tuple[object, ...]) -> list[object]:
        """A command's words with these models' places."""
        return [getattr(self, word[1:-1]) if isinstance(word, str) and word.startswith("{") else word for word in words]
