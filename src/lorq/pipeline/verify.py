"""Read a written folder back and compare: what is on the disk must compute what was solved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.weight import QuantizedWeight
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.calls import Stream
from lorq.models.experts import find_experts
from lorq.models.skeleton import read_config, skeleton
from lorq.models.windows import positions_of
from lorq.pipeline.observe import routed_alike
from lorq.pipeline.tables import put_dense
from lorq.progress import VERIFY, Progress
from lorq.runtime.packed import PackedWeight
from lorq.runtime.swap import swap_experts, swap_layers, tie_heads
from lorq.storage.folder import LorqFolder

# Windows, and tokens of each, that are followed through the quantized model in memory and again from disk.
_WINDOWS, _TOKENS = 2, 32  # fewer tokens if the model has fewer positions
# float32 sums in another order differ by about 1e-6 a block; a wrong bit in any layer is far above this.
SAME_SQNR_DB = 60.0


@dataclass(frozen=True)
class Probe:
    """Short windows that go through the quantized blocks in memory, and again as they are on disk.

    Their ``tokens`` are random. ``routes`` tell where they are routed, by experts module, for each window; filled the
    first time.
    """

    tokens: Int[Tensor, "windows length"]
    stream: Stream
    routes: list[dict[str, tuple[Tensor, Tensor]]]

    @classmethod
    def begin(cls, model: StreamedModel, tokens: Int[Tensor, "windows length"]) -> "Probe":
        """At a model's first block."""
        return cls(tokens, model.embed(tokens), [{} for _ in tokens])

    def run(self, model: StreamedModel, block: Part) -> Float[Tensor, "length width"]:
        """The resident block's output for the first window."""
        return model.run(block, self.stream, 0)

    def advance(self, model: StreamedModel, block: Part) -> None:
        """Go on to the next block."""
        experts = find_experts(model.model, block.name)
        for window, routes in enumerate(self.routes):
            with routed_alike(experts, routes):
                self.stream.hidden[window] = model.run(block, self.stream, window)
        self.stream.forget(block.name)

    def logits(self, model: StreamedModel) -> Float[Tensor, "windows length vocabulary"]:
        """Behind the last block."""
        with model.resident(*model.outside):
            pairs = zip(self.tokens, self.stream.hidden, strict=True)
            return torch.stack([model.logits(tokens, hidden).cpu() for tokens, hidden in pairs])


def probe_tokens(config: Any, seed: int) -> Int[Tensor, "windows length"]:
    """Random tokens for comparing logits."""
    length = min(_TOKENS, positions_of(config) or _TOKENS)
    return torch.randint(config.vocab_size, (_WINDOWS, length), generator=torch.Generator().manual_seed(seed))


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    """How near logits are to what they should be; of those of a head of zeros there is nothing else to be equal."""
    error = (expected - got).square().sum()
    return float(10 * torch.log10(expected.square().sum() / error.clamp(min=1e-30))) if error else math.inf


def verify(
    model: StreamedModel,
    probe: Probe,
    folder: LorqFolder,
    tables: Mapping[Target, QuantizedWeight],
    progress: Progress,
) -> None:
    """Read the written shards back into packed layers, block by block, and compare the probe's logits.

    The probe is behind the last solved block; the original's head makes the logits to be expected, or the solved one
    of ``tables``. What tokens are looked up as is compared by itself: the walk has the original's. Activations are in
    full precision on both sides.

    Raises:
        ArithmeticError: if they differ, or are not finite, or tokens take another way (`routed_alike`).
    """
    progress(VERIFY, 0, len(model.blocks))
    empty = skeleton(read_config(model.checkpoint.folder, quantized=True))
    swap_layers(empty, folder.formats)
    # Rounding activations makes a whole step of a difference in the last digit, and the next block many more: after
    # thirty blocks two right models are 30 dB apart.
    for module in empty.modules():
        if isinstance(module, PackedWeight):
            module.format = replace(module.format, input_quantization="none", output_quantization="none")
    tie_heads(empty, folder.embeddings)
    swap_experts(empty, folder.tiles)
    written = StreamedModel(empty, folder.reader, device=model.device)
    again = replace(Probe.begin(written, probe.tokens), routes=probe.routes)
    looked_up = again.stream.hidden.clone()
    if tables:
        again = replace(again, stream=model.embed(probe.tokens))
    for number, block in enumerate(written.blocks, 1):
        with written.resident(block):
            again.advance(written, block)
        progress(VERIFY, number, len(written.blocks))
    with model.resident(*model.outside):
        for target, weight in tables.items():
            put_dense(weight, model.resident_weight(target))
        expected, start = probe.logits(model), model.embed(probe.tokens).hidden if tables else looked_up
    logits = again.logits(written)
    if not bool(torch.isfinite(logits).all()):
        raise ArithmeticError(f"{folder.path} read back gives logits that are not finite; keep it for a bug report")
    near = min(sqnr_db(expected, logits), sqnr_db(start, looked_up))
    if near < SAME_SQNR_DB:
        raise ArithmeticError(
            f"{folder.path} read back must give the solved model's logits to {SAME_SQNR_DB:.0f} dB, got {near:.1f} dB; "
            "the disk or memory is faulty, or this is a bug: run again with --overwrite"
        )
