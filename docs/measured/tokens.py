"""Tokens a second of a model, of its lorq folder and of that compiled: python tokens.py FOLDER MODEL."""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.models.locate import resolve_model
from lorq.runtime.compiled import STEPS, compile_steps

out, original = sys.argv[1], resolve_model(sys.argv[2])
prompt = AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt")
models = {}
for dtype in ("bfloat16", "float32"):
    models["dense", dtype] = AutoModelForCausalLM.from_pretrained(original, dtype=getattr(torch, dtype)), {}
    models["lorq", dtype] = lorq.load(out, dtype=dtype), {}
    compiled = lorq.load(out, dtype=dtype)
    compile_steps(compiled)
    models["lorq --compile", dtype] = compiled, STEPS
rates = {key: [] for key in models}
for round_ in range(6):
    for key, (model, options) in models.items():
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, **options)
        rates[key] += [64 / (time.perf_counter() - start)] * (round_ > 0)
print({key: round(statistics.median(rate), 1) for key, rate in rates.items()})
