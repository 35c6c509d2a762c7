"""The change of the input channels against a dense matrix built from its definition."""

import re

import pytest
import torch
from torch.testing import assert_close

from lorq.core.basis import Basis, check_block, hadamard, largest_block

# (width, block, skip); most skips are no multiples of the block.
SIZES = [(12, 4, 0), (12, 4, 8), (13, 4, 1), (30, 8, 6), (40, 16, 8), (67, 32, 3), (96, 0, 0)]
sizes = pytest.mark.parametrize("width, block, skip", SIZES, ids=str)
permuted = pytest.mark.parametrize("is_permuted", [False, True], ids=["in order", "permuted"])
dtypes = pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)


def walsh(size):
    """Sylvester's rule entry by entry: the sign is the parity of the bits that both numbers have."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64)


@pytest.fixture
def basis_of(generator):
    def make(width, block, skip, is_permuted=True, dtype=torch.int64):
        order = torch.randperm(width, generator=generator).to(dtype) if is_permuted else None
        return Basis(order, block, skip)

    return make


def dense(basis, width):
    """T = P Q, element by element."""
    p, q = torch.zeros(width, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    for place in range(width):
        channel = place if basis.permutation is None else int(basis.permutation[place])
        p[channel, place] = 1.0
    for start in range(basis.skip, width, basis.block) if basis.block else []:
        block = slice(start, start + basis.block)
        q[block, block] = walsh(basis.block) / basis.block**0.5
    return p @ q


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 256])
def test_hadamard_is_sylvesters_matrix_symmetric_and_its_own_inverse(size):
    h = hadamard(size, dtype=torch.float64)
    assert torch.equal(h, walsh(size) / size**0.5)
    assert torch.equal(h, h.T)
    assert_close(h @ h, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(hadamard(size, dtype=torch.bfloat16), h.to(torch.bfloat16))


@pytest.mark.parametrize("size", [0, 3, 12, -4])
def test_a_hadamard_matrix_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"power of two, got {size}$"):
        hadamard(size)


@sizes
@permuted
@dtypes
def test_rotate_is_the_product_with_the_dense_matrix(width, block, skip, is_permuted, dtype, basis_of, generator):
    basis = basis_of(width, block, skip, is_permuted, dtype)
    t = dense(basis, width)
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    before = x.clone()
    assert_close(t @ t.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(basis.rotate(x), x @ t, rtol=1e-13, atol=1e-13)
    assert_close(basis.unrotate(x), x @ t.T, rtol=1e-13, atol=1e-13)
    assert_close(basis.unrotate(basis.rotate(x)), x, rtol=1e-13, atol=1e-13)
    assert_close(basis.rotate(basis.unrotate(x)), x, rtol=1e-13, atol=1e-13)
    assert torch.equal(x, before)


def test_the_new_channel_j_is_the_old_channel_permutation_j():
    basis = Basis(torch.tensor([2, 0, 1]), 0, 0)
    assert torch.equal(basis.rotate(torch.tensor([10.0, 20.0, 30.0])), torch.tensor([30.0, 10.0, 20.0]))
    assert torch.equal(basis.unrotate(torch.tensor([30.0, 10.0, 20.0])), torch.tensor([10.0, 20.0, 30.0]))


def test_the_skipped_places_hold_the_first_channels_bit_for_bit(basis_of, generator):
    basis = basis_of(40, 16, 8)
    x = torch.randn(5, 40, generator=generator)
    assert torch.equal(basis.rotate(x)[:, :8], x[:, basis.permutation[:8]])


@sizes
@permuted
def test_a_hessian_turns_with_its_inputs_and_outputs_stay(width, block, skip, is_permuted, basis_of, generator):
    basis = basis_of(width, block, skip, is_permuted)
    t = dense(basis, width)
    weight = torch.randn(7, width, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / len(x)
    turned = basis.rotate_hessian(hessian)
    assert_close(turned, t.T @ hessian @ t, rtol=1e-12, atol=1e-12)
    assert torch.equal(turned, turned.T)
    assert_close(basis.rotate(x) @ basis.rotate(weight).T, x @ weight.T, rtol=1e-12, atol=1e-12)
    single = basis.rotate_hessian(hessian.float())
    assert torch.equal(single, single.T)


@pytest.mark.parametrize("width", [576, 1536])
def test_real_widths_have_a_block(width, basis_of, generator):
    block = largest_block(width)
    check_block(width, block, 0)
    check_block(width, block, block)
    for skip in (0, block):
        basis = basis_of(width, block, skip)
        x = torch.randn(4, width, generator=generator, dtype=torch.float64)
        assert_close(basis.rotate(x), x @ dense(basis, width), rtol=1e-12, atol=1e-12)


def test_rotate_keeps_low_precision_and_its_size(basis_of, generator):
    x = torch.randn(64, 96, generator=generator)
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        turned = basis_of(96, 32, 0).rotate(x.to(dtype))
        assert turned.dtype == dtype
        # The transform's entries and its result are rounded once each.
        assert_close(turned.double().norm(), x.double().norm(), rtol=2 * step, atol=0)


@pytest.mark.parametrize(
    "width, largest", [(576, 64), (1536, 256), (4096, 256), (11008, 256), (96, 32), (98, 2), (33, 1), (256, 256)]
)
def test_the_largest_block_is_the_largest_power_of_two_that_divides(width, largest):
    by_hand = max(2**k for k in range(9) if width % 2**k == 0)
    assert largest_block(width) == by_hand == largest


@pytest.mark.parametrize(
    "width, block, skip",
    [(96, 64, 0), (96, 24, 0), (96, 32, 16), (98, 2, 0), (64, 64, 64), (64, 32, -32), (96, 0, 0), (96, -32, 0)],
    ids=str,
)
def test_blocks_that_do_not_fit_are_refused_and_those_named_do_fit(width, block, skip):
    with pytest.raises(ValueError, match=f"got block {block} for width {width} less {skip};") as caught:
        check_block(width, block, skip)
    named = re.search("blocks that fit: (.*)$", str(caught.value)).group(1)
    if skip < 0:
        return  # no block mends that
    fits = [2**k for k in range(2, 20) if 0 < 2**k <= width - skip and (width - skip) % 2**k == 0]
    assert named == (", ".join(map(str, fits)) or "none")
    for size in fits:
        check_block(width, size, skip)


def test_a_matrix_that_was_made_while_measuring_serves_training():
    hadamard.cache_clear()
    with torch.inference_mode():
        matrix = hadamard(4)
    assert not matrix.is_inference()
