"""The net: digests of small models quantized in every way that changes what is stored, and all help texts.

Run in a process of its own (`environment`), so that the sums come out alike on processors of one kind or another:
one thread, and no instruction set above the one that all have. `arithmetic` tells whether they do.

    python tests/contracts/folders.py --record     # writes net/ anew, which a commit's title must say
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NET = Path(__file__).parent / "net"
DIGESTS, HELP = NET / "digests.json", NET / "help.txt"
# Intel's library has a mode in which all processors sum alike; torch, oneDNN and the C library have switches.
_ALIKE = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX512F",
}

_COMMON = {"samples": 4, "seq_len": 32, "calibration": "text.txt", "start_token": "never"}
# name -> (family, method, settings, options): every method, and every kind of codes and parts that is stored.
CASES = {
    "llama flrq": ("llama", "flrq", {"bits": 3, "budget": 1.0}, {}),
    "llama flrq-paper": ("llama", "flrq-paper", {"min_gain": 0.0, "budget": 1.0, "factor_type": "e4m3"}, {}),
    "llama lopro": ("llama", "lopro", {"bits": 3, "rank": 4}, {}),
    "llama lopro-paper": ("llama", "lopro-paper", {"bits": 3, "rank": 4}, {}),
    "llama lopro vectors": (
        "llama", "lopro", {"bits": 2, "codebook": "vector", "rank": 4, "factor_type": "float16"}, {},
    ),
    "llama lrq": ("llama", "lrq", {"steps": 3}, {}),
    "llama lrq-paper": ("llama", "lrq-paper", {"steps": 3}, {}),
    "llama lords": ("llama", "lords", {"bits": 3, "steps": 2}, {}),
    "llama lords refined": ("llama", "lords", {"steps": 2, "refine_steps": 3, "grid": "integer"}, {}),
    "llama lords-paper": ("llama", "lords-paper", {"steps": 5}, {}),
    "llama gptq": ("llama", "gptq", {"bits": 3}, {}),
    "llama gptq plain tokens": ("llama", "gptq", {"bits": 5}, {"token_weights": "plain", "stream": "quantized"}),
    "llama nearest": ("llama", "nearest", {"symmetric": True}, {"calibration": "self"}),
    "llama nearest normal-float": ("llama", "nearest", {"bits": 2, "grid": "normal-float"}, {"calibration": "self"}),
    "llama overrides": (
        "llama", "gptq", {"bits": 2},
        {"exclude": ("o_proj",), "override": ("down_proj:bits=8",), "seed": 1},
    ),
    "llama 8 bits tensor": ("llama", "gptq", {"group_size": -1}, {"activations": "tensor", "smoothing": 0.5}),
    "llama 8 bits token": ("llama", "lopro", {"rank": 0}, {"activations": "token", "kv_cache": "token"}),
    "llama 8 bits block": ("llama", "lrq", {"steps": 3}, {"activations": "token", "kv_cache": "token"}),
    "llama gptq gguf": ("llama", "gptq", {"grid": "q4_1"}, {"override": ("down_proj:grid=iq4_nl",)}),
    "gpt2 gptq": ("gpt2", "gptq", {"bits": 3}, {}),
    "mixtral tileq": ("mixtral", "tileq", {"bits": 3, "rank": 4}, {}),
    "mixtral tileq vectors": (
        "mixtral", "tileq", {"bits": 2, "codebook": "vector", "rank": 4, "importance": "log"}, {},
    ),
    "mixtral tileq by expert": (
        "mixtral", "tileq", {"rank": 4, "sharing": "expert", "metric": "activation", "factor_type": "float16"}, {},
    ),
    "mixtral lopro": ("mixtral", "lopro", {"rank": 2, "rotation": "partial", "importance": "residual"}, {}),
    "mixtral flrq": ("mixtral", "flrq", {"budget": 1.0}, {"expert_tokens": 16, "router_weights": True}),
    "mixtral gptq": ("mixtral", "gptq", {}, {"expert_tokens": 80}),
    "mixtral lords": ("mixtral", "lords", {"steps": 2}, {}),
    "mixtral nearest": ("mixtral", "nearest", {"range_search": "scale"}, {"calibration": "self"}),
}  # fmt: skip


def environment() -> dict[str, str]:
    """Of a process in which the digests are made."""
    return os.environ | _ALIKE


def run() -> dict:
    """Everything that is compared, made in a process of its own."""
    done = subprocess.run([sys.executable, __file__], env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def arithmetic() -> str:
    """A digest of sums, factorisations and functions: where it differs, so will folders, whatever the code."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(192, 192, generator=generator)
    spd = (a @ a.T / 192).double() + torch.eye(192)
    vectors = torch.linalg.eigh(spd)[1].abs()
    parts = [a, spd, torch.linalg.cholesky(spd), torch.linalg.qr(a)[0], torch.linalg.svd(a)[1], vectors, a.exp()]
    parts += [torch.special.ndtri(a.double().sigmoid()), a.abs().log2(), a.softmax(0), a.square().mean(0).rsqrt()]
    parts += [torch.nn.functional.silu(a), torch.linalg.inv(spd), a.cos(), torch.rand(99, generator=generator)]
    parts.append(torch.linalg.solve_triangular(spd, a.double(), upper=True))
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The first half of each file's sha256, by name, but for the times that a run took."""
    files = [file for file in sorted(folder.iterdir()) if file.name != "lorq_measured.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:32] for file in files}


def _made() -> dict:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    import transformers
    from helpers import tiny_folder

    import lorq

    torch.set_num_threads(1)
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    lines = [f"Line {i}: {i * i} is the square of {i}, and {i * 7919 % 1000} is not.\n" for i in range(40)]
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        os.environ["LORQ_CACHE"] = str(Path(work) / "cache")
        Path("text.txt").write_text("".join(lines), encoding="utf-8")
        found = {}
        for name, (family, method, settings, options) in CASES.items():
            if not Path(family).exists():
                tiny_folder(Path(family), family)
            chosen = lorq.METHODS[method](**{"group_size": 32} | settings)
            lorq.quantize(family, name, chosen, **_COMMON | options)
            found[name] = digests(Path(name))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "arithmetic": arithmetic()}
    return {"made with": versions, "folders": found}


def help_text() -> str:
    """What `--help` prints for every command, and for quantize with every method, one after the other."""
    from contextlib import redirect_stdout
    from io import StringIO

    import lorq
    from lorq.cli import main

    commands = [
        "",
        "evaluate",
        "inspect",
        "verify",
        "export",
        "push",
        "report",
        "generate",
        "tune",
        "adapt",
        "merge",
        "compensate",
        "families",
        "demo",
        "bench",
    ]
    commands += [f"bench {name}" for name in ("sketch", "experts", "decode", "adapt", "quantize")]
    commands += ["quantize", *(f"quantize --method {name}" for name in lorq.METHODS)]
    printed = []
    for command in commands:
        with redirect_stdout(StringIO()) as text:
            main([*command.split(), "--help"])
        lines = "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
        printed.append(f"$ lorq {command}".rstrip() + f" --help\n{lines}\n")
    return "\n".join(printed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        DIGESTS.write_text(json.dumps(run(), indent=1, sort_keys=True) + "\n")
        os.environ["COLUMNS"] = "120"
        HELP.write_text(help_text())
    else:
        print(json.dumps(_made()))
