"""Experts placed on a grid by their subspaces, and factors shared along its rows and columns."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from lorq.core.linalg import cholesky, damp
from lorq.core.low_rank import FACTOR_TYPES, Metric
from lorq.core.tile_factors import TileFormat, cluster, fit_tiles, grid_of, place_experts

types = pytest.mark.parametrize("type", FACTOR_TYPES)
grids = pytest.mark.parametrize("grid", [(2, 2), (3, 2), (1, 4), (4, 1), (2, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
OUT, IN = 20, 28
PLAIN = Metric(lambda e: e, lambda v: v)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def row_major(grid, experts=None):
    """Cells for experts, one row of the grid after the other."""
    cells = torch.tensor(list(itertools.product(range(grid[0]), range(grid[1]))), dtype=torch.int16)
    return cells[: grid[0] * grid[1] if experts is None else experts]


def assembled(parts, cells, grid):
    """The tile matrix (columns * out, rows * in) as one tensor, float64; zeros in empty cells."""
    _, out, in_ = parts.shape
    matrix = torch.zeros(grid[1] * out, grid[0] * in_, dtype=torch.float64)
    for (i, j), part in zip(cells.tolist(), parts, strict=True):
        matrix[j * out : (j + 1) * out, i * in_ : (i + 1) * in_] = part
    return matrix


def taken_apart(matrix, cells, out=OUT, in_=IN):
    """The experts' blocks of a tile matrix."""
    blocks = [matrix[j * out : (j + 1) * out, i * in_ : (i + 1) * in_] for i, j in cells.tolist()]
    return torch.stack(blocks).float()


def tail(matrix, rank):
    """The error of the best approximation of a rank."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


def tile_matrix(grid, rank, noise, generator, out=OUT, in_=IN):
    """``rank`` directions of falling size over white noise."""
    left = torch.randn(grid[1] * out, rank, generator=generator) * 0.8 ** torch.arange(rank)
    whole = left @ torch.randn(rank, grid[0] * in_, generator=generator)
    return 0.02 * (whole + noise * torch.randn(whole.shape, generator=generator))


def factors_of(rows, columns, generator, in_=IN):
    """Well conditioned metrics of very different directions, one for each row: lower factors of Hessians."""
    found = []
    for row in range(rows):
        x = torch.randn(4 * in_, in_, generator=generator) * torch.logspace(-1, 1, in_).roll(row * in_ // rows)
        found.append(cholesky(damp(x.T @ x / len(x), 0.01)))
    return found


def parts_of(tiles):
    return torch.stack([tiles.dense(e, torch.float64) for e in range(len(tiles.cells))])


# ---- the grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experts, sides, expected",
    [
        (1, {}, (1, 1)), (2, {}, (1, 2)), (4, {}, (2, 2)), (5, {}, (2, 3)), (6, {}, (2, 3)), (7, {}, (2, 4)),
        (8, {}, (2, 4)), (60, {}, (6, 10)), (64, {}, (8, 8)), (128, {}, (10, 13)),
        (8, {"rows": 4}, (4, 2)), (8, {"columns": 4}, (2, 4)), (8, {"rows": 1}, (1, 8)), (8, {"columns": 1}, (8, 1)),
        (7, {"rows": 3}, (3, 3)), (7, {"rows": 3, "columns": 4}, (3, 4)), (4, {"rows": 9}, (9, 1)),
        (8, {"out": 14336, "in_": 4096}, (4, 2)), (8, {"out": 4096, "in_": 14336}, (2, 4)),  # Mixtral's
        (60, {"out": 1408, "in_": 2048}, (6, 10)), (60, {"out": 2048, "in_": 1408}, (10, 6)),  # Qwen1.5-MoE's
    ],
    ids=str,
)  # fmt: skip
def test_a_grid_has_the_smallest_factors_and_keeps_the_sides_that_are_given(experts, sides, expected):
    assert grid_of(experts, **sides) == expected


def test_no_grid_that_is_large_enough_has_smaller_factors():
    for experts in range(1, 130):
        rows, columns = grid_of(experts, out=3, in_=2)
        assert rows * columns >= experts
        sizes = [2 * i + 3 * j for i in range(1, 131) for j in range(1, 131) if i * j >= experts]
        assert 2 * rows + 3 * columns == min(sizes)


@pytest.mark.parametrize("rows, columns, experts", [(2, 2, 5), (1, 7, 8), (8, 7, 60)])
def test_a_grid_that_is_too_small_is_refused_with_the_numbers(rows, columns, experts):
    message = rf"got {rows} x {columns} = {rows * columns} cells for {experts} experts; raise grid_rows"
    with pytest.raises(ValueError, match=message):
        grid_of(experts, rows, columns)


# ---- clusters ---------------------------------------------------------------------------------------------


def groups(labels):
    """The partition behind labels."""
    return {frozenset(i for i, label in enumerate(labels) if label == one) for one in labels}


@pytest.mark.parametrize("sizes", [(4, 4), (1, 6), (3, 2, 5), (2, 2, 2, 2)], ids=str)
def test_obvious_groups_are_found_in_any_order(sizes, generator):
    owner = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    noise = 0.1 * torch.rand(len(owner), len(owner), generator=generator)
    similarity = torch.where(owner[:, None] == owner, 0.8, 0.1) + (noise + noise.T) / 2
    labels = cluster(similarity, len(sizes))
    assert groups(labels) == groups(owner.tolist())
    assert labels == cluster(similarity, len(sizes))


def test_a_cluster_for_every_item_takes_no_comparison(generator):
    assert cluster(torch.ones(3, 3), 3) == [0, 1, 2] and cluster(torch.ones(3, 3), 5) == [0, 1, 2]
    assert cluster(torch.rand(6, 6, generator=generator), 1) == [0] * 6


def test_clusters_are_the_best_of_all_partitions_of_a_few_points(generator):
    # Inner products of points: kernel k-means on them is k-means.
    points = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    points[:3] += 3
    points[3:5] -= 3

    def scatter(labels):
        own = [points[[i for i, label in enumerate(labels) if label == one]] for one in set(labels)]
        return sum(float((part - part.mean(0)).square().sum()) for part in own)

    best = min(itertools.product(range(3), repeat=7), key=scatter)
    assert scatter(cluster(points @ points.T, 3)) == pytest.approx(scatter(best), rel=1e-12)


# ---- places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experts, grid",
    [(1, (1, 1)), (4, (2, 2)), (7, (3, 3)), (5, (1, 5)), (5, (5, 1)), (6, (4, 2)), (9, (3, 4))],
    ids=str,
)
def test_every_expert_has_a_cell_of_its_own_inside_the_grid(experts, grid, generator):
    scaled = torch.randn(experts, OUT, IN, generator=generator)
    cells = place_experts(scaled, *grid, rank=8, generator=seeded())
    found = [tuple(cell) for cell in cells.tolist()]
    assert cells.dtype == torch.int16 and len(set(found)) == experts
    assert set(found) <= set(itertools.product(range(grid[0]), range(grid[1])))
    assert torch.equal(place_experts(scaled, *grid, rank=8, generator=seeded()), cells)


def test_more_experts_of_one_kind_than_a_row_holds_still_have_cells_of_their_own(generator):
    alike = torch.randn(1, OUT, IN, generator=generator).expand(9, -1, -1).clone()
    alike += 1e-3 * torch.randn(9, OUT, IN, generator=generator)
    cells = place_experts(alike, 3, 3, rank=4, generator=seeded())
    assert {tuple(cell) for cell in cells.tolist()} == set(itertools.product(range(3), range(3)))


def subspaces(n, width, count, generator):
    """Bases of subspaces at right angles to each other."""
    whole = torch.linalg.qr(torch.randn(n, count * width, generator=generator))[0]
    return whole.T.reshape(count, width, n).mT


def of_two_subspaces(outputs, inputs, generator):
    """Experts of rank 4 that read from about one of two input subspaces and write to about one of two others."""
    lefts, rights = subspaces(OUT, 4, 2, generator), subspaces(IN, 4, 2, generator)

    def near(basis):
        return basis + 0.1 * torch.randn(basis.shape, generator=generator)

    pairs = zip(outputs, inputs, strict=True)
    cores = torch.eye(4) + 0.3 * torch.randn(len(outputs), 4, 4, generator=generator)
    return torch.stack([near(lefts[a]) @ core @ near(rights[b]).T for core, (a, b) in zip(cores, pairs, strict=True)])


@pytest.mark.parametrize("seed", range(4))
def test_a_row_reads_from_one_subspace_and_a_column_writes_to_one(seed):
    outputs, inputs = [0, 1, 1, 0], [1, 1, 0, 0]
    cells = place_experts(of_two_subspaces(outputs, inputs, seeded(seed)), 2, 2, rank=4, generator=seeded())
    row, column = cells.T.tolist()
    assert groups(row) == groups(inputs) and groups(column) == groups(outputs)


@pytest.mark.parametrize("seed", range(3))
def test_signs_and_turns_within_the_subspaces_change_no_place(seed):
    generator = seeded(seed)
    scaled = of_two_subspaces([0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1], generator)
    cells = place_experts(scaled, 3, 2, rank=4, generator=seeded())
    flips = torch.where(torch.rand(6, 1, 1, generator=generator) < 0.5, -1.0, 1.0)
    assert torch.equal(place_experts(flips * scaled, 3, 2, rank=4, generator=seeded()), cells)
    # Other singular vectors and values of the same subspaces.
    u, _, vt = torch.linalg.svd(scaled, full_matrices=False)
    turns = torch.linalg.qr(torch.randn(6, 4, 4, generator=generator))[0]
    assert torch.equal(place_experts(u[:, :, :4] @ turns @ vt[:, :4], 3, 2, rank=4, generator=seeded()), cells)
    # All outputs turned alike: only the angles between subspaces count.
    across = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator))[0]
    assert torch.equal(place_experts(across @ scaled, 3, 2, rank=4, generator=seeded()), cells)


def test_placing_pays(generator):
    # 3 input and 3 output subspaces, shuffled: with each where it belongs, rank 3 * 4 holds everything.
    lefts, rights = subspaces(OUT, 4, 3, generator), subspaces(IN, 4, 3, generator)
    kinds = list(itertools.product(range(3), range(3)))
    kinds = [kinds[k] for k in torch.randperm(9, generator=generator).tolist()]
    targets = torch.stack([lefts[a] @ torch.randn(4, 4, generator=generator) @ rights[b].T for a, b in kinds])
    placed = place_experts(targets, 3, 3, rank=4, generator=seeded())
    best, shuffled = (tail(assembled(targets, cells, (3, 3)), 12) for cells in (placed, row_major((3, 3))))
    assert best < 1e-5 and shuffled > 1.0


# ---- the fit ----------------------------------------------------------------------------------------------


def fit(targets, cells, grid, *, rank, type="float16", metrics=None, iterations=4, seed=0):
    return fit_tiles(
        targets, metrics or [PLAIN] * grid[0], cells, grid, rank=rank, factor_type=type, iterations=iterations,
        generator=seeded(seed),
    )  # fmt: skip


@grids
@types
@pytest.mark.parametrize("rank", [1, 6])
def test_a_full_grid_is_fitted_like_the_svd_of_its_tile_matrix(grid, type, rank, generator):
    whole, cells = tile_matrix(grid, 8, 0.5, generator), row_major(grid)
    cells = cells[torch.randperm(len(cells), generator=generator)]
    targets = taken_apart(whole, cells)
    tiles = fit(targets, cells, grid, rank=rank, type=type)
    assert tiles.format.factor_type == type and tiles.rank == rank and tiles.grid == grid
    error = float((targets.double() - parts_of(tiles)).norm())
    optimal = tail(whole.double(), rank)
    assert optimal * (1 - 1e-6) <= error <= 1.01 * optimal


@grids
def test_a_tile_matrix_of_low_rank_is_reproduced(grid, generator):
    whole, cells = tile_matrix(grid, 5, 0.0, generator), row_major(grid)
    targets = taken_apart(whole, cells)
    tiles = fit(targets, cells, grid, rank=5, iterations=8)
    # Two float16 factors, each off by at most 2^-11 of itself; the last pair's rounding stays.
    assert float((targets - parts_of(tiles)).norm()) < 2.0**-11 * float(whole.norm())


@pytest.mark.parametrize("type", ["int8", "e4m3"])
def test_later_pairs_repair_the_rounding_of_earlier_ones(type, generator):
    grid = (2, 2)
    whole, cells = tile_matrix(grid, 3, 0.0, generator), row_major(grid)
    targets = taken_apart(whole, cells)
    first, last = (
        float((targets - parts_of(fit(targets, cells, grid, rank=rank, type=type))).norm() / whole.norm())
        for rank in (3, 9)
    )
    # Each pair's rounding leaves two matrices of rank 1: three times the rank takes them out too, but for their own.
    assert 1e-3 < first < 0.04 and last < 3 * first**2


def test_all_in_one_cell_is_the_svd_of_that_expert(generator):
    target = tile_matrix((1, 1), 4, 0.3, generator)[None]
    tiles = fit(target, row_major((1, 1)), (1, 1), rank=4)
    u, s, vt = torch.linalg.svd(target[0].double())
    expected = u[:, :4] * s[:4] @ vt[:4]
    assert_close(tiles.dense(0, torch.float64), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("experts, grid", [(7, (3, 3)), (8, (3, 3)), (13, (4, 4)), (60, (8, 8))], ids=str)
def test_empty_cells_weigh_on_nothing(experts, grid, generator):
    # Equal experts of rank 6 need no more than rank 6; with zeros in the empty cells 12 to 30 % would be left.
    one = torch.randn(OUT, 6, generator=generator) @ torch.randn(6, IN, generator=generator)
    cells, targets = row_major(grid)[:experts], one.expand(experts, -1, -1)
    tiles = fit(targets, cells, grid, rank=6)
    assert float((targets - parts_of(tiles)).norm() / targets.norm()) < 2e-3
    zeros = torch.linalg.svdvals(assembled(targets, cells, grid))[6:].norm() / targets.double().norm()
    assert float(zeros) > 0.1


@types
@pytest.mark.parametrize("experts, grid", [(5, (3, 2)), (7, (3, 3)), (60, (8, 8))], ids=str)
def test_filled_cells_are_fitted_as_alternating_least_squares_fits_them(type, experts, grid, generator):
    cells = row_major(grid)[torch.randperm(grid[0] * grid[1], generator=generator)[:experts]]
    targets = taken_apart(tile_matrix(grid, 6, 0.3, generator), cells)
    tiles = fit(targets, cells, grid, rank=6, type=type)
    best = alternated(targets.double(), cells.long(), grid, 6)
    assert float((targets - parts_of(tiles)).norm()) < 1.03 * best


def alternated(targets, cells, grid, rank):
    """What 200 sweeps over the filled cells leave, by plain loops."""
    left, right = torch.randn(grid[1], OUT, rank).double(), torch.randn(grid[0], IN, rank).double()
    for _ in range(200):
        for side, other, place, across in ((left, right, 1, 0), (right, left, 0, 1)):
            for j in range(len(side)):
                mine = (cells[:, place] == j).nonzero()[:, 0]
                if len(mine):
                    parts = targets[mine] if place else targets[mine].mT
                    known = torch.cat(list(other[cells[mine, across]]))
                    side[j] = torch.linalg.lstsq(known, torch.cat(list(parts), 1).T).solution.T
    dense = torch.stack([left[j] @ right[i].T for i, j in cells.tolist()])
    return float((targets - dense).norm())


def test_rows_and_columns_without_experts_store_nothing(generator):
    cells = torch.tensor([[0, 1], [2, 1]], dtype=torch.int16)
    targets = taken_apart(tile_matrix((3, 3), 4, 0.3, generator), cells)
    tiles = fit(targets, cells, (3, 3), rank=4, type="int8")
    assert not tiles.rights()[1].any() and not tiles.lefts()[[0, 2]].any()
    alone = torch.tensor([[0, 0], [1, 0]], dtype=torch.int16)
    without = fit(targets, alone, (2, 1), rank=4, type="int8")
    for error in [(targets - parts_of(t)).norm() for t in (tiles, without)]:
        assert float(error) == pytest.approx(tail(assembled(targets, alone, (2, 1)), 4), rel=0.01)


@types
@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (4, 1)], ids=str)
def test_every_row_is_fitted_in_its_own_metric(grid, type, generator):
    factors = factors_of(*grid, generator)
    metrics = [Metric.hessian(factor) for factor in factors]
    cells = row_major(grid)
    targets = taken_apart(tile_matrix(grid, 8, 0.5, generator), cells)

    def seen(parts, order=tuple(range(grid[0]))):
        """``A_e C_i`` in float64."""
        used = [factors[order[i]].double() for i in cells[:, 0].tolist()]
        return torch.stack([part.double() @ factor for part, factor in zip(parts, used, strict=True)])

    tiles = fit(targets, cells, grid, rank=6, type=type, metrics=metrics)
    error = float(seen(targets.double() - parts_of(tiles)).norm())
    optimal = tail(assembled(seen(targets), cells, grid), 6)
    assert optimal * (1 - 1e-5) <= error <= 1.01 * optimal
    # The metrics in another order of rows, and none at all, miss that by far.
    for others in (metrics[1:] + metrics[:1], [PLAIN] * grid[0]):
        other = fit(targets, cells, grid, rank=6, type=type, metrics=others)
        assert float(seen(targets.double() - parts_of(other)).norm()) > 1.05 * optimal


@types
def test_weights_far_from_one_are_fitted_alike(type, generator):
    grid, cells = (2, 2), row_major((2, 2))
    targets = taken_apart(tile_matrix(grid, 8, 0.5, generator), cells)
    shares = [
        float((targets - parts_of(fit(targets * size, cells, grid, rank=6, type=type)) / size).norm())
        for size in (1.0, 2.0**-8, 2.0**8)
    ]
    assert shares[1] == pytest.approx(shares[0], rel=0.01) and shares[2] == pytest.approx(shares[0], rel=0.01)


@types
def test_rows_of_very_unequal_inputs_keep_their_precision(type, generator):
    # A row whose inputs are 2^12 times as large: its right factor is as much smaller.
    grid, cells = (2, 2), row_major((2, 2))
    wanted = tile_matrix(grid, 8, 0.5, generator)
    sizes = torch.tensor([1.0, 2.0**-12])
    targets = taken_apart(wanted, cells) * sizes[cells[:, 0].long(), None, None]
    metrics = [Metric.activation(torch.full((IN,), float(1 / size))) for size in sizes]
    tiles = fit(targets, cells, grid, rank=6, type=type, metrics=metrics)
    error = (targets.double() - parts_of(tiles)) / sizes[cells[:, 0].long(), None, None]
    assert float(error.norm()) < 1.02 * tail(wanted.double(), 6)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_targets_alone(generator):
    grid, cells = (3, 2), row_major((3, 2))
    targets = taken_apart(tile_matrix(grid, 8, 0.5, generator), cells)
    before = targets.clone(), cells.clone()
    for type in FACTOR_TYPES:
        first, again, other = (
            fit(targets, cells, grid, rank=4, type=type, iterations=0, seed=seed).tensors() for seed in (0, 0, 1)
        )
        assert all(torch.equal(again[name].double(), tensor.double()) for name, tensor in first.items())
        assert not torch.equal(other["right"].double(), first["right"].double())
    assert torch.equal(targets, before[0]) and torch.equal(cells, before[1])


def test_experts_that_are_all_zero_have_factors_of_zero():
    for type in FACTOR_TYPES:
        tiles = fit(torch.zeros(4, OUT, IN), row_major((2, 2)), (2, 2), rank=3, type=type)
        assert not parts_of(tiles).any()


# ---- what is stored ---------------------------------------------------------------------------------------


@types
@pytest.mark.parametrize("input_scale", [False, True], ids=["", "input scale"])
def test_an_experts_part_is_the_formula_entry_by_entry(type, input_scale, random_tiles):
    tiles = random_tiles(4, 6, (3, 2), type, 5, input_scale=input_scale)

    def entry(expert, o, k):
        i, j = tiles.cells[expert].tolist()
        total = 0.0
        for r in range(3):
            left, right = float(tiles.left[j, o, r]), float(tiles.right[i, r, k])
            if type != "float16":
                left, right = left * float(tiles.left_scale[j, r]), right * float(tiles.right_scale[i, r])
            total += left * right
        return total * (float(tiles.input_scale[expert, k]) if input_scale else 1.0)

    for expert in range(5):
        expected = torch.tensor([[entry(expert, o, k) for k in range(6)] for o in range(4)], dtype=torch.float64)
        assert_close(tiles.dense(expert, torch.float64), expected, rtol=1e-12, atol=1e-12)
        assert_close(tiles.dense(expert).double(), expected, rtol=1e-5, atol=1e-5)


@types
@grids
@pytest.mark.parametrize("input_scale", [False, True], ids=["", "input scale"])
def test_the_stored_bits_are_those_of_the_stored_tensors(type, grid, input_scale, random_tiles):
    experts = grid[0] * grid[1] - (grid[0] > 1 < grid[1])
    tiles = random_tiles(OUT, IN, grid, type, experts, input_scale=input_scale)
    tensors = tiles.tensors()
    counted = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert tiles.format.stored_bits(OUT, IN) == counted
    assert counted <= experts * tiles.format.share(OUT, IN) < counted + experts
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert layout == tiles.format.layout(OUT, IN)


def test_sharing_costs_what_the_paper_counts():
    # Qwen1.5-MoE's gate: 60 experts of 1408 x 2048 on 8 x 8, rank 32 in 8 bits: 0.041 bits a weight.
    format = TileFormat(8, 8, 60, 32, "e4m3")
    assert format.share(1408, 2048) / (1408 * 2048) == pytest.approx(0.041, abs=0.0005)
    # An input scale for each expert is not in that count: 16 / out more.
    scaled = TileFormat(8, 8, 60, 32, "e4m3", True)
    more = scaled.stored_bits(1408, 2048) - format.stored_bits(1408, 2048)
    assert more / (60 * 1408 * 2048) == pytest.approx(16 / 1408, rel=1e-9)
