"""Small linear algebra on Hessians: shrinkage, damping, Cholesky factors."""

import torch
from jaxtyping import Float
from torch import Tensor

# Columns of a triangle, or of one half of a symmetric matrix, that are multiplied at a time.
WIDE_STRIP = 1024


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
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        raise ValueError(
            f"the Hessian must be positive definite, got a failure at column {int(info) - 1} of "
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

    Raises:
        ValueError: if the matrix is not positive definite.
    """
    inverse = torch.cholesky_inverse(cholesky(hessian))
    factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(info):
        raise ValueError(
            f"the inverse Hessian must be positive definite, got a failure at column {int(info) - 1} of "
            f"{hessian.shape[0]}; raise the damping"
        )
    return factor
