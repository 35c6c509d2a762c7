"""The quantized linear on the CPU in C++ (native/): the checkpoint's own words, read as they are (docs/kernels.md).

Few tokens are multiplied straight from the codes, many by strips of decoded rows and torch's matrix product. Inputs
that are not finite, or all but zero, take the second way, where they come out as the reference has them.

The library is one module for each instruction set; the best that this machine has is checked against the portable one
on small products when it is first needed.
"""

import _thread
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.core.low_rank import LowRank
from lorq.core.weight import LayerFormat
from lorq.kernels.derived import Derived
from lorq.kernels.operands import DTYPES, NAMES, Operands, code_sizes, declines_input, format_of, known_sizes
from lorq.kernels.reference import quant_linear, quant_linear_reference, rotate_reference

# Numbers by which the library knows types.
TYPES = {
    torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4, torch.float8_e4m3fn: 5,
}  # fmt: skip
# Columns whose codes lie in one lane (native/inputs.hpp).
_LANE = {2: 16, 3: 8, 4: 8, 6: 4, 8: 4}
# Tokens whose inputs are prepared at once.
_MOST_AT_ONCE = 64
# Bytes of a decoded strip: short ones make torch's product slow, long ones leave the cache before it.
_STRIP_BYTES = 16 << 20
PRODUCTS = ("exact", "bytes")
# What these files expect of the library's functions; native/module.cpp has the same number.
INTERFACE = 3
_one_byte = False


@contextmanager
def products(kind: str) -> Iterator[None]:
    """How inputs enter the products with integer codes while this is entered, in the whole process.

    Args:
        kind: "exact" takes 15 bits of half-precision inputs and 23 of float32 ones, relative to the largest of a group;
            "bytes" rounds every input to 8 bits on its group's range, whatever the number of tokens (docs/kernels.md).

    Raises:
        ValueError: for another word.
    """
    check_products(kind)
    before = _one_byte
    _keep_one_byte(kind == "bytes")
    try:
        yield
    finally:
        _keep_one_byte(before)


def _keep_one_byte(one: bool) -> None:
    global _one_byte
    _one_byte = one
    if _OPERATOR is not None:
        _OPERATOR.keep_one_byte(one)


@cache
def _built() -> tuple[Any, str]:
    """The module of this machine's instruction set and its name; None and why not, where there is none.

    Raises:
        ImportError: if there is one that was built for another lorq.
    """
    try:
        portable = import_module("lorq.kernels._cpu_portable")
    except ImportError as error:
        return None, f"the C++ kernels were not built ({error}); install a C++ compiler and lorq again"
    _check_interface(portable)
    name = portable.best()
    try:
        best = import_module(f"lorq.kernels._cpu_{name}")
    except ImportError:
        return portable, "portable"
    _check_interface(best)
    return best, name


def _check_interface(module: Any) -> None:
    """Refuse a module that was built from other sources: to call it would end the process, or multiply wrongly."""
    if (got := getattr(module, "interface", 0)) != INTERFACE:
        raise ImportError(
            f"the C++ kernels must have interface {INTERFACE}, {module.__file__} has {got}: it was built for another "
            "lorq than this; install lorq again, or delete that file and its siblings"
        )


@cache
def library() -> tuple[Any, str]:
    """The module that multiplies and its name, once it is known to be right; None and why not, where there is none."""
    module, name = _built()
    if module is None or name == "portable":
        return module, name
    portable = import_module("lorq.kernels._cpu_portable")
    return (module, name) if _agree(portable, module) else (portable, "portable")


def check_products(kind: str) -> None:
    """Refuse what is no way of `products`.

    Raises:
        ValueError: naming the ways.
    """
    if kind not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {kind!r}")


def declines(format: LayerFormat, in_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer is not multiplied by the C++ kernels, see `lorq.kernels.dispatch.Product`; None where it is."""
    why = declines_input("cpu", device, dtype)
    if why is None and library()[0] is None:
        why = library()[1]
    return why or declines_format(format, in_features)


def few_tokens(*, by_bytes: bool) -> int:
    """Tokens up to which codes are multiplied directly: where the two ways took the same time (docs/kernels.md).

    Args:
        by_bytes: codes are whole numbers under group scales, or what a codebook has for them is looked up as bytes.
            Others are decoded once a token.
    """
    return _few_tokens(library()[1], by_bytes)


def _few_tokens(instructions: str, by_bytes: bool) -> int:
    return (24 if instructions in ("vnni", "vbmi") else 8) if by_bytes else 1


def declines_format(f: LayerFormat, in_features: int) -> str | None:
    """`declines`, as far as the format tells it."""
    c = code_sizes(f.codes)
    if c is None:
        return f"codes of the kind {f.codes.kind} have no kernel"
    if c.vector > 1:
        if c.vector not in (2, 4, 8) or c.bits > 4:
            return f"codes of {c.bits} bits for {c.vector} weights have no kernel"
        run = {"a codebook": c.codebook_columns, "a group": c.group_size}
        return next((f"{what} of {n} columns is no multiple of 8" for what, n in run.items() if n % 8), None)
    if c.bits not in _LANE or (c.bits > 4 and not c.whole_numbers):
        return f"{c.levels} codes of {c.bits} bits have no kernel"
    if c.scale_rank:
        return None if in_features % 8 == 0 else f"the width {in_features} is no multiple of 8"
    if not c.whole_numbers:
        return None if c.group_size % 8 == 0 else f"a group of {c.group_size} columns is no multiple of 8"
    if c.group_size % 8 == 0:
        lanes, rest = divmod(c.group_size, _LANE[c.bits])
        if not rest and (lanes in (1, 2, 4) or lanes % 8 == 0):
            return None
    return f"a group of {c.group_size} columns does not end where a register of {8 * _LANE[c.bits]} does"


def multiply(x: Tensor, *arguments: Any) -> Tensor:
    """`lorq.kernels.quant_linear` on the CPU: these kernels where they cover the weight, else the reference.

    Args and result are the operator's.
    """
    *operands, bits = arguments
    in_features = x.shape[-1]
    weight = weight_of(operands, bits, in_features) if x.dtype in DTYPES else None
    if weight is None:
        return quant_linear_reference(x, *arguments)
    out = operands[0].shape[0]
    x = x.contiguous()
    tokens = x.numel() // in_features
    y = x.new_empty(*x.shape[:-1], out)
    direct = tokens <= few_tokens(by_bytes=weight.by_bytes) or (_one_byte and weight.whole_numbers)
    if direct and _directly(x, y, weight, tokens):
        return y
    by_strips(x.view(tokens, in_features), y.view(tokens, out), weight, operands[8:])
    return y  # and no view of it: models that add to it in place could not be trained


def _directly(x: Tensor, y: Tensor, weight: Any, tokens: int) -> bool:
    """Into ``y``: products straight from the codes, a few tokens at a time. False where inputs are not finite."""
    kind, threads = TYPES[x.dtype], torch.get_num_threads()
    kept = pieces(x.dtype)
    at, to, size = x.data_ptr(), y.data_ptr(), x.element_size()
    for first in range(0, tokens, _MOST_AT_ONCE):
        count = min(_MOST_AT_ONCE, tokens - first)
        x_at, y_at = at + first * size * x.shape[-1], to + first * size * y.shape[-1]
        if not weight.multiply(x_at, y_at, count, kind, kept, threads):
            return False
    return True


def pieces(dtype: torch.dtype) -> int:
    """Bytes that are kept of each input (`products`)."""
    return 1 if _one_byte else 3 if dtype == torch.float32 else 2


def turn(x: Tensor, permutation: Tensor | None, block: int, skip: int, inverse: bool = False) -> Tensor:
    """`lorq.kernels.rotate` on the CPU: sums in float32, rounded once; the reference for what this does not cover.

    Args and result are the operator's.
    """
    module, in_features = library()[0], x.shape[-1]
    fits = block == 0 or (not block & (block - 1) and 0 <= skip < in_features and (in_features - skip) % block == 0)
    order = None if permutation is None else permutation.contiguous()
    known = order is None or (
        order.dtype in (torch.int16, torch.int32, torch.int64)
        and order.shape == (in_features,)
        and order.device.type == "cpu"
    )
    if module is None or x.dtype not in DTYPES or not fits or not known:
        return rotate_reference(x, permutation, block, skip, inverse)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    at, size = (0, 0) if order is None else (order.data_ptr(), order.itemsize)
    tokens, threads = x.numel() // in_features, torch.get_num_threads()
    found = module.rotate(
        x.data_ptr(), y.data_ptr(), tokens, in_features, TYPES[x.dtype], at, size, block, skip, inverse, threads
    )
    return y if found else rotate_reference(x, permutation, block, skip, inverse)


def by_strips(x: Tensor, y: Tensor, weight: Any, low_rank: Sequence[Tensor | None]) -> None:
    """Into ``y``: strips of rows (tiles of 16) decoded in turn, and torch's product of each; then the low-rank part."""
    dtype = _product_type(x.dtype)
    z = x.to(dtype)
    rows = max(16, _STRIP_BYTES // (x.shape[1] * dtype.itemsize) // 16 * 16)
    strip = torch.empty(min(rows, y.shape[1]), x.shape[1], dtype=dtype)
    for first in range(0, y.shape[1], rows):
        count = min(rows, y.shape[1] - first)
        weight.decode(strip.data_ptr(), first, count, TYPES[dtype], torch.get_num_threads())
        y[:, first : first + count] = torch.nn.functional.linear(z, strip[:count])
    left, right, left_scale, right_scale = low_rank
    if left is not None and right is not None:
        l, r = LowRank(left, right, left_scale, right_scale).factors(x.dtype)
        y += (x @ r.T) @ l.T


@cache
def _product_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which this machine multiplies matrices of such inputs fastest.

    oneDNN takes bfloat16 with any AVX-512, at a quarter of float32's speed where there are no instructions for it.
    """
    own = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and own else torch.float32


def weight_of(operands: Sequence[Tensor | None], bits: int, in_features: int, *, experts: bool = False) -> Any:
    """A weight as the library sees it, or None where it is not covered.

    With ``experts`` all operands but the levels are those of several experts; the result is the first one's.
    """
    return _WEIGHTS.of(operands, bits, in_features, experts)[0]


def _told(operands: Sequence[Tensor | None], bits: int, in_features: int, experts: bool) -> tuple[Any, Any]:
    """The weight, and what makes the operator know it for as long as that lives."""
    module = library()[0]
    weight = _new_weight(module, operands, bits, in_features, experts)
    known = weight is not None and module is _OPERATOR and not experts
    return weight, module.Kept(weight, bits, [0 if t is None else t.data_ptr() for t in operands]) if known else None


# The library reads the tensors where they lie: one that was written to needs nothing.
_WEIGHTS = Derived(_told, copies=False)


def _new_weight(
    module: Any, operands: Sequence[Tensor | None], bits: int, in_features: int, experts: bool = False
) -> Any:
    if module is None or any(t is not None and not (t.is_contiguous() and t.device.type == "cpu") for t in operands):
        return None
    named = dict(zip(NAMES, operands, strict=True))
    if experts:
        named = {name: t if t is None or name == "levels" else t[0] for name, t in named.items()}
    p = Operands(**named)
    f = format_of(p, bits, in_features)
    if f is None or declines_format(f, in_features) is not None or not _types_fit(p):
        return None

    c = known_sizes(f)
    return module.Weight(
        p.packed.shape[0], in_features, bits, c.vector, p.packed.shape[1], c.group_size, _at(p.packed), _at(p.scale),
        _at(p.zero_point), _at(p.levels), factor(p.scale_left), factor(p.scale_right), c.scale_rank, _at(p.codebook),
        _at(p.codebook_scale), c.codebook_rows, c.codebook_columns, factor(p.left, p.left_scale),
        factor(p.right, p.right_scale), f.rank,
    )  # fmt: skip


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def factor(tensor: Tensor | None, its_scale: Tensor | None = None) -> tuple[int, int, int]:
    """A factor as the library is told of it: data, type, scale."""
    return (0, 0, 0) if tensor is None else (_at(tensor), TYPES[tensor.dtype], _at(its_scale))


def _types_fit(p: Operands) -> bool:
    """Whether every tensor has a type that C++ is told of or takes for granted."""
    wanted = {
        "packed": (torch.int32,), "scale": (torch.float16,), "zero_point": (torch.int32,), "levels": (torch.float32,),
        "scale_left": DTYPES, "scale_right": DTYPES, "codebook": (torch.int8,), "codebook_scale": (torch.float16,),
        "left": tuple(TYPES), "right": tuple(TYPES), "left_scale": (torch.float16,), "right_scale": (torch.float16,),
    }  # fmt: skip
    return all(getattr(p, name) is None or getattr(p, name).dtype in dtypes for name, dtypes in wanted.items())


def _agree(portable: Any, fast: Any) -> bool:
    """Whether a module computes what the portable one does, on a product of each width and number of bytes."""
    generator = torch.Generator().manual_seed(0)

    def bytes_(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

    for bits, vector in [*((bits, 1) for bits in _LANE), (3, 2), (2, 4)]:
        x = torch.randn(2, 256, generator=generator)
        packed, scale = bytes_(16, 32 * bits).view(torch.int32), torch.rand(16, 4, generator=generator).half()
        operands = [packed, scale, *[None] * 10]
        if vector > 1:
            operands[6:8] = bytes_(1, 2, 2 ** (bits * vector), vector), torch.rand(1, 2, generator=generator).half()
        y = torch.empty(2, 3, 2, 16)
        for module, results in zip((portable, fast), y, strict=True):
            weight = _new_weight(module, operands, bits, 256)
            for pieces, to in enumerate(results, 1):
                weight.multiply(x.data_ptr(), to.data_ptr(), 2, 1, pieces, 1)
        if not torch.allclose(y[0], y[1], rtol=1e-4, atol=1e-3 * (2**bits if vector == 1 else 128)):
            return False
    for bits in (1, 3, 6):
        x, packed = torch.randn(1, 80, generator=generator), bytes_(2, bits, 160)
        y, scale, none = torch.empty(2, 20), torch.rand(20, generator=generator).half(), (0, 0, 0)
        for module, to in zip((portable, fast), y, strict=True):
            weight = module.TrellisWeight(20, 80, bits, 10, 32, packed.data_ptr(), scale.data_ptr(), none, none, 0)
            weight.multiply(x.data_ptr(), to.data_ptr(), 1, 1, 1)
        if not torch.allclose(y[0], y[1], rtol=1e-4, atol=1e-3):
            return False
    return True


def for_operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function as an operator of torch's runs it."""

    def run(x: Tensor, *arguments: Any) -> Tensor:
        try:
            return function(x, *arguments)
        except KeyboardInterrupt:
            _thread.interrupt_main()  # what passes through the operator comes out as an error that programs may catch
            raise

    return run


def _implement() -> Any:
    """Make the operator on the CPU the library's own, which runs no Python for weights that it was told of.

    Returns:
        The module, which multiplies nothing that `library` has not found right; None where it cannot be done, and the
        operator is `multiply`.
    """
    # Not `register_kernel` of the operators, whose wrapper takes as long as `multiply` does for a small layer.
    torch.library.impl("lorq::rotate", "cpu", turn)
    torch.library.define("lorq::quant_linear_by_python", quant_linear._schema)
    torch.library.impl("lorq::quant_linear_by_python", "cpu", for_operator(multiply))
    try:
        module, name = _built()
    except ImportError:  # which `library` raises when something is to be multiplied: to import lorq is no harm
        module, name = None, ""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    few = _few_tokens(name, by_bytes=True), _few_tokens(name, by_bytes=False)
    if module is not None and module.implement_operator(str(path), *few):
        return module
    torch.library.impl("lorq::quant_linear", "cpu", multiply)
    return None


_OPERATOR = _implement()
