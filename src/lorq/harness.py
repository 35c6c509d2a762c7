"""Tasks of lm-eval, EleutherAI's harness, on a loaded model."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb
from typing import Any

from lorq.models.locate import full_path

_AT_ONCE = 8  # sequences in a batch


def read_tasks(tasks: str, path: str | Path | None) -> tuple[list[str], Path | None]:
    """The names in ``tasks``, commas between, and the folder with more of them; before anything is loaded.

    Raises:
        ValueError: if a name is empty, or there is a folder and no name.
        FileNotFoundError: if there is no such folder.
        ImportError: if lm-eval is not installed.
    """
    if not tasks:
        if path is not None:
            raise ValueError(f"task_path {path} is for tasks, none are named; give --tasks too, or leave it away")
        return [], None
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise ValueError(f"tasks must be names with commas between, such as hellaswag,arc_easy, got {tasks!r}")
    place = None if path is None else full_path(path)
    if place is not None and not place.is_dir():
        raise FileNotFoundError(f"task_path must be a folder with lm-eval's task files (.yaml), {path} is none")
    if find_spec("lm_eval") is None:
        raise ImportError(f"tasks ({tasks}) are run by the package lm-eval: pip install 'lorq[tasks]'")
    return names, place


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval with their data; ``opened`` are its own objects, which ``manager`` has made."""

    names: tuple[str, ...]
    manager: Any
    opened: tuple[Any, ...]


def _manager(names: list[str], path: Path | None) -> Any:
    """lm-eval's manager of tasks, which knows the named ones.

    Raises:
        ValueError: naming those that it does not know.
    """
    with _own_randomness():
        from lm_eval.tasks import TaskManager

    if path is not None:
        own = TaskManager(include_path=str(path), include_defaults=False)  # lm-eval's own thousands take a while
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if path is None else str(path))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        close = [match for name in unknown for match in get_close_matches(name, manager.all_tasks, 1)]
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"tasks must be ones that lm-eval knows, it has no {', '.join(unknown)}; {meant}`lm_eval ls tasks` lists "
            f"them, and --task-path adds a folder's{_unreadable(path)}"
        )
    return manager


def _unreadable(path: Path | None) -> str:
    """The task files that lm-eval passes over, in words."""
    from lm_eval.tasks._yaml_loader import load_yaml

    wrong = []
    for file in sorted(path.glob("**/*.yaml")) if path else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of YAML's, and whatever it includes
            wrong.append(f"{file} ({' '.join(str(error).split())})")
    return f"; it could not read {', '.join(wrong)}" if wrong else ""


def open_tasks(names: list[str], path: Path | None) -> Tasks:
    """The named tasks with their data, each tried on its first example, and groups of them.

    Raises:
        OSError: if the data of a task cannot be had.
        ValueError: for a task that lm-eval does not know, or that is broken, with its file.
    """
    manager = _manager(names, path)
    opened: list[Any] = []
    with _own_randomness():
        for name in names:
            with _faults_of(name, manager):
                loaded = manager.load([name])
                opened += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
            for task in loaded["tasks"].values():
                with _faults_of(task.task_name, manager):
                    first = next(iter(task.eval_docs))
                    task.doc_to_text(first)
                    if task.OUTPUT_TYPE == "multiple_choice":
                        task.doc_to_choice(first)
                    task.doc_to_target(first)
    return Tasks(tuple(names), manager, tuple(opened))


@contextmanager
def _faults_of(name: str, manager: Any) -> Iterator[None]:
    """Say of which task an error is, and whose fault; those of lorq's own code below are passed on."""
    try:
        yield
    except Exception as error:
        files = {Path(frame.filename) for frame in extract_tb(error.__traceback__)} - {Path(__file__)}
        if any(file.is_relative_to(Path(__file__).parent) for file in files):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError):  # what datasets and the hub raise, without network too
            raise OSError(
                f"the data of the task {name} could not be loaded ({reason}); it comes from the hub once and is kept: "
                "try again with network, or give tasks on local files with --task-path"
            ) from error
        file = getattr(manager.task_index.get(name), "yaml_path", None)
        raise ValueError(
            f"the task {name} is broken, lm-eval says {type(error).__name__}: {reason}; mend "
            f"{file or 'its file'}, or leave it out"
        ) from error


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, *, limit: int) -> dict[str, dict[str, float]]:
    """Every task's metrics, their standard errors and how many examples there were, by name; groups included.

    As ``lm_eval --model hf`` with its own defaults, in batches of 8.

    Args:
        limit: examples of each task; 0 for all.

    Raises:
        ValueError: for a task that fails on one of its examples.
    """
    with _own_randomness():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_AT_ONCE)
        with _faults_of(", ".join(tasks.names), tasks.manager):
            results = simple_evaluate(
                wrapped, tasks=[*tasks.opened], task_manager=tasks.manager, limit=limit or None, log_samples=False,
                bootstrap_iters=1000,
            )  # fmt: skip
    assert results is not None  # there is one process
    counts = {name: count["effective"] for name, count in results.get("n-samples", {}).items()}
    return {
        name: _numbers(metrics) | ({"examples": counts[name]} if name in counts else {})
        for name, metrics in (results["results"] | results.get("groups", {})).items()
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics by their names, lm-eval's filter behind it unless there is none."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name, _, filter_ = key.partition(",")
        if filter_ and isinstance(value, int | float):
            found[name if filter_ == "none" else f"{name} ({filter_})"] = float(value)
    return found


@contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds everybody's generators; they are put back."""
    import numpy
    import torch

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
