"""quantization_config: what a lorq folder's config.json says of its packed layers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lorq.core.activations import INPUTS, OUTPUTS
from lorq.core.codes import CODES, LEVEL_KINDS, IntGrid, LevelFormat, VectorGrid
from lorq.core.low_rank import FACTOR_TYPES
from lorq.core.tile_factors import TileFormat
from lorq.core.weight import LayerFormat
from lorq.storage.json_files import _short, some_of
from lorq.storage.names import check_version


class LorqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a lorq folder, whose keys docs/format.md explains.

    Raises:
        ValueError: for a newer format version, an unknown or missing key, or a value out of range.
    """

    method: str
    layers: dict[str, Any]
    tiles: dict[str, Any]
    inputs: list[list[str]]
    embeddings: dict[str, str]

    def __init__(self, **keys: Any):
        self.quant_method = keys.pop("quant_method", "lorq")  # type: ignore[assignment]
        version = keys.pop("format_version", None)
        check_version(version)
        self.format_version = version
        if version == 1:
            keys = _from_version_1(keys)
        if version < 3 and isinstance(keys.get("layers"), dict):
            keys["layers"] = {name: _entry_from_version_2(entry) for name, entry in keys["layers"].items()}
        if version < 4:
            keys.setdefault("inputs", [])  # not known
        if version < 5:
            keys.setdefault("embeddings", {})  # were left as they are
        for key, kind in (
            ("lorq_version", str), ("method", str), ("settings", dict), ("layers", dict), ("tiles", dict),
            ("inputs", list), ("embeddings", dict),
        ):  # fmt: skip
            if not isinstance(keys.get(key), kind):
                raise ValueError(f"quantization_config.{key} must be a {kind.__name__}, got {_short(keys.get(key))}")
            setattr(self, key, keys.pop(key))
        if keys:
            raise ValueError(
                f"unknown keys in quantization_config: {some_of(keys)}; known are quant_method, "
                "format_version, lorq_version, method, settings, layers, tiles, inputs, embeddings"
            )
        self.formats()  # checks them
        self.tile_formats()
        _check_inputs(self.inputs, self.layers)
        for table, head in self.embeddings.items():
            if table not in self.layers or not isinstance(head, str) or head in self.layers:
                raise ValueError(
                    "quantization_config.embeddings must name layers, each with the head that multiplies by it and is "
                    f"no layer itself, or nothing, got {_short(table)} with {_short(head)}"
                )

    def formats(self) -> dict[str, LayerFormat]:
        """The layers' formats by name."""
        return {name: read_format(name, entry) for name, entry in self.layers.items()}

    def tile_formats(self) -> dict[str, TileFormat]:
        """The formats of the factors that experts share, by name."""
        found = {}
        for name, entry in self.tiles.items():
            found[name] = f = _read_fields(f"tiles[{_short(name)}]", entry, TileFormat)
            if (
                min(f.rows, f.columns, f.experts, f.rank) < 1
                or max(f.rows, f.columns, f.rank) >= 2**31
                or f.factor_type not in FACTOR_TYPES
            ):
                raise ValueError(
                    f"quantization_config.tiles[{_short(name)}] must have rows, columns, experts and rank from 1 to "
                    f"2^31 and factor_type {', '.join(FACTOR_TYPES)}, got {_short(entry, 400)}"
                )
        return found

    def __repr__(self) -> str:
        # The table of layers is long and transformers prints configs freely.
        return f"LorqConfig(method={self.method!r}, format_version={self.format_version}, layers={len(self.layers)})"


def _check_inputs(inputs: list[Any], layers: dict[str, Any]) -> None:
    """Refuse what does not name groups of layers."""
    groups = [group if isinstance(group, list) else [group] for group in inputs]
    counts = Counter(name for group in groups for name in group if isinstance(name, str))
    for given, group in zip(inputs, groups, strict=True):
        if len(group) < 2 or not all(isinstance(name, str) and name in layers and counts[name] == 1 for name in group):
            raise ValueError(
                "quantization_config.inputs must have lists of 2 and more names of layers, each name once in all, got "
                + _short(given)
            )


def _from_version_1(keys: dict[str, Any]) -> dict[str, Any]:
    """What a folder of format version 1 says, in the words of version 2."""
    if "tiles" in keys:
        raise ValueError("unknown keys in quantization_config of format version 1: tiles")
    layers = keys.get("layers")
    if isinstance(layers, dict):
        layers = {name: _entry_from_version_1(entry) for name, entry in layers.items()}
    return {**keys, "layers": layers, "tiles": {}}


def _entry_from_version_1(entry: Any) -> Any:
    if not isinstance(entry, dict) or set(entry) != {"bits", "group_size", "symmetric", "rank", "factor_bits"}:
        return entry  # refused with the keys it has
    rest = {key: value for key, value in entry.items() if key != "factor_bits"}
    old = (
        "vector", "codebook_rows", "codebook_columns", "permuted", "rotation_block", "rotation_skip",
    )  # fmt: skip
    return (
        rest
        | {key: _FLAT[key][1] for key in old}
        | {"factor_type": {8: "int8", 16: "float16"}.get(entry["factor_bits"], entry["factor_bits"])}
    )


def _entry_from_version_2(entry: Any) -> Any:
    new = ("grid", "scale_rank", "input_quantization", "output_quantization")
    if not isinstance(entry, dict) or not set(entry).isdisjoint(new):
        return entry  # refused with the keys it has
    return entry | {key: _FLAT[key][1] for key in new}


def _read_fields(where: str, entry: Any, kind: type[Any]) -> Any:
    """A dataclass from a JSON object that must have exactly its fields, of their types."""
    _check_keys(where, entry, {field.name: field.type for field in fields(kind)})
    return kind(**entry)


def _check_keys(where: str, entry: Any, known: Mapping[str, Any]) -> None:
    """Refuse what is no object with exactly these keys, of their types."""
    if not isinstance(entry, dict) or set(entry) != set(known):
        got = _short(entry)
        if isinstance(entry, dict):
            odd = {"without": set(known) - set(entry), "with": set(entry) - set(known)}
            got = "one " + " and ".join(f"{word} {some_of(keys)}" for word, keys in odd.items() if keys)
        raise ValueError(f"quantization_config.{where} must have the keys {sorted(known)}, got {got}")
    for key, type_ in known.items():
        if type(entry[key]) is not type_:
            raise ValueError(f"quantization_config.{where}.{key} must be {type_}, got {_short(entry[key])}")


# Keys of a layer's entry: type, and the value in folders of versions that did not have it.
_FLAT: dict[str, tuple[type, Any]] = {
    "bits": (int, None), "group_size": (int, None), "symmetric": (bool, None), "rank": (int, 0),
    "factor_type": (str, "float16"), "vector": (int, 1), "codebook_rows": (int, 0), "codebook_columns": (int, 0),
    "permuted": (bool, False), "rotation_block": (int, 0), "rotation_skip": (int, 0), "grid": (str, "integer"),
    "scale_rank": (int, 0), "input_quantization": (str, "none"), "output_quantization": (str, "none"),
}  # fmt: skip
# Those that tell of the codes, where these are of the kinds that version 3 knew.
_OF_CODES = (
    "bits", "group_size", "symmetric", "vector", "codebook_rows", "codebook_columns", "grid", "scale_rank",
)  # fmt: skip


def write_format(format: LayerFormat) -> dict[str, Any]:
    """A layer's format as a JSON object: flat where version 3 knew the kind of codes, else ``codes`` by itself."""
    rest = {key: value for key, value in vars(format).items() if key != "codes"}
    codes: Any = format.codes
    if not isinstance(codes, IntGrid | LevelFormat | VectorGrid):
        return rest | {"codes": {"kind": codes.kind} | asdict(codes)}
    keys = {"levels": "grid", "rows": "codebook_rows", "columns": "codebook_columns"}
    own = {"symmetric": True} | {keys.get(name, name): value for name, value in vars(codes).items()}
    return {key: _FLAT[key][1] for key in _OF_CODES} | own | rest


def read_format(name: str, entry: Any) -> LayerFormat:
    """The format behind `write_format`'s object.

    Raises:
        ValueError: for an unknown or missing key, a value of another type or out of range.
    """
    where = f"layers[{_short(name)}]"
    if isinstance(entry, dict) and "codes" in entry:
        rest = {key: kind for key, (kind, _) in _FLAT.items() if key not in _OF_CODES}
        _check_keys(where, {key: value for key, value in entry.items() if key != "codes"}, rest)
        given = entry["codes"]
        known = CODES.get(str(given.get("kind"))) if isinstance(given, dict) else None
        if known is None:
            raise ValueError(
                f"quantization_config.{where}.codes must have a kind of {', '.join(CODES)}, got {_short(given)}"
            )
        codes = _read_fields(f"{where}.codes", {key: v for key, v in given.items() if key != "kind"}, known)
    else:
        _check_keys(where, entry, {key: kind for key, (kind, _) in _FLAT.items()})
        codes = _codes(where, entry)
    numbers = {key: v for part in (entry, entry.get("codes", {})) for key, v in part.items() if type(v) is int}
    if large := [f"{key} {value}" for key, value in numbers.items() if not -(2**31) < value < 2**31]:
        raise ValueError(f"quantization_config.{where} must have numbers below 2^31, got {', '.join(large)}")
    format = LayerFormat(codes, **{key: value for key, value in entry.items() if key not in (*_OF_CODES, "codes")})
    if format.rank < 0 or format.factor_type not in FACTOR_TYPES or not 1 <= format.bits <= 8:
        raise ValueError(
            f"quantization_config.{where} must have bits 1..8, group_size >= 1, rank >= 0 and factor_type "
            f"{', '.join(FACTOR_TYPES)}, got {_short(entry, 400)}"
        )
    for key, words in (("input_quantization", INPUTS), ("output_quantization", OUTPUTS)):
        if entry[key] not in words:
            raise ValueError(
                f"quantization_config.{where}.{key} must be one of {', '.join(words)}, got {_short(entry[key])}"
            )
    return format


def _codes(where: str, entry: dict[str, Any]) -> IntGrid | LevelFormat | VectorGrid:
    """The kind of codes that the flat keys tell of."""
    bits, group, vector, rank = (entry[key] for key in ("bits", "group_size", "vector", "scale_rank"))
    books = entry["codebook_rows"], entry["codebook_columns"]
    if vector < 1 or (min(books) < 1 if vector > 1 else books != (0, 0)):
        raise ValueError(
            f"quantization_config.{where} must have vector >= 1, and codebook_rows and codebook_columns just "
            f"where vector is above 1, got {_short(entry, 400)}"
        )
    if entry["grid"] not in LEVEL_KINDS:
        raise ValueError(
            f"quantization_config.{where}.grid must be one of {', '.join(LEVEL_KINDS)}, got {_short(entry['grid'])}"
        )
    if group < 1:
        raise ValueError(f"quantization_config.{where} must have group_size >= 1, got {_short(entry, 400)}")
    of_levels = rank or entry["grid"] != "integer"
    if rank < 0 or (of_levels and not (vector == 1 and entry["symmetric"])):
        raise ValueError(
            f"quantization_config.{where} must have scale_rank >= 0, and be symmetric without codebooks where "
            f"that is above 0 or the grid is not integer, got {_short(entry, 400)}"
        )
    if of_levels:
        return LevelFormat(bits, entry["grid"], group, rank)
    return VectorGrid(bits, vector, *books, group) if vector > 1 else IntGrid(bits, group, entry["symmetric"])
