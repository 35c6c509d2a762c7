"""Shared factors on 60 experts that are alike: what a grid keeps of what factors of each expert gain, at 2 bits.

An expert of 96 x 128 is ``sqrt(1 - own^2) W_0 + own N_e``, both parts with singular values ``k^-0.6``; every expert has
400 tokens of its own, of inputs with four large channels. Printed are output errors relative to the outputs, and stored
bits a weight of the low-rank part: python like_experts.py, 6 minutes of one thread.
"""

import torch
from torch import Tensor

from lorq.core.problem import Problem
from lorq.core.stats import InputStats, StatsAccumulator
from lorq.core.weight import QuantizedWeight
from lorq.methods import LoPRo, Method, TileQ

EXPERTS, IN, OUT, RANK = 60, 128, 96, 8
BASE = {"bits": 2, "group_size": 32, "block": 32}
PAPER = {
    "order": "low-rank-then-codes", "metric": "activation", "epochs": 0, "shrinkage": 0.0, "factor_type": "e4m3",
    "iterations": 8,
}  # fmt: skip
WAYS = {
    "codes first, Hessian": {"order": "codes-then-low-rank"},
    "low rank first, Hessian": {"order": "low-rank-then-codes"},
    "low rank first, activation scales": PAPER,
}


def layer(own: float, seed: int) -> tuple[list[Tensor], list[InputStats]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix() -> Tensor:
        left, right = torch.linalg.qr(normal(OUT, OUT))[0], torch.linalg.qr(normal(IN, OUT))[0]
        return (left * torch.arange(1, OUT + 1).pow(-0.6)) @ right.T

    common = matrix()
    weights = [(1 - own**2) ** 0.5 * common + own * matrix() for _ in range(EXPERTS)]
    scale = normal(IN).mul(0.5).exp()
    scale[torch.randperm(IN, generator=generator)[:4]] *= 12
    mix, centres = torch.eye(IN) + 0.1 * normal(IN, IN), normal(EXPERTS, IN) * 0.5
    stats = []
    for centre in centres:
        sums = StatsAccumulator(IN, "equal")
        sums.add((normal(400, IN) @ mix + centre) * scale)
        stats.append(sums.finish())
    return weights, stats


def error(weights: list[Tensor], stats: list[InputStats], solved: list[QuantizedWeight]) -> float:
    total = 0.0
    for weight, own, quantized in zip(weights, stats, solved, strict=True):
        rest = weight - quantized.dense()
        total += float(((rest @ own.hessian) * rest).sum() / ((weight @ own.hessian) * weight).sum())
    return total / EXPERTS


def alone(method: Method, weights: list[Tensor], stats: list[InputStats]) -> list[QuantizedWeight]:
    pairs = enumerate(zip(weights, stats, strict=True))
    return [method.solve(Problem({"w": weight}, {"w": own}, seed))["w"] for seed, (weight, own) in pairs]


def shared(method: Method, weights: list[Tensor], stats: list[InputStats]) -> list[QuantizedWeight]:
    names = tuple(map(str, range(EXPERTS)))
    given = dict(zip(names, weights, strict=True)), dict(zip(names, stats, strict=True))
    solved = method.solve(Problem(*given, 0, projections=(names,), common_input=True))
    return [solved[name] for name in names]


torch.set_num_threads(1)
for own in (0.2, 0.5, 1.0):
    for seed in (1, 2, 3):
        given = layer(own, seed)
        none = error(*given, alone(LoPRo(rank=0, **BASE), *given))
        print(f"own part {own}, seed {seed}: without low rank {none:.4f}")
        for name, way in WAYS.items():
            best = error(*given, alone(LoPRo(rank=RANK, **BASE, **way), *given))
            told = [f"of each expert, rank {RANK}, {RANK * 8 * (IN + OUT) / (IN * OUT):.2f} bits: {best:.4f}"]
            for rows, columns, rank in ((8, 8, RANK), (6, 10, RANK), (6, 10, 4 * RANK)):
                sharing = {"sharing": "expert"} if way is PAPER else {}
                method = TileQ(rank=rank, grid_rows=rows, grid_columns=columns, **BASE, **way, **sharing)
                found = error(*given, shared(method, *given))
                bits = rank * 8 * (rows * IN + columns * OUT) / (EXPERTS * IN * OUT)
                kept = (none - found) / (none - best)
                told.append(f"{rows} x {columns}, rank {rank}, {bits:.2f} bits: {found:.4f} keeps {kept:.0%}")
            print(f"  {name}: {'; '.join(told)}", flush=True)
