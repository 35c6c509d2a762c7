"""Walk: all calibration windows go through the model, block by block, and what the layers are given is looked at."""

import ctypes
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from lorq.core.activations import Activations
from lorq.core.basis import Basis
from lorq.models.blocks import Part, StreamedModel
from lorq.models.calls import Room, Stream
from lorq.models.experts import find_experts
from lorq.pipeline.check_weights import check_resident
from lorq.pipeline.dense_activations import quantized_activations
from lorq.pipeline.observe import Observed, Observer, TokenGradients, observed
from lorq.pipeline.plan import Plan

# The resident block's output for a stream's window of this number.
Run = Callable[[Stream, int], Tensor]


@dataclass(frozen=True)
class Streams:
    """The windows as they enter a block.

    Attributes:
        inputs: what the block's layers are calibrated on.
        original: the original model's: ``inputs`` themselves where these are it; a stream of its own for methods that
            fit a block to the original's output; None where nobody needs it.
        quantized: whether ``inputs`` leave each block as it is when the walk goes on, not as it was.
        compared: whether the layers' inputs in one stream are looked at beside those in the other.
    """

    inputs: Stream
    original: Stream | None
    quantized: bool
    compared: bool = False

    @classmethod
    def begin(cls, model: StreamedModel, plan: Plan, windows: Int[Tensor, "windows length"], folder: Path) -> "Streams":
        """At the first block. What is too large for memory goes to files in ``folder``."""
        compared = plan.stream == "corrected"
        quantized = compared or plan.stream == "quantized"
        inputs = model.embed(windows, Room(plan.options.spill_bytes, folder))
        original = None if quantized else inputs
        if plan.blockwise or compared:
            original = inputs.fork()
        return cls(inputs, original, quantized, compared)

    def look(self, run: Run, found: Observed) -> None:
        """Run the block, as it was, on the inputs; the original's leave it, if they are these or compared with them."""
        for window, hidden in enumerate(self.inputs.hidden):
            if self.compared and self.original is not None:
                with found.originals():
                    self.original.hidden[window].copy_(run(self.original, window))
            out = run(self.inputs, window)
            if self.original is self.inputs:
                hidden.copy_(out)

    def leave(self, run: Run, part: Part) -> None:
        """Go on to the next block, out of the resident one as it is now."""
        if self.quantized:
            advance(self.inputs, run)
        elif self.original is not None and self.original is not self.inputs:
            self.inputs.become(self.original)
        for stream in (self.inputs, self.original):
            if stream is not None:
                stream.forget(part.name)


def advance(stream: Stream, run: Run) -> None:
    """Replace every window's hidden states by the resident block's outputs."""
    for window, hidden in enumerate(stream.hidden):
        hidden.copy_(run(stream, window))


@dataclass(frozen=True)
class Visit:
    """A walk at a block, which is resident, its weights the original's; ``streams.original`` has left it already.

    Attributes:
        kept: its tensors that are stored as they are, as the checkpoint has them.
        source: checksum of all that was read of it.
        observed: what its layers are given, found in so many seconds; nothing where the block is finished.
        rounding: activations and basis of layers, by name, with which ``inputs`` leave the block; filled by who puts
            quantized weights into it.
        held: what is to be closed for the block to leave memory; empty where the walk does so.
    """

    part: Part
    kept: dict[str, Tensor]
    source: str
    streams: Streams
    observed: Observed
    seconds: float
    rounding: dict[str, tuple[Activations, Basis | None]] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)


def walk(
    model: StreamedModel, plan: Plan, streams: Streams, *, finished: Collection[str] = (),
    gradients: TokenGradients | None = None, hold: bool = False,
) -> Iterator[Visit]:  # fmt: skip
    """Go through the blocks, each in memory while the walk is there; nothing outside the streams is changed.

    The streams are at the first block, and behind the last at the end. Blocks named ``finished`` are not observed, in
    the others ``gradients`` weigh the tokens, where the plan wants that. With ``hold`` blocks stay in memory until
    who walks closes what their visits hold.
    """
    for part in model.blocks:
        with ExitStack() as stack:
            with model.checkpoint.hashed() as source:
                kept = {name: model.stored_tensor(name) for name in plan.kept(part)}
                stack.enter_context(model.resident(part, stored=dict(kept)))
            check_resident(plan, model, part)
            run, began = partial(model.run, part), time.monotonic()
            apart = streams.original is not streams.inputs and not streams.compared
            with model.products_in(plan.options.pass_dtype):
                if streams.original is not None and (apart or part.name in finished):
                    advance(streams.original, run)
                found = Observed() if part.name in finished else observe(model, plan, part, streams, run, gradients)
            visit = Visit(part, kept, source(), streams, found, time.monotonic() - began)
            if hold:
                visit.held.push(stack.pop_all())
            del kept, found
            yield visit
            with quantized_activations(model.model, visit.rounding), model.products_in(plan.options.pass_dtype):
                streams.leave(run, part)
            del visit
        give_memory_back()


def observe(
    model: StreamedModel, plan: Plan, part: Part, streams: Streams, run: Run, gradients: TokenGradients | None
) -> Observed:
    """What the layers of the resident block are given, as `Streams.look` goes through it."""
    if not len(streams.inputs.hidden):
        return Observed()
    options, gradients = plan.options, gradients or TokenGradients()
    layers = {t.name: model.model.get_submodule(t.name) for t, m in plan.of(part).items() if plan.observes(m)}
    observer = Observer(options.token_weights, options.router_weights, options.expert_tokens, model.device, gradients)
    experts = find_experts(model.model, part.name)
    with observed(layers, experts, lambda: run(streams.inputs, 0), observer) as found:
        streams.look(run, found)
    return found


def give_memory_back() -> None:
    """Hand the last block's memory back to the system.

    glibc keeps what is freed between longer-lived tensors: resident memory rose by 6 MB a block of 10 MB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc
