"""What was made here, on the hub: a model card, and the upload."""

from dataclasses import dataclass
from pathlib import Path

from lorq.cards import CARD, card_of
from lorq.exports.made import is_for_others
from lorq.models.locate import full_path
from lorq.storage.json_files import json_bytes, read_json
from lorq.storage.report import read_report
from lorq.verifying import refuse_faults, verify
from lorq.version import __version__

_ADAPTER_CONFIG = "adapter_config.json"
_NAMELESS = "the card names no original, with which the hub would list it; --base-model ORG/NAME names it"


@dataclass(frozen=True)
class Pushed:
    """What is on the hub.

    Attributes:
        card: the model card.
        url: of the repository; "" after a dry run.
        note: what the card lacks, and what to do; "" for nothing.
    """

    card: str
    url: str = ""
    note: str = ""


def push(
    out: str | Path, repo: str, *, base_model: str = "", private: bool = False, dry_run: bool = False,
) -> Pushed:  # fmt: skip
    """Upload OUT to the Hugging Face hub, with a model card: how it was made, what was measured, how to load it.

    First it is verified, as `lorq verify` does. A card that came with the original stands below the
    new one, and its licence and languages go into the new one's head.

    Args:
        out: a lorq folder, a folder or GGUF file that `lorq export` wrote, or an adapter.
        repo: where to, org/name; made if it is not there.
        base_model: the original's name on the hub, for the card; of an adapter that of the pushed codes that it is for,
            which must be there.
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
    _check_name("repo", repo)
    if base_model:
        _check_name("base_model", base_model)
    _check_made(place, base_model)
    refuse_faults(verify(place))
    card = card_of(place, repo, base_model)
    note = "" if _names_original(card) else _NAMELESS
    if dry_run:
        return Pushed(card, note=note)
    return Pushed(card, _upload(place, repo, card, private, base_model), note)


def _names_original(card: str) -> bool:
    from huggingface_hub import ModelCard

    return bool(ModelCard(card).data.get("base_model"))


def _check_made(place: Path, base_model: str) -> None:
    """Refuse what lorq has not made, with a FileNotFoundError or ValueError, and adapters for nobody knows what."""
    if place.is_file() and place.suffix.lower() != ".gguf":
        raise ValueError(f"OUT must be a lorq folder, an export's, or a .gguf file, got the file {place}")
    if not is_for_others(place):
        read_report(place)
        return
    from lorq.exports.read_back import read_made

    made = read_made(place)
    if not made.version:
        raise ValueError(
            f"{place} was written by another program, lorq push is for what lorq made; `hf upload` pushes it"
        )
    if made.is_adapter and not base_model:
        raise ValueError(
            f"{place} is an adapter, of use on one model alone; name that one on the hub, which is the pushed codes "
            "and not the original: --base-model ORG/NAME"
        )


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


def _upload(place: Path, repo: str, card: str, private: bool, base_model: str) -> str:
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
            api.upload_folder(repo_id=repo, folder_path=place, ignore_patterns=[CARD, _ADAPTER_CONFIG, ".*", "*.tmp"])
        if (place / _ADAPTER_CONFIG).is_file():  # it names a folder of this machine
            config = json_bytes(read_json(place / _ADAPTER_CONFIG) | {"base_model_name_or_path": base_model})
            api.upload_file(path_or_fileobj=config, path_in_repo=_ADAPTER_CONFIG, repo_id=repo)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo)
    except Exception as error:  # of the hub's and the network's many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{place} could not be pushed to {repo}: {reason}; the same command goes on") from error
    return url
