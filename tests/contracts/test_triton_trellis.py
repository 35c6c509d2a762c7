"""Trellis codes in Triton: against the dense product in the interpreter, and compiled for three devices."""

import itertools

import pytest
import torch
from test_trellis_kernels import FACTORS, SHAPES, dense, layer_format, operands
from test_triton import SQNR_DB, check_usage, compiled, interpreted, sqnr_db
from test_triton import launches as launches
from test_triton import whole_interpreter as whole_interpreter

from lorq.kernels import triton_linear, triton_trellis
from lorq.kernels.reference_trellis import STORED_NAMES


@interpreted
@pytest.mark.parametrize("bits", range(1, 7))
def test_trellis_tiles_are_the_dense_product(bits, random_weight, generator, whole_interpreter):
    draws = itertools.cycle(SQNR_DB.items())
    cases = zip((1, 3, 17, 70), itertools.cycle(SHAPES[1:4]), itertools.cycle(FACTORS), strict=False)
    for tokens, (out, in_), factors in cases:
        weight = random_weight(out, in_, layer_format(out, bits, min(16, bits + 4 + tokens % 7), *factors))
        for dtype, floor in (next(draws), next(draws)):
            x = torch.randn(tokens, in_, generator=generator).to(dtype)
            y = triton_trellis.linear(x, *operands(weight))
            assert y.dtype == dtype and y.shape == (tokens, out)
            assert sqnr_db(x.double() @ dense(weight).T, y) > floor, (tokens, dtype, weight.format)


@interpreted
def test_trellis_sums_over_several_spans_are_the_dense_product(random_weight, generator):
    weight = random_weight(20, 4112, layer_format(20, 3, 12, 3, "int8"))
    for tokens in (1, 5):
        tile = triton_trellis.choose_tile(tokens, torch.float32)
        assert -(-4112 // triton_linear.span_of(20, 4112, tile)) > 1
        x = torch.randn(tokens, 4112, generator=generator)
        y = triton_trellis.linear(x, *operands(weight))
        assert sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[torch.float32]


@compiled
@pytest.mark.parametrize("bits, tokens, dtype, names", [
    (3, 1, torch.bfloat16, ["project", "trellis_products"]),
    (3, 16, torch.bfloat16, ["project", "trellis_products", "finish"]),
    (2, 64, torch.bfloat16, ["project", "trellis_products", "finish"]),
    (4, 32, torch.float32, ["project", "trellis_products", "finish"]),
    (6, 512, torch.bfloat16, ["trellis_decode"]),
])  # fmt: skip
def test_the_tiles_of_trellis_codes_fit_the_devices(bits, tokens, dtype, names, launches, tmp_path):
    format = layer_format(4096, bits, 12, 32, "int8")
    tensors = {
        name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in format.layout(4096, 4096).items()
    }
    codes, x = format.codes, torch.empty(tokens, 4096, dtype=dtype, device="meta")
    triton_trellis.linear(x, *(tensors.get(name) for name in STORED_NAMES), bits, codes.window, codes.length)
    assert [kernel.__name__ for kernel, _, _ in launches] == names
    check_usage((f"trellis, {bits} bits", str(dtype)[6:], tokens), launches, tmp_path)
