"""What logits say of a model: perplexity, divergence from the original, top-1 agreement."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorq.core.weight import layer_bytes
from lorq.kernels import cpu
from lorq.models.quantized import QuantizedFiles, is_foreign, read_quantization
from lorq.models.self_text import eval_mode
from lorq.models.skeleton import read_own_config
from lorq.runtime.experts import QuantExperts
from lorq.runtime.packed import PackedWeight

# Logits per float32 temporary, 16 MB. A 49k vocabulary is compared 85 tokens at a time, with six such
# temporaries alive: about 100 MB, however long the window is.
CHUNK_LOGITS = 2**22


def divergence(
    reference_logits: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, "tokens"]:
    """``KL(reference || model)`` of every token's prediction, in nats.

        KL = sum_v p_v (log p_v - log q_v),    p = softmax(reference_logits),  q = softmax(logits)

    The logits are finite; the result is float32, at least 0, whatever their dtype.

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])
    """
    parts = []
    for p, q in zip(_chunks(reference_logits), _chunks(logits), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    # Rounding can push a divergence of almost 0 below it.
    return torch.cat(parts).clamp(min=0)


def top1_agreement(
    reference_logits: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Bool[Tensor, "tokens"]:
    """Whether both models rank the same token first, for every prediction.

    Example:
        >>> top1_agreement(torch.eye(2), torch.tensor([[5.0, 4.0], [5.0, 4.0]]))
        tensor([ True, False])
    """
    return reference_logits.argmax(-1) == logits.argmax(-1)


def token_nll(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """``-log softmax(logits)[target]`` of every token, in nats, float32; finite logits, ``0 <= target < vocab``.

    Example:
        >>> token_nll(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([4.])
    """
    picked = logits.gather(-1, targets[:, None]).squeeze(-1).float()
    return torch.cat([chunk.logsumexp(-1) for chunk in _chunks(logits)]) - picked


def _chunks(logits: Tensor) -> Iterator[Tensor]:
    """Rows of ``logits`` in float32, ``CHUNK_LOGITS`` values at a time."""
    for chunk in logits.split(max(1, CHUNK_LOGITS // logits.shape[-1])):
        yield chunk.float()


@dataclass(frozen=True)
class Quality:
    """What logits give of `lorq.evaluation.Evaluation`."""

    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1: float | None
    perplexity_stderr: float | None = None
    kl_stderr: float | None = None
    ratio_stderr: float | None = None


def mean_stderr(windows: Sequence[Float[Tensor, "tokens"]]) -> float | None:
    """Standard error of a mean over all tokens of ``windows``, which have equally many; None of one window alone.

        sqrt( sum_w (m_w - m)^2 / (n (n - 1)) ),    m_w = mean over window w's tokens,  m = mean of the n m_w

    Tokens of a window depend on each other, so a window counts once (a cluster); that of single tokens would come out
    too small. Neighbouring windows of one document are taken as independent, which is a little too small again.

    Example:
        >>> mean_stderr([torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])])
        1.0
    """
    if len(windows) < 2:
        return None
    means = torch.stack([window.double().mean() for window in windows])
    return float(means.std()) / math.sqrt(len(windows))


def bits_per_weight(model: nn.Module, folder: Path) -> float:
    """Stored bits of the model's quantized layers over the number of their weights.

    For a model that others have quantized what they have stored; for one without quantized layers the width of its
    folder's type.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedWeight)]
    if layers:
        # Rounded up to bytes for each layer, with its shape, as in the report.
        shares = {
            layer: module.tiles[name].format.share(layer.out_features, layer.in_features)  # type: ignore[operator,union-attr]
            for module in model.modules() if isinstance(module, QuantExperts)
            for expert in module.plain for name, layer in expert.named_children() if name in module.tiles
        }  # fmt: skip
        stored = sum(
            layer_bytes(layer.format.stored_bits(layer.out_features, layer.in_features) + shares.get(layer, 0))
            for layer in layers
        )
        return 8 * stored / sum(layer.out_features * layer.in_features for layer in layers)
    if is_foreign(folder):
        files = QuantizedFiles.of(folder, read_quantization(folder))
        weights = sum(packed.shape[0] * packed.shape[1] for packed in files.layers.values())
        return 8 * sum(map(files.stored_bytes, files.layers)) / weights
    dtype = read_own_config(folder).dtype
    return 8.0 * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)


def evaluate_model(
    model: nn.Module,
    windows: Int[Tensor, "windows length"],
    *,
    reference: nn.Module | Callable[[Tensor], Tensor] | None = None,
    seen: int = 1,
    products: str = "exact",
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Perplexity of ``model`` on ``windows`` and, given a reference, its divergence from that.

    One window at a time, each on its own: the stride equals the window, the first ``seen`` tokens of a window are only
    seen and the other ``length - seen`` are predicted. Logits are compared in float32.

    Args:
        model: a causal language model as in transformers; its mode and weights stay as they are.
        windows: non-overlapping windows of the text, at least 2 tokens each.
        reference: the original model; or a function from a window (length,) to its logits (length, vocab),
            for instance read from a file where two models do not fit in memory.
        seen: at least 1, as nothing predicts the first token; the start tokens of models that have several.
        products: how the model multiplies, see `lorq.kernels.cpu.products`; the reference multiplies exactly.
        progress: called with (windows done, windows) after every window.

    Raises:
        ValueError: if there is nothing to predict, or the vocabularies or shapes differ.
        FloatingPointError: if a logit is not finite.
    """
    count, length = windows.shape
    if count < 1 or not 1 <= seen < length:
        raise ValueError(
            f"evaluation needs at least 1 window of at least {seen + 1} tokens, got {count} windows of {length}"
        )
    nll, original_nll, kl, same = [], [], [], []
    models = [part for part in (model, reference) if isinstance(part, nn.Module)]
    with eval_mode(*models), torch.inference_mode():
        for index, window in enumerate(windows):
            with cpu.products(products):
                logits = _predict(model, window, f"model, window {index}")[seen - 1 :]
            targets = window[seen:].to(logits.device)
            nll.append(token_nll(logits, targets).cpu())
            if reference is not None:
                original = _predict(reference, window, f"reference, window {index}")[seen - 1 :].to(logits.device)
                if original.shape != logits.shape:
                    raise ValueError(
                        "model and reference must share a vocabulary, got "
                        f"{logits.shape[-1]} and {original.shape[-1]} tokens; is this the original model?"
                    )
                original_nll.append(token_nll(original, targets).cpu())
                kl.append(divergence(original, logits).cpu())
                same.append(top1_agreement(original, logits).cpu())
            if progress is not None:
                progress(index + 1, count)
    # float64: the mean of a hundred thousand tokens keeps its digits.
    perplexity, error = torch.cat(nll).double().mean().exp().item(), mean_stderr(nll)
    found = Quality(perplexity, None, None, None, None, None if error is None else perplexity * error)
    if reference is None:
        return found
    divergences, original_perplexity = torch.cat(kl).double(), torch.cat(original_nll).double().mean().exp().item()
    error = mean_stderr([own - other for own, other in zip(nll, original_nll, strict=True)])
    return replace(
        found, reference_perplexity=original_perplexity, kl_mean=divergences.mean().item(),
        kl_p99=divergences.quantile(0.99).item(), top1=torch.cat(same).double().mean().item(),
        kl_stderr=mean_stderr(kl), ratio_stderr=None if error is None else perplexity / original_perplexity * error,
    )  # fmt: skip


def _predict(source: nn.Module | Callable[[Tensor], Tensor], window: Tensor, what: str) -> Tensor:
    """Logits (length - 1, vocab) that predict ``window[1:]``; ``what`` names them in messages."""
    if isinstance(source, nn.Module):
        device = next(source.parameters()).device
        logits = source(input_ids=window[None].to(device), use_cache=False).logits[0]
    else:
        logits = source(window)
    if logits.ndim != 2 or logits.shape[0] != window.shape[0]:
        raise ValueError(
            f"{what}: logits must have the shape (length, vocab) with length {window.shape[0]}, "
            f"got {tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise FloatingPointError(
            f"{what}: logits must be finite, got {bad} NaN or infinite values of {logits.numel()}; the model "
            f"overflows in {logits.dtype} or its weights are broken"
        )
    return logits[:-1]
