"""Read a written folder back and compare: what is on the disk must compute what was solved."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorq.core.tile_factors import TileFormat
from lorq.models.blocks import StreamedModel
from lorq.models.experts import find_experts
from lorq.models.skeleton import read_config, skeleton
from lorq.pipeline.observe import routed_alike
from lorq.pipeline.plan import Run
from lorq.runtime.linear import QuantLinear
from lorq.runtime.swap import swap_experts, swap_layers
from lorq.storage.config import read_format
from lorq.storage.reader import SourceCheckpoint
from lorq.storage.safetensors_file import read_header

# Tokens of the window that is followed through the quantized model in memory and again from disk.
_PROBE_TOKENS = 64  # fewer if the model has fewer positions
# float32 sums in another order differ by about 1e-6 a block; a wrong bit in any layer is far above this.
_PROBE_SQNR_DB = 60.0


def probe_tokens(config: Any, seed: int) -> Int[Tensor, "length"]:
    """Random tokens for comparing logits; any text would do."""
    length = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", _PROBE_TOKENS))
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def _leave_activations(model: nn.Module) -> None:
    """Let packed layers round neither inputs nor outputs.

    Rounding makes a whole step of a difference in the last digit, and the next block many more: after thirty blocks
    two right models are 30 dB apart.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.format = replace(module.format, input_quantization="none", output_quantization="none")


def verify(
    run: Run,
    folder: Path,
    completed: Mapping[str, Any],
    probe: Int[Tensor, "length"],
    expected: Float[Tensor, "length vocabulary"],
    routes: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Read the written shards back into packed layers, block by block, and compare the probe's logits.

    Activations are in full precision on both sides.

    Raises:
        ArithmeticError: if they differ, or are not finite, or tokens take another way (`routed_alike`).
    """
    formats = {n: read_format(n, f) for r in completed.values() for n, f in r["formats"].items()}
    empty = skeleton(read_config(run.folder))
    swap_layers(empty, formats)
    _leave_activations(empty)
    swap_experts(empty, {n: TileFormat(**f) for r in completed.values() for n, f in r["tiles"].items()})
    headers = {name: read_header(folder / name) for name in completed}
    files = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    model = StreamedModel(empty, SourceCheckpoint(folder, headers, files), device=run.model.device)
    hidden = torch.empty(1, len(probe), run.model.model.config.get_text_config().hidden_size)
    calls = model.embed(probe[None], hidden)
    for index in range(len(model.blocks)):
        experts = find_experts(empty, model.blocks[index])
        with model.resident_block(index), routed_alike(experts, routes):
            hidden[0] = model.run(index, hidden[0], calls).cpu()
        run.progress("verify", index + 1, len(model.blocks))
    logits = model.logits(probe, hidden[0]).cpu()
    expected = expected.cpu()
    if not bool(torch.isfinite(logits).all()):
        raise ArithmeticError(f"{folder} read back gives logits that are not finite; keep it for a bug report")
    sqnr = 10 * torch.log10(expected.square().sum() / (expected - logits).square().sum().clamp(min=1e-30))
    if float(sqnr) < _PROBE_SQNR_DB:
        raise ArithmeticError(
            f"{folder} read back must give the solved model's logits to {_PROBE_SQNR_DB:.0f} dB, got "
            f"{float(sqnr):.1f} dB; the disk or memory is faulty, or this is a bug: run again with --overwrite"
        )
