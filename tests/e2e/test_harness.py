"""Tasks of lm-eval on a folder, offline; and the figures that the folder's report keeps."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

import lorq
from lorq.cli import main
from lorq.harness import read_tasks
from lorq.storage.measured import read_measured
from lorq.storage.names import MEASURED

WINDOWS = {"window": 32, "windows": 2}


@pytest.fixture
def folder(folder_of, tmp_path, monkeypatch):
    monkeypatch.setenv("LORQ_CACHE", str(tmp_path / "cache"))
    lorq.quantize(folder_of("llama"), tmp_path / "q", lorq.Nearest(bits=4, group_size=16))
    return tmp_path / "q"


@pytest.fixture
def task_path(tmp_path):
    """A folder with a task on local data: which of three endings goes on."""
    rows = [
        {"question": f"{i} and {i} is", "choices": [f" {i + i}", f" {i + 1}", " many"], "answer": i % 3}
        for i in range(12)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/sums.json").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "local_sums", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks/sums.json")}, "cache_dir": str(tmp_path / "d")},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (tmp_path / "tasks/sums.yaml").write_text(json.dumps(task))
    return tmp_path / "tasks"


def expected_accuracy(model, tokenizer, rows):
    """By its definition: the ending with the largest sum of log-probabilities."""
    right = 0
    for row in rows:
        scores = []
        for ending in row["choices"]:
            whole = tokenizer(row["question"] + ending).input_ids
            asked = len(tokenizer(row["question"]).input_ids)
            with torch.no_grad():
                found = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
            scores.append(sum(float(found[i - 1, whole[i]]) for i in range(asked, len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


@pytest.mark.filterwarnings("ignore")  # lm-eval's, and those of datasets
def test_a_task_is_run_is_shown_and_is_what_lm_eval_says_of_the_folder(folder, task_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorq[tasks]'")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    flags = ["--tasks", "local_sums", "--task-path", str(task_path), "--window", "32", "--windows", "2"]
    numbers = torch.get_rng_state()
    assert main(["evaluate", str(folder), *flags, "--json"]) == 0
    assert torch.equal(torch.get_rng_state(), numbers)  # lm-eval seeds it
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["local_sums"]
    rows = [json.loads(line) for line in (task_path / "sums.json").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found["examples"] == 12
    assert found["acc"] == pytest.approx(expected_accuracy(lorq.load(folder), tokenizer, rows))
    theirs = simple_evaluate(
        "hf", model_args=f"pretrained={folder},dtype=float32", tasks=["local_sums"], device="cpu",
        task_manager=TaskManager(include_path=str(task_path), include_defaults=False),
    )["results"]["local_sums"]  # fmt: skip
    assert (found["acc"], found["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert read_measured(folder).evaluations[-1]["tasks"]["local_sums"] == found
    assert main(["inspect", str(folder)]) == 0
    assert f"acc {found['acc']:.4g} ± " in capsys.readouterr().out
    assert main(["evaluate", str(folder), *flags, "--task-limit", "3", "--no-record"]) == 0
    assert "(3 examples)" in capsys.readouterr().out
    assert read_measured(folder).evaluations[-1]["tasks"]["local_sums"] == found
    with pytest.raises(ValueError, match=r"knows, it has no local_sum; did you mean local_sums\? `lm_eval ls tasks`"):
        lorq.evaluate(folder, tasks="local_sum", task_path=task_path, **WINDOWS)
    (task_path / "sums.json").unlink()
    with pytest.raises(OSError, match=r"the data of the task local_sums could not be loaded .* with --task-path"):
        lorq.evaluate(folder, tasks="local_sums", task_path=task_path, **WINDOWS)


EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"


def test_the_endings_of_python_docs_are_true_of_the_text_where_they_say_so():
    from pydoc_data.topics import topics

    task = runpy.run_path(str(EXAMPLES / "python_docs.py"))
    rows = [*task["rows"]()]
    assert rows == [*task["rows"]()] and len(rows) >= 400
    text = " ".join(" ".join(topics.values()).split())
    for row in rows:
        true = [f"{row['beginning']} {ending}" in text for ending in row["endings"]]
        assert true == [place == row["answer"] for place in range(4)], row
        assert {len(ending.split()) for ending in row["endings"]} == {8} and len(set(row["endings"])) == 4
    shares = [sum(row["answer"] == place for row in rows) / len(rows) for place in range(4)]
    assert max(shares) < 0.3, "always the same place would be a good answer"


@pytest.mark.filterwarnings("ignore")  # lm-eval's, and those of datasets
def test_python_docs_runs_without_a_network_and_its_error_is_shown(folder, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorq[tasks]'")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    flags = ["--tasks", "python_docs", "--task-path", str(EXAMPLES), "--task-limit", "12", "--window", "32"]
    assert main(["evaluate", str(folder), *flags, "--windows", "2"]) == 0
    found = read_measured(folder).evaluations[-1]["tasks"]["python_docs"]
    # Of the mean of 12 answers that are right or wrong.
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 11))
    assert f"acc {found['acc']:.4g} ± {found['acc_stderr']:#.2g} (12 examples)" in capsys.readouterr().out


BROKEN = {
    "{{question": ("doc_to_text", "lm-eval says TemplateSyntaxError: unexpected end of template"),
    "{{quest}}": ("doc_to_text", "lm-eval says UndefinedError: 'quest' is undefined"),
    "{{answer + 5}}": ("doc_to_target", "lm-eval says IndexError: list index out of range"),
    "{{nothing}}": ("doc_to_choice", "lm-eval says UndefinedError: 'nothing' is undefined"),
    "dev": ("test_split", "lm-eval says KeyError: 'dev'"),
    "free": ("output_type", "lm-eval says ValueError: Got invalid output_type 'free'"),
}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.filterwarnings("ignore")  # lm-eval's, and those of datasets
def test_a_broken_task_is_named_with_its_file_before_a_model_is_loaded(value, folder, task_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorq[tasks]'")
    monkeypatch.setattr("lorq.evaluation._loaded", lambda *_: pytest.fail("loaded"))
    key, words = BROKEN[value]
    file = task_path / "sums.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert (
        main(["evaluate", str(folder), "--tasks", "local_sums", "--task-path", str(task_path), "--window", "32"]) == 1
    )
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith(f"lorq: the task local_sums is broken, {words}") and f"; mend {file}, or leave it" in shown


@pytest.mark.filterwarnings("ignore")
def test_a_task_file_that_cannot_be_read_is_told(folder, task_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorq[tasks]'")
    (task_path / "sums.yaml").write_text("task: local_sums\n  x: [")
    with pytest.raises(
        ValueError, match=r"it has no local_sums; .*; it could not read .*sums\.yaml \(mapping values are"
    ):
        lorq.evaluate(folder, tasks="local_sums", task_path=task_path, **WINDOWS)


def test_errors_of_lorqs_own_are_not_the_tasks():
    from lorq.harness import _faults_of
    from lorq.storage.json_files import parse_json

    with pytest.raises(ValueError, match="x: not valid JSON"), _faults_of("mine", None):
        parse_json(b"{", where="x")


def test_what_is_wrong_with_tasks_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="task_path /x is for tasks, none are named"):
        read_tasks("", "/x")
    with pytest.raises(ValueError, match="such as hellaswag,arc_easy, got 'a,,b'"):
        read_tasks("a,,b", None)
    with pytest.raises(FileNotFoundError, match="must be a folder with lm-eval's task files"):
        read_tasks("a", tmp_path / "none")
    monkeypatch.setattr("lorq.harness.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\(a\) are run by the package lm-eval: pip install 'lorq\[tasks\]'"):
        read_tasks("a", None)


def test_figures_are_kept_in_the_folder(folder, folder_of, text_file, capsys):
    found = lorq.evaluate(folder, reference=folder_of("llama"), text=text_file, **WINDOWS)
    (kept,) = read_measured(folder).evaluations
    assert (kept["kl_mean"], kept["perplexity"]) == (found.kl_mean, found.perplexity)
    lorq.evaluate(folder, text=text_file, window=16, windows=2)
    assert [one["window"] for one in read_measured(folder).evaluations] == [WINDOWS["window"], 16]
    assert main(["inspect", str(folder)]) == 0
    assert "(2 windows of 16 tokens)" in capsys.readouterr().out
    before = (folder / MEASURED).read_bytes()
    lorq.evaluate(folder, text=text_file, record=False, **WINDOWS)
    assert (folder / MEASURED).read_bytes() == before
