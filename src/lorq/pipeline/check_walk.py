"""One look before the work: walking through the blocks must give what the model itself computes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from lorq.models.blocks import Part, StreamedModel
from lorq.models.experts import expert_name, find_experts
from lorq.pipeline.observe import shared_inputs
from lorq.pipeline.plan import Plan
from lorq.pipeline.verify import SAME_SQNR_DB, probe_tokens, sqnr_db

# So many weights are all read to look at every block: a second or two.
_ALL_WEIGHTS = 1 << 29


def check_walk(model: StreamedModel, plan: Plan) -> None:
    """Compare logits of a window that walks through blocks with those of the model's own forward.

    It is the second of two, so that what a block is called with for the first cannot pass for its own. Each block is in
    memory while it works; of large models only the first two work, and the first of every other class.

    Raises:
        ValueError: if they differ, the model cannot be walked through at all, or layers that are to be observed are not
            used.
    """
    name, tokens = type(model.model).__name__, probe_tokens(model.model.config.get_text_config(), 0)
    with model.resident(*model.outside):
        try:
            stream = model.embed(tokens)

            def walk_on(block: Part) -> None:
                run = partial(model.run, block, stream, 1)
                shared_inputs(run, _observed(model, plan, block))
                stream.hidden[1] = run()

            expected = model.own_logits(tokens[1], walk_on, _looked_at(model)).cpu()
            got = model.logits(tokens[1], stream.hidden[1]).cpu()
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{name} is not supported: its blocks must run one by one, which gives {type(error).__name__}: {first}"
            ) from error
    # Weights that are not finite are told of by name, when all are read.
    if bool(torch.isfinite(expected).all()) and (near := sqnr_db(expected, got)) < SAME_SQNR_DB:
        raise ValueError(
            f"{name} is not supported: its blocks one by one must give the model's own logits to "
            f"{SAME_SQNR_DB:.0f} dB, got {near:.1f} dB; it hands more from block to block than lorq follows"
        )


def _observed(model: StreamedModel, plan: Plan, block: Part) -> dict[str, nn.Module]:
    """The layers whose inputs are looked at, but experts', which not every text reaches."""
    experts = find_experts(model.model, block.name)
    names = [t.name for t, m in plan.of(block).items() if plan.observes(m) and expert_name(t.name, experts) is None]
    return {name: model.model.get_submodule(name) for name in names}


def _looked_at(model: StreamedModel) -> Sequence[Part]:
    """The blocks that are looked at."""
    modules = [model.model.get_submodule(block.name) for block in model.blocks]
    if sum(p.numel() for module in modules for p in module.parameters()) <= _ALL_WEIGHTS:
        return model.blocks
    kinds = [type(module) for module in modules]
    return [block for i, block in enumerate(model.blocks) if i == 1 or kinds[i] not in kinds[:i]]
