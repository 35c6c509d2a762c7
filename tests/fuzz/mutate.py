"""Damage, by the structure of what is damaged; the same seed does the same."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorq.storage.atomic import sha256_of

NUMBERS = (
    -1, 0, 1, 2, 3, 7, 8, 9, 16, 31, 63, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**40,
    -(2**63), 0.5, 1e308, -0.0, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
NAMES = (
    "", ".", "..", "../outside/model.safetensors", "/etc/passwd", "a/../../outside/model.safetensors", "con", "a\x00b",
    "a\nb", "C:\\x.safetensors", "..\\outside\\model.safetensors", "x" * 5000, "\ud800", "é", "lorq",
    "model.safetensors",
    "~/x.safetensors", "./model.safetensors", "outside/../model.safetensors", "weight", "__class__", "0", "1e9",
)  # fmt: skip
WORDS = (
    "float16", "int8", "e4m3", "integer", "normal-float", "trellis", "gguf", "q4_0", "q6_k", "tensor", "token", "none",
    "gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "modelopt", "lorq", "group", "channel", "block", "F16",
    "F32", "BF16", "I64", "I32", "U8", "I8", "BOOL", "F8_E4M3", "F4", "C64", "gptq_v2", "pack-quantized",
)  # fmt: skip
# Sizes and dtypes whose bytes are the same, so that a header stays true of its file.
ALIKE = {"F16": "BF16", "BF16": "I16", "I32": "F32", "F32": "I32", "U8": "I8", "I8": "U8", "I16": "F16", "I64": "F64"}


def damage(place: Path, rng: random.Random) -> str:
    """Damage a file or folder in one way, or in a few; what was done, in words."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        files = [path for path in files if not path.name.startswith("tokenizer")]
        if not files:
            break
        weights = [path for path in files if path.suffix in (".safetensors", ".gguf", ".jsonl")]
        file = rng.choice(weights) if weights and rng.random() < 0.5 else rng.choice(files)
        try:
            done.append(f"{file.name}: {_one(file, place, rng)}")
        except (ValueError, TypeError, LookupError, struct.error, OSError, RecursionError, AttributeError) as error:
            done.append(f"{file.name}: nothing ({type(error).__name__})")  # it was damaged before
    return "; ".join(done)


def _one(file: Path, place: Path, rng: random.Random) -> str:
    if rng.random() < 0.12:
        return rng.choice((_cut, _empty, _more, _remove, _as_folder, _as_link, _as_pickle, _with_code, _flip))(
            file, place, rng
        )
    if file.suffix == ".json":
        return _json(file, rng)
    if file.suffix == ".safetensors":
        return _safetensors(file, place, rng)
    if file.suffix == ".gguf":
        return _gguf(file, rng)
    if file.suffix == ".jsonl":
        return _lines(file, rng)
    return _flip(file, place, rng)


# ---- whole files ------------------------------------------------------------------------------------------


def _cut(file: Path, place: Path, rng: random.Random) -> str:
    size = rng.randrange(max(file.stat().st_size, 1))
    os.truncate(file, size)
    return f"cut to {size} bytes"


def _empty(file: Path, place: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "empty"


def _more(file: Path, place: Path, rng: random.Random) -> str:
    with file.open("ab") as opened:
        opened.write(rng.randbytes(rng.choice((1, 8, 4096))))
    return "longer"


def _remove(file: Path, place: Path, rng: random.Random) -> str:
    file.unlink()
    return "removed"


def _as_folder(file: Path, place: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def _as_link(file: Path, place: Path, rng: random.Random) -> str:
    where = rng.choice(("nothing", file.name, str(place.parent / "outside" / "model.safetensors"), "/dev/null", ".."))
    file.unlink()
    file.symlink_to(where)
    return f"a link to {where}"


class _Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("import builtins; builtins.HOSTILE = True",)


def _as_pickle(file: Path, place: Path, rng: random.Random) -> str:
    folder = file.parent
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs()))
    if rng.random() < 0.7:
        for other in folder.glob("*.safetensors*"):
            other.unlink()
    if rng.random() < 0.3:
        file.write_bytes(pickle.dumps(_Runs()))
    return "a pickle"


def _with_code(file: Path, place: Path, rng: random.Random) -> str:
    (file.parent / "hostile.py").write_text("import builtins\nbuiltins.HOSTILE = True\nclass H: pass\n")
    config = file.parent / "config.json"
    told = json.loads(config.read_text())
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    told["auto_map"] = {kind: "hostile.H" for kind in kinds}
    if rng.random() < 0.5:
        told["model_type"] = "hostile"
    config.write_text(json.dumps(told))
    return "code of its own"


def _flip(file: Path, place: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 4, 64)))]
    for at in places:
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"bits flipped at {places[:4]}"


# ---- JSON -------------------------------------------------------------------------------------------------


def _value(rng: random.Random) -> Any:
    pools = (NUMBERS, NAMES, WORDS, (None, True, False, [], {}, [[]], {"": {}}, [1, 2], ["a"], [None]))
    return rng.choice(rng.choice(pools))


def _json(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.1:
        return _json_text(file, rng)
    told = json.loads(file.read_text(encoding="utf-8"))
    words = change(told, rng)
    file.write_text(json.dumps(told), encoding="utf-8")
    return words


def _json_text(file: Path, rng: random.Random) -> str:
    text = file.read_text(encoding="utf-8")
    kind = rng.randrange(6)
    hostile = (
        "[" * 100_000, "{" + '"a":{' * 50_000, "null", '{"a": 1, "a": 2}',
        text.replace("{", '{"twice": 1, "twice": 2, ', 1),
        "\ufeff" + text,
    )[kind]  # fmt: skip
    data = hostile.encode() if rng.random() < 0.8 else hostile.encode()[:64] + b"\xff\xfe" + hostile.encode()[64:]
    file.write_bytes(data)
    return f"text of kind {kind}"


def change(told: Any, rng: random.Random) -> str:
    """Change one place in JSON."""
    nodes: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, (dict, list)) and node:
            nodes.append(node)
            for value in node.values() if isinstance(node, dict) else node:
                walk(value)

    walk(told)
    node = rng.choice(nodes)
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    kind = rng.randrange(6)
    if kind <= 2:
        node[key] = _value(rng)
        return f"{key} is {str(node[key])[:40]!r}"
    if kind == 3:
        del node[key]
        return f"{key} removed"
    if kind == 4 and isinstance(node, dict):
        name = rng.choice((*NAMES[:12], *WORDS, *node))
        node[name] = node.pop(key) if rng.random() < 0.5 else _value(rng)
        return f"{key} is called {name[:40]!r}"
    if isinstance(node, list):
        node.append(_value(rng))
        return "an item more"
    deep: Any = 1
    for _ in range(rng.choice((10, 600))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    node[key] = deep
    return f"{key} is nested"


# ---- safetensors ------------------------------------------------------------------------------------------


def read_parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and bytes of a file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_parts(file: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    """A file of a header, which may be text, and bytes; its length may be a lie."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _safetensors(file: Path, place: Path, rng: random.Random) -> str:
    header, data = read_parts(file)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.randrange(9)
    if kind <= 3:
        words = _content(header, name, data, rng)
        if isinstance(words, tuple):
            words, data = words
        write_parts(file, header, data)
    elif kind <= 5:
        words = change(header, rng)
        write_parts(file, header, data)
    elif kind == 6:
        length = rng.choice((0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1, len(data)))
        write_parts(file, header, data, length)
        words = f"the header's length is {length}"
    elif kind == 7:
        twice = json.dumps({name: header[name]})[1:-1]
        write_parts(file, "{" + twice + "," + json.dumps(header)[1:], data)
        words = f"{name} is there twice"
    else:
        own = header[name]
        begin, end = own["data_offsets"]
        places = ([-1, end], [end, begin], [begin, 2**62], [0, end - begin], [begin + 1, end + 1], [begin, end, 1])
        own["data_offsets"] = rng.choice(places)
        write_parts(file, header, data)
        words = f"{name} lies at {own['data_offsets']}"
    if rng.random() < 0.5:
        words += ", sealed again" * seal_again(file, place)
    return words


def _content(header: dict[str, Any], name: str, data: bytes, rng: random.Random) -> Any:
    """Change a tensor so that the file is still a good one."""
    own = header[name]
    begin, end = own["data_offsets"]
    kind = rng.randrange(6)
    if kind == 0 and own["dtype"] in ALIKE:
        own["dtype"] = ALIKE[own["dtype"]]
        return f"{name} is {own['dtype']}"
    if kind == 1:
        own["shape"] = rng.choice((own["shape"][::-1], [*own["shape"], 1], [1, *own["shape"]]))
        return f"{name} has the shape {own['shape']}"
    if kind == 2:
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        return f"{name} and {other} change places"
    if kind == 3:
        new = rng.choice((f"{name}x", name.rpartition(".")[2], f"{name}.weight", *NAMES))
        header[new] = header.pop(name)
        return f"{name} is called {new[:40]!r}"
    fill = rng.choice((b"\xff", b"\x00", b"\x00\x7c", b"\x80\x7f", b"\x7f", rng.randbytes(64)))
    if not 0 <= begin <= end <= len(data):
        raise ValueError("it was damaged before")
    size = end - begin if rng.random() < 0.5 else min(end - begin, rng.choice((1, 2, 4, 8)))
    new_bytes = (fill * (size // len(fill) + 1))[:size]
    return f"{name} is filled with {fill[:4].hex()}", data[:begin] + new_bytes + data[begin + size :]


def seal_again(file: Path, place: Path) -> bool:
    """Put the checksum of a changed file where the old one is known, so that what lies behind it is reached."""
    report = place / "lorq_report.json"
    if report.is_file():
        try:
            told = json.loads(report.read_text())
            told["checksums"][file.name] = sha256_of(file)
            report.write_text(json.dumps(told))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        return True
    return False


# ---- lines, and GGUF --------------------------------------------------------------------------------------


def _lines(file: Path, rng: random.Random) -> str:
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, rng.choice(lines))
    elif kind == 2:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    else:
        told = json.loads(lines[at])
        words = change(told, rng)
        lines[at] = json.dumps(told).encode()
        file.write_bytes(b"\n".join(lines))
        return words
    file.write_bytes(b"\n".join(lines))
    return f"line {at} in way {kind}"


def _gguf(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    kind = rng.randrange(5)
    end = data.find(b"lorq.report") if rng.random() < 0.5 else len(data) // 2
    hostile = rng.choice((0, 1, 2, 9, 10, 11, 12, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1))
    if kind <= 1:  # a number of the header: behind a key
        keys = [at for at in range(24, len(data) - 16) if data[at : at + 8] in KEYS]
        at = rng.choice(keys) if keys else 8
        at += rng.choice((-8, 0, 8, 12, 16, 20, 24, 28, 32))
        form = rng.choice(("<Q", "<I"))
        struct.pack_into(form, data, at, hostile if form == "<Q" else hostile & 0xFFFFFFFF)
    elif kind == 2:  # counts
        struct.pack_into("<Q", data, rng.choice((8, 16)), hostile)
    elif kind == 3:
        at = rng.randrange(4, max(end, 5))
        struct.pack_into("<Q", data, at, hostile)
    else:
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return f"numbers in way {kind}, {hostile}"


KEYS = (
    b"general.",
    b"llama.at",
    b"llama.bl",
    b"tokenize",
    b"blk.0.at",
    b"token_em",
    b"output_n",
    b"lorq.rep",
    b"blk.0.ff",
)
