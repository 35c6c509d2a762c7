"""Shared factors in a whole model of 60 experts that are alike: how far its output moves, at 2 bits.

The MLP of one block of a dense model becomes a mixture. The quarter of its neurons that give most is what 60 experts
have in common: expert e has ``sqrt(1 - own^2) W + own N_e``, ``N_e`` with singular vectors at random and the singular
values of ``W``. The other neurons serve all tokens. A router that sees noise sends every token to four experts, and
about as many tokens to each. This mixture is the reference; only its experts are quantized, from 16 windows of 512
tokens, and the divergence is that of 8 windows of another text, over the rest of the model.

    python like_experts_model.py MODEL CALIBRATION.txt TEXT.txt OWN SEED
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from lorq.bench.cut_experts import activity
from lorq.core.problem import Problem
from lorq.core.stats import StatsAccumulator
from lorq.core.weight import QuantizedWeight
from lorq.methods import LoPRo, Method, TileQ, TileQPaper
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, token_windows

BLOCK, EXPERTS, TOP = 15, 60, 4
BASE: dict[str, Any] = {"bits": 2, "group_size": 64}
GRID: dict[str, Any] = {"grid_rows": 6, "grid_columns": 10, **BASE}
METHODS = {
    "no low rank": LoPRo(rank=0, **BASE),
    "each expert, rank 8": LoPRo(rank=8, order="low-rank-then-codes", **BASE),
    "6 x 10, rank 8": TileQ(rank=8, **GRID),
    "6 x 10, rank 32": TileQ(rank=32, **GRID),
    "tileq-paper, 6 x 10, rank 32": TileQPaper(rank=32, **GRID),
    "no low rank, groups of 32": LoPRo(rank=0, bits=2, group_size=32),
}
Inputs = list[Tensor]  # of each expert


class Mixture(nn.Module):
    """Experts (experts, out, in) beside neurons that serve all tokens."""

    def __init__(self, mlp: nn.Module, inputs: Tensor, own: float, generator: torch.Generator):
        super().__init__()
        gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        order = activity(inputs, gate, up, down).square().mean(0).argsort(descending=True)
        first, rest = order.tensor_split([len(order) // 4])
        self.rest = gate[rest], up[rest], down[:, rest]
        self.experts = [alike(part, own, generator) for part in (gate[first], up[first], down[:, first])]
        self.router = router(inputs, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(0, -2))[0].view(x.shape)

    def run(self, x: Tensor) -> tuple[Tensor, Inputs, Inputs]:
        """The output, and what the experts and their down projections are given."""
        gate, up, down = self.rest
        out, given, middles = (silu(x @ gate.T) * (x @ up.T)) @ down.T, [], []
        logits, chosen = (x @ self.router.T).topk(TOP, dim=1)
        shares = logits.softmax(1)
        for expert, (gate, up, down) in enumerate(zip(*self.experts, strict=True)):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            given.append(x[tokens])
            middles.append(silu(given[-1] @ gate.T) * (given[-1] @ up.T))
            out.index_add_(0, tokens, middles[-1] @ down.T * shares[tokens, place, None])
        return out, given, middles


def alike(weight: Tensor, own: float, generator: torch.Generator) -> Tensor:
    values = torch.linalg.svdvals(weight)

    def basis(side: int) -> Tensor:
        return torch.linalg.qr(torch.randn(side, len(values), generator=generator))[0]

    parts = (basis(weight.shape[0]) * values @ basis(weight.shape[1]).T for _ in range(EXPERTS))
    return torch.stack([(1 - own**2) ** 0.5 * weight + own * part for part in parts])


def router(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Directions at random in which inputs vary alike, and which their mean has no part in; logits of deviation 0.3."""
    mean = inputs.mean(0)
    values, vectors = torch.linalg.eigh((inputs - mean).T @ (inputs - mean) / len(inputs))
    inverse = values.clamp(min=1e-3 * float(values.mean())).rsqrt()
    rows = torch.randn(EXPERTS, len(mean), generator=generator) * inverse @ vectors.T
    across = vectors * inverse.square() @ vectors.T @ mean
    rows -= torch.outer(rows @ mean, across) / (mean @ across)
    return rows * (0.3 / (inputs @ rows.T).std())


def solve(method: Method, experts: list[Tensor], stats: list[list[Any]], seed: int) -> list[list[QuantizedWeight]]:
    """Gate, up and down of all experts."""
    names = [tuple(f"{kind}{expert}" for expert in range(EXPERTS)) for kind in ("gate", "up", "down")]
    weights = {name: w for own, stack in zip(names, experts, strict=True) for name, w in zip(own, stack, strict=True)}
    known = {name: s for own, part in zip(names, stats, strict=True) for name, s in zip(own, part, strict=True)}
    solved = {}
    if method.scope == "experts":
        for projections in ((names[0], names[1]), (names[2],)):
            own = {name: weights[name] for part in projections for name in part}
            common = len(projections) == 2
            problem = Problem(own, {n: known[n] for n in own}, seed, projections=projections, common_input=common)
            solved |= method.solve(problem)
    else:
        for name, weight in weights.items():
            solved |= method.solve(Problem({name: weight}, {name: known[name]}, seed))
    return [[solved[name] for name in own] for own in names]


def stored_bytes(solved: list[list[QuantizedWeight]]) -> int:
    """Of codes and factors; shared factors count once."""
    own = [tensor for part in solved for weight in part for tensor in weight.tensors().values()]
    own += [tensor for part in solved if part[0].tile for tensor in part[0].tile.factors.tensors().values()]
    return sum(tensor.nbytes for tensor in own)


@torch.no_grad()
def main(source: str, calibration: str, text: str, own: float, seed: int) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    encoder, body = Encoder.open(Path(source), model.config, "auto"), model.model
    cut = {"length": 512, "what": "experts"}
    learnt, tokens = (token_windows(load_text(t), encoder, windows=n, **cut) for t, n in ((calibration, 16), (text, 8)))
    layers, norm, last = body.layers, body.norm, body.layers[BLOCK]
    body.layers, body.norm = layers[:BLOCK], nn.Identity()
    hidden = [[body(window[None]).last_hidden_state for window in windows] for windows in (learnt, tokens)]
    seen: list[Tensor] = []
    hook = last.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    body.layers = layers[BLOCK : BLOCK + 1]
    for states in hidden[0]:
        body(inputs_embeds=states)
    hook.remove()
    body.layers, body.norm = layers[BLOCK:], norm

    def outputs() -> list[Tensor]:
        return [body(inputs_embeds=states).last_hidden_state[0] for states in hidden[1]]

    def divergence(found: list[Tensor], expected: list[Tensor]) -> Tensor:
        pairs = ((model.lm_head(part).log_softmax(-1) for part in pair) for pair in zip(found, expected, strict=True))
        return torch.stack([(e.exp() * (e - f)).sum(-1).mean() for f, e in pairs])

    dense, inputs = outputs(), torch.cat(seen)
    last.mlp = mixture = Mixture(last.mlp, inputs, own, torch.Generator().manual_seed(seed))
    expected, (_, given, middles) = outputs(), mixture.run(inputs)
    loads = sorted(map(len, given))
    apart = divergence(dense, expected).mean()
    print(f"own {own}, seed {seed}: KL of the dense model {apart:.4f}, {loads[0]} to {loads[-1]} tokens an expert")
    stats = []
    for parts in (given, middles):
        stats.append([])
        for part in parts:
            sums = StatsAccumulator(part.shape[1], "equal")
            sums.add(part)
            stats[-1].append(sums.finish())
    experts, least = mixture.experts, 0
    for name, method in METHODS.items():
        started = time.process_time()
        solved = solve(method, experts, [stats[0], *stats], seed)
        taken, size = time.process_time() - started, stored_bytes(solved)
        mixture.experts = [torch.stack([weight.dense() for weight in part]) for part in solved]
        moved, least = divergence(outputs(), expected), least or size
        bits = 8 * (size - least) / sum(part.numel() for part in experts)
        error = sum(weight.record.error_after for part in solved for weight in part) / (3 * EXPERTS)
        print(f"{name}: {bits:.3f} bits more, error {error:.4f}, KL {moved.mean():.5f} +- "
              f"{moved.std() / len(moved) ** 0.5:.5f}, {taken:.0f} s", flush=True)  # fmt: skip


main(*sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5]))
