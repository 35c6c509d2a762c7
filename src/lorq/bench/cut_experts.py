"""Cut a dense gated MLP into experts: real mixture-of-experts weights for tests and benchmarks, without a network."""

import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from lorq.demo import demo_model
from lorq.models.locate import cached_folder, load_dense
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, token_windows
from lorq.storage.companions import find_companions


def cut_mlp(
    gate: Float[Tensor, "width hidden"],
    up: Float[Tensor, "width hidden"],
    down: Float[Tensor, "hidden width"],
    groups: Int[Tensor, "experts size"],
    top_k: int,
) -> tuple[Float[Tensor, "experts rows hidden"], Float[Tensor, "experts hidden size"]]:
    """Experts of a Mixtral-type layer, each with the neurons of one group, as transformers fuses them.

    ``down`` is multiplied by ``top_k``: router weights that are all ``1 / top_k`` then leave the function as it is,
    exactly so if every token is routed to every expert.
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
        inputs: of the MLP, on which its neurons are ``active`` (see `activity`).
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


_EXPERTS = 8
_TOP_K = 4  # of the sparse cut
# What both models' configs have in common.
_SHARED = (
    "vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
# Part of the cached folder's name: rises whenever the recipe changes.
_RECIPE = 1


def expert_model(*, sparse: bool = False) -> Path:
    """The demo's model as a Mixtral: its MLPs of 1536 neurons cut into 8 experts of 192. Made once and cached.

    The dense cut routes every token to all experts with equal weights and computes exactly the original function. In
    the sparse cut neurons that are active together make an expert, and a fitted router chooses 4 of 8; that is
    another, worse model, whose own outputs are the reference for whatever is done to it.

    Raises:
        FileNotFoundError: if the demo's model is not installed.
    """
    source = demo_model()

    def make(folder: Path) -> None:
        _cut(source, sparse).half().save_pretrained(folder)
        for name, file in find_companions(source)[0].items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(file, folder / name)

    return cached_folder(f"experts/{source.name}-{'sparse' if sparse else 'dense'}-{_RECIPE}", make)


@torch.no_grad()
def _cut(source: Path, sparse: bool) -> Any:
    """The Mixtral model, float32."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = load_dense(source, torch.float32)
    c = model.config
    top_k = _TOP_K if sparse else _EXPERTS
    config = MixtralConfig(
        **{key: getattr(c, key) for key in _SHARED}, intermediate_size=c.intermediate_size // _EXPERTS,
        sliding_window=None, num_local_experts=_EXPERTS, num_experts_per_tok=top_k,
    )  # fmt: skip
    inputs = _mlp_inputs(model, source) if sparse else None
    state = model.state_dict()
    for index in range(c.num_hidden_layers):
        path = f"model.layers.{index}.mlp."
        gate, up, down = (state.pop(f"{path}{name}_proj.weight") for name in ("gate", "up", "down"))
        groups, router = torch.arange(c.intermediate_size).view(_EXPERTS, -1), torch.zeros(_EXPERTS, c.hidden_size)
        if inputs is not None:
            active = activity(inputs[index], gate, up, down)
            groups = group_neurons(active, _EXPERTS)
            router = fit_router(inputs[index], active, groups)
        gate_up, down = cut_mlp(gate, up, down, groups, top_k)
        state |= {
            f"{path}experts.gate_up_proj": gate_up,
            f"{path}experts.down_proj": down,
            f"{path}gate.weight": router,
        }
    experts = MixtralForCausalLM(config)
    experts.load_state_dict(state)
    experts.generation_config = model.generation_config
    return experts


def _mlp_inputs(model: Any, source: Path) -> list[Tensor]:
    """What each MLP is given on 4 windows of python-docs; the model is of no use afterwards but for its weights."""
    encoder = Encoder.open(source, model.config)
    windows = token_windows(load_text("python-docs"), encoder, windows=4, length=512, what="experts")
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    for layer, own in zip(model.model.layers, seen, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, args, own=own: own.append(args[0][0]))
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
    return [torch.cat(own) for own in seen]
