"""Small linear algebra on Hessians: shrinkage, damping, Cholesky factors."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# Columns of a triangle, or of one half of a symmetric matrix, that are multiplied at a time.
WIDE_STRIP = 1024
# Rows and columns of a triangle that are inverted at once.
_TRIANGLE = 512


def shrink(hessian: Float[Tensor, "n n"], amount: float) -> Float[Tensor, "n n"]:
    """Move a Hessian towards its diagonal, ``(1 - amount) H + amount diag(H)``.

    Raises:
        ValueError: if ``amount`` is outside 0..1.
    """
    if not 0.0 <= amount <= 1.0:
        raise ValueError(f"shrinkage must be between 0 and 1, got {amount}")
    shrunk = hessian * (1.0 - amount)
    shrunk.diagonal().copy_(hessian.diagonal())
    return shrunk


def damp(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Add ``damping`` times the mean diagonal to the diagonal.

    A channel that is always zero has no row in ``H``; the damped diagonal keeps it positive.

    Raises:
        ValueError: if ``damping`` is negative.
    """
    if damping < 0.0:
        raise ValueError(f"damping must be at least 0, got {damping}")
    damped = hessian.clone()
    # An input that is zero everywhere says nothing: any positive diagonal will do.
    damped.diagonal().add_(damping * max(float(hessian.diagonal().mean()), 1e-30))
    return damped


def cholesky(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lower Cholesky factor of a damped Hessian.

    Raises:
        ValueError: if the matrix is not positive definite.
    """
    return _cholesky(hessian, lambda failed: failed)


def _cholesky(hessian: Float[Tensor, "n n"], column: Callable[[int], int]) -> Float[Tensor, "n n"]:
    """`cholesky` of columns in some order; ``column`` tells which of the Hessian's one is."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        raise ValueError(
            f"the Hessian must be positive definite, got a failure at column {column(int(info) - 1)} of "
            f"{hessian.shape[0]}; raise the damping, or calibrate on more tokens"
        )
    return factor


def times_lower(rows: Float[Tensor, "m n"], lower: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """``rows @ lower`` without the products with the zeros above the diagonal, which are half of them.

    Example:
        >>> times_lower(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [5.0, 7.0]]))
        tensor([[13., 14.]])
    """
    if len(lower) <= WIDE_STRIP:
        return rows @ lower
    product = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start in range(0, len(lower), WIDE_STRIP):
        columns = slice(start, start + WIDE_STRIP)
        torch.mm(rows[:, start:], lower[start:, columns], out=product[:, columns])
    return product


def inverse_factor(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Upper factor ``U`` of the inverse, ``H^-1 = U^T U``, that GPTQ reads row by row.

    With the rows and columns of ``H`` in reverse, its Cholesky factor in reverse is an upper triangle ``R`` with
    ``H = R R^T``, so that ``U = R^-1``: the inverse of ``H`` itself is never made, which takes half of the time.

    Raises:
        ValueError: if the matrix is not positive definite.
    """
    last = len(hessian) - 1
    return invert_upper(_cholesky(hessian.flip(0, 1), lambda failed: last - failed).flip(0, 1))


def invert_upper(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse of an upper triangle, from strip to strip: of ``[[A, B], [0, C]]`` it is
    ``[[A^-1, -A^-1 B C^-1], [0, C^-1]]``. Products with the zeros below the diagonal are left out.

    Example:
        >>> invert_upper(torch.tensor([[2.0, 6.0], [0.0, 4.0]]))
        tensor([[ 0.5000, -0.7500],
                [ 0.0000,  0.2500]])
    """
    inverse = torch.zeros_like(upper, memory_format=torch.contiguous_format)
    for start in range(0, len(upper), _TRIANGLE):
        strip = slice(start, min(start + _TRIANGLE, len(upper)))
        own = upper[strip, strip]
        one = torch.eye(len(own), dtype=upper.dtype, device=upper.device)
        inverse[strip, strip] = torch.linalg.solve_triangular(own, one, upper=True)
        above = (upper[:start, strip] @ inverse[strip, strip]).neg_()
        for first in range(0, start, _TRIANGLE):
            rows = slice(first, first + _TRIANGLE)
            torch.mm(inverse[rows, first:start], above[first:], out=inverse[rows, strip])
    return inverse
