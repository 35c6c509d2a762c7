"""What is asked of a run, whatever the method."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from lorq.methods import METHODS, Method


@dataclass(frozen=True)
class Options:
    """How a run is done, whatever the method.

    Attributes:
        calibration: text that the inputs are measured on: "self" (the model writes it, kept for the next run),
            "python-docs" (or its halves, "python-docs-even" and "python-docs-odd"), "wikitext2", "c4", or a text or
            JSONL file.
        samples: calibration windows.
        seq_len: tokens of a window.
        seed: of every random choice; the same seed gives the same bytes.
        device: where blocks are run and solved: "auto", "cpu", "cuda", "cuda:1" and so on.
        token_weights: "equal" counts each calibration token the same, "plain" by its squared length.
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
        spill_bytes: hidden states larger than this go to a file mapped into memory.
        dry_run: check everything, report the sizes, write nothing.
        resume: continue an interrupted run in the same folder.
        overwrite: replace a folder that lorq wrote.
    """

    calibration: str = "self"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    token_weights: Literal["equal", "plain"] = "equal"
    router_weights: bool = False
    expert_tokens: int = 128
    stream: Literal["auto", "original", "quantized"] = "auto"
    activations: Literal["none", "token", "tensor"] = "none"
    smoothing: float = 0.0
    kv_cache: Literal["none", "token"] = "none"
    exclude: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    average_bits: float = 0.0
    wide_bits: int = 4
    wide_layers: Literal["first", "last"] = "first"
    spill_bytes: int = 2 << 30
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
            options[key] = tuple(options[key])
    chosen = Options(**options)
    for name, least in (("samples", 1), ("seq_len", 2), ("expert_tokens", 1), ("spill_bytes", 0)):
        if getattr(chosen, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(chosen, name)}")
    if not 0 <= chosen.seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2^63 - 1, got {chosen.seed}")
    hints = get_type_hints(Options)
    for name in ("token_weights", "stream", "activations", "kv_cache", "wide_layers"):
        values = get_args(hints[name])
        if getattr(chosen, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(chosen, name)!r}")
    if not 0 <= chosen.smoothing <= 1:
        raise ValueError(f"smoothing must be between 0 and 1, got {chosen.smoothing}")
    if chosen.smoothing and chosen.activations == "none":
        raise ValueError(
            f"smoothing serves activations in 8 bits, got smoothing {chosen.smoothing} and activations 'none'; "
            "choose activations token or tensor, or no smoothing"
        )
    return chosen


def read_method(method: str | Method) -> Method:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()
