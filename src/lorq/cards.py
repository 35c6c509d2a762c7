"""Model cards: how something was made, what was measured, and how to load it, by what it is."""

import shlex
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, get_args

from lorq.exports.made import Made, is_for_others
from lorq.exports.request import GgufType
from lorq.exports.served import GPTQ_SERVED, SYMMETRIC_INPUTS, lora_flags, width_lines
from lorq.show import figures_line, metrics_line, smaller
from lorq.storage.json_files import read_json
from lorq.storage.measured import read_measured
from lorq.storage.names import EXPORTED
from lorq.storage.report import Report, ranks_in_words, read_report
from lorq.version import __version__

CARD = "README.md"
# Of a card's head, what holds for the quantized model too.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
_BEFORE = "Of the lorq folder OUT that {made}, before what is said to be lost above. This itself was not measured."

_LISTED = "vLLM, which lists both together as the model low-rank:"


def _installed(extra: str = "") -> str:
    """How lorq is installed, by the address that its package states, if it states one."""
    try:
        lines = metadata("lorq").get_all("Project-URL") or ()
    except PackageNotFoundError:  # its source, run as it is
        lines = ()
    stated = [line.partition(", ")[::2] for line in lines]
    address = next((url for name, url in stated if name.lower() in ("repository", "source")), "")
    here = f"'.[{extra}]'" if extra else "."
    if not address:
        return f"with lorq installed (`pip install {here}` in a copy of its source; it is not on PyPI)"
    name = f"lorq[{extra}]" if extra else "lorq"
    return f"with lorq installed (`pip install '{name} @ git+{address}'`)"


def card_of(place: Path, repo: str, base_model: str) -> str:
    """The card of a lorq folder, an export, an adapter or a GGUF file."""
    head, below = _own_card(place) if place.is_dir() else ({}, "")
    if is_for_others(place):
        from lorq.exports.read_back import read_made

        made = read_made(place)
        library = {"gguf": "", "gguf adapter": "", "adapter": "peft"}.get(made.kind, "transformers")
        tags = [{"gguf adapter": "gguf"}.get(made.kind, made.kind)] if made.kind != "adapter" else []
        tags += ["lora"] if made.is_adapter else []
        return _written(head, below, repo, base_model, library, tags, _of_made(made, repo, base_model))
    report = read_report(place)
    mark = read_json(place / EXPORTED) if (place / EXPORTED).is_file() else {}  # of `--to peft`
    tags = ["low-rank"] if any(layer.rank for layer in report.layers) else []
    lines = [_sizes(report), "", *(_elsewhere(repo) if mark else []), *_commands(report, str(mark.get("command", "")))]
    lines += _measured(report, read_measured(place).evaluations, "this and its adapter were made of" if mark else "")
    lines += _loading(repo, report, "ADAPTER" if mark else "")
    return _written(head, below, repo, base_model, "transformers", tags, lines)


def _own_card(place: Path) -> tuple[dict[str, Any], str]:
    """The head and the text of the card that travelled with the original's weights."""
    from huggingface_hub import ModelCard

    if not (place / CARD).is_file():
        return {}, ""
    try:
        card = ModelCard.load(place / CARD, ignore_metadata_errors=True)
    except Exception:  # what is no card is text
        return {}, (place / CARD).read_text(encoding="utf-8", errors="replace")
    return {key: value for key, value in card.data.to_dict().items() if key in _INHERITED}, card.text.strip()


def _written(
    head: Mapping[str, Any], below: str, repo: str, base_model: str, library: str, tags: list[str], lines: list[str]
) -> str:
    """A card, its head before it as the hub reads it."""
    from huggingface_hub import ModelCardData

    given: dict[str, Any] = dict(head) | ({"base_model": base_model} if base_model else {})
    if "base_model" in given:
        given["base_model_relation"] = "adapter" if "lora" in tags else "quantized"
    data = ModelCardData(
        **given, library_name=library or None, pipeline_tag="text-generation", tags=["lorq", "quantized", *tags]
    )
    title = f"# {repo.partition('/')[2]}"
    original = ["", "---", "", "The card of the original:", "", below] if below else []
    return "\n".join(["---", data.to_yaml(), "---", "", title, "", *lines, *original]).rstrip() + "\n"


def _elsewhere(repo: str, adapter: str = "ADAPTER") -> list[str]:
    return [
        f"The low-rank part of the quantized model is not in it: it is an adapter of its own, {adapter} below, as it "
        f"lies on the disk, or as it was pushed (`lorq push {adapter} ORG/NAME --base-model {repo}`).", "",
    ]  # fmt: skip


# ---- how it was made, and how good it is ------------------------------------------------------------------


def _sizes(report: Report) -> str:
    dequantized = f" {report.run['dequantized'].capitalize()}." if "dequantized" in report.run else ""
    return (
        f"Quantized with lorq {report.run.get('lorq_version', __version__)} (`{report.method}`): "
        f"{report.bits_in_words} bits per weight in {len(report.layers)} layers, all stored bits counted; "
        f"{report.bytes / 1e6:.1f} MB of weights{smaller(report, report.bytes)}.{dequantized}"
    )


def _commands(report: Report, *more: str) -> list[str]:
    return ["## How it was made", "", *(f"    {command}" for command in commands_of(report, *more)), ""]


def commands_of(report: Report, *more: str) -> list[str]:
    """The commands that make such a folder, one after the other, and ``more``, as far as there are any."""
    commands = []
    if base := report.run.get("quantized_by"):
        tuned = "tuning" in base["run"]
        names = {"MODEL": "ORIGINAL", "QUANTIZED": "BEFORE", "OUT": "UNTUNED" if tuned else "QUANTIZED"}
        names |= {"TUNED": "QUANTIZED"}
        own = commands_of(Report(base["method"], base["settings"], (), 0, {}, base["run"], {}))
        commands = [shlex.join(names.get(word, word) for word in shlex.split(command)) for command in own]
    commands.append(command_of(report))
    if told := report.run.get("tuning"):
        commands.append(f"lorq tune OUT TUNED --reference MODEL --steps {told.get('steps', 0)}")
    return [*commands, *filter(None, more)]


def command_of(report: Report) -> str:
    """The command that makes such a folder: what differs from the defaults, as flags."""
    from lorq.foreign.settings import Settings
    from lorq.methods import METHODS
    from lorq.pipeline.options import Options

    if report.method not in METHODS:  # compensate
        flags = _flags({"form": report.run.get("form", "peft")}, {"form": "peft"})
        defaults = vars(Settings())  # in their order; files sort the names
        flags += _flags({name: report.settings[name] for name in defaults if name in report.settings}, defaults)
        return shlex.join(["lorq", report.method, "ORIGINAL", "QUANTIZED", "OUT", *flags])
    run, options = dict(report.run), vars(Options())
    if run.get("calibration") is None:
        run |= {key: options[key] for key in ("calibration", "samples", "seq_len", "start_token")}
    else:
        start = "always" if run.get("start_token") else "never"
        run["start_token"] = options["start_token"] if run["calibration"] == options["calibration"] else start
    words = ["lorq", "quantize", "MODEL", "OUT", "--method", report.method]
    words += _flags(report.settings, vars(METHODS[report.method]())) + _flags(run, options)
    return shlex.join(words)


def _flags(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Those that differ."""
    words: list[str] = []
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in defaults or value == defaults[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [
                word for one in (value if isinstance(value, tuple) else (value,)) for word in (f"--{flag}", str(one))
            ]
    return words


def _measured(
    report: Report, evaluations: tuple[dict[str, Any], ...], made: str = "", *, apart: bool = False
) -> list[str]:
    """A section with what is known of OUT, the lorq folder: its layers' errors, and what `lorq evaluate` has found.

    Args:
        made: how the card's own is made of OUT, in words, where it is not OUT.
        apart: its adapter is not in it, or it is one.
    """
    beside = ", with its adapter" if apart or "low_rank_part" in report.run else ""
    than = report.before_in_words if report.method == "compensate" else f"with {report.before_in_words}"
    lines = ["## What was measured", "", *([_BEFORE.format(made=made), ""] if made else [])]
    lines += [
        f"The layers' outputs are off by {report.mean_error():.4f} of their squared norm{beside}; "
        f"by {report.mean_error('before'):.4f} {than}.",
        "",
    ]
    if not evaluations:
        return [*lines, "The whole model's quality not yet: `lorq evaluate OUT --reference MODEL` does.", ""]
    rows = [(f"text {found['text']}", figures_line(found)) for found in evaluations]
    rows += [(task, metrics_line(own)) for found in evaluations for task, own in found.get("tasks", {}).items()]
    table = [f"| {name} | {line} |" for name, line in rows]
    note = "KL is the mean divergence from the original, in nats a token; tasks are those of lm-eval."
    return [*lines, "| OUT on | found |", "|---|---|", *table, "", note, ""]


# ---- how to load it ---------------------------------------------------------------------------------------


def _loading(repo: str, report: Report, adapter: str = "") -> list[str]:
    """How to load a lorq folder."""
    if adapter:
        return ["## How to load it", "", f"PEFT, {_installed()}:", "", *_python(f'"{repo}"', adapter=adapter)]
    name = repo.partition("/")[2]
    plain, vllm, gguf = map(_installed, ("", "vllm", "gguf"))
    return [
        "## How to load it", "", f"transformers, {plain}:", "", *_python(f'"{repo}"'), "",
        f"vLLM, {vllm}:", "", f"    vllm serve {repo}", "",
        f"llama.cpp, {gguf}:", "", f"    hf download {repo} --local-dir {name}",
        f"    lorq export {name} {name}.gguf{_gguf_flags(report)}", f"    llama-cli -m {name}.gguf", "",
    ]  # fmt: skip


def _gguf_flags(report: Report) -> str:
    """What an export of a folder as one GGUF file needs: a type, where none holds its codes as they are."""
    told = report.settings
    grid, size = told.get("grid", "integer"), told.get("group_size", 0)
    whole = grid in get_args(GgufType) or (grid == "integer" and size > 0 and size % 32 == 0)
    plain = told.get("codebook", "scalar") == "scalar" and told.get("rotation", "none") == "none"
    ranked = any(layer.rank for layer in report.layers)
    return (" --fold" if ranked else "") + ("" if whole and plain and not ranked else " --type q8_0")


def _python(arguments: str, *imports: str, adapter: str = "") -> list[str]:
    """Lines that load a model with transformers, and an adapter on it with PEFT."""
    names = ", ".join(("AutoModelForCausalLM", *imports))
    first = ["from peft import PeftModel"] if adapter else []
    calls = [f"model = AutoModelForCausalLM.from_pretrained({arguments})"]
    calls += [f'model = PeftModel.from_pretrained(model, "{adapter}")'] if adapter else []
    return ["```python", *first, f"from transformers import {names}", "", *calls, "```"]


def _of_made(made: Made, repo: str, base: str) -> list[str]:
    """The card's lines of what other programs read."""
    report, kind = made.report, made.kind
    what = {
        "gguf": "A file for llama.cpp",
        "gguf adapter": "A LoRA file for llama.cpp",
        "adapter": "An adapter of PEFT",
    }
    told = what.get(kind, f"An export as {kind}")
    method = f" from a model quantized by `{report.method}`" if report and report.method != "compensate" else ""
    size = f"{made.bytes / 1e6:.1f} MB of tensors ({made.types()})"
    if made.is_adapter:
        ranks = f"rank {ranks_in_words(made.ranks)} in {len(made.ranks)} layers, {size}"
        lines = [f"{told} for {base}, made with lorq {made.version}{method}: {ranks}."]
    else:
        bits = f"{made.bits_per_weight():.3f} bits per weight where there are codes, " if _coded(made) else ""
        than = smaller(report, made.bytes) if report else ""
        lines = [f"{told}, made with lorq {made.version}{method}: {bits}{size}{than}."]
    lost = [f"* lost, {name}: {how}" for name, how in made.lost.items()]
    lines += ["", *([*lost, ""] if lost else [])]
    if made.has_adapter:
        lines += _elsewhere(repo, "ADAPTER.gguf" if kind == "gguf" else "ADAPTER")
    if report is not None:
        whence = "this and its adapter were made of" if made.has_adapter else "this was made of"
        whence = whence if made.command else ""  # an adapter of `lorq compensate` is OUT itself
        lines += _commands(report, made.command)
        lines += _measured(report, made.evaluations, whence, apart=made.has_adapter or made.is_adapter)
    return [*lines, "## How to load it", "", *_READERS[kind](made, repo, base), ""]


def _coded(made: Made) -> bool:
    return any(part.is_quantized for part in made.parts)


def _load_gguf(made: Made, repo: str, base: str) -> list[str]:
    adapter = " --lora ADAPTER.gguf" if made.has_adapter else ""
    return ["llama.cpp:", "", f"    llama-cli -hf {repo} -hff {shlex.quote(made.place.name)}{adapter}"]


def _load_gguf_adapter(made: Made, repo: str, base: str) -> list[str]:
    file = shlex.quote(made.place.name if made.place.is_file() else "adapter.gguf")
    return [
        f"llama.cpp, with the GGUF file of {base} as MODEL.gguf:", "", f"    hf download {repo} {file} --local-dir .",
        f"    llama-cli -m MODEL.gguf --lora {file}",
    ]  # fmt: skip


def _load_adapter(made: Made, repo: str, base: str) -> list[str]:
    dense, lines = _is_for(made, "compressed-tensors"), []
    if dense:
        lines = [_LISTED, "", f"    vllm serve {base} --dtype float16 {lora_flags(made.ranks, repo)}", ""]
        lines += _in_vllm(width_lines(layer.bits for layer in made.report.layers) if made.report else [])
    need = _installed() if _is_for(made, "peft") else "on the model that it is for"
    config = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if dense else ""
    code = _python(f'"{base}"{config}', *(["CompressedTensorsConfig"] if dense else []), adapter=repo)
    return [*lines, f"PEFT, {need}:", "", *code]


def _is_for(made: Made, target: str) -> bool:
    """Whether an adapter was exported beside such a base."""
    return f"--to {target} " in f"{made.command} "


def _vllm(made: Made, repo: str, *needs: str) -> list[str]:
    """How vLLM serves it, with its adapter where the low-rank part is one, and what that needs."""
    command, adapter = f"    vllm serve {repo} --dtype float16", _adapter_of(made)
    if not adapter or made.report is None:
        return ["vLLM:", "", command, "", *_in_vllm(needs)]
    ranks = [layer.rank for layer in made.report.layers if layer.rank]
    return [_LISTED, "", f"{command} {lora_flags(ranks, adapter)}", "", *_in_vllm(needs)]


def _in_vllm(needs: Iterable[str]) -> list[str]:
    return [line for need in needs for line in (f"{need}.", "")]


def _adapter_of(made: Made) -> str:
    """What stands for its adapter, where the low-rank part is one."""
    return "ADAPTER" if made.has_adapter else ""


def _load_compressed(made: Made, repo: str, base: str) -> list[str]:
    config = read_json(made.place / "config.json")["quantization_config"]
    kinds = list(config["config_groups"].values())
    needs = width_lines(kind["weights"]["num_bits"] for kind in kinds)
    if any(kind["input_activations"] and not kind["weights"]["symmetric"] for kind in kinds):
        needs.append(SYMMETRIC_INPUTS)
    groups = [kind["weights"] for kind in kinds if kind["format"] == "pack-quantized"]
    lines, adapter = _vllm(made, repo, *needs), _adapter_of(made)
    lines += ["transformers, with `pip install compressed-tensors`:", ""]
    if all(group["symmetric"] for group in groups):
        return [*lines, *_python(f'"{repo}"', adapter=adapter)]
    dense = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    return [*lines, *_python(f'"{repo}", {dense}', "CompressedTensorsConfig", adapter=adapter)]


def _load_gptq(made: Made, repo: str, base: str) -> list[str]:
    config = read_json(made.place / "config.json")["quantization_config"]
    kinds = [config, *filter(None, config.get("dynamic", {}).values())]
    served = config["checkpoint_format"] == "gptq" and all(kind["sym"] and kind["bits"] in (4, 8) for kind in kinds)
    lines = _vllm(made, repo) if served else _in_vllm([GPTQ_SERVED])
    code = _python(f'"{repo}"', adapter=_adapter_of(made))
    return [*lines, "transformers, with `pip install optimum gptqmodel`:", "", *code]


def _load_dense(made: Made, repo: str, base: str) -> list[str]:
    return ["transformers:", "", *_python(f'"{repo}"'), "", "vLLM:", "", f"    vllm serve {repo}"]


# By what it is: how other programs load it.
_READERS = {
    "gguf": _load_gguf, "gguf adapter": _load_gguf_adapter, "adapter": _load_adapter,
    "compressed-tensors": _load_compressed, "gptq": _load_gptq, "dense": _load_dense,
}  # fmt: skip
