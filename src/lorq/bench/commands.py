"""What is measured: functions, and the commands of `lorq bench` that they are. What they measure is in files beside."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cyclopts

from lorq.adapt.settings import Settings
from lorq.show import command, print_each, print_figures, print_rows

bench_app = cyclopts.App(name="bench", help="Measure speed and quality on this machine.")
WAYS = ("peft", "lora", "qat")


def bench_sketch(
    *, size: int = 4096, rank: int = 64, repeats: int = 3, seed: int = 0, svd: bool = True
) -> dict[str, Any]:
    """Time the blocked sketch against the full SVD, the rank-1 form and torch.svd_lowrank.

    The matrix is square, float32, and has the singular values ``k^-0.5``. The ways take turns after an untimed round at
    a small size, so that a busy machine slows all of them.

    Args:
        size: rows and columns of the matrix.
        rank: components to find.
        repeats: runs of each, in turn; medians are printed.
        seed: of the matrix and of every sketch.
        svd: include the full SVD, which takes most of the time.

    Returns:
        ``speedup_vs_svd``, ``speedup_vs_rank1``, ``speedup_vs_svd_lowrank``: seconds of the other way over seconds of
        the block form. ``residual_ratio``: of the block form, to the optimal one, which the known spectrum gives:
        ``sqrt(sum_{k > rank} 1 / k)``. ``<way>_seconds`` and ``<way>_residual_ratio`` for ``block``, ``rank1``,
        ``svd_lowrank`` and ``svd``, None for what was left out. The settings, and ``torch_threads``.

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
    import torch

    from lorq.bench.sketch import WAYS, known_spectrum

    ways = {name: factor for name, factor in WAYS.items() if svd or name != "svd"}
    small = known_spectrum(min(size, 64), seed=seed)
    for factor in ways.values():
        factor(small, min(rank, small.shape[0] - 1), seed)
    a = known_spectrum(size, seed=seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    residual: dict[str, float] = {}
    optimal = sum(1 / k for k in range(rank + 1, size + 1)) ** 0.5
    for _ in range(repeats):
        for name, factor in ways.items():
            start = time.perf_counter()
            left, right = factor(a, rank, seed)
            seconds[name].append(time.perf_counter() - start)
            residual[name] = float(torch.linalg.vector_norm((a - left @ right).double())) / optimal
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    result: dict[str, Any] = {"residual_ratio": residual["block"]}
    for name in ("svd", "rank1", "svd_lowrank"):
        result[f"speedup_vs_{name}"] = median[name] / median["block"] if name in ways else None
    for name in ("block", "rank1", "svd_lowrank", "svd"):
        result |= {f"{name}_seconds": median.get(name), f"{name}_residual_ratio": residual.get(name)}
    settings = {"size": size, "rank": rank, "seed": seed, "repeats": repeats}
    return result | settings | {"torch_threads": torch.get_num_threads()}


def bench_experts(
    experts: int = 60,
    *,
    hidden: int = 2048,
    width: int = 1408,
    rank: int = 32,
    rows: int = 8,
    columns: int = 8,
    top_k: int = 4,
    tokens: Sequence[int] = (1, 16, 256),
    repeats: int = 5,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Time packed 2-bit experts: without low rank, with shared factors expert by expert, and fused.

    Printed are seconds of a layer of random weights: "none" without the factors, "each" one expert after the other,
    "fused" in one call; their ratios to "none"; and millions of products and megabytes that the factors alone take,
    where a factor that several experts use is read once if it is used once.

    Args:
        experts: of the layer; with the next two, a shape such as Qwen1.5-MoE's.
        hidden: width of the layer's input.
        width: of an expert.
        rank: of the shared factors, int8.
        rows: of the grid.
        columns: of the grid.
        top_k: experts of a token, chosen at random.
        tokens: batch sizes, once for each.
        repeats: timed rounds, in which the forms take turns; medians are printed.
        dtype: of the inputs.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        seed: of weights, inputs and routes.

    Raises:
        ValueError: for sizes, repeats or tokens below 1, or more experts than the grid has cells.
    """
    if repeats < 1 or min(tokens := list(tokens), default=0) < 1:
        raise ValueError(f"repeats and tokens must be at least 1, got {repeats} and {tokens}")
    if min(experts, hidden, width, rank, rows, columns) < 1 or not 1 <= top_k <= experts <= rows * columns:
        raise ValueError(
            f"sizes must be at least 1, top_k at most the experts, and these at most the grid's cells, got experts "
            f"{experts} of {hidden} x {width}, rank {rank}, a grid of {rows} x {columns}, top_k {top_k}"
        )
    import torch

    from lorq.bench.experts import low_rank_work, random_experts
    from lorq.bench.timing import seconds_of
    from lorq.runtime.device import read_device, read_dtype
    from lorq.runtime.experts import QuantExperts

    generator = torch.Generator().manual_seed(seed)
    place, kind = read_device(device), read_dtype(dtype, auto=False)
    layer = random_experts(experts, hidden, width, rank, (rows, columns), generator).to(place)
    forms: dict[str, Any] = {"none": QuantExperts(layer.plain, {}), "each": layer.one_by_one, "fused": layer}
    for count in tokens:
        x = torch.randn(count, hidden, generator=generator).to(place, kind)
        index = torch.rand(count, experts, generator=generator).topk(top_k).indices.to(place)
        weights = torch.full((count, top_k), 1 / top_k).to(x)
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for round_ in range(repeats + 1):
            for name, run in forms.items():
                with torch.no_grad():
                    taken = seconds_of(lambda: run(x, index, weights), place)  # noqa: B023
                if round_:
                    seconds[name].append(taken)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        result: dict[str, Any] = {"tokens": count}
        result |= {f"{name}_seconds": value for name, value in median.items()}
        result |= {f"{name}_over_none": median[name] / median["none"] for name in ("each", "fused")}
        yield result | low_rank_work(layer, index, hidden, width)


def bench_decode(
    *shapes: str,
    bits: Sequence[int] = (4, 3, 2),
    kinds: Sequence[str] = ("integer",),
    group_size: int = 128,
    ranks: Sequence[int] = (0, 32),
    products: Sequence[str] = ("exact",),
    tokens: int = 1,
    repeats: int = 9,
    dtype: str = "bfloat16",
    device: str = "auto",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Time the quantized linear against the dense product, torch's int4 operator and a plain read of memory.

    Args:
        shapes: of the weights, such as 4096x4096, out x in; the usual four if left out.
        bits: widths of the codes; give the flag once for each.
        kinds: integer, codes with group scales and zero points; rotated, such codes of inputs reordered and rotated in
            blocks (lopro-paper); lords, NormalFloat levels under a scale of low rank as large as the group scales;
            vector, codebooks for 4 weights (2 bits) or 2 (3 and 4); trellis, windows of 12 bits. Once for each.
        group_size: columns that share a scale; -1 for one scale per row.
        ranks: of the low-rank part, 8-bit factors, once for each; 0 for none.
        products: how inputs meet integer codes on a CPU, once for each: exact, or bytes, which rounds them to 8 bits on
            the fly.
        tokens: of the input.
        repeats: rounds in which all take turns; medians are printed.
        dtype: of the input and of the dense weight.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        seed: of weights and inputs.

    Yields:
        For each shape, kind, width and rank: milliseconds, gigabytes a second of what is stored, their share of what a
        plain read (a sum) reaches in the same rounds, how many times faster than the dense product and than torch's
        int4 operator (group 32 to 256; else None), the output's signal to noise in decibel, and what multiplied. On a
        CUDA device these are times of graphs of the calls; ``call_milliseconds`` is what a call by itself takes, with
        its way through Python, and ``call_times_dense`` its ratio.

    Raises:
        ValueError: for a shape that is none, an unknown kind or way of products, a group size that does not divide the
            width, bits or ranks that no layer has, or repeats or tokens below 1.
    """
    if repeats < 1 or tokens < 1:
        raise ValueError(f"repeats and tokens must be at least 1, got {repeats} and {tokens}")
    import torch

    from lorq.bench import decode
    from lorq.kernels import cpu, implementation
    from lorq.runtime.device import read_device, read_dtype

    for way in products:
        cpu.check_products(way)
    sizes = {shape: decode.read_shape(shape) for shape in shapes or decode.SHAPES}
    for out, in_ in sizes.values():
        decode.check_fit(out, in_, kinds, bits, group_size, ranks)
    place, kind_of_input = read_device(device), read_dtype(dtype, auto=False)
    for shape, (out, in_) in sizes.items():
        size = in_ if group_size == -1 else group_size
        generator = torch.Generator(place).manual_seed(seed)
        x = torch.randn(tokens, in_, generator=generator, device=place).to(kind_of_input)
        ways = decode.others(out, in_, size, x, generator)
        made: dict[Any, Any] = {}
        for kind, width, rank in product(kinds, bits, ranks):
            format = decode.format_of(kind, width, rank, out, in_, size)
            if format is None:
                continue
            layers = decode.random_layers(out, in_, format, x, generator)
            for way in products:
                ways[kind, width, rank, way] = [partial(layer, x) for layer in layers]
                made[kind, width, rank, way] = format, decode.sqnr_db(layers[0], x, way)
        seconds, waited = decode.medians(ways, repeats, place)
        bandwidth = decode.READ_BYTES / seconds["read"] / 1e9
        for key, (format, sqnr_db) in made.items():
            gigabytes = format.stored_bits(out, in_) / 8e9
            name = implementation(format, in_, place, kind_of_input).name
            calls = {"call_milliseconds": 1e3 * waited[key], "call_times_dense": waited["dense"] / waited[key]}
            yield {
                "shape": shape, "kind": key[0], "bits": key[1], "rank": key[2], "products": key[3],
                "tokens": tokens,
                "milliseconds": 1e3 * seconds[key], "gigabytes_a_second": gigabytes / seconds[key],
                "of_plain_read": gigabytes / seconds[key] / bandwidth, "plain_read": bandwidth,
                "times_dense": seconds["dense"] / seconds[key],
                "times_int4": seconds["int4"] / seconds[key] if "int4" in seconds else None,
                "sqnr_db": sqnr_db, "runs_on": name,
            } | (calls if place.type == "cuda" else {})  # fmt: skip


def bench_adapt(
    model: str,
    *,
    ways: Sequence[str] = WAYS,
    rates: Sequence[float] = (0.0,),
    text: str = "python-docs-even",
    evaluation: str = "python-docs-odd",
    windows: int = 16,
    reference: str | None = None,
    settings: Settings = Settings(),  # noqa: B008  # frozen
) -> Iterator[dict[str, Any]]:
    """Train a folder in several ways on one text, and measure each on another.

    Every run has a process of its own. All see the same batches in the same order under the same schedule.

    Args:
        model: a lorq folder, quantized with lords; for qat alone, in groups too.
        ways: peft, an adapter of scale factors; lora, an additive one with as many parameters in each layer, scaled
            by 1 (needs the package peft); qat, weights and scales. Give the flag once for each.
        rates: learning rates to try with each way, once for each; they take the place of --learning-rate. 0 is the
            way's default, for lora that of peft.
        text: to train on.
        evaluation: to measure on.
        windows: of the training's sequence length, evenly spread over the text that is measured on.
        reference: the original, where qat starts.

    Yields:
        Way, rate, numbers trained, perplexity before and after, seconds a step, peak of the process's memory.

    Raises:
        ValueError: for an unknown way.
        RuntimeError: if a run fails; its own message is on standard error.
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways must be among {', '.join(WAYS)}, got {', '.join(unknown)}")
    from lorq.bench.training import run

    own = {key: value for key, value in vars(settings).items() if key != "learning_rate"}
    for way, rate in product(ways, rates):
        yield run(
            model=model, way=way, rate=rate, text=text, evaluation=evaluation, windows=windows, reference=reference,
            settings=own,
        )  # fmt: skip


def bench_quantize(
    model: str | None = None,
    *,
    bits: Sequence[int] = (3,),
    methods: Sequence[str] = ("nearest", "gptq", "flrq-paper", "flrq"),
    group_size: int = 64,
    calibration: str = "self",
    samples: int = 16,
    seq_len: int = 512,
    text: str = "python-docs",
    window: int = 512,
    windows: int = 8,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Quantize a model in several ways: quality, size, seconds and memory of each.

    Args:
        model: what to quantize; the demo's model if left out.
        bits: widths; give the flag once for each.
        methods: names of settings, once for each; flrq-paper is FLRQ as published.
        group_size: columns that share a scale.
        calibration: text for the statistics.
        samples: calibration windows.
        seq_len: tokens of a calibration window.
        text: text for the evaluation.
        window: tokens of an evaluation window.
        windows: evaluation windows.
        seed: of everything random.

    Yields:
        For each run: method, bits, stored bits per weight, megabytes of weights, KL (mean and 99th percentile),
        perplexity, top-1 agreement, seconds of the whole process, and its peak memory beyond that of a Python
        process with torch loaded, in megabytes.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if a run fails; its own message went to standard error.
    """
    from lorq.bench.quantize import PRESETS, flags, run
    from lorq.demo import demo_model
    from lorq.evaluation import evaluate

    if unknown := [name for name in methods if name not in PRESETS]:
        raise ValueError(f"methods must be among {', '.join(PRESETS)}, got {', '.join(unknown)}")
    source = str(demo_model()) if model is None else model
    options = {
        "group-size": group_size,
        "calibration": calibration,
        "samples": samples,
        "seq-len": seq_len,
        "seed": seed,
    }
    _, idle, _ = run([])
    with tempfile.TemporaryDirectory(prefix="lorq-bench-") as folder:
        for width, name in product(bits, methods):
            out = str(Path(folder) / f"{name}-{width}")
            common = [f"--bits={width}", *(f"--{key}={value}" for key, value in options.items()), "--json"]
            seconds, peak, printed = run(["quantize", source, out, *flags(PRESETS[name]), *common])
            report: dict[str, Any] = json.loads(printed)
            figures = evaluate(out, reference=source, text=text, window=window, windows=windows)
            yield {
                "method": name,
                "bits": width,
                "bits_per_weight": report["bits_per_weight"],
                "megabytes": report["bytes"] / 1e6,
                **{key: getattr(figures, key) for key in ("kl_mean", "kl_p99", "perplexity", "top1")},
                "seconds": seconds,
                "peak_megabytes": (peak - idle) / 1e6,
            }


_LINES = "print one JSON object per row."
bench_app.command(command(bench_sketch, print_figures, json="print one JSON object."), name="sketch")
bench_app.command(command(bench_experts, print_each, json=_LINES), name="experts")
bench_app.command(command(bench_decode, print_rows, json=_LINES), name="decode")
bench_app.command(command(bench_adapt, print_each, json=_LINES), name="adapt")
bench_app.command(command(bench_quantize, print_rows, json=_LINES), name="quantize")
