"""Weights as bitsandbytes stores them: NF4 and FP4 in blocks, and 8-bit integers with a scale per row."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorq.models.decoded import Decoded

# Local name of the JSON that tells of a 4-bit weight, with its kind behind it.
STATE = "weight.quant_state.bitsandbytes__"


def read_state(state: Tensor) -> dict[str, Any]:
    """What is known of a 4-bit weight: shape, block size, and so on.

    Raises:
        ValueError: if it is no JSON object with these.
    """
    try:
        told = json.loads(bytes(state.tolist()))
        shape, size = [int(n) for n in told["shape"]], int(told["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"a 4-bit weight must tell its shape and block size, as bitsandbytes does ({error})") from None
    if len(shape) != 2 or min(*shape, size) < 1:
        raise ValueError(f"a 4-bit weight must have two dimensions and blocks, got {told}")
    return told | {"shape": tuple(shape), "blocksize": size}


def read_four_bits(tensors: Mapping[str, Tensor]) -> Decoded:
    """Codes two in a byte, the first in its upper half; blocks run through the rows one after the other.

    weight = quant_map[code] * absmax[block],
    absmax = nested_quant_map[absmax_code] * nested_absmax[block of blocks] + nested_offset   where it is nested
    """
    key = next(name for name in tensors if name.startswith(STATE))
    state = read_state(tensors[key])
    packed = tensors["weight"].flatten().view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().long()
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        outer = tensors["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
        inner = tensors["weight.nested_quant_map"].float()[absmax.long()]
        absmax = inner * outer[: len(inner)] + float(state["nested_offset"])
    out, in_ = state["shape"]
    values = tensors["weight.quant_map"].float()[codes[: out * in_]]
    scale = absmax.float().repeat_interleave(state["blocksize"])[: out * in_]
    return Decoded((values * scale).view(out, in_), f"bitsandbytes' {key.removeprefix(STATE).upper()} blocks")


def read_eight_bits(tensors: Mapping[str, Tensor]) -> Decoded:
    """``weight`` int8 and ``SCB``, the largest magnitude of each row: ``weight * SCB / 127``.

    Raises:
        ValueError: if the rows are not stored one after the other.
    """
    if (form := int(tensors.get("weight_format", torch.zeros(1)).flatten()[0])) != 0:
        raise ValueError(f"an 8-bit weight must be stored row by row (weight_format 0), got {form}; save it again")
    return Decoded(tensors["weight"].float() * (tensors["SCB"].float() / 127).unsqueeze(1), "bitsandbytes' 8-bit rows")
