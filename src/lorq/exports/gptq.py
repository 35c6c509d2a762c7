"""`--to gptq`: integer codes as GPTQ's readers take them, version 1 where all are symmetric, else version 2.

Of each layer ``qweight`` (in * bits / 32, out), codes packed down the columns; ``qzeros`` (groups, out * bits / 32),
``scales`` (groups, out) float16, and ``g_idx`` (in), the group of each column. Version 1 stores zero points less one,
which has no place for a zero point of 0.
"""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes import IntGrid
from lorq.core.packing import pack
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.exports.parts import adapter_lines, check_ranks, integer_layers, plain_codes, row_layers, write_codes
from lorq.exports.plain import PlainNames
from lorq.exports.request import Exported, ExportRequest, refusal
from lorq.exports.served import GPTQ_SERVED
from lorq.storage.folder import LorqFolder
from lorq.storage.json_files import json_bytes

_TARGET = "gptq"


def export(folder: LorqFolder, out: Path, request: ExportRequest) -> Exported:
    """Write the folder, block by block.

    Raises:
        ValueError: for codes that the format does not hold.
    """
    names = PlainNames(folder)
    layers = integer_layers(folder, names, _TARGET)
    _check(folder, layers)
    check_ranks(folder, names, _TARGET, request)
    offset = 1 if all(_grid(format).symmetric for format in layers.values()) else 0
    config = quantization_config(layers, names, offset)

    def tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
        return layer_tensors(weight, offset)

    done = write_codes(folder, out, request, layers, names, tensors, config)
    (out / "quantize_config.json").write_bytes(json_bytes(config))
    if offset and {format.bits for format in layers.values()} <= {4, 8}:
        lines = [f"vllm serve {shlex.quote(str(request.out))} --dtype float16"]
    else:
        codes = f"AutoModelForCausalLM.from_pretrained({str(request.out)!r})"
        both = f"peft.PeftModel.from_pretrained({codes}, {str(request.adapter)!r})"
        lines = [*([both] if request.adapter else []), GPTQ_SERVED]
    return adapter_lines(folder, names, request, done, lines)


def _grid(format: LayerFormat) -> IntGrid:
    assert isinstance(format.codes, IntGrid)
    return format.codes


def _check(folder: LorqFolder, layers: Mapping[str, LayerFormat]) -> None:
    """Refuse widths that readers do not know, and sizes that leave spare bits."""
    for name, format in layers.items():
        out, in_ = folder.reader.told_shape(f"{name}.weight_shape")
        if format.bits not in (2, 3, 4, 8):
            raise refusal(
                _TARGET, f"holds codes of 2, 3, 4 and 8 bits, {name} has {format.bits}", "compressed-tensors, dense"
            )
        if out % 32 or in_ % 32:
            raise refusal(
                _TARGET, f"packs 32 rows and columns at a time, {name} is {out} x {in_}", "compressed-tensors, dense"
            )
        if format.input_quantization != "none":
            raise refusal(_TARGET, f"holds weights alone, {name} quantizes its inputs", "compressed-tensors")


def layer_tensors(weight: QuantizedWeight, zero_offset: int) -> dict[str, Tensor]:
    """A layer's tensors as GPTQ has them, by local name; ``zero_offset`` is 1 in version 1."""
    codes = plain_codes(weight)
    bits, in_ = codes.format.bits, codes.shape[1]
    zero = codes.zero_points().to(torch.int16) - zero_offset
    return {
        "qweight": pack(codes.codes, bits).T.contiguous(),
        "qzeros": pack(zero.to(torch.uint8).T.contiguous(), bits),
        "scales": codes.scale.T.contiguous(),
        "g_idx": (torch.arange(in_) // codes.format.group_size).to(torch.int32),
    }


def quantization_config(layers: Mapping[str, LayerFormat], names: PlainNames, offset: int) -> dict[str, Any]:
    """The config; layers of another width or group than most are told in ``dynamic``, and those without codes."""
    rows, kinds = row_layers(layers, names), {}
    for name, grid in ((name, _grid(format)) for name, format in layers.items()):
        kinds[name] = grid.bits, -1 if name in rows else grid.group_size, grid.symmetric
    usual = Counter(kinds.values()).most_common(1)[0][0]
    stored = names.layers(layers)
    dynamic: dict[str, Any] = {
        f"+:^{_pattern(stored[name])}$": {"bits": bits, "group_size": group, "sym": symmetric}
        for name, (bits, group, symmetric) in kinds.items()
        if (bits, group, symmetric) != usual
    }
    inside = {name.rpartition(".")[2] for name in stored.values()}
    others = [name for name in names.others(layers) if name.rpartition(".")[2] in inside]
    dynamic |= {f"-:^{_pattern(name)}$": {} for name in others}
    bits, group, symmetric = usual
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
        "checkpoint_format": "gptq" if offset else "gptq_v2", "lm_head": False, "pack_dtype": "int32",
        "dynamic": dynamic,
    }  # fmt: skip


def _pattern(name: str) -> str:
    return name.replace(".", r"\.")
