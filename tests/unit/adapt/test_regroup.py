"""Scales of low rank to scales of groups: exact where they can be, the least error where not."""

import pytest
import torch

from lorq.adapt.regroup import regroup
from lorq.adapt.settings import Groups
from lorq.core.codes import LevelCodes, LevelFormat, LowRankScale

FORMAT = LevelFormat(3, "normal-float", 32, 2)


def lords_weight(generator, steps):
    """8 x 32 under a scale of rank 2; one number for each half of a row if it is in steps."""
    left = torch.tensor([[1.0, 2.0]]).expand(8, 2) * torch.arange(1, 9).view(8, 1) / 16
    right = torch.stack([torch.arange(32) < 16, torch.arange(32) >= 16]).float()
    if not steps:
        right = right + torch.rand(2, 32, generator=generator)
    codes = torch.randint(0, 8, (8, 32), generator=generator, dtype=torch.uint8)
    codes[:, ::16] = 7  # the largest level spans the group
    return LevelCodes(codes, LowRankScale(left.half(), right.half()), FORMAT).decode()


def test_a_scale_that_groups_can_hold_is_kept_to_the_bit(generator):
    dense = lords_weight(generator, steps=True)
    new = regroup(dense, FORMAT, Groups(grid="levels", group_size=16))
    assert torch.equal(new.decode(), dense)


@pytest.mark.parametrize("grid", ["integer", "levels"])
def test_no_share_of_a_group_s_range_has_less_error(generator, grid):
    dense = lords_weight(generator, steps=False)
    error = (regroup(dense, FORMAT, Groups(grid=grid, group_size=16)).decode() - dense).square()
    groups, errors = dense.view(-1, 16), error.view(-1, 16).sum(1)
    for share in (1 - i / 40 for i in range(24)):
        if grid == "levels":
            scale = (groups.abs().amax(1, keepdim=True) * share).half().float()
            table = LevelFormat(3, "normal-float", 16).grid
            tried = table.decode(table.encode(groups, scale), scale)
        else:
            low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) * share / 7).half().float()
            zero = (-low * share / scale).round().clamp(0, 7)
            tried = ((groups / scale + zero).round().clamp(0, 7) - zero) * scale
        # A scale is rounded to float16 after it is chosen.
        assert bool((errors <= 1.01 * (tried - groups).square().sum(1) + 1e-6).all())


def test_finer_groups_and_wider_codes_lose_less(generator):
    dense = lords_weight(generator, steps=False)

    def lost(**settings):
        return float((regroup(dense, FORMAT, Groups(**settings)).decode() - dense).square().sum())

    assert lost(group_size=8) < lost(group_size=16) < lost(group_size=32)
    assert lost(group_size=16, bits=6) < lost(group_size=16, bits=4) / 4 < lost(group_size=16) / 4


def test_groups_that_do_not_tile_are_refused(generator):
    with pytest.raises(ValueError, match="group_size must divide the layer's width, got group_size 12 and width 32"):
        regroup(lords_weight(generator, steps=True), FORMAT, Groups(group_size=12))
