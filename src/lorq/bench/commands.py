"""The command line of `lorq bench`."""

from typing import Annotated

import cyclopts
from cyclopts import Parameter

from lorq.adapt import Settings
from lorq.show import print_figures, print_rows

bench_app = cyclopts.App(name="bench", help="Measure speed and quality on this machine.")


@bench_app.command(name="sketch")
def bench_sketch(
    *,
    size: int = 4096,
    rank: int = 64,
    repeats: int = 3,
    seed: int = 0,
    svd: bool = True,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Time the blocked sketch against the full SVD, the rank-1 form and torch.svd_lowrank.

    Args:
        size: rows and columns of the matrix.
        rank: components to find.
        repeats: runs of each, in turn; medians are printed.
        seed: of the test matrix and vectors.
        svd: include the full SVD, which takes most of the time.
        json_: print one JSON object.
    """
    from lorq.bench.sketch import bench_sketch as run

    print_figures(run(size=size, rank=rank, repeats=repeats, seed=seed, svd=svd), json_)


@bench_app.command(name="experts")
def bench_experts(
    experts: int = 60,
    *,
    hidden: int = 2048,
    width: int = 1408,
    rank: int = 32,
    rows: int = 8,
    columns: int = 8,
    top_k: int = 4,
    tokens: tuple[int, ...] = (1, 16, 256),
    repeats: int = 5,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Time packed 2-bit experts: without low rank, with shared factors expert by expert, and fused.

    Printed are seconds of a layer: "none" without the factors, "each" one expert after the other, "fused" in one call;
    their ratios to "none"; and millions of products and megabytes that the factors alone take.

    Args:
        experts: of the layer.
        hidden: width of the layer's input.
        width: of an expert.
        rank: of the shared factors.
        rows: of the grid.
        columns: of the grid.
        top_k: experts of a token.
        tokens: batch sizes.
        repeats: timed rounds; medians are printed.
        dtype: of the inputs.
        device: auto, cpu, cuda and so on.
        seed: of weights, inputs and routes.
        json_: print JSON lines.
    """
    from lorq.bench.experts import bench_experts as run

    for row in run(
        experts, hidden=hidden, width=width, rank=rank, rows=rows, columns=columns, top_k=top_k, tokens=tokens,
        repeats=repeats, dtype=dtype, device=device, seed=seed,
    ):  # fmt: skip
        print_figures(row, json_)


@bench_app.command(name="decode")
def bench_decode(
    *shapes: str,
    bits: tuple[int, ...] = (4, 3, 2),
    kinds: tuple[str, ...] = ("integer",),
    group_size: int = 128,
    ranks: tuple[int, ...] = (0, 32),
    products: tuple[str, ...] = ("exact",),
    tokens: int = 1,
    repeats: int = 9,
    dtype: str = "bfloat16",
    device: str = "auto",
    seed: int = 0,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Time the quantized linear against the dense product, torch's int4 operator and a plain read of memory.

    Args:
        shapes: of the weights, such as 4096x4096; the usual four if left out.
        bits: widths of the codes; give the flag once for each.
        kinds: integer, lords or vector, once for each.
        group_size: columns that share a scale; -1 for one scale per row.
        ranks: of the low-rank part, once for each; 0 for none.
        products: how inputs meet integer codes on a CPU, once for each: exact, or bytes, which rounds them on the fly.
        tokens: of the input.
        repeats: rounds in which all take turns; medians are printed.
        dtype: of the input and of the dense weight.
        device: auto, cpu, cuda and so on.
        seed: of weights and inputs.
        json_: print one JSON object per row.
    """
    from lorq.bench import decode as bench_decode

    rows = bench_decode.bench_decode(
        shapes or bench_decode.SHAPES, bits=bits, kinds=kinds, group_size=group_size, ranks=ranks,
        products=products, tokens=tokens, repeats=repeats, dtype=dtype, device=device, seed=seed,
    )  # fmt: skip
    print_rows(rows, json_)


@bench_app.command(name="adapt")
def bench_adapt(
    model: str,
    *,
    ways: tuple[str, ...] = ("peft", "lora", "qat"),
    rates: tuple[float, ...] = (0.0,),
    text: str = "python-docs-even",
    evaluation: str = "python-docs-odd",
    windows: int = 16,
    reference: str | None = None,
    settings: Annotated[Settings, Parameter(name="*")] = Settings(),  # noqa: B008  # frozen
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a lords folder in several ways on one text, and measure each on another.

    Args:
        model: a lorq folder, quantized with lords.
        ways: peft, an adapter of scale factors; lora, an additive one of the same size (needs the package peft); qat.
            Give the flag once for each.
        rates: learning rates to try with each way, once for each; they take the place of --learning-rate.
        text: to train on.
        evaluation: to measure on.
        windows: of the training's sequence length, evenly spread over the text that is measured on.
        reference: the original, where qat starts.
        json_: print one JSON object per run.
    """
    from lorq.bench import training as bench_adapt

    own = {key: value for key, value in vars(settings).items() if key != "learning_rate"}
    for row in bench_adapt.bench_adapt(
        model, ways=ways, rates=rates, text=text, evaluation=evaluation, windows=windows, reference=reference, **own
    ):
        print_figures(row, json_)


@bench_app.command(name="quantize")
def bench_quantize(
    model: str | None = None,
    *,
    bits: tuple[int, ...] = (3,),
    methods: tuple[str, ...] = ("nearest", "gptq", "flrq-paper", "flrq"),
    group_size: int = 64,
    calibration: str = "self",
    samples: int = 16,
    seq_len: int = 512,
    text: str = "python-docs",
    window: int = 512,
    windows: int = 8,
    seed: int = 0,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
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
        json_: print one JSON object per run.
    """
    from lorq.bench.quantize import bench_quantize as run

    options = {"group-size": group_size, "calibration": calibration, "samples": samples, "seq-len": seq_len}
    flags = [f"--{key}={value}" for key, value in (options | {"seed": seed}).items()]
    rows = run(model, bits=bits, methods=methods, options=flags, text=text, window=window, windows=windows)
    print_rows(rows, json_)
