"""Where a further bit of a layer is worth most, by width: a smaller group, low rank, a rotation, or trellis codes.

Layers are square, of weights with singular values ``k^-s`` and random singular vectors. Inputs are made to the shape of
SmolLM2's and Gemma 3's (blocks 2, middle and last but one of each): a covariance with eigenvalues ``1 / k`` in random
directions, channels of log-normal size, one in a hundred 4 to 24 times as large. Seeds are of the layer.

    OMP_NUM_THREADS=1 python docs/measured/equal_bits.py docs/measured/equal_bits.csv --width 576 --seeds 3

adds the lines that the file lacks, and prints what all its lines say at equal bits.
"""

import argparse
import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import lorq.kernels  # noqa: F401  (has the fast search of trellis codes)
from lorq.core.problem import Problem
from lorq.core.stats import InputStats
from lorq.methods import FLRQ, GPTQ, LoPRo, Method

FIELDS = ("width", "decay", "large", "seed", "bits", "way", "setting", "total_bits", "error")
GROUPS = (64, 32, 16)
WAYS = ("low rank", "flrq", "rotated groups", "rotated low rank", "trellis")
Line = dict[str, str]
Curve = list[tuple[float, float]]  # total bits and error, by rising bits


def layer(width: int, decay: float, large: int, seed: int) -> tuple[Tensor, InputStats]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def turn() -> Tensor:
        return torch.linalg.qr(normal(width, width))[0]

    ranks = torch.arange(1, width + 1)
    weight = (turn() * ranks.pow(-decay)) @ turn() if decay else normal(width, width)
    size = normal(width).mul(0.35).exp()
    chosen = torch.randperm(width, generator=generator)[:large]
    size[chosen] *= (math.log(4) + math.log(6) * torch.rand(large, generator=generator)).exp()
    directions = turn()
    hessian = (directions / ranks) @ directions.T * torch.outer(size, size)
    hessian /= hessian.diagonal().mean()
    return weight, InputStats(hessian, hessian.diagonal().sqrt(), 4096)


def ways(width: int, bits: int) -> Iterator[tuple[str, str, Method]]:
    """Every way by name and setting; ranks add as many bits to the largest group as the smaller groups do."""
    largest = 128 if width % 128 == 0 else 192
    base = {"bits": bits, "group_size": largest}
    more = {group: (16 + bits) * (1 / group - 1 / largest) for group in GROUPS}
    ranks = {group: round(more[group] * width / 16) for group in GROUPS}
    for group in (largest, *GROUPS):
        yield "groups", f"group {group}", GPTQ(bits=bits, group_size=group)
        if group in ranks:
            yield "low rank", f"rank {ranks[group]}", LoPRo(rank=ranks[group], rotation="none", **base)
    yield "trellis", "rank 0", LoPRo(bits=bits, codebook="trellis", rank=0)
    for group in (largest, *GROUPS):
        yield "rotated groups", f"group {group}", LoPRo(bits=bits, group_size=group, rank=0)
        if group in ranks:
            yield "rotated low rank", f"rank {ranks[group]}", LoPRo(rank=ranks[group], **base)
    for group in GROUPS:
        yield "flrq", f"budget {more[group] / bits:.3f}", FLRQ(budget=more[group] / bits, **base)


def measure(
    known: set[tuple[str, ...]], width: int, decay: float, large: int, seed: int, widths: list[int]
) -> Iterator[Line]:
    """The lines that are not known; of one bit more, the trellis codes that layers of fewer bits are mixed with."""
    weight, stats = layer(width, decay, large, seed)
    for bits in (*widths, max(widths) + 1):
        for way, setting, method in ways(width, bits):
            key = tuple(map(str, (width, decay, large, seed, bits, way, setting)))
            if key in known or (bits not in widths and way != "trellis"):
                continue
            solved = method.solve(Problem({"w": weight}, {"w": stats}, seed))["w"]
            total = solved.format.stored_bits(width, width) / width**2
            measured = (*key, f"{total:.4f}", f"{solved.record.error_after:.5g}")
            yield dict(zip(FIELDS, measured, strict=True))


def at(curve: Curve, bits: float, *, mixed: bool) -> float | None:
    """The error at some bits: between two points of a curve by its logarithm, or by a mix of layers of both."""
    for (low, first), (high, second) in pairwise(curve):
        if low - 0.02 <= bits <= high + 0.02:
            share = (bits - low) / (high - low)
            return first + share * (second - first) if mixed else first * (second / first) ** share
    return None


def table(lines: list[Line]) -> str:
    """Errors over those of groups at the same bits; means over the seeds, and half of the span between them."""
    layers: dict[tuple[str, ...], dict[str, dict[str, Curve]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for line in lines:
        point = float(line["total_bits"]), float(line["error"])
        # Trellis codes of one bit more belong to the curve of those below, too.
        more = (-1, 0) if line["way"] == "trellis" else (0,)
        for bits in more:
            case = line["width"], line["decay"], line["large"], str(int(line["bits"]) + bits)
            layers[case][line["seed"]][line["way"]].append(point)
    told = [f"| width | decay | large | bits | error of groups | {' | '.join(WAYS)} |", "|---" * (5 + len(WAYS)) + "|"]
    for (*case, _), seeds in sorted(layers.items(), key=lambda item: [float(part) for part in item[0]]):
        for place in range(1, 1 + len(GROUPS)):
            rows = [over_groups(curves, place) for curves in seeds.values()]
            rows = [row for row in rows if row]
            if rows:
                cells = [spread([row[way] for row in rows if way in row]) for way in WAYS]
                bits, error = (statistics.mean(row[name] for row in rows) for name in ("bits", "error"))
                told.append(f"| {' | '.join(case)} | {bits:.2f} | {error:.4f} | {' | '.join(cells)} |")
    return "\n".join(told)


def over_groups(curves: dict[str, Curve], place: int) -> dict[str, float]:
    """Of one layer: the error of each way at the bits of a group size, over that size's; nothing where it has none."""
    groups = sorted(curves["groups"])
    if len(groups) <= place:
        return {}
    bits, error = groups[place]
    found = {"bits": bits, "error": error}
    beside = {"low rank": groups[:1], "flrq": groups[:1], "rotated low rank": sorted(curves["rotated groups"])[:1]}
    for way in WAYS:
        other = at(sorted(beside.get(way, []) + curves[way]), bits, mixed=way == "trellis")
        if other is not None:
            found[way] = other / error
    return found if len(found) > 2 else {}


def spread(ratios: list[float]) -> str:
    half = f" ± {(max(ratios) - min(ratios)) / 2:.2f}" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.2f}{half}" if ratios else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("csv", type=Path)
    parser.add_argument("--width", type=int, action="append", default=[])
    parser.add_argument("--decay", type=float, action="append")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument(
        "--large", type=int, help="channels that are 4 to 24 times as large; one in a hundred if left out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.csv.exists():
        given.csv.write_text(",".join(FIELDS) + "\n")
    with given.csv.open() as file:
        known = {tuple(line[field] for field in FIELDS[:7]) for line in csv.DictReader(file)}
    with given.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        for width in given.width:
            large = width // 100 if given.large is None else given.large
            for seed in range(given.seeds):
                for decay in given.decay or (0.0, 0.5, 1.0):
                    for line in measure(known, width, decay, large, seed, given.bits or [2, 3]):
                        writer.writerow(line)
                        file.flush()
    with given.csv.open() as file:
        print(table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
