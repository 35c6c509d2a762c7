"""The quantized-linear and the rotating operator against dense float64 products."""

import itertools
import math

import pytest
import torch
from helpers import layer_format
from torch.testing import assert_close

from lorq.core.activations import quantize_activations
from lorq.core.basis import Basis
from lorq.core.codes import levels
from lorq.kernels import KERNELS, fake_quantize, implementation, multiply, quant_linear, rotate
from lorq.kernels.operands import STORED_NAMES
from lorq.kernels.reference import quant_linear_reference, rotate_reference

# Decibels that are kept at least. float32 decodes exactly and rounds its sums; bfloat16 and float16 round the
# weight, the inputs of the low-rank part and the output once each, to 8 and 11 bits: 2^-9 is 54 dB, 2^-12 72 dB.
SQNR_DB = {torch.float64: 250, torch.float32: 120, torch.float16: 62, torch.bfloat16: 44}

dtypes = pytest.mark.parametrize("dtype, floor", SQNR_DB.items(), ids=[str(dtype) for dtype in SQNR_DB])
FORMATS = {
    "asymmetric": layer_format(3, 16, False),
    "symmetric": layer_format(4, 16, True),
    "16-bit factors": layer_format(2, 16, True, 3, "float16"),
    "8-bit factors": layer_format(5, 48, False, 3, "int8"),
    "e4m3 factors": layer_format(3, 16, True, 3, "e4m3"),
    "vectors of 4": layer_format(2, 48, True, vector=4, codebook_rows=1, codebook_columns=16),
    "vectors of 2": layer_format(3, 24, True, 3, "int8", vector=2, codebook_rows=1, codebook_columns=24),
    "normal floats": layer_format(4, 16, True, grid="normal-float"),
    "a scale for each": layer_format(3, 48, True, 2, "int8", scale_rank=3),
    "normal floats, a scale for each": layer_format(2, 48, True, grid="normal-float", scale_rank=2),
}
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def operands(weight):
    """What the operator takes after ``x``."""
    tensors = weight.tensors()
    codes = weight.codes.format
    if codes.kind == "levels" and codes.levels != "integer":
        tensors["levels"] = levels(codes.levels, codes.bits)
    return *(tensors.get(name) for name in STORED_NAMES), codes.bits


def looked_up(codes, codebook):
    """Codebook entries code by code, (out, in)."""
    (out, vectors), (row_tiles, column_tiles) = codes.shape, codebook.scale.shape
    rows, columns = torch.arange(out)[:, None] * row_tiles // out, torch.arange(vectors) * column_tiles // vectors
    found = codebook.entries[rows, columns, codes.long()].double()  # (out, vectors, vector)
    return (found * codebook.scale[rows, columns, None].double()).flatten(1)


def dense(weight):
    """The matrix in float64, straight from the parts, rounded to float32 where decoding in float32 rounds."""
    codes, bits, scale = weight.codes.codes, weight.format.bits, weight.codes.scale
    if weight.codes.format.kind == "vectors":
        values = looked_up(codes, weight.codes.codebook)
    elif weight.codes.format.kind == "levels":
        values = levels(weight.codes.format.levels, bits).double()[codes.long()]
    else:
        zero = weight.codes.zero_point
        zero = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(codes.shape[1] // zero.shape[1], 1)
        values = codes.double() - zero
    if not isinstance(scale, torch.Tensor):
        matrix = values * (scale.left.float() @ scale.right.float()).double()
    else:
        matrix = (values.unflatten(1, (scale.shape[1], -1)) * scale.double().unsqueeze(-1)).flatten(1)
    # Codes times a scale of 11 bits fit float32; two scales of a codebook, levels and products of factors do not.
    if weight.codes.format.kind != "integer":
        matrix = matrix.float().double()
    if weight.low_rank:
        left, right = weight.low_rank.left.double(), weight.low_rank.right.double()
        if weight.low_rank.left_scale is not None:
            left, right = left * weight.low_rank.left_scale, right * weight.low_rank.right_scale.unsqueeze(1)
        matrix = matrix + left @ right
    return matrix


def sqnr_db(expected, y):
    noise = float(torch.linalg.vector_norm(expected - y.double()))
    return 20 * math.log10(float(torch.linalg.vector_norm(expected)) / noise) if noise else math.inf


@dtypes
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_shape_matches_the_dense_product(bits, dtype, floor, random_weight, generator):
    shapes = [(7, 48), (33, 80), (1, 16), (64, 160)]
    for (out, in_), symmetric, (rank, factor_type) in itertools.product(
        shapes, (False, True), ((0, "float16"), (1, "float16"), (5, "int8"))
    ):
        weight = random_weight(out, in_, layer_format(bits, 16, symmetric, min(rank, out), factor_type))
        x = torch.randn(9, in_, generator=generator).to(dtype)
        y = quant_linear(x, *operands(weight))
        assert y.dtype == dtype
        assert sqnr_db(x.double() @ dense(weight).T, y) > floor, (out, in_, weight.format)


@dtypes
@pytest.mark.parametrize("bits, vector", [(2, 4), (3, 2), (4, 2), (1, 8), (2, 2)])
def test_every_codebook_and_shape_matches_the_dense_product(bits, vector, dtype, floor, random_weight, generator):
    shapes = [(7, 48, 7, 16), (32, 80, 8, 80), (15, 16, 1, 8), (64, 160, 32, 32)]
    for (out, in_, rows, columns), groups, (rank, factor_type) in itertools.product(
        shapes, (1, 2), ((0, "float16"), (1, "float16"), (5, "int8"), (3, "e4m3"))
    ):
        if groups == 2 and columns == in_:
            continue  # a group is at least as wide as a codebook
        size = in_ if groups == 1 else columns
        format = layer_format(bits, size, True, min(rank, out), factor_type, vector, rows, columns)
        weight = random_weight(out, in_, format)
        x = torch.randn(9, in_, generator=generator).to(dtype)
        y = quant_linear(x, *operands(weight))
        assert y.dtype == dtype
        assert sqnr_db(x.double() @ dense(weight).T, y) > floor, (out, in_, weight.format)


@dtypes
@formats
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (100,), (2, 3, 5), (0,)], ids=str)
def test_leading_dimensions_are_tokens(batch, format, dtype, floor, random_weight, generator):
    weight = random_weight(31, 48, format)
    x = torch.randn(*batch, 48, generator=generator).to(dtype)
    before = x.clone()
    y = quant_linear(x, *operands(weight))
    assert y.shape == (*batch, 31)
    if x.numel():
        assert sqnr_db(x.double() @ dense(weight).T, y) > floor
    assert torch.equal(x, before)


@formats
def test_inputs_need_not_be_contiguous(format, random_weight, generator):
    weight = random_weight(7, 48, format)
    x = torch.randn(48, 6, 4, generator=generator, dtype=torch.float64).permute(2, 1, 0)[::2]
    assert_close(quant_linear(x, *operands(weight)), x @ dense(weight).T, rtol=1e-12, atol=1e-12)


def test_large_codes_are_decoded_before_they_are_rounded(random_weight, generator):
    # 255 - 128 steps take 7 bits, a scale 11: the product is exact in float32 and must be rounded only once.
    weight = random_weight(32, 64, layer_format(8, 64, True))
    x = torch.eye(64, dtype=torch.bfloat16)
    assert torch.equal(quant_linear(x, *operands(weight)), dense(weight).T.to(torch.bfloat16))


@formats
def test_the_operator_is_registered_as_torch_wants_it(format, random_weight, generator):
    weight = random_weight(7, 48, format)
    x = torch.randn(2, 3, 48, generator=generator, requires_grad=True)
    # Not its test with dynamic shapes: sizes are symbols there, which the annotations' checks take for no int.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    # torch 2.13: the check of the schema compares its arguments by a sum that float8 does not have.
    checks = checks[format.factor_type == "e4m3" :]
    torch.library.opcheck(quant_linear, (x, *operands(weight)), test_utils=checks)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fake_output_is_like_the_real_one(format, dtype, random_weight, generator):
    weight = random_weight(7, 48, format)
    x = torch.randn(2, 3, 48, generator=generator).to(dtype)
    real = quant_linear(x, *operands(weight))
    meta = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in operands(weight)]
    fake = quant_linear(x.to("meta"), *meta)
    assert fake.is_meta
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@formats
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_the_gradient_is_that_of_the_dense_layer_and_of_finite_differences(format, batch, random_weight, generator):
    weight = random_weight(3, 48, format)
    x = torch.randn(*batch, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*batch, 3, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(quant_linear(x, *operands(weight)), x, grad)
    (expected,) = torch.autograd.grad(x @ dense(weight).T, x, grad)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    parts = operands(weight)
    assert torch.autograd.gradcheck(lambda x: quant_linear(x, *parts), x, fast_mode=True)


@pytest.mark.parametrize("dtype, floor", [(torch.float32, 120), (torch.bfloat16, 44)], ids=["float32", "bfloat16"])
def test_the_gradient_has_the_dtype_and_precision_of_the_inputs(dtype, floor, random_weight, generator):
    weight = random_weight(33, 48, FORMATS["8-bit factors"])
    x = torch.randn(4, 48, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(4, 33, generator=generator).to(dtype)
    (found,) = torch.autograd.grad(quant_linear(x, *operands(weight)), x, grad)
    assert found.dtype == dtype
    assert sqnr_db(grad.double() @ dense(weight), found) > floor


# Positions of scale_left and scale_right among the operator's arguments.
FACTORS = slice(1 + STORED_NAMES.index("scale_left"), 3 + STORED_NAMES.index("scale_left"))
scaled = pytest.mark.parametrize(
    "format", [FORMATS["a scale for each"], FORMATS["normal floats, a scale for each"]], ids=["integer", "normal-float"]
)


def learning(weight, x, dtype):
    """The operator's arguments with factors of the scale that learn, and a function of these with the same values."""
    arguments = [x, *operands(weight)]
    factors = [part.to(dtype).requires_grad_() for part in arguments[FACTORS]]
    arguments[FACTORS] = factors
    table = levels(weight.codes.format.levels, weight.format.bits).double()[weight.codes.codes.long()]
    rest = weight.low_rank.dense(torch.float64) if weight.low_rank else 0

    def formula(x, left, right):
        return x @ (table * (left @ right) + rest).T

    return arguments, factors, formula


@scaled
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("strip", [50, 1 << 22], ids=["row by row", "at once"])
def test_factors_of_the_scale_have_the_gradients_of_the_dense_formula(
    strip, batch, format, random_weight, generator, monkeypatch
):
    monkeypatch.setattr("lorq.kernels.reference._STRIP_ENTRIES", strip)
    weight = random_weight(7, 48, format)
    x = torch.randn(*batch, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*batch, 7, generator=generator, dtype=torch.float64)
    arguments, factors, formula = learning(weight, x, torch.float64)
    found = torch.autograd.grad(quant_linear(*arguments), (x, *factors), grad)
    expected = torch.autograd.grad(formula(x, *factors), (x, *factors), grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, rtol=1e-5, atol=1e-5)  # scales are multiplied and gradients summed in float32


@scaled
def test_gradients_of_the_scales_factors_are_those_of_finite_differences(format, random_weight, generator):
    weight = random_weight(5, 48, format)
    x = torch.randn(4, 48, generator=generator, dtype=torch.float64)
    arguments, factors, _ = learning(weight, x, torch.float64)

    def run(left, right):
        arguments[FACTORS] = left, right
        return quant_linear(*arguments)

    # The matrix is decoded in float32: differences over a hundredth are exact to about 1e-4. It is linear in each
    # factor.
    assert torch.autograd.gradcheck(run, factors, eps=1e-2, atol=1e-3, rtol=1e-3, fast_mode=True)


@scaled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_scales_factors_have_their_dtype_and_are_left_out_where_nothing_learns(
    dtype, format, random_weight, generator
):
    weight = random_weight(7, 48, format)
    x = torch.randn(4, 48, generator=generator).to(dtype)
    arguments, factors, formula = learning(weight, x, dtype)
    grad = torch.randn(4, 7, generator=generator).to(dtype)
    found = torch.autograd.grad(quant_linear(*arguments), factors, grad)
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    expected = torch.autograd.grad(formula(x.double(), *wide), wide, grad.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and sqnr_db(other, one) > SQNR_DB[dtype] - 6
    assert not quant_linear(x, *operands(weight)).requires_grad


@scaled
def test_the_operator_with_factors_that_learn_is_registered_as_torch_wants_it(format, random_weight, generator):
    x = torch.randn(2, 48, generator=generator, requires_grad=True)
    arguments, *_ = learning(random_weight(7, 48, format), x, torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(quant_linear, tuple(arguments), test_utils=checks)


# ---- the table --------------------------------------------------------------------------------------------


def check_row(kernels, format, random_weight, generator, device, floors=SQNR_DB):
    """What every row of the table promises, on one format."""
    weight, product = random_weight(33, 48, format), kernels.products["quant_linear"]
    parts = [part.to(device) if isinstance(part, torch.Tensor) else part for part in operands(weight)]
    order, block, skip = torch.randperm(48, generator=generator).to(torch.int16), 16, 16
    turned = Basis(order, block, skip).rotate(torch.eye(48, dtype=torch.float64))
    for dtype, floor in floors.items():
        assert product.few_tokens(dtype) >= (1 if dtype != torch.float64 else 0)
        for tokens in (1, 9, 70):
            x = torch.randn(tokens, 48, generator=generator).to(dtype)
            y = product.multiply(x.to(device), *parts)
            assert y.dtype == dtype and sqnr_db(x.double() @ dense(weight).T, y.cpu()) > floor, (tokens, dtype)
            z = kernels.turn(x.to(device), order.to(device), block, skip)
            assert z.dtype == dtype and sqnr_db(x.double() @ turned, z.cpu()) > floor
            back = kernels.turn(z, order.to(device), block, skip, True).cpu()
            assert sqnr_db(x.double(), back) > floor - 6


@pytest.mark.parametrize("device", KERNELS)
@formats
def test_every_row_of_the_table_is_the_dense_product_on_its_device(device, format, random_weight, generator):
    if device != "cpu" and not getattr(torch, device).is_available():
        pytest.skip(f"this machine has no {device}")
    check_row(KERNELS[device], format, random_weight, generator, device)


@pytest.mark.parametrize("device", KERNELS)
@formats
def test_every_row_of_the_table_says_why_not_and_the_reference_runs_there(device, format, random_weight, generator):
    kernels, elsewhere, float64 = KERNELS[device], torch.device("meta"), torch.float64
    assert kernels.declines(format, 48, elsewhere, torch.float32) == "the device is meta"
    assert kernels.declines(format, 48, torch.device(device), float64) == "inputs are torch.float64"
    assert isinstance(kernels.declines_experts(format, 48, elsewhere, torch.float32, 1.0), str)
    by = implementation(format, 48, torch.device(device), float64)
    assert by.name == "reference (torch)" and by.declined == {kernels.name: "inputs are torch.float64"}
    parts, x = operands(random_weight(7, 48, format)), torch.randn(3, 48, generator=generator, dtype=float64)
    multiply = kernels.products["quant_linear"].multiply
    assert torch.equal(multiply(x, *parts), quant_linear_reference(x, *parts))
    assert torch.equal(kernels.turn(x, None, 16, 0), rotate_reference(x, None, 16, 0))


def test_words_that_do_not_fit_the_inputs_width_are_refused_with_both_numbers(random_weight, generator):
    parts, x = operands(random_weight(7, 48, FORMATS["asymmetric"])), torch.randn(2, 96, generator=generator)
    said = r"96 codes of 3 bits take 9 words per row, got packed words of shape \(7, 5\)"
    with pytest.raises(ValueError, match=said):
        multiply(x, *parts)
    # Through torch's own operator an error of Python's may come out as one of torch's.
    with pytest.raises((ValueError, RuntimeError), match=said):
        quant_linear(x, *parts)


# ---- fake_quantize ----------------------------------------------------------------------------------------

GRIDS = {"token": (None, None), "tensor": (torch.tensor([0.01]), torch.tensor([100], dtype=torch.int32))}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounded_activations_are_their_codes_decoded_in_the_dtype_of_the_inputs(dtype, grid, generator):
    for batch in ((), (1,), (2, 5), (0,)):
        x = torch.randn(*batch, 48, generator=generator).to(dtype)
        before = x.clone()
        y = fake_quantize(x, *grid)
        codes, scale, zero = quantize_activations(x, *grid)
        assert torch.equal(y, ((codes - zero) * scale).to(dtype)) and y.dtype == dtype
        assert torch.equal(x, before)
        if dtype == torch.float32:
            assert_close(fake_quantize(y, *grid), y)  # what is on the grid stays


@grids
def test_fake_quantize_is_registered_as_torch_wants_it(grid, generator):
    x = torch.randn(2, 3, 48, generator=generator, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(fake_quantize, (x, *grid), test_utils=checks)
    fake = fake_quantize(x.to("meta"), *(part if part is None else part.to("meta") for part in grid))
    assert fake.is_meta and (fake.shape, fake.stride()) == (x.shape, x.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_pass_straight_through_a_tokens_own_range(dtype, generator):
    x = torch.randn(5, 48, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(5, 48, generator=generator).to(dtype)
    (found,) = torch.autograd.grad(fake_quantize(x, None, None), x, grad)
    assert found.dtype == dtype and torch.equal(found, grad)


def test_values_outside_a_fixed_range_have_no_gradient():
    # The grid reaches from -1 to 1.55; half a step beyond still rounds to its ends.
    x = torch.tensor([-9.0, -1.006, -1.004, 0.0, 1.554, 1.556, 9.0], requires_grad=True)
    (found,) = torch.autograd.grad(fake_quantize(x, *GRIDS["tensor"]), x, torch.full((7,), 3.0))
    assert found.tolist() == [0.0, 0.0, 3.0, 3.0, 3.0, 0.0, 0.0]


# ---- rotate -----------------------------------------------------------------------------------------------

# (permuted, block, skip) for 48 channels.
BASES = {
    "nothing": (False, 0, 0),
    "permuted": (True, 0, 0),
    "rotated": (False, 16, 0),
    "partly rotated": (False, 8, 24),
    "both": (True, 16, 16),
}
bases = pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
directions = pytest.mark.parametrize("inverse", [False, True], ids=["into", "back"])


def rotation(basis, generator, dtype=torch.int16):
    """The operator's operands after ``x``, and T in float64."""
    permuted, block, skip = basis
    order = torch.randperm(48, generator=generator).to(dtype) if permuted else None
    return (order, block, skip), Basis(order, block, skip).rotate(torch.eye(48, dtype=torch.float64))


@bases
@directions
@dtypes
def test_rotating_is_the_dense_product(basis, inverse, dtype, floor, generator):
    parts, t = rotation(basis, generator)
    for batch in ((), (1,), (2, 5), (0,)):
        x = torch.randn(*batch, 48, generator=generator).to(dtype)
        before = x.clone()
        y = rotate(x, *parts, inverse)
        assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
        assert y.data_ptr() != x.data_ptr() or not x.numel()
        if x.numel():
            assert sqnr_db(x.double() @ (t.T if inverse else t), y) > floor
            back = rotate(y, *parts, not inverse)
            assert sqnr_db(x.double(), back) > floor - 6  # twice the noise, in amplitude


@bases
@directions
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_rotate_is_registered_as_torch_wants_it(basis, inverse, dtype, generator):
    parts, _ = rotation(basis, generator, dtype)
    x = torch.randn(2, 3, 48, generator=generator, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(rotate, (x, *parts, inverse), test_utils=checks)


@bases
@directions
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 0, 1, 2), (0, 3, 1, 2)], ids=str)
def test_the_fake_image_is_like_the_real_one(basis, inverse, order, generator):
    parts, t = rotation(basis, generator)
    x = torch.randn(2, 3, 5, 48, generator=generator, dtype=torch.float64)
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])  # the same in another layout
    real = rotate(x, *parts, inverse)
    fake = rotate(
        x.to("meta"), *(part.to("meta") if isinstance(part, torch.Tensor) else part for part in parts), inverse
    )
    assert fake.is_meta
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert_close(real, x @ (t.T if inverse else t), rtol=1e-12, atol=1e-12)


@bases
@directions
def test_the_gradient_of_a_rotation_is_the_rotation_back(basis, inverse, generator):
    parts, t = rotation(basis, generator)
    x = torch.randn(2, 3, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 48, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(rotate(x, *parts, inverse), x, grad)
    assert_close(found, grad @ (t if inverse else t.T), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *parts, inverse), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, *parts, inverse), x, fast_mode=True)
