"""One look before the work: walking through the blocks must give what the model itself computes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from lorq.core.checks import all_finite
from lorq.models.blocks import Part, StreamedModel
from lorq.models.experts import expert_name, find_experts
from lorq.models.tables import head_inputs
from lorq.pipeline.check_weights import check_resident
from lorq.pipeline.observe import seen_inputs
from lorq.pipeline.plan import Plan
from lorq.pipeline.tables import head_table
from lorq.pipeline.verify import SAME_SQNR_DB, probe_tokens, sqnr_db
from lorq.progress import CHECK, Progress

# So many weights are all read to look at every block: a second or two.
_ALL_WEIGHTS = 1 << 29
_NOT_CALLED = "is not called when the model runs on text alone, kept as it is"


def check_walk(model: StreamedModel, plan: Plan, progress: Progress) -> Plan:
    """Compare logits of a window that walks through blocks with those of the model's own forward.

    It is the second of two, so that what a block is called with for the first cannot pass for its own. Each block is in
    memory while it works, and its weights are looked at; of large models only the first two work, and the first of
    every other kind (`looks_at_all`).

    Returns:
        The plan without layers that are not called, such as a decoder's attention to an encoder, or layers of which the
        block reads the weight and multiplies by itself: what their inputs are would never be seen.

    Raises:
        ValueError: if they differ, the model cannot be walked through at all, or weights are not finite.
    """
    silent: dict[str, str] = {}
    name, tokens = type(model.model).__name__, probe_tokens(model.model.config.get_text_config(), 0)
    blocks = _looked_at(model)
    progress(CHECK, 0, len(blocks))
    with model.resident(*model.outside):
        try:
            before = [(p, p._version) for p in model.model.parameters() if not p.is_inference()]
            stream = model.embed(tokens)
            if any(p._version != version for p, version in before):
                raise ValueError(f"{name} is not supported: it changes its weights while it runs, and packed ones stay")

            seen: list[Part] = []

            def walk_on(block: Part) -> None:
                check_resident(plan, model, block)
                seen.append(block)
                progress(CHECK, len(seen), len(blocks))
                run = partial(model.run, block, stream, 1)
                layers = _layers(model, plan, block)
                called = seen_inputs(run, layers)
                for local in {name.removeprefix(block.name) for name in layers.keys() - called.keys()}:
                    alike = [other for other in model.blocks if _kind(model, other) == _kind(model, block)]
                    silent.update(dict.fromkeys((other.name + local for other in alike), _NOT_CALLED))
                stream.hidden[1] = run()

            expected = model.own_logits(tokens[1], walk_on, blocks).cpu()
            got = model.logits(tokens[1], stream.hidden[1]).cpu()
            head, table = head_table(model, plan.tables)
            if table is not None:
                head_inputs(model, head, tokens[1], stream.hidden[1])
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{name} is not supported: its blocks must run one by one, which gives {type(error).__name__}: {first}"
            ) from error
        check_resident(plan, model, *model.outside)
    if not all_finite(expected):
        raise ValueError(f"{name} must give finite logits, its own for random tokens are not; repair the model")
    if (near := sqnr_db(expected, got)) < SAME_SQNR_DB:
        raise ValueError(
            f"{name} is not supported: its blocks one by one must give the model's own logits to "
            f"{SAME_SQNR_DB:.0f} dB, got {near:.1f} dB; it hands more from block to block than lorq follows"
        )
    layers = {part: {t: m for t, m in own.items() if t.name not in silent} for part, own in plan.layers.items()}
    checked = replace(plan, layers=layers, excluded=silent | dict(plan.excluded))
    if any(plan.blocks.values()) and not any(checked.blocks.values()):
        raise ValueError(f"{name} is not supported: none of the layers to quantize is called when it runs on text")
    return checked


def _layers(model: StreamedModel, plan: Plan, block: Part) -> dict[str, nn.Module]:
    """The layers to quantize, but experts', which not every text reaches."""
    experts = find_experts(model.model, block.name)
    names = [target.name for target in plan.of(block) if expert_name(target.name, experts) is None]
    return {name: model.model.get_submodule(name) for name in names}


def looks_at_all(model: StreamedModel) -> bool:
    """Whether `check_walk` has every block in memory."""
    modules = (model.model.get_submodule(block.name) for block in model.blocks)
    return sum(p.numel() for module in modules for p in module.parameters()) <= _ALL_WEIGHTS


def _kind(model: StreamedModel, block: Part) -> tuple[object, ...]:
    """What a block is made of: its class, and the layers in it."""
    return type(model.model.get_submodule(block.name)), *(t.name.removeprefix(block.name) for t in block.targets)


def _looked_at(model: StreamedModel) -> Sequence[Part]:
    """The blocks that are looked at."""
    if looks_at_all(model):
        return model.blocks
    kinds = [_kind(model, block) for block in model.blocks]
    return [block for i, block in enumerate(model.blocks) if i == 1 or kinds[i] not in kinds[:i]]
