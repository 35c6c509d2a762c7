"""Gradients of a streamed model's own log-likelihood: once forward through the blocks, once back, one in memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorq.core.problem import layer_generator
from lorq.models.blocks import Part, StreamedModel
from lorq.models.calls import Key, Room, Stream, tensors_in
from lorq.progress import WEIGH, WEIGH_END, Progress

# So many logits are made at a time: 256 MB, and their gradients as much.
_LOGITS = 1 << 26


@dataclass
class WayBack:
    """Windows that have gone forward through the blocks and go back, the loss's gradients with them.

    The loss of a window is the cross entropy, summed over positions, of next tokens drawn from the model's own
    distribution, so that the gradients' second moments are those of the true Fisher information.

    Attributes:
        windows: their tokens.
        stream: what blocks are called with.
        entrances: the hidden states that enter each block, by its name.
        gradients: of the loss by the hidden states at the place that was last reached.
        handed: of the loss by what blocks have left for later ones.
        makers: the block that has left it.
    """

    windows: Int[Tensor, "windows length"]
    stream: Stream
    gradients: Float[Tensor, "windows rows width"]
    entrances: dict[str, Tensor] = field(default_factory=dict)
    handed: dict[Key, list[Tensor]] = field(default_factory=dict)
    makers: dict[Key, str] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, model: StreamedModel, windows: Int[Tensor, "windows length"], room: Room, *, seed: int,
        progress: Progress,
    ) -> "WayBack":  # fmt: skip
        """Behind the last block, the gradients of the loss there.

        What is kept is one tensor of hidden states for each block, and one of gradients, all in ``room``.

        Raises:
            ValueError: if two blocks leave the same thing for later ones.
            FloatingPointError: if logits are not finite.
        """
        with model.resident(*model.outside):
            stream = model.embed(windows, room)
        way = cls(windows, stream, stream.hidden)
        progress(WEIGH, 0, len(model.blocks))
        for number, block in enumerate(model.blocks, 1):
            way.entrances[block.name] = stream.hidden
            with model.resident(block):
                way._forward(model, block)
            progress(WEIGH, number, len(model.blocks))
        way.gradients = stream.hidden  # each window's output gives way to its gradient
        with model.resident(*model.outside):
            for window in range(len(windows)):
                progress(WEIGH_END, window, len(windows))
                generator = layer_generator(seed, f"next tokens of window {window}")
                way.gradients[window] = _at_the_end(model, windows[window], way.gradients[window], stream, generator)
        progress(WEIGH_END, len(windows), len(windows))
        return way

    @torch.no_grad()
    def _forward(self, model: StreamedModel, block: Part) -> None:
        stream = self.stream
        entered, stream.hidden = stream.hidden, stream.room.take(stream.hidden.shape)
        for window, hidden in enumerate(entered):
            given = stream.enter(block.name, window, model.device)
            inputs = hidden.view(stream.calls.shape).to(model.device, model.dtype)
            out, left = model.call(block, stream, inputs, given)
            for key, value in left.items():
                if self.makers.setdefault(key, block.name) != block.name:
                    raise ValueError(
                        f"token_weights 'gradient' needs what blocks hand on to be left by one each, {block.name} "
                        f"changes what {self.makers[key]} has left; use token_weights equal"
                    )
                stream.keep(key, window, value)
            stream.hidden[window] = out.view(entered.shape[1:])

    def through(self, model: StreamedModel, block: Part, window: int) -> None:
        """Take a window's gradients back through a resident block, which runs once more; the last block comes first.

        Hooks on tensors inside the block see their gradients.
        """
        stream = self.stream
        for key in [key for key, maker in self.makers.items() if maker == block.name]:
            stream.handed.pop(key, None)  # it has not left them yet when it is entered
        given = stream.enter(block.name, window, model.device, differentiable=True)
        entered = self.entrances[block.name][window].view(stream.calls.shape).to(model.device, model.dtype)
        inputs = entered.clone().requires_grad_()
        with torch.enable_grad():
            # A leaf itself must not be changed in place, as some blocks do with their input.
            out, left = model.call(block, stream, inputs.clone(), given)
        ends = [(out, self.gradients[window].view(out.shape))]
        for key, value in left.items():
            ends += zip(_floating(value), (grad[window] for grad in self.handed.get(key, ())), strict=False)
        ends = [(tensor, grad.to(tensor.device, tensor.dtype)) for tensor, grad in ends if tensor.requires_grad]
        torch.autograd.backward([tensor for tensor, _ in ends], [grad for _, grad in ends])
        assert inputs.grad is not None
        self.gradients[window] = inputs.grad.view(self.gradients.shape[1:])
        for key, value in given.handed.items():
            self._collect(key, window, _floating(value))

    def _collect(self, key: Key, window: int, leaves: list[Tensor]) -> None:
        """Add the gradients by what an earlier block has left."""
        if key not in self.handed:
            take = self.stream.room.take
            self.handed[key] = [take((len(self.windows), *leaf.shape), leaf.dtype).zero_() for leaf in leaves]
        for total, leaf in zip(self.handed[key], leaves, strict=True):
            if leaf.grad is not None:
                total[window] += leaf.grad.cpu()


def _floating(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _at_the_end(
    model: StreamedModel, window: Int[Tensor, "length"], hidden: Tensor, stream: Stream, generator: torch.Generator
) -> Tensor:
    """The loss's gradient by the last block's output.

    Positions do not see each other behind the blocks: of large vocabularies, some go through the head at a time.
    """
    shape = stream.calls.shape
    rows = hidden.view(shape).detach().to(model.device, model.dtype).requires_grad_()
    step = max(1, _LOGITS // model.model.config.get_text_config().vocab_size)
    for start in range(0, len(window), step):
        part = slice(start, start + step)
        with torch.enable_grad():
            logits = model.differentiable_logits(window[part], rows[..., part, :].clone())
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError(
                "logits must be finite where gradients are to weigh tokens, got NaN or infinite ones; the model "
                "overflows on this text: use token_weights equal, or another calibration text"
            )
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        with torch.enable_grad():
            cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
    assert rows.grad is not None
    return rows.grad.view(hidden.shape)
