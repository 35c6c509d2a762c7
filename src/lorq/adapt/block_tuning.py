"""Tune block by block: each block's output is fitted to the original's, one block in memory at a time."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorq.adapt.fit import Divergence
from lorq.adapt.settings import Tuning
from lorq.adapt.tuned import learning, leave_tuning, prepare_tuning, sizes, stored_numbers
from lorq.core.descent import Descent, Outcome, block_loss, minimise
from lorq.core.problem import BlockOutput, layer_generator
from lorq.models.blocks import Part, StreamedModel
from lorq.models.calls import Room, Stream
from lorq.models.skeleton import get_tensor
from lorq.progress import TUNE_BLOCKS, Progress
from lorq.runtime.linear import QuantLinear
from lorq.storage.atomic import RESUME, write_whole
from lorq.storage.folder import LorqFolder

# Hidden states go to files mapped into memory past this.
_SPILL_BYTES = 2 << 30


@dataclass(frozen=True)
class Divergences:
    """From the original, on text that is held out: of the folder as it was, and tuned."""

    before: float
    after: float


@dataclass(frozen=True)
class BlockTuning:
    """What blocks are tuned with.

    Attributes:
        original: the model that the folder was made of.
        windows: of text; those held out are measured on.
        dtype: of products in gradient steps; streams and sums are in float32.
        checkpoint: file that finished blocks are kept in; where it is there, the work goes on behind them.
    """

    original: StreamedModel
    folder: LorqFolder
    windows: Int[Tensor, "windows length"]
    held_out: Bool[Tensor, "windows"]
    settings: Tuning
    dtype: torch.dtype
    checkpoint: Path
    progress: Progress

    def run(self) -> tuple[dict[str, Tensor], Divergences]:
        """The numbers of all blocks, as they are stored, by the names that they are stored under; and what they gave.

        A block is given what the blocks before it, tuned, make of the text, and fitted to what the original's make of
        it; each token counts the same.

        Raises:
            ArithmeticError: if a loss is not finite.
        """
        model, (finished, numbers) = self.original, self._read()
        model.model.requires_grad_(False)
        room = Room(_SPILL_BYTES, self.checkpoint.parent)
        target, before = model.embed(self.windows, room), model.embed(self.windows[self.held_out], room)
        inputs = target.fork()
        self.progress(TUNE_BLOCKS, 0, len(model.blocks))
        for number, part in enumerate(model.blocks, 1):
            with model.resident(part):
                _advance(model, part, target)
                with self._quantized(part) as block:
                    _advance(model, part, before)
                    if part.name in finished:
                        _put(learning(block), numbers, part.name)
                    else:
                        finished[part.name] = str(self._fit(part, block, target, inputs))
                        found = stored_numbers(block, learning(block))
                        numbers |= {f"{part.name}.{name}": own for name, own in found.items()}
                        self._write(finished, numbers)
                    _advance(model, part, inputs)
            for stream in (target, inputs, before):
                stream.forget(part.name)
            self.progress(TUNE_BLOCKS, number, len(model.blocks))
        own = torch.nonzero(self.held_out)[:, 0]
        reached = [self._divergence(target.hidden[own], hidden) for hidden in (before.hidden, inputs.hidden[own])]
        return numbers, Divergences(*reached)

    def _divergence(self, original: Tensor, hidden: Tensor) -> float:
        """Mean divergence on the text that is held out, from hidden states behind the last block."""
        model, found = self.original, []
        with model.resident(*model.outside):
            for window, *own in zip(self.windows[self.held_out], original, hidden, strict=True):
                expected, got = (model.logits(window, states) for states in own)
                found.append(float(Divergence.apply(got, expected)))  # type: ignore[arg-type]
        return sum(found) / len(found)

    def _fit(self, part: Part, block: nn.Module, target: Stream, inputs: Stream) -> Outcome:
        chosen, parameters = self.settings, list(learning(block).values())
        learn, measured = (torch.nonzero(own)[:, 0] for own in (~self.held_out, self.held_out))

        def forward(_: object, windows: Tensor) -> Tensor:
            with torch.autocast(self.original.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                return torch.stack([self.original.differentiable_run(part, inputs, int(w), {}) for w in windows])

        loss = block_loss(BlockOutput(forward, target.hidden), dict, "equal")

        @torch.no_grad()
        def measure() -> float:
            return sum(float(loss(window[None])) for window in measured) / len(measured)

        return minimise(
            parameters, lambda chosen_: loss(learn[chosen_]), len(learn),
            Descent(chosen.block_steps, chosen.learning_rate, chosen.batch),
            generator=layer_generator(chosen.seed, part.name), units=sizes(parameters), measure=measure,
        )  # fmt: skip

    @contextmanager
    def _quantized(self, part: Part) -> Iterator[nn.Module]:
        """The resident block as the folder has it, in tuning."""
        model = self.original.model
        block, before = model.get_submodule(part.name), {}
        for target in part.targets:
            if target.name in self.folder.formats:
                before[target.name] = dense = model.get_submodule(target.name)
                layer = QuantLinear.from_weight(self.folder.weight(target.name), dense.bias)
                model.set_submodule(target.name, layer.to(self.original.device))
        for name in part.tensors:
            if name in self.folder.reader.files:
                get_tensor(model, name).data.copy_(self.folder.reader.tensor(name))
        prepare_tuning(block, lambda name: self.folder.reader.dtype(f"{part.name}.{name}"))
        try:
            yield block
        finally:
            leave_tuning(block)
            for name, dense in before.items():
                model.set_submodule(name, dense)

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What is known of each finished block, by name, and their numbers."""
        if not self.checkpoint.is_file():
            return {}, {}
        with safe_open(self.checkpoint, framework="pt") as file:
            finished = json.loads(file.metadata()["blocks"])
            return finished, {name: file.get_tensor(name) for name in file.keys()}  # no mapping

    def _write(self, finished: dict[str, str], numbers: dict[str, Tensor]) -> None:
        data = save(numbers, metadata={"blocks": json.dumps(finished)})
        write_whole(self.checkpoint, data, RESUME)


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], numbers: Mapping[str, Tensor], block: str) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(numbers[f"{block}.{name}"])


def _advance(model: StreamedModel, part: Part, stream: Stream) -> None:
    """Replace every window's hidden states by the resident block's outputs."""
    for window, hidden in enumerate(stream.hidden):
        hidden.copy_(model.run(part, stream, window))
