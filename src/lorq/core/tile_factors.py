"""Tiles: low-rank factors that the experts of a layer share along the rows and columns of a grid."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorq.core.low_rank import FACTOR_TYPES, LowRank, Metric, factor_bits, store_vectors
from lorq.core.packing import Layout, stored_bits

_OVERSAMPLE = 16
# How often both sides of factors are fitted to each other, where cells are empty.
_SWEEPS = 10


@dataclass(frozen=True)
class TileFactors:
    """The low-rank parts of one projection of all experts: expert ``e`` in cell ``(i, j)`` has ``left[j] right[i]``.

    Attributes:
        left: (grid columns, out, rank), float16, int8 or float8_e4m3fn.
        right: (grid rows, rank, in), of the same type.
        left_scale, right_scale: (grid columns or rows, rank) float16; None for 16-bit factors.
        cells: int16; row and column of each expert.
        input_scale: float16; what an expert's input is multiplied by before its ``right``, both then in the model's
            own channels; None if nothing, ``right`` then is in the basis of the expert's weight.
    """

    left: Tensor
    right: Tensor
    left_scale: Float[Tensor, "columns rank"] | None
    right_scale: Float[Tensor, "rows rank"] | None
    cells: Int[Tensor, "experts 2"]
    input_scale: Float[Tensor, "experts in"] | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "TileFactors":
        """The tile factors behind stored tensors; the inverse of `tensors`."""
        return cls(**{field.name: tensors.get(field.name) for field in fields(cls)})  # type: ignore[arg-type]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.right.shape[0], self.left.shape[0]

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    @property
    def format(self) -> "TileFormat":
        rows, columns = self.grid
        factor_type = LowRank(self.left[0], self.right[0]).factor_type
        experts = self.cells.shape[0]
        return TileFormat(rows, columns, experts, self.rank, factor_type, self.input_scale is not None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by local name (docs/format.md)."""
        return {name: tensor.cpu().contiguous() for name, tensor in vars(self).items() if tensor is not None}

    def lefts(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "columns out rank"]:
        """All left factors, scales multiplied in."""
        left = self.left.to(dtype)
        return left if self.left_scale is None else left * self.left_scale.to(dtype).unsqueeze(1)

    def rights(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows rank in"]:
        """All right factors, scales multiplied in."""
        right = self.right.to(dtype)
        return right if self.right_scale is None else right * self.right_scale.to(dtype).unsqueeze(2)

    def dense(self, expert: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The low-rank part of one expert."""
        row, column = self.cells[expert].tolist()
        right = self.rights(dtype)[row]
        if self.input_scale is not None:
            right = right * self.input_scale[expert].to(dtype)
        return self.lefts(dtype)[column] @ right


@dataclass(frozen=True)
class TileFormat:
    """What must be known of tile factors to make room for them before their tensors are read.

    Rows and columns of the grid, the experts in its cells, rank and type of the factors ("float16", "int8" or "e4m3"),
    and whether each expert has a scale for its input.
    """

    rows: int
    columns: int
    experts: int
    rank: int
    factor_type: str
    input_scale: bool = False

    def layout(self, out: int, in_: int) -> Layout:
        """Shape and dtype of every tensor that tile factors of this format store; the inverse is `tensors`."""
        kind = FACTOR_TYPES[self.factor_type][0]
        layout: Layout = {
            "left": ((self.columns, out, self.rank), kind),
            "right": ((self.rows, self.rank, in_), kind),
            "cells": ((self.experts, 2), torch.int16),
        }
        if factor_bits(self.factor_type) == 8:
            layout["left_scale"] = ((self.columns, self.rank), torch.float16)
            layout["right_scale"] = ((self.rows, self.rank), torch.float16)
        if self.input_scale:
            layout["input_scale"] = ((self.experts, in_), torch.float16)
        return layout

    def stored_bits(self, out: int, in_: int) -> int:
        """Every bit: factors, their scales, cells, input scales."""
        return stored_bits(self.layout(out, in_))

    def share(self, out: int, in_: int) -> int:
        """Bits that fall to one expert, rounded up."""
        return -(-self.stored_bits(out, in_) // self.experts)


def grid_of(experts: int, rows: int = -1, columns: int = -1, *, out: int = 1, in_: int = 1) -> tuple[int, int]:
    """A grid with a cell for each expert; where a side is -1, the one whose factors have the fewest numbers.

    These are ``rows in + columns out`` for each pair of factors; of equals, the grid with the fewest cells, then the
    squarest.

    Raises:
        ValueError: if the given sides have too few cells.

    Example:
        >>> grid_of(60), grid_of(8, out=14336, in_=4096), grid_of(8, rows=2)
        ((6, 10), (4, 2), (2, 4))
    """
    sides = [(rows, columns)]
    if columns == -1:
        sides = [(i, -(-experts // i)) for i in ([rows] if rows != -1 else range(1, experts + 1))]
    elif rows == -1:
        sides = [(-(-experts // columns), columns)]
    rows, columns = min(
        sides, key=lambda side: (side[0] * in_ + side[1] * out, side[0] * side[1], abs(side[0] - side[1]))
    )
    if rows * columns < experts:
        raise ValueError(
            f"the grid needs a cell for each expert, got {rows} x {columns} = {rows * columns} cells for {experts} "
            "experts; raise grid_rows or grid_columns, or leave them at -1"
        )
    return rows, columns


# -- placing the experts ------------------------------------------------------------------------------------


def place_experts(
    scaled: Float[Tensor, "experts out in"], rows: int, columns: int, *, rank: int, generator: torch.Generator
) -> Int[Tensor, "experts 2"]:
    """Cells for the experts, so that a row has like input directions and a column like output directions.

    Each expert's leading ``rank`` singular subspaces are compared by ``|V_e^T V_f|_F^2 / rank``, the mean squared
    cosine of the angles between them, which does not see the signs and the order of singular vectors. Experts are
    clustered by it, rows by right and columns by left subspaces, and put into the nearest free cell to their
    clusters' crossing, going round by Manhattan distance with wrap-around.

    Args:
        scaled: the experts' matrices in the metric of the fit.
        rows, columns: of the grid, which has a cell for each expert at least.
        rank: singular vectors that are compared.
        generator: for the sketches.

    Source:
        TileQ's authors' code, step 3-4, whose k-means on singular vectors takes ``u`` and ``-u`` for two directions.
    """
    experts = scaled.shape[0]
    rank = min(rank, *scaled.shape[1:])
    test = torch.randn(scaled.shape[2], rank, generator=generator, device=scaled.device)
    left = torch.linalg.qr(scaled @ test)[0]  # (experts, out, rank)
    for _ in range(2):
        right = torch.linalg.qr(scaled.transpose(1, 2) @ left)[0]
        left = torch.linalg.qr(scaled @ right)[0]
    row_of, column_of = cluster(_cosines(right), rows), cluster(_cosines(left), columns)
    free = {(i, j) for i in range(rows) for j in range(columns)}
    cells = torch.empty(experts, 2, dtype=torch.int16)
    for expert in range(experts):
        i, j = row_of[expert], column_of[expert]

        def distance(cell: tuple[int, int], i: int = i, j: int = j) -> tuple[int, tuple[int, int]]:
            down, across = abs(cell[0] - i), abs(cell[1] - j)
            return min(down, rows - down) + min(across, columns - across), cell

        nearest = min(free, key=distance)
        free.remove(nearest)
        cells[expert] = torch.tensor(nearest)
    return cells


def _cosines(bases: Float[Tensor, "experts n rank"]) -> Float[Tensor, "experts experts"]:
    """Mean squared cosines of the principal angles between all pairs of subspaces."""
    experts, _, rank = bases.shape
    flat = bases.transpose(1, 2).flatten(0, 1)  # (experts * rank, n)
    products = (flat @ flat.T).square().view(experts, rank, experts, rank)
    return products.sum((1, 3)) / rank


def cluster(similarity: Float[Tensor, "n n"], clusters: int) -> list[int]:
    """Kernel k-means on a similarity matrix; deterministic.

    Starts from the item most like all others, then always the one least like those chosen.

    Example:
        >>> cluster(torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]), 2)
        [0, 1, 0]
    """
    count = similarity.shape[0]
    if clusters >= count:
        return list(range(count))
    chosen = [int(similarity.sum(1).argmax())]
    while len(chosen) < clusters:
        closest = similarity[:, chosen].amax(1)
        closest[chosen] = torch.inf
        chosen.append(int(closest.argmin()))
    label = similarity[:, chosen].argmax(1)
    for _ in range(20):
        member = torch.nn.functional.one_hot(label, clusters).to(similarity.dtype)
        size = member.sum(0).clamp(min=1)
        # |phi_e - mean_c|^2 up to what all clusters share.
        within = ((member.T @ similarity) * member.T).sum(1) / size.square()
        new = (2 * similarity @ member / size - within).argmax(1)
        if torch.equal(new, label):
            break
        label = new
    return [int(c) for c in label]


# -- fitting the factors ------------------------------------------------------------------------------------


def fit_tiles(
    targets: Float[Tensor, "experts out in"],
    metrics: list[Metric],
    cells: Int[Tensor, "experts 2"],
    grid: tuple[int, int],
    *,
    rank: int,
    factor_type: str,
    iterations: int,
    generator: torch.Generator,
) -> TileFactors:
    """One sketch of the tile matrix, its factors rounded one pair at a time, later pairs repairing the rounding.

    The tile matrix has ``A_e = target_e C_i`` in block ``(j, i)`` for the expert in cell ``(i, j)``. An empty cell
    holds what the factors of the filled ones say there, so that it weighs on nothing. A blocked subspace iteration
    gives ``rank`` right vectors; for each, ``right_i = round(v_i C_i^-1)``, and the left blocks are fitted to the
    rounded right ones:

        left_j = sum_i A_ji (right_i C_i)^T / sum_i |right_i C_i|^2

    Args:
        targets: what the low-rank parts shall approximate, by expert.
        metrics: ``C_i``, one for each grid row.
        cells, grid: row and column of each expert; how many there are.
        rank: factor pairs.
        factor_type: of the stored factors, see `lorq.core.low_rank.store_factors`.
        iterations, generator: of the subspace iteration and its test vectors.

    Source:
        TileQ's authors' code, step 5, which fits zeros in empty cells. Deviations as in `lorq.core.low_rank.r1svd`;
        each block has a scale of its own.
    """
    cells = cells.to(targets.device, torch.int16)
    rows, columns = cells[:, 0].long(), cells[:, 1].long()
    rest = torch.stack([metrics[int(row)].apply(target) for row, target in zip(rows, targets, strict=True)])
    taken = {(i, j) for i, j in cells.tolist()}
    empty = [(i, j) for i in range(grid[0]) for j in range(grid[1]) if (i, j) not in taken]
    if empty:
        filled = _fill(rest, rows, columns, grid, empty, rank=rank, iterations=iterations, generator=generator)
        rest = torch.cat([rest, filled])
        added = torch.tensor(empty, device=rest.device)
        rows, columns = torch.cat([rows, added[:, 0]]), torch.cat([columns, added[:, 1]])
    starts = _right_vectors(rest, rows, columns, grid, rank=rank, iterations=iterations, generator=generator)
    lefts, rights = [], []  # of (grid columns, out) and (grid rows, in)
    for start in starts:
        left, right = _fit_pair(rest, start, metrics, rows, columns, grid, factor_type)
        lefts.append(left)
        rights.append(right)
    stored_left, left_scale = store_vectors(torch.stack(lefts, 1), factor_type)  # (columns, rank, out)
    stored_right, right_scale = store_vectors(torch.stack(rights, 1), factor_type)
    return TileFactors(stored_left.transpose(1, 2).contiguous(), stored_right, left_scale, right_scale, cells)


def _fill(
    rest: Float[Tensor, "experts out in"],
    rows: Int[Tensor, "experts"],
    columns: Int[Tensor, "experts"],
    grid: tuple[int, int],
    empty: list[tuple[int, int]],
    *,
    rank: int,
    iterations: int,
    generator: torch.Generator,
) -> Float[Tensor, "empty out in"]:
    """What stands in empty cells when factors of this rank are fitted to the filled ones alone.

    Alternating least squares, each side of the factors given the other; it starts from the zeros in the empty cells.
    """
    starts = _right_vectors(rest, rows, columns, grid, rank=rank, iterations=iterations, generator=generator)
    right = starts.permute(1, 2, 0).contiguous()  # (rows, in, rank)
    for _ in range(_SWEEPS):
        left = _other_side(rest, right[rows], columns, grid[1])
        right = _other_side(rest.mT, left[columns], rows, grid[0])
    return torch.stack([left[j] @ right[i].T for i, j in empty])


def _other_side(
    rest: Float[Tensor, "experts m n"],
    known: Float[Tensor, "experts n rank"],
    place: Int[Tensor, "experts"],
    count: int,
) -> Float[Tensor, "count m rank"]:
    """For each place the factor ``X`` with the least ``sum_e |rest_e - X known_e^T|^2`` over its experts."""
    rank = known.shape[2]
    products = rest.new_zeros(count, rank, rank).index_add_(0, place, known.mT @ known)
    sums = rest.new_zeros(count, rest.shape[1], rank).index_add_(0, place, rest @ known)
    # A place without experts has factors of zero; directions that its experts do not tell stay small.
    ridge = 1e-6 * products.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    products.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return torch.linalg.solve(products, sums.mT).mT


def _right_vectors(
    rest: Float[Tensor, "experts out in"],
    rows: Int[Tensor, "experts"],
    columns: Int[Tensor, "experts"],
    grid: tuple[int, int],
    *,
    rank: int,
    iterations: int,
    generator: torch.Generator,
) -> Float[Tensor, "rank rows in"]:
    """Leading right singular vectors of the tile matrix, which is never put together."""
    _, out, in_ = rest.shape
    width = min(rank + _OVERSAMPLE, grid[0] * in_, grid[1] * out)

    def times(v: Tensor) -> Tensor:  # (rows, in, width) -> (columns, out, width)
        return rest.new_zeros(grid[1], out, width).index_add_(0, columns, rest @ v[rows])

    def times_transposed(u: Tensor) -> Tensor:
        return rest.new_zeros(grid[0], in_, width).index_add_(0, rows, rest.transpose(1, 2) @ u[columns])

    def orthonormal(x: Tensor) -> Tensor:
        return torch.linalg.qr(x.flatten(0, 1))[0].view_as(x)

    v = torch.randn(grid[0], in_, width, generator=generator, dtype=rest.dtype, device=rest.device)
    for _ in range(iterations + 1):
        u = orthonormal(times(v))
        v = times_transposed(u)
    projected = v.flatten(0, 1).double()  # (rows * in, width)
    _, turn = torch.linalg.eigh(projected.T @ projected)  # rising eigenvalues
    vectors = (projected @ turn.flip(1)[:, :rank]).to(rest.dtype).T
    return (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)).view(-1, grid[0], in_)


def _fit_pair(
    rest: Float[Tensor, "experts out in"],
    start: Float[Tensor, "rows in"],
    metrics: list[Metric],
    rows: Int[Tensor, "experts"],
    columns: Int[Tensor, "experts"],
    grid: tuple[int, int],
    factor_type: str,
) -> tuple[Float[Tensor, "columns out"], Float[Tensor, "rows in"]]:
    """One rounded pair, taken out of ``rest`` in place."""

    def seen(right: Tensor) -> Tensor:  # (rows, in), in the metric of each row
        return torch.stack([metric.apply(part[None])[0] for metric, part in zip(metrics, right, strict=True)])

    def best_left(v: Tensor) -> Tensor:
        norms = v.new_zeros(grid[1]).index_add_(0, columns, v[rows].square().sum(1))
        sums = v.new_zeros(grid[1], rest.shape[1]).index_add_(0, columns, (rest @ v[rows].unsqueeze(2)).squeeze(2))
        return sums / norms.clamp(min=1e-30).unsqueeze(1)

    # What earlier rounding left over turns the vector a little; one power step follows it.
    left = best_left(start)
    v = torch.zeros_like(start).index_add_(0, rows, (left[columns].unsqueeze(1) @ rest).squeeze(1))
    right = torch.stack([metric.undo(part[None])[0] for metric, part in zip(metrics, v, strict=True)])
    right = _as_stored(right / right.abs().amax().clamp(min=1e-30), factor_type)
    left = best_left(seen(right))
    balance = left.abs().amax().clamp(min=1e-30).sqrt()  # both sides within float16
    left, right = _as_stored(left / balance, factor_type), _as_stored(right * balance, factor_type)
    rest.sub_(left[columns].unsqueeze(2) * seen(right)[rows].unsqueeze(1))
    return left, right


def _as_stored(vectors: Float[Tensor, "rows n"], factor_type: str) -> Float[Tensor, "rows n"]:
    """What reading the stored vectors gives back."""
    codes, scale = store_vectors(vectors, factor_type)
    read = codes.to(vectors.dtype)
    return read if scale is None else read * scale.to(vectors.dtype).unsqueeze(1)
