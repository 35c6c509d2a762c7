"""Parcels: what comes out is what went in, in as few bytes as it has values."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lorq.pipeline.parcels import answered, call, own_versions, pack, unpack


@dataclass
class Held:
    values: Tensor


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(3, 5), (4,), (), (0, 7)])
def test_a_tensor_comes_out_as_it_went_in(dtype, shape):
    given = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found = unpack(pack(given)[0])
    assert found.dtype == dtype and found.shape == given.shape
    assert torch.equal(found.to(torch.float64), given.to(torch.float64))


def test_a_view_sends_its_own_values_alone_and_can_be_written_to():
    whole = torch.zeros(1000, 100)
    parcel, _ = pack(whole[:, 3])
    assert len(parcel) < 5000
    unpack(parcel).add_(1)


def test_what_is_shared_stays_shared():
    values = torch.ones(3)
    first, second = unpack(pack([values, {"again": values}])[0])
    assert second["again"] is first


def test_what_is_left_apart_is_told_once_and_put_back():
    held, other = Held(torch.ones(1000)), Held(torch.zeros(2))
    parcel, left = pack({"a": held, "b": other, "c": held}, (Held,))
    assert left[0] is held and left[1] is other and len(left) == 2 and len(parcel) < 500
    found = unpack(parcel, left)
    assert found["a"] is held and found["c"] is held and found["b"] is other


def test_a_call_answers_or_raises_what_the_function_raised():
    here = "cpu", torch.get_num_threads(), own_versions()
    parcel, left = pack((torch.add, (torch.ones(2), 1)))
    assert answered(call(parcel, left, *here), "cpu").tolist() == [2, 2]

    error = ValueError("no")
    error.add_note("while solving a")
    with pytest.raises(ValueError, match="no") as found:
        answered(pack((False, error))[0], "cpu")
    assert found.value.__notes__ == ["while solving a"]


def test_machines_with_another_torch_are_refused():
    parcel, _ = pack((divmod, (7, 2)))
    with pytest.raises(ValueError, match=r"this one has lorq .* and torch .*, not lorq 0 and torch 1; install these"):
        answered(call(parcel, (), "cpu", 1, ("lorq 0", "torch 1")), "cpu")
