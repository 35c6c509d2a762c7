"""Figures in words."""

import pytest

from lorq.show import figures_line, metrics_line, print_evaluation

OLD = {
    "perplexity": 34.21, "reference_perplexity": 30.42, "kl_mean": 0.181, "kl_p99": 1.3, "top1": 0.8,
    "bits_per_weight": 3.024, "tokens": 4088, "text": "t", "window": 512, "windows": 8, "start_token": False,
}  # fmt: skip
NEW = OLD | {"perplexity_stderr": 3.14, "kl_stderr": 0.00412, "ratio_stderr": 0.0121}


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        (NEW, {"perplexity": "34.21 ± 3.1", "over": "1.125 ± 0.012", "KL": "0.1810 ± 0.0041 nats a token"}),
        (OLD, {"perplexity": "34.21", "over": "1.125", "KL": "0.1810 nats a token"}),
    ],
    ids=["two windows or more", "older, or one window"],
)
def test_an_evaluation_is_told_with_the_standard_errors_that_there_are(found, rows, capsys):
    print_evaluation(found, as_json=False)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    told = dict(line for line in lines if len(line) == 2)
    assert told["perplexity"] == rows["perplexity"] and told["perplexity over the reference's"] == rows["over"]
    assert told["KL from the reference, mean"] == rows["KL"] and told["perplexity of the reference"] == "30.42"


def test_a_line_of_figures_has_the_standard_errors_that_there_are():
    assert figures_line(NEW) == "perplexity 34.21 ± 3.1, KL 0.1810 ± 0.0041 (8 windows of 512 tokens)"
    assert figures_line(OLD) == "perplexity 34.21, KL 0.1810 (8 windows of 512 tokens)"
    assert metrics_line({"acc": 0.694, "acc_stderr": 0.023, "examples": 402.0}) == "acc 0.694 ± 0.023 (402 examples)"
