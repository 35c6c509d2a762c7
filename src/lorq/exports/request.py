"""What is asked of a target, what it answers, and how it refuses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from lorq.core.checks import check_name
from lorq.progress import EXPORT, Progress, no_progress, paced

if TYPE_CHECKING:  # torch, which help and refusals do not wait for
    from lorq.storage.folder import LorqFolder
    from lorq.storage.safetensors_file import Header


GgufType = Literal[
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "tq1_0", "tq2_0",
]  # fmt: skip


# llama.cpp's names of how byte-level tokenizers split text, as of 2026-10; it opens no file with another.
SPLIT_NAMES = tuple(
    """
    default llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano minicpm5 deepseek-llm
    deepseek-coder deepseek-v3 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de
    a.x-4.0 mellum mellum2 modern-bert jais jais-2 gemma4 granite-embed-multi-311m granite-embed-multi-97m sarvam-moe
    jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2 qwen35 deepseek-r1-qwen kormo f2llmv2
    stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe viking tekken smollm codeshell bloom gpt3-finnish exaone
    exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie tiny_aya cohere2moe superbpe trillion
    granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense joyai-llm kimi-k2 grok-2 afmoe
    laguna minimax-m2 solar-open k2-horizon
    """.split()
)


@dataclass(frozen=True)
class GgufOptions:
    """What a GGUF file leaves open.

    Attributes:
        type: of the quantized layers in a GGUF file; left out, the smallest that holds their codes exactly. What it
            does not hold exactly is rounded, and how much that changes is printed.
        embeddings: of the table of tokens and the head there; left out, what they are.
        fallback: of tensors there whose width is no multiple of the other type's blocks, which are refused without.
        fold: round the low-rank part into the type with the codes, for a GGUF file without an adapter.
        tokenizer_pre: what llama.cpp calls the tokenizer's way of splitting text, where lorq cannot tell.

    Raises:
        ValueError: for an unknown type, or a name that llama.cpp does not have.
    """

    type: GgufType | None = None
    embeddings: GgufType | None = None
    fallback: GgufType | None = None
    fold: bool = False
    tokenizer_pre: str | None = None

    def __post_init__(self) -> None:
        for option in ("type", "embeddings", "fallback"):
            if (name := getattr(self, option)) is not None:
                check_name(option, name, get_args(GgufType))
        if self.tokenizer_pre is not None and self.tokenizer_pre not in SPLIT_NAMES:
            close = get_close_matches(self.tokenizer_pre, SPLIT_NAMES, 3)
            near = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(SPLIT_NAMES)}"
            raise ValueError(
                f"tokenizer_pre must be a name that llama.cpp has for a way of splitting text, got "
                f"{self.tokenizer_pre!r}; {near}"
            )


@dataclass(frozen=True)
class ExportRequest:
    """What is asked beside the folder and the place to write to.

    Attributes:
        out: the name that the export will have, for what is printed and what files say of each other.
        dtype: of what is not quantized, "bfloat16", "float16" or "float32"; "auto" is the folder's own.
        adapter: the name that the adapter will have, where the low-rank part is asked for as one.
        adapter_place: where to write it.
        gguf: what is asked of a GGUF file.
        progress: called as ``progress(stage, done, total)``.
    """

    out: Path
    dtype: str = "auto"
    adapter: Path | None = None
    adapter_place: Path | None = None
    gguf: GgufOptions = GgufOptions()
    progress: Progress = no_progress

    def command(self, target: str) -> str:
        """The command that writes such an export of a lorq folder OUT."""
        words = ["lorq", "export", "OUT", *(["model.gguf"] if target == "gguf" else ["DEST", "--to", target])]
        told = {"dtype": None if self.dtype == "auto" else self.dtype, **vars(self.gguf)}
        told["adapter"] = None if self.adapter is None else f"ADAPTER{self.adapter.suffix}"
        for name, value in told.items():
            if value not in (None, False):
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return " ".join(words)

    def files(self, folder: "LorqFolder") -> "Iterator[tuple[str, Header]]":
        """The folder's weight files in order, one a block, with their headers; how far that is is told."""

        def measure(file: "tuple[str, Header]") -> tuple[bool, int]:
            """Whether there are codes in it, and its size."""
            header = file[1]
            return any(n.rpartition(".")[0] in folder.formats for n in header.tensors), header.file_bytes

        yield from paced(sorted(folder.reader.headers.items()), measure, self.progress, EXPORT)


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
