"""A dense MLP cut into experts, with a router fitted to it: real weights for trying mixtures of experts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Cut:
    """One layer's experts, with the names, the shapes and the meaning they have in transformers' Mixtral.

    Attributes:
        gate_up: every expert's gate rows and then its up rows.
        down: every expert's down projection, times the number of active experts: a token's weights of its
            experts sum to 1, and stand near 1 over that number each.
        router: logits per token are ``inputs @ router.T``.
    """

    gate_up: Float[Tensor, "experts 2*width in"]
    down: Float[Tensor, "experts in width"]
    router: Float[Tensor, "experts in"]


def cut_mlp(
    gate: Float[Tensor, "neurons in"],
    up: Float[Tensor, "neurons in"],
    down: Float[Tensor, "in neurons"],
    groups: Int[Tensor, "experts width"],
    router: Float[Tensor, "experts in"],
    *,
    active: int,
) -> Cut:
    """The neurons of ``down(silu(gate x) * up x)`` as experts.

    With all experts active and a router of zeros it computes what the MLP did.

    Args:
        gate, up, down: weights of the MLP.
        groups: the neurons of every expert; a partition of all neurons.
        router: kept as it is.
        active: experts per token.

    Example:
        >>> gate, up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0, 6.0]])
        >>> cut = cut_mlp(gate, up, down, torch.tensor([[1], [0]]), torch.zeros(2, 1), active=2)
        >>> cut.gate_up.flatten(1).tolist(), cut.down.flatten().tolist()
        ([[2.0, 4.0], [1.0, 3.0]], [12.0, 10.0])
    """
    return Cut(torch.cat([gate[groups], up[groups]], 1), active * down.T[groups].mT.contiguous(), router)


def cut_sparsely(
    gate: Float[Tensor, "neurons in"],
    up: Float[Tensor, "neurons in"],
    down: Float[Tensor, "in neurons"],
    inputs: Float[Tensor, "tokens in"],
    *,
    experts: int,
    active: int,
    generator: torch.Generator,
) -> tuple[Cut, Float[Tensor, "tokens in"]]:
    """Experts of neurons that are busy together, a router that knows who is busy when, and ``down`` refitted.

    Args:
        gate, up, down: weights of the MLP.
        inputs: of the MLP, from calibration.
        experts: how many, at least 2.
        active: experts per token.
        generator: where the grouping starts.

    Returns:
        the experts, and their output for ``inputs``.
    """
    middle = F.silu(inputs @ gate.T) * (inputs @ up.T)  # (tokens, neurons)
    groups = group_neurons((middle.abs() * down.norm(dim=0)).T, experts=experts, generator=generator)
    parts = [middle[:, group] @ down[:, group].T for group in groups]
    router = fit_router(inputs, torch.stack([part.square().sum(1) for part in parts], 1))
    weights = torch.empty_like(middle)
    weights[:, groups.flatten()] = route(inputs, router, active=active).repeat_interleave(groups.shape[1], 1)
    seen = middle * weights * active
    down = refit_down(down, seen, middle @ down.T)
    return cut_mlp(gate, up, down, groups, router, active=active), seen @ down.T


def group_neurons(
    activity: Float[Tensor, "neurons tokens"], *, experts: int, generator: torch.Generator, rounds: int = 8
) -> Int[Tensor, "experts width"]:
    """Groups of equal size of the neurons whose activity is alike: balanced k-means.

    In each round a neuron goes to the nearest centre that has room left, and those choose first that lose most
    by not getting their nearest.

    Args:
        activity: how much of the output each neuron makes, token by token; its loudness counts too.
        experts: groups wanted, at least 2.
        generator: picks the neurons that are the first centres.
        rounds: at least 1.

    Returns:
        a partition of the neurons; each group in rising order.

    Raises:
        ValueError: if the neurons cannot be shared out evenly.

    Example:
        >>> activity = torch.tensor([[9.0, 0.0], [0.0, 9.0], [8.0, 0.0], [0.0, 8.0]])
        >>> sorted(group_neurons(activity, experts=2, generator=torch.Generator().manual_seed(0)).tolist())
        [[0, 2], [1, 3]]
    """
    width, rest = divmod(len(activity), experts)
    if rest:
        raise ValueError(f"neurons must be a multiple of the experts, got {len(activity)} neurons, {experts} experts")
    centres = activity[torch.randperm(len(activity), generator=generator)[:experts]]
    for _ in range(rounds):
        groups = _nearest_with_room(torch.cdist(activity, centres), width)
        centres = activity[groups].mean(1)
    return groups


def _nearest_with_room(distance: Float[Tensor, "neurons experts"], width: int) -> Int[Tensor, "experts width"]:
    near = distance.sort(dim=1, stable=True)
    choices = near.indices.tolist()
    groups: list[list[int]] = [[] for _ in range(distance.shape[1])]
    for neuron in (near.values[:, 0] - near.values[:, 1]).argsort(stable=True).tolist():
        next(groups[i] for i in choices[neuron] if len(groups[i]) < width).append(neuron)
    return torch.tensor([sorted(group) for group in groups])


def fit_router(
    inputs: Float[Tensor, "tokens in"],
    energy: Float[Tensor, "tokens experts"],
    *,
    damping: float = 0.3,
    spread: float = 0.05,
) -> Float[Tensor, "experts in"]:
    """The linear map from inputs to each expert's log energy by ridge regression, then made small.

    The order of the logits picks the experts; their size only makes the weights of the picked unequal, which
    the MLP that was cut knew nothing of. Hence the small spread: it measures better than 0.3 by far.

    Args:
        inputs: of the MLP.
        energy: squared norm of what each expert adds to the output; at least 0.
        damping: share of the mean diagonal of ``inputs.T @ inputs`` added to it; dimensionless.
        spread: standard deviation of the logits over these tokens.
    """
    target = energy.clamp(min=torch.finfo(energy.dtype).tiny).log()
    target = target - target.mean(1, keepdim=True)  # softmax and top-k see only differences
    router = _ridge(inputs, target, damping).T
    return router * (spread / (inputs @ router.T).std())


def route(
    inputs: Float[Tensor, "tokens in"], router: Float[Tensor, "experts in"], *, active: int
) -> Float[Tensor, "tokens experts"]:
    """A token's weights of the experts as Mixtral has them: softmax, the largest kept and rescaled to sum 1.

    Example:
        >>> route(torch.tensor([[1.0]]), torch.tensor([[0.0], [9.0], [9.0]]), active=2)
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    top = (inputs @ router.T).softmax(-1).topk(active)
    weights = top.values / top.values.sum(-1, keepdim=True)
    return weights.new_zeros(len(inputs), len(router)).scatter(1, top.indices, weights)


def refit_down(
    down: Float[Tensor, "out neurons"],
    middle: Float[Tensor, "tokens neurons"],
    target: Float[Tensor, "tokens out"],
    *,
    damping: float = 1.0,
) -> Float[Tensor, "out neurons"]:
    """The weight near ``down`` that makes up for what ``middle`` lacks.

    Minimises ``||middle D^T - target||^2 + damping * mean(diag(middle^T middle)) * ||D - down||^2`` over ``D``.

    Args:
        down: what it starts from.
        middle: its inputs, zero where a neuron's expert is not active.
        target: outputs wanted.
        damping: dimensionless. Less fits the calibration text and loses on any other.
    """
    return down + _ridge(middle, target - middle @ down.T, damping).T


def _ridge(x: Float[Tensor, "tokens in"], y: Float[Tensor, "tokens out"], damping: float) -> Float[Tensor, "in out"]:
    """The minimum of ``||x b - y||^2 + damping * mean(diag(x^T x)) * ||b||^2`` over ``b``."""
    gram = x.T @ x
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return torch.cholesky_solve(x.T @ y, torch.linalg.cholesky(gram))
