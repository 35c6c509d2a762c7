"""A lorq folder: the quantized model's codes as they are, and the factors beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.low_rank import LowRank, store_factors
from lorq.core.weight import QuantizedWeight, layer_bytes
from lorq.foreign.choose import Compensated
from lorq.foreign.couple import Couple
from lorq.models.blocks import Target
from lorq.models.quantized import read_quantization
from lorq.models.skeleton import read_config
from lorq.models.tables import config_as_stored, find_tables
from lorq.pipeline.tables import embedding_heads
from lorq.storage.companions import find_companions, with_code_of
from lorq.storage.config import write_format
from lorq.storage.names import FORMAT_VERSION, REPORT_NAME, SENTINEL, shard_name
from lorq.storage.report import LayerReport, Report, read_report
from lorq.storage.writer import CheckpointWriter
from lorq.version import __version__


def check_lorq(couple: Couple) -> None:
    """Refuse a model whose weights are no codes of lorq, by those of its first block.

    Raises:
        ValueError: naming the layer and the reason.
    """
    if not couple.files.layers:
        raise ValueError(
            f"--form lorq needs weights that are integer codes with groups, {couple.quantized.checkpoint.folder} has "
            "none that lorq knows of (what a GGUF file holds is known by its values alone); take --form peft or gguf"
        )
    model, tables = couple.quantized, _tables(couple)
    for part in model.parts:
        for name in set(part.tensors) - {f"{target.name}.weight" for target in (*part.targets, *tables)}:
            if _is_quantized(couple, name):
                raise ValueError(
                    "--form lorq has codes for the layers of blocks, the table of tokens and the head alone, "
                    f"{name} is quantized too; take --form peft"
                )
    for target in (*model.blocks[0].targets, *tables):
        _exact(couple, target)


def _tables(couple: Couple) -> list[Target]:
    """The table of tokens and the head, as far as they are quantized."""
    found = find_tables(couple.quantized)
    named = {t.name: t for t in (found.embedding, *(() if found.tied else (found.head,))) if isinstance(t, Target)}
    return [target for name, target in named.items() if _is_quantized(couple, f"{name}.weight")]


def _is_quantized(couple: Couple, name: str) -> bool:
    return not couple.files.layers.keys().isdisjoint(couple.quantized.stored_names(name))


def _exact(couple: Couple, target: Target) -> QuantizedWeight | None:
    """A layer's weight in lorq's codes; None where it is not quantized."""
    if not _is_quantized(couple, f"{target.name}.weight"):
        return None
    names = couple.quantized.stored_names(f"{target.name}.weight")
    try:
        if len(names) > 1:
            raise ValueError("it is stored in another form than the layer has it")
        return couple.files.weight(names[0]).exact()
    except ValueError as error:
        raise ValueError(
            f"--form lorq needs weights that are lorq's codes, {target.name} is not: {error}; take --form peft"
        ) from error


def with_factors(weight: QuantizedWeight, factors: LowRank | None) -> QuantizedWeight:
    """A quantized weight with factors, in the model's own channels, beside those that it has.

        W^ + L R = (codes + R_0) T^T + L R = (codes + [L_0 L] [R_0; R T]) T^T

    Raises:
        ValueError: if it has factors of another type.
    """
    if factors is None:
        return weight
    own, type_ = weight.low_rank, factors.factor_type
    if weight.basis is not None:
        left, right = factors.factors()
        factors = store_factors(left, weight.basis.rotate(right), factor_type=type_)
        assert factors is not None
    if own is None:
        return replace(weight, low_rank=factors)
    if not isinstance(own, LowRank) or own.factor_type != type_:
        raise ValueError(
            f"a layer has factors of one type, these would be {type_} beside "
            f"{getattr(own, 'factor_type', 'shared')} ones; take the other --factor-type, or --form peft"
        )
    left_scale, right_scale = (
        None if a is None or b is None else torch.cat([a, b])
        for a, b in ((own.left_scale, factors.left_scale), (own.right_scale, factors.right_scale))
    )
    left, right = torch.cat([own.left, factors.left], 1), torch.cat([own.right, factors.right])
    return replace(weight, low_rank=LowRank(left, right, left_scale, right_scale))


def write_lorq(done: Compensated, folder: Path, report: Report) -> Report:
    """Write the folder, block by block; the report with its sizes.

    Raises:
        ValueError: if a weight is no code of lorq.
    """
    model, source = done.couple.quantized, done.couple.quantized.checkpoint.folder
    writer, tables, told = CheckpointWriter.create(folder, {}), _tables(done.couple), _told(done)
    outside = [name for part in model.outside for name in part.tensors]
    for number, (names, targets) in enumerate([(outside, tables), *((p.tensors, p.targets) for p in model.blocks)]):
        tensors, record = _pack(done, names, targets, told)
        size = sum(tensor.nbytes for tensor in tensors.values())
        writer.write_shard(shard_name(number, len(model.blocks)), tensors, record | {"bytes": size})
    records = list(writer.completed.values())
    stored = sum(record["bytes"] for record in records)
    beside, left = find_companions(source)
    run = report.run | ({"not_copied": left} if left else {})
    report = replace(
        report, bytes=stored, checksums=writer.shard_checksums(), run=run,
        layers=tuple(
            LayerReport(**layer | {"shape": tuple(layer["shape"])}) for record in records for layer in record["layers"]
        ),
    )  # fmt: skip
    config = config_as_stored(model, with_code_of(read_config(source, quantized=True).to_dict(), beside)) | {
        "transformers_weights": SENTINEL,
        "quantization_config": {
            "quant_method": "lorq", "format_version": FORMAT_VERSION, "lorq_version": __version__,
            "method": report.method, "settings": report.settings, "tiles": {}, "inputs": done.inputs,
            "embeddings": embedding_heads(model, tables),
            "layers": {name: format for record in records for name, format in record["formats"].items()},
        },
    }  # fmt: skip
    config.pop("_name_or_path", None)
    writer.finish(config=config, files={**beside, REPORT_NAME: report.to_bytes()})
    return report


def _pack(
    done: Compensated, names: Iterable[str], targets: Iterable[Target], told: Mapping[str, LayerReport]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of parameters, those of layers as codes, and the layers' formats."""
    model = done.couple.quantized
    weights = {f"{target.name}.weight": target for target in targets}
    tensors: dict[str, Tensor] = {}
    formats: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    for name in names:
        target = weights.get(name)
        weight = None if target is None else _exact(done.couple, target)
        if target is None or weight is None:
            tensors[name] = model.stored_tensor(name)
            continue
        factors = done.factors(target.name) if target.name in done.layers else None
        weight = with_factors(weight, factors)
        formats[target.name] = write_format(weight.format)
        layers.append(vars(_report(done, target.name, weight, told)))
        tensors |= {f"{target.name}.{local}": tensor for local, tensor in weight.tensors().items()}
    return tensors, {"formats": formats, "layers": layers}


def _told(done: Compensated) -> dict[str, LayerReport]:
    """What is known of the layers where lorq has quantized them."""
    folder = done.couple.quantized.checkpoint.folder
    if (read_quantization(folder) or {}).get("quant_method") != "lorq":
        return {}
    return {layer.name: layer for layer in read_report(folder).layers}


def _report(done: Compensated, name: str, weight: QuantizedWeight, told: Mapping[str, LayerReport]) -> LayerReport:
    """What the report says of a layer, whose bytes here are those of lorq's codes."""
    if name in done.layers:
        known = done.report(name)
    else:
        known = told.get(name) or LayerReport(name, weight.shape, 0, 0, "none", 0.0, 0.0, 0)
        why = f"no factors: {done.couple.kept.get(name, 'a table of tokens or a head')}"
        known = replace(known, note="; ".join(filter(None, (known.note, why))))
    return replace(known, bits=weight.format.bits, rank=weight.rank, bytes=layer_bytes(weight.stored_bits()))
