"""Fixtures that more than one test file builds on."""

import dataclasses

import pytest
import shapes
import torch
from helpers import byte_tokenizer, tiny_folder, tiny_model

from lorq.core.low_rank import store_factors, store_vectors
from lorq.core.tile_factors import TileFactors


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
    """A stored weight of a given shape and format, all parts random: whatever tensors the format lays out."""

    def stored(name, shape, dtype, in_):
        if name == "permutation":
            return torch.randperm(in_, generator=generator).to(dtype)
        if name in ("scale_left", "scale_right"):  # entries about as large as other scales, of either sign
            return (torch.randn(shape, generator=generator) / 8).to(dtype)
        if dtype.is_floating_point:
            return (torch.rand(shape, generator=generator) * 0.02 + 0.005).to(dtype)
        low, high = (-127, 128) if dtype == torch.int8 else (-(2**31), 2**31)
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def make(out, in_, format):
        tensors = {name: stored(name, *entry, in_) for name, entry in format.layout(out, in_).items()}
        if format.codes.kind == "gguf":  # random bytes are no sensible scales
            codes = format.codes.read(tensors, out, in_)
            halves = {name: getattr(codes, name) for name in ("scale", "minimum")}
            parts = {name: stored(name, h.shape, h.dtype, in_) for name, h in halves.items() if h is not None}
            tensors |= dataclasses.replace(codes, **parts).tensors()
        tensors["weight_shape"] = torch.tensor([out, in_])
        if format.rank:
            sizes = (out, format.rank), (format.rank, in_)
            # Smaller than the codes' part, as in models: else sums that all but cancel measure nothing.
            left, right = (torch.randn(shape, generator=generator) / 24 for shape in sizes)
            tensors |= vars(store_factors(left, right, factor_type=format.factor_type))
        if format.input_quantization == "tensor":  # from -2.82 to 3.18
            tensors |= {"input_scale": torch.tensor([6 / 255]), "input_zero_point": torch.tensor([120]).int()}
        return format.read(tensors)

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
