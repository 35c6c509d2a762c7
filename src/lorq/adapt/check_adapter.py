"""An adapter's folder, looked at by itself: its layers' ranks, and factors that fit them."""

from pathlib import Path
from typing import Any

import torch

from lorq.adapt.adapters import ADAPTER_TENSORS
from lorq.adapt.folder import ADAPTER_CONFIG, read_adapter_config
from lorq.core.faults import layout_faults, not_finite
from lorq.core.packing import Layout
from lorq.storage.findings import Findings
from lorq.storage.safetensors_file import read_tensor

_PARTS = ("scale_left", "scale_right")


def check_adapter(place: Path, found: Findings) -> None:
    """Look at every factor; whether they are for the right codes, only the base tells."""
    ranks: Any = {}
    checksum = None
    with found.of(ADAPTER_CONFIG):
        config = read_adapter_config(place)
        ranks, base = config.get("ranks"), config.get("base")
        if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise ValueError(f"ranks must be whole numbers from 1 by layer, got {ranks!r:.80}")
        if not isinstance(base, str):
            raise ValueError(f"base must be the sha256 of the codes that it is for, got {base!r:.80}")
        if not isinstance(told := config.get("sha256"), str | None):
            raise ValueError(f"sha256 must be that of {ADAPTER_TENSORS}, got {told!r:.80}")
        checksum = told
    found.unsealed.append(ADAPTER_CONFIG)
    found.compare(ADAPTER_TENSORS, checksum)
    if not (place / ADAPTER_TENSORS).is_file():
        return
    found.notes.append("which codes it is for is seen when it is loaded onto them")
    header = found.headers([ADAPTER_TENSORS]).get(ADAPTER_TENSORS)
    if header is None:
        return
    for name in header.tensors:
        found.tensors += 1
        layer, _, part = name.rpartition(".")
        with found.of(name):
            tensor = read_tensor(place / ADAPTER_TENSORS, header, name)
            if part not in _PARTS or (isinstance(ranks, dict) and layer not in ranks):
                found.add(name, f"must be scale_left or scale_right of a layer that {ADAPTER_CONFIG} names")
            elif wrong := not_finite(tensor):
                found.add(name, wrong)
    for layer, rank in ranks.items() if isinstance(ranks, dict) else ():
        own = {part: header.tensors[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in header.tensors}
        sizes = {part: stored.shape for part, stored in own.items()}
        out, in_ = sizes.get("scale_left", (1,))[0], sizes.get("scale_right", (1,))[-1]
        layout: Layout = {"scale_left": ((out, rank), torch.float16), "scale_right": ((rank, in_), torch.float16)}
        room = {part: torch.empty(s.shape, dtype=s.dtype, device="meta") for part, s in own.items()}
        for fault in layout_faults(layout, room):
            found.add(f"{layer}", fault)
