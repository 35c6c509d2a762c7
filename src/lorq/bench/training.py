"""Measure training: what an adapter, an additive low-rank adapter of the same size, and QAT make of one folder."""

import json
import time
from typing import Any

from torch import nn

from lorq.adapt import Settings, train
from lorq.adapt.adapters import lords_format, lords_layers
from lorq.adapt.training import descend, read_dataset
from lorq.bench.timing import Result, in_child
from lorq.models.locate import resolve_model
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, token_windows
from lorq.quality import evaluate_model
from lorq.runtime.hf import load
from lorq.runtime.linear import QuantLinear

_LORA_RATE = 5e-4
_WORK = """
import json
from lorq.bench.training import measure
print(json.dumps(measure(**json.loads(sys.argv[1]))))
"""


def run(**given: Any) -> Result:
    """`measure` in a process of its own, and the peak of its memory."""
    _, peak, printed = in_child(_WORK, [json.dumps(given)], f"training {given['way']} with rate {given['rate']}")
    return json.loads(printed.splitlines()[-1]) | {"peak_megabytes": peak / 1024e3}


def measure(
    model: str,
    *,
    way: str,
    rate: float,
    text: str,
    evaluation: str,
    windows: int,
    reference: str | None,
    settings: dict[str, Any],
) -> Result:
    """One run of `lorq.bench.commands.bench_adapt`."""
    folder = resolve_model(model)
    length = settings.get("seq_len", 512)
    loaded = load(folder, device="cpu")
    encoder = Encoder.open(folder, loaded.config, settings.get("start_token", "auto"))
    held_out = token_windows(load_text(evaluation), encoder, windows=windows, length=length, what=evaluation)
    before = evaluate_model(loaded, held_out).perplexity
    began = time.perf_counter()
    if way == "lora":
        chosen, examples = Settings(**settings), read_dataset(loaded, text, Settings(**settings))
        add_lora(loaded)
        learning = [p for p in loaded.parameters() if p.requires_grad]
        losses = descend(loaded, examples, [{"params": learning, "lr": rate or _LORA_RATE}], chosen, None)
        count = sum(p.numel() for p in learning)
    else:
        trained = train(
            loaded, text, way, reference=reference if way == "qat" else None, learning_rate=rate, **settings  # type: ignore[arg-type]
        )  # fmt: skip
        losses, count = list(trained.losses), trained.parameters
    seconds = time.perf_counter() - began
    last, after = losses[-10:], evaluate_model(loaded, held_out).perplexity
    return {
        "way": way, "rate": rate, "trained": count, "perplexity_before": before, "perplexity_after": after,
        "loss_first": losses[0], "loss_last": sum(last) / len(last), "seconds_a_step": seconds / len(losses),
    }  # fmt: skip


def add_lora(model: nn.Module) -> None:
    """Put peft's additive adapters onto a LoRDS model's layers, each with as many parameters as its scale factors."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    ranks = {name: lords_format(layer).scale_rank for name, layer in lords_layers(model).items()}
    config = LoraConfig(
        target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, r=1, lora_alpha=1, lora_dropout=0.0
    )
    config._register_custom_module({QuantLinear: Linear})
    inject_adapter_in_model(config, model)
