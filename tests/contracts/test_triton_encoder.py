"""The Triton encoder of trellis codes against the reference, in Triton's interpreter and compiled ahead of time."""

import os

import pytest
import torch
from torch.testing import assert_close

from lorq.core.rounding.trellis import encode_trellis_reference

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.mark.skipif(not INTERPRETED, reason="make test-kernels runs it, with TRITON_INTERPRET=1")
@pytest.mark.parametrize(("bits", "window", "length"), [(1, 8, 16), (2, 8, 32), (3, 10, 16), (4, 8, 32), (6, 10, 16)])
def test_triton_chooses_the_codes_of_the_reference(bits, window, length, generator):
    from lorq.kernels.triton_encoder import encode

    columns = torch.randn(3, 2 * length, generator=generator) * 0.02
    scale = torch.rand(2 * length, generator=generator) * 0.01 + 0.01
    upper = torch.eye(3) + torch.rand(3, 3, generator=generator).triu(1)
    given = columns.clone()
    codes, errors = encode(columns, scale, upper, bits, window, length)
    expected, expected_errors = encode_trellis_reference(columns, scale, upper, bits, window, length)
    assert torch.equal(columns, given)
    assert torch.equal(codes, expected)
    assert_close(errors, expected_errors, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("bits", "window"), [(1, 12), (3, 12), (4, 16)])
def test_triton_compiles_for_devices_that_are_not_here(capability, bits, window):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorq.kernels.triton_encoder import encode_sequences

    names = encode_sequences.arg_names
    kinds = dict.fromkeys(("columns", "scale", "upper", "values", "errors", "costs"), "*fp32") | {"codes": "*u8"}
    constants = {
        "BITS": bits,
        "GROUPS": 2 ** (window - bits),
        "AT_ONCE": min(2 ** (window - bits), 1024),
        "LENGTH": 256,
    }
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = ASTSource(encode_sequences, signature, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(binary.asm["cubin"]) > 1000
