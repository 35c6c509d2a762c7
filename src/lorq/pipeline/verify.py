"""Read a written folder back and compare: what is on the disk must compute what was solved."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.models.blocks import Calls, Part, StreamedModel
from lorq.models.experts import find_experts
from lorq.models.skeleton import read_config, skeleton
from lorq.pipeline.observe import routed_alike
from lorq.progress import VERIFY, Progress
from lorq.runtime.linear import QuantLinear
from lorq.runtime.swap import swap_experts, swap_layers
from lorq.storage.folder import LorqFolder

# Tokens of the window that is followed through the quantized model in memory and again from disk.
_PROBE_TOKENS = 64  # fewer if the model has fewer positions
# float32 sums in another order differ by about 1e-6 a block; a wrong bit in any layer is far above this.
_PROBE_SQNR_DB = 60.0


@dataclass(frozen=True)
class Probe:
    """A short window that goes through the quantized blocks in memory, and again as they are on disk.

    ``hidden`` are the states with which its tokens, random ones, enter a block. ``routes`` tell where they are routed,
    by experts module; filled the first time.
    """

    tokens: Int[Tensor, "length"]
    hidden: Float[Tensor, "length width"]
    calls: Calls
    routes: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def begin(cls, model: StreamedModel, tokens: Int[Tensor, "length"]) -> "Probe":
        """At a model's first block."""
        hidden = torch.empty(1, len(tokens), int(model.model.config.get_text_config().hidden_size))
        return cls(tokens, hidden[0], model.embed(tokens[None], hidden), {})

    def run(self, model: StreamedModel, block: Part) -> Float[Tensor, "length width"]:
        """The resident block's output."""
        return model.run(block, self.hidden, self.calls)

    def advance(self, model: StreamedModel, block: Part) -> None:
        """Go on to the next block."""
        with routed_alike(find_experts(model.model, block.name), self.routes):
            self.hidden.copy_(self.run(model, block))


def probe_tokens(config: Any, seed: int) -> Int[Tensor, "length"]:
    """Random tokens for comparing logits."""
    length = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", _PROBE_TOKENS))
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def verify(model: StreamedModel, probe: Probe, folder: LorqFolder, progress: Progress) -> None:
    """Read the written shards back into packed layers, block by block, and compare the probe's logits.

    The probe is behind the last solved block; the original's head makes the logits to be expected. Activations are in
    full precision on both sides.

    Raises:
        ArithmeticError: if they differ, or are not finite, or tokens take another way (`routed_alike`).
    """
    progress(VERIFY, 0, len(model.blocks))
    empty = skeleton(read_config(model.checkpoint.folder))
    swap_layers(empty, folder.formats)
    # Rounding activations makes a whole step of a difference in the last digit, and the next block many more: after
    # thirty blocks two right models are 30 dB apart.
    for module in empty.modules():
        if isinstance(module, QuantLinear):
            module.format = replace(module.format, input_quantization="none", output_quantization="none")
    swap_experts(empty, folder.tiles)
    written = StreamedModel(empty, folder.reader, device=model.device)
    again = replace(Probe.begin(written, probe.tokens), routes=probe.routes)
    for number, block in enumerate(written.blocks, 1):
        with written.resident(block):
            again.advance(written, block)
        progress(VERIFY, number, len(written.blocks))
    logits = written.logits(again.tokens, again.hidden).cpu()
    expected = model.logits(probe.tokens, probe.hidden).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise ArithmeticError(f"{folder.path} read back gives logits that are not finite; keep it for a bug report")
    sqnr = 10 * torch.log10(expected.square().sum() / (expected - logits).square().sum().clamp(min=1e-30))
    if float(sqnr) < _PROBE_SQNR_DB:
        raise ArithmeticError(
            f"{folder.path} read back must give the solved model's logits to {_PROBE_SQNR_DB:.0f} dB, got "
            f"{float(sqnr):.1f} dB; the disk or memory is faulty, or this is a bug: run again with --overwrite"
        )
