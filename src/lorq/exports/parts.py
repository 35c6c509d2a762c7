"""What the targets for integer codes have in common: which folders fit, and the low-rank part as an adapter."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.basis import WHOLE
from lorq.core.codes import IntCodes, IntGrid
from lorq.core.low_rank import LowRank
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.exports.plain import DTYPES, PlainFolder, PlainNames, in_dtype, own_dtype
from lorq.exports.request import Exported, ExportRequest, refusal
from lorq.exports.served import SERVED_RANKS, lora_flags, served_rank
from lorq.foreign.peft_form import write_lora
from lorq.models.experts import expert_name
from lorq.storage.folder import LorqFolder
from lorq.storage.report import ranks_in_words


def integer_layers(folder: LorqFolder, names: PlainNames, target: str) -> dict[str, LayerFormat]:
    """The layers with codes, but for tables of tokens and the head, which the targets keep dense.

    Raises:
        ValueError: `refusal` where one has no integer codes, or a rotation, or is no linear layer.
    """
    if folder.tiles:
        first = next(iter(folder.tiles))
        raise refusal(target, f"gives each expert its own factors, {first} shares them (tileq)", "dense")
    outside = {*folder.embeddings, "lm_head"}
    layers = {name: format for name, format in folder.formats.items() if name not in outside}
    for name, format in layers.items():
        if not isinstance(format.codes, IntGrid):
            kind = format.codes.kind + (" under scales of low rank" if getattr(format.codes, "scale_rank", 0) else "")
            raise refusal(
                target, f"holds integer codes with scales of groups or rows, {name} has {kind}",
                "dense; vLLM serves the folder as it is, beside lorq; --method gptq makes codes for this target",
            )  # fmt: skip
        if names.is_transposed(name):
            raise refusal(target, f"holds linear layers, {name} is a Conv1D", "dense")
        if format.rotation_block:
            by = "over its whole width" if format.rotation_block == WHOLE else f"by {format.rotation_block}"
            raise refusal(
                target, f"holds weights in the model's own channels, {name} is rotated {by}",
                "dense; or quantize with --rotation none",
            )  # fmt: skip
        if format.permuted and _groups(folder, name, format) > 1:
            raise refusal(
                target, f"holds groups of neighbouring columns, those of {name} are in an order of their own", "dense"
            )
    return layers


def _groups(folder: LorqFolder, name: str, format: LayerFormat) -> int:
    assert isinstance(format.codes, IntGrid)
    return folder.reader.shape(f"{name}.weight_scale")[1]


def plain_codes(weight: QuantizedWeight) -> IntCodes:
    """The codes in the model's own order of channels; of rows with one group each, where that is another one."""
    codes = weight.codes
    assert isinstance(codes, IntCodes)
    if weight.basis is None:
        return codes
    assert weight.basis.permutation is not None
    back = weight.basis.permutation.long().argsort()
    return IntCodes(codes.codes.index_select(1, back), codes.scale, codes.zero_point, codes.format)


def row_layers(layers: Mapping[str, LayerFormat], names: PlainNames) -> set[str]:
    """The layers whose rows are one group each, and are not just as narrow as the groups of others."""
    widths = {
        name: names.model.get_submodule(name).weight.shape[0 if names.is_transposed(name) else 1] for name in layers
    }
    sizes = {name: getattr(format.codes, "group_size", 0) for name, format in layers.items()}
    shared = {size for name, size in sizes.items() if size != widths[name]}
    return {name for name, size in sizes.items() if size == widths[name] and size not in shared}


def check_ranks(folder: LorqFolder, names: PlainNames, target: str, request: ExportRequest) -> None:
    """Refuse what no adapter can be.

    Raises:
        ValueError: if there are factors and no place for them was given, or an adapter is to be without factors, or no
            server takes one of the rank.
    """
    ranks = {name: format.rank for name, format in folder.formats.items() if format.rank}
    if request.adapter is None:
        if ranks:
            raise ValueError(
                f"--to {target} holds codes, {len(ranks)} layers have a low-rank part besides: give it a folder, "
                "--adapter DIR; or take --to dense, which has it in the weights"
            )
        return
    if not ranks:
        raise ValueError(
            f"--adapter is for a low-rank part, the layers of {folder.path} have none; leave it out: it is a base "
            "for PEFT as it is"
        )
    experts = [name for name in ranks if expert_name(name, names.experts)]
    if experts and target != "peft":  # which has experts one by one
        raise refusal(target, f"has no adapter of single experts, {experts[0]} has a low-rank part", "dense, peft")
    name, most = max(ranks.items(), key=lambda item: item[1])
    if most > SERVED_RANKS[-1]:
        raise ValueError(
            f"--adapter needs ranks up to {SERVED_RANKS[-1]}, the most that servers take, {name} has {most}; take "
            "--to dense, or quantize with a smaller --budget"
        )


def write_adapter(folder: LorqFolder, names: PlainNames, request: ExportRequest) -> tuple[int, float]:
    """Write the low-rank part as an adapter of PEFT's, in float16.

    Returns:
        Its bytes, and by how much of its norm it was rounded: factors of 8 bits have scales besides.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    changed = whole = 0.0
    for name, part in _low_ranks(folder):
        left, right = part
        halves = _half(f"{name}.left", left), _half(f"{name}.right", right)
        exact, rounded = left.double() @ right.double(), halves[0].double() @ halves[1].double()
        changed += float((exact - rounded).square().sum())
        whole += float(exact.square().sum())
        factors[name] = halves
    assert request.adapter_place is not None
    request.adapter_place.mkdir()
    transposed = {names.is_transposed(name) for name in factors}
    size = write_lora(request.adapter_place, factors, str(request.out), transposed=transposed == {True})
    return size, (changed / max(whole, 1e-300)) ** 0.5


def _half(name: str, factor: Tensor) -> Tensor:
    return in_dtype(name, factor, torch.float16, remedy="take --to dense, which has the low-rank part in its weights")


def _low_ranks(folder: LorqFolder) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The factors of each layer that has some, float32, in the model's own channels."""
    for name, format in folder.formats.items():
        if not format.rank:
            continue
        weight = folder.weight(name)
        assert isinstance(weight.low_rank, LowRank)
        left, right = weight.low_rank.factors()
        yield name, (left, right if weight.basis is None else weight.basis.unrotate(right))


def adapter_lines(
    folder: LorqFolder, names: PlainNames, request: ExportRequest, done: Exported, lines: list[str]
) -> Exported:
    """Write the adapter, where one is asked for, and say how both are loaded.

    Args:
        lines: to print; where the first is vLLM's command, the adapter is added to it.
    """
    if request.adapter is None:
        return replace(done, lines=(*lines, *done.lines))
    size, rounding = write_adapter(folder, names, request)
    ranks = [format.rank for format in folder.formats.values() if format.rank]
    if lines[0].startswith("vllm serve"):
        told = f"its slots take rank {served_rank(ranks)}, the layers have {ranks_in_words(ranks)}"
        lines = [
            f"{lines[0]} {lora_flags(ranks, shlex.quote(str(request.adapter)))}",
            f"ask vLLM for the model low-rank; {told}", *lines[1:],
        ]  # fmt: skip
    lost = {"low-rank part": f"float16 changes it by {rounding:.2g} of its norm"} if rounding else {}
    return Exported(done.bytes + size, (*lines, *done.lines), {**done.lost, **lost})


def write_codes(
    folder: LorqFolder, out: Path, request: ExportRequest, layers: Mapping[str, LayerFormat], names: PlainNames,
    tensors: Callable[[QuantizedWeight], dict[str, Tensor]], config: Mapping[str, Any],
) -> Exported:  # fmt: skip
    """Write a model's folder whose layers have codes in a target's own tensors; all else is dense.

    Args:
        layers: that have codes there.
        tensors: of one of them, by local name.
        config: its ``quantization_config``.
    """
    written, dtype, stored = PlainFolder(out), own_dtype(folder, request.dtype), names.layers(layers)
    for _, header in request.files(folder):
        plain: dict[str, Tensor] = {}
        for name in header.tensors:
            layer, _, local = name.rpartition(".")
            if layer in layers and local == "bias":
                written.add({f"{stored[layer]}.bias": in_dtype(name, folder.reader.tensor(name), DTYPES[dtype])})
            elif layer not in folder.formats or local == "bias":
                plain[name] = in_dtype(name, folder.reader.tensor(name), DTYPES[dtype])
            elif local == "weight_shape" and layer in layers:
                own = tensors(folder.weight(layer)).items()
                written.add({f"{stored[layer]}.{key}": tensor for key, tensor in own})
            elif local == "weight_shape":
                weight = folder.weight(layer).dense(torch.float32)
                plain[f"{layer}.weight"] = in_dtype(f"{layer}.weight", weight, DTYPES[dtype])
        written.add(names.of(plain))
    written.finish(folder, {"dtype": dtype, "quantization_config": config})
    dense = [name for name in folder.formats if name not in layers]
    lines = [f"{', '.join(dense)} became {dtype} weights: only layers in the blocks have codes there"] if dense else []
    outputs = [name for name, format in layers.items() if format.output_quantization != "none"]
    lost = {"outputs": f"{len(outputs)} layers would quantize theirs to 8 bits"} if outputs else {}
    return Exported(written.bytes, tuple(lines), lost)
