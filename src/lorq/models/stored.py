"""Where a checkpoint keeps what a model needs: other names, fused experts, what transformers converts when it loads."""

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorq.models.experts import FusedPart, find_experts
from lorq.models.quantized import QuantizedFiles
from lorq.storage.json_files import some_of
from lorq.storage.reader import WeightFiles


@dataclass(frozen=True, eq=False)
class Conversion:
    """How transformers makes parameters of stored tensors: one of its converters, and the tensors, by its patterns.

    ``one`` is the shape of one expert's slice of a fused tensor, where that is made.
    """

    converter: Any
    target: str
    sources: dict[str, list[str]]
    model: Any
    one: tuple[int, ...] | None = None

    def get_parameter(self, name: str) -> Tensor:
        """What converters ask of the model whose parameters they make, for a shape."""
        return self.model.get_parameter(name) if self.one is None else torch.empty((1, *self.one), device="meta")

    def of(self, checkpoint: WeightFiles, *, headers: bool = False) -> dict[str, Tensor]:
        """The parameters by their names; from headers alone they have shapes and no values."""
        return self._run({p: [_whole(checkpoint, n, headers) for n in names] for p, names in self.sources.items()})

    def of_expert(self, checkpoint: WeightFiles, number: int, *, headers: bool = False) -> Tensor:
        """One expert's slice of the one fused tensor, made of that expert's tensors alone.

        Stored tensors hold either one expert, whose number is in the name, or all of them along the first dimension.
        """
        given = {}
        for pattern, names in self.sources.items():
            if "*." in pattern:
                own = [name for name in names if expert_number(pattern, name) == number]
                given[pattern] = [_whole(checkpoint, name, headers) for name in own]
            else:
                given[pattern] = [_one(checkpoint, name, number, headers)[None] for name in names]
        return next(iter(self._run(given).values()))[0]

    def _run(self, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        converter = copy(self.converter)
        converter.collected_tensors = tensors
        converter.layer_targets = {}
        try:
            return converter.convert(self.target, model=self, config=self.model.config)
        except (ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
            names = [name for names in self.sources.values() for name in names]
            steps = ", ".join(map(repr, converter.operations))
            raise ValueError(
                f"{self.target} could not be made of {some_of(names)} as transformers makes it ({steps}): {error}; "
                "the checkpoint is damaged or of another architecture"
            ) from error


def _whole(checkpoint: WeightFiles, name: str, header: bool) -> Tensor:
    return torch.empty(checkpoint.shape(name), device="meta") if header else checkpoint.tensor(name)


def _one(checkpoint: WeightFiles, name: str, number: int, header: bool) -> Tensor:
    return torch.empty(checkpoint.shape(name)[1:], device="meta") if header else checkpoint.tensor(name, number)


def expert_number(pattern: str, name: str) -> int | None:
    """The number of the expert in a name that fits a pattern of transformers' converters; None where it has none."""
    found = re.search(pattern.replace("*.", r"(\d+)\."), name)
    return int(found[1]) if found and "*." in pattern else None


@dataclass(frozen=True)
class Stored:
    """Where a parameter's values are: in a stored tensor, in a part of one that is fused, or made of several.

    Attributes:
        name: of the tensor, or of the first of several.
        part: the expert's own, where experts are fused.
        conversion: what makes the parameter, or the fused tensor, of stored ones; None where it is stored as it is.
        output: which of the conversion's parameters it is.
        turned: it is stored as (out, in), by who put a linear layer in the place of GPT-2's Conv1D.
    """

    name: str
    part: FusedPart | None = None
    conversion: Conversion | None = None
    output: str = ""
    turned: bool = False

    @property
    def names(self) -> list[str]:
        """All stored tensors that it is made of."""
        if self.conversion is None:
            return [self.name]
        return [name for names in self.conversion.sources.values() for name in names]

    def shape(self, checkpoint: WeightFiles) -> tuple[int, ...]:
        """Shape of the parameter, from the header."""
        return tuple(self._made(checkpoint, headers=True).shape)

    def read(self, checkpoint: WeightFiles) -> Tensor:
        """The parameter; of a fused tensor only the one expert is read."""
        made = self._made(checkpoint, headers=False)
        # A copy, so that the rest of the expert's tensor is given back.
        return made if self.part is None else made.clone(memory_format=torch.contiguous_format)

    def _made(self, checkpoint: WeightFiles, *, headers: bool) -> Tensor:
        if self.part is None:
            if self.conversion is None:
                whole = _whole(checkpoint, self.name, headers)
                return whole.T if self.turned else whole
            return self.conversion.of(checkpoint, headers=headers)[self.output]
        number = self.part.expert
        if self.conversion is None:
            return self.part.of(_one(checkpoint, self.name, number, headers))
        return self.part.of(self.conversion.of_expert(checkpoint, number, headers=headers))


def find_stored(model: Any, checkpoint: WeightFiles) -> dict[str, Stored]:
    """Where each of the model's parameters and stored buffers lies, as far as the checkpoint has them.

    Names are changed as transformers changes them when it loads, such as embed_out to lm_head, and tensors are
    converted as it converts them. Experts may be stored one by one, which transformers would merge, or fused. Of two
    tensors for one parameter the first counts, as in transformers.

    Raises:
        ValueError: for experts of another number than the config's, and for two tensors for one parameter of which
            transformers does not take one alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, dot_natural_key
    from transformers.pytorch_utils import Conv1D

    packed = checkpoint.layers if isinstance(checkpoint, QuantizedFiles) else {}
    turned = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    own, experts = set(model.state_dict(keep_vars=True)), find_experts(model)
    fused: dict[str, list[tuple[str, FusedPart]]] = {}  # fused tensor -> the parameters that are parts of it
    for path, module in experts.items():
        for local, tensor, part in module.parts():
            fused.setdefault(f"{path}.{tensor}", []).append((f"{path}.{local}", part))
    known, prefix = own | set(fused), model.base_model_prefix + "."

    def find(name: str) -> str:
        # Some checkpoints were saved from the bare model, without the head's prefix.
        return next((like for like in (name, name.removeprefix(prefix), prefix + name) if like in known), "")

    found = _Found(checkpoint)
    converted: dict[tuple[int, str], Conversion] = {}
    for stored in sorted(checkpoint.names, key=dot_natural_key):  # transformers' order: some renamings wait for another
        name = apply_renamings(stored, renamings)
        # At most one converter takes a tensor.
        taken = next(((c, *hit) for c in converters if (hit := c.rename_source_key(name))[1] is not None), None)
        if taken and (place := find(taken[1])):
            converter, _, pattern = taken
            if place in fused:
                number, count = expert_number(str(pattern), name), len(experts[place.rpartition(".")[0]])
                _check_number(checkpoint, stored, number, count)
            found.once(name.removeprefix(prefix), stored)
            if place in fused and (expert := _one_of(converter, str(pattern), name, place, experts)):
                found.put(expert, Stored(stored), alone=False)
            else:
                path, _, tensor = place.rpartition(".")
                one = experts[path].slice_shape(tensor) if place in fused else None
                made = Conversion(converter, place, {}, model, one)
                converted.setdefault((id(converter), place), made).sources.setdefault(str(pattern), []).append(stored)
            continue
        # Like transformers: a name that only fits before it is renamed is kept.
        place = find(name) or find(stored)
        if place in own:
            found.put(place, Stored(stored, turned=place in turned and stored in packed))
        elif place in fused:
            _check_fused(checkpoint, stored, len(experts[place.rpartition(".")[0]]))
            for parameter, part in fused[place]:
                found.put(parameter, Stored(stored, part))
    for conversion in converted.values():
        for parameter, source in _converted(conversion, fused, checkpoint):
            found.put(parameter, source, alone=False)
    return found.sources


class _Found:
    """What is found for the parameters of a model, in transformers' order."""

    def __init__(self, checkpoint: WeightFiles):
        self.sources: dict[str, Stored] = {}
        self._folder = checkpoint.folder
        self._merged: set[str] = set()  # parameters that transformers makes of several tensors
        self._taken: dict[str, str] = {}  # stored tensors by their names as converters take them

    def put(self, parameter: str, source: Stored, *, alone: bool = True) -> None:
        """Take a source if it is the first; ``alone`` where transformers reads it without a converter."""
        first = self.sources.setdefault(parameter, source)
        if first is source:
            if not alone:
                self._merged.add(parameter)
        elif not alone or parameter in self._merged:
            raise self._twice(parameter, first.name, source.name)

    def once(self, name: str, stored: str) -> None:
        """Refuse a second tensor in the same place of a converter."""
        if (first := self._taken.setdefault(name, stored)) != stored:
            raise self._twice(name, first, stored)

    def _twice(self, parameter: str, first: str, second: str) -> ValueError:
        return ValueError(
            f"{self._folder}: a parameter must be stored once, {parameter} is there as {first} and as {second}; remove "
            "one of them from the checkpoint"
        )


def _check_number(checkpoint: WeightFiles, stored: str, number: int | None, count: int) -> None:
    if number is not None and number >= count:
        raise ValueError(
            f"{checkpoint.folder}: there must be {count} experts as the config says, {stored} is of one more; "
            "config.json belongs to another model"
        )


def _check_fused(checkpoint: WeightFiles, stored: str, count: int) -> None:
    shape = checkpoint.shape(stored)
    if len(shape) not in (2, 3) or shape[0] != count:
        raise ValueError(
            f"{checkpoint.folder}: {stored} must hold {count} experts as the config says, its shape is "
            f"{shape}; config.json belongs to another model"
        )


def _converted(
    conversion: Conversion, fused: dict[str, list[tuple[str, FusedPart]]], checkpoint: WeightFiles
) -> Iterator[tuple[str, Stored]]:
    """What a conversion makes, by name."""
    first = next(iter(conversion.sources.values()))[0]
    if conversion.target in fused:
        parts = fused[conversion.target]
        for names in (names for pattern, names in conversion.sources.items() if "*." not in pattern):
            for name in names:
                _check_fused(checkpoint, name, 1 + max(part.expert for _, part in parts))
        yield from ((parameter, Stored(first, part, conversion)) for parameter, part in parts)
        return
    for output in conversion.of(checkpoint, headers=True):
        yield output, Stored(first, None, conversion, output)


def _one_of(converter: Any, pattern: str, name: str, fused: str, experts: dict[str, Any]) -> str:
    """The parameter of one expert that transformers would merge into a fused tensor; "" where it changes it besides."""
    path, _, tensor = fused.rpartition(".")
    halves = ("gate_proj", "up_proj") if tensor.startswith("gate_up_proj") else (tensor.removesuffix("_bias"),)
    merge = ["MergeModulelist(dim=0)", "Concatenate(dim=1)"][: len(halves)]
    plain = [repr(step) for step in converter.operations] == merge and len(converter.source_patterns) == len(halves)
    number = expert_number(pattern, name)
    if not plain or number is None or not experts[path].takes_apart_in_order:
        return ""
    leaf = "bias" if tensor.endswith("_bias") else "weight"
    return f"{path}.{number}.{halves[converter.source_patterns.index(pattern)]}.{leaf}"
