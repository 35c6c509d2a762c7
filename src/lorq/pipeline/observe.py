"""What the inputs of a block's layers are like: statistics collected while the block runs."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorq.core.stats import InputStats, StatsAccumulator, TokenWeights
from lorq.models.experts import Experts

# One token in so many may be routed otherwise by rounding alone. A gap between two scores as small as rounding
# errors is met by about one token in ten thousand; a wrong router moves most tokens.
_TOKENS_PER_STRAY = 32


@dataclass(frozen=True)
class TokenGradients:
    """Squared norms of the loss's gradients at modules' outputs, token by token in the order in which they pass.

    Attributes:
        squared: over their mean, by module: of layers, and of experts modules in the place of their layers.
        mean: 0 where no gradient reaches a module.
        outputs: mean squares at each channel of a layer's output, over their mean.
    """

    squared: Mapping[str, Float[Tensor, "tokens"]] = field(default_factory=dict)
    mean: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Float[Tensor, "out"]] = field(default_factory=dict)

    def reader(self, name: str) -> Callable[[Tensor], Float[Tensor, "*batch"] | None]:
        """A module's next, its first at first, for inputs; None where there are none, or nothing but zeros."""
        values, begun = self.squared.get(name), 0

        def read(inputs: Tensor) -> Tensor | None:
            nonlocal begun
            if values is None or not self.mean[name]:
                return None
            count = inputs.shape[:-1].numel()
            begun += count
            if begun > len(values):
                raise ValueError(
                    f"{name} must be given as many tokens as when gradients were taken, {len(values)}, got {begun}; "
                    "use token_weights equal"
                )
            return values[begun - count : begun].view(inputs.shape[:-1]).to(inputs.device)

        return read


@dataclass(frozen=True)
class Observer:
    """How statistics are collected, as `Options` describe it; the sums live on ``device``."""

    token_weights: TokenWeights = "equal"
    router_weights: bool = False
    expert_tokens: int = 1
    device: torch.device | str = "cpu"
    gradients: TokenGradients = field(default_factory=TokenGradients)

    def add(
        self, sums: dict[str, StatsAccumulator], name: str, inputs: Tensor, weights: Tensor | None = None,
        gradients: Tensor | None = None, originals: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count the inputs of a layer in its sum, which is made when it is first needed.

        Tokens count the same where gradients should weigh them and there are none.
        """
        if name not in sums:
            kind = "equal" if self.token_weights == "gradient" and gradients is None else self.token_weights
            sums[name] = StatsAccumulator(inputs.shape[-1], kind, self.device)
        try:
            sums[name].add(inputs, weights, gradients, originals)
        except (FloatingPointError, ValueError) as error:
            error.add_note(f"while calibrating {name}")
            raise

    def scaled(self, stats: InputStats, name: str) -> InputStats:
        """Statistics that know how much is at stake at the output of a module."""
        outputs = self.gradients.outputs.get(name)
        return replace(
            stats,
            sensitivity=self.gradients.mean.get(name, 1.0),
            output_weights=None if outputs is None else outputs.to(stats.hessian.device),
        )


def _finished(sums: dict[str, StatsAccumulator], name: str) -> InputStats:
    """A layer's statistics, and its sum no more."""
    try:
        return sums.pop(name).finish()
    except FloatingPointError as error:
        error.add_note(f"while calibrating {name}")
        raise


@dataclass(frozen=True)
class Observed:
    """What a block's run has shown; filled when the observation ends.

    Layers with the same input share one object of the statistics, unless gradients weigh its tokens for each in another
    way; notes are for their reports.
    """

    stats: dict[str, InputStats] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    aside: list[bool] = field(default_factory=list)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """What runs now is the original's window, with which the next run is compared."""
        self.aside.append(True)
        try:
            yield
        finally:
            self.aside.clear()


@contextmanager
def observed(
    layers: dict[str, nn.Module], experts: dict[str, Experts], run: Callable[[], object], observer: Observer
) -> Iterator[Observed]:
    """Collect each distinct input's statistics while the block runs.

    Args:
        layers: the linear layers to observe, by name, those of experts included.
        experts: the block's experts modules, by name.
        run: runs the block once, to see which layers share an input.
    """
    names = {path: [name for name in layers if name.startswith(path + ".")] for path in experts}
    routed = {name for own in names.values() for name in own}
    plain = {name: layer for name, layer in layers.items() if name not in routed}
    owners = shared_inputs(run, plain) if plain else {}
    sums: dict[str, StatsAccumulator] = {}
    # Few tokens have most of the gradient: too few for a regression.
    moved, alike = dict[str, StatsAccumulator](), replace(observer, token_weights="equal")
    found = Observed()
    watches = [_ExpertsWatch(path, experts[path], own, observer, found.aside) for path, own in names.items() if own]

    def add(name: str) -> Callable[..., None]:
        read, kept = observer.gradients.reader(name), deque[Tensor]()

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not found.aside:
                observer.add(sums, name, args[0], gradients=read(args[0]))
                if kept:
                    alike.add(moved, name, args[0], originals=kept.popleft())
            elif name == owners[name]:
                kept.append(args[0].clone())

        return look

    apart = observer.token_weights == "gradient"
    counted = owners.keys() if apart else set(owners.values())
    with _hooks({name: add(name) for name in counted}, layers), ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.watching())
        yield found
    finished = {name: _finished(sums, name) for name in list(sums)}
    for owner in list(moved):
        correction = moved.pop(owner).correction()
        own = [name for name in finished if owners[name] == owner]
        finished |= {name: replace(finished[name], correction=correction) for name in own}
    for name, owner in owners.items():
        found.stats[name] = replace(observer.scaled(finished[name], name), input=owner) if apart else finished[owner]
    if apart:
        places = {name: path for path, own in names.items() for name in own}
        dead = [name for name in layers if not observer.gradients.mean.get(places.get(name, name))]
        found.notes.update(dict.fromkeys(dead, "no gradient reaches its output: each token counts the same"))
    for watch in watches:
        watch.finish(found)


def shared_inputs(run: Callable[[], object], layers: dict[str, nn.Module]) -> dict[str, str]:
    """Which layers receive the same tensor: each layer's name to the first layer with its input.

    Found by looking, in one run of the block, so that no architecture needs to say it. A ValueError if a layer is
    never called.
    """
    seen = {name: x for name, (x, _) in seen_inputs(run, layers).items()}
    silent = [name for name in layers if name not in seen]
    if silent:
        raise ValueError(
            f"layers must be used when their block runs, these were not: {', '.join(silent)}; --exclude them"
        )
    first: dict[tuple[object, ...], str] = {}
    # The tensors are all still alive here, so equal addresses mean equal memory.
    keys = {name: (x.data_ptr(), x.shape, x.stride(), x.dtype) for name, x in seen.items()}
    return {name: first.setdefault(keys[name], name) for name in layers}


def same_inputs(run: Callable[[], object], layers: dict[str, nn.Module]) -> list[list[str]]:
    """The layers that are given one tensor, unchanged, in one run of the block, where they are several."""
    groups: dict[tuple[int, int], list[str]] = {}
    seen = seen_inputs(run, layers)
    for name in layers:
        if name in seen:
            x, version = seen[name]
            groups.setdefault((id(x), version), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def seen_inputs(run: Callable[[], object], layers: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, int]]:
    """What each layer that was called received, and its version then; all still alive, so that no two are mistaken."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def look(name: str) -> Callable[..., None]:
        # Tensors of inference mode do not count their changes.
        return lambda module, args: seen.__setitem__(name, (args[0], 0 if args[0].is_inference() else args[0]._version))

    with _hooks({name: look(name) for name in layers}, layers):
        run()
    return seen


class _ExpertsWatch:
    """Collects the statistics of one experts module: of the tokens routed to each expert, and of all tokens.

    An expert that sees too few tokens needs the statistics of all tokens, and whether it does is known only at
    the end. But who has few in the end has had few all along: so every expert is given all tokens too as long as
    it has had few, which ends within the first windows for most, and what was collected of it is dropped then.
    One pass is enough and no window is run twice.
    """

    def __init__(self, path: str, experts: Experts, layers: list[str], observer: Observer, aside: Sequence[bool]):
        self.path, self.experts, self.layers, self.observer, self.aside = path, experts, layers, observer, aside
        self.counts = [0] * len(experts)
        self.tokens = 0
        # Gate and up projection share their input by construction; it goes under the gate's name, if there is one.
        self.entry = experts.entries[0]
        self.inputs = {name: re.sub(r"\.up_proj$", f".{self.entry}", name) for name in layers}
        self.wanted = set(self.inputs.values())
        self.routed: dict[str, StatsAccumulator] = {}
        self.all: dict[str, StatsAccumulator] = {}  # the gates' shared input is under the module's own name
        self.read = observer.gradients.reader(path)
        self.gradients: Tensor | None = None  # of the window's tokens, by the sum of the experts

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.experts.watcher = self
        try:
            yield
        finally:
            self.experts.watcher = None

    def before(self, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """Count the tokens of each expert, and show all tokens to those that have had few."""
        if self.aside:
            return
        self.gradients, routed = self.read(hidden_states), (top_k_index < len(self.counts)).any(1)
        hidden_states = hidden_states[routed]
        gradients = None if self.gradients is None else self.gradients[routed]
        self.tokens += len(hidden_states)
        chosen = torch.bincount(top_k_index.flatten(), minlength=len(self.counts))
        self.counts = [a + b for a, b in zip(self.counts, chosen.tolist(), strict=False)]
        few = [i for i, count in enumerate(self.counts) if count < self.observer.expert_tokens]
        downs = {i: f"{self.path}.{i}.down_proj" for i in few}
        self.all = {name: total for name, total in self.all.items() if few and name in {self.path, *downs.values()}}
        if few:
            self.observer.add(self.all, self.path, hidden_states, gradients=gradients)
        for i, name in downs.items():
            if name in self.wanted:
                self.observer.add(self.all, name, self.experts.middle(i, hidden_states), gradients=gradients)

    def ran(self, expert: int, tokens: Tensor, inputs: Tensor, middle: Tensor, weights: Tensor) -> None:
        """Count the tokens that were routed to an expert.

        The gradient by its output is that by the experts' sum times the router's weight; gate and up projection weigh
        their tokens by it too, since it is known wherever a token is routed.
        """
        if self.aside:
            return
        gradients = None if self.gradients is None else self.gradients[tokens] * weights.float().square()
        v = weights.float().square() if self.observer.router_weights else None
        for projection, x in ((self.entry, inputs), ("down_proj", middle)):
            name = f"{self.path}.{expert}.{projection}"
            if name in self.wanted:
                self.observer.add(self.routed, name, x, v, gradients)

    def finish(self, found: Observed) -> None:
        """Give every layer its statistics, and those with few tokens of their own a note."""
        finished: dict[str, InputStats] = {}
        for name in self.layers:
            owner = self.inputs[name]
            expert, _, projection = name.removeprefix(self.path + ".").partition(".")
            count = self.counts[int(expert)]
            sums = self.routed
            if count < self.observer.expert_tokens:
                note = f"{count} of {self.tokens} tokens routed here, statistics from all of them"
                found.notes[name] = "; ".join(filter(None, (found.notes.get(name), note)))
                sums, owner = self.all, owner if projection == "down_proj" else self.path
            if owner not in finished:
                finished[owner] = self.observer.scaled(_finished(sums, owner), self.path)
            if sums is self.all:
                # One object for each expert, as gate and up share theirs: how many tokens it gets is its own.
                key = f"{owner} {expert}"
                finished.setdefault(key, replace(finished[owner], routed=count))
                owner = key
            found.stats[name] = finished[owner]


@contextmanager
def routed_alike(experts: Mapping[str, Experts], routes: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Record where a first run's tokens are routed, by experts module, and send them there again in a second.

    Two runs that differ by float32's last digits differ visibly if a token's scores for two experts are all but
    equal. Only tokens that the second run would send elsewhere are led back.

    Raises:
        ArithmeticError: if more tokens go elsewhere than rounding explains.
    """

    def lead(name: str) -> Callable[..., tuple[Tensor, ...] | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            hidden, index, weights = args
            if name not in routes:
                routes[name] = index.cpu(), weights.cpu()
                return None
            known, known_weights = (tensor.to(hidden.device) for tensor in routes[name])
            strayed = (index.sort(1).values != known.sort(1).values).any(1, keepdim=True)
            count, allowed = int(strayed.sum()), max(1, len(index) // _TOKENS_PER_STRAY)
            if count > allowed:
                raise ArithmeticError(
                    f"{name}: at most {allowed} of {len(index)} tokens may be routed otherwise than before, got {count}"
                )
            return hidden, torch.where(strayed, known, index), torch.where(strayed, known_weights, weights)

        return hook

    with _hooks({name: lead(name) for name in experts}, experts):
        yield


@contextmanager
def _hooks(hooks: dict[str, Callable[..., Any]], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(layers[name].register_forward_pre_hook(hook))
        yield
