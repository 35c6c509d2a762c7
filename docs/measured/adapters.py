"""Scale factors of lords against QLoRA: the same windows, as many numbers, held-out loss, divergence and a task.

    lorq quantize MODEL lords4 --method lords --bits 4 --group-size 64 --calibration TEXT --samples 16 --seq-len 512
    lorq quantize MODEL nf4 --method nearest --grid normal-float --bits 4 --group-size 64
    python docs/measured/adapters.py lords4 --reference MODEL --rate 3e-4
    python docs/measured/adapters.py nf4 --reference MODEL --rate 3e-3

A folder of lords trains its scale factors, at rank 32; any other LoRA of rank 32 and alpha 32 on all its layers, which
on NormalFloat is QLoRA. Prints one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorq
from lorq.adapt import Settings, attach
from lorq.adapt.training import descend, read_dataset
from lorq.harness import open_tasks, run_tasks
from lorq.models.locate import resolve_model
from lorq.models.texts import load_text
from lorq.models.windows import Encoder, token_windows
from lorq.quality import evaluate_model
from lorq.runtime.linear import QuantLinear

RANK = 32
TASKS = Path(__file__).parents[2] / "examples/tasks"


def add_adapter(model: torch.nn.Module, seed: int) -> list[torch.nn.Parameter]:
    """What is to be trained."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if any(getattr(layer.format.codes, "scale_rank", 0) for layer in packed.values()):
        return attach(model, rank=RANK, seed=seed)
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=list(packed), r=RANK, lora_alpha=RANK, lora_dropout=0.0)
    config._register_custom_module({QuantLinear: Linear})
    inject_adapter_in_model(config, model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--rate", type=float, required=True, help="0 trains nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--task-limit", type=int, default=0, help="questions; 0 for all, -1 for none")
    asked = parser.parse_args()
    model, place = lorq.load(asked.folder, device="cpu"), resolve_model(asked.reference)
    chosen = Settings(steps=asked.steps, batch=1, seq_len=256, seed=asked.seed)
    encoder = Encoder.open(Path(asked.folder), model.config, "auto")
    text = "python-docs-odd"
    held_out = token_windows(load_text(text), encoder, windows=asked.windows, length=256, what=text)
    told = {"folder": asked.folder, "rate": asked.rate, "seed": asked.seed}
    if asked.rate:
        examples, learning = read_dataset(model, "python-docs-even", chosen), add_adapter(model, asked.seed)
        losses = descend(model, examples, [{"params": learning, "lr": asked.rate}], chosen, None)
        told |= {"trained": sum(p.numel() for p in learning), "loss_last": sum(losses[-8:]) / len(losses[-8:])}
    model.eval()
    reference = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    quality = evaluate_model(model, held_out, reference=reference)
    told |= {"loss": math.log(quality.perplexity), "kl": quality.kl_mean}
    if asked.task_limit >= 0:
        tokenizer = AutoTokenizer.from_pretrained(asked.folder)
        told |= run_tasks(model, tokenizer, open_tasks(["python_docs"], TASKS), limit=asked.task_limit)["python_docs"]
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
