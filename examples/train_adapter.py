"""Train a quantized model on a text without making it dense; the codes stay, so adapters can be switched."""

import tempfile

from small_model import model_path

import lorq

model, home = model_path(), tempfile.mkdtemp()
method = lorq.LoRDS(bits=4, group_size=32, steps=5)
lorq.quantize(model, f"{home}/base", method, samples=4, seq_len=64)

loaded = lorq.load(f"{home}/base")
trained = lorq.adapt.train(loaded, "python-docs-even", steps=5, batch=2, seq_len=64)
print(f"{trained.parameters:,} numbers trained; loss {trained.losses[0]:.3f}, then {trained.losses[-1]:.3f}")
lorq.adapt.save_adapter(loaded, f"{home}/adapter")

# Measured on the other half of the documentation, without the adapter and with it.
for adapter in (None, f"{home}/adapter"):
    found = lorq.evaluate(f"{home}/base", adapter=adapter, text="python-docs-odd", window=64, windows=4)
    print(f"adapter {adapter}: perplexity {found.perplexity:.2f}")
