"""The numbers of docs/results.md on the real model, with some room. Minutes; `pytest -m slow`."""

from pathlib import Path

import pytest

import lorq
from lorq.demo import demo_model
from lorq.pipeline.options import read_method

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"needs WikiText-2 in {WIKITEXT}"),
]


@pytest.mark.parametrize(
    "method, bits, divergence",
    [("flrq", 3, 0.40), ("flrq-paper", 3, 0.60), ("gptq", 3, 0.51), ("flrq", 4, 0.13), ("gptq", 4, 0.20)],
)
def test_quality_at_group_64(tmp_path, method, bits, divergence):
    settings = type(read_method(method))(bits=bits, group_size=64)
    calibration = str(WIKITEXT / "valid.txt")
    report = lorq.quantize(demo_model(), tmp_path / "out", settings, calibration=calibration, samples=16, seq_len=512)
    assert report.seconds < 300
    result = lorq.evaluate(
        tmp_path / "out", reference=demo_model(), text=str(WIKITEXT / "test.txt"), window=512, windows=8
    )
    assert result.kl_mean < divergence
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < (115e6 if bits == 3 else 130e6)
    answer = "".join(lorq.generate(str(tmp_path / "out"), "What is the capital of France?", tokens=32))
    assert "Paris" in answer
