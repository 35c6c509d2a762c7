"""Products with trellis codes: the operator, and the C++ kernels of every instruction set that this machine has."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_kernels import SQNR_DB, sqnr_db
from torch.testing import assert_close

from lorq.core.codes import IntGrid, TrellisGrid
from lorq.core.weight import LayerFormat
from lorq.kernels import cpu, cpu_trellis, implementation, multiply, trellis_linear
from lorq.kernels.reference_trellis import STORED_NAMES, trellis_linear_reference
from lorq.runtime.linear import QuantLinear

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (out, in): heights that fill no tile, widths that end in the middle of a register and of a strip of 512 columns.
SHAPES = [(16, 32), (7, 5), (33, 77), (100, 512), (48, 530), (20, 1100)]
FACTORS = [(0, "float16"), (5, "int8"), (3, "e4m3"), (4, "float16")]


def layer_format(out, bits, window, rank=0, type="float16"):
    return LayerFormat(TrellisGrid.of(out, bits, window), rank, type)


def formats():
    """(out, format, in): every width with windows of every kind, all shapes and factors in turn."""
    others = itertools.cycle(itertools.product(SHAPES, FACTORS))
    for bits in range(1, 7):
        for window in sorted({bits + 4, 8, 12, 13, 16}):
            if window >= bits + 4:
                (out, in_), factors = next(others)
                yield out, layer_format(out, bits, window, *factors), in_


def operands(weight):
    """What the operator takes after ``x``."""
    tensors, codes = weight.tensors(), weight.codes.format
    return *(tensors.get(name) for name in STORED_NAMES), codes.bits, codes.window, codes.length


def dense(weight):
    matrix = weight.codes.decode(torch.float64)
    return matrix + weight.low_rank.dense(torch.float64) if weight.low_rank else matrix


def covered(weight, x):
    """The operator's arguments, having made sure that the kernels take them."""
    *tensors, bits, window, length = operands(weight)
    assert cpu_trellis.declines(weight.format, x.shape[-1], CPU, x.dtype) is None
    assert cpu_trellis._WEIGHTS.of(tensors, bits, window, length, x.shape[-1]) is not None
    return *tensors, bits, window, length


# ---- the operator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SQNR_DB, ids=str)
def test_the_reference_is_the_dense_product(dtype, random_weight, generator):
    for out, format, in_ in formats():
        weight = random_weight(out, in_, format)
        x = torch.randn(3, in_, generator=generator).to(dtype)
        y = trellis_linear_reference(x, *operands(weight))
        assert y.dtype == dtype and sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[dtype], (out, in_, format)


@pytest.mark.parametrize("learns", [(), ("weight_scale",), ("left", "right"), ("weight_scale", "left_scale")], ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_inputs_scales_and_factors_have_the_gradients_of_the_dense_formula(learns, batch, random_weight, generator):
    type = "int8" if "left_scale" in learns else "float16"
    weight = random_weight(20, 24, layer_format(20, 2, 12, 3, type))
    tensors = {name: t.double() if name in learns else t for name, t in weight.tensors().items()}
    leaves = [tensors[name].requires_grad_() for name in learns]
    x = torch.randn(*batch, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*batch, 20, generator=generator, dtype=torch.float64)
    y = trellis_linear(x, *(tensors.get(name) for name in STORED_NAMES), *operands(weight)[-3:])
    low_rank = replace(weight.low_rank, **{name: tensors[name] for name in vars(weight.low_rank) if name in tensors})
    matrix = weight.codes.values(torch.float64) * tensors["weight_scale"] + low_rank.dense(torch.float64)
    found = torch.autograd.grad(y, (x, *leaves), grad)
    for one, other in zip(found, torch.autograd.grad(x @ matrix.T, (x, *leaves), grad), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, rtol=1e-5, atol=1e-5)  # the matrix is decoded in float32


def test_the_operator_is_registered_as_torch_wants_it(random_weight, generator):
    arguments = list(operands(random_weight(20, 24, layer_format(20, 3, 12, 3, "float16"))))
    arguments[1] = arguments[1].float().requires_grad_()
    x = torch.randn(2, 3, 24, generator=generator, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(trellis_linear, (x, *arguments), test_utils=checks)


def test_a_layer_runs_the_operator_and_its_implementation_is_named(random_weight, generator):
    weight = random_weight(20, 24, layer_format(20, 3, 12, 3, "int8"))
    layer, x = QuantLinear.from_weight(weight), torch.randn(2, 24, generator=generator)
    assert torch.equal(layer(x), multiply(x, *operands(weight), operator="trellis_linear"))
    assert torch.equal(layer(x), trellis_linear(x, *operands(weight)))
    assert sqnr_db(x.double() @ dense(weight).T, layer(x)) > SQNR_DB[torch.float32]
    by = implementation(weight.format, 24, CPU, torch.float32)
    assert by.name == f"C++ ({cpu.library()[1]})" and not by.declined
    wide = implementation(weight.format, 24, CPU, torch.float64)
    assert wide.name == "reference (torch)" and wide.declined == {"C++": "inputs are torch.float64"}


# In a process of its own: the annotations' checks of the test run cannot be compiled.
_COMPILED = """
import torch
from lorq.core.codes import TrellisGrid
from lorq.core.weight import LayerFormat
from lorq.runtime.linear import QuantLinear

layer = QuantLinear(24, 20, LayerFormat(TrellisGrid(3, 12, 32), 3, "float16"))
for tensor in layer.stored().values():
    tensor.random_(1, 100)
calls = []

def backend(module, inputs):
    calls.extend(node.target for node in module.graph.nodes if node.op == "call_function")
    return module

with torch.no_grad():
    x = torch.randn(2, 24)
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
assert calls == [torch.ops.lorq.trellis_linear.default], calls
"""


@pytest.mark.slow  # make test-kernels runs it
def test_a_compiled_layer_is_one_call_of_the_operator():
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_library_the_reference_runs(monkeypatch, random_weight, generator):
    monkeypatch.setattr(cpu, "library", lambda: (None, "the C++ kernels were not built"))
    weight, x = random_weight(20, 24, layer_format(20, 3, 12)), torch.randn(2, 24, generator=generator)
    assert torch.equal(cpu_trellis.multiply(x, *operands(weight)), trellis_linear_reference(x, *operands(weight)))
    assert implementation(weight.format, 24, CPU, torch.float32).declined == {"C++": "the C++ kernels were not built"}


# ---- every instruction set --------------------------------------------------------------------------------


@dtypes
def test_every_width_window_and_shape_matches_the_dense_product(module, dtype, random_weight, generator):
    for out, format, in_ in formats():
        weight = random_weight(out, in_, format)
        matrix = dense(weight)
        for tokens in (1, 3, 33):
            x = torch.randn(tokens, in_, generator=generator).to(dtype)
            y, expected = cpu_trellis.multiply(x, *covered(weight, x)), x.double() @ matrix.T
            assert y.dtype == dtype and sqnr_db(expected, y) > SQNR_DB[dtype], (out, in_, format, tokens)


@dtypes
def test_decoded_rows_are_those_of_the_reference_bit_for_bit(module, dtype, random_weight):
    for out, format, in_ in formats():
        weight = random_weight(out, in_, format)
        *tensors, bits, window, length = operands(weight)
        seen = cpu_trellis._new_weight(tensors, bits, window, length, in_)
        rows = torch.empty(out, in_, dtype=dtype)
        seen.decode(rows.data_ptr(), 0, out, cpu.TYPES[dtype], 2)
        assert torch.equal(rows, weight.codes.decode().to(dtype))
        if out > 16:
            seen.decode(rows.data_ptr(), 16, 1, cpu.TYPES[dtype], 1)
            assert torch.equal(rows[0], weight.codes.decode()[16].to(dtype))


@dtypes
def test_a_direct_product_does_not_depend_on_the_threads(module, dtype, random_weight, generator):
    weight = random_weight(520, 640, layer_format(520, 3, 12, 7, "int8"))
    x = torch.randn(5, 640, generator=generator).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu_trellis.multiply(x, *operands(weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 3, 48)], ids=str)
def test_batches_and_slices_are_read_as_they_are(module, shape, random_weight, generator):
    weight = random_weight(7, 48, layer_format(7, 4, 12))
    x = torch.randn(*shape[:-1], 97, generator=generator)[..., 1:97:2]  # neither contiguous nor aligned
    y = cpu_trellis.multiply(x, *covered(weight, x))
    assert y.shape == (*shape[:-1], 7)
    assert not y.numel() or sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[torch.float32]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_inputs_that_are_not_finite_come_out_as_the_reference_has_them(module, bad, random_weight, generator):
    weight = random_weight(7, 64, layer_format(7, 3, 12))
    x = torch.randn(2, 64, generator=generator)
    x[1, 5] = bad
    y, expected = cpu_trellis.multiply(x, *covered(weight, x)), trellis_linear_reference(x, *operands(weight))
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert bool(y[0].isfinite().all()) and sqnr_db(expected[0].double(), y[0]) > SQNR_DB[torch.float32]


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20, 1e30], ids=str)
def test_inputs_of_any_size_keep_their_precision(module, size, random_weight, generator):
    weight = random_weight(9, 64, layer_format(9, 4, 12))
    x = torch.randn(1, 64, generator=generator) * size
    y, expected = cpu_trellis.multiply(x, *covered(weight, x)), x.double() @ dense(weight).T
    assert torch.equal(y, expected.float()) if not size else sqnr_db(expected, y) > (120 if size > 1e-37 else 60)


@dtypes
@pytest.mark.parametrize("fill", ["one", "all"])
def test_the_largest_numbers_of_a_type_come_out_right(module, fill, dtype, random_weight, generator):
    weight = random_weight(9, 64, layer_format(9, 4, 12))
    weight = replace(weight, codes=replace(weight.codes, scale=weight.codes.scale / 64))
    x = torch.randn(1, 64, generator=generator).to(dtype)
    x[0, 3 if fill == "one" else slice(None)] = torch.finfo(dtype).max
    y, expected = cpu_trellis.multiply(x, *covered(weight, x)), x.double() @ dense(weight).T
    assert sqnr_db(expected, y) > min(SQNR_DB[dtype], 90)


def test_one_enormous_channel_leaves_the_others_their_precision(module, random_weight, generator):
    weight = random_weight(9, 1024, layer_format(9, 4, 12))
    x = torch.randn(1, 1024, generator=generator)
    x[0, 3] = 3e4
    y, expected = cpu_trellis.multiply(x, *covered(weight, x)), x.double() @ dense(weight).T
    assert sqnr_db(expected, y) > SQNR_DB[torch.float32]
    halves = cpu_trellis.multiply(x.bfloat16(), *covered(weight, x.bfloat16()))
    assert sqnr_db(x.bfloat16().double() @ dense(weight).T, halves) > SQNR_DB[torch.bfloat16]


def test_a_tensor_that_was_written_to_or_replaced_is_seen(module, random_weight, generator):
    first, second = (random_weight(20, 64, layer_format(20, 3, 12)) for _ in range(2))
    x = torch.randn(1, 64, generator=generator)
    arguments, others = list(operands(first)), operands(second)
    before = cpu_trellis.multiply(x, *arguments)
    arguments[1] = others[1]
    replaced = cpu_trellis.multiply(x, *arguments)
    arguments[0].copy_(others[0])
    assert not torch.equal(before, replaced)
    assert torch.equal(cpu_trellis.multiply(x, *arguments), cpu_trellis.multiply(x, *others))


IMPOSSIBLE = {
    **{f"bits {bits}": {"bits": bits} for bits in (0, -1, 2, 7, 2**40)},
    **{f"a window of {window}": {"window": window} for window in (0, -3, 6, 17, 40, 2**40)},
    **{f"sequences of {length}": {"length": length} for length in (0, -16, 20, 48, 2**40)},
    "a tile less": {"packed": lambda t: t[:1]}, "a word less": {"packed": lambda t: t[:, :2]},
    "other widths": {"packed": lambda t: t[..., :48]}, "no width": {"packed": lambda t: t[..., :0]},
    "flat codes": {"packed": lambda t: t.flatten()}, "other words": {"packed": lambda t: t.int()},
    "fewer scales": {"scale": lambda t: t[:16]}, "more scales": {"scale": lambda t: t.repeat(2, 1)},
    "no scales": {"scale": lambda t: t[:0]}, "flat scales": {"scale": lambda t: t.flatten()},
    "wide scales": {"scale": lambda t: t.repeat(1, 2)}, "one scale": {"scale": lambda t: t[0, 0]},
    "a short left": {"left": lambda t: t[:8]}, "another rank": {"left": lambda t: t[:, :1]},
    "a narrow right": {"right": lambda t: t[:, :8]},
    "narrow inputs": {"x": lambda t: t[:, :32]}, "no inputs": {"x": lambda t: t[:, :0]},
    "a number": {"x": lambda t: t[0, 0]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_the_operator_raises_for_what_no_weight_has(wrong, random_weight, generator):
    names = ("x", *STORED_NAMES, "bits", "window", "length")
    weight = random_weight(32, 64, layer_format(32, 3, 12, 2))
    x = torch.randn(2, 64, generator=generator)
    given = dict(zip([n.removeprefix("weight_") for n in names], (x, *operands(weight)), strict=True))
    given |= {name: change(given[name]) if callable(change) else change for name, change in wrong.items()}
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        torch.ops.lorq.trellis_linear(*given.values())


def _batched(f, x):
    return torch.func.vmap(f)(x)


def _functionalized(f, x):
    return torch.func.functionalize(f)(x)


def _jacobian(f, x):
    return x @ torch.func.jacrev(f)(x[0]).T


def _forward_jacobian(f, x):
    return x @ torch.func.jacfwd(f)(x[0]).T


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch imports for them
@pytest.mark.parametrize(
    ("kind", "transform"),
    [
        ("trellis", _functionalized),
        *itertools.product(("trellis", "integer"), (_batched, _jacobian, _forward_jacobian)),
    ],
    ids=str,
)
def test_the_transforms_of_torch_func_go_through_a_layer(kind, transform, random_weight, generator):
    format = layer_format(20, 3, 12, 2) if kind == "trellis" else LayerFormat(IntGrid(3, 16), 2, "int8")
    weight = random_weight(20, 64, replace(format, rotation_block=16))
    layer, x = QuantLinear.from_weight(weight), torch.randn(3, 64, generator=generator)
    assert sqnr_db(layer.dequantize()(x).double(), transform(layer, x).detach()) > 80


def test_tensors_that_do_not_belong_together_are_left_to_the_reference(module, random_weight, generator):
    packed, scale, *rest = operands(random_weight(32, 64, layer_format(32, 3, 12)))
    x = torch.randn(1, 64, generator=generator)
    # Fewer tiles than the scales tell, a width of its own, sequences that end between tiles' rings.
    for wrong in ((packed[:1], scale, *rest), (packed, scale, *rest[:-1], 48), (packed, scale, *rest[:-2], 20, 32)):
        *tensors, bits, window, length = wrong
        assert cpu_trellis._new_weight(tensors, bits, window, length, 64) is None
    with pytest.raises((RuntimeError, ValueError)):
        cpu_trellis.multiply(x[:, :48], packed, scale, *rest)
    wide = scale.float(), packed, scale.double()
    assert torch.equal(
        cpu_trellis.multiply(x, packed, wide[0], *rest), trellis_linear_reference(x, packed, wide[0], *rest)
    )
