"""What is asked of a run, whatever the method."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from lorq.core.checks import Range, check_name, check_settings
from lorq.core.codes.trellis import MOST_BITS
from lorq.core.stats import TokenWeights
from lorq.methods import METHODS, Method
from lorq.methods.common import GgufType
from lorq.models.texts import StartToken

# Of a table: a width, or a type.
TableBits = Annotated[int | GgufType, Range(0, 8, words=get_args(GgufType))]


@dataclass(frozen=True)
class Options:
    """How a run is done, whatever the method.

    Attributes:
        calibration: text that the inputs are measured on: "self" (the model writes it, kept for the next run),
            "python-docs" (or its halves, "python-docs-even" and "python-docs-odd"), "wikitext2", "c4", or a text or
            JSONL file.
        samples: calibration windows.
        seq_len: tokens of a window.
        start_token: begin each window of a text with a start token: "auto" (as the model's tokenizer does), "always" or
            "never". What the model writes itself always begins with one.
        seed: of every random choice; the same seed gives the same bytes.
        device: where blocks are run and solved: "auto", "cpu", "cuda", "cuda:1" and so on; of several, such as
            "cuda:0,cuda:1", blocks are run on the first, and each has a process that solves layers.
        cluster: solve the layers on a Ray cluster: "auto" for the one that this machine belongs to, its HOST:PORT,
            "local" for one that is made of this machine, or "" for none. A task takes as many CPUs as this process has
            threads, or a GPU where blocks are run on one.
        token_weights: "equal" counts each calibration token the same, "plain" by its squared length, "gradient" by how
            much each layer's output at it decides what the model says: better, and one more pass forward and back.
        router_weights: weigh a routed token by its squared router weight in the expert's statistics.
        expert_tokens: an expert that sees fewer calibration tokens than this gets the statistics of all tokens of
            its layer; the report names it.
        stream: whose outputs calibrate the next block: the "original" model's or the "quantized" one's; "corrected" is
            the quantized one's too, and layers, but experts', make up for a part of what those before have changed;
            "auto" is the quantized one's for methods that fit a whole block (lrq, lords with refine_steps), else the
            original's.
        pass_dtype: in what the calibration's passes multiply: "bfloat16" takes half as long where the processor has
            instructions for it, and changes KL by less than its noise.
        activations: inputs of the quantized layers in 8 bits: "token", on each token's own range, or "tensor", on one
            range from calibration.
        smoothing: how much of the inputs' range is moved into the weights where inputs come from a norm and, with
            activations "tensor", from another layer channel by channel (down_proj's from up_proj), 0 to 1
            (SmoothQuant's alpha); for activations in 8 bits.
        kv_cache: "token" rounds keys and values to 8 bits, on each token's own range.
        exclude: regular expressions; layers whose name one of them matches stay as they are.
        override: "REGEX:key=value"; matching layers get another setting of the method.
        embeddings: bits of the table that tokens are looked up in, 1 to 8, or a block type of GGUF, such as q8_0; 0
            leaves it as it is. Rounded to nearest, row by row, but where it is the head too.
        head: the same of the layer that makes the logits. Rounded with error feedback, under its own inputs, where
            there is calibration. Where both are one table, either option says its bits.
        table_codebook: what the codes of these two stand for: "scalar" values of an integer grid, or "trellis" values,
            1 to 6 bits and a scale for each row, which lose less than half as much; "auto" for what the method's stand
            for.
        table_group_size: columns of these two that share a scale, with scalar codes; -1 for one group per row.
        bits_per_weight: all stored bits of the quantized layers over their weights, on average, such as 2.9: each layer
            gets those bits and settings of the method with which the whole model is harmed least; 0 for the method's
            own.
        size: the same with a budget for all weight files together, such as "4.2GB", embeddings included.
        widths: with a budget, the widths of codes to choose from, each with the flag; left out, those with kernels.
        fused_alike: with a budget, layers that read one input (q, k and v; gate and up; those of all experts) get one
            setting, as servers want that fuse them.
        spill_bytes: hidden states, and what else is kept of every window, go to files mapped into memory past this.
        memory_budget: memory that the process may take, such as "8GB": what is kept of the windows goes to files where
            it would not fit, and what cannot be kept within it is refused before the work; "" for what there is.
        dry_run: check everything, try one block and its largest layer, tell sizes, memory and time, write nothing.
        resume: continue an interrupted run in the same folder.
        overwrite: replace a folder that lorq wrote.
    """

    calibration: str = "self"
    samples: Annotated[int, Range(1)] = 128
    seq_len: Annotated[int, Range(2)] = 2048
    start_token: StartToken = "auto"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"
    cluster: str = ""
    token_weights: TokenWeights = "equal"
    router_weights: bool = False
    expert_tokens: Annotated[int, Range(1)] = 128
    stream: Literal["auto", "original", "quantized", "corrected"] = "auto"
    pass_dtype: Literal["float32", "bfloat16"] = "float32"
    activations: Literal["none", "token", "tensor"] = "none"
    smoothing: Annotated[float, Range(0, 1)] = 0.0
    kv_cache: Literal["none", "token"] = "none"
    exclude: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    embeddings: TableBits = 0
    head: TableBits = 0
    table_codebook: Literal["auto", "scalar", "trellis"] = "auto"
    table_group_size: Annotated[int, Range(1, minus_one="one group per row")] = 64
    bits_per_weight: Annotated[float, Range(0, 16)] = 0.0
    size: str = ""
    widths: tuple[int, ...] = ()
    fused_alike: bool = False
    spill_bytes: Annotated[int, Range(0)] = 2 << 30
    memory_budget: str = ""
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False

    @property
    def has_budget(self) -> bool:
        """Each layer's settings are chosen, so that all together meet a size."""
        return bool(self.bits_per_weight or self.size)


def read_options(options: dict[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}; known are {', '.join(known)}")
    for key in ("exclude", "override"):
        if isinstance(options.get(key), str):
            options[key] = (options[key],)
        elif key in options:
            given = options[key]
            if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
                raise TypeError(f"{key} must be a text or a list of texts, got {given!r}")
            options[key] = tuple(given)
    if "widths" in options:
        given = options["widths"]
        if not isinstance(given, list | tuple) or not all(type(bits) is int and 1 <= bits <= 8 for bits in given):
            raise ValueError(f"widths must be a list of whole numbers from 1 to 8, got {given!r}")
        options["widths"] = tuple(dict.fromkeys(given))
    if isinstance(options.get("calibration"), Path):
        options["calibration"] = str(options["calibration"])
    chosen = Options(**options)
    check_settings(chosen)
    if chosen.smoothing and chosen.activations == "none":
        raise ValueError(
            f"smoothing serves activations in 8 bits, got smoothing {chosen.smoothing} and activations 'none'; "
            "choose activations token or tensor, or no smoothing"
        )
    if chosen.router_weights and chosen.token_weights == "gradient":
        raise ValueError(
            "token_weights 'gradient' counts a routed token by its squared router weight already, got router_weights "
            "too; leave router_weights away"
        )
    if chosen.cluster and "," in chosen.device:
        raise ValueError(
            f"layers are solved on several devices or on a cluster, got device {chosen.device} and cluster "
            f"{chosen.cluster}; give the one device that blocks are run on here"
        )
    _check_tables(chosen)
    _check_budget(chosen)
    return chosen


def _check_tables(options: Options) -> None:
    """Refuse settings of tables that no table has, or that exclude each other."""
    grouped = options.table_group_size != Options.table_group_size
    for name in ("table_group_size", "table_codebook"):
        value = getattr(options, name)
        if value != getattr(Options, name) and not (options.embeddings or options.head):
            raise ValueError(
                f"{name} serves embeddings and head, got {value} and neither of them; give the bits of one, or leave "
                "it away"
            )
    if options.table_codebook == "auto":
        return
    for part in ("embeddings", "head"):
        bits = getattr(options, part)
        if isinstance(bits, str):
            raise ValueError(
                f"{part} {bits} says what its codes stand for, got table_codebook {options.table_codebook!r} too; "
                "leave it away"
            )
        if options.table_codebook == "trellis" and bits > MOST_BITS:
            raise ValueError(f"trellis codes have 1 to {MOST_BITS} bits, got {part} {bits}; give table_codebook scalar")
    if options.table_codebook == "trellis" and grouped:
        raise ValueError(
            f"trellis codes have a scale for each row, got table_group_size {options.table_group_size}; leave it away, "
            "or give table_codebook scalar"
        )


def _check_budget(options: Options) -> None:
    """Refuse to ask for one thing twice, or in a way that means nothing."""
    given = [name for name in ("bits_per_weight", "size") if getattr(options, name)]
    if len(given) > 1:
        told = " and ".join(f"{name} {getattr(options, name)}" for name in given)
        raise ValueError(f"bits_per_weight and size are two ways to ask for the same, got {told}; keep one")
    for name in ("size", "memory_budget"):
        if value := getattr(options, name):
            read_size(value, name)
    for name in ("widths", "fused_alike"):
        if getattr(options, name) and not options.has_budget:
            raise ValueError(f"{name} goes with a budget, got none; give bits_per_weight or size, or leave it away")
    if options.has_budget and options.token_weights != "gradient":
        raise ValueError(
            f"a budget needs token_weights gradient, which tell how much the model depends on each layer, got "
            f"{options.token_weights!r}"
        )


def read_size(text: str, name: str = "size") -> int:
    """Bytes, of a number with a unit; ``name`` is what an error calls it.

    Raises:
        ValueError: if it is none.

    Example:
        >>> read_size("4.2GB"), read_size("107 MB"), read_size("1GiB")
        (4200000000, 107000000, 1073741824)
    """
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([KMG]i?)?B", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{name} must be a number of KB, MB or GB (or KiB, MiB, GiB), such as 4.2GB, got {text!r}")
    unit = (found[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(found[1]) * base ** " KMG".index(unit[:1] or " "))


def read_method(method: str | Method) -> Method:
    if not isinstance(method, str):
        if isinstance(method, type) or not isinstance(method, Method):
            raise TypeError(f"method must be a name or a method such as lorq.FLRQ(bits=3), got {method!r}")
        return method
    check_name("method", method, METHODS)
    return METHODS[method]()


def method_name(method: Method) -> str:
    """By which `read_method` knows a method; that of its class, where it does not."""
    kind = type(method)
    return next((name for name, known in METHODS.items() if known is kind), kind.__name__.lower())
