"""Weights must be finite numbers: looked at as they are read for the work, and ahead of work that takes long."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from lorq.core.checks import all_finite
from lorq.models.blocks import Part, StreamedModel, Target
from lorq.models.skeleton import get_tensor
from lorq.pipeline.plan import Plan, some
from lorq.progress import CHECK, Progress, no_progress

# So many numbers at a time, torch starts no team of threads: the check ahead would have one beside the work's.
_ONE_THREAD = (1 << 15) - 1


def check_kinds(plan: Plan, model: StreamedModel) -> None:
    """Refuse weights that are stored as something else than floating point, with a ValueError; reads none."""
    kinds = {target.name: model.stored_dtype(target.name + ".weight") for target, _ in plan.jobs()}
    if whole := [f"{name} is {kind}" for name, kind in kinds.items() if not kind.is_floating_point]:
        raise ValueError(f"weights must be floating point, {some(whole)}; give the original")


def check_weights(plan: Plan, model: StreamedModel, progress: Progress) -> None:
    """Read all weights; refuse those that are not finite, with a ValueError that names all those layers."""

    def targets() -> Iterator[Target]:
        jobs = list(plan.jobs())
        progress(CHECK, 0, len(jobs))
        for done, (target, _) in enumerate(jobs, 1):
            yield target
            progress(CHECK, done, len(jobs))

    _refuse(_wrong(model, targets()))


def check_resident(plan: Plan, model: StreamedModel, *parts: Part) -> None:
    """The same of parts that are in memory already, and of their other parameters.

    Where a weight of a layer is refused, all are read.
    """
    layers = {target.name + ".weight" for part in parts for target in plan.of(part)}
    names = [name for part in parts for name in part.tensors if model.is_parameter(name)]
    held = [(name, get_tensor(model.model, name)) for name in names]
    bad = [name for name, tensor in held if not tensor.is_meta and not all_finite(tensor)]  # towers are not in memory
    if layers & set(bad):
        check_weights(plan, model, no_progress)
    if bad:
        raise ValueError(
            f"what is kept as it is must be finite, NaN or infinite values are in {some(bad)}; repair the model"
        )


@contextmanager
def checking_ahead(plan: Plan, model: StreamedModel) -> Iterator[Callable[[], None]]:
    """Look at all weights in a thread beside the work, so that what would end a run after hours ends it in minutes.

    Yields a function that refuses once all are seen. An error of the work's numbers waits for the check and gives way
    to its error: weights like these are the cause of most.
    """
    wrong: list[str] = []
    failed: list[Exception] = []
    stop = threading.Event()

    def look() -> None:
        try:
            for target, _ in plan.jobs():
                if stop.is_set():
                    return
                wrong.extend(_wrong(model, [target], at_once=_ONE_THREAD))
        except Exception as error:
            failed.append(error)

    def refuse() -> None:
        if not thread.is_alive():
            _refuse(wrong)
            if failed:
                raise failed[0]

    thread = threading.Thread(target=look, name="check weights", daemon=True)
    thread.start()
    try:
        yield refuse
    except (ArithmeticError, ValueError):
        thread.join()
        _refuse(wrong)
        raise
    finally:
        stop.set()
        thread.join()


def _wrong(model: StreamedModel, targets: Iterable[Target], at_once: int = 0) -> list[str]:
    """The layers whose weights are not finite, each with how many of them."""
    found = []
    for target in targets:
        weight = model.tensor_aside(target.name + ".weight").flatten()
        if weight.itemsize not in (2, 4):  # float8 and float64, as the work will have them
            weight = weight.float()
        if not all(all_finite(part) for part in weight.split(at_once or max(1, len(weight)))):
            found.append(f"{target.name} ({int((~torch.isfinite(weight)).sum())} of {weight.numel()})")
    return found


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ValueError(
            f"weights must be finite, NaN or infinite values are in {', '.join(wrong)}; "
            "repair the model: to leave them as they are does not help, its logits would not be finite either"
        )
