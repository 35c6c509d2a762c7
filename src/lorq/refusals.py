"""What the command line refuses before torch is there, and the line for everything that went wrong."""

import ast
import os
import re
import traceback
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path

from cyclopts import MissingArgumentError

from lorq.core.checks import check_name
from lorq.models.locate import check_model, full_path
from lorq.models.texts import SELF, check_text
from lorq.storage.appear import refuse_used
from lorq.storage.atomic import MENDS, system_error
from lorq.storage.out_folder import check_out

# The hub answers within so much, or is not there.
_HUB_SECONDS = 5
# Flags of `lorq quantize` that take no value, with and without --no-, and some of those that take one. Words after
# any other flag are left to the parser.
_SWITCHES = ("--dry-run", "--resume", "--overwrite", "--json", "--router-weights", "--symmetric", "--fused-alike")
_VALUED = (
    "--method", "--bits", "--group-size", "--calibration", "--samples", "--seq-len", "--start-token", "--seed",
    "--device", "--activations", "--exclude", "--override", "--bits-per-weight", "--size", "--token-weights", "--tune",
    "--preset", "--grid", "--embeddings", "--head",
)  # fmt: skip


def given(arguments: list[str], flag: str) -> str | None:
    """The value of a flag on the command line."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def check_early(arguments: list[str]) -> None:
    """Refuse what is missing or in use before methods, and torch with them, tell which flags there are.

    Args:
        arguments: those of `lorq quantize`.
    """
    words = _certain_words(arguments)
    if words:
        check_place(words[0])
    if len(words) > 1 and not any(argument.startswith(("--overwrite", "--resume")) for argument in arguments):
        model, out = (full_path(word) for word in words[:2])
        if names_file(arguments):
            refuse_used(out)
        elif os.path.realpath(out) != os.path.realpath(model):  # which has an error of its own
            check_out(out)
    if (method := given(arguments, "--method")) is not None:
        check_name("method", method, _method_names())
        if preset := given(arguments, "--preset"):
            raise ValueError(
                f"a preset is a method with its settings, got preset {preset} and method {method}; keep one of them"
            )
    budget = next((flag for flag in ("--bits-per-weight", "--size") if given(arguments, flag) is not None), None)
    if budget and (bits := given(arguments, "--bits")) is not None:
        raise ValueError(
            f"{budget} chooses each layer's bits, got --bits {bits} too; leave --bits away, or choose from --widths, "
            f"such as --widths {bits}"
        )
    to_file = names_file(arguments)
    if to_file and (preset := given(arguments, "--preset")):
        raise ValueError(
            f"presets have trellis codes, which no .gguf file holds, got --preset {preset}; leave it away, or choose "
            "--method and --grid"
        )
    grid = given(arguments, "--grid") or ("a .gguf file" if to_file else "integer")
    told = next((flag for flag in ("--bits", "--group-size") if given(arguments, flag) is not None), None)
    if told and grid not in ("integer", "normal-float"):
        raise ValueError(
            f"a type of GGUF has its own bits and groups, got {told} {given(arguments, told)} for {grid}; leave it "
            "away, and name a type, such as --grid q3_k or q5_0"
        )
    if (text := given(arguments, "--calibration")) not in (None, SELF):
        check_text(text, "calibration")


def names_file(arguments: list[str]) -> bool:
    """Whether OUT, as far as that can be told before the flags are known, is a file for llama.cpp."""
    words = _certain_words(arguments)
    if len(words) == 2:
        return words[1].lower().endswith(".gguf")
    own = [word for word in arguments if word.lower().endswith(".gguf") and not word.startswith("-")]
    return len(own) == 2 or (given(arguments, "--out") or arguments[-1]).lower().endswith(".gguf")


def _certain_words(arguments: list[str]) -> list[str]:
    """MODEL and OUT, or fewer where a flag may have taken a word as its value, or names one of them."""
    if any(argument.partition("=")[0] in ("--model", "--out") for argument in arguments):
        return []
    words, rest = [], iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            words.append(argument)
        elif argument in _VALUED:
            if next(rest, "-").startswith("-"):
                break
        elif not (argument.startswith("--") and "=" in argument) and argument.replace("--no-", "--") not in _SWITCHES:
            break
    return words[:2]


def check_place(model: str | Path) -> None:
    """`check_model`, with names that are like a path where nothing is, and a look at the hub for what may be there.

    Raises:
        FileNotFoundError, ValueError: as `check_model` does; after seconds at most, however the network is.
    """
    path = full_path(model)
    if path.exists():
        check_model(model)
        return
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / name) for name in get_close_matches(path.name, there, 2)]
    try:
        check_model(model)
        _look_at_hub(str(model))
    except FileNotFoundError as error:
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(f"{error}{meant}") from None


def _look_at_hub(name: str) -> None:
    """Refuse a hub id that is neither in the hub's cache nor known to the hub, with a FileNotFoundError."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)  # which, unlike a download, asks once
    except Exception as error:  # of the hub's, the network's and the disk's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"no such model: there is no folder or file {name}, and the hub did not give it either ({reason})"
        ) from error


def _method_names() -> list[str]:
    """The names in `lorq.METHODS`, read from its file: to import it takes torch."""
    spec = find_spec("lorq.methods")
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError("METHODS is a dictionary, written out")


def is_unexpected(error: Exception) -> bool:
    """Whether it is none of the errors by which lorq refuses what the user can mend."""
    return not isinstance(error, (ValueError, TypeError, OSError, ArithmeticError, ImportError))


def missing(error: MissingArgumentError) -> str:
    """What a command wants beside what it was given, and how it is called."""
    argument, chain = error.argument, " ".join(error.command_chain or ())
    if error.target is None or argument is None or argument.field_info.kind is Parameter.KEYWORD_ONLY:
        return str(error)
    wanted = [name for name, parameter in signature(error.target).parameters.items() if _is_wanted(parameter)]
    first = wanted.index(argument.field_info.name)
    names = [name.upper() for name in wanted]
    lack = f"{' and '.join(names[first:])} {'is' if first == len(names) - 1 else 'are'} missing"
    return f"{lack}; usage: lorq {chain} {' '.join(names)} [OPTIONS]; lorq {chain} --help tells more"


def _is_wanted(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and parameter.default is Parameter.empty


def explained(error: Exception) -> str:
    """One line for the user, with the notes that were added on the way."""
    own = re.sub(r"^\[Errno \d+\] ", "", str(error))  # a number for programs
    message = "\n".join([own, *getattr(error, "__notes__", [])])
    # Of CPUs and GPUs alike: torch has a class of its own for the latter alone.
    if isinstance(error, MemoryError) or any(words in message for words in ("out of memory", "not enough memory")):
        return (
            f"memory does not suffice ({' '.join(message.split())[:200] or type(error).__name__}); take a smaller "
            "--seq-len or --window, or fewer --samples, or close other programs"
        )
    if isinstance(error, OSError) and error.filename is not None and error.errno in MENDS and system_error(error):
        own = f"{os.fsdecode(error.filename)}: {error.strerror}; {MENDS[error.errno]}"
        return "\n".join([own, *getattr(error, "__notes__", [])])
    if not is_unexpected(error):
        return message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"a bug of lorq, or files that it does not foresee: {type(error).__name__}: {' '.join(message.split())} "
        f"({Path(place.filename).name}:{place.lineno}); please report it with what LORQ_TRACE=1 shows"
    )
