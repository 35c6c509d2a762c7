"""Cut a dense gated MLP into experts: real mixture-of-experts weights for tests and benchmarks, without a network."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu


def cut_mlp(
    gate: Float[Tensor, "width hidden"],
    up: Float[Tensor, "width hidden"],
    down: Float[Tensor, "hidden width"],
    groups: Int[Tensor, "experts size"],
    top_k: int,
) -> tuple[Float[Tensor, "experts rows hidden"], Float[Tensor, "experts hidden size"]]:
    """Experts of a Mixtral-type layer, each with the neurons of one group.

    ``down`` is multiplied by ``top_k``: router weights that are all ``1 / top_k`` then leave the function as it is,
    exactly so if every token is routed to every expert.

    Returns:
        ``(gate_up, down)`` as transformers fuses them: (experts, 2 size, hidden) and (experts, hidden, size).
    """
    experts, size = groups.shape
    gate_up = torch.cat([gate[groups], up[groups]], 1)
    return gate_up, down[:, groups.flatten()].view(-1, experts, size).transpose(0, 1).contiguous() * top_k


def activity(
    inputs: Float[Tensor, "tokens hidden"],
    gate: Float[Tensor, "width hidden"],
    up: Float[Tensor, "width hidden"],
    down: Float[Tensor, "hidden width"],
) -> Float[Tensor, "tokens width"]:
    """How much each neuron gives to the output, ``|silu(gate x) * (up x)| |down column|``."""
    return (silu(inputs @ gate.T) * (inputs @ up.T)).abs() * down.norm(dim=0)


def group_neurons(active: Float[Tensor, "tokens width"], experts: int) -> Int[Tensor, "experts size"]:
    """Neurons that are active for the same tokens, in groups of equal size.

    Balanced k-means on each neuron's activity: starts from neurons evenly spread by how active they are, and gives
    those first choice that would lose most by their second. Deterministic.
    """
    width = active.shape[1]
    size = width // experts
    points = active.T  # (width, tokens)
    centres = points[points.sum(1).argsort(stable=True)[size // 2 :: size][:experts]]
    label = torch.zeros(width, dtype=torch.int64)
    for _ in range(8):
        distance = torch.cdist(points, centres)
        choices = distance.argsort(dim=1, stable=True)
        best = distance.gather(1, choices[:, :2])
        room, ranked = [size] * experts, choices.tolist()
        for neuron in (best[:, 0] - best[:, 1]).argsort(stable=True).tolist():
            chosen = next(e for e in ranked[neuron] if room[e])
            room[chosen] -= 1
            label[neuron] = chosen
        centres = torch.stack([points[label == e].mean(0) for e in range(experts)])
    return torch.stack([(label == e).nonzero()[:, 0] for e in range(experts)])


def fit_router(
    inputs: Float[Tensor, "tokens hidden"],
    active: Float[Tensor, "tokens width"],
    groups: Int[Tensor, "experts size"],
    *,
    spread: float = 0.3,
    damping: float = 0.1,
) -> Float[Tensor, "experts hidden"]:
    """A linear router to the experts that give most, by ridge regression on their log energies.

    Args:
        inputs: of the MLP.
        active: see `activity`.
        groups: the experts' neurons.
        spread: standard deviation of the logits; small, so that the chosen experts' weights stay near ``1 / top_k``.
        damping: share of the mean squared input added to the diagonal.
    """
    energy = torch.stack([active[:, group].square().sum(1) for group in groups], 1).clamp(min=1e-30).log()
    target = energy - energy.mean(1, keepdim=True)
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(damping * gram.diagonal().mean())
    router = torch.linalg.solve(gram, inputs.T @ target / len(inputs)).T
    return router * (spread / (inputs @ router.T).std())
