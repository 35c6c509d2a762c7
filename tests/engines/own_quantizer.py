"""llama.cpp's own quantizer on a Hugging Face folder: the other rows of the tables in docs/engines/llama-cpp.md.

    python own_quantizer.py MODEL f16 float.gguf --test test.txt --windows windows.npy
    python own_quantizer.py MODEL q4_0 plain.gguf
    python own_quantizer.py MODEL q4_0 imatrix.gguf --calibration valid.txt
    $LORQ_LLAMA_CPP_PYTHON llama_cpp.py figures plain.gguf windows.npy --reference float.gguf

All layers of the blocks get the type; one whose width its blocks do not tile gets what llama.cpp's program takes then.
With a text the inputs' mean squares over 16 windows of 512 tokens are its importance matrix.
"""

import argparse
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lorq.core.codes.gguf_blocks import TYPES
from lorq.exports.gguf import _write
from lorq.exports.gguf_model import architecture_of
from lorq.exports.gguf_plan import FileTensor, Plan
from lorq.exports.gguf_types import fits
from lorq.exports.request import GgufOptions
from lorq.models.skeleton import read_config
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, token_windows
from lorq.storage.folder import LorqFolder
from lorq.storage.reader import WeightFiles

WORKER = Path(__file__).with_name("llama_cpp.py")
# tensor_type_fallback of llama-quant.cpp.
FALLBACKS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


class Own(Plan):
    """A plan whose layers llama.cpp rounds."""

    importances: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def rows(self, tensor: FileTensor) -> torch.Tensor:
        if tensor.type not in TYPES:
            return super().rows(tensor)
        (parameter,) = tensor.source.parameters
        with tempfile.TemporaryDirectory() as place:
            given, out = Path(place, "given.npz"), Path(place, "out.npy")
            weights = {"weight": self.folder.reader.tensor(parameter).float().numpy()}
            if self.importances:
                weights["importance"] = self.importances[parameter].numpy()
            np.savez(given, **weights)
            python = os.environ["LORQ_LLAMA_CPP_PYTHON"]
            subprocess.run([python, WORKER, "quantize", tensor.type, given, "--out", out], check=True)
            return tensor.source.rows(torch.from_numpy(np.load(out)))


def windows(folder: Path, text: Path, count: int, split: str) -> torch.Tensor:
    encoder = Encoder.open(folder, read_config(folder), "auto")
    return token_windows(load_text(text, split=split), encoder, windows=count, length=512, what=str(text))


def importance_matrix(folder: Path, text: Path) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs, by the names of the weights."""
    model, sums = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}

    def watch(name: str):
        def add(module, given):
            sums[name] = sums.get(name, 0) + given[0].flatten(0, -2).double().square().sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    tokens = windows(folder, text, 16, "calibration")
    with torch.inference_mode():
        for window in tokens:
            model.base_model(input_ids=window[None], use_cache=False)
    return {name: (sum_ / tokens.numel()).float() for name, sum_ in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "type", "out"):
        parser.add_argument(name, type=str if name == "type" else Path)
    for name in ("--calibration", "--test", "--windows"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    folder = LorqFolder(given.model, WeightFiles.open(given.model), {}, {}, {})
    config = read_config(given.model)
    plan = Own(folder, config, config, architecture_of(config), GgufOptions(), "f16", False)
    if given.calibration:
        Own.importances = importance_matrix(given.model, given.calibration)

    def typed(tensor: FileTensor) -> FileTensor:
        if tensor.type != "f16" or not tensor.source.name.startswith("blk.") or given.type == "f16":
            return tensor
        return replace(tensor, type=given.type if fits(given.type, tensor.shape[-1]) else FALLBACKS[given.type])

    _write(plan, [typed(tensor) for tensor in plan.tensors()], given.out)
    if given.windows:
        np.save(given.windows, windows(given.model, given.test, 8, "evaluation").numpy())


if __name__ == "__main__":
    main()
