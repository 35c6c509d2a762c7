"""The original and what somebody has made of it: opened together, and refused where they are no couple."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.checks import all_finite
from lorq.core.compensation import fit_scaling
from lorq.foreign.gguf_file import GgufFile
from lorq.models.blocks import StreamedModel, Target
from lorq.models.experts import expert_name, find_experts
from lorq.models.quantized import QuantizedFiles, read_quantization
from lorq.models.skeleton import read_config, skeleton
from lorq.storage.json_files import inconsistent, some_of

# A quantizer's error relative to the weight: 0.6 is 2 bits rounded to nearest. Two models that have nothing to do with
# each other differ by 1 at least, whatever scales are allowed.
_LARGEST_ERROR = 0.8
# Of tensors that are not quantized, and only stored in another type. bfloat16 is off by 0.002.
_OTHER_TYPE = 0.01


@dataclass(frozen=True)
class Missing:
    """What a quantized weight lacks.

    Attributes:
        target: the weight that it should stand for: the original's, scaled as the quantizer has scaled it.
        error: ``target`` less what it does stand for.
        columns: by what the quantizer has multiplied the columns, and divided the inputs; None for nothing.
    """

    target: Float[Tensor, "out in"]
    error: Float[Tensor, "out in"]
    columns: Float[Tensor, "in"] | None


@dataclass(frozen=True)
class Couple:
    """An original and its quantized model, of the same architecture, both read block by block.

    Attributes:
        targets: the layers that can have factors, by block.
        kept: why others have none, by name.
        gguf: the file that the quantized model was decoded from, if it was.
    """

    original: StreamedModel
    quantized: StreamedModel
    files: QuantizedFiles
    targets: Mapping[str, tuple[Target, ...]]
    kept: Mapping[str, str]
    gguf: GgufFile | None = None

    @classmethod
    def open(
        cls, original: Path, quantized: Path, *, exclude: tuple[str, ...] = (), experts: bool = False,
        device: torch.device | str = "cpu", gguf: GgufFile | None = None,
    ) -> "Couple":  # fmt: skip
        """Open both folders; headers are read, and no weight.

        Args:
            experts: whether layers of experts can have factors.

        Raises:
            ValueError: if the two are of different shapes, nothing can be compensated, or a pattern matches nothing.
        """
        config = read_quantization(quantized)
        files = QuantizedFiles.of(quantized, config)
        one = StreamedModel.open(original, device=device)
        other = StreamedModel(skeleton(read_config(quantized, quantized=True)), files, device=device)
        _check_alike(one, other)
        targets, kept = _select(other, files, exclude, experts)
        if not any(targets.values()):
            raise ValueError(
                f"{quantized} must have a quantized layer in its blocks that can have factors, it has none"
            )
        return cls(one, other, files, targets, kept, gguf)

    def stored_bits(self, target: Target) -> int:
        """What the quantized weight of a layer takes."""
        if self.gguf is not None and (own := self.gguf.stored_bytes(target.name)) is not None:
            return 8 * own
        names = self.quantized.stored_names(f"{target.name}.weight")
        return 8 * sum(self.files.stored_bytes(name) for name in names)

    def missing(self, target: Target) -> Missing:
        """Compare a layer's weights.

        Raises:
            ValueError: if one is not finite, or they differ by more than any quantizer makes them.
        """
        device = self.original.device
        weight, decoded = (model.weight(target).to(device, torch.float32) for model in (self.original, self.quantized))
        for model, own in ((self.original, weight), (self.quantized, decoded)):
            if not all_finite(own):
                raise ValueError(f"weights must be finite, {target.name} in {model.checkpoint.folder} is not")
        scaling = fit_scaling(weight, decoded)
        columns = None
        if scaling is not None:
            rows, columns = scaling
            weight = torch.outer(rows, columns).mul_(weight)
        error = weight - decoded
        relative = float(error.norm() / weight.norm().clamp(min=1e-30))
        if relative > _LARGEST_ERROR:
            raise ValueError(
                f"{self.original.checkpoint.folder} must be the original of {self.quantized.checkpoint.folder}, "
                f"{target.name} differs by {relative:.0%} of its size where quantization makes less than "
                f"{_LARGEST_ERROR:.0%}: it is another model's, or was rotated before it was quantized"
            )
        return Missing(weight, error, columns)

    def check_embeddings(self) -> None:
        """Refuse an original whose embeddings are others, where they are not quantized: those stay what they are.

        Raises:
            ValueError: naming the tensor.
        """
        for name in self.original.outside[0].tensors:
            if not self.files.layers or not self.files.layers.keys().isdisjoint(self.quantized.stored_names(name)):
                continue  # quantized too, or nobody knows what is
            one, other = (model.tensor_aside(name).float() for model in (self.original, self.quantized))
            if (off := float((one - other).norm() / one.norm().clamp(min=1e-30))) > _OTHER_TYPE:
                raise ValueError(
                    f"{self.original.checkpoint.folder} must be the original of {self.quantized.checkpoint.folder}, "
                    f"{name}, which is not quantized, differs by {off:.1%}; give the model that was quantized"
                )


def _check_alike(original: StreamedModel, quantized: StreamedModel) -> None:
    """Refuse models of other classes or shapes, and what the quantized one has beside what is known."""
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in model.model.state_dict(keep_vars=True).items()}
        for model in (original, quantized)
    )
    names = [folder.checkpoint.folder for folder in (original, quantized)]
    if other := [f"{name} is {theirs.get(name, 'missing')}, not {ours.get(name, 'there')}"
                 for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]:  # fmt: skip
        raise ValueError(
            f"{names[0]} must be the original of {names[1]}, {len(other)} tensors are of other shapes: in the second "
            f"{'; '.join(other[:3])}; give the model that was quantized"
        )
    if unknown := [name for name in quantized.unused_tensors if name not in original.unused_tensors]:
        raise inconsistent(names[1], f"{len(unknown)} tensors belong to no weight that is known of: {some_of(unknown)}")


def _select(
    quantized: StreamedModel, files: QuantizedFiles, exclude: tuple[str, ...], experts: bool
) -> tuple[dict[str, tuple[Target, ...]], dict[str, str]]:
    """The layers that can have factors, by block, and why others cannot; of dense files any layer may be quantized."""
    modules = find_experts(quantized.model)
    targets: dict[str, tuple[Target, ...]] = {}
    kept: dict[str, str] = {}
    for part in quantized.blocks:
        for target in part.targets:
            hit = next((pattern for pattern in exclude if re.search(pattern, target.name)), None)
            if hit is not None:
                kept[target.name] = f"excluded by {hit}"
            elif files.layers and files.layers.keys().isdisjoint(quantized.stored_names(f"{target.name}.weight")):
                kept[target.name] = "is not quantized"
            elif not experts and expert_name(target.name, modules) is not None:
                kept[target.name] = "an expert, for which this form has no factors"
        targets[part.name] = tuple(target for target in part.targets if target.name not in kept)
    if unused := [p for p in exclude if f"excluded by {p}" not in kept.values()]:
        raise ValueError(f"exclude must match a layer, these match none: {some_of(unused)}")
    return targets, kept
