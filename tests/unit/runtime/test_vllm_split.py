"""Parts of a weight for several devices stand for the same numbers as the whole."""

from dataclasses import replace

import pytest
import torch

from lorq.core.codes import GgufGrid, IntGrid, LevelFormat, TrellisGrid, VectorGrid
from lorq.core.weight import LayerFormat, Tile
from lorq.runtime.vllm.split import take_columns, take_rows

OUT, IN = 96, 64
KINDS = {
    "symmetric": IntGrid(4, 16, symmetric=True),
    "asymmetric": IntGrid(3, 32),
    "one group a row": IntGrid(3, IN),
    "levels": LevelFormat(3, "normal-float", 16),
    "scales of low rank": LevelFormat(4, "normal-float", IN, scale_rank=3),
    "vectors": VectorGrid(2, 4, 32, 16, 16),
    "trellis": TrellisGrid(3, 12, 32),
}
GGUF = ("q4_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q6_k", "tq1_0")


@pytest.fixture(params=KINDS)
def weight(request, random_weight):
    kind = KINDS[request.param]
    return random_weight(OUT, IN, LayerFormat(kind, rank=4, rotation_block=16, permuted=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (32, 96), (40, 56), (0, OUT)])
def test_rows_are_those_of_the_whole(weight, start, stop):
    part, first = take_rows(weight, start, stop)
    assert torch.equal(part.dense()[first : first + stop - start], weight.dense()[start:stop])
    assert part.shape[0] <= stop - start + 62  # no more than codes cannot be cut at
    stored = part.format.read(part.tensors())
    assert torch.equal(stored.dense(), part.dense())


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (16, 64), (32, 48)])
def test_products_of_columns_sum_to_that_of_the_whole(weight, start, stop, generator):
    x = torch.randn(5, IN, generator=generator)
    z = weight.basis.rotate(x)
    parts = [take_columns(weight, a, b) for a, b in ((0, start), (start, stop), (stop, IN)) if b > a]
    assert all(part.basis is None for part in parts)
    pieces = z.split([part.shape[1] for part in parts], 1)
    total = sum(piece @ part.dense().T for piece, part in zip(pieces, parts, strict=True))
    torch.testing.assert_close(total, x @ weight.dense().T, rtol=1e-4, atol=1e-5)
    for part in parts:
        part.format.check(*part.shape)
        assert torch.equal(part.format.read(part.tensors()).dense(), part.dense())


def test_columns_in_the_middle_of_a_group_get_smaller_groups(random_weight):
    weight = random_weight(OUT, IN, LayerFormat(IntGrid(4, 32)))
    part = take_columns(weight, 8, 40)
    assert part.codes.format.group_size == 8
    assert torch.equal(part.dense(), weight.dense()[:, 8:40])


def test_columns_in_the_middle_of_a_codebook_are_refused(random_weight):
    weight = random_weight(OUT, IN, LayerFormat(KINDS["vectors"]))
    with pytest.raises(ValueError, match="columns 8 to 40 must be cut between codebooks, which serve 16 columns each"):
        take_columns(weight, 8, 40)


@pytest.mark.parametrize("type", GGUF)
def test_blocks_of_gguf_are_cut_between_each_other(type, random_weight):
    block = GgufGrid(type).layout_of.block
    weight = random_weight(OUT, 4 * block, LayerFormat(GgufGrid(type)))
    part, first = take_rows(weight, 8, 40)
    assert first == 0 and torch.equal(part.dense(), weight.dense()[8:40])
    part = take_columns(part, block, 3 * block)
    assert torch.equal(part.dense(), weight.dense()[8:40, block : 3 * block])
    assert torch.equal(part.format.read(part.tensors()).dense(), part.dense())
    with pytest.raises(ValueError, match=f"columns 0 to 16 must be cut between blocks of {type}, which have {block}"):
        take_columns(weight, 0, 16)


def test_factors_that_experts_share_are_refused(random_weight, random_tiles):
    weight = random_weight(OUT, IN, LayerFormat(KINDS["symmetric"]))
    shared = replace(weight, low_rank=Tile(random_tiles(OUT, IN, (1, 1), "float16", 2), 0))
    for call in (lambda: take_rows(shared, 0, 32), lambda: take_columns(shared, 0, 32)):
        with pytest.raises(ValueError, match="Tile must be of a kind that can be shared by several devices"):
            call()
