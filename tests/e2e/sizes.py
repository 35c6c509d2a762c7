"""Models of the sizes people have, made here of random weights, through every command; one CSV line a run.

    python tests/e2e/sizes.py 1b nearest --kill            a Llama of 1B shapes, killed in mid-run and resumed
    python tests/e2e/sizes.py 7b gptq --blocks 2           7B shapes, of whose 32 blocks the last two are quantized
    python tests/e2e/sizes.py moe nearest                  two layers of 64 experts

Random weights prove sizes, times and memory; they prove nothing about quality.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# A line is written when its command has ended.
COLUMNS = (
    "model", "files", "gigabytes", "method", "blocks", "seconds", "seconds_a_block", "peak_gigabytes",
    "resumed_after", "out_gigabytes", "load_and_generate_seconds", "evaluate_seconds", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model's shapes, by the arguments of transformers' config class."""

    kind: str
    config: dict[str, Any]
    files: int


_SMALL_BLOCKS = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256,
    "tie_word_embeddings": True, **_SMALL_BLOCKS,
}  # fmt: skip
SIZES = {
    "1b": Size("llama", LLAMA_1B, files=1),
    "1b-five-files": Size("llama", LLAMA_1B, files=5),
    "7b": Size(
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 49152,
            "tie_word_embeddings": False, **_SMALL_BLOCKS, "num_key_value_heads": 32,
        },
        files=32,
    ),
    "moe": Size(
        "qwen3_moe",
        {
            "hidden_size": 2048, "moe_intermediate_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
            "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 49152, "tie_word_embeddings": True,
            "head_dim": 64, **_SMALL_BLOCKS,
        },
        files=2,
    ),
}  # fmt: skip
# Larger than any machine here: only to be planned, their files are holes (`write_holes`).
PLANNED = {
    "405b": Size(
        "llama",
        {
            "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256,
            "num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        files=191,
    ),
    "1t": Size(
        "deepseek_v3",
        {
            "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
            "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "vocab_size": 163840,
            "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        },
        files=62,
    ),
}  # fmt: skip


def _shapes(folder: Path, size: Size) -> dict[str, tuple[int, ...]]:
    """Write a model's config; the shapes of what it stores."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(size.kind, dtype="bfloat16", **size.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def write_holes(folder: Path, size: Size) -> int:
    """Write a model of zeros that take no room on the disk; the bytes that its files say they have."""
    parts = list(_stored(_shapes(folder, size)))
    each, weight_map, total = -(-len(parts) // size.files), {}, 0
    for number, start in enumerate(range(0, len(parts), each), 1):
        file, header, end = f"model-{number:05d}-of-{size.files:05d}.safetensors", {}, 0
        for name, make in parts[start : start + each]:
            shape = make.args[0]
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_model(folder: Path, size: Size) -> int:
    """Write a model of random bfloat16 weights, never more than one file of it in memory; its bytes."""
    names, tensors, weight_map = list(_stored(_shapes(folder, size))), {}, {}
    generator, part = torch.Generator().manual_seed(0), -(-len(names) // size.files)
    for number, start in enumerate(range(0, len(names), part), 1):
        file = "model.safetensors" if size.files == 1 else f"model-{number:05d}-of-{size.files:05d}.safetensors"
        tensors = {name: make(generator) for name, make in names[start : start + part]}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        tensors.clear()
    if size.files > 1:
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder_bytes(folder)


def _stored(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Callable[[torch.Generator], Tensor]]]:
    """Each tensor as the hub's checkpoints name it, experts one by one, and how to make it."""
    for name, shape in shapes.items():
        if len(shape) == 3:  # transformers keeps all experts of a layer in one tensor
            place, _, projection = name.rpartition(".")
            halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for expert in range(shape[0]):
                for half in halves:
                    own = (shape[1] // len(halves), shape[2])
                    yield f"{place}.{expert}.{half}.weight", partial(_random, own)
        else:
            yield name, partial(_random, shape)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for a norm; else of the size at which a product keeps its input's."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator).mul_(shape[-1] ** -0.5)


def add_tokenizer(folder: Path) -> None:
    """The tokenizer of the demo's model, of 49,152 tokens."""
    from transformers import AutoTokenizer

    from lorq.demo import demo_model

    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)


def count_shards(folder: Path) -> int:
    return len(list(folder.glob("lorq-*.safetensors")))


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Ran:
    """A finished or killed command: what it printed, how long it took, its peak of memory in bytes."""

    out: str
    seconds: float
    peak: int
    killed: bool


def run(*arguments: str | Path, kill_when: Callable[[], bool] | None = None) -> Ran:
    """`lorq ARGUMENTS` in a process of its own; a RuntimeError if it fails. Killed as soon as ``kill_when`` says so."""
    command = [sys.executable, "-m", "lorq.cli", *map(str, arguments)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process, killed = subprocess.Popen(command, stdout=out, stderr=err), False
        if kill_when is not None:
            while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if not killed and kill_when():
                    process.kill()
                    killed = True
                time.sleep(0.05)
        else:
            found = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(found[1])
        seconds = time.monotonic() - began
        for file in (out, err):
            file.seek(0)
        if process.returncode and not killed:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {err.read()[-2000:]}")
        return Ran(out.read(), seconds, found[2].ru_maxrss * 1024, killed)


def quantize(
    folder: Path, out: Path, method: str, *, blocks: int, last: int, kill: bool, text: str, group: int = 64
) -> dict[str, Any]:
    """Quantize ``last`` of the blocks, or all, and tell what it took; with ``kill``, kill -9 in mid-run and resume."""
    options = ["--method", method, "--group-size", str(group), "--json"]
    if method != "nearest":
        options += ["--calibration", text, "--samples", "4", "--seq-len", "256"]
    work = last or blocks
    if last:
        options += ["--exclude", rf"\.layers\.({'|'.join(map(str, range(blocks - last)))})\."]
    row: dict[str, Any] = {"method": method, "blocks": work}
    seconds, peak = 0.0, 0
    if kill:
        # A shard each for the embeddings and every block, also for those that stay as they are.
        wanted = 2 + (blocks - work) + work // 2
        first = run("quantize", folder, out, *options, kill_when=lambda: count_shards(out) >= wanted)
        row["resumed_after"], seconds, peak = count_shards(out), first.seconds, first.peak
        if not first.killed:
            raise RuntimeError("the run ended before it was killed")
        options.append("--resume")
    ran = run("quantize", folder, out, *options)
    # From one file of a quantized block to the next.
    written = [file.stat().st_mtime for file in sorted(out.glob("lorq-*.safetensors"))]
    each = [after - before for before, after in zip(written[-work - 1 :], written[-work:], strict=False)]
    row |= {
        "seconds_a_block": round(statistics.median(each), 1),
        "seconds": round(seconds + ran.seconds, 1),
        "peak_gigabytes": round(max(peak, ran.peak) / 1e9, 2),
        "out_gigabytes": round(folder_bytes(out) / 1e9, 2),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("method")
    parser.add_argument("--blocks", type=int, default=0, help="quantize only so many of the last blocks")
    parser.add_argument("--kill", action="store_true", help="kill -9 in mid-run, then resume")
    parser.add_argument("--folder", type=Path, help="where the model is, or is made and kept; else a temporary one")
    parser.add_argument("--csv", type=Path, help="append a line to this file")
    parser.add_argument("--no-use", action="store_true", help="only quantize: neither generate nor evaluate")
    asked = parser.parse_args()
    size = SIZES[asked.size]
    with tempfile.TemporaryDirectory(prefix="lorq-sizes-") as temporary:
        folder = asked.folder or Path(temporary) / asked.size
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_model(folder, size)
            add_tokenizer(folder)
        out, blocks = Path(temporary) / "out", size.config["num_hidden_layers"]
        row = quantize(folder, out, asked.method, blocks=blocks, last=asked.blocks, kill=asked.kill, text="python-docs")
        whole = {"model": asked.size, "files": size.files, "gigabytes": round(folder_bytes(folder) / 1e9, 2)}
        row = whole | row | {"threads": torch.get_num_threads()}
        if not asked.no_use:
            answer = run("generate", out, "The", "--tokens", "8", "--dtype", "bfloat16")
            row["load_and_generate_seconds"] = round(answer.seconds, 1)
            judged = run("evaluate", out, "--window", "256", "--windows", "2", "--dtype", "bfloat16", "--json")
            row["evaluate_seconds"] = round(judged.seconds, 1)
            assert re.search(r'"perplexity": \d', judged.out), judged.out
    print(row)
    if asked.csv:
        new = not asked.csv.exists()
        with asked.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
