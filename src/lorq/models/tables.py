"""The table of tokens and the head of a model, as far as they can be quantized."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorq.models.blocks import StreamedModel, Target
from lorq.models.skeleton import find_towers, is_linear


@dataclass(frozen=True)
class Tables:
    """Where a model looks its tokens up, and what makes its logits.

    Attributes:
        embedding, head: as layers (vocabulary, width), where they can be quantized; else why not.
        tied: they are one weight, which is the embedding's.
        others: tables besides in the text model, such as GPT-2's positions, by name; each with its class.
    """

    embedding: Target | str
    head: Target | str
    tied: bool
    others: dict[str, str]


def find_tables(streamed: StreamedModel) -> Tables:
    """The tables of a model; nothing of them is read."""
    model, tied = streamed.model, streamed.tied
    names = {id(module): name for name, module in model.named_modules()}
    lookup, output = model.get_input_embeddings(), model.get_output_embeddings()
    here, there = (f"{names.get(id(module))}.weight" for module in (lookup, output))
    pairs = {name: origin for name, origin in tied.items() if {name, origin} & {here, there}}
    embedding: Target | str = f"{type(lookup).__name__} does more than look rows up"
    head: Target | str = "there is none" if output is None else f"{type(output).__name__} is no linear layer"
    if pairs and pairs != {there: here}:
        embedding = head = f"its weight is that of other modules too: {', '.join(sorted({*pairs, *pairs.values()}))}"
    else:
        if is_lookup(lookup):
            embedding = Target(names[id(lookup)], lookup.num_embeddings, lookup.embedding_dim, False)
        if isinstance(output, nn.Linear) and is_linear(output):
            head = Target(names[id(output)], output.out_features, output.in_features, False)
    if pairs and (why := next((found for found in (embedding, head) if isinstance(found, str)), "")):
        embedding = head = why
    text = [name.rpartition(".")[0] for name in streamed.outside[0].tensors if not name.startswith(find_towers(model))]
    tables = set(text) - {names.get(id(lookup))}
    return Tables(embedding, head, bool(pairs), {n: type(model.get_submodule(n)).__name__ for n in sorted(tables)})


def config_as_stored(streamed: StreamedModel, config: dict[str, Any]) -> dict[str, Any]:
    """A model's config, which ties no table and head of which the checkpoint has two that differ.

    transformers believes the checkpoint; others believe the config.
    """
    if config.get("tie_word_embeddings") and streamed.model.get_output_embeddings() and not find_tables(streamed).tied:
        return config | {"tie_word_embeddings": False}
    return config


def is_lookup(module: Any) -> bool:
    """Whether a module looks rows of its table up, and whatever else it does, it does with these rows alone."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or set(module.state_dict()) != {"weight"}:
        return False
    if type(module).forward is nn.Embedding.forward:
        return True
    # A class of its own: tried with a small table, and with that table's rows alone.
    plain = copy.copy(module)
    plain.padding_idx = None
    small = torch.arange(5 * module.embedding_dim, dtype=torch.float32).sin().view(5, -1)
    index = torch.tensor([[3, 0, 3]])
    try:
        whole = torch.func.functional_call(plain, {"weight": small}, (index,))
        rows = torch.func.functional_call(plain, {"weight": small[index[0]]}, (torch.arange(3).view(1, 3),))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    return isinstance(whole, Tensor) and whole.shape == (1, 3, small.shape[1]) and torch.equal(whole, rows)


class _Seen(Exception):
    """Ends a model's forward where what was looked for is seen."""


def head_inputs(
    streamed: StreamedModel, head: str, window: Int[Tensor, "length"], hidden: Float[Tensor, "rows width"]
) -> Float[Tensor, "*batch in"]:
    """What the head, by its module's name, is given behind the last block; it is not run itself.

    Raises:
        ValueError: if it is not called.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))
        raise _Seen

    hook = streamed.model.get_submodule(head).register_forward_pre_hook(look, with_kwargs=True)
    try:
        streamed.logits(window, hidden)
    except _Seen:
        return seen[0]
    finally:
        hook.remove()
    raise ValueError(
        f"{type(streamed.model).__name__} must call its head to be measured, it reads the weight of {head} and "
        "multiplies by itself; leave --head out"
    )
