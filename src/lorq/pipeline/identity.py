"""What decides the bytes of a run's folder: for its report, and for the journal that a resumed run is held against."""

from dataclasses import replace
from typing import Any, Final

import torch

from lorq.models.blocks import StreamedModel
from lorq.models.quantized import source_note
from lorq.models.windows import Windows
from lorq.pipeline.plan import Plan
from lorq.storage.names import FORMAT_VERSION
from lorq.version import __version__

# What is not known yet when a run that goes on is compared: of a text, and what a budget leads to.
LATER: Final = ("budget", "calibration", "calibration_tokens", "samples", "seq_len", "start_token")
# Options that say how a run is done and leave the bytes as they are.
_HOW: Final = ("device", "cluster", "spill_bytes", "memory_budget", "dry_run", "resume", "overwrite")


def run_info(plan: Plan, model: StreamedModel, windows: Windows | None) -> dict[str, Any]:
    """Everything that was asked for and decides the bytes of the folder, for its report."""
    options = plan.options if windows else replace(plan.options, samples=0, seq_len=0)
    return {
        **{key: value for key, value in vars(options).items() if key not in _HOW},
        "format_version": FORMAT_VERSION,
        "lorq_version": __version__,
        "model": model.checkpoint.fingerprint(),
        "calibration": None if windows is None else windows.source,
        "start_token": None if windows is None else windows.start_token,
        "calibration_tokens": None if windows is None else windows.sha256,
        "stream": plan.stream,
        "budget": dict(plan.budget),
        "device_type": model.device.type,
    } | ({"dequantized": note} if (note := source_note(model.checkpoint)) else {})


def identity(plan: Plan, model: StreamedModel, windows: Windows | None) -> dict[str, Any]:
    """Everything that decides the bytes of the folder; resuming with another one is refused.

    Sums come out otherwise with other threads and another torch. That is for the journal alone: the folder does not
    tell on what machine it was made.
    """
    return {
        **run_info(plan, model, windows),
        "method": plan.name,
        "settings": plan.settings,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
