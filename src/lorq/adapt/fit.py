"""Fit what learns in a model to another's predictions, with a state that survives a crash."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorq.adapt.settings import Tuning
from lorq.adapt.tuned import learning, sizes
from lorq.core.descent import Descent, Outcome, State, minimise
from lorq.models.self_text import eval_mode
from lorq.progress import TUNE, Progress
from lorq.storage.atomic import RESUME, write_whole

# Logits per float32 temporary, 16 MB.
_CHUNK_LOGITS = 2**22
# A checkpoint is written so often: what a crash can cost.
_CHECKPOINT_SECONDS = 60.0


class Divergence(torch.autograd.Function):
    """Mean ``KL(p || q)`` of all predictions, in nats, ``p`` those of the original: ``dKL/dlogits = (q - p) / tokens``.

    Made some tokens at a time in float32; only the gradient, as large as the logits, is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "*tokens vocab"], original: Float[Tensor, "*tokens vocab"]) -> Tensor:
        q, p = logits.flatten(0, -2), original.flatten(0, -2)
        gradient, total = torch.empty_like(q), torch.zeros((), dtype=torch.float64, device=q.device)
        size = max(1, _CHUNK_LOGITS // q.shape[-1])
        for start in range(0, len(q), size):
            own = slice(start, start + size)
            log_q, log_p = q[own].float().log_softmax(-1), p[own].float().log_softmax(-1)
            share = log_p.exp()
            total += (share * (log_p - log_q)).sum()
            gradient[own] = log_q.exp_().sub_(share).div_(len(q))
        ctx.save_for_backward(gradient.view_as(logits))
        return (total / len(q)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


@dataclass(frozen=True)
class Fit:
    """What a model is fitted to, and in which type products are.

    Attributes:
        original: the model whose predictions are the target.
        windows: of text to tune on.
        held_out: of text to measure on.
        dtype: of products; sums and numbers are in float32.
    """

    original: nn.Module
    windows: Int[Tensor, "windows length"]
    held_out: Int[Tensor, "held_out length"]
    dtype: torch.dtype

    def divergence(self, model: nn.Module, windows: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Mean divergence of a model's predictions from the original's."""
        device = next(model.parameters()).device
        windows = windows.to(device)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                original = self.original(input_ids=windows, use_cache=False).logits
            loss = Divergence.apply(model(input_ids=windows, use_cache=False).logits, original)
        assert isinstance(loss, Tensor)
        return loss

    @torch.no_grad()
    def measured(self, model: nn.Module) -> float:
        """The same on the text that is held out."""
        return sum(float(self.divergence(model, window[None])) for window in self.held_out) / len(self.held_out)


def fit(model: nn.Module, to: Fit, chosen: Tuning, checkpoint: Path, progress: Progress) -> Outcome:
    """Let what learns in a model (`lorq.adapt.tuned.prepare_tuning`) learn; what measured best stays in it.

    Args:
        model: of which all that requires a gradient is changed.
        to: the target.
        chosen: how.
        checkpoint: file that the state is kept in; where it is there, the work goes on from it.
        progress: is told of every step.

    Raises:
        ArithmeticError: if the loss is not finite.
    """
    numbers = learning(model)
    watch = _Watch(checkpoint, list(numbers), chosen.steps, progress)
    with eval_mode(model, to.original):
        return minimise(
            list(numbers.values()),
            lambda chosen_: to.divergence(model, to.windows[chosen_]),
            len(to.windows),
            Descent(chosen.steps, chosen.learning_rate, chosen.batch),
            generator=torch.Generator().manual_seed(chosen.seed),
            units=sizes(list(numbers.values())),
            measure=lambda: to.measured(model),
            state=_read_state(checkpoint, numbers) if checkpoint.is_file() else None,
            watch=watch,
        )


class _Watch:
    """Tells how far the work is, and writes its state now and then."""

    def __init__(self, checkpoint: Path, names: list[str], steps: int, progress: Progress):
        self.checkpoint, self.names, self.steps, self.progress = checkpoint, names, steps, progress
        self.written = time.monotonic()

    def __call__(self, state: State) -> None:
        self.progress(TUNE, state.step, self.steps)
        if time.monotonic() - self.written >= _CHECKPOINT_SECONDS or state.step == self.steps:
            _write_state(self.checkpoint, state, self.names)
            self.written = time.monotonic()


def _write_state(path: Path, state: State, names: list[str]) -> None:
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous()
        for kind, own in state.tensors.items() for name, tensor in zip(names, own, strict=True)
    }  # fmt: skip
    numbers = {key: value for key, value in vars(state).items() if key != "tensors"}
    data = save(tensors, metadata={"state": json.dumps(numbers)})
    write_whole(path, data, RESUME)


def _read_state(path: Path, parameters: Mapping[str, Tensor]) -> State:
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["state"])
        tensors = {
            kind: [file.get_tensor(f"{kind}.{name}").to(p.device) for name, p in parameters.items()]
            for kind in ("parameter", "mean", "square", "kept")
        }
    return State(**numbers, tensors=tensors)
