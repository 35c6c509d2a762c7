"""QuantEmbedding: the module that stands where a table of tokens was, and TiedHead, a head that multiplies by it."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lorq.core.weight import LayerFormat
from lorq.runtime.packed import PackedWeight


class QuantEmbedding(PackedWeight):
    """Rows of a packed table: of a lookup only the rows that are asked for are decoded.

    What the table's own class does besides, such as Gemma's scale, it goes on doing with these rows: ``own`` is the
    original module with nothing in its table. Rows come in ``own``'s dtype.
    """

    def __init__(self, own: nn.Embedding, format: LayerFormat, device: torch.device | str | None = None):
        super().__init__(own.embedding_dim, own.num_embeddings, format, device)
        # A buffer of no rows, which is not stored: what initialises, moves or converts the model finds a table.
        empty = own.weight.new_empty(0, own.embedding_dim, device=device)
        del own.weight
        own.register_buffer("weight", empty, persistent=False)
        own.padding_idx = None  # which only matters for gradients
        self.own = own

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense table, decoded anew at every look: for reading, writing to it changes nothing."""
        return self.value().dense().to(self.own.weight.dtype)

    def forward(self, input: Int64[Tensor, "*batch"]) -> Tensor:
        rows = self.rows(input.flatten())
        if type(self.own).forward is nn.Embedding.forward:
            return rows.view(*input.shape, self.embedding_dim)
        index = torch.arange(len(rows), device=rows.device).view(input.shape)
        looked_up: Tensor = torch.func.functional_call(self.own, {"weight": rows}, (index,))
        return looked_up

    def rows(self, index: Int64[Tensor, "count"]) -> Float[Tensor, "count in"]:
        """Some rows of the table, decoded."""
        return self.format.decode_rows(self.stored(), index, self.in_features).to(self.own.weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The original module with the dense table."""
        own, weight = self.own, self.value().dense()
        del own.weight
        own.register_parameter("weight", nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False))
        return own

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse=False)
        if recurse:
            self.own._apply(fn)
        return self

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, codes={self.format.codes}"


class TiedHead(nn.Module):
    """``y = x W^T + b`` with the packed table of a `QuantEmbedding` as ``W``, which is there once."""

    bias: nn.Parameter | None

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.table = (table,)  # in a tuple: its tensors are not the head's own
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return self.table[0].in_features

    @property
    def out_features(self) -> int:
        return self.table[0].out_features

    @property
    def weight(self) -> Tensor:
        """The dense table; see `QuantEmbedding.weight`."""
        return self.table[0].weight

    def forward(self, x: Tensor) -> Tensor:
        table, bias = self.table[0], self.bias
        y = table.product(table.turn(x) if table.format.has_basis else x)
        return y if bias is None else y + bias.to(y.dtype)

    def dequantize(self) -> nn.Linear:
        """A plain linear layer with the table, which is dequantized already."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = self.table[0].own.weight
        layer.register_parameter("bias", self.bias)
        return layer
