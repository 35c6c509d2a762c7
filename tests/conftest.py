"""Fixtures that more than one test file builds on."""

import pytest
import shapes
import torch
from helpers import byte_tokenizer, tiny_folder, tiny_model

from lorq.core.activations import Activations
from lorq.core.basis import Basis
from lorq.core.grids import Codebook
from lorq.core.low_rank import store_factors, store_vectors
from lorq.core.scale_factors import LowRankScale
from lorq.core.tile_factors import TileFactors
from lorq.core.weight import QuantizedWeight, permutation_dtype


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads cost matrices this small more than they give, on a busy machine a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def first_calls_are_checked():
    shapes.forget_calls()


@pytest.fixture
def tokenizer():
    """One token per byte, a model length of 32, and ``<s>`` before a text unless told otherwise."""
    return byte_tokenizer(32)


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a tiny model, by family; made once, not to be changed."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tiny_folder(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return of


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Prose enough for 16 windows of 32 bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {i}: {i * i} is the square of {i}, and {i * 7919 % 1000} is not.\n" for i in range(40)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def correlated(generator):
    """Inputs (tokens, width), float32, whose channels are mixed with each other and of unequal size."""

    def make(tokens, width):
        mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
        loudness = torch.linspace(0.2, 2.0, width)
        return torch.randn(tokens, width, generator=generator) @ mix * loudness

    return make


@pytest.fixture
def random_weight(generator):
    """A stored weight of a given shape and format, all parts random."""

    def make(out, in_, format):
        groups, rank = in_ // format.group_size, format.rank

        def codes(*shape, low=0, high=2**format.code_bits):
            return torch.randint(low, high, shape, generator=generator)

        def positive(*shape):
            return (torch.rand(*shape, generator=generator) * 0.02 + 0.005).to(torch.float16)

        low_rank = None
        if rank:
            left, right = (torch.randn(*shape, generator=generator) / 12 for shape in ((out, rank), (rank, in_)))
            low_rank = store_factors(left, right, type=format.factor_type)
        codebook = basis = None
        if format.vector > 1:
            tiles = out // format.codebook_rows, in_ // format.codebook_columns
            entries = codes(*tiles, 2**format.code_bits, format.vector, low=-127, high=128).to(torch.int8)
            codebook = Codebook(entries, positive(*tiles))
        if format.has_basis:
            order = torch.randperm(in_, generator=generator).to(permutation_dtype(in_)) if format.permuted else None
            basis = Basis(order, format.rotation_block, format.rotation_skip)
        factors = None
        if format.scale_rank:
            # Entries about as large as the scales above, of either sign.
            sizes = ((out, format.scale_rank), (format.scale_rank, in_))
            factors = LowRankScale(
                *((torch.randn(*shape, generator=generator) / 8).to(torch.float16) for shape in sizes)
            )
        grid = ()
        if format.input_quantization == "tensor":
            grid = torch.tensor([6 / 255]), torch.tensor([120], dtype=torch.int32)  # from -2.82 to 3.18
        return QuantizedWeight(
            codes=codes(out, in_ // format.vector).to(torch.uint8),
            scale=None if format.scale_rank else positive(out, groups),
            zero_point=None if format.symmetric else codes(out, groups, high=2**format.bits).to(torch.uint8),
            bits=format.bits,
            low_rank=low_rank,
            codebook=codebook,
            basis=basis,
            grid=format.grid,
            scale_factors=factors,
            activations=Activations(format.input_quantization, format.output_quantization, *grid),
        )

    return make


@pytest.fixture
def random_tiles(generator):
    """Tile factors at random, experts in random cells."""

    def make(out, in_, grid, type, experts, *, rank=3, input_scale=False):
        rows, columns = grid
        # About as large as the random weights' entries.
        lefts = [store_vectors(torch.randn(rank, out, generator=generator) / 4, type) for _ in range(columns)]
        rights = [store_vectors(torch.randn(rank, in_, generator=generator) / 4, type) for _ in range(rows)]
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        scales = 0.5 + torch.rand(experts, in_, generator=generator)
        return TileFactors(
            left=torch.stack([codes.T.contiguous() for codes, _ in lefts]),
            right=torch.stack([codes for codes, _ in rights]),
            left_scale=None if type == "float16" else torch.stack([scale for _, scale in lefts]),
            right_scale=None if type == "float16" else torch.stack([scale for _, scale in rights]),
            cells=cells[torch.randperm(rows * columns, generator=generator)[:experts]].to(torch.int16),
            input_scale=scales.to(torch.float16) if input_scale else None,
        )

    return make
