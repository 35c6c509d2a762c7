"""Quantize a model to 3 bits, measure it against the original, and let it talk."""

import tempfile

from small_model import model_path

import lorq

model, out = model_path(), tempfile.mkdtemp() + "/out"
report = lorq.quantize(model, out, **lorq.preset("balanced", bits=3, samples=4, seq_len=64))
print(f"{report.bits_per_weight:.2f} bits per weight, {report.bytes / 1e6:.2f} MB in all")

found = lorq.evaluate(out, reference=model, window=64, windows=4)
print(f"perplexity {found.perplexity:.1f}, of the original {found.reference_perplexity:.1f}; KL {found.kl_mean:.3f}")

for piece in lorq.generate(out, "The capital of France is", tokens=16):
    print(piece, end="", flush=True)
print()
