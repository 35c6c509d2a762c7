"""Low-rank factors of a matrix from random test vectors: the paper's R1-Sketch and a blocked form."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "p rank"], Float[Tensor, "rank q"]]


def rank1_sketch(
    a: Float[Tensor, "p q"], *, iterations: int = 2, generator: torch.Generator
) -> tuple[Float[Tensor, " p"], Float[Tensor, " q"]]:
    """One singular pair of ``a``, approximately, from one Gaussian test vector.

    Power iteration from ``s ~ N(0, I_q)``, then one projection:

        P = A (A^T A)^iterations s,    K = A^T P,    left = (|K| / |P|^2) P,    right = K / |K|

    so that ``left right = u u^T A`` with ``u = P / |P|``: what remains, ``(I - u u^T) A``, never has a larger norm.

    Args:
        a: the matrix; float32 or float64; left unchanged.
        iterations: applications of ``A A^T``, at least 0; the paper uses 2.
        generator: source of the test vector, on ``a``'s device.

    Returns:
        ``(left, right)``: ``left`` carries the singular value, ``right`` has unit norm; zero where ``a`` is.

    Raises:
        ValueError: if ``iterations`` is negative or ``a`` is not finite.
        TypeError: if ``a`` is neither float32 nor float64.

    Source:
        FLRQ, arXiv:2601.05684, Eq. 5-7. Deviation: P, of which only the direction counts, is brought to unit norm
        after every product: ``sigma^(2 iterations + 1)`` would overflow float32.

    Example:
        >>> a = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
        >>> left, right = rank1_sketch(a, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(torch.outer(left, right), a)
        True
    """
    _check(a, rank=0, iterations=iterations, oversample=0)
    test = torch.randn(a.shape[1], generator=generator, dtype=a.dtype, device=a.device)
    product = a @ test  # (p,)
    _check_finite(product, "rows")
    u, _ = _unit(product)
    for _ in range(iterations):
        v, _ = _unit(a.T @ u)
        u, _ = _unit(a @ v)
    right, sigma = _unit(a.T @ u)  # |K| / |P| = sigma, as |P| = 1
    return u * sigma, right


def sketch(
    a: Float[Tensor, "p q"],
    *,
    rank: int,
    form: str = "block",
    iterations: int = 2,
    oversample: int = 16,
    generator: torch.Generator,
) -> Factors:
    """Factors of rank ``rank`` close to the best ones: ``a ~ left @ right``.

    ``"svd"`` is the best there is, which the sketches are measured by; it looks at nothing random. The other
    forms give ``left right = U U^T A`` with orthonormal ``U``. Any leading ``r`` columns of ``left`` and rows of
    ``right`` are a good rank-``r`` answer themselves, and the residual never grows with ``r``.

    ``"rank1"``: ``rank`` times :func:`rank1_sketch`, each on what the ones before left over; the order only tends to be
    by falling singular value.

    ``"block"``: ``rank + oversample`` test vectors at once. Subspace iteration (Halko et al., arXiv:0909.4061,
    Algorithm 4.4) gives an orthonormal basis Q of ``(A A^T)^iterations S``; the eigenvectors of ``(Q^T A)(Q^T A)^T``
    turn it so that components are ordered by falling singular value. The test vectors are drawn on the left side, which
    saves a product with A and costs half a step of convergence.

    Args:
        a: the matrix; float32 or float64; left unchanged.
        rank: number of factor pairs, ``0 <= rank <= min(p, q)``.
        form: ``"block"``, ``"rank1"`` or ``"svd"``.
        iterations: applications of ``A A^T``, at least 0. At 0 the block form projects on random directions.
        oversample: extra test vectors of the block form, at least 0. 16 keeps it ahead of the rank-1 form at the last
            component too; 8 does not.
        generator: source of the test vectors, on ``a``'s device. Same seed, same bits.

    Returns:
        ``(left, right)``: columns of ``left`` are orthogonal and carry the singular values, rows of ``right`` have unit
        norm, or are zero.

    Raises:
        ValueError: if an option is out of range, ``form`` is unknown or ``a`` is not finite.
        TypeError: if ``a`` is neither float32 nor float64.

    Source:
        FLRQ, arXiv:2601.05684, Algorithm 1 is the ``"rank1"`` form; the ``"block"`` form is ours.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> left, right = sketch(a, rank=2, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(left @ right, torch.diag(torch.tensor([0.0, 3.0, 2.0])), atol=1e-5)
        True
    """
    _check(a, rank=rank, iterations=iterations, oversample=oversample)
    if form not in FORMS:
        raise ValueError(f"form must be one of {sorted(FORMS)}, got {form!r}")
    if rank == 0:
        return a.new_zeros(a.shape[0], 0), a.new_zeros(0, a.shape[1])
    return FORMS[form](a, rank, iterations, oversample, generator)


def _rank1(a: Float[Tensor, "p q"], rank: int, iterations: int, oversample: int, generator: torch.Generator) -> Factors:
    rest = a.clone()
    left, right = a.new_empty(a.shape[0], rank), a.new_empty(rank, a.shape[1])
    for r in range(rank):
        left[:, r], right[r] = rank1_sketch(rest, iterations=iterations, generator=generator)
        rest.addr_(left[:, r], right[r], alpha=-1)
    return left, right


def _block(a: Float[Tensor, "p q"], rank: int, iterations: int, oversample: int, generator: torch.Generator) -> Factors:
    width = min(rank + oversample, *a.shape)
    test = torch.randn(a.shape[0], width, generator=generator, dtype=a.dtype, device=a.device)
    basis = _orthonormalise(test)  # (p, width)
    projected = a.T @ basis  # (q, width) = (Q^T A)^T
    _check_finite(projected, "columns")
    for _ in range(iterations):
        basis = _orthonormalise(a @ _orthonormalise(projected))
        projected = a.T @ basis
    # float64: the Gram matrix squares the singular values, float32 would lose the small ones.
    projected = projected.double()
    _, vectors = torch.linalg.eigh(projected.T @ projected)  # rising eigenvalues
    turn = vectors.flip(1)[:, :rank]  # (width, rank)
    right, sigma = _unit((projected @ turn).T)
    left = (basis.double() @ turn) * sigma[:, 0]
    return left.to(a.dtype), right.to(a.dtype)


def _svd(a: Float[Tensor, "p q"], rank: int, iterations: int, oversample: int, generator: torch.Generator) -> Factors:
    _check_finite(a, "rows")
    left, sigma, right = torch.linalg.svd(a, full_matrices=False)
    return left[:, :rank] * sigma[:rank], right[:rank] * (sigma[:rank, None] > 0)


SketchForm = Literal["block", "rank1", "svd"]
FORMS: dict[str, Callable[..., Factors]] = {"block": _block, "rank1": _rank1, "svd": _svd}


def _orthonormalise(y: Float[Tensor, "long width"]) -> Float[Tensor, "long width"]:
    """An orthonormal basis whose span contains the columns of ``y``; ``long >= width``.

    Cholesky-QR: with ``D`` the column norms and ``C C^T = D^-1 Y^T Y D^-1``, ``Q = Y D^-1 C^-T``. It squares the
    condition number, so it is for float32 only, whose Gram matrix float64 holds with digits to spare, and for columns
    that are far from dependent; all else goes to Householder, which works column by column.
    """
    if y.dtype == torch.float32:
        yt = y.double().T  # (width, long)
        gram = yt @ yt.T
        norm = gram.diagonal().sqrt()
        # A zero column makes this NaN, and the factorisation fail.
        c, failed = torch.linalg.cholesky_ex(gram / torch.outer(norm, norm))
        # The diagonal of C holds the sines of each column's angle to those before it. At 1e-4 the Gram
        # matrix still determines Q to 1e-16 / 1e-8: as well as float32 can hold it.
        if failed == 0 and c.diagonal().min() > 1e-4:
            return torch.linalg.solve_triangular(c * norm[:, None], yt, upper=False).T.to(y.dtype)
    return torch.linalg.qr(y)[0]


def _unit(x: Float[Tensor, "*rows n"]) -> tuple[Float[Tensor, "*rows n"], Float[Tensor, "*rows one"]]:
    """``x`` with unit norm along the last axis, and the norms; zero stays zero."""
    # float64: squares of float32 underflow below 1e-23.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x / torch.where(norm == 0, 1, norm), norm


def _check(a: Float[Tensor, "p q"], *, rank: int, iterations: int, oversample: int) -> None:
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a sketch needs a float32 or float64 matrix, got {a.dtype}; convert it first")
    if not 0 <= rank <= min(a.shape):
        raise ValueError(
            f"rank must be between 0 and min(p, q) = {min(a.shape)} for a matrix of shape {tuple(a.shape)}, got {rank}"
        )
    for name, value in (("iterations", iterations), ("oversample", oversample)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _check_finite(product: Float[Tensor, "n *width"], lines: str) -> None:
    """Look at a product of A with random vectors in place of A: NaN or infinity in A shows there too."""
    finite = torch.isfinite(product).reshape(product.shape[0], -1).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"a sketch needs finite values: {len(bad)} of {len(finite)} {lines} hold NaN, infinity or values "
            f"too large for {product.dtype}, the first is number {bad[0]}; repair or scale the matrix"
        )
