"""Benchmarks: the block sketch beside other factorisations, quantization runs by method, fused experts."""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.basis import largest_block
from lorq.bench_decode import seconds_of
from lorq.demo import demo_model
from lorq.evaluation import evaluate
from lorq.experts import Experts
from lorq.hf import read_device, read_dtype
from lorq.linear import QuantLinear
from lorq.sketch import sketch
from lorq.tiled import QuantExperts, Tiles
from lorq.tiles import TileFormat
from lorq.weight import LayerFormat

Result = dict[str, float | int | str | None]


def bench_sketch(size: int = 4096, rank: int = 64, repeats: int = 3, seed: int = 0, svd: bool = True) -> Result:
    """Time four ways to factor a square float32 matrix whose singular values are ``k^-0.5``.

    The ways take turns, ``repeats`` rounds after an untimed one at a small size, so that a busy machine
    slows all of them; seconds are medians. Residuals are divided by the optimal one, which the known
    spectrum gives: ``sqrt(sum_{k > rank} 1 / k)``.

    Args:
        size: rows and columns.
        rank: factor pairs, ``1 <= rank < size``.
        repeats: timed rounds, at least 1.
        seed: of the matrix and of every sketch.
        svd: whether to time the full SVD, which takes most of the time; if not, its entries are None.

    Returns:
        ``speedup_vs_svd``, ``speedup_vs_rank1``, ``speedup_vs_svd_lowrank``: seconds of the other way
        over seconds of the block form. ``residual_ratio``: of the block form. ``<way>_seconds`` and
        ``<way>_residual_ratio`` for ``block``, ``rank1``, ``svd_lowrank`` and ``svd``. ``size``,
        ``rank``, ``seed``, ``repeats``, ``torch_threads``.

    Raises:
        ValueError: if ``rank`` or ``repeats`` is out of range.

    Source:
        ``svd_lowrank`` runs with ``q = rank + 8, niter = 2``: six products of the matrix with ``rank + 8``
        vectors. The block form as it is by default makes five with ``rank + 16``.
    """
    if not 1 <= rank < size:
        raise ValueError(f"rank must be between 1 and size - 1 = {size - 1}, got {rank}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    ways = {"block": _block, "rank1": _rank1, "svd_lowrank": _svd_lowrank} | ({"svd": _svd} if svd else {})
    small = known_spectrum(min(size, 64), seed=seed)
    for factor in ways.values():
        factor(small, min(rank, small.shape[0] - 1), seed)
    a = known_spectrum(size, seed=seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    residual: dict[str, float] = {}
    optimal = math.sqrt(sum(1 / k for k in range(rank + 1, size + 1)))
    for _ in range(repeats):
        for name, factor in ways.items():
            start = time.perf_counter()
            left, right = factor(a, rank, seed)
            seconds[name].append(time.perf_counter() - start)
            residual[name] = float(torch.linalg.vector_norm((a - left @ right).double())) / optimal
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    result: Result = {"residual_ratio": residual["block"]}
    for name in ("svd", "rank1", "svd_lowrank"):
        result[f"speedup_vs_{name}"] = median[name] / median["block"] if name in ways else None
    for name in ("block", "rank1", "svd_lowrank", "svd"):
        result |= {f"{name}_seconds": median.get(name), f"{name}_residual_ratio": residual.get(name)}
    settings = {"size": size, "rank": rank, "seed": seed, "repeats": repeats}
    return result | settings | {"torch_threads": torch.get_num_threads()}


def known_spectrum(size: int, *, seed: int) -> Float[Tensor, "size size"]:
    """``S C diag(k^-0.5) C^T S'``, with C the orthonormal cosine transform and S, S' random signs.

    Orthogonal factors by formula: the spectrum is known to rounding, and no QR of a large matrix is
    needed. A Gaussian test vector meets every orthogonal factor alike, so they need not be Haar.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(size, dtype=torch.float64)
    cosine = torch.cos(torch.outer(k + 0.5, k) * (math.pi / size)) * math.sqrt(2 / size)
    cosine[:, 0] *= math.sqrt(0.5)
    signs = torch.randint(0, 2, (2, size, 1), generator=generator) * 2 - 1
    u, v = (signs * cosine).float()  # two of (size, size)
    return (u * (k + 1).pow(-0.5).float()) @ v.T


def _block(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return sketch(a, rank=rank, form="block", generator=torch.Generator().manual_seed(seed))


def _rank1(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return sketch(a, rank=rank, form="rank1", generator=torch.Generator().manual_seed(seed))


def _svd_lowrank(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    # torch.svd_lowrank takes no generator; the fork leaves the caller's random state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(a, q=min(rank + 8, *a.shape), niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def _svd(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


_ROTATIONS = {
    "none": ["--rotation", "none"],
    "full": ["--rotation", "full"],
    "partial": ["--rotation", "partial", "--importance", "log"],
}
_ROUNDINGS = {
    "nearest": ["--rounding", "nearest"],
    "gptq": ["--rounding", "gptq"],
    "gptvq": ["--codebook", "vector"],
}

# What `lorq bench quantize` compares: names of methods, and variants of theirs.
PRESETS: dict[str, list[str]] = {
    "nearest": ["--method", "nearest"],
    "gptq": ["--method", "gptq"],
    "gptq-paper": ["--method", "gptq", "--range-search", "none", "--shrinkage", "0"],
    "flrq": ["--method", "flrq"],
    "flrq-paper": ["--method", "flrq-paper"],
    "flrq-paper-8bit": ["--method", "flrq-paper", "--factor-bits", "8"],
    "flrq-thrifty": ["--method", "flrq", "--budget", "0.1"],
    "flrq-thorough": ["--method", "flrq", "--epochs", "3"],
    "lopro": ["--method", "lopro", "--rank", "8"],
    "lopro-paper": ["--method", "lopro-paper", "--rank", "8"],
    "lopro-vector": ["--method", "lopro", "--rank", "8", "--codebook", "vector"],
    # LoPRo's parts one by one, without a low-rank part: rotation, then rounding.
    **{
        f"{rotation}-{rounding}": ["--method", "lopro", "--rank", "0", *turned, *rounded]
        for rotation, turned in _ROTATIONS.items()
        for rounding, rounded in _ROUNDINGS.items()
    },
}


def bench_quantize(
    model: str | None = None,
    *,
    bits: Iterable[int] = (3,),
    methods: Iterable[str] = ("nearest", "gptq", "flrq-paper", "flrq"),
    flags: Iterable[str] = (),
    text: str = "python-docs",
    window: int = 512,
    windows: int = 8,
) -> Iterator[Result]:
    """Quantize a model in each of several ways, every run in a process of its own, and measure the results.

    Args:
        model: what `lorq quantize` takes; None for the demo's model.
        bits: widths to try.
        methods: names in `PRESETS`.
        flags: further options of `lorq quantize` for every run, such as ``--group-size 64``.
        text: evaluation text.
        window: its window length in tokens.
        windows: how many windows.

    Yields:
        For each run: method, bits, stored bits per weight, megabytes of weights, KL (mean and 99th percentile),
        perplexity, top-1 agreement, seconds of the whole process, and its peak memory beyond that of a Python
        process with torch loaded, in megabytes.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if a run fails; its own message went to standard error.
    """
    methods = list(methods)
    unknown = [name for name in methods if name not in PRESETS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(PRESETS)}, got {', '.join(unknown)}")
    source = str(demo_model()) if model is None else model
    _, idle, _ = _run([])
    with tempfile.TemporaryDirectory(prefix="lorq-bench-") as folder:
        for width in bits:
            for name in methods:
                out = Path(folder) / f"{name}-{width}"
                command = ["quantize", source, str(out), "--bits", str(width), *PRESETS[name], *flags, "--json"]
                seconds, peak, printed = _run(command)
                report: dict[str, Any] = json.loads(printed)
                figures = evaluate(out, reference=source, text=text, window=window, windows=windows)
                yield {
                    "method": name,
                    "bits": width,
                    "bits_per_weight": report["bits_per_weight"],
                    "megabytes": report["bytes"] / 1e6,
                    "kl_mean": figures.kl_mean,
                    "kl_p99": figures.kl_p99,
                    "perplexity": figures.perplexity,
                    "top1": figures.top1,
                    "seconds": seconds,
                    "peak_megabytes": (peak - idle) / 1e6,
                }


# Runs its arguments as a lorq command, or only loads torch; the last line is the peak of its resident memory. Not
# getrusage: that counts what the parent had in memory when it forked.
_CHILD = """
import sys, torch
status = 0
if sys.argv[1:]:
    from lorq.cli import main
    status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def _run(arguments: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a lorq command in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"lorq {' '.join(arguments[:6])} ... ended with status {done.returncode}")
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return time.perf_counter() - start, int(peak) * 1024, printed


def bench_experts(
    experts: int = 60,
    *,
    hidden: int = 2048,
    width: int = 1408,
    rank: int = 32,
    rows: int = 8,
    columns: int = 8,
    top_k: int = 4,
    tokens: Iterable[int] = (1, 16, 256),
    repeats: int = 5,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> Iterator[Result]:
    """Time a layer of packed random experts: without low rank, with it expert by expert, and fused.

    The three forms take turns, after an untimed round; seconds are medians. Products and bytes count what the
    low-rank part alone needs for these tokens: a factor that several experts use is read once where it is used once.

    Args:
        experts: of the layer; with the next two, a shape such as Qwen1.5-MoE's.
        hidden: width of the layer's input.
        width: of an expert.
        rank: of the shared factors, int8.
        rows: of the grid.
        columns: of the grid.
        top_k: experts of a token, chosen at random.
        tokens: batch sizes to try.
        repeats: timed rounds.
        dtype: of the inputs.
        device: "auto" takes an accelerator if there is one.
        seed: of weights, inputs and routes.

    Yields:
        For each batch size: ``none_seconds``, ``each_seconds``, ``fused_seconds``, their ratios to ``none``, and
        ``each_`` and ``fused_`` ``megaproducts`` (millions of multiply-adds) and ``megabytes`` of factors read.

    Raises:
        ValueError: for sizes, repeats or tokens below 1, or more experts than the grid has cells.
    """
    generator = torch.Generator().manual_seed(seed)
    if repeats < 1 or min(tokens := list(tokens), default=0) < 1:
        raise ValueError(f"repeats and tokens must be at least 1, got {repeats} and {tokens}")
    if min(experts, hidden, width, rank, rows, columns) < 1 or not 1 <= top_k <= experts <= rows * columns:
        raise ValueError(
            f"sizes must be at least 1, top_k at most the experts, and these at most the grid's cells, got experts "
            f"{experts} of {hidden} x {width}, rank {rank}, a grid of {rows} x {columns}, top_k {top_k}"
        )
    place, kind = read_device(device), read_dtype(dtype, auto=False)
    layer = random_experts(experts, hidden, width, rank, (rows, columns), generator).to(place)
    for count in tokens:
        x = torch.randn(count, hidden, generator=generator).to(place, kind)
        index = torch.rand(count, experts, generator=generator).topk(top_k).indices.to(place)
        weights = torch.full((count, top_k), 1 / top_k).to(x)
        seconds: dict[str, list[float]] = {"none": [], "each": [], "fused": []}
        for round_ in range(repeats + 1):
            for name in seconds:
                layer.fused = name != "each"
                layer.low_rank = name != "none"
                with torch.no_grad():
                    taken = seconds_of(lambda: layer(x, index, weights), place)  # noqa: B023
                if round_:
                    seconds[name].append(taken)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        result: Result = {"tokens": count}
        result |= {f"{name}_seconds": value for name, value in median.items()}
        result |= {f"{name}_over_none": median[name] / median["none"] for name in ("each", "fused")}
        yield result | low_rank_work(layer, index, hidden, width)


def random_experts(
    experts: int, hidden: int, width: int, rank: int, grid: tuple[int, int], generator: torch.Generator
) -> QuantExperts:
    """A layer of 2-bit experts with random codes and int8 tile factors."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=experts)
    with torch.device("meta"):
        split = Experts(MixtralExperts(config))
    common = math.gcd(hidden, width)
    format = LayerFormat(2, math.gcd(64, common), False, rotation_block=largest_block(common))
    tiles = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        out, in_ = (hidden, width) if projection == "down_proj" else (width, hidden)
        for expert in split:
            setattr(expert, projection, QuantLinear(in_, out, format))
        tiles[projection] = Tiles(out, in_, TileFormat(*grid, experts, rank, "int8"))
        cells = torch.arange(experts)
        tiles[projection].cells.copy_(torch.stack([cells % grid[0], cells // grid[0]], 1))
    layer = QuantExperts(split, tiles)
    for name, buffer in layer.named_buffers():
        if buffer.dtype in (torch.int8, torch.int32):
            buffer.random_(-100, 100, generator=generator)
        elif buffer.dtype == torch.float16:
            buffer.fill_(0.01 if "scale" in name else 1.0)
    return layer


def low_rank_work(layer: QuantExperts, index: Tensor, hidden: int, width: int) -> Result:
    """Multiply-adds and bytes of factors of the low-rank part, expert by expert and fused."""
    tiles: Any = next(iter(layer.tiles.values()))
    f: TileFormat = tiles.format
    count, used = index.numel(), index.unique().numel()
    tokens, ends = index.shape[0], hidden + width
    cells = tiles.cells[index.unique()]
    in_rows, in_columns = (len(cells[:, side].unique()) for side in (0, 1))
    products = {
        "each": 3 * count * f.rank * ends,
        # gate and up: every token with all rows, each pair with its column; down: each pair with its row, every
        # token with all columns.
        "fused": f.rank
        * (2 * (tokens * f.rows * hidden + count * width) + count * width + tokens * f.columns * hidden),
    }
    read = {
        "each": 3 * used * f.rank * ends,
        "fused": f.rank * (2 * (f.rows * hidden + in_columns * width) + in_rows * width + f.columns * hidden),
    }
    return {f"{name}_megaproducts": n / 1e6 for name, n in products.items()} | {
        f"{name}_megabytes": n / 1e6 for name, n in read.items()
    }
