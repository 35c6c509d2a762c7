"""The least time of a layer on a device, and the table that the docs print of it."""

from pathlib import Path

import pytest

from lorq.kernels.roofline import DEVICES, Device, table, work
from lorq.weight import LayerFormat


def test_the_docs_have_the_table_that_the_function_makes():
    assert table() in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_bytes_and_operations_are_counted_by_hand():
    w = work(300, 256, LayerFormat(3, 128, False, 8, "int8"), tokens=5)
    codes, scales, zeros, factors = 300 * 24 * 4, 300 * 2 * 2, 29 * 2 * 4, 8 * (300 + 256) + 8 * 2 * 2
    assert w.bytes == codes + scales + zeros + factors + 5 * 2 * (300 + 256)
    assert w.operations == 2 * 5 * (300 * 256 + 8 * (300 + 256))


@pytest.mark.parametrize("tokens, bound", [(1, "memory"), (4096, "compute")])
def test_the_longer_of_moving_and_computing_counts(tokens, bound):
    device = Device("one of each", 1e12, 100e12)
    w = work(4096, 4096, LayerFormat(4, 128, True), tokens)
    assert w.bound(device) == bound
    assert w.seconds(device) == {"memory": w.bytes / 1e12, "compute": w.operations / 100e12}[bound]
    assert all(w.seconds(d) > 0 for d in DEVICES)
