"""A lorq folder read by Python: what became of each layer, and the weights themselves."""

import tempfile

import torch
from small_model import model_path
from transformers import AutoModelForCausalLM

import lorq
from lorq.storage.folder import LorqFolder

model, out = model_path(), tempfile.mkdtemp() + "/out"
lorq.quantize(model, out, lorq.GPTQ(bits=3, group_size=32), samples=4, seq_len=64)

report = lorq.read_report(out)
worst = max(report.layers, key=lambda layer: layer.error_after)
print(f"{len(report.layers)} layers; the worst is {worst.name}, relative output error {worst.error_after:.4f}")

original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
for name, weight in LorqFolder.open(out).layers():
    before = original.get_submodule(name).weight
    change = (weight.dense() - before).norm() / before.norm()
    print(f"{name:40} {weight.format.bits} bits, weights moved by {100 * change:.1f} %")
