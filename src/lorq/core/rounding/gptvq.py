"""GPTVQ: round a few neighbouring weights at once to a codebook's entries, passing errors on."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lorq.core.codes import Codebook, VectorCodes, VectorGrid
from lorq.core.half import SMALLEST_SCALE, stored_half

# Distances that k-means has in hand at once: 16 MB, so that they stay near the cache.
_DISTANCES = 1 << 22


def gptvq(
    target: Float[Tensor, "out in"],
    grid: VectorGrid,
    *,
    upper: Float[Tensor, "in in"],
    iterations: int = 10,
) -> VectorCodes:
    """Vector codes that keep ``tr[(T - Q) H (T - Q)^T]`` small by passing errors on.

    With ``H^-1 = U^T U`` and ``b`` the columns of one vector, a row's ``t_b`` becomes the codebook entry ``c`` with
    the least ``|(t_b - c) U_bb^-1|^2``: what the vector costs once the later columns have made up for it. They move
    by ``- (t_b - c) U_bb^-1 U_bj``. Each column of codebooks is fitted (`fit_codebooks`) to what earlier errors have
    made of its weights, before its first vector is rounded.

    Args:
        target: what is to be rounded; unchanged.
        upper: ``U``, that is `lorq.core.stats.PreparedHessian.inverse_factor`; the identity gives nearest vectors.
        iterations: of k-means.

    Raises:
        ValueError: if the sizes do not divide the shape.

    Source:
        GPTVQ, arXiv:2402.15319, algorithm 1, without normalisation of blocks and later gradient steps. Deviations: a
        scale for each row and group, and the whole ``U_bb`` in the assignment, where the paper has its diagonal.
    """
    (out, width), size = target.shape, grid.columns
    grid.check(out, width)
    # (in, out): a column of the weight is contiguous. Of a single row `contiguous` would be the target itself.
    columns = target.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(width // grid.vector, out, dtype=torch.uint8, device=target.device)
    scales, books = [], []
    for start in range(0, width, size):
        end = start + size
        if start % grid.group_size == 0:
            # Root mean square of each row's weights, as float16 holds it.
            size_of_rows = columns[start : start + grid.group_size].square().mean(0).sqrt()
            scales.append(stored_half(size_of_rows.clamp(min=SMALLEST_SCALE)).to(target.dtype))
        scale = scales[-1]
        book = _fit_tiles(columns[start:end], upper.diagonal()[start:end], scale, grid, iterations)
        books.append(book)
        errors = _round_tile(columns, upper, start, scale, book.values(target.dtype)[:, 0], codes, grid)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    codebook = Codebook(torch.cat([b.entries for b in books], 1), torch.cat([b.scale for b in books], 1))
    return VectorCodes(codes.T.contiguous(), torch.stack(scales, 1).to(torch.float16), codebook, grid)


def _fit_tiles(
    columns: Float[Tensor, "columns out"],
    diagonal: Float[Tensor, "columns"],
    scale: Float[Tensor, "out"],
    grid: VectorGrid,
    iterations: int,
) -> Codebook:
    """One column of codebooks, a codebook for each tile of rows."""
    tiled = (columns / scale).T.reshape(-1, grid.rows, grid.columns // grid.vector, grid.vector)
    # What an error costs: GPTQ's weight of its column, times the row's scale.
    weight = diagonal.reciprocal().square().view(1, 1, -1, grid.vector) * scale.square().view(-1, grid.rows, 1, 1)
    points, weights = tiled.flatten(1, 2), weight.expand_as(tiled).flatten(1, 2)
    return store_codebooks(fit_codebooks(points, weights, entries=grid.entries, iterations=iterations))


def _round_tile(
    columns: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    start: int,
    scale: Float[Tensor, "out"],
    book: Float[Tensor, "tiles entries vector"],
    codes: UInt8[Tensor, "vectors out"],
    grid: VectorGrid,
) -> Float[Tensor, "columns out"]:
    """Round one column of tiles, in place in ``codes``; the errors in units of U's rows."""
    vector, end = grid.vector, start + grid.columns
    errors = columns.new_empty(grid.columns, columns.shape[1])
    inverses = torch.linalg.inv(torch.stack([upper[i : i + vector, i : i + vector] for i in range(start, end, vector)]))
    norms = (book.unsqueeze(1) @ inverses).square().sum(-1)  # (tiles, positions, entries)
    for position, inverse in enumerate(inverses):
        i = start + position * vector
        weights = columns[i : i + vector]  # (vector, out)
        seen = ((weights / scale).T @ inverse).view(len(book), grid.rows, vector)
        images = (book @ inverse).transpose(1, 2)  # (tiles, vector, entries)
        code = torch.baddbmm(norms[:, position].unsqueeze(1), seen, images, alpha=-2).argmin(-1)  # (tiles, rows)
        codes[i // vector] = code.flatten()
        chosen = book.gather(1, code.unsqueeze(-1).expand(-1, -1, vector)).flatten(0, 1).T * scale
        error = torch.matmul(inverse.T, weights - chosen, out=errors[i - start : i - start + vector])
        columns[i + vector : end].addmm_(upper[i : i + vector, i + vector : end].T, error, alpha=-1)
    return errors


def fit_codebooks(
    points: Float[Tensor, "tiles points vector"],
    weights: Float[Tensor, "tiles points vector"],
    *,
    entries: int,
    iterations: int,
) -> Float[Tensor, "tiles entries vector"]:
    """Weighted k-means, all tiles at once: minimises ``sum_p sum_i w_pi (x_pi - c_i(p))^2``.

    The start is deterministic: points evenly spread over the order of their Mahalanobis distance from the mean. A
    centre that no point is nearest to stays where it is.

    ``weights`` are the costs ``w`` of an error in each coordinate of each point, positive.

    Source:
        GPTVQ, arXiv:2402.15319, section 3.2 and its "Mahalanobis" initialisation.
    """
    tiles, count, vector = points.shape
    weights = weights / weights.mean((1, 2), keepdim=True).clamp(min=1e-30)
    centred = points - points.mean(1, keepdim=True)
    spread = centred.transpose(1, 2) @ centred / count
    spread = spread + 1e-6 * spread.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30) * torch.eye(
        vector, dtype=points.dtype, device=points.device
    )
    distance = (torch.linalg.solve(spread, centred.transpose(1, 2)).transpose(1, 2) * centred).sum(-1)
    pick = torch.linspace(0, count - 1, entries, device=points.device).round().long()
    order = distance.argsort(dim=-1, stable=True)[:, pick]  # (tiles, entries)
    centres = points.gather(1, order.unsqueeze(-1).expand(-1, -1, vector))
    weighted = weights * points
    both = torch.cat([weighted, weights], -1)
    first = torch.arange(tiles, device=points.device).unsqueeze(1) * entries
    for _ in range(iterations):
        # w (x - c)^2 = w x^2 - 2 (w x) c + w c^2, and the first term is the same for all centres.
        forms = torch.cat([-2 * centres, centres.square()], -1).transpose(1, 2).contiguous()
        at_once = max(1, _DISTANCES // (entries * tiles))
        nearest = torch.cat([torch.bmm(part, forms).argmin(-1) for part in both.split(at_once, 1)], 1)
        flat = (nearest + first).flatten()
        sums = both.new_zeros(tiles * entries, 2 * vector).index_add_(0, flat, both.flatten(0, 1))
        total, weight = sums.view(tiles, entries, 2 * vector).split(vector, -1)
        centres = torch.where(weight > 0, total / weight.clamp(min=1e-30), centres)
    return centres


def store_codebooks(centres: Float[Tensor, "tiles entries vector"]) -> Codebook:
    """Round codebooks to int8, ``round(c / s)`` with ``s = max|c| / 127`` in float16 for each."""
    scale = (centres.abs().amax((1, 2)) / 127).clamp(min=2.0**-24).to(torch.float16)
    entries = (centres / scale.to(centres.dtype)[:, None, None]).round().clamp(-127, 127).to(torch.int8)
    return Codebook(entries.unsqueeze(1), scale.unsqueeze(1))
