"""Integers in groups with errors passed on: C++ and the reference give the same codes."""

import pytest
import torch

from lorq.core.codes import IntGrid
from lorq.core.linalg import inverse_factor
from lorq.core.rounding import RangeSearch, gptq
from lorq.core.rounding.gptq import encode_integers_reference
from lorq.core.stats import PreparedHessian
from lorq.kernels import cpu
from lorq.kernels.cpu_rounding import encode

pytestmark = pytest.mark.skipif(cpu.library()[0] is None, reason="no C++ kernels")
SEARCHES = {
    "full range": None, "scale": RangeSearch(20, 0.5, "scale"), "saturate": RangeSearch(20, 0.5, "saturate"),
    "seven trials": RangeSearch(10, 0.7, "scale"),
}  # fmt: skip


def block(rows, count, generator):
    inputs = torch.randn(3 * count, count, generator=generator) * torch.linspace(0.2, 3, count)
    hessian = inputs.T @ inputs / len(inputs)
    return torch.randn(count, rows, generator=generator) * 0.1, inverse_factor(hessian), hessian


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "bits, rows, count, size", [(2, 40, 128, 64), (3, 1, 96, 32), (4, 19, 128, 128), (8, 8, 12, 4)]
)
def test_codes_and_ranges_are_the_references(bits, rows, count, size, symmetric, search, generator):
    columns, upper, hessian = block(rows, count, generator)
    columns[: size // 2, 0] = 0.0
    asked = SEARCHES[search]
    how = bits, symmetric, size, asked.shares() if asked else [], bool(asked and asked.mode == "saturate")
    none = columns.new_empty(0, rows)
    before = columns.clone()
    got = encode(columns, upper, hessian, none, none, *how)
    expected = encode_integers_reference(columns, upper, hessian, none, none, *how)
    assert torch.equal(columns, before)
    # Sums in another order: where two codes or ranges are all but level the other may be taken, and what comes after it
    # in the row is another.
    same = (got[0] == expected[0]).all(0)
    assert float(same.float().mean()) >= (1.0 if rows < 10 else 0.9)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine[:, same], theirs[:, same], rtol=2e-5, atol=2e-6)


def test_given_ranges_are_kept(generator):
    columns, upper, hessian = block(21, 64, generator)
    scale, zero = IntGrid(3, 64).fit(columns.T)
    given = encode(columns, upper, hessian, scale.T, zero.T, 3, False, 256, [], False)
    expected = encode_integers_reference(columns, upper, hessian, scale.T, zero.T, 3, False, 256, [], False)
    assert torch.equal(given[0], expected[0]) and torch.equal(given[1], scale.T) and torch.equal(given[2], zero.T)


def test_the_number_of_threads_makes_no_difference(generator):
    columns, upper, hessian = block(700, 128, generator)
    none, before = columns.new_empty(0, 700), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(encode(columns, upper, hessian, none, none, 3, False, 64, [1.0, 0.9, 0.8], False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_weights_that_no_scale_holds_are_refused(value, generator):
    columns, upper, hessian = block(9, 64, generator)
    columns[5, 3] = value
    none = columns.new_empty(0, 9)
    with pytest.raises(ValueError, match="a scale must fit float16"):
        encode(columns, upper, hessian, none, none, 3, False, 64, [1.0, 0.9], False)


@pytest.mark.parametrize("size, width", [(96, 192), (192, 192), (160, 320), (1, 12)])
def test_groups_that_fill_no_block_round_as_a_column_at_a_time(size, width, generator):
    weight, hessian = torch.randn(24, width, generator=generator), block(1, width, generator)[2]
    codes = gptq(weight, PreparedHessian(hessian, 0.01), IntGrid(4, size), RangeSearch())
    values, upper = codes.decode(), inverse_factor(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width))
    left = weight.clone()
    for i in range(width):  # what was to be rounded when a column's turn came is at most half a step away, or clipped
        missed = left[:, i] - values[:, i]
        inside = (codes.codes[:, i] > 0) & (codes.codes[:, i] < 15)
        assert bool((missed.abs()[inside] <= 0.501 * codes.scale[:, i // size].float()[inside]).all())
        left[:, i + 1 :] -= missed[:, None] / upper[i, i] * upper[i, i + 1 :]
