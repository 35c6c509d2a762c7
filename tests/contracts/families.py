"""The table of families: every causal architecture of transformers, built small, from the folder to the answer.

    python tests/contracts/families.py              # prints a line for each
    python tests/contracts/families.py gemma3 llama # those model types
    python tests/contracts/families.py --record     # writes src/lorq/families.csv, which `lorq families` prints; with
                                                    # model types only their rows

A family is a class that transformers builds from a model type. Each is looked at in a process of its own, forked
from this one, so that a trace or an endless loop in one is a line of the table and stops nothing.
"""

import csv
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import transformers
from helpers import BYTES, byte_tokenizer
from small_configs import OWN, small
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import lorq

TABLE = Path(__file__).parents[2] / "src" / "lorq" / "families.csv"
SECONDS = 120
WORKS, REFUSED, BROKEN, UNBUILT = "works", "refused", "broken", "not built"


def families() -> list[tuple[str, str]]:
    """Every model type with its causal class, and those that only a class with images or sounds is for."""
    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = list(causal.items())
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        found += [(kind, name) for kind, name in mapping.items() if (kind, name) not in found]
    return found


def build(kind: str, name: str, folder: Path) -> None:
    """A random model in a folder, with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = small(CONFIG_MAPPING[kind], OWN.get(kind, {}))
    config.is_decoder = True
    chosen = getattr(transformers, name)
    if chosen.config_class is not type(config):  # the language model of a composite
        parts = [getattr(config, part, None) for part in config.sub_configs]
        config = next((part for part in parts if type(part) is chosen.config_class), config)
    model = chosen(config).eval().float()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and not leaf.startswith(("A_", "dt", "D")):
                # A fresh model has norms of 1 and biases of 0, which would hide that one is forgotten.
                parameter.data += 0.1 * torch.randn(parameter.shape)
            elif isinstance(module, nn.Linear | Conv1D) or "expert" in path.lower():
                parameter.data = 0.15 * torch.randn(parameter.shape)
            elif isinstance(module, nn.Embedding):
                parameter.data = 0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)


def look(kind: str, name: str, work: Path) -> tuple[str, str]:
    """The verdict on a family, and the reason."""
    try:
        build(kind, name, work / "m")
        chosen = getattr(transformers, name)
        dense, info = chosen.from_pretrained(work / "m", dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            return (
                UNBUILT,
                f"transformers does not find {missing[0]} and {len(missing) - 1} more when it loads what it saved",
            )
        windows = torch.randint(BYTES, (2, 24), generator=torch.Generator().manual_seed(5))
        if not torch.isfinite(logits(dense.eval(), windows)).all():
            return UNBUILT, "logits of the small model are not finite"
    except Exception as error:
        return UNBUILT, said(error)
    (work / "text.txt").write_text("".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(40)))
    for method, options in ((lorq.Nearest, {}), (lorq.GPTQ, dict(calibration=str(work / "text.txt")))):
        out = work / method.__name__
        try:
            quantize(work / "m", out, method, options)
        except (ValueError, ImportError) as error:
            return (REFUSED, said(error)) if mine(error) else (BROKEN, said(error))
        packed = load(name, out)
        expected, got = logits(twin(dense, packed), windows), logits(packed, windows)
        largest = expected.abs().max().item()
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * largest):
            return BROKEN, f"logits differ by {(got - expected).abs().max().item() / largest:.1e} of the largest"
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    try:
        expected = dense.generate(windows[:1, :12], **options)
    except Exception as error:
        return WORKS, f"but transformers does not generate with it: {said(error)}"
    if packed.generate(windows[:1, :12], **options).shape != expected.shape:
        return BROKEN, "generates another number of tokens"
    return WORKS, ""


def quantize(folder: Path, out: Path, method: Any, options: dict[str, Any]) -> None:
    """In groups of 16 where they fit, else by rows."""
    options = dict(samples=4, seq_len=32, device="cpu") | options
    try:
        lorq.quantize(folder, out, method(bits=4, group_size=16), **options)
    except ValueError as error:
        if "group_size" not in str(error):
            raise
        lorq.quantize(folder, out, method(bits=4, group_size=-1), **options)


def load(name: str, folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    if modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == name:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lorq.load(folder, dtype="float32", device="cpu")


def twin(dense: Any, packed: Any) -> Any:
    """The original with every quantized weight replaced by what its stored tensors stand for."""
    import copy

    from lorq.models.experts import split_experts
    from lorq.runtime.linear import QuantLinear

    model = copy.deepcopy(dense)
    split_experts(model)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, QuantLinear)}
    assert layers
    for name, layer in layers.items():
        weight = layer.format.read(layer.stored()).dense()
        own = model.get_submodule(name)
        own.weight.data = weight.T.contiguous() if isinstance(own, Conv1D) else weight
    return model


@torch.no_grad()
def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=windows, use_cache=False).logits


def said(error: BaseException) -> str:
    """An error in a line, without what differs from run to run."""
    text, strict = str(error).strip().splitlines(), "Strict" in type(error).__name__  # these name the error themselves
    line = " ".join(text[:3]) if strict else text[0] if text else ""
    line = re.sub(r"^Class validation error for validator '\w+': ", "", " ".join(line.split()))
    # The first sentence: what follows is advice, cut anywhere.
    line = re.split(r"(?<=[a-z0-9\)])\.\s", line)[0].rstrip(".")
    line = re.sub(r"/\S*/(m|Nearest|GPTQ)\b", "MODEL", line)
    return line if strict or isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def mine(error: BaseException) -> bool:
    """Whether lorq has refused, and not something below it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.sep}lorq{os.sep}" in last.filename or isinstance(error, ImportError)


def in_a_process(kind: str, name: str) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="lorq-families-") as folder:
            os.environ["LORQ_CACHE"] = f"{folder}/cache"
            try:
                found = look(kind, name, Path(folder))
            except BaseException as error:
                if "LORQ_TRACE" in os.environ:
                    traceback.print_exc()
                place = traceback.extract_tb(error.__traceback__)[-1]
                found = BROKEN, f"{type(error).__name__}: {said(error)} ({Path(place.filename).name}:{place.lineno})"
        there.send(found)

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else (BROKEN, f"not done after {SECONDS} seconds")
    except EOFError:
        found = BROKEN, "the process died"
    process.kill()
    process.join()
    return found


def main(arguments: list[str]) -> None:
    lorq.quantize, lorq.load, lorq.Nearest  # noqa: B018  # imported before the processes fork
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wanted = set(arguments) - {"--record"}
    chosen = [family for family in families() if not wanted or wanted & {*family}]
    rows = []
    for kind, name in chosen:
        began = time.monotonic()
        rows.append((kind, name, *in_a_process(kind, name)))
        print(*rows[-1], f"{time.monotonic() - began:.1f}", sep=" | ", flush=True)
    counts = {v: sum(row[2] == v for row in rows) for v in (WORKS, REFUSED, BROKEN, UNBUILT)}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if "--record" in arguments:
        known = {} if not wanted else {tuple(row[:2]): row for row in csv.reader(TABLE.open(encoding="utf-8"))}
        known |= {tuple(row[:2]): row for row in rows}
        rows = [known[family] for family in families()]
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("model_type", "class", "verdict", "reason"), *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
