"""Benchmark: the block sketch beside other factorisations."""

import math
import statistics
import time

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.bench.timing import Result
from lorq.core.sketch import sketch


def bench_sketch(size: int = 4096, rank: int = 64, repeats: int = 3, seed: int = 0, svd: bool = True) -> Result:
    """Time four ways to factor a square float32 matrix whose singular values are ``k^-0.5``.

    The ways take turns, ``repeats`` rounds after an untimed one at a small size, so that a busy machine
    slows all of them; seconds are medians. Residuals are divided by the optimal one, which the known
    spectrum gives: ``sqrt(sum_{k > rank} 1 / k)``.

    Args:
        size: rows and columns.
        rank: factor pairs, ``1 <= rank < size``.
        repeats: timed rounds, at least 1.
        seed: of the matrix and of every sketch.
        svd: whether to time the full SVD, which takes most of the time; if not, its entries are None.

    Returns:
        ``speedup_vs_svd``, ``speedup_vs_rank1``, ``speedup_vs_svd_lowrank``: seconds of the other way
        over seconds of the block form. ``residual_ratio``: of the block form. ``<way>_seconds`` and
        ``<way>_residual_ratio`` for ``block``, ``rank1``, ``svd_lowrank`` and ``svd``. ``size``,
        ``rank``, ``seed``, ``repeats``, ``torch_threads``.

    Raises:
        ValueError: if ``rank`` or ``repeats`` is out of range.

    Source:
        ``svd_lowrank`` runs with ``q = rank + 8, niter = 2``: six products of the matrix with ``rank + 8``
        vectors. The block form as it is by default makes five with ``rank + 16``.
    """
    if not 1 <= rank < size:
        raise ValueError(f"rank must be between 1 and size - 1 = {size - 1}, got {rank}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    ways = {"block": _block, "rank1": _rank1, "svd_lowrank": _svd_lowrank} | ({"svd": _svd} if svd else {})
    small = known_spectrum(min(size, 64), seed=seed)
    for factor in ways.values():
        factor(small, min(rank, small.shape[0] - 1), seed)
    a = known_spectrum(size, seed=seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    residual: dict[str, float] = {}
    optimal = math.sqrt(sum(1 / k for k in range(rank + 1, size + 1)))
    for _ in range(repeats):
        for name, factor in ways.items():
            start = time.perf_counter()
            left, right = factor(a, rank, seed)
            seconds[name].append(time.perf_counter() - start)
            residual[name] = float(torch.linalg.vector_norm((a - left @ right).double())) / optimal
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    result: Result = {"residual_ratio": residual["block"]}
    for name in ("svd", "rank1", "svd_lowrank"):
        result[f"speedup_vs_{name}"] = median[name] / median["block"] if name in ways else None
    for name in ("block", "rank1", "svd_lowrank", "svd"):
        result |= {f"{name}_seconds": median.get(name), f"{name}_residual_ratio": residual.get(name)}
    settings = {"size": size, "rank": rank, "seed": seed, "repeats": repeats}
    return result | settings | {"torch_threads": torch.get_num_threads()}


def known_spectrum(size: int, *, seed: int) -> Float[Tensor, "size size"]:
    """``S C diag(k^-0.5) C^T S'``, with C the orthonormal cosine transform and S, S' random signs.

    Orthogonal factors by formula: the spectrum is known to rounding, and no QR of a large matrix is
    needed. A Gaussian test vector meets every orthogonal factor alike, so they need not be Haar.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(size, dtype=torch.float64)
    cosine = torch.cos(torch.outer(k + 0.5, k) * (math.pi / size)) * math.sqrt(2 / size)
    cosine[:, 0] *= math.sqrt(0.5)
    signs = torch.randint(0, 2, (2, size, 1), generator=generator) * 2 - 1
    u, v = (signs * cosine).float()  # two of (size, size)
    return (u * (k + 1).pow(-0.5).float()) @ v.T


def _block(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return sketch(a, rank=rank, form="block", generator=torch.Generator().manual_seed(seed))


def _rank1(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return sketch(a, rank=rank, form="rank1", generator=torch.Generator().manual_seed(seed))


def _svd_lowrank(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    # torch.svd_lowrank takes no generator; the fork leaves the caller's random state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(a, q=min(rank + 8, *a.shape), niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def _svd(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]
