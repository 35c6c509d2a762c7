"""The least time of a layer on a device, and the tables of it in the docs."""

from pathlib import Path

import pytest
from helpers import layer_format

from lorq.bench.roofline import DEVICES, Device, expert_table, expert_work, table, work
from lorq.core.tile_factors import TileFormat


def test_the_docs_have_the_tables_that_the_functions_make():
    measured = Path(__file__).parents[3] / "docs" / "measured"
    assert (measured / "roofline.csv").read_text() == table() + "\n"
    assert (measured / "roofline_experts.csv").read_text() == expert_table() + "\n"


def test_bytes_and_operations_are_counted_by_hand():
    w = work(300, 256, layer_format(3, 128, False, 8, "int8"), tokens=5)
    codes, scales, zeros, factors = 300 * 24 * 4, 300 * 2 * 2, 29 * 2 * 4, 8 * (300 + 256) + 8 * 2 * 2
    assert w.bytes == codes + scales + zeros + factors + 5 * 2 * (300 + 256)
    assert w.operations == 2 * 5 * (300 * 256 + 8 * (300 + 256))


def test_experts_and_factors_that_tokens_share_are_counted_once():
    format, tiles = layer_format(2, 128, True), TileFormat(4, 2, 6, 8, "int8")
    weight, factors = 300 * 256 // 4 + 300 * 2 * 2, 8 * (4 * 256 + 2 * 300) + 8 * 2 * (4 + 2) + 4 * 6  # scales, cells
    w = expert_work(300, 256, format, tiles, tokens=5, top_k=2)
    assert w.bytes == 6 * weight + factors + 5 * 2 * 256 + 10 * 2 * 300
    assert w.operations == 2 * (10 * 300 * 256 + 5 * 4 * 8 * 256 + 10 * 8 * 300)
    one = expert_work(300, 256, format, tiles, tokens=1, top_k=2)
    factors = 8 * (2 * 256 + 2 * 300) + 8 * 2 * (2 + 2) + 4 * 2
    assert one.bytes == 2 * weight + factors + 2 * 256 + 2 * 2 * 300


@pytest.mark.parametrize("tokens, bound", [(1, "memory"), (4096, "compute")])
def test_the_longer_of_moving_and_computing_counts(tokens, bound):
    device = Device("one of each", 1e12, 100e12)
    w = work(4096, 4096, layer_format(4, 128, True), tokens)
    assert w.bound(device) == bound
    assert w.seconds(device) == {"memory": w.bytes / 1e12, "compute": w.operations / 100e12}[bound]
    assert all(w.seconds(d) > 0 for d in DEVICES)
