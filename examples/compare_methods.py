"""Several methods on one model: bits per weight against divergence."""

import tempfile

from small_model import model_path

import lorq

model, home = model_path(), tempfile.mkdtemp()
ways = {
    "nearest": lorq.Nearest(bits=4, group_size=32),
    "gptq": lorq.GPTQ(bits=4, group_size=32),
    "flrq": lorq.FLRQ(bits=4, group_size=32, epochs=0),
    "trellis": lorq.FLRQ(bits=4, codebook="trellis", budget=0.0, epochs=0),
}
for name, method in ways.items():
    report = lorq.quantize(model, f"{home}/{name}", method, samples=4, seq_len=64)
    found = lorq.evaluate(f"{home}/{name}", reference=model, window=64, windows=4)
    print(f"{name:8} {report.bits_per_weight:.2f} bits per weight   KL {found.kl_mean:.4f}")
print(f"a page of charts: lorq report {' '.join(f'{home}/{name}' for name in ways)}")
