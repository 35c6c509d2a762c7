"""`--to peft`: a lorq folder of the codes alone, and the low-rank part as an adapter that PEFT loads on it."""

from dataclasses import replace
from pathlib import Path

from lorq.core.weight import layer_bytes
from lorq.exports.parts import adapter_lines, check_ranks
from lorq.exports.plain import PlainNames
from lorq.exports.request import Exported, ExportRequest, refusal
from lorq.storage.companions import find_companions
from lorq.storage.config import write_format
from lorq.storage.folder import LorqFolder
from lorq.storage.names import REPORT_NAME
from lorq.storage.writer import CheckpointWriter

_TARGET = "peft"
_NOTE = "the low-rank part is an adapter beside this folder, and the errors are those with it"


def export(folder: LorqFolder, out: Path, request: ExportRequest) -> Exported:
    """Write both, shard by shard.

    Raises:
        ValueError: if there is no low-rank part, or experts share theirs.
    """
    if folder.tiles:
        first = next(iter(folder.tiles))
        raise refusal(_TARGET, f"has an adapter for each layer, {first} has factors that experts share", "dense")
    if not any(format.rank for format in folder.formats.values()):
        raise ValueError(
            f"--to peft takes the low-rank part out of a folder, the layers of {folder.path} have none: it is a base "
            "for PEFT as it is, without an export"
        )
    if request.adapter is None:
        raise ValueError("--to peft writes the low-rank part by itself, say where: --adapter DIR")
    names = PlainNames(folder)
    check_ranks(folder, names, _TARGET, request)
    config, report = folder.config, folder.report
    formats, layers = config["quantization_config"]["layers"], {layer.name: layer for layer in report.layers}
    writer = CheckpointWriter.create(out, {"exported_from": folder.reader.fingerprint()})
    for file, header in request.files(folder):
        tensors = {name: folder.reader.tensor(name) for name in header.tensors}
        for name in [n for n, format in folder.formats.items() if format.rank and f"{n}.left" in tensors]:
            bare = replace(folder.weight(name), low_rank=None)
            tensors = {k: t for k, t in tensors.items() if k.rpartition(".")[0] != name or k.endswith(".bias")}
            tensors |= {f"{name}.{local}": tensor for local, tensor in bare.tensors().items()}
            formats[name] = write_format(bare.format)
            layers[name] = replace(layers[name], rank=0, bytes=layer_bytes(bare.stored_bits()))
        writer.write_shard(file, tensors, {"bytes": sum(tensor.nbytes for tensor in tensors.values())})
    size = sum(record["bytes"] for record in writer.completed.values())
    new = replace(
        report, layers=tuple(layers.values()), bytes=size, checksums=writer.shard_checksums(),
        run=report.run | {"low_rank_part": _NOTE},
    )  # fmt: skip
    writer.finish(config=config, files=find_companions(folder.path)[0] | {REPORT_NAME: new.to_bytes()})
    lines = [f"peft.PeftModel.from_pretrained(lorq.load({str(request.out)!r}), {str(request.adapter)!r})"]
    return adapter_lines(folder, names, request, Exported(size), lines)
