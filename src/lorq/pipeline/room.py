"""Room for a run, on the disk and in memory: what there must be before the work."""

from pathlib import Path

from lorq.models.blocks import StreamedModel
from lorq.pipeline.forecast import bytes_kept
from lorq.pipeline.plan import Plan, estimate
from lorq.runtime.device import available_bytes
from lorq.storage.atomic import require_space
from lorq.storage.companions import find_companions
from lorq.storage.report import Report


def check_room(plan: Plan, model: StreamedModel, out: Path) -> Report:
    """The largest sizes that can come out; an OSError where the disk has no room for them."""
    largest = estimate(plan, model)
    # What is finished is on the disk already; the head room is for index, report and journal.
    finished = sum(file.stat().st_size for file in out.glob("lorq-*.safetensors")) if plan.options.resume else 0
    beside = sum(file.stat().st_size for file in find_companions(model.checkpoint.folder)[0].values())
    require_space(out, max(0, largest.bytes - finished) + beside + _spilled(plan, model) + (1 << 20))
    return largest


def _spilled(plan: Plan, model: StreamedModel) -> int:
    """Of hidden states that do not fit in memory, as `Streams.begin` puts them into files beside the result."""
    options = plan.options
    kept = bytes_kept(plan, model, (options.samples, options.seq_len) if plan.observing else None)
    return kept if kept > options.spill_bytes else 0


def too_large(model: StreamedModel) -> str:
    """Why a block cannot be worked on in this machine's memory; "" where it can."""
    sizes = {p.name: sum(t.numel() for t in model.model.get_submodule(p.name).parameters()) for p in model.blocks}
    largest = max(sizes, key=sizes.__getitem__)
    needed, free = 2 * 4 * sizes[largest], available_bytes()
    if model.device.type != "cpu" or needed <= free:
        return ""
    return (
        f"a block must fit in memory in float32, with room to solve its layers: {largest} takes {needed / 1e9:.1f} GB, "
        f"{free / 1e9:.1f} GB are free; --dry-run tells what the whole run takes"
    )


def require_memory(model: StreamedModel) -> None:
    """The model writes text only if it fits in memory with room to spare."""
    parameters = sum(p.numel() for p in model.model.parameters())
    available = available_bytes()
    if 4 * parameters > 0.7 * available:
        raise ValueError(
            f"calibration 'self' needs the whole model in memory ({4 * parameters / 1e9:.1f} GB in float32), "
            f"{available / 1e9:.1f} GB are free; name a text instead, such as --calibration FILE or wikitext2"
        )
