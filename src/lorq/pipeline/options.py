"""What is asked of a run, whatever the method."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from lorq.core.checks import Range, check_name, check_settings
from lorq.core.stats import TokenWeights
from lorq.methods import METHODS, Method
from lorq.models.texts import StartToken


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
        device: where blocks are run and solved: "auto", "cpu", "cuda", "cuda:1" and so on.
        token_weights: "equal" counts each calibration token the same, "plain" by its squared length, "gradient" by how
            much each layer's output at it decides what the model says: better, and one more pass forward and back.
        router_weights: weigh a routed token by its squared router weight in the expert's statistics.
        expert_tokens: an expert that sees fewer calibration tokens than this gets the statistics of all tokens of
            its layer; the report names it.
        stream: whose outputs calibrate the next block: the "original" model's or the "quantized" one's; "auto" is the
            quantized one's for methods that fit a whole block (lrq, lords with refine_steps), else the original's.
        activations: inputs of the quantized layers in 8 bits: "token", on each token's own range, or "tensor", on one
            range from calibration.
        smoothing: how much of the inputs' range is moved into the weights where inputs come from a norm, 0 to 1
            (SmoothQuant's alpha); for activations in 8 bits.
        kv_cache: "token" rounds keys and values to 8 bits, on each token's own range.
        exclude: regular expressions; layers whose name one of them matches stay as they are.
        override: "REGEX:key=value"; matching layers get another setting of the method.
        average_bits: code bits on average, such as 2.25: as many layers as that allows get ``wide_bits`` in place of
            the method's bits; 0 for one width. Layers whose bits are overridden are not counted.
        wide_bits: see there.
        wide_layers: which layers are made wider, those of the "first" or of the "last" blocks.
        spill_bytes: hidden states, and what else is kept of every window, go to files mapped into memory past this.
        dry_run: check everything, report the sizes, write nothing.
        resume: continue an interrupted run in the same folder.
        overwrite: replace a folder that lorq wrote.
    """

    calibration: str = "self"
    samples: Annotated[int, Range(1)] = 128
    seq_len: Annotated[int, Range(2)] = 2048
    start_token: StartToken = "auto"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"
    token_weights: TokenWeights = "equal"
    router_weights: bool = False
    expert_tokens: Annotated[int, Range(1)] = 128
    stream: Literal["auto", "original", "quantized"] = "auto"
    activations: Literal["none", "token", "tensor"] = "none"
    smoothing: Annotated[float, Range(0, 1)] = 0.0
    kv_cache: Literal["none", "token"] = "none"
    exclude: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    average_bits: Annotated[float, Range(0, 8)] = 0.0
    wide_bits: Annotated[int, Range(2, 8)] = 4
    wide_layers: Literal["first", "last"] = "first"
    spill_bytes: Annotated[int, Range(0)] = 2 << 30
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False


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
    return chosen


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
