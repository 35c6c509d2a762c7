"""Merge: an adapter becomes the model's own factors, and a changed model an ordinary lorq folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorq.adapt.adapters import (
    BASE,
    adapters_of,
    base_hash,
    half_factors,
    has_product_scale,
    lords_layers,
    trainable_layers,
    use_adapter,
)
from lorq.core.weight import layer_bytes
from lorq.models.locate import full_path, resolve_model
from lorq.runtime.device import own_defaults
from lorq.runtime.linear import QuantLinear
from lorq.storage.companions import find_companions
from lorq.storage.config import write_format
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import some_of
from lorq.storage.lock import owned
from lorq.storage.names import REPORT_NAME
from lorq.storage.reader import WeightFiles
from lorq.storage.writer import CheckpointWriter


@own_defaults()
def merge(model: nn.Module) -> None:
    """Make the adapter in use the model's own: its factors in float16 are the base from now on.

    Raises:
        ArithmeticError: if a factor is not finite in float16; the model is left as it is.
    """
    state = adapters_of(model)
    merged = {name: half_factors(layer) for name, layer in lords_layers(model).items()}
    state.known[BASE] = {name: (factors.left, factors.right) for name, factors in merged.items()}
    if state.active != BASE:
        del state.known[state.active]
    use_adapter(model, BASE)


@own_defaults()
def save(model: Any, out: str | Path, *, base: str | Path | None = None, note: str = "merged") -> None:
    """Write a trained or merged model as an ordinary lorq folder.

    Args:
        model: quantized with lords, whose factors in use are written, in float16; or trained with mode qat.
        out: the new folder.
        base: the lorq folder that the model was loaded from, for all that did not change; None takes the model's own
            note of it.
        note: what the report says of the changed layers.

    Raises:
        FileExistsError: if the folder is in use.
        ValueError: if the base is no folder of this model.
        ArithmeticError: if a factor is not finite in float16.
    """
    with owned(full_path(out)):
        write(model, full_path(out), base=base, note=note)


@own_defaults()
def write(model: Any, out: Path, *, base: str | Path | None, note: str) -> None:
    """`save` into a folder that is ours."""
    folder, layers = LorqFolder.open(resolve_model(base or model.name_or_path)), trainable_layers(model)
    report, source, config = folder.report, folder.reader, folder.config
    _check_own_folder(model, layers, source)
    halves = {name: half_factors(layer) for name, layer in layers.items() if has_product_scale(layer)}
    formats = config["quantization_config"]["layers"]
    identity = {"trained_from": source.fingerprint(), "note": note, "base": base_hash(model)}
    reports = {layer.name: layer for layer in report.layers}
    writer = CheckpointWriter.create(out, identity, again=True)
    for file, header in sorted(source.headers.items()):
        tensors = {name: source.tensor(name) for name in header.tensors}
        for name in sorted(layers.keys() & {tensor.rpartition(".")[0] for tensor in tensors}):
            weight = layers[name].value()
            codes: Any = weight.codes
            weight = replace(weight, codes=replace(codes, scale=halves.get(name, codes.scale)))
            tensors = {k: t for k, t in tensors.items() if k.rpartition(".")[0] != name or k.endswith(".bias")}
            tensors |= {f"{name}.{local}": tensor for local, tensor in weight.tensors().items()}
            formats[name] = write_format(weight.format)
            reports[name] = replace(
                reports[name], rank=weight.rank, bytes=layer_bytes(weight.stored_bits()),
                note="; ".join(part for part in (reports[name].note, note, "errors are those before") if part),
            )  # fmt: skip
        writer.write_shard(file, tensors, {"bytes": sum(t.numel() * t.element_size() for t in tensors.values())})
    source.check_unchanged()
    stored = sum(record["bytes"] for record in writer.completed.values())
    new = replace(report, layers=tuple(reports.values()), bytes=stored, checksums=writer.shard_checksums())
    writer.finish(config=config, files=find_companions(folder.path)[0] | {REPORT_NAME: new.to_bytes()})


def _check_own_folder(model: nn.Module, layers: Mapping[str, QuantLinear], source: WeightFiles) -> None:
    """Refuse a folder that lacks a layer, or has anything beside them that the model has not."""
    own = model.state_dict()
    wrong = [name for name in layers if f"{name}.weight_packed" not in source.files]
    for name in source.names:
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf != "bias":
            continue
        mine = own.get(name)
        if mine is None or not torch.equal(source.tensor(name).to(mine.dtype), mine.cpu()):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{source.folder} must be the model's own folder, it lacks or differs in {some_of(wrong)}; give base"
        )
