"""A folder's names in a model of another class than it was made of: the base without its head, or with a new one."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lorq.models.skeleton import find_blocks


@dataclass(frozen=True)
class Renaming:
    """The folder's names as a model has them: one prefix in the place of another."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


def renaming(model: Any, layers: Collection[str]) -> Renaming:
    """How the quantized layers of a folder are called in ``model``.

    Raises:
        ValueError: if it is of another class than the folder's and lacks some of them, the head aside.
    """
    modules = {name for name, _ in model.named_modules()}
    inside = [name for name in layers if any(part.isdigit() for part in name.split("."))]  # the blocks
    for change in _candidates(model, inside):
        if all(change(name) in modules for name in inside):
            return change
    if not is_of_another_class(model):
        return Renaming()  # a damaged folder, which is told of by layer
    raise ValueError(
        f"the folder holds a {' or '.join(model.config.architectures)} and cannot be loaded as {type(model).__name__}, "
        "which lacks layers of it; use AutoModelForCausalLM or lorq.load"
    )


def is_of_another_class(model: Any) -> bool:
    """Whether the folder's config names other classes than the model's."""
    stated = model.config.architectures or []
    return bool(stated) and type(model).__name__ not in stated


def _candidates(model: Any, layers: Collection[str]) -> Iterator[Renaming]:
    yield Renaming()
    yield Renaming(model.base_model_prefix + ".")
    try:
        path = find_blocks(model)[0].rpartition(".")[0]  # model.layers
    except ValueError:
        return
    home, _, leaf = path.rpartition(".")
    for name in layers:
        before, found, _ = name.partition(f".{leaf}.")
        old, new = before.split("."), home.split(".") if home else []
        while found and old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        if found:
            yield Renaming("".join(f"{part}." for part in old), "".join(f"{part}." for part in new))
        return
