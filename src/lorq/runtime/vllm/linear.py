"""vLLM's linear layers, table of tokens and head, by lorq's codes and operators."""

from collections.abc import Container, Mapping
from dataclasses import replace
from itertools import chain, count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from lorq.core.basis import Basis
from lorq.core.weight import LayerFormat, QuantizedWeight
from lorq.kernels import fake_quantize, turn
from lorq.runtime.linear import QuantLinear
from lorq.runtime.vllm.loading import Collected
from lorq.runtime.vllm.mixed import mixed_linear
from lorq.runtime.vllm.split import take_columns, take_rows


class Part(nn.Module):
    """One layer of the model as this device has it: some rows, or some columns of what is stored.

    Args:
        dtype: of the inputs, where vLLM's own kernels may multiply the codes.

    Attributes:
        linear: without the basis.
        first, rows: what of its outputs is wanted.
        columns: what of an input in the basis it multiplies; None for all. Such an input is gathered from all devices.
    """

    permutation: Tensor | None
    linear: Any

    def __init__(
        self, weight: QuantizedWeight, rows: tuple[int, int], columns: tuple[int, int], device: torch.device,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        whole, basis = weight.shape, weight.basis
        if columns[1] - columns[0] < whole[1]:
            weight = take_columns(weight, *columns)
        self.first, self.rows = 0, rows[1] - rows[0]
        if self.rows < whole[0]:
            weight, self.first = take_rows(weight, *rows)
        own, taken = replace(weight, basis=None), None
        if dtype is not None:
            taken = mixed_linear(own, dtype, device)
        self.linear = (taken or QuantLinear.from_weight(own)).to(device)
        self.cut = self.rows < self.linear.out_features
        self.columns = columns if columns[1] - columns[0] < whole[1] else None
        self.rotation = (0, 0) if basis is None else (basis.block, basis.skip)
        order = None if basis is None else basis.permutation
        self.register_buffer("permutation", None if order is None else order.to(device))

    @property
    def has_basis(self) -> bool:
        return self.permutation is not None or self.rotation[0] != 0

    def has_basis_of(self, other: "Part") -> bool:
        """Whether an input in the basis of one is one of the other."""
        one, two = self.permutation, other.permutation
        alike = one is two or (one is not None and two is not None and torch.equal(one, two))
        return alike and (self.rotation, self.columns) == (other.rotation, other.columns)

    def image(self, x: Tensor) -> Tensor:
        """The input in the weight's basis, as far as it is multiplied here."""
        if not self.has_basis:
            return x
        if self.columns is None:
            return turn(x, self.permutation, *self.rotation)
        z = turn(tensor_model_parallel_all_gather(x), self.permutation, *self.rotation)
        return z[..., self.columns[0] : self.columns[1]].contiguous()

    def forward(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """The outputs for an input in the basis."""
        y = self.linear.product(z)
        if self.cut:
            y = y[..., self.first : self.first + self.rows]
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y if self.linear.format.output_quantization == "none" else fake_quantize(y, None, None)


class LorqLinearMethod(LinearMethodBase):
    """A linear layer of vLLM, which may be several of the model's: each keeps its own codes, rank and basis.

    Args:
        formats: of the parts by name; None for one that is not quantized.
    """

    def __init__(self, formats: Mapping[str, LayerFormat | None]):
        self.collected = Collected(formats)

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        names = list(self.collected.formats)
        if layer.tp_size > 1 and len(names) != len(output_partition_sizes):
            raise ValueError(
                f"{names[0]} is stored as one layer and vLLM has it as {len(output_partition_sizes)} to share between "
                f"{layer.tp_size} devices; take --tensor-parallel-size 1"
            )
        shared = input_size_per_partition < input_size
        for name, format in self.collected.formats.items():
            if shared and format is not None and format.input_quantization == "token":
                raise ValueError(
                    f"{name} quantizes its inputs by the range of each token, which {layer.tp_size} devices would "
                    "share; take --tensor-parallel-size 1, or --activations tensor when quantizing"
                )
        self._columns = input_size_per_partition
        self._sizes = output_partition_sizes if len(names) == len(output_partition_sizes) else [output_size]
        self.collected.make_room(layer, output_size, input_size, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = next(layer.parameters()).device
        parts = [self._part(layer, place, device) for place in range(len(self._sizes))]
        layer.lorq_parts = nn.ModuleList(parts)
        self.collected.forget()
        # Of each part, which one's image of the input serves it.
        self._images = [
            next(j for j, other in enumerate(parts) if j == i or _alike(part, other)) for i, part in enumerate(parts)
        ]

    def _part(self, layer: Any, place: int, device: torch.device) -> nn.Module:
        weight, size = self.collected.weight(place), self._sizes[place]
        # Of few heads of keys and values several devices have the same.
        rank = layer.tp_rank // (getattr(layer, "num_kv_head_replicas", 1) if place else 1)
        out, in_ = weight.shape
        rows = (rank * size, (rank + 1) * size) if size < out else (0, out)
        start = layer.tp_rank * self._columns if self._columns < in_ else 0
        columns = (start, start + self._columns)
        if rows[1] > out or columns[1] > in_:
            raise ValueError(
                f"{list(self.collected.formats)[place]} must be at least {rows[1]} x {columns[1]} as vLLM has it, it "
                f"is {out} x {in_}; the folder is of another model"
            )
        if isinstance(weight, QuantizedWeight):
            return Part(weight, rows, columns, device, layer.params_dtype)
        dense = nn.Linear(1, 1, bias=False, device="meta")
        own = weight[rows[0] : rows[1], columns[0] : columns[1]].to(layer.params_dtype).clone()
        dense.weight = nn.Parameter(own.to(device), requires_grad=False)
        return dense

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        images: dict[int, Tensor] = {}
        outputs = []
        biases = [None] * len(self._sizes) if bias is None else bias.split(self._sizes)
        for part, own, added in zip(layer.lorq_parts, self._images, biases, strict=True):
            if not isinstance(part, Part):
                outputs.append(nn.functional.linear(x, part.weight, added))
                continue
            if own not in images:
                images[own] = part.image(x)
            outputs.append(part(images[own], added))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return isinstance(one, Part) and isinstance(other, Part) and one.has_basis_of(other)


# By name, which a compiled program has in place of a table.
_TABLES: WeakValueDictionary[str, Part] = WeakValueDictionary()


def free_name(kept: Container[str], name: str) -> str:
    """The name, with a number where a layer of another model of the process, such as a draft model, is kept by it."""
    return next(own for own in chain([name], (f"{name}.{number}" for number in count(2))) if own not in kept)


@torch.library.custom_op("lorq::table_rows", mutates_args=())
def table_rows(index: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of a table, decoded: an operator, since a compiled program must not look into it, which takes any number."""
    part = _TABLES[name]
    own = part.linear
    # Indices of tokens of other devices are masked.
    rows = own.format.decode_rows(own.stored(), (index + part.first).clamp(max=own.out_features - 1), own.in_features)
    return (Basis(part.permutation, *part.rotation).unrotate(rows) if part.has_basis else rows).to(dtype)


@table_rows.register_fake
def _(index: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    return index.new_empty(index.shape[0], width, dtype=dtype)


class LorqTableMethod(QuantizeMethodBase):
    """The table of tokens, the head, or a head that multiplies by the table's codes.

    Args:
        name: the layer's.
        format: None for a head that has no codes of its own.
    """

    def __init__(self, name: str, format: LayerFormat | None):
        self.name, self.collected, self.key = name, Collected({name: format} if format else {}), ""

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        self.collected.make_room(layer, output_size, input_size, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not self.collected.formats:
            return
        weight, own = self.collected.weight(0), layer.shard_indices
        assert isinstance(weight, QuantizedWeight)
        rows = (own.org_vocab_start_index, own.org_vocab_end_index)
        self.key, device = self.key or free_name(_TABLES, self.name), next(layer.parameters()).device
        layer.lorq_table = _TABLES[self.key] = Part(weight, rows, (0, weight.shape[1]), device)
        self.collected.forget()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        rows = table_rows(input_.flatten(), self.key, layer.embedding_dim, layer.params_dtype)
        return rows.view(*input_.shape, -1)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> Any:
        layer.lorq_tied = (embed_tokens,)  # in a tuple: its tensors are not the head's own
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        part: Part = (layer.lorq_tied[0] if hasattr(layer, "lorq_tied") else layer).lorq_table
        y = part(part.image(x))
        # Every device gives as many, to be put side by side.
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - part.rows)) if layer.tp_size > 1 else y
        return y if bias is None else y + bias[: y.shape[-1]].to(y.dtype)
