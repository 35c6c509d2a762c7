"""What was made here, on the hub: a model card, and the upload."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorq.exports import TARGETS
from lorq.models.locate import full_path
from lorq.show import figures_line, metrics_line
from lorq.storage.json_files import read_json
from lorq.storage.measured import read_measured
from lorq.storage.names import EXPORTED, REPORT_NAME
from lorq.storage.report import Report, read_report
from lorq.version import __version__

CARD = "README.md"
# Of a card's head, what holds for the quantized model too.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")


@dataclass(frozen=True)
class Pushed:
    """What is on the hub.

    Attributes:
        card: the model card.
        url: of the repository; "" after a dry run.
    """

    card: str
    url: str = ""


def push(
    out: str | Path, repo: str, *, base_model: str = "", private: bool = False, dry_run: bool = False,
) -> Pushed:  # fmt: skip
    """Upload OUT to the Hugging Face hub, with a model card: how it was made, what was measured, how to load it.

    Files are compared with their checksums first. A card that came with the original stands below the new one, and its
    licence and languages go into the new one's head.

    Args:
        out: a lorq folder, a folder that `lorq export` wrote, or a GGUF file.
        repo: where to, org/name; made if it is not there.
        base_model: the original's name on the hub, for the card.
        private: make the repository private, if it is made.
        dry_run: print the card, upload nothing.

    Returns:
        The card, and the repository's address.

    Raises:
        FileNotFoundError, ValueError: for what lorq has not made, damaged files, and names that the hub does not take.
        PermissionError: without a token of the hub.
        OSError: if the hub refuses, or is not there.
    """
    place = full_path(out)
    _check_made(place)
    _check_name("repo", repo)
    if base_model:
        _check_name("base_model", base_model)
    card = _card(place, repo, base_model)
    if dry_run:
        return Pushed(card)
    if (place / REPORT_NAME).is_file():
        from lorq.storage.reader import verify_shards  # and with it torch, which cards do not wait for

        verify_shards(place, read_report(place).checksums)
    return Pushed(card, _upload(place, repo, card, private))


def _check_made(place: Path) -> None:
    """Refuse what lorq has not made, with a FileNotFoundError or ValueError."""
    if place.is_file() and place.suffix.lower() != ".gguf":
        raise ValueError(f"OUT must be a lorq folder, an export's, or a .gguf file, got the file {place}")
    if not place.is_file() and not (place / EXPORTED).is_file():
        read_report(place)


def _check_name(what: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what} must be a name on the hub, such as org/name, got {name!r} ({reason})") from None
    if name.count("/") != 1:
        raise ValueError(f"{what} must be an organisation or user and a name, such as org/name, got {name!r}")


def _upload(place: Path, repo: str, card: str, private: bool) -> str:
    """The address of the repository, which has everything then."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PermissionError(f"pushing to {repo} needs a token of the hub; `hf auth login` or HF_TOKEN gives one")
    api = HfApi(library_name="lorq", library_version=__version__)
    try:
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if place.is_file():
            api.upload_file(path_or_fileobj=place, path_in_repo=place.name, repo_id=repo)
        else:
            api.upload_folder(repo_id=repo, folder_path=place, ignore_patterns=[CARD, ".*", "*.tmp"])
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo)
    except Exception as error:  # of the hub's and the network's many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{place} could not be pushed to {repo}: {reason}; the same command goes on") from error
    return url


def _card(place: Path, repo: str, base_model: str) -> str:
    """The card of whatever it is."""
    if place.is_file():
        return _written({}, "", repo, base_model, "", ["gguf"], _exported(repo, "gguf", {}))
    head, body = _own_card(place)
    if (place / EXPORTED).is_file():
        told = read_json(place / EXPORTED)
        lines = _exported(repo, str(told.get("target")), told.get("lost") or {})
        return _written(head, body, repo, base_model, "transformers", [], lines)
    report = read_report(place)
    lines = [
        _sizes(report),
        "",
        *_made(report),
        *_measured(place),
        *_loading(repo, exact=report.settings.get("codebook", "scalar") == "scalar"),
    ]
    return _written(head, body, repo, base_model, "transformers", ["low-rank"], lines)


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
        given["base_model_relation"] = "quantized"
    data = ModelCardData(
        **given, library_name=library or None, pipeline_tag="text-generation", tags=["lorq", "quantized", *tags]
    )
    title = f"# {repo.partition('/')[2]}"
    original = ["", "---", "", "The card of the original:", "", below] if below else []
    return "\n".join(["---", data.to_yaml(), "---", "", title, "", *lines, *original]).rstrip() + "\n"


def _sizes(report: Report) -> str:
    before = report.run.get("original_bytes", 0)
    smaller = f", {before / report.bytes:.1f} times smaller than the original" if before > report.bytes else ""
    dequantized = f" {report.run['dequantized'].capitalize()}." if "dequantized" in report.run else ""
    return (
        f"Quantized with [lorq](https://pypi.org/project/lorq) {report.run.get('lorq_version', __version__)} "
        f"(`{report.method}`): {report.bits_per_weight:.3f} bits per weight in {len(report.layers)} layers, all stored "
        f"bits counted; {report.bytes / 1e6:.1f} MB of weights{smaller}.{dequantized}"
    )


def _made(report: Report) -> list[str]:
    commands = [command_of(report)]
    if tuned := report.run.get("tuning"):
        commands.append(f"lorq tune OUT TUNED --reference MODEL --steps {tuned.get('steps', 0)}")
    return ["## How it was made", "", *(f"    {command}" for command in commands), ""]


def command_of(report: Report) -> str:
    """The command that makes such a folder: what differs from the defaults, as flags."""
    from lorq.methods import METHODS
    from lorq.pipeline.options import Options

    if report.method not in METHODS:
        return f"lorq {report.method} ORIGINAL QUANTIZED OUT"
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


def _measured(folder: Path) -> list[str]:
    """A section with what `lorq evaluate` has found."""
    lines = ["## What was measured", ""]
    evaluations = read_measured(folder).evaluations
    if not evaluations:
        return [*lines, "Nothing yet: `lorq evaluate OUT --reference MODEL` does.", ""]
    rows = [(f"text {found['text']}", figures_line(found)) for found in evaluations]
    rows += [(task, metrics_line(own)) for found in evaluations for task, own in found.get("tasks", {}).items()]
    table = [f"| {name} | {line} |" for name, line in rows]
    note = "KL is the mean divergence from the original, in nats a token; tasks are those of lm-eval."
    return [*lines, "| on | found |", "|---|---|", *table, "", note, ""]


def _loading(repo: str, *, exact: bool) -> list[str]:
    """How to load a folder; ``exact`` where one of GGUF's types may hold its codes."""
    lines = ["## How to load it", "", "transformers, after `pip install lorq`:", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo}")', "```", ""]
    lines += ["vLLM, after `pip install 'lorq[vllm]'`:", "", f"    vllm serve {repo}", ""]
    if "gguf" in TARGETS:
        name = repo.partition("/")[2]
        lines += ["llama.cpp:", "", f"    hf download {repo} --local-dir {name}"]
        lines += [f"    lorq export {name} {name}.gguf" + ("" if exact else " --type q8_0")]
        lines += [f"    llama-cli -m {name}.gguf", ""]
    return lines


def _exported(repo: str, target: str, lost: Mapping[str, Any]) -> list[str]:
    """What is said of an export."""
    uses = {
        "gguf": ("llama.cpp", f"    llama-cli -hf {repo}"),
        "compressed-tensors": ("vLLM", f"    vllm serve {repo} --dtype float16"),
    }
    program, command = uses.get(target, ("transformers", f'    AutoModelForCausalLM.from_pretrained("{repo}")'))
    lines = [f"Made with [lorq](https://pypi.org/project/lorq) {__version__}, as {target}.", ""]
    lines += [f"What {target} cannot hold, {what}: {how}" for what, how in lost.items()] + ([""] if lost else [])
    return [*lines, "## How to load it", "", f"{program}:", "", command, ""]
