"""The test run checks shape annotations: in each test the first calls of every function."""

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

from lorq.core.packing import pack

CODES = torch.zeros(2, 32, dtype=torch.uint8)


def test_a_wrong_shape_a_wrong_dtype_and_a_wrong_type_are_refused():
    for codes, bits in ((CODES[0], 4), (CODES.float(), 4), (CODES, "4")):
        with pytest.raises(TypeCheckError, match="pack"):
            pack(codes, bits)


@pytest.mark.parametrize("again", [False, True])
def test_every_test_has_its_first_calls_checked(again):
    for _ in range(shapes.CALLS - 1):
        pack(CODES, 4)
    with pytest.raises(TypeCheckError):
        pack(CODES[0], 4)
