"""Hadamard matrices: Sylvester's, whose sizes are powers of two, Paley's of other sizes, and one over a whole width."""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

# Largest matrix of a whole width's that is written out where it could be two smaller ones.
_AT_ONCE = 256


@functools.cache
@torch.inference_mode(False)  # kept: made while measuring, it must serve training too
def hadamard(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Sylvester's Hadamard matrix over ``sqrt(size)``: symmetric, orthogonal, its own inverse.

    Made once and kept, since every forward needs it: not to be changed.

    Raises:
        ValueError: if the size is not a power of two.

    Example:
        >>> hadamard(2, dtype=torch.float64) * 2**0.5
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"the size of a Walsh-Hadamard block must be a power of two, got {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(dtype)


@functools.cache
@torch.inference_mode(False)
def paley(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Paley's Hadamard matrix over ``sqrt(size)``: entries of one magnitude, orthogonal; its inverse is its transpose.

    With ``chi(n)`` 1 where ``n`` is a square modulo the prime ``q`` and -1 where not, and ``Q[i, j] = chi(j - i)``:
    size ``q + 1`` (``q = 3 mod 4``) is ``I + [[0, 1], [-1, Q]]``, size ``2 (q + 1)`` (``q = 1 mod 4``) is
    ``C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]`` with ``C = [[0, 1], [1, Q]]``. Made once and kept.

    Raises:
        ValueError: if neither rule gives the size.
    """
    kind = _paley_kind(size)
    if kind is None:
        raise ValueError(f"a Paley matrix has size q + 1 or 2 (q + 1) for a prime q (3 or 1 modulo 4), got {size}")
    count = size // kind
    q = count - 1
    index = torch.arange(q)
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[index.square() % q] = 1.0
    chi[0] = 0.0
    conference = torch.ones(count, count, dtype=torch.float64)
    conference[0, 0] = 0.0
    conference[1:, 0] = -1.0 if kind == 1 else 1.0
    conference[1:, 1:] = chi[(index - index.unsqueeze(1)) % q]
    one = torch.eye(count, dtype=torch.float64)
    matrix = conference + one
    if kind == 2:
        spread, turned = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        matrix = torch.kron(conference, spread.double()) + torch.kron(one, turned.double())
    return (matrix / math.sqrt(size)).to(device, dtype)


def _paley_kind(size: int) -> int | None:
    """1 where the size is ``q + 1``, 2 where it is ``2 (q + 1)``, None where it is neither."""
    if _is_prime(size - 1) and size % 4 == 0:
        return 1
    return 2 if size % 4 == 0 and _is_prime(size // 2 - 1) and size // 2 % 4 == 2 else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


@functools.cache
def whole_sizes(width: int) -> tuple[int, ...]:
    """Sizes of Hadamard matrices whose Kronecker product is one of a whole width: Paley's first, if one is needed.

    The Paley matrix is the smallest that leaves a power of two; of large powers two halves are named.

    Raises:
        ValueError: for a width that no such product has.

    Example:
        >>> whole_sizes(576), whole_sizes(1536), whole_sizes(4096)
        ((36, 16), (12, 128), (64, 64))
    """
    odd = width // (width & -width) if width > 0 else 0
    sizes = (odd << k for k in range(max(width, 1).bit_length()) if odd and odd << k <= width)
    first = next((size for size in sizes if size == 1 or _paley_kind(size) is not None), None)
    if first is None:
        raise ValueError(
            "a Hadamard matrix over a whole width needs a power of two, or one times q + 1 or 2 (q + 1) for a prime q "
            f"(3 or 1 modulo 4), got width {width}; rotate in blocks instead"
        )
    rest = width // first
    half = 1 << (rest.bit_length() // 2)
    powers = (rest,) if rest <= _AT_ONCE else (half, rest // half)
    return tuple(size for size in (first, *powers) if size > 1) or (1,)


@functools.cache
@torch.inference_mode(False)
def whole_signs(width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The signs of the inputs before a Hadamard matrix over the whole width: as good as random, always the same.

    Negative where ``h(i + 1)`` is odd, with ``h`` the finalizer of MurmurHash3 (32 bits). Made once and kept.
    """
    n = torch.arange(1, width + 1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        n = ((n ^ (n >> shift)) * factor) & 0xFFFFFFFF
    return (1 - 2 * ((n ^ (n >> 16)) & 1)).to(device, dtype)


def mix_whole(x: Float[Tensor, "*rows in"], *, inverse: bool = False) -> Float[Tensor, "*rows in"]:
    """``x D H``, or ``x H^T D``: signs, then a Hadamard matrix over the whole width; at least in float32, rounded once.

    Raises:
        ValueError: for a width that has none (`whole_sizes`).
    """
    width, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    sizes, signs = whole_sizes(width), whole_signs(width, dtype=dtype, device=x.device)
    z = (x.to(dtype) if inverse else x.to(dtype) * signs).unflatten(-1, sizes)
    for axis, size in enumerate(sizes, -len(sizes)):
        matrix = (paley if size & (size - 1) else hadamard)(size, dtype=dtype, device=x.device)
        z = (z.movedim(axis, -1) @ (matrix.T if inverse else matrix)).movedim(-1, axis)
    z = z.flatten(-len(sizes))
    return (z * signs if inverse else z).to(x.dtype)
