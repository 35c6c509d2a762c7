"""What is measured of a folder is kept beside its report, and checked when it is read."""

import json

import pytest

from lorq.evaluation import _keep
from lorq.storage.measured import PROTOCOL, Measured, add_evaluation, add_times, read_measured
from lorq.storage.names import MEASURED, REPORT_NAME

ENTRY = dict.fromkeys(PROTOCOL, "x") | {"perplexity": 2.0, "kl_mean": 0.5}


def test_an_evaluation_replaces_the_one_by_the_same_protocol_and_no_other(tmp_path):
    assert read_measured(tmp_path) == Measured()
    add_times(tmp_path, 3.0, {"solving": 2.0})
    for entry in (ENTRY, ENTRY | {"window": 64}, ENTRY | {"kl_mean": 0.25}):
        add_evaluation(tmp_path, entry)
    expected = (ENTRY | {"window": 64}, ENTRY | {"kl_mean": 0.25})
    assert read_measured(tmp_path) == Measured(3.0, {"solving": 2.0}, expected)
    add_times(tmp_path, 4.0, {})  # of a run that made the folder anew
    assert read_measured(tmp_path) == Measured(4.0)


@pytest.mark.parametrize(
    "content",
    [
        {"stages": []}, {"seconds": "3"}, {"stages": {"a": "b"}}, {"evaluations": {}}, {"evaluations": [{}]},
        {"evaluations": [ENTRY | {"kl_mean": "low"}]}, {"evaluations": [ENTRY | {"kl_stderr": "0.1"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / MEASURED).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lorq_measured.json: it must hold seconds, .* damaged"):
        read_measured(tmp_path)


def test_figures_that_cannot_be_kept_are_told_of_and_nothing_is_written_into_other_folders(tmp_path, caplog):
    _keep(tmp_path, ENTRY)
    assert not (tmp_path / MEASURED).exists(), "no lorq folder"
    (tmp_path / REPORT_NAME).write_text("{}")
    (tmp_path / MEASURED).write_text("[]")
    _keep(tmp_path, ENTRY)
    assert "these figures are not kept in the folder" in caplog.text and (tmp_path / MEASURED).read_text() == "[]"
