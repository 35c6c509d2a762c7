"""The Triton kernels: against the reference in Triton's interpreter, and compiled ahead of time for three devices.

The interpreter is chosen when kernels are defined, by ``TRITON_INTERPRET=1``: the tests that need it are skipped
without it, and `make test-kernels` runs them. Nothing here needs a GPU but what is marked so.
"""

import csv
import itertools
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import layer_format
from test_kernels import FORMATS, check_row, dense, operands, sqnr_db

from lorq.core.basis import Basis
from lorq.kernels import KERNELS, triton_linear, triton_tile
from lorq.kernels.operands import NAMES, STORED_NAMES, Operands, format_of, known_sizes
from lorq.kernels.reference import quant_linear_reference

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="make test-kernels runs it, with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")

# Decibels that are kept at least, as in test_kernels.py but for bfloat16: the interpreter cuts its numbers off.
SQNR_DB = {torch.float32: 120, torch.float16: 62, torch.bfloat16: 40}
TOKENS = (1, 3, 17, 40)
# (out, in, group): rows and columns that no tile divides, groups of every relation to a tile.
SHAPES = {"groups of 16": (7, 80, 16), "of 32": (33, 96, 32), "of 64": (65, 192, 64), "of 128": (40, 384, 128)}
SHAPES |= {"of 48": (31, 144, 48), "of a row": (40, 176, 176)}
FACTORS = {"none": (0, "float16"), "3": (3, "float16"), "32 int8": (32, "int8"), "32 e4m3": (32, "e4m3")}
FACTORS["40"] = 40, "int8"  # more than the kernels take at once
OTHERS = {
    "1 bit": (33, 96, layer_format(1, 32, False)),
    "6 bits": (33, 192, layer_format(6, 64, False, 3, "int8")),
    "6 bits, groups of 16": (7, 80, layer_format(6, 16, True)),
    "vectors of 4": (64, 160, layer_format(2, 160, True, 3, "int8", 4, 16, 32)),
    "vectors of 4, many codebooks": (21, 144, layer_format(2, 48, True, 0, "float16", 4, 7, 16)),
    "vectors of 2": (33, 120, layer_format(3, 120, True, 0, "float16", 2, 3, 24)),
    "vectors of 2, 4 bits": (16, 128, layer_format(4, 64, True, 32, "e4m3", 2, 8, 64)),
    "vectors of 8": (8, 96, layer_format(1, 96, True, 0, "float16", 8, 8, 96)),
    "normal floats": (70, 320, layer_format(4, 64, True, 3, "float16", grid="normal-float")),
    "normal floats, 2 bits": (33, 80, layer_format(2, 16, True, grid="normal-float")),
    "a scale for each": (65, 272, layer_format(3, 272, True, 32, "int8", scale_rank=5)),
    "normal floats, a scale for each": (40, 144, layer_format(4, 144, True, scale_rank=33, grid="normal-float")),
}


def grid_of_formats():
    ranks = itertools.cycle(FACTORS.values())  # six shapes, five kinds of factors: all pairs in the end
    for bits, symmetric in itertools.product((2, 3, 4, 8), (False, True)):
        shapes = list(SHAPES.items())[:: 3 if symmetric else 1]
        for (name, (out, in_, group)), (rank, type) in zip(shapes, ranks, strict=False):
            kind = "symmetric" if symmetric else "asymmetric"
            yield pytest.param(out, in_, layer_format(bits, group, symmetric, rank, type), id=f"{bits}-{kind}-{name}")
    for name, (out, in_, format) in OTHERS.items():
        yield pytest.param(out, in_, format, id=name)


every_format = pytest.mark.parametrize("out, in_, format", list(grid_of_formats()))


@pytest.fixture
def whole_interpreter(monkeypatch):
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as whole numbers: here, what they stand for.

    float16 goes the same way, exactly, since numpy's products of it are a hundred times as slow.
    """
    if not INTERPRETED:
        return
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def floats(handle):
        if handle.dtype.scalar == triton.language.bfloat16:
            return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return handle.data.astype(numpy.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = numpy.matmul(floats(a), floats(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def check_linear(weight, in_, generator, device="cpu"):
    parts = [part.to(device) if isinstance(part, torch.Tensor) else part for part in operands(weight)]
    expected = dense(weight).T
    # Which dtypes meet which numbers of tokens is drawn for each format: all of them by all formats together.
    for tokens, draw in zip(TOKENS, torch.randint(3, (len(TOKENS),), generator=generator).tolist(), strict=True):
        dtype, floor = list(SQNR_DB.items())[draw]
        x = torch.randn(tokens, in_, generator=generator).to(dtype)
        y = triton_linear.linear(x.to(device), *parts)
        assert y.dtype == dtype and y.shape == (tokens, weight.shape[0])
        assert sqnr_db(x.double() @ expected, y.cpu()) > floor, (tokens, dtype, weight.format)


def check_turn(basis, inverse, generator, device="cpu"):
    width, permuted, block, skip = basis
    order = torch.randperm(width, generator=generator).to(torch.int16) if permuted else None
    parts = Basis(order, block, skip)
    for tokens, (dtype, floor) in itertools.product((1, 5), SQNR_DB.items()):
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        y = triton_linear.turn(x.to(device), None if order is None else order.to(device), block, skip, inverse)
        assert y.dtype == dtype and y.shape == x.shape
        expected = parts.unrotate(x.double()) if inverse else parts.rotate(x.double())
        assert sqnr_db(expected, y.cpu()) > floor


# (width, permuted, block, skip)
BASES = {
    "nothing": (48, False, 0, 0), "permuted": (1500, True, 0, 0), "rotated": (48, False, 16, 0),
    "partly rotated": (48, False, 8, 24), "both": (576, True, 64, 192), "large blocks": (1024, True, 512, 512),
    "the smallest blocks": (20, True, 4, 12),
}  # fmt: skip
bases = pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
directions = pytest.mark.parametrize("inverse", [False, True], ids=["into", "back"])

# ---- interpreted ------------------------------------------------------------------------------------------


@interpreted
@every_format
def test_every_format_is_the_dense_product(out, in_, format, random_weight, generator, whole_interpreter):
    check_linear(random_weight(out, in_, format), in_, generator)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tiles_for_hundreds_of_tokens_are_the_dense_product(dtype, random_weight, generator, whole_interpreter):
    weight = random_weight(150, 128, layer_format(3, 64, False, 32, "int8"))
    for tokens in (32, 33, 64, 65, 257):  # both sides of every border between tiles
        x = torch.randn(tokens, 128, generator=generator).to(dtype)
        y = triton_linear.linear(x, *operands(weight))
        assert sqnr_db(x.double() @ dense(weight).T, y) > SQNR_DB[dtype], tokens


@interpreted
def test_sums_over_several_spans_are_the_dense_product(random_weight, generator):
    weight = random_weight(20, 4112, layer_format(4, 16, False, 3, "int8"))
    for tokens in (1, 5):
        tile = triton_linear.choose_tile(tokens, torch.float32, weight.format, 4112)
        assert -(-4112 // triton_linear.span_of(20, 4112, tile)) > 1
        x = torch.randn(tokens, 4112, generator=generator)
        assert sqnr_db(x.double() @ dense(weight).T, triton_linear.linear(x, *operands(weight))) > 120


@interpreted
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_token_keeps_what_is_large_and_what_is_small(bits, random_weight, generator):
    weight = random_weight(20, 96, layer_format(bits, 32, False))
    for size in (2.0**40, 2.0**-50):
        x = size * torch.randn(1, 96, generator=generator)
        assert sqnr_db(x.double() @ dense(weight).T, triton_linear.linear(x, *operands(weight))) > 110, size


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_factors_of_the_scale_may_be_trained_ones(dtype, random_weight, generator, whole_interpreter):
    weight = random_weight(40, 96, layer_format(3, 96, True, scale_rank=4))
    parts = list(operands(weight))
    parts[4], parts[5] = parts[4].to(dtype), parts[5].to(dtype)
    for tokens in (1, 20):
        x = torch.randn(tokens, 96, generator=generator)
        expected = quant_linear_reference(x, *parts)
        # Sums of products of bfloat16 are float32's, whatever multiplies them.
        assert sqnr_db(expected.double(), triton_linear.linear(x, *parts)) > 110


@interpreted
def test_every_byte_of_e4m3_is_decoded_as_torch_does():
    right = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(256, 1).view(torch.float8_e4m3fn)
    found = triton_linear.projected(torch.ones(1, 1), right, None, torch.float32)
    assert torch.equal(found.isnan(), right.T.float().isnan()) and int(found.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(), right.T.float().nan_to_num())


@interpreted
def test_leading_dimensions_are_tokens_and_no_token_is_none(random_weight, generator):
    weight = random_weight(31, 48, layer_format(4, 16, True))
    parts = operands(weight)
    assert triton_linear.linear(torch.zeros(2, 0, 48), *parts).shape == (2, 0, 31)
    x = torch.randn(2, 3, 48, generator=generator)
    assert sqnr_db(x.double() @ dense(weight).T, triton_linear.linear(x, *parts)) > 120
    assert triton_linear.linear(x[0, 0], *parts).shape == (31,)
    assert torch.equal(triton_linear.linear(x, *parts), triton_linear.linear(x, *parts))  # the same bits


@interpreted
@bases
@directions
def test_turning_is_the_dense_product(basis, inverse, generator):
    check_turn(basis, inverse, generator)


@pytest.mark.gpu
@every_format
def test_every_format_is_the_dense_product_on_a_device(out, in_, format, random_weight, generator):
    check_linear(random_weight(out, in_, format), in_, generator, "cuda")


@pytest.mark.gpu
@bases
@directions
def test_turning_is_the_dense_product_on_a_device(basis, inverse, generator):
    check_turn(basis, inverse, generator, "cuda")


@interpreted
@pytest.mark.parametrize("name", ["symmetric", "e4m3 factors", "normal floats"])
def test_the_tables_row_is_the_dense_product(name, random_weight, generator, monkeypatch, whole_interpreter):
    for asked in ("declines", "declines_basis"):
        monkeypatch.setattr(triton_linear, asked, lambda *_: None)
    for reference in ("quant_linear_reference", "rotate_reference"):
        monkeypatch.delattr(triton_linear, reference)  # the kernels run, or nothing does
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    check_row(KERNELS["cuda"], FORMATS[name], random_weight, generator, "cpu", SQNR_DB)


# ---- what is covered --------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "format, device, dtype, why",
    [
        (layer_format(4, 128, True), torch.device("cpu"), torch.float32, "the device is cpu"),
        (layer_format(4, 128, True), CUDA, torch.float64, "inputs are torch.float64"),
        (layer_format(5, 128, True), CUDA, torch.float16, "codes take 5 bits for 1 weights"),
        (layer_format(7, 128, True), CUDA, torch.float16, "codes take 7 bits for 1 weights"),
        (layer_format(3, 128, True, scale_rank=65), CUDA, torch.float16, "the scale has rank 65, more than 64"),
        (layer_format(3, 128, True, 4, "bf16"), CUDA, torch.float16, "low-rank factors are bf16"),
    ],
)
def test_what_is_not_covered_is_said(format, device, dtype, why):
    assert triton_linear.declines(format, 1024, device, dtype) == why


@every_format
def test_every_format_of_these_tests_is_covered_and_recognised(out, in_, format, random_weight):
    assert triton_linear.declines_format(format) is None
    *tensors, bits = operands(random_weight(out, in_, format))
    named = Operands(**dict(zip(NAMES, tensors, strict=True)))
    assert format_of(named, bits, in_) == format


@pytest.mark.parametrize(
    "block, device, dtype, why",
    [
        (8192, CUDA, torch.float16, "blocks of 8192 are not between 2 and 4096"),
        (-1, CUDA, torch.float16, "blocks of the whole width are not between 2 and 4096"),
        (64, CUDA, torch.float64, "inputs are torch.float64"),
        (64, torch.device("cpu"), torch.float16, "the device is cpu"),
    ],
)
def test_bases_that_are_not_covered_are_said(block, device, dtype, why):
    assert triton_linear.declines_basis(block, device, dtype) == why


def test_what_is_not_covered_goes_to_the_reference(random_weight, generator):
    parts = operands(random_weight(33, 80, layer_format(5, 16, False, 3, "int8")))
    x = torch.randn(2, 80, generator=generator)
    assert torch.equal(triton_linear.multiply(x, *parts), quant_linear_reference(x, *parts))
    order = torch.randperm(80, generator=generator)
    basis = Basis(order, 16, 0)
    assert torch.equal(triton_linear.turn_or_reference(x, order, 16, 0), basis.rotate(x))


def test_tensors_that_do_not_belong_together_are_the_references_to_refuse(random_weight, generator, monkeypatch):
    parts = operands(random_weight(7, 48, layer_format(3, 16, False)))
    monkeypatch.setattr(triton_linear, "declines", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"96 codes of 3 bits take 9 words per row, got packed words of shape \(7, 5\)"
    ):
        triton_linear.multiply(torch.randn(2, 96, generator=generator), *parts)


def test_tensors_of_too_many_numbers_go_to_the_reference(monkeypatch):
    monkeypatch.setattr(triton_linear, "quant_linear_reference", lambda x, *_: x.new_empty(1))
    monkeypatch.setattr(triton_linear, "_by_plan", lambda _, x, *__: x.new_empty(2))
    monkeypatch.setattr(triton_linear, "declines", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    x = torch.empty(1, 8192, device="meta")
    for rows, expected in ((2**21, 1), (2**21 - 1, 2)):
        packed = torch.empty(rows, 1024, dtype=torch.int32, device="meta")
        scale = torch.empty(rows, 1, dtype=torch.float16, device="meta")
        y = triton_linear.multiply(x, packed, scale, *[None] * 10, 4)
        assert len(y) == expected  # 1 by the reference, 2 by the kernel


def test_the_operators_have_the_kernels_on_cuda_devices_and_importing_them_does_not_import_triton():
    code = (
        "import sys, torch, lorq.kernels; assert 'triton' not in sys.modules\n"
        "for name in ('quant_linear', 'rotate'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'lorq::{name}', 'CUDA'), name\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- compiled ---------------------------------------------------------------------------------------------

# Bytes of shared memory that a block may have, by compute capability (CUDA C++ programming guide, table 27).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
LARGE = {
    "4 bits": layer_format(4, 128, False, 32, "int8"),
    "3 bits": layer_format(3, 128, False, 32, "e4m3"),
    "2 bits": layer_format(2, 64, True, 32, "float16"),
    "8 bits": layer_format(8, 128, False),
    "4 bits, groups of 48": layer_format(4, 48, False),
    "normal floats": layer_format(4, 64, True, 32, "int8", grid="normal-float"),
    "3 bits, a scale for each": layer_format(3, 4096, True, scale_rank=32),
    "2 bits in vectors of 4": layer_format(2, 4096, True, 32, "int8", 4, 64, 512),
    "3 bits in vectors of 2": layer_format(3, 4096, True, 0, "float16", 2, 64, 512),
}
LAUNCHED = ("whole_rows", "spans", "finish", "project", "decode", "turn", "trellis_products", "trellis_decode")


class Recorder:
    """Stands for a kernel and notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((self.kernel, args, named))


@pytest.fixture
def launches(monkeypatch):
    """The launches of a call, as (kernel, arguments, named arguments), in place of the kernels' work."""
    found = []
    for name in LAUNCHED:
        monkeypatch.setattr(triton_tile, name, Recorder(getattr(triton_tile, name), found))
    return found


def launch_linear(format, tokens, dtype):
    """Call the kernels on a layer without memory: 4096 wide where groups allow it."""
    in_ = 4096 // format.codes.group_size * format.codes.group_size
    layout = format.layout(4096, in_)
    tensors = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in layout.items()}
    if known_sizes(format).levels != "integer":
        tensors["levels"] = torch.empty(2**format.bits, device="meta")
    x = torch.empty(tokens, in_, dtype=dtype, device="meta")
    triton_linear.linear(x, *(tensors.get(name) for name in STORED_NAMES), format.bits)


def build(kernel, args, named, capability, **more):
    """A launch compiled for a device that need not be there, as the launch itself would on it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: value for key, value in named.items() if key not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, facts = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + POINTERS[value.dtype] if tensor else "i32"
        if tensor or value % 16 == 0:
            facts[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, facts)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | more)


def usage(built, folder):
    """Registers, bytes of stack (what spills goes there) and of shared memory that a compiled kernel takes."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared


def check_usage(title, launches, folder):
    for capability, (kernel, args, named) in itertools.product(SHARED_LIMIT, launches):
        registers, spilled, shared = usage(build(kernel, args, named, capability), folder)
        csv.writer(sys.stdout).writerow([*title, kernel.__name__, f"sm_{capability}", registers, spilled, shared])
        # A kernel that was compiled away would pass what follows.
        assert registers >= 16
        assert spilled == 0 and shared <= SHARED_LIMIT[capability], (title, kernel.__name__, capability)


def check_format(name, tokens, dtype, launches, folder):
    launch_linear(LARGE[name], tokens, dtype)
    kernels = [kernel.__name__ for kernel, _, _ in launches]
    few = tokens < triton_linear.MANY_FROM[dtype.itemsize]
    sums = ["whole_rows"] if tokens == 1 else ["spans", "finish"]  # 4096 rows fill a device in tiles of 8
    assert kernels == (([*(["project"] if LARGE[name].rank else []), *sums]) if few else ["decode"])
    check_usage((name, str(dtype)[6:], tokens), launches, folder)


@compiled
@pytest.mark.parametrize("name, tokens", [("4 bits", 1), ("3 bits", 16), ("4 bits", 512)])  # every kernel once
def test_default_tiles_fit_the_devices(name, tokens, launches, tmp_path):
    check_format(name, tokens, torch.bfloat16, launches, tmp_path)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tokens",
    [
        *((torch.bfloat16, tokens) for tokens in (1, 16, 64, 256, 512)),  # one for each tile of 16 bits
        *((torch.float32, tokens) for tokens in (1, 16, 64)),
        *((torch.float16, tokens) for tokens in (1, 512)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LARGE)
def test_every_default_tile_fits_the_devices(name, tokens, dtype, launches, tmp_path):
    check_format(name, tokens, dtype, launches, tmp_path)


@compiled
@pytest.mark.parametrize("block", [0, 4, 256, 4096])
def test_blocks_of_the_basis_fit_the_devices(block, launches, tmp_path):
    x = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    triton_linear.turn(x, torch.empty(8192, dtype=torch.int16, device="meta"), block, 0)
    assert [kernel.__name__ for kernel, _, _ in launches] == ["turn"]
    check_usage((f"basis, blocks of {block}", "bfloat16", 8), launches, tmp_path)


@compiled
def test_tensor_cores_and_copies_in_the_background_are_used(launches):
    launch_linear(LARGE["4 bits"], 64, torch.bfloat16)
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")):
        text = build(*launches[1], capability).asm["ptx"]
        assert instruction in text and "cp.async" in text, capability


@compiled
def test_spills_are_seen(launches, tmp_path):
    launch_linear(LARGE["4 bits"], 64, torch.bfloat16)
    registers, spilled, _ = usage(build(*launches[1], 80, maxnreg=64), tmp_path)
    assert registers <= 64 and spilled > 0
