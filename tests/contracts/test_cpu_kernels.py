"""The C++ kernels of every instruction set that this machine has, against the reference."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import layer_format
from test_kernels import FORMATS, SQNR_DB, dense, operands, sqnr_db

from lorq.kernels import cpu, implementation, multiply, quant_linear
from lorq.kernels.operands import known_sizes
from lorq.kernels.reference import quant_linear_reference, rotate_reference

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
if cpu.library()[0] is None and shutil.which("c++") is None:
    pytest.skip("the C++ kernels are not built, and there is no compiler", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Shapes end in the middle of rows, chunks and blocks of threads; (out, in).
INTEGER = [
    (layer_format(bits, group, symmetric, rank, kind), shape)
    for bits, (group, shape), symmetric, (rank, kind) in product(
        (2, 3, 4, 6, 8),
        [(32, (7, 96)), (64, (33, 576)), (128, (16, 256)), (16, (5, 48)), (96, (2, 96)), (1536, (3, 1536))],
        (False, True),
        [(0, "float16"), (5, "int8")],
    )
]
OTHERS = [
    (layer_format(2, 96, True, vector=4, codebook_rows=1, codebook_columns=16), (7, 96)),
    (layer_format(3, 24, True, 3, "int8", vector=2, codebook_rows=11, codebook_columns=24), (33, 72)),
    (layer_format(1, 16, True, vector=8, codebook_rows=5, codebook_columns=16), (5, 80)),
    # What AVX-512 looks up 64 codes at a time, and fewer.
    (layer_format(3, 512, True, 3, "int8", vector=2, codebook_rows=32, codebook_columns=256), (64, 512)),
    (layer_format(3, 24, True, vector=2, codebook_rows=16, codebook_columns=48), (48, 96)),
    (layer_format(4, 128, True, 2, "float16", vector=2, codebook_rows=16, codebook_columns=64), (16, 256)),
    (layer_format(2, 256, True, vector=4, codebook_rows=16, codebook_columns=256), (32, 512)),
    (layer_format(3, 576, True, 2, "int8", vector=2, codebook_rows=96, codebook_columns=192), (192, 576)),
    (layer_format(3, 88, True, vector=2, codebook_rows=16, codebook_columns=88), (16, 88)),
    (layer_format(2, 96, True, 1, "int8", vector=4, codebook_rows=32, codebook_columns=24), (32, 96)),
    (layer_format(4, 16, True, grid="normal-float"), (9, 80)),
    (layer_format(3, 24, True, 3, "e4m3", grid="normal-float"), (9, 48)),
    (layer_format(2, 80, True, grid="normal-float", scale_rank=2), (6, 80)),
    (layer_format(3, 72, True, 2, "int8", scale_rank=3), (35, 72)),
    (layer_format(4, 72, True, 4, "float16", grid="normal-float", scale_rank=5), (4, 72)),
    (layer_format(8, 48, True, scale_rank=1), (3, 48)),
]


def covered(weight, x):
    """The operator's arguments, having made sure that the kernels take them."""
    assert cpu.declines(weight.format, weight.shape[1], CPU, x.dtype) is None
    arguments = operands(weight)
    assert cpu.weight_of(arguments[:-1], weight.format.bits, weight.shape[1]) is not None
    return arguments


@dtypes
def test_whole_numbers_match_the_dense_product_at_every_width_and_shape(module, dtype, random_weight, generator):
    for format, (out, in_) in INTEGER:
        weight = random_weight(out, in_, format)
        if in_ * format.bits % 32:
            continue
        x = torch.randn(3, in_, generator=generator).to(dtype)
        if cpu.declines_format(format, in_) is not None:
            group = format.codes.group_size
            assert (format.bits == 2 and group in (96, 1536)) or group == 16 or in_ == 96
            continue
        arguments = covered(weight, x)
        y, expected = cpu.multiply(x, *arguments), x.double() @ dense(weight).T
        assert y.dtype == dtype and sqnr_db(expected, y) > SQNR_DB[dtype], (format, out, in_)


@dtypes
def test_codebooks_levels_and_scales_of_low_rank_match_the_dense_product(module, dtype, random_weight, generator):
    for format, (out, in_) in OTHERS:
        weight = random_weight(out, in_, format)
        matrix = dense(weight)
        for tokens in (1, 3, 30):
            x = torch.randn(tokens, in_, generator=generator).to(dtype)
            y, expected = cpu.multiply(x, *covered(weight, x)), x.double() @ matrix.T
            assert y.dtype == dtype and sqnr_db(expected, y) > SQNR_DB[dtype], (format, out, in_, tokens)


def test_inputs_of_every_size_meet_codebooks(module, random_weight, generator):
    """A step for each chunk: small inputs beside large ones keep their bits; what no byte can carry is decoded."""
    format = layer_format(3, 256, True, vector=2, codebook_rows=16, codebook_columns=128)
    weight = random_weight(32, 256, format)
    x = torch.randn(1, 256, generator=generator)
    for large in (1e4, 1e-30, 1e-39, 5e36, 0.0):
        z = x * torch.where(torch.arange(256) < 128, large, 1.0)
        y, expected = cpu.multiply(z, *covered(weight, z)), z.double() @ dense(weight).T
        assert sqnr_db(expected, y) > 110 or not torch.isfinite(y).all() == torch.isfinite(expected.float()).all(), (
            large
        )


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 24, 25, 40])
def test_few_and_many_tokens_agree_with_the_reference_whatever_the_threads(
    module, tokens, dtype, random_weight, generator, monkeypatch
):
    monkeypatch.setattr(cpu, "_STRIP_BYTES", 16 * 64 * 4)  # strips of 16 rows
    for format in (layer_format(3, 32, False, 4, "int8"), FORMATS["normal floats"], FORMATS["vectors of 4"]):
        width = 48 if format.codes.group_size != 32 else 64
        weight = random_weight(50, width, format)
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        results, threads = [], torch.get_num_threads()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpu.multiply(x, *covered(weight, x)))
        torch.set_num_threads(threads)
        # More are multiplied by torch, whose sums may depend on the threads.
        if tokens <= cpu.few_tokens(by_bytes=known_sizes(format).whole_numbers):
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        expected = quant_linear_reference(x, *operands(weight)).double()
        for y in results:
            assert not tokens or sqnr_db(expected, y) > SQNR_DB[dtype] - 6


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48)], ids=str)
def test_batches_slices_and_odd_addresses_are_read_as_they_are(module, shape, random_weight, generator):
    weight = random_weight(7, 48, FORMATS["asymmetric"])
    whole = torch.randn(*shape[:-1], 97, generator=generator)
    x = whole[..., 1:97:2]  # neither contiguous nor aligned
    y = cpu.multiply(x, *covered(weight, x))
    assert y.shape == (*shape[:-1], 7)
    assert sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[torch.float32]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_inputs_that_are_not_finite_come_out_as_the_reference_has_them(module, bad, bits, random_weight, generator):
    weight = random_weight(7, 64, layer_format(bits, 32, False))
    x = torch.randn(2, 64, generator=generator)
    x[1, 5] = bad
    y = cpu.multiply(x, *covered(weight, x))
    expected = quant_linear_reference(x, *operands(weight))
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert bool(y[0].isfinite().all()) and sqnr_db(expected[0].double(), y[0]) > SQNR_DB[torch.float32]


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e30], ids=str)
def test_inputs_of_any_size_keep_their_precision(module, size, random_weight, generator):
    weight = random_weight(9, 64, layer_format(4, 32, False))
    x = torch.randn(1, 64, generator=generator) * size
    y = cpu.multiply(x, *covered(weight, x))
    expected = x.double() @ dense(weight).T
    floor = SQNR_DB[torch.float32] if size > 1e-37 else 60  # there float32 itself has fewer bits
    assert sqnr_db(expected, y) > floor


@dtypes
@pytest.mark.parametrize("fill", ["one", "all"])
def test_the_largest_numbers_of_a_type_come_out_right(module, fill, dtype, random_weight, generator):
    weight = random_weight(9, 64, layer_format(4, 32, False))
    scale = weight.codes.scale
    weight = replace(weight, codes=replace(weight.codes, scale=(scale / scale.max() * 2**-11).to(torch.float16)))
    x = torch.randn(1, 64, generator=generator).to(dtype)
    x[0, 3 if fill == "one" else slice(None)] = torch.finfo(dtype).max
    y, expected = cpu.multiply(x, *covered(weight, x)), x.double() @ dense(weight).T
    assert sqnr_db(expected, y) > min(SQNR_DB[dtype], 90)  # the scales are float16 and small


def test_one_enormous_channel_leaves_the_others_their_precision(module, random_weight, generator):
    weight = random_weight(9, 64, layer_format(4, 32, False))
    x = torch.randn(1, 64, generator=generator)
    with_it = x.clone()
    with_it[0, 3] = 3e4
    difference = cpu.multiply(with_it, *covered(weight, x)).double() - (with_it.double() @ dense(weight).T)
    assert float(difference.abs().max()) < 3e4 * 2**-22


def test_a_tensor_that_was_written_to_or_replaced_is_seen(module, random_weight, generator):
    first, second = (random_weight(7, 64, layer_format(4, 32, False)) for _ in range(2))
    x = torch.randn(1, 64, generator=generator)
    arguments, others = list(operands(first)), operands(second)
    before = cpu.multiply(x, *arguments)
    arguments[1] = others[1]  # another scale under the same codes
    replaced = cpu.multiply(x, *arguments)
    arguments[0].copy_(others[0])
    arguments[2].copy_(others[2])
    assert not torch.equal(before, replaced)
    assert torch.equal(cpu.multiply(x, *arguments), cpu.multiply(x, *others))


@pytest.mark.parametrize(
    "format, width, why",
    [
        (layer_format(5, 32, False), 64, "codes of 5 bits have no kernel"),
        (layer_format(4, 24, False), 72, "a group of 24 columns does not end"),
        (layer_format(2, 8, False), 64, "a group of 8 columns does not end"),
        (layer_format(5, 16, True, grid="normal-float"), 64, "normal-float codes of 5 bits"),
        (layer_format(4, 12, True, grid="normal-float"), 48, "12 columns is no multiple of 8"),
        (layer_format(3, 12, True, scale_rank=2), 12, "width 12 is no multiple of 8"),
        (layer_format(2, 48, True, vector=4, codebook_rows=1, codebook_columns=12), 48, "a codebook of 12 columns"),
    ],
)
def test_what_the_kernels_do_not_cover_is_named_and_left_to_the_reference(format, width, why, random_weight, generator):
    by = implementation(format, width, CPU, torch.float32)
    assert by.name == "reference (torch)" and why in by.declined["C++"]
    weight = random_weight(4, width, format)
    x = torch.randn(2, width, generator=generator)
    assert torch.equal(cpu.multiply(x, *operands(weight)), quant_linear_reference(x, *operands(weight)))


def test_the_implementation_depends_on_device_type_and_activations():
    format = layer_format(4, 32, False)
    assert implementation(format, 64, CPU, torch.float32).name.startswith("C++ (")
    far = implementation(format, 64, torch.device("mps"), torch.float32)
    assert far.name == "reference (torch)" and far.declined == {
        "C++": "the device is mps",
        "Triton": "the device is mps",
    }
    assert "float64" in implementation(format, 64, CPU, torch.float64).declined["C++"]
    rounded = implementation(layer_format(4, 32, False, input_quantization="token"), 64, CPU, torch.float32)
    assert rounded.name.startswith("C++ (") and "more than one scale" in rounded.declined["bytes (oneDNN)"]
    bytes_ = implementation(layer_format(4, 64, False, input_quantization="token"), 64, CPU, torch.float32)
    assert bytes_.name == "bytes (oneDNN)" and not bytes_.declined


def test_a_missing_library_is_named_and_the_reference_runs(monkeypatch, random_weight, generator):
    monkeypatch.setattr(cpu, "library", lambda: (None, "the C++ kernels were not built"))
    weight = random_weight(7, 64, layer_format(4, 32, False))
    x = torch.randn(2, 64, generator=generator)
    assert torch.equal(cpu.multiply(x, *operands(weight)), quant_linear_reference(x, *operands(weight)))
    assert implementation(weight.format, 64, CPU, torch.float32).declined == {"C++": "the C++ kernels were not built"}


def test_a_module_that_computes_something_else_is_not_used(monkeypatch):
    portable = import_module("lorq.kernels._cpu_portable")

    class Wrong:
        class Weight:
            def __init__(self, *arguments):
                self.right = portable.Weight(*arguments)

            def multiply(self, x, y, *rest):
                self.right.multiply(x + 4, y, *rest)

    for module, expected in ((portable, portable), (Wrong, portable)):
        monkeypatch.setattr(cpu, "_built", lambda module=module: (module, "avx2"))
        assert cpu.library.__wrapped__() == (expected, "avx2" if module is portable else "portable")


def test_a_module_of_another_lorq_is_refused_by_name(monkeypatch):
    written = (ROOT / "native/module.cpp").read_text()
    assert f"constexpr int INTERFACE = {cpu.INTERFACE};" in written
    fits = SimpleNamespace(interface=cpu.INTERFACE, best=lambda: "avx2", __file__="_cpu_portable.so")
    for stale, got in ((SimpleNamespace(best=None, __file__="stale.so"), 0), (SimpleNamespace(interface=7), 7)):
        stale.__file__ = "stale.so"
        for modules in ({"portable": stale}, {"portable": fits, "avx2": stale}):
            by_path = {f"lorq.kernels._cpu_{name}": module for name, module in modules.items()}
            monkeypatch.setattr(cpu, "import_module", by_path.__getitem__)
            with pytest.raises(
                ImportError, match=rf"must have interface \d+, stale\.so has {got}: .* install lorq again"
            ):
                cpu._built.__wrapped__()
    monkeypatch.setattr(cpu, "import_module", lambda name: fits)
    assert cpu._built.__wrapped__() == (fits, "avx2")


def test_importing_lorq_multiplies_nothing():
    code = "import lorq.kernels; assert not lorq.kernels.cpu.library.cache_info().currsize"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_short_way_and_the_dispatcher_give_the_same_and_gradients_take_the_latter(random_weight, generator):
    arguments = operands(random_weight(7, 64, layer_format(4, 32, False)))
    x = torch.randn(2, 64, generator=generator)
    assert torch.equal(multiply(x, *arguments), quant_linear(x, *arguments))
    x.requires_grad_()
    assert multiply(x, *arguments).requires_grad
    with torch.no_grad():
        assert not multiply(x, *arguments).requires_grad


@pytest.mark.slow  # make test-kernels runs it
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_kernel_reads_or_writes_outside_its_tensors(tmp_path):
    """The kernels on heap blocks of exactly their size, under the address and undefined-behaviour sanitizers."""
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    vnni = [*avx2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512vnni"]
    flags = {"portable": [], "avx2": avx2, "vnni": vnni, "vbmi": [*vnni, "-mavx512vbmi", "-mavx512vbmi2"]}
    best = import_module("lorq.kernels._cpu_portable").best()
    for isa in {*list(flags)[:2], best} - ({"avx2"} if best == "portable" else set()):
        program = tmp_path / isa
        build = [
            "g++",
            "-std=c++17",
            "-O1",
            "-g1",  # lines alone: to follow variables through unrolled loops takes minutes
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            *flags[isa],
        ]
        native = ROOT / "native"
        subprocess.run(
            [*build, "-I", native, ROOT / "tests/native/bounds.cpp", "-o", program, "-ldl", "-pthread"], check=True
        )
        done = subprocess.run([program], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("products checked\n"), done.stderr[-3000:]
        assert int(done.stdout.split()[0]) > 100


@dtypes
def test_the_operator_asks_no_python_for_a_weight_that_it_knows(dtype, random_weight, generator, monkeypatch):
    if cpu._OPERATOR is None:
        pytest.skip("the operator is Python's here")

    def refuse(*_, **__):
        raise NotImplementedError("Python was asked")

    arguments = operands(random_weight(48, 96, layer_format(3, 32, False, 5, "int8")))
    x = torch.randn(2, 4, 96, generator=generator).to(dtype)
    expected = cpu.multiply(x, *arguments)  # it knows from here on
    monkeypatch.setattr(cpu, "weight_of", refuse)
    assert torch.equal(quant_linear(x, *arguments), expected)
    others = [(x.transpose(0, 1), *arguments), (torch.cat([x] * 4, 1), *arguments)]  # not contiguous, 32 tokens
    others += [(x, *arguments[:1], arguments[1].clone(), *arguments[2:])]
    for other in others:
        with pytest.raises(RuntimeError, match="Python was asked"):
            quant_linear(*other)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    monkeypatch.undo()
    cpu.multiply(x, *copies)
    monkeypatch.setattr(cpu, "weight_of", refuse)
    quant_linear(x, *copies)
    copies[0].set_(copies[0].clone())  # other memory, the same tensor
    with pytest.raises(RuntimeError, match="Python was asked"):
        quant_linear(x, *copies)


@dtypes
def test_the_operator_gives_what_the_function_does(dtype, random_weight, generator):
    for format, (out, in_) in [(layer_format(4, 32, False), (7, 96)), *OTHERS]:
        arguments = operands(random_weight(out, in_, format))
        for shape, way in product(((in_,), (3, in_), (2, 9, in_), (0, in_)), cpu.PRODUCTS):
            x = torch.randn(*shape, generator=generator).to(dtype)
            with cpu.products(way):
                assert torch.equal(quant_linear(x, *arguments), cpu.multiply(x, *arguments))


@dtypes
def test_the_rotation_is_the_dense_product_whatever_the_threads(module, dtype, generator):
    for width, block, skip in ((48, 4, 0), (576, 64, 0), (96, 32, 64), (320, 256, 64), (40, 0, 0)):
        order = torch.randperm(width, generator=generator).to(torch.int16)
        x = torch.randn(3, 2, 2 * width, generator=generator).to(dtype)[..., ::2]  # not contiguous
        for permutation, inverse in product((None, order), (False, True)):
            y = cpu.turn(x, permutation, block, skip, inverse)
            expected = rotate_reference(x.double(), permutation, block, skip, inverse)
            assert y.dtype == dtype and y.is_contiguous()
            assert torch.equal(y, expected.to(dtype)) if not block else sqnr_db(expected, y) > SQNR_DB[dtype]


@pytest.mark.parametrize("bad", [-1, 48], ids=str)
def test_a_permutation_that_names_no_channel_is_left_to_the_reference(module, bad):
    order = torch.arange(48, dtype=torch.int32)
    order[7] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
        cpu.turn(torch.ones(1, 48), order, 16, 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tokens", [1, 70], ids=str)
def test_inputs_of_one_byte_err_by_half_a_step_and_only_when_asked(module, tokens, bits, random_weight, generator):
    weight = random_weight(24, 256, layer_format(bits, 64, False, 2, "int8"))
    x = torch.randn(tokens, 256, generator=generator)
    arguments = covered(weight, x)
    exact = cpu.multiply(x, *arguments)
    with cpu.products("bytes"):
        rough = cpu.multiply(x, *arguments)
    groups = x.unflatten(1, (4, 64))
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).flatten(1)
    # Zero points and factors see the inputs as they are: only products with codes are rounded.
    codes = (weight.codes.codes.float() - 2 ** (bits - 1)) * weight.codes.scale.float().repeat_interleave(64, 1)
    expected = exact + (rounded - x) @ codes.T
    assert sqnr_db(expected.double(), rough) > 60 and 25 < sqnr_db(exact.double(), rough) < 60
    assert torch.equal(cpu.multiply(x, *arguments), exact)


def _sparse(path, small, rows):
    """A tensor of so many rows on a file that takes no room, zeros but for the last of them."""
    size = rows * small[0].numel()
    with path.open("wb") as file:
        file.truncate(size * small.itemsize)
    large = torch.from_file(str(path), shared=True, size=size, dtype=small.dtype).view(rows, *small.shape[1:])
    large[-len(small) :] = small
    return large


def test_the_far_end_of_a_weight_of_gigabytes_is_read(module, random_weight, generator, tmp_path):
    """Words, scales and entries are numbered in 64 bits: there are 2^31 words, 8 GiB, and an expert behind as many."""
    vectors = layer_format(2, 8192, True, vector=4, codebook_rows=64, codebook_columns=8192)
    for format in (layer_format(4, 128, False), layer_format(2, 8192, True), vectors):
        out, in_, rows = 64, 8192, 2**36 // (8192 * format.bits)
        weight = random_weight(out, in_, format)
        *own, bits = covered(weight, torch.zeros(1, in_))
        large = [t if t is None else _sparse(tmp_path / f"{i}", t, rows * len(t) // out) for i, t in enumerate(own)]
        assert large[0].numel() == 2**31
        seen = cpu.weight_of(large, bits, in_)
        strip = torch.empty(out, in_)
        seen.decode(strip.data_ptr(), rows - out, out, cpu.TYPES[torch.float32], 1)
        assert torch.equal(strip, weight.codes.decode(torch.float32))
        experts = [t if t is None else t.view(rows // out, len(t) * out // rows, *t.shape[1:]) for t in large]
        first = cpu.weight_of(experts, bits, in_, experts=True)
        x, y = torch.randn(1, in_, generator=generator), torch.empty(1, out)
        none = (0, 0, 0)
        chosen = torch.tensor([rows // out - 1])
        first.multiply_experts(
            rows // out, chosen.data_ptr(), x.data_ptr(), y.data_ptr(), 1, 1, 1, 3, none, none, 0, 0, 0, 0, 1
        )
        assert sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[torch.float32]


def test_another_word_for_products_is_refused():
    with pytest.raises(ValueError, match="one of exact, bytes, got 'int8'"), cpu.products("int8"):
        pass
