"""What each calibration token means to the model: squared gradients of its own log-likelihood at layers' outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorq.models.backward import WayBack
from lorq.models.blocks import Part, StreamedModel
from lorq.models.calls import Room
from lorq.models.experts import Experts, expert_name, find_experts
from lorq.pipeline.observe import TokenGradients
from lorq.pipeline.plan import Plan
from lorq.pipeline.walk import give_memory_back
from lorq.progress import WEIGH_BACK, Progress


def token_gradients(
    model: StreamedModel, plan: Plan, windows: Int[Tensor, "windows length"], folder: Path,
    progress: Progress, *, finished: Collection[str] = (),
) -> TokenGradients:  # fmt: skip
    """Of the layers whose inputs are looked at, but those of blocks ``finished`` before the first that is not.

    One pass forward through the blocks keeps what enters each, one pass back runs each again: memory for one block,
    and for the hidden states between them or, past ``spill_bytes``, files in ``folder``.

    Raises:
        FloatingPointError: if a gradient is not finite.
    """
    first = next((i for i, part in enumerate(model.blocks) if part.name not in finished), None)
    if first is None:
        return TokenGradients()

    def passed(stage: str, done: int, total: int) -> None:
        give_memory_back()
        progress(stage, done, total)

    room, back = Room(plan.options.spill_bytes, folder), model.blocks[first:]
    with model.products_in(plan.options.pass_dtype):
        way = WayBack.begin(model, windows, room, seed=plan.options.seed, progress=passed)
    passed(WEIGH_BACK, 0, len(back))
    squared: dict[str, Tensor] = {}
    mean: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for done, part in enumerate(reversed(back), 1):
        modules = _outputs(model, plan, part)
        with model.resident(part), _watched(modules) as seen, model.products_in(plan.options.pass_dtype):
            for window in range(len(windows)):
                way.through(model, part, window)
        for name, parts in reversed(seen.items()):  # where an overflow begins
            whole = torch.cat([tokens for tokens, _ in parts])
            _check_finite(name, whole)
            mean[name] = float(whole.mean())
            squared[name] = (whole / (mean[name] or 1.0)).float()
            # Those of experts' sum are none of the channels of their gates.
            if mean[name] and not isinstance(modules[name], Experts):
                channels = torch.zeros(1, dtype=torch.float64)
                for _, of_channels in parts:
                    channels = channels + of_channels
                outputs[name] = (channels / channels.mean()).float()
        del way.entrances[part.name]
        passed(WEIGH_BACK, done, len(back))
    return TokenGradients(squared, mean, outputs)


def _outputs(model: StreamedModel, plan: Plan, part: Part) -> dict[str, nn.Module]:
    """Where a block's gradients are looked at: at layers, and for experts' where the experts' sum comes out."""
    experts = find_experts(model.model, part.name)
    names = [target.name for target, method in plan.of(part).items() if plan.observes(method)]
    places = {name: expert_name(name, experts) for name in names}
    return {
        path: model.model.get_submodule(path)
        for path in dict.fromkeys(place.module if place else name for name, place in places.items())
    }


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Note the squared gradients at the modules' outputs, those of each token and each channel's sum, call by call."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def look(name: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, out: Tensor) -> None:
            place = len(seen[name])
            # Outputs that nothing reads have no gradient.
            nothing = torch.zeros(out[..., 0].numel(), dtype=torch.float64), out.new_zeros(1).double().cpu()
            seen[name].append(nothing)

            def arrived(gradient: Tensor) -> None:
                # float64: squares of small gradients are below float32's range.
                squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square()
                seen[name][place] = squares.sum(-1).cpu(), squares.sum(0).cpu()

            # Some layers read what does not come through the blocks: their outputs are where gradients begin.
            (out if out.requires_grad else out.requires_grad_()).register_hook(arrived)

        return called

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(look(name)))
        yield seen


def _check_finite(name: str, squared: Float[Tensor, "tokens"]) -> None:
    if bad := int((~torch.isfinite(squared)).sum()):
        raise FloatingPointError(
            f"gradients must be finite, got NaN or infinite ones for {bad} of {len(squared)} tokens at the output of "
            f"{name}; the model overflows on this text: use token_weights equal, or another calibration text"
        )
