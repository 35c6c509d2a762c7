"""The block sketch, and other factorisations that it is timed against."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.sketch import sketch


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


WAYS = {"block": _block, "rank1": _rank1, "svd_lowrank": _svd_lowrank, "svd": _svd}
