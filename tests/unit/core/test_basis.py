"""The change of the input channels against a dense matrix built from its definition."""

import re

import pytest
import torch
from torch.testing import assert_close

from lorq.core.basis import WHOLE, Basis, check_block, largest_block
from lorq.core.hadamard import hadamard, paley, whole_signs, whole_sizes

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


# ---- the whole width --------------------------------------------------------------------------------------

# Width, the Paley matrix's size and its prime, which rule made it.
WHOLES = {
    12: (12, 11, 1),
    36: (36, 17, 2),
    576: (36, 17, 2),
    1536: (12, 11, 1),
    896: (28, 13, 2),
    64: (1, 0, 0),
    1024: (1, 0, 0),
}
wholes = pytest.mark.parametrize("width", WHOLES)


def paley_by_hand(size, q, rule):
    """Entry by entry, squares found by Euler's criterion."""
    if not rule:
        return torch.ones(1, 1, dtype=torch.float64)

    def chi(n):
        return {0: 0.0, 1: 1.0, q - 1: -1.0}[pow(n % q, (q - 1) // 2, q) if n % q else 0]

    count = size // rule
    k = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            k[i, j] = chi(j - i) if i and j else (0.0 if i == j else 1.0 if not i or rule == 2 else -1.0)
    if rule == 1:
        return k + torch.eye(count, dtype=torch.float64)
    result = torch.zeros(size, size, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            entry = k[i, j] * torch.tensor([[1.0, 1.0], [1.0, -1.0]]) + (i == j) * torch.tensor(
                [[1.0, -1.0], [-1.0, -1.0]]
            )
            result[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = entry
    return result


def sign_by_hand(i):
    """MurmurHash3's finalizer in whole numbers of any size."""
    n = i + 1
    n = ((n ^ (n >> 16)) * 0x85EBCA6B) % 2**32
    n = ((n ^ (n >> 13)) * 0xC2B2AE35) % 2**32
    return -1.0 if (n ^ (n >> 16)) % 2 else 1.0


def whole_by_hand(width):
    """T = D H, as docs/format.md has it."""
    size, q, rule = WHOLES[width]
    signs = torch.tensor([sign_by_hand(i) for i in range(width)], dtype=torch.float64)
    return signs.unsqueeze(1) * torch.kron(paley_by_hand(size, q, rule), walsh(width // size)) / width**0.5


@wholes
@permuted
def test_the_whole_width_is_the_product_with_one_hadamard_matrix(width, is_permuted, basis_of, generator):
    basis, t = basis_of(width, WHOLE, 0, is_permuted), whole_by_hand(width)
    if is_permuted:
        t = torch.zeros_like(t).index_put_((basis.permutation, torch.arange(width)), torch.tensor(1.0).double()) @ t
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    before = x.clone()
    assert_close(t.abs(), torch.full_like(t, width**-0.5), rtol=1e-13, atol=0)  # each channel is in each place alike
    assert_close(t @ t.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(basis.rotate(x), x @ t, rtol=1e-12, atol=1e-12)
    assert_close(basis.unrotate(x), x @ t.T, rtol=1e-12, atol=1e-12)
    hessian = x.flatten(0, 1).T @ x.flatten(0, 1)
    assert_close(basis.rotate_hessian(hessian), t.T @ hessian @ t, rtol=1e-12, atol=1e-10)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [4, 12, 20, 28, 36, 44, 60, 76, 108, 140, 148])
def test_paleys_matrices_are_orthogonal_and_of_one_magnitude(size):
    h = paley(size, dtype=torch.float64)
    assert_close(h.abs(), torch.full_like(h, size**-0.5), rtol=1e-15, atol=0)
    assert_close(h @ h.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 9, 18, 16, 52, 172])
def test_sizes_that_paleys_rules_do_not_give_are_refused(size):
    with pytest.raises(ValueError, match=f"or 2 \\(q \\+ 1\\) for a prime q \\(3 or 1 modulo 4\\), got {size}$"):
        paley(size)


# Widths of models in use: SmolLM2, Qwen, Gemma, Llama, Phi, Mistral.
@pytest.mark.parametrize(
    "width, sizes",
    [
        (576, (36, 16)), (640, (20, 32)), (896, (28, 32)), (1152, (36, 32)), (1536, (12, 128)), (2048, (64, 32)),
        (2560, (20, 128)), (3072, (12, 256)), (4096, (64, 64)), (4864, (76, 64)), (5120, (20, 256)), (8192, (128, 64)),
        (8960, (140, 64)), (11008, (5504, 2)), (13824, (108, 128)), (14336, (28, 32, 16)), (18944, (148, 128)),
        (1, (1,)),
    ],
)  # fmt: skip
def test_real_widths_have_a_matrix(width, sizes):
    assert whole_sizes(width) == sizes
    check_block(width, WHOLE, 0)


@pytest.mark.parametrize("width", [0, 9, 90, 98, 184 // 2])
def test_widths_without_a_matrix_are_refused(width):
    with pytest.raises(ValueError, match=f"got width {width}; rotate in blocks instead$"):
        check_block(width, WHOLE, 0)
    with pytest.raises(ValueError, match="got block -1 for width 64 less 4"):
        check_block(64, WHOLE, 4)


def test_signs_are_as_good_as_random():
    signs = whole_signs(4096, dtype=torch.float64)
    assert abs(float(signs.mean())) < 4 / 64  # four standard errors
    spectrum = signs @ hadamard(4096, dtype=torch.float64)
    assert float(spectrum.abs().max()) < 4.5  # of 4096 standard normal numbers; without signs it would be 64


def test_the_whole_width_is_rounded_once(generator):
    x = torch.randn(64, 576, generator=generator)
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        turned, exact = Basis(None, WHOLE, 0).rotate(x.to(dtype)), Basis(None, WHOLE, 0).rotate(x.to(dtype).double())
        assert turned.dtype == dtype
        assert_close(turned.double(), exact, rtol=1.01 * step, atol=1e-5)
