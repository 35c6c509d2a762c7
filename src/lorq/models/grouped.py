"""Integer codes with groups as other programs pack them: GPTQ, AWQ, compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lorq.core.basis import Basis
from lorq.core.codes import IntCodes, IntGrid
from lorq.core.packing import unpack, unpack_columns
from lorq.core.weight import QuantizedWeight

# AWQ deals eight neighbouring columns to the places 0, 4, 1, 5 ... of a word; here, where column j of eight lies.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class GroupedCodes:
    """Codes on equally spaced values, a scale and a zero point for each row and group of columns.

    A weight is ``(codes - zero_point[:, group]) * scale[:, group]``.

    Attributes:
        scale: in weight units, as stored.
        zero_point: whole numbers, which may lie outside the codes.
        group: of each column.
    """

    codes: UInt8[Tensor, "out in"]
    bits: int
    scale: Float[Tensor, "out groups"]
    zero_point: Int[Tensor, "out groups"]
    group: Int[Tensor, "in"]

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight, float32."""
        group = self.group.long()
        return (self.codes.float() - self.zero_point.float()[:, group]) * self.scale.float()[:, group]

    def exact(self) -> QuantizedWeight:
        """The same weight in lorq's own codes, to the last bit.

        Columns whose groups lie scattered (GPTQ's act-order) are put side by side, and the basis tells where from.

        Raises:
            ValueError: if groups are of different sizes, or zero points or scales have no place in lorq's codes.
        """
        groups, columns = self.scale.shape[1], len(self.group)
        sizes = torch.bincount(self.group.long(), minlength=groups)
        if len(sizes) != groups or int(sizes.min()) != int(sizes.max()):
            raise ValueError(
                f"groups must be of one size to be lorq's codes, got {groups} for {columns} columns, of "
                f"{int(sizes.min())} to {int(sizes.max())}"
            )
        low, high = int(self.zero_point.min()), int(self.zero_point.max())
        if low < 0 or high >= 2**self.bits:
            raise ValueError(f"zero points must be codes, 0 to {2**self.bits - 1}, to be lorq's, got {low} to {high}")
        scale = self.scale.to(torch.float16)
        if not torch.equal(scale.float(), self.scale.float()):
            raise ValueError(f"scales must fit float16 to be lorq's, got {self.scale.dtype} ones that do not")
        grid = IntGrid(self.bits, columns // groups, symmetric=low == high == 2 ** (self.bits - 1))
        order = self.group.long().argsort(stable=True)
        in_order = torch.equal(order, torch.arange(columns))
        codes = self.codes if in_order else self.codes[:, order]
        zero = None if grid.symmetric else self.zero_point.to(torch.uint8)
        return QuantizedWeight(IntCodes(codes, scale, zero, grid), None, None if in_order else Basis(order, 0, 0))


def _grouped(codes: Tensor, bits: int, scale: Tensor, zero_point: Tensor, group: Tensor) -> GroupedCodes:
    """What a file says, checked; a ValueError if its parts do not belong together."""
    out, columns = codes.shape
    groups = scale.shape[-1]
    for name, tensor in (("scales", scale), ("zero points", zero_point)):
        if tensor.shape != (out, groups):
            raise ValueError(
                f"{name} must be one for each of {out} rows and {groups} groups, got {tuple(tensor.shape)}"
            )
    if group.shape != (columns,) or group.is_floating_point():
        raise ValueError(
            f"g_idx must be {columns} whole numbers, a column's group each, got {tuple(group.shape)} of {group.dtype}"
        )
    if bool((wrong := (group < 0) | (group >= groups)).any()):
        column = int(wrong.nonzero()[0])
        raise ValueError(f"g_idx must name groups 0 to {groups - 1}, got {int(group[column])} for column {column}")
    return GroupedCodes(codes, bits, scale, zero_point, group)


def _in_order(columns: int, groups: int) -> Int[Tensor, "in"]:
    """Groups of neighbouring columns, the last of which may be smaller."""
    size = -(-columns // groups)
    return torch.arange(columns) // size


def read_gptq(tensors: Mapping[str, Tensor], *, zero_offset: int) -> GroupedCodes:
    """GPTQ's ``qweight`` (in * bits / 32, out), ``qzeros``, ``scales`` (groups, out) and ``g_idx`` (in).

    Codes are one string of bits down each column. The first version of the format stores zero points less one:
    ``zero_offset`` 1.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    words, scale, group = tensors["qweight"], tensors["scales"].T, tensors["g_idx"]
    columns = len(group)
    bits = words.shape[0] * 32 // columns
    codes = unpack(words.T.contiguous(), bits, columns)
    zero = gptq_zero_points(tensors["qzeros"], bits, len(scale), zero_offset=zero_offset)
    return _grouped(codes, bits, scale, zero, group)


def gptq_zero_points(
    words: Int[Tensor, "groups words"], bits: int, out: int, *, zero_offset: int
) -> Int[Tensor, "out groups"]:
    """GPTQ's ``qzeros``, unpacked."""
    return unpack(words.contiguous(), bits, out).T.to(torch.int32) + zero_offset


def awq_columns(words: Int[Tensor, "rows words"]) -> UInt8[Tensor, "rows columns"]:
    """AWQ's codes, unpacked and put in order."""
    codes = unpack(words.contiguous(), 4, 8 * words.shape[1])
    return codes.unflatten(1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(1)


def read_awq(tensors: Mapping[str, Tensor]) -> GroupedCodes:
    """AWQ's "gemm" form: ``qweight`` (in, out / 8), ``qzeros`` (groups, out / 8), ``scales`` (groups, out), 4 bits."""
    codes, scale = awq_columns(tensors["qweight"]).T.contiguous(), tensors["scales"].T
    zero = awq_columns(tensors["qzeros"]).T.to(torch.int32)
    return _grouped(codes, 4, scale, zero, _in_order(codes.shape[1], scale.shape[1]))


def read_packed(tensors: Mapping[str, Tensor], *, bits: int | None = None, symmetric: bool = False) -> GroupedCodes:
    """compressed-tensors' "pack-quantized": lorq's own packing, codes and zero points less ``2^(bits - 1)``.

    Args:
        bits: as the config says; None for what the words tell.
        symmetric: there are no zero points, whatever lies in their place.

    Raises:
        ValueError: if the words are not the dense ones of version 0.18 and later.
    """
    out, columns = tensors["weight_shape"].tolist()
    words, scale = tensors["weight_packed"], _of_rows(tensors["weight_scale"], out)
    fitting = [b for b in ([bits] if bits else range(1, 9)) if -(-columns * b // 32) == words.shape[1]]
    if len(fitting) > 1:
        raise ValueError(
            f"the config must say how many bits {columns} codes have that take {words.shape[1]} words, where "
            f"{' and '.join(map(str, fitting))} do, no group of config_groups is the layer's"
        )
    if not fitting:
        raise ValueError(
            f"{columns} codes of 1 to 8 bits side by side must fill the {words.shape[1]} words of a row, as "
            "compressed-tensors 0.18 and later packs them; write the model again with a newer one"
        )
    (bits,) = fitting
    group = tensors.get("weight_g_idx")
    if group is None:
        group = _in_order(columns, scale.shape[1])
    packed = tensors.get("weight_zero_point")
    if packed is not None and not symmetric:
        zero = unpack_columns(packed, bits, out).to(torch.int32)
    else:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int32)
    return _grouped(unpack(words, bits, columns), bits, scale, zero, group)


def read_plain(tensors: Mapping[str, Tensor], *, block: tuple[int, int] | None = None) -> GroupedCodes:
    """compressed-tensors' "int-quantized": ``weight`` int8, ``weight_scale`` and maybe ``weight_zero_point``.

    Args:
        block: the rows and columns that share a scale; None for scales of rows and groups, or one for all.

    Raises:
        ValueError: if there are other numbers of scales.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    zero = torch.zeros(scale.shape, dtype=torch.int32) if zero is None else zero.expand(scale.shape).to(torch.int32)
    out, columns = weight.shape
    if block is not None:
        expected = (-(-out // block[0]), -(-columns // block[1]))
        if tuple(scale.shape) != expected:
            raise ValueError(f"weight_scale must be {expected}, one for each block {block}, got {tuple(scale.shape)}")
        scale, zero = (tensor.repeat_interleave(block[0], 0)[:out] for tensor in (scale, zero))
        group = torch.arange(columns) // block[1]
    else:
        scale, zero = (_of_rows(tensor, out) for tensor in (scale, zero))
        group = _in_order(columns, scale.shape[1])
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return _grouped(codes, 8, scale, zero + 128, group)


def _of_rows(scale: Tensor, out: int) -> Tensor:
    """Scales of rows and groups as a matrix; a ValueError for those of anything else."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out, 1)
    if scale.ndim not in (1, 2) or len(scale) != out:
        raise ValueError(f"weight_scale must be one number, or a row for each of {out}, got {tuple(scale.shape)}")
    return scale.view(out, -1)
