"""Ask for a size: every layer gets the bits that it needs."""

import tempfile
from collections import Counter

from small_model import model_path

import lorq

model, out = model_path(), tempfile.mkdtemp() + "/out"
report = lorq.quantize(model, out, **lorq.preset("balanced", bits_per_weight=4.5, samples=4, seq_len=64))
print(f"asked for 4.5 bits per weight, got {report.bits_per_weight:.3f}")
for bits, layers in sorted(Counter(layer.bits for layer in report.layers).items()):
    print(f"{bits} bits: {layers} layers")

# What other budgets would have done, as predicted before any layer was solved.
for bits, harm in report.run["budget"]["curve"][::4]:
    print(f"{bits:.2f} bits per weight: {harm:.2g} nats a token")
