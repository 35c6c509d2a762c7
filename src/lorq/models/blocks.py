"""A causal language model of which one part at a time has memory: the embeddings, a decoder block, or the head."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorq.models.calls import Answer, Entered, Key, Recorder, Room, Stream
from lorq.models.quantized import open_dense, read_dense
from lorq.models.skeleton import (
    find_blocks,
    find_tied,
    find_towers,
    get_tensor,
    is_linear,
    put_tensor,
    read_config,
    skeleton,
)
from lorq.models.stored import Stored, find_stored
from lorq.storage.reader import WeightFiles


@dataclass(frozen=True)
class Target:
    """A linear layer that can be quantized, by its module's full name, such as ``model.layers.0.mlp.up_proj``.

    Its size is in our orientation; where ``transposed``, the checkpoint keeps (in, out), as GPT-2's Conv1D does.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool


@dataclass(frozen=True)
class Part:
    """A stretch of the model: the embeddings, a decoder block, or the head.

    Attributes:
        name: that of the block's module, such as ``model.layers.0``; "embeddings", or "head" for what is left.
        tensors: names of its parameters and stored buffers. Tied ones outside the blocks are named once.
        targets: its layers that can be quantized, in the order of the architecture; outside the blocks none.
    """

    name: str
    tensors: tuple[str, ...]
    targets: tuple[Target, ...] = ()


class StreamedModel:
    """A model skeleton whose parameters are read when they are needed and given back afterwards.

    Blocks are found by what transformers declares (``_no_split_modules``), so that an architecture needs no
    code here. ``parts`` are in the order of data: embeddings, blocks, head. A block lives on ``device`` while it is
    worked on, in ``dtype``, that of the activations.

    Raises:
        ValueError: if no decoder blocks are found, or tensors that the model needs are missing
            or of another shape.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: WeightFiles,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.checkpoint = model, checkpoint
        self.device, self.dtype = torch.device(device), dtype
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self._parameters = {name for name, _ in model.named_parameters()}
        self._resident, self._in_bfloat16 = set[str](), False
        self._towers = find_towers(model)
        self._answers: dict[tuple[type[nn.Module], int], Answer] = {}
        blocks = find_blocks(model)
        self._sources = self._match_names()
        # Parameters that are stored as another alone, each with the other's name.
        self.tied = {
            name: origin
            for name, origin in find_tied(model).items()
            if self._sources.get(name) == self._sources.get(origin)
        }
        self.parts = self._find_parts(blocks)

    @classmethod
    def open(cls, folder: Path, *, dequantize: bool = False, **where: Any) -> "StreamedModel":
        """The model of a Hugging Face folder; options as of the class.

        With ``dequantize`` it may be one that others have quantized, of which the dequantized weights are read.
        """
        config = read_config(folder, quantized=dequantize)
        stored = read_dense(folder, config.get_text_config().dtype or torch.float32) if dequantize else None
        return cls(skeleton(config), stored or open_dense(folder), **where)

    @property
    def blocks(self) -> tuple[Part, ...]:
        return self.parts[1:-1]

    @property
    def outside(self) -> tuple[Part, Part]:
        """What comes before and after the blocks."""
        return self.parts[0], self.parts[-1]

    def _match_names(self) -> dict[str, Stored]:
        """Where every parameter and stored buffer lies, by its name in the model."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        stored = find_stored(self.model, self.checkpoint)
        found = {name: stored[name] for name in shapes if name in stored}
        tied = find_tied(self.model)
        for name, origin in tied.items():
            # Either may be the one that is stored.
            if origin not in found and name in found:
                found[origin] = found[name]
        for name, origin in tied.items():
            if name not in found and origin in found:
                found[name] = found[origin]
        missing = [name for name in shapes if name not in found and name not in tied]
        if missing:
            raise ValueError(
                f"{self.checkpoint.folder} lacks {len(missing)} tensors that {type(self.model).__name__} needs, "
                f"such as {', '.join(missing[:3])}; the checkpoint is incomplete or of another architecture"
            )
        wrong = [
            f"{name} is {source.shape(self.checkpoint)}, not {shapes[name]}"
            for name, source in found.items()
            if source.shape(self.checkpoint) != shapes[name]
        ]
        if wrong:
            raise ValueError(
                f"{self.checkpoint.folder}: {len(wrong)} tensors do not fit the config: {'; '.join(wrong[:3])}; "
                "config.json belongs to another model"
            )
        return found

    def _find_parts(self, blocks: list[str]) -> tuple[Part, ...]:
        names = list(self.model.state_dict(keep_vars=True))
        inside = tuple(block + "." for block in blocks)
        outside = [name for name in names if not name.startswith(inside) and name not in self.tied]
        tables = {name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding)}
        embedding = [name for name in outside if name.rpartition(".")[0] in tables]
        return (
            Part("embeddings", tuple(embedding)),
            *(Part(b, tuple(n for n in names if n.startswith(b + ".")), self._targets(b)) for b in blocks),
            Part("head", tuple(name for name in outside if name not in embedding)),
        )

    def _targets(self, block: str) -> tuple[Target, ...]:
        """The linear layers of a block."""
        from transformers.pytorch_utils import Conv1D

        found = []
        for name, module in self.model.get_submodule(block).named_modules(prefix=block):
            if is_linear(module):
                transposed = isinstance(module, Conv1D)
                out, in_ = reversed(module.weight.shape) if transposed else module.weight.shape
                found.append(Target(name, out, in_, transposed))
        return tuple(found)

    @property
    def unused_tensors(self) -> list[str]:
        """Tensors of the checkpoint that the architecture has no place for."""
        return sorted(set(self.checkpoint.names).difference(*(source.names for source in self._sources.values())))

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor as the checkpoint keeps it, by its name in the model."""
        return self._sources[name].read(self.checkpoint)

    def stored_names(self, name: str) -> list[str]:
        """The names that the checkpoint has for a tensor of the model, or for those that it is made of."""
        return self._sources[name].names

    def tensor_aside(self, name: str) -> Tensor:
        """The same for who only looks (`WeightFiles.aside`)."""
        return self._sources[name].read(self.checkpoint.aside())

    def is_parameter(self, name: str) -> bool:
        """Whether it is one, and no buffer: a mask may be infinite."""
        return name in self._parameters

    def stored_dtype(self, name: str) -> torch.dtype:
        """Its type, from the header."""
        return self.checkpoint.dtype(self._sources[name].name)

    def stored_bytes(self, name: str) -> int:
        """Its size, from the header."""
        return math.prod(self._sources[name].shape(self.checkpoint)) * self.stored_dtype(name).itemsize

    def weight(self, target: Target) -> Float[Tensor, "out in"]:
        """The stored weight of a linear layer, (out, in), in its stored dtype."""
        weight = self.stored_tensor(target.name + ".weight")
        return weight.T.contiguous() if target.transposed else weight

    @contextmanager
    def resident(self, *parts: Part, stored: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Keep parts in memory for the duration, in the model's compute dtype; what is there already is left alone.

        Tensors tied to those of the parts come along, those of towers, which text does not pass, stay away. ``stored``
        has tensors that the caller has read, by name; it is emptied, so that none is held twice.
        """
        given = {} if stored is None else stored
        names = [name for part in parts for name in part.tensors]
        read = {self._sources[name] for name in names}
        names += [name for name in sorted(self.tied) if self._sources.get(name) in read]
        names = [name for name in names if name not in self._resident and not name.startswith(self._towers)]
        loaded: dict[Stored, Tensor] = {}  # tied parameters share one tensor
        for name in names:
            source = self._sources[name]
            if source not in loaded:
                tensor = given.pop(name) if name in given else self.stored_tensor(name)
                # Buffers keep their type: a mask or a count is no activation.
                keep = not tensor.is_floating_point() or name not in self._parameters
                loaded[source] = tensor.to(self.device, tensor.dtype if keep else self.dtype)
            put_tensor(self.model, name, loaded[source])
        del loaded
        given.clear()
        self._resident.update(names)
        try:
            yield
        finally:
            self._resident.difference_update(names)
            for name in names:
                put_tensor(self.model, name, get_tensor(self.model, name).to("meta"))

    def resident_weight(self, target: Target) -> Float[Tensor, "out in"]:
        """A resident layer's weight, a view (out, in)."""
        weight = get_tensor(self.model, target.name + ".weight").data
        return weight.T if target.transposed else weight

    @contextmanager
    def _stand_ins(self, blocks: Sequence[Part], stand_in: Callable[..., Tensor]) -> Iterator[None]:
        """Let ``stand_in(block, hidden, args, kwargs, form)`` find the hidden states that each block answers with.

        They come in the form in which the block itself answers; one of each class runs once for every length, to see
        it.
        """

        def answer(block: Part, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            kind = type(module), hidden.numel()
            if kind not in self._answers:
                with self.resident(block):
                    out = type(module).forward(module, hidden, *rest, **kwargs)
                self._answers[kind] = Answer.of(out, block.name)
            form = self._answers[kind].copy()
            return form.around(stand_in(block, hidden, rest, kwargs, form))

        modules = [self.model.get_submodule(block.name) for block in blocks]
        for block, module in zip(blocks, modules, strict=True):
            # On the instance, so that what the model reads off its blocks stays what it is.
            module.forward = partial(answer, block, module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @torch.no_grad()
    def embed(self, windows: Int[Tensor, "windows length"], room: Room | None = None) -> Stream:
        """The windows at the first block.

        The model's own forward runs with a stand-in for every block, so masks, rotary angles and what else blocks are
        called with come out as the architecture makes them.

        Raises:
            ValueError: if the blocks are not called one after the other, each with what the one before has answered, or
                otherwise for other texts.
        """
        room = room or Room()
        recorder, hidden = Recorder(len(windows), room), torch.empty(0)
        answered: dict[str, Tensor] = {}  # by block of the current window, in the order of the calls

        def note(block: Part, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], form: Answer) -> Tensor:
            nonlocal hidden
            if not answered:
                if not len(hidden):
                    recorder.calls.shape = tuple(first.shape)
                    hidden = room.take((len(windows), first[..., 0].numel(), first.shape[-1]))
                hidden[number] = first.reshape(hidden.shape[1:])
            else:
                before = next(reversed(answered.values()))
                if block.name in answered or not (first is before or torch.equal(first, before)):
                    raise self._unlike(block.name, "again, or with what the model has changed in between")
            answered[block.name] = first
            recorder.called(block.name, args, kwargs)
            recorder.answered(block.name, form)
            return first

        with self.resident(*self.outside), self._stand_ins(self.blocks, note):
            for number, window in enumerate(windows):  # noqa: B007, for `note`
                answered.clear()
                recorder.begin()
                self.model.base_model(input_ids=window[None].to(self.device), use_cache=False)
                for block, name in zip_longest(self.blocks, answered):
                    if block.name != name:
                        raise self._unlike(block.name, "out of this order" if block.name in answered else "never")
        return Stream(hidden if len(windows) else room.take((0, 1, 1)), recorder.calls, room)

    def _unlike(self, block: str, how: str) -> ValueError:
        return ValueError(
            f"{type(self.model).__name__} is not supported: blocks must be called once each, in their order, with what "
            f"the block before has answered, {block} is called {how}"
        )

    @torch.no_grad()
    def run(self, block: Part, stream: Stream, window: int) -> Float[Tensor, "length width"]:
        """The output of a resident block for one window; what it leaves for later blocks is kept in the stream."""
        entered = stream.enter(block.name, window, self.device)
        inputs = stream.hidden[window].view(stream.calls.shape).to(self.device, self.dtype)
        hidden, left = self.call(block, stream, inputs, entered)
        for key, value in left.items():
            stream.keep(key, window, value)
        return hidden.view(stream.hidden.shape[1:])

    def call(self, block: Part, stream: Stream, inputs: Tensor, entered: Entered) -> tuple[Tensor, dict[Key, Any]]:
        """A resident block's answer, and what it leaves for later blocks."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._in_bfloat16):
            out = self.model.get_submodule(block.name)(inputs, *entered.args, **entered.kwargs)
        hidden, *rest = out if isinstance(out, tuple | list) else (out,)
        return hidden.to(self.dtype), dict(stream.left(block.name, entered, rest))

    @contextmanager
    def products_in(self, dtype: str) -> Iterator[None]:
        """Let blocks multiply in "bfloat16" for the duration, or in the activations' own type; weights stay."""
        self._in_bfloat16 = dtype == "bfloat16"
        try:
            yield
        finally:
            self._in_bfloat16 = False

    def differentiable_run(
        self, block: Part, stream: Stream, window: int, weights: Mapping[Target, Tensor]
    ) -> Float[Tensor, "length width"]:
        """The same with other weights (out, in) for some of its layers; gradients flow into them. Nothing is kept."""
        given = {
            f"{target.name.removeprefix(block.name + '.')}.weight": weight.T if target.transposed else weight
            for target, weight in weights.items()
        }
        entered = stream.enter(block.name, window, self.device)
        inputs = stream.hidden[window].view(stream.calls.shape).to(self.device, self.dtype)
        module = self.model.get_submodule(block.name)
        out = torch.func.functional_call(module, given, (inputs, *entered.args), entered.kwargs)
        hidden = out[0] if isinstance(out, tuple | list) else out
        return hidden.view(stream.hidden.shape[1:])

    @torch.no_grad()
    def logits(
        self, window: Int[Tensor, "length"], hidden: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "length vocabulary"]:
        """Logits from the last block's output: final norm, head and whatever else the architecture has there."""
        return self.differentiable_logits(window, hidden)

    def differentiable_logits(
        self, window: Int[Tensor, "length"], hidden: Float[Tensor, "*rows width"]
    ) -> Float[Tensor, "length vocabulary"]:
        """The same; gradients flow into the hidden states."""

        def answer(block: Part, first: Tensor, *_: Any) -> Tensor:
            return hidden.view(first.shape).to(first.device, first.dtype) if block is self.blocks[-1] else first

        return self._logits(window, self.blocks, answer)

    @torch.no_grad()
    def own_logits(
        self, window: Int[Tensor, "length"], visit: Callable[[Part], object], blocks: Sequence[Part]
    ) -> Float[Tensor, "length vocabulary"]:
        """Logits of the model's own forward, in which only these blocks work, each visited while it is resident."""

        def work(block: Part, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            del module.forward  # the visitor's runs are plain ones
            with self.resident(block):
                visit(block)
                return module.forward(*args, **kwargs)

        with ExitStack() as stack:
            for block in blocks:
                module = self.model.get_submodule(block.name)
                module.forward = partial(work, block, module)
                stack.callback(vars(module).pop, "forward", None)
            others = [block for block in self.blocks if block not in blocks]
            return self._logits(window, others, lambda block, first, *_: first)

    def _logits(self, window: Tensor, blocks: Sequence[Part], stand_in: Callable[..., Tensor]) -> Tensor:
        with self.resident(*self.outside), self._stand_ins(blocks, stand_in):
            logits: Tensor = self.model(input_ids=window[None].to(self.device), use_cache=False).logits[0]
        return logits.float()
