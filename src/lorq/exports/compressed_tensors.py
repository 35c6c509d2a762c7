"""`--to compressed-tensors`: the codes as vLLM and transformers read them, the low-rank part as an adapter beside them.

The layout is that of compressed-tensors 0.18 and later, "pack-quantized", whose bits are those of lorq's own packing;
layers of 8 bits whose inputs are quantized are "int-quantized", one byte a weight.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.codes import IntGrid
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.exports.parts import adapter_lines, check_ranks, integer_layers, plain_codes, row_layers, write_codes
from lorq.exports.plain import PlainNames
from lorq.exports.request import Exported, ExportRequest
from lorq.exports.served import SYMMETRIC_INPUTS, width_lines
from lorq.storage.folder import LorqFolder

_TARGET = "compressed-tensors"
_VERSION = "0.18.0"  # the oldest that reads the layout of 3, 5, 6 and 7 bits
_MIDDLE = 128  # of codes of 8 bits, which are stored signed


def export(folder: LorqFolder, out: Path, request: ExportRequest) -> Exported:
    """Write the folder, block by block.

    Raises:
        ValueError: for codes that the format does not hold.
    """
    names = PlainNames(folder)
    layers = integer_layers(folder, names, _TARGET)
    check_ranks(folder, names, _TARGET, request)
    config = quantization_config(layers, names)
    done = write_codes(folder, out, request, layers, names, layer_tensors, config)
    return adapter_lines(folder, names, request, done, _lines(request, layers))


def layer_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors as compressed-tensors has them, by local name; scales in float16, as lorq stores them."""
    codes, format = plain_codes(weight), weight.format
    if _is_plain(format):
        tensors = {"weight": (codes.codes.to(torch.int16) - _MIDDLE).to(torch.int8), "weight_scale": codes.scale}
        if codes.zero_point is not None:
            tensors["weight_zero_point"] = (codes.zero_point.to(torch.int16) - _MIDDLE).to(torch.int8)
    else:
        tensors = codes.tensors() | {"weight_shape": torch.tensor(weight.shape)}
    scale, zero = weight.activations.scale, weight.activations.zero_point
    if scale is not None and zero is not None:
        tensors |= {"input_scale": scale, "input_zero_point": (zero - _MIDDLE).to(torch.int8)}
    return tensors


def _is_plain(format: LayerFormat) -> bool:
    """Whether a layer is stored one byte a weight: what engines multiply as whole numbers."""
    return format.bits == 8 and format.input_quantization != "none"


def _packs_zero_points(format: LayerFormat) -> bool:
    return not _is_plain(format) and isinstance(format.codes, IntGrid) and not format.codes.symmetric


def quantization_config(layers: Mapping[str, LayerFormat], names: PlainNames) -> dict[str, Any]:
    """The config: a group for each kind of layer, by name, or all linear layers where there is one kind."""
    stored = names.layers(layers)
    kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
    rows = row_layers(layers, names)
    for name, format in layers.items():
        scheme = layer_scheme(format, rows=name in rows)
        kinds.setdefault(str(scheme), (scheme, []))[1].append(stored[name])
    formats = {scheme["format"] for scheme, _ in kinds.values()}
    single = len(kinds) == 1
    groups = {
        f"group_{number}": scheme | {"targets": ["Linear"] if single else own}
        for number, (scheme, own) in enumerate(kinds.values())
    }
    return {
        "quant_method": "compressed-tensors", "version": _VERSION, "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision", "config_groups": groups,
        "ignore": names.others(layers), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def layer_scheme(format: LayerFormat, *, rows: bool) -> dict[str, Any]:
    """What the config says of a layer; with ``rows`` a scale is a row's, and otherwise a group's."""
    codes = format.codes
    assert isinstance(codes, IntGrid)
    weights = {
        "num_bits": codes.bits, "type": "int", "symmetric": codes.symmetric, "dynamic": False,
        "strategy": "channel" if rows else "group", "group_size": None if rows else codes.group_size,
    }  # fmt: skip
    inputs = {
        "none": None,
        "token": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
        "tensor": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    }[format.input_quantization]
    own = "int-quantized" if _is_plain(format) else "pack-quantized"
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": own}


def _lines(request: ExportRequest, layers: Mapping[str, LayerFormat]) -> list[str]:
    """How it is served, and what of it is not."""
    lines = [f"vllm serve {shlex.quote(str(request.out))} --dtype float16"]
    lines.append("scales are float16: in bfloat16 an engine rounds them to 8 bits")
    lines += width_lines(format.bits for format in layers.values())
    if any(_packs_zero_points(format) for format in layers.values()):
        lines.append(
            "plain transformers (5.23, compressed-tensors 0.20) loads codes with zero points only as dense weights: "
            "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)); or quantize with "
            "--symmetric"
        )
    grids = {format.codes for format in layers.values() if format.input_quantization != "none"}
    if any(isinstance(grid, IntGrid) and not grid.symmetric for grid in grids):
        lines.append(SYMMETRIC_INPUTS)
    return lines
