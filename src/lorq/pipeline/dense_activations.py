"""Activations in 8 bits, in a block whose weights are still dense: their grids, smoothing, and the rounding itself."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorq.core.activations import Activations, range_grid
from lorq.core.basis import Basis
from lorq.core.stats import InputStats
from lorq.kernels import fake_quantize
from lorq.pipeline.observe import seen_inputs

# Layers whose outputs a key-value cache keeps, by the end of their names.
KEYS_AND_VALUES = ("k_proj", "v_proj")
# A block must compute the same before and after smoothing up to float32's rounding: energy of each token's difference.
_SAME = 1e-6
# Channels that are hardly ever on would get a scale of zero.
_LEAST = 1e-5


def layer_activations(name: str, stats: InputStats | None, *, inputs: str, cache: str) -> Activations:
    """What happens to a layer's activations.

    Inputs are "none", "token" or "tensor", which takes its range from the statistics and raises a ValueError without
    them. With the cache "token", what keys' and values' layers return is rounded too.
    """
    output = cache if name.endswith(KEYS_AND_VALUES) else "none"
    if inputs != "tensor":
        return Activations(inputs, output)
    if stats is None or stats.low is None or stats.high is None:
        raise ValueError(f"activations 'tensor' take their range from calibration, got no statistics for {name}")
    scale, zero = range_grid(stats.low.min().view(1), stats.high.max().view(1))
    return Activations(inputs, output, scale, zero.to(torch.int32))


@contextmanager
def quantized_activations(model: nn.Module, layers: Mapping[str, tuple[Activations, Basis | None]]) -> Iterator[None]:
    """Round the inputs, in their bases, and the outputs of dense layers as their packed likes will."""

    def before(activations: Activations, basis: Basis | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] if basis is None else basis.rotate(args[0])
            x = fake_quantize(x, activations.scale, activations.zero_point)
            return (x if basis is None else basis.unrotate(x), *args[1:])

        return hook

    with ExitStack() as hooks:
        for name, (activations, basis) in layers.items():
            module = model.get_submodule(name)
            if activations.input != "none":
                hooks.enter_context(module.register_forward_pre_hook(before(activations, basis)))
            if activations.output != "none":
                hooks.enter_context(module.register_forward_hook(lambda _, args, out: fake_quantize(out, None, None)))
        yield


@dataclass
class Smoothed:
    """What smoothing changed in a block: norms' parameters and layers' biases as they are to be stored, by name.

    ``notes`` say, by layer, why it was left alone.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def smoothing_scale(weights: list[Float[Tensor, "_ in"]], stats: InputStats, exponent: float) -> Float[Tensor, "in"]:
    """What each channel of an input is divided by, and its weights multiplied by, so that both are easy to round.

        s_j = max|x_j|^a / max|W_j|^(1-a)

    Source:
        SmoothQuant, arXiv:2211.10438, eq. 4.
    """
    assert stats.low is not None and stats.high is not None
    inputs = torch.maximum(-stats.low, stats.high).clamp(min=_LEAST)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=_LEAST)
    return inputs**exponent / columns ** (1 - exponent)


def smooth_block(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    stats: dict[str, InputStats],
    *,
    prefix: str,
    exponent: float,
    made: Collection[str] = (),
) -> Smoothed:
    """Divide the channels of inputs that come straight from a norm, in the norm, and multiply the weights' columns.

    What a norm's output goes into is found by looking. That nothing else reads it is checked by running the block:
    where its output changes, the norm and its layers are left as they were. The same for inputs that another layer
    makes channel by channel, in that layer's rows: of the gated product that down_proj reads, up_proj's; of values that
    every head has for itself, v_proj's. Which layer that is, is found by trying.

    Args:
        block: resident, called ``prefix``; its norms and layers are changed.
        layers: those to be quantized, by name, their weights (out, in) or transposed.
        run: runs the block.
        stats: by layer; those of smoothed inputs are replaced, and of scaled outputs.
        exponent: ``a``, how much of the inputs' range moves into the weights, 0 to 1.
        made: the layers between which rows and columns may be scaled.
    """
    smoothed, expected = Smoothed(), run()
    readers = _readers(block, layers, run)
    for path, names in readers.items():
        norm = block.get_submodule(path)
        if _norm_scaled(norm, {name: _out_in(layers[name]) for name in names}, stats, exponent, run, expected):
            smoothed.tensors |= {f"{prefix}.{path}.{key}": p.detach() for key, p in norm.named_parameters()}
        else:
            smoothed.notes |= dict.fromkeys(names, f"not smoothed: {path} also serves what is not quantized")
    for name in [name for name in layers if not any(name in group for group in readers.values())]:
        if name not in made:
            smoothed.notes[name] = "not smoothed: its input does not come straight from a norm"
            continue
        scale = smoothing_scale([_out_in(layers[name])], stats[name], exponent)
        makers = (m for m in made if m != name and _scaled(layers[m], layers[name], scale, run, expected))
        if (maker := next(makers, None)) is None:
            smoothed.notes[name] = "not smoothed: its input comes from no norm, and channel by channel from no layer"
            continue
        stats |= {name: stats[name].smoothed(scale), maker: stats[maker].outputs_divided(scale)}
        if isinstance(bias := layers[maker].bias, Tensor):
            smoothed.tensors[f"{maker}.bias"] = bias.detach()
    return smoothed


def _norm_scaled(
    norm: nn.Module, weights: Mapping[str, Tensor], stats: dict[str, InputStats], exponent: float,
    run: Callable[[], Tensor], expected: Tensor,
) -> bool:  # fmt: skip
    """Divide a norm's outputs and multiply its readers' columns, if that changes nothing of the block's output."""
    wanted = smoothing_scale(list(weights.values()), stats[next(iter(weights))], exponent)
    before = {key: p.detach().clone() for key, p in norm.named_parameters()}
    originals = {name: weight.clone() for name, weight in weights.items()}
    for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        scale = _fold(norm, before, wanted, offset)
        for name, weight in weights.items():
            weight.copy_(originals[name] * scale)
        if _same(run(), expected):
            changed = {id(stats[name]): stats[name].smoothed(scale) for name in weights}
            stats |= {name: changed[id(stats[name])] for name in weights}
            return True
        for name, weight in weights.items():
            weight.copy_(originals[name])
        for key, parameter in norm.named_parameters():
            parameter.data.copy_(before[key])
    return False


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether a block's outputs differ by no more than rounding, token by token: attention sinks are no yardstick."""
    errors, energies = (found - expected).square().sum(-1), expected.square().sum(-1)
    return bool((errors <= _SAME * energies).all())


def _scaled(maker: nn.Module, reader: nn.Module, scale: Tensor, run: Callable[[], Tensor], expected: Tensor) -> bool:
    """Divide the outputs of one layer and multiply another's columns, if that changes nothing of the block's output."""
    made, read = _out_in(maker), _out_in(reader)
    if made.shape[0] != read.shape[1]:
        return False
    parts = [(made, scale[:, None].reciprocal()), (read, scale)]
    if isinstance(maker.bias, Tensor):
        parts.append((maker.bias.data, scale.reciprocal()))
    originals = [tensor.clone() for tensor, _ in parts]
    for tensor, factor in parts:
        tensor.mul_(factor)
    if _same(run(), expected):
        return True
    for (tensor, _), original in zip(parts, originals, strict=True):
        tensor.copy_(original)
    return False


def _out_in(layer: nn.Module) -> Tensor:
    """A view of the weight, (out, in)."""
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.data.T if isinstance(layer, Conv1D) else weight.data


def _fold(norm: nn.Module, before: Mapping[str, Tensor], wanted: Tensor, offset: float) -> Tensor:
    """Divide a norm's parameters; the scale that its weight, rounded as it is stored, then has divided by."""
    parameters = dict(norm.named_parameters())
    weight = before["weight"]
    kept = ((weight + offset) / wanted - offset).to(torch.float32)
    scale = torch.where(kept + offset != 0, (weight + offset) / (kept + offset), torch.ones_like(wanted))
    parameters["weight"].data.copy_(kept)
    if "bias" in parameters:
        parameters["bias"].data.copy_(before["bias"] / scale)
    return scale


def _readers(block: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> dict[str, list[str]]:
    """The layers that read each norm's output, by the norm's path in the block."""
    made: dict[tuple[int, torch.Size], str] = {}
    alive: list[Tensor] = []  # so that equal addresses mean equal memory

    def note_output(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                alive.append(out)
                made[out.data_ptr(), out.shape] = path

        return hook

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            parameters = dict(module.named_parameters())
            if "weight" in parameters and all(p.ndim == 1 for p in parameters.values()):
                hooks.enter_context(module.register_forward_hook(note_output(path)))
        read = seen_inputs(run, layers)
    groups: dict[str, list[str]] = {}
    for name, (x, _) in read.items():
        if (place := (x.data_ptr(), x.shape)) in made:
            groups.setdefault(made[place], []).append(name)
    return groups
