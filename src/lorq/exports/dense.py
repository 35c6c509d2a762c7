"""`--to dense`: the full matrices that the codes stand for, as an ordinary Hugging Face folder."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorq.exports.plain import DTYPES, PlainFolder, PlainNames, in_dtype, own_dtype
from lorq.exports.request import Exported, ExportRequest, refusal
from lorq.storage.folder import LorqFolder


def export(folder: LorqFolder, out: Path, request: ExportRequest) -> Exported:
    """Write the folder, block by block; factors and rotations are in the matrices.

    Raises:
        ValueError: if an adapter is asked for.
        ArithmeticError: if a weight is too large for the type.
    """
    if request.adapter is not None:
        raise refusal("dense", f"has the low-rank part in its matrices, --adapter {request.adapter} is none", "peft")
    name = own_dtype(folder, request.dtype)
    names, written, error = PlainNames(folder), PlainFolder(out), _RoundingError(DTYPES[name])
    for tensors in _dense_files(folder, names, request):
        written.add(names.of({key: error.rounded(key, tensor) for key, tensor in tensors.items()}))
    written.finish(folder, {"dtype": name})
    lost = activations_lost(folder)
    if by := error.relative():
        lost |= {"rounding": f"{name} changes the weights by {by:.2g} of their norm"}
    return Exported(written.bytes, (f"{name} weights, as any Hugging Face model's",), lost)


def _dense_files(folder: LorqFolder, names: PlainNames, request: ExportRequest) -> Iterator[dict[str, Tensor]]:
    """The tensors of the dense model by its own names, one file of the folder after the other; codes as float32."""
    shared = {f"{name}." for name in folder.tiles}
    for _, header in request.files(folder):
        layers = {n.rpartition(".")[0] for n in header.tensors if n.rpartition(".")[0] in folder.formats}
        kept = [n for n in header.tensors if n.rpartition(".")[0] not in layers or n.endswith(".bias")]
        tensors = {n: folder.reader.tensor(n) for n in kept if f"{n.rpartition('.')[0]}." not in shared}
        for layer in sorted(layers):
            if any(name.startswith(f"{layer}.weight") for name in header.tensors):
                weight = folder.weight(layer).dense()
                tensors[f"{layer}.weight"] = weight.T if names.is_transposed(layer) else weight
        yield tensors


def activations_lost(folder: LorqFolder) -> dict[str, str]:
    """What is lost where a target runs float activations, and the folder's layers quantize theirs."""
    found = [n for n, f in folder.formats.items() if (f.input_quantization, f.output_quantization) != ("none", "none")]
    return {"activations": f"{len(found)} layers would quantize theirs to 8 bits"} if found else {}


class _RoundingError:
    """Rounds tensors to a type, and sums what that changes."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.changed, self.whole = dtype, 0.0, 0.0

    def rounded(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        result = in_dtype(name, tensor, self.dtype)
        self.changed += float((result.double() - tensor.double()).square().sum())
        self.whole += float(tensor.double().square().sum())
        return result

    def relative(self) -> float:
        return math.sqrt(self.changed / max(self.whole, 1e-300))
